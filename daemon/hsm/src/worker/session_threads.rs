//! The threads of a worker: each has a session, receives a call, serves it, and replies.
//!
//! ```text
//!               opened                   session ended
//!   opening ──────────────▶ receiving ──────────────────▶ opening
//!      │  ▲                   (live)
//!      │  │ after a pause
//!      │  └───────────── waiting      another thread receives
//!      │ failed             ▲
//!      ├────────────────────┘
//!      └───────────────▶ receiving    no other thread receives: every call tries to open,
//!                         (lone)      and is answered by the error when that fails
//! ```
//!
//! Invariant: while the socket is open, at least one thread receives, opens a session, or serves. A thread that receives
//! without a session is *lone*. `live` counts the threads that have a session. A session is closed before the reply that
//! reports its end, since tokens count sessions.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use claviger_process::lock::{lock, unpoisoned};
use claviger_process::signals::exit_at_once;
use cryptoki::error::RvError;
use rustix::io::Errno;

use crate::code::Function;
use crate::error::{Failure, HsmError, WorkerFault};
use crate::fault::SessionAction;
use crate::keys::TokenKey;
use crate::link::{Answer, Call, Cost, FrameBuffer, Level, MAX_FRAME, Report, Request, Start, Value, WorkerEnd};
use crate::worker::process::SOCKET_FAILED;
use crate::worker::session::OpenSession;
use crate::worker::spread::Spread;
use crate::worker::token::Token;

/// Time that threads get to finish their calls after the end of the socket.
const FAREWELL: Duration = Duration::from_secs(2);
/// Time that the module gets after that to finalise.
const FINALIZATION: Duration = Duration::from_secs(1);
/// Limits of the pause between attempts to open a session.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Pause between attempts while the token has no room for another session.
const PAUSE_WITHOUT_ROOM: Duration = Duration::from_secs(30);
/// Maximum length of a reply in bytes, without its answer.
const REPLY_HEAD: usize = 64;
/// Maximum length in bytes of a listed key's label or id; longer ones are cut.
const LONGEST_LABEL: usize = 1024;

/// The state that the threads of a worker share.
pub(crate) struct SessionThreads {
    daemon: Arc<WorkerEnd>,
    token: OnceLock<Arc<Token>>,
    /// Held by the thread that logs in and opens a session. It is not held during the search for keys: after a reset of the
    /// connection, all sessions are renewed while calls wait for them.
    opening: Mutex<()>,
    state: Mutex<State>,
    /// Notified when the state's `ending` or `threads` has changed.
    changed: Condvar,
    failed: AtomicBool,
    spread: Spread,
}

#[derive(Default)]
struct State {
    /// True once the socket has ended.
    ending: bool,
    threads: usize,
    /// Number of threads that have a session.
    live: u32,
    /// True while a thread without a session receives.
    lone: bool,
    /// Number of sessions that the token had granted when it last refused one.
    given: Option<u32>,
}

/// Next action of a thread without a session.
enum Next {
    TryAgain,
    Receive,
    End,
}

/// Aborts the process when its thread panics. The daemon then starts another worker, and no call waits until its deadline.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}

impl SessionThreads {
    pub(crate) fn new(daemon: Arc<WorkerEnd>) -> Arc<Self> {
        Arc::new(SessionThreads {
            daemon,
            token: OnceLock::new(),
            opening: Mutex::new(()),
            state: Mutex::default(),
            changed: Condvar::new(),
            failed: AtomicBool::new(false),
            spread: Spread::new(),
        })
    }

    /// Starts the first thread, which loads the module, logs in, opens its session and answers the call with this id; and
    /// then starts the others.
    pub(crate) fn start(self: &Arc<Self>, id: u32, start: Start) {
        let threads = Arc::clone(self);
        if let Err(error) = self.spawn(move || threads.first(id, start)) {
            let why = format!("no thread for a session: {error}");
            self.fail(&Failure::new(HsmError::Worker(WorkerFault::NotStarted), why));
        }
    }

    fn spawn(self: &Arc<Self>, work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        // Counted before the thread runs, so that `finish` waits for it.
        self.state().threads += 1;
        let threads = Arc::clone(self);
        let spawned = thread::Builder::new().name("hsm session".to_owned()).spawn(move || {
            let guard = AbortOnPanic;
            work();
            threads.thread_ended();
            drop(guard);
        });
        if spawned.is_err() {
            self.thread_ended();
        }
        spawned.map(drop)
    }

    fn thread_ended(&self) {
        self.state().threads -= 1;
        self.changed.notify_all();
    }

    fn first(self: &Arc<Self>, id: u32, start: Start) {
        let sessions = start.sessions;
        let token = match Token::load(start, Arc::clone(&self.daemon)) {
            Ok(token) => Arc::clone(self.token.get_or_init(|| Arc::new(token))),
            Err(failure) => return self.fail(&failure),
        };
        let session = match self.open(&token) {
            Ok(session) => session,
            Err(failure) => return self.fail(&failure),
        };
        if self.reply(id, Cost::default(), Ok(Answer::Done)).is_err() {
            return self.close(&mut Some(session));
        }
        for _ in 1..sessions {
            let (threads, its_token) = (Arc::clone(self), Arc::clone(&token));
            if let Err(error) = self.spawn(move || threads.work(&its_token, None)) {
                token.note(Level::Warn, &format!("no thread for another session: {error}"));
                break;
            }
        }
        self.work(&token, Some(session));
    }

    /// Reports the failed start to the daemon and ends the process.
    fn fail(&self, failure: &Failure) {
        self.failed.store(true, Ordering::Release);
        let _ = self.daemon.send(&Report::StartFailed(failure.clone()));
        // This wakes the main thread, which waits for the end of the socket.
        let _ = rustix::net::shutdown(&self.daemon, rustix::net::Shutdown::Both);
    }

    /// Ends the worker after the end of the socket: waits for the threads, closes the login and finalises the module,
    /// within a few seconds. Returns whether the start succeeded and whether all of this was done in time.
    pub(crate) fn finish(&self) -> Finished {
        let mut state = self.state();
        state.ending = true;
        self.changed.notify_all();
        let waited = self.changed.wait_timeout_while(state, FAREWELL, |state| state.threads > 0);
        let threads = unpoisoned(waited).0.threads;
        let clean = threads == 0 && self.finalize();
        Finished { started: !self.failed.load(Ordering::Acquire), clean }
    }

    fn finalize(&self) -> bool {
        let Some(token) = self.token.get().cloned() else { return true };
        let (tell, told) = mpsc::channel();
        let finalizing = thread::Builder::new().name("hsm finalize".to_owned()).spawn(move || {
            let _ = tell.send(token.close().is_ok());
        });
        finalizing.is_ok() && told.recv_timeout(FINALIZATION).unwrap_or(false)
    }

    /// Receives and serves calls until the socket ends.
    fn work(&self, token: &Arc<Token>, mut session: Option<OpenSession>) {
        let mut buffer = FrameBuffer::new();
        let mut pause = SHORTEST_PAUSE;
        let mut lone = false;
        loop {
            if session.is_none() && !lone {
                match self.open(token) {
                    Ok(open) => {
                        session = Some(open);
                        pause = SHORTEST_PAUSE;
                    }
                    Err(failure) => match self.after_failure(failure.error, &mut pause) {
                        Next::TryAgain => continue,
                        Next::Receive => lone = true,
                        Next::End => break,
                    },
                }
            }
            let Ok(len @ 1..) = self.daemon.recv(buffer.room(), || self.spread.before_waiting()) else { break };
            let served = self.serve(token, &mut session, buffer.frame(len));
            buffer.wipe(len);
            match served {
                Ok(()) => {}
                // A library closed the socket or replaced it. Other threads that wait on it keep the daemon from seeing an
                // end.
                Err(error) if error.raw_os_error() == Some(Errno::BADF.raw_os_error()) => {
                    exit_at_once(SOCKET_FAILED);
                }
                Err(_) => break,
            }
            if lone {
                lone = self.stays_lone(session.is_some());
            }
        }
        self.close(&mut session);
    }

    /// Handles a failure to open a session: other threads go on receiving, or else this one does.
    fn after_failure(&self, error: HsmError, pause: &mut Duration) -> Next {
        let no_room = error.is_code(RvError::SessionCount);
        if no_room {
            self.say_few_sessions();
        }
        let mut state = self.state();
        if state.live == 0 && !state.lone {
            state.lone = true;
            return Next::Receive;
        }
        let this_time = if no_room { PAUSE_WITHOUT_ROOM } else { *pause };
        *pause = (*pause * 2).min(LONGEST_PAUSE);
        let waited = self.changed.wait_timeout_while(state, this_time, |state| !state.ending);
        if unpoisoned(waited).0.ending { Next::End } else { Next::TryAgain }
    }

    fn say_few_sessions(&self) {
        let mut state = self.state();
        let given = state.live;
        let is_news = state.given.replace(given) != Some(given);
        // The lock is released first: a daemon that does not read must not delay the end of the process.
        drop(state);
        if is_news {
            let _ = self.daemon.send(&Report::FewSessions { given });
        }
    }

    /// Returns true if the lone thread goes on without a session: neither this thread nor another one has a session.
    fn stays_lone(&self, has_session: bool) -> bool {
        let mut state = self.state();
        state.lone = !has_session && state.live == 0;
        state.lone
    }

    fn open(&self, token: &Arc<Token>) -> Result<OpenSession, Failure> {
        let started = Instant::now();
        let opened = self.open_one_at_a_time(token).and_then(|mut session| {
            session.prepare()?;
            Ok(session)
        });
        let took = started.elapsed();
        if opened.is_ok() {
            let mut state = self.state();
            state.live += 1;
            if state.given.is_some_and(|given| state.live > given) {
                state.given = None;
            }
        }
        let result = opened.as_ref().map(drop).map_err(|failure| failure.error);
        token.report(&Report::SessionOpened { took, result });
        opened
    }

    fn open_one_at_a_time(&self, token: &Arc<Token>) -> Result<OpenSession, Failure> {
        let _one_at_a_time = lock(&self.opening);
        OpenSession::open(token)
    }

    fn close(&self, session: &mut Option<OpenSession>) {
        if let Some(open) = session.take() {
            drop(open);
            self.state().live -= 1;
            let _ = self.daemon.send(&Report::SessionClosed);
        }
    }

    /// Serves the call in a frame. Errors are errors of the socket.
    fn serve(&self, token: &Arc<Token>, session: &mut Option<OpenSession>, frame: &[u8]) -> std::io::Result<()> {
        let nothing = Cost::default();
        let Some(Call { id, request }) = Call::decode(frame) else {
            token.note(Level::Error, "the worker cannot read a frame");
            return match frame.first_chunk() {
                Some(id) => self.reply(u32::from_le_bytes(*id), nothing, Err(HsmError::UnexpectedReply)),
                None => Ok(()),
            };
        };
        match request {
            Request::Start(_) => self.reply(id, nothing, Err(HsmError::UnexpectedReply)),
            Request::SetPin(number, pin) => {
                token.set_pin(number, pin);
                self.reply(id, nothing, Ok(Answer::Done))
            }
            request => {
                let (result, cost) = self.perform(token, session, &request);
                match result {
                    Ok(Value::Keys(keys)) => self.reply_keys(token, id, cost, keys),
                    Ok(Value::Bytes(bytes)) if bytes.len() > MAX_FRAME - REPLY_HEAD => {
                        self.reply(id, cost, Err(HsmError::UnexpectedReply))
                    }
                    Ok(Value::Bytes(bytes)) => self.reply(id, cost, Ok(Answer::Bytes(&bytes))),
                    Ok(Value::Public(key)) => self.reply(id, cost, Ok(Answer::Public(key))),
                    Ok(Value::Done) => self.reply(id, cost, Ok(Answer::Done)),
                    Err(error) => self.reply(id, cost, Err(error)),
                }
            }
        }
    }

    /// Performs a request. Stale sessions, logins and handles are renewed once before the daemon gets an error.
    fn perform(
        &self,
        token: &Arc<Token>,
        session: &mut Option<OpenSession>,
        request: &Request<'_>,
    ) -> (Result<Value, HsmError>, Cost) {
        let may_repeat = !matches!(request, Request::Generate(_) | Request::Import(..) | Request::Destroy { .. });
        let mut renewed = false;
        loop {
            let open = match session {
                Some(open) => open,
                None => match self.open(token) {
                    Ok(open) => {
                        renewed = true;
                        session.insert(open)
                    }
                    Err(failure) => return (Err(failure.error), Cost::default()),
                },
            };
            let (result, cost) = open.perform(request);
            let action = result.as_ref().err().map_or(SessionAction::Keep, |error| action_after(*error));
            if action != SessionAction::Keep {
                self.close(session);
            }
            if action != SessionAction::Renew || !may_repeat || renewed {
                return (result, cost);
            }
        }
    }

    fn reply(&self, id: u32, cost: Cost, result: Result<Answer<'_>, HsmError>) -> std::io::Result<()> {
        self.daemon.send(&Report::Reply { id, cost, result })
    }

    /// Sends a list in several frames. The last frame carries the cost.
    fn reply_keys(&self, token: &Token, id: u32, cost: Cost, keys: Vec<TokenKey>) -> std::io::Result<()> {
        let (parts, left_out) = into_parts(keys, MAX_FRAME - REPLY_HEAD);
        if left_out > 0 {
            token.note(Level::Warn, &format!("{left_out} keys are too large to be listed"));
        }
        let last = parts.len() - 1;
        for (index, keys) in parts.into_iter().enumerate() {
            let more = index < last;
            let cost = if more { Cost::default() } else { cost };
            self.reply(id, cost, Ok(Answer::Keys { keys, more }))?;
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// Returns the action on a session in which an operation failed.
fn action_after(error: HsmError) -> SessionAction {
    match (error, error.fault().session) {
        // A key with `CKA_ALWAYS_AUTHENTICATE`: the operation that the login was for stays open, and blocks the next one.
        (HsmError::Pkcs11(Function::Login, _), SessionAction::Keep) => SessionAction::End,
        (_, action) => action,
    }
}

/// Outcome of a worker's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Finished {
    /// False if the start failed.
    pub(crate) started: bool,
    /// True if all threads ended and the module was finalised in time.
    pub(crate) clean: bool,
}

/// Splits a list into parts of at most `room` encoded bytes, at least one part. Also returns the number of keys that fit
/// into no part.
fn into_parts(keys: Vec<TokenKey>, room: usize) -> (Vec<Vec<TokenKey>>, usize) {
    let (mut parts, mut part, mut used, mut left_out) = (Vec::new(), Vec::new(), 0, 0);
    for mut key in keys {
        let end = (0..=LONGEST_LABEL).rev().find(|end| key.label.is_char_boundary(*end)).unwrap_or_default();
        key.label.truncate(end);
        let Some(size) = postcard::experimental::serialized_size(&key).ok().filter(|size| *size <= room) else {
            left_out += 1;
            continue;
        };
        if used + size > room {
            parts.push(std::mem::take(&mut part));
            used = 0;
        }
        used += size;
        part.push(key);
    }
    parts.push(part);
    (parts, left_out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod unit {
    use super::*;
    use crate::identity::KeyId;
    use crate::link;

    #[test]
    fn a_lack_of_sessions_is_reported_once_for_each_number() {
        let (daemon, worker) = link::pair().unwrap();
        let threads = SessionThreads::new(Arc::new(WorkerEnd::new(worker).unwrap()));
        // No thread waits now.
        threads.state().ending = true;
        let error = HsmError::new(Function::OpenSession, RvError::SessionCount);
        for live in [2, 2, 3, 3, 3, 2] {
            threads.state().live = live;
            assert!(matches!(threads.after_failure(error, &mut SHORTEST_PAUSE.clone()), Next::End));
        }
        let mut given = Vec::new();
        let mut buffer = [0; 64];
        while let Ok((len, _)) = rustix::net::recv(&daemon, &mut buffer, rustix::net::RecvFlags::empty()) {
            let Some(Report::FewSessions { given: sessions }) = link::decode_report(&buffer[..len]) else { panic!() };
            given.push(sessions);
        }
        assert_eq!(given, [2, 3, 2]);
    }

    #[test]
    fn one_thread_receives_when_none_has_a_session() {
        let (_daemon, worker) = link::pair().unwrap();
        let threads = SessionThreads::new(Arc::new(WorkerEnd::new(worker).unwrap()));
        threads.state().ending = true;
        let (error, mut pause) = (HsmError::new(Function::OpenSession, RvError::DeviceError), SHORTEST_PAUSE);
        assert!(matches!(threads.after_failure(error, &mut pause), Next::Receive));
        assert!(matches!(threads.after_failure(error, &mut pause), Next::End), "another thread receives");
        assert_eq!(pause, SHORTEST_PAUSE * 2);
        for _ in 0..10 {
            threads.after_failure(error, &mut pause);
        }
        assert_eq!(pause, LONGEST_PAUSE);
        // The thread goes on until some thread has a session.
        assert!(threads.stays_lone(false));
        threads.state().live = 1;
        assert!(!threads.stays_lone(false) && !threads.stays_lone(true));
    }

    #[test]
    fn a_session_whose_operation_stays_open_is_not_used_again() {
        let busy = |function| action_after(HsmError::new(function, RvError::FunctionFailed));
        assert_eq!((busy(Function::DecryptInit), busy(Function::Login)), (SessionAction::Keep, SessionAction::End));
        let stale = HsmError::new(Function::Login, RvError::SessionHandleInvalid);
        assert_eq!(action_after(stale), SessionAction::Renew);
    }

    fn key(label: String) -> TokenKey {
        TokenKey {
            id: Some(KeyId(vec![7; 16])),
            label,
            public: None,
            decrypts: true,
            signs: true,
            always_authenticate: false,
            fingerprint: None,
        }
    }

    #[test]
    fn long_lists_are_cut_and_nothing_is_lost() {
        let keys: Vec<_> = (0..500).map(|n| key(format!("{n} {}", "x".repeat(n)))).collect();
        let (parts, left_out) = into_parts(keys.clone(), 4096);
        assert!(parts.len() > 20 && left_out == 0, "{} {left_out}", parts.len());
        for part in &parts {
            let size = postcard::experimental::serialized_size(part).unwrap_or(usize::MAX);
            assert!(!part.is_empty() && size <= 4096 + 4, "{size}");
        }
        assert_eq!(parts.concat(), keys);
        assert_eq!(into_parts(Vec::new(), 4096), (vec![Vec::new()], 0), "an empty list is one frame");
    }

    #[test]
    fn what_fits_into_no_frame_is_cut_or_counted() {
        let (parts, left_out) = into_parts(vec![key("ü".repeat(50_000))], 4096);
        assert_eq!((parts[0][0].label.len(), left_out), (LONGEST_LABEL, 0));
        let huge = TokenKey { id: Some(KeyId(vec![1; 5000])), ..key("huge".to_owned()) };
        let (parts, left_out) = into_parts(vec![huge, key("small".to_owned())], 4096);
        assert_eq!((parts.concat().len(), left_out), (1, 1));
    }
}
