//! The thread of a session, and the desk at which it works.
//!
//! PKCS#11 calls block, and a session may only do one thing at a time; a thread for each session says both. The pooled
//! object is the [`Handle`] of such a thread. Who takes it out of the pool *hires* the thread: sends its own lease over the
//! thread's channel. A hired thread takes from its member's queue what is its share, lays it on its desk, works it off, and
//! takes more; when nothing waits any more, it gives the lease back.
//!
//! A call that hangs cannot be cancelled, but all that lies on a desk can be taken off it from outside: the jobs that wait
//! behind the call, the reply that its caller waits for, and the lease.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{self, Receiver, Sender, TrySendError};
use tokio::sync::oneshot;

use crate::cluster::member::Lease;
use crate::cluster::shared::{InFlight, Shared};
use crate::error::HsmError;
use crate::fault::Fate;
use crate::request::{Answer, Outcome, Request};
use crate::session::OpenSession;
use crate::standstill;

/// A request on its way to a session.
pub(crate) struct Job {
    pub(crate) request: Arc<Request>,
    /// Past this nobody waits for it any more: it is dropped, not executed.
    pub(crate) deadline: Instant,
    /// How long it may run before its caller is sent elsewhere.
    pub(crate) share: Duration,
    /// How long it may run before the member counts as hung.
    pub(crate) watchdog: Duration,
    pub(crate) submitted: Instant,
    pub(crate) reply: oneshot::Sender<Outcome>,
    pub(crate) in_flight: InFlight,
}

impl Job {
    /// Sends the caller elsewhere.
    pub(crate) fn turn_away(self, why: &HsmError) {
        // The call is not in flight any more when its caller hears of it.
        drop(self.in_flight);
        let _ = self.reply.send(Outcome::NotRun(why.clone()));
    }
}

/// What a thread is hired for.
struct Hire {
    lease: Lease,
    /// One job for this very session, instead of what waits in the queue.
    only: Option<Job>,
}

/// The pooled object: the way to a session's thread. The thread ends when its handle is dropped.
pub(crate) struct Handle {
    hires: Sender<Hire>,
    alive: Arc<AtomicBool>,
    generation: u64,
}

impl Handle {
    /// Whether the session may be used: its thread lives, and its member was not closed since.
    pub(crate) fn is_usable(&self, generation: u64) -> bool {
        self.alive.load(Ordering::Acquire) && self.generation == generation
    }
}

/// Sets a session's thread to work: at `only`, or at what waits in the queue. Gives `only` back when the thread has ended.
pub(crate) fn hire(lease: Lease, only: Option<Job>) -> Result<(), Option<Job>> {
    let hires = lease.hires.clone();
    match hires.try_send(Hire { lease, only }) {
        Ok(()) => Ok(()),
        // There is room for one, and only who has the lease may send: the thread ended between the pool's check and now.
        Err(TrySendError::Full(hire) | TrySendError::Disconnected(hire)) => {
            drop(Lease::take(hire.lease));
            Err(hire.only)
        }
    }
}

/// What a session's thread has before it.
#[derive(Default)]
pub(crate) struct Desk(Mutex<OnDesk>);

#[derive(Default)]
struct OnDesk {
    lease: Option<Lease>,
    waiting: VecDeque<Job>,
    running: Option<Running>,
    /// The thread has been given up: when its call returns, it ends.
    given_up: bool,
}

struct Running {
    op: &'static str,
    since: Instant,
    share: Duration,
    watchdog: Duration,
    reply: Option<oneshot::Sender<Outcome>>,
    /// Until the call returns: a caller that left does not free the load that it caused.
    _in_flight: InFlight,
}

/// What a look at a desk found.
pub(crate) enum Look {
    /// Nothing to worry about.
    Fine,
    /// A call takes too long for its caller, who was sent elsewhere.
    Late(HsmError),
    /// A call hangs. Its thread has been given up, and the desk cleared.
    Stuck(HsmError),
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, OnDesk> {
        // A panic under the lock leaves nothing half-done that would do harm.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks whether the call that runs here takes too long.
    pub(crate) fn look(&self, now: Instant) -> Look {
        let mut desk = self.lock();
        let Some(running) = &mut desk.running else { return Look::Fine };
        let took = now.saturating_duration_since(running.since);
        let hung = HsmError::Hung { op: running.op };
        let stuck = took >= running.watchdog;
        let late = stuck || took >= running.share;
        let reply = if late { running.reply.take() } else { None };
        let news = reply.is_some();
        if let Some(reply) = reply {
            let _ = reply.send(Outcome::Ran(Err(hung.clone())));
        }
        if stuck && !desk.given_up {
            desk.given_up = true;
            desk.clear(&hung);
            return Look::Stuck(hung);
        }
        if news { Look::Late(hung) } else { Look::Fine }
    }

    /// Since when the call that runs here runs.
    pub(crate) fn busy_since(&self) -> Option<Instant> {
        self.lock().running.as_ref().map(|running| running.since)
    }

    /// Takes the next job from the desk into work.
    fn next(&self) -> Option<(Arc<Request>, Instant, Instant)> {
        let mut desk = self.lock();
        loop {
            let job = desk.waiting.pop_front()?;
            let now = standstill::now();
            if job.reply.is_closed() {
                continue;
            }
            if now >= job.deadline {
                job.turn_away(&HsmError::Deadline);
                continue;
            }
            desk.running = Some(Running {
                op: job.request.op(),
                since: now,
                share: job.share,
                watchdog: job.watchdog,
                reply: Some(job.reply),
                _in_flight: job.in_flight,
            });
            return Some((job.request, job.deadline, job.submitted));
        }
    }
}

impl OnDesk {
    /// Sends everybody elsewhere who has not been served, and takes the session out of the pool.
    fn clear(&mut self, why: &HsmError) {
        for job in self.waiting.drain(..) {
            job.turn_away(why);
        }
        if let Some(lease) = self.lease.take() {
            drop(Lease::take(lease));
        }
    }
}

/// What a thread leaves behind, however it ends.
struct Leaving<'a> {
    shared: &'a Arc<Shared>,
    desk: &'a Desk,
    alive: Arc<AtomicBool>,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.alive.store(false, Ordering::Release);
        let mut desk = self.desk.lock();
        desk.clear(&self.shared.thread_ended());
        // After a panic there is a caller yet: the dropped reply tells it.
        desk.running = None;
        let given_up = desk.given_up;
        drop(desk);
        if given_up {
            self.shared.returned();
        }
        // There is room for another session.
        self.shared.freed();
    }
}

/// Starts a thread that opens a session, tells whether that went well, and then serves. Nobody may wait for it any more
/// when it does; then it ends again.
pub(crate) fn spawn(shared: Arc<Shared>, opened: oneshot::Sender<Result<Handle, HsmError>>) -> Result<(), HsmError> {
    // Counted before it runs, so that the limit on threads holds under a storm too.
    let counted = shared.count_thread();
    let name = format!("hsm {}", shared.name);
    let unable = |error| shared.token_error(format!("no thread for a session: {error}"));
    let its = Arc::clone(&shared);
    thread::Builder::new()
        .name(name)
        .spawn(move || {
            // Nobody finalises the module under this thread.
            let _gate = its.module.enter();
            run(&its, opened);
            drop(counted);
        })
        .map(drop)
        .map_err(unable)
}

fn run(shared: &Arc<Shared>, opened: oneshot::Sender<Result<Handle, HsmError>>) {
    let generation = shared.generation();
    let session = match shared.observed("open", || OpenSession::open(shared, generation)) {
        Ok(session) => session,
        Err(error) => {
            let _ = opened.send(Err(error));
            return;
        }
    };
    // A thread is hired by one at a time.
    let (hires, inbox) = channel::bounded(1);
    let alive = Arc::new(AtomicBool::new(true));
    let desk = shared.new_desk();
    let leaving = Leaving { shared, desk: &desk, alive: Arc::clone(&alive) };
    if opened.send(Ok(Handle { hires, alive, generation })).is_ok() {
        serve(shared, generation, Some(session), &desk, &inbox);
    }
    drop(leaving);
}

/// Serves until nobody can hire any more, the session is lost, or its member is closed. The session is closed on return.
fn serve<'a>(
    shared: &'a Arc<Shared>,
    generation: u64,
    mut session: Option<OpenSession<'a>>,
    desk: &Desk,
    inbox: &Receiver<Hire>,
) {
    while let Ok(Hire { lease, only }) = inbox.recv() {
        let from_queue = only.is_none();
        {
            let mut desk = desk.lock();
            desk.lease = Some(lease);
            desk.waiting.extend(only);
        }
        if from_queue {
            shared.arrived();
            take_share(shared, generation, desk);
        }
        while let Some((request, deadline, submitted)) = desk.next() {
            let begun = standstill::now();
            let result = perform(shared, generation, &mut session, &request, deadline);
            let ended = match &result {
                Ok(_) => false,
                // What could not be renewed is lost.
                Err(error) => error.fault().fate != Fate::Keep,
            };
            let ended = ended || session.is_none();
            shared.observe_answer(&request, result.as_ref().map(drop), submitted, begun);
            shared.done(&request, result.as_ref().map(drop), submitted, generation);
            if ended || generation != shared.generation() || desk.lock().given_up {
                // Closed before anybody hears of it, so that a token that counts sessions has room for the next.
                drop(session.take());
                let running = desk.lock().running.take();
                desk.lock().clear(&shared.thread_ended());
                reply(running, result);
                return;
            }
            let running = desk.lock().running.take();
            if from_queue && desk.lock().waiting.is_empty() {
                take_share(shared, generation, desk);
            }
            // The lease goes first, so that who reacts to the reply finds the session free.
            give_back_if_idle(shared, desk);
            reply(running, result);
        }
        give_back_if_idle(shared, desk);
    }
}

fn give_back_if_idle(shared: &Shared, desk: &Desk) {
    let mut desk = desk.lock();
    let lease = if desk.waiting.is_empty() { desk.lease.take() } else { None };
    drop(desk);
    if lease.is_some() {
        drop(lease);
        shared.freed();
    }
}

fn reply(running: Option<Running>, result: Result<Answer, HsmError>) {
    // A caller that has been sent elsewhere, or that has left, does not take the result: it is zeroised right here.
    if let Some(Running { reply: Some(reply), _in_flight: in_flight, .. }) = running {
        drop(in_flight);
        let _ = reply.send(Outcome::Ran(result));
    }
}

fn take_share(shared: &Shared, generation: u64, desk: &Desk) {
    if generation == shared.generation() {
        let jobs = shared.share_of_queue();
        desk.lock().waiting.extend(jobs);
    }
}

/// Does what is asked for. What went stale is renewed, once, before anybody hears of it: session → login → handles.
fn perform<'a>(
    shared: &'a Arc<Shared>,
    generation: u64,
    session: &mut Option<OpenSession<'a>>,
    request: &Request,
    deadline: Instant,
) -> Result<Answer, HsmError> {
    let Some(open) = session else { return Err(shared.thread_ended()) };
    let stale = match open.perform(request) {
        Err(error) if error.fault().fate == Fate::Renew && request.may_repeat() && standstill::now() < deadline => {
            error
        }
        result => return result,
    };
    let renewed = shared.observed("open", || {
        // Closed first: some tokens count sessions.
        *session = None;
        OpenSession::open(shared, generation)
    });
    tracing::debug!(member = shared.name, error = %stale, "a stale session is opened anew");
    session.insert(renewed?).perform(request)
}
