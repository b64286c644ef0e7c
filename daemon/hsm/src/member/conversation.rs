//! One worker process as its member talks to it: calls go out, reports come in.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tokio::sync::oneshot;
use zeroize::Zeroizing;

use super::outstanding::{Entry, Limits, Outstanding};
use crate::error::{Failure, HsmError, WorkerFault};
use crate::job::{Job, Value};
use crate::keys::TokenKey;
use crate::link::{Answer, DaemonEnd, FrameBuffer, Level, Report, decode_report};
use crate::operation::Operation;
use crate::standstill;

/// What came back of a call.
pub(crate) struct Reply {
    pub(crate) result: Result<Value, HsmError>,
    /// How long the token took.
    pub(crate) took: Duration,
    /// Processor time of the worker within PKCS#11 calls.
    pub(crate) processor: Duration,
}

impl Reply {
    /// The worker said nothing.
    fn none(error: HsmError, took: Duration) -> Self {
        Reply { result: Err(error), took, processor: Duration::ZERO }
    }
}

/// Who waits for a call. `G` is what is held while the call is outstanding: its place and its part of the queue.
struct Owner<G> {
    reply: Option<oneshot::Sender<Reply>>,
    /// The parts of a list that have come so far.
    keys: Vec<TokenKey>,
    _guard: G,
}

/// What a worker reports beside replies. Told while the conversation is read.
pub(crate) enum News<'a> {
    Login,
    KeySearch,
    SessionOpened {
        took: Duration,
        result: Result<(), HsmError>,
    },
    SessionClosed,
    FewSessions {
        given: usize,
    },
    Note {
        level: Level,
        text: &'a str,
    },
    /// So many replies came at one wake-up.
    Replies(usize),
}

/// A worker process at the other end of a socket.
pub(crate) struct Conversation<G> {
    end: DaemonEnd,
    /// A leaf: nothing else is locked while it is held.
    outstanding: Mutex<Outstanding<Owner<G>>>,
    /// Sessions that are open.
    sessions: AtomicUsize,
    /// Nothing is sent any more.
    over: AtomicBool,
    /// Tells this worker's results from those of others before and after it.
    pub(crate) number: u64,
}

impl<G: Send> Conversation<G> {
    pub(crate) fn new(end: DaemonEnd, number: u64) -> Self {
        Conversation {
            end,
            outstanding: Mutex::new(Outstanding::new()),
            sessions: AtomicUsize::new(0),
            over: AtomicBool::new(false),
            number,
        }
    }

    fn outstanding(&self) -> MutexGuard<'_, Outstanding<Owner<G>>> {
        self.outstanding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a call. The lock is held over the send, so that calls are outstanding in the order in which the worker reads them.
    pub(crate) fn submit(&self, job: &Job, limits: Limits, guard: G) -> Result<oneshot::Receiver<Reply>, HsmError> {
        let (reply, answer) = oneshot::channel();
        let owner = Owner { reply: Some(reply), keys: Vec::new(), _guard: guard };
        let mut outstanding = self.outstanding();
        if self.over.load(Ordering::Acquire) {
            return Err(HsmError::Worker(WorkerFault::Gone));
        }
        let now = standstill::now();
        let id = outstanding.add(job.operation, limits, owner, now);
        match self.end.send(id, &job.request) {
            Ok(()) => Ok(answer),
            Err(error) => {
                outstanding.take(id, now);
                let fault = if error == Errno::AGAIN { WorkerFault::Deaf } else { WorkerFault::Gone };
                Err(HsmError::Worker(fault))
            }
        }
    }

    /// Reads what the worker says until it says no more; why.
    pub(crate) async fn read(&self, mut tell: impl FnMut(News<'_>)) -> Failure {
        let mut buffer = FrameBuffer::new();
        let mut replies = 0;
        loop {
            let len = match self.end.try_recv(buffer.room()) {
                Ok(Some(len)) => len,
                Ok(None) => {
                    if replies > 0 {
                        tell(News::Replies(std::mem::take(&mut replies)));
                    }
                    match self.end.readable().await {
                        Ok(()) => continue,
                        Err(_) => return HsmError::Worker(WorkerFault::Gone).into(),
                    }
                }
                Err(_) => return HsmError::Worker(WorkerFault::Gone).into(),
            };
            if len == 0 {
                return HsmError::Worker(WorkerFault::Gone).into();
            }
            let Some(report) = decode_report(buffer.frame(len)) else {
                return HsmError::Worker(WorkerFault::Unreadable).into();
            };
            match report {
                Report::Reply { id, took, processor, result } => {
                    replies += 1;
                    if !self.replied(id, Duration::from_nanos(took), Duration::from_nanos(processor), result) {
                        return HsmError::Worker(WorkerFault::Unreadable).into();
                    }
                }
                Report::StartFailed(failure) => return failure,
                Report::Login => tell(News::Login),
                Report::KeySearch => tell(News::KeySearch),
                Report::SessionOpened { took, result } => {
                    if result.is_ok() {
                        let sessions = self.sessions.fetch_add(1, Ordering::AcqRel) + 1;
                        self.outstanding().set_sessions(sessions, standstill::now());
                    }
                    tell(News::SessionOpened { took: Duration::from_nanos(took), result });
                }
                Report::SessionClosed => {
                    let less = |sessions: usize| sessions.checked_sub(1);
                    let before = self.sessions.fetch_update(Ordering::AcqRel, Ordering::Acquire, less);
                    let sessions = before.unwrap_or(0).saturating_sub(1);
                    self.outstanding().set_sessions(sessions, standstill::now());
                    tell(News::SessionClosed);
                }
                Report::FewSessions { given } => tell(News::FewSessions { given: given as usize }),
                Report::Note { level, text } => tell(News::Note { level, text }),
            }
            buffer.wipe(len);
        }
    }

    /// Hands a reply to who waits for it. A caller that has been sent elsewhere, or has left, does not take the result: it is
    /// zeroised right here. Whether the id is one that a worker may answer.
    fn replied(&self, id: u32, took: Duration, processor: Duration, result: Result<Answer<'_>, HsmError>) -> bool {
        let mut outstanding = self.outstanding();
        let value = match result {
            Ok(Answer::Keys { mut keys, more }) => {
                let Some(entry) = outstanding.get(id) else { return false };
                entry.owner.keys.append(&mut keys);
                if more {
                    return true;
                }
                Ok(Value::Keys(std::mem::take(&mut entry.owner.keys)))
            }
            Ok(Answer::Bytes(bytes)) => Ok(Value::Bytes(Zeroizing::new(bytes.to_vec()))),
            Ok(Answer::Public(key)) => Ok(Value::Public(key)),
            Ok(Answer::Done) => Ok(Value::Done),
            Err(error) => Err(error),
        };
        let Some(entry) = outstanding.take(id, standstill::now()) else { return false };
        drop(outstanding);
        let Entry { owner: Owner { reply, .. }, .. } = entry;
        if let Some(reply) = reply {
            let _ = reply.send(Reply { result: value, took, processor });
        }
        true
    }

    /// Nothing is sent any more, and everybody who waits hears of this error.
    pub(crate) fn fail(&self, error: HsmError) {
        let mut outstanding = self.outstanding();
        self.over.store(true, Ordering::Release);
        let all = outstanding.take_all();
        drop(outstanding);
        for entry in all {
            if let Some(reply) = entry.owner.reply {
                let _ = reply.send(Reply::none(error, Duration::ZERO));
            }
        }
    }

    /// Nothing is sent any more; what was sent may finish.
    pub(crate) fn stop_sending(&self) {
        let _outstanding = self.outstanding();
        self.over.store(true, Ordering::Release);
    }

    /// Tells the worker to end when it has answered what it was sent.
    pub(crate) fn finish(&self) {
        self.stop_sending();
        self.end.finish();
    }

    /// Sends callers elsewhere whose calls take too long. Their operations, and the one that hangs, if one does.
    pub(crate) fn look(&self, now: Instant) -> (Vec<Operation>, Option<Operation>) {
        let mut late = Vec::new();
        let hung = self.outstanding().look(now, |operation, owner| {
            late.push(operation);
            if let Some(reply) = owner.reply.take() {
                let _ = reply.send(Reply::none(HsmError::Hung(operation), Duration::ZERO));
            }
        });
        (late, hung)
    }

    pub(crate) fn oldest(&self, now: Instant) -> Option<Duration> {
        self.outstanding().oldest(now)
    }

    pub(crate) fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Acquire)
    }

    /// Calls that run, and those of them that are late.
    pub(crate) fn running(&self) -> (usize, usize) {
        let outstanding = self.outstanding();
        (outstanding.running(), outstanding.late())
    }

    /// Calls that were sent.
    pub(crate) fn sent(&self) -> usize {
        self.outstanding().len()
    }

    /// Whether nobody waits for an answer any more.
    pub(crate) fn nobody_waits(&self) -> bool {
        let outstanding = self.outstanding();
        outstanding.late() == outstanding.len()
    }
}
