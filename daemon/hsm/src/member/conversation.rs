//! One worker process as its member talks to it: calls go out, reports come in.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tokio::sync::oneshot;
use zeroize::Zeroizing;

use super::outstanding::{Limits, Outstanding};
use crate::error::{Failure, HsmError, WorkerFault};
use crate::job::Job;
use crate::keys::TokenKey;
use crate::link::{Answer, Cost, DaemonEnd, FrameBuffer, Report, Value, decode_report};
use crate::lock::lock;
use crate::operation::Operation;
use crate::standstill;

/// What came back of a call.
pub(crate) struct CallResult {
    pub(crate) result: Result<Value, HsmError>,
    pub(crate) cost: Cost,
}

impl CallResult {
    /// The worker said nothing.
    pub(crate) fn none(error: HsmError, took: Duration) -> Self {
        CallResult { result: Err(error), cost: Cost { took, ..Cost::default() } }
    }
}

/// Why a call was not sent.
pub(crate) enum Unsent<G> {
    /// The socket is full for now: the worker has not read yet what it was sent. What was to be held comes back.
    Full(G),
    /// The worker is gone.
    Gone,
}

/// Told when a call has come back; `None`: it only waited in the socket, and its worker has ended.
pub(crate) type Waiting = oneshot::Receiver<Option<CallResult>>;

/// What belongs to an outstanding call. `G` is what is held while the call is outstanding: its place and its part of the queue.
struct Owner<G> {
    reply: Option<oneshot::Sender<Option<CallResult>>>,
    /// The parts of a list that have come so far.
    keys: Vec<TokenKey>,
    parts: u32,
    guard: G,
}

impl<G> Owner<G> {
    /// What was held is given back first: the caller finds its place free.
    fn answer(self, reply: Option<CallResult>) {
        drop(self.guard);
        if let Some(caller) = self.reply {
            let _ = caller.send(reply);
        }
    }
}

/// A call that takes too long. Its caller waits until it is [told](Self::tell).
pub(crate) struct Late {
    pub(crate) operation: Operation,
    pub(crate) limits: Limits,
    reply: Option<oneshot::Sender<Option<CallResult>>>,
}

impl Late {
    /// Sends the caller elsewhere.
    pub(crate) fn tell(self) {
        if let Some(reply) = self.reply {
            let _ = reply.send(Some(CallResult::none(HsmError::Hung(self.operation), self.limits.share)));
        }
    }
}

/// Told while the conversation is read.
pub(crate) enum News<'a> {
    /// What the worker said, other than replies.
    Report(Report<'a>),
    /// So many replies came at one wake-up.
    Replies(usize),
}

/// Reports beside replies that a worker may send in a second. A worker that sends more is ill: it would keep the daemon busy.
const MOST_REPORTS: u32 = 10_000;
/// Parts of a list, each a frame.
const MOST_PARTS: u32 = 256;
/// Frames that are read before other tasks of the thread get their turn.
const FRAMES_IN_A_ROW: u32 = 64;

/// Counts reports beside replies. A plain value that is handed `now`.
struct Flood {
    second: Instant,
    reports: u32,
}

impl Flood {
    /// One more; whether there are too many.
    fn another(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.second) >= Duration::from_secs(1) {
            *self = Flood { second: now, reports: 0 };
        }
        self.reports += 1;
        self.reports > MOST_REPORTS
    }
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
        lock(&self.outstanding)
    }

    /// Sends a call. The lock is held over the send, so that calls are outstanding in the order in which the worker reads them.
    pub(crate) fn submit(&self, job: &Job, limits: Limits, guard: G) -> Result<Waiting, Unsent<G>> {
        let (reply, answer) = oneshot::channel();
        let owner = Owner { reply: Some(reply), keys: Vec::new(), parts: 0, guard };
        let mut outstanding = self.outstanding();
        if self.over.load(Ordering::Acquire) {
            return Err(Unsent::Gone);
        }
        let now = standstill::now();
        let id = outstanding.add(job.operation, limits, owner, now);
        let Err(error) = self.end.send(id, &job.request) else { return Ok(answer) };
        match outstanding.take(id, now) {
            Some(entry) if matches!(error, Errno::AGAIN | Errno::NOBUFS) => Err(Unsent::Full(entry.owner.guard)),
            _ => Err(Unsent::Gone),
        }
    }

    /// Reads what the worker says until it says no more; why.
    pub(crate) async fn read(&self, mut tell: impl FnMut(News<'_>)) -> Failure {
        let mut buffer = FrameBuffer::new();
        let mut flood = Flood { second: standstill::now(), reports: 0 };
        let (mut replies, mut in_a_row) = (0, 0);
        loop {
            let idle = || {
                in_a_row = 0;
                if replies > 0 {
                    tell(News::Replies(std::mem::take(&mut replies)));
                }
            };
            let len = match self.end.recv(buffer.room(), idle).await {
                Ok(len @ 1..) => len,
                Ok(0) | Err(_) => return HsmError::Worker(WorkerFault::Gone).into(),
            };
            let Some(report) = decode_report(buffer.frame(len)) else {
                return HsmError::Worker(WorkerFault::Unreadable).into();
            };
            match report {
                Report::Reply { id, cost, result } => {
                    replies += 1;
                    if !self.replied(id, cost, result) {
                        return HsmError::Worker(WorkerFault::Unreadable).into();
                    }
                }
                Report::StartFailed(failure) => return failure,
                _ if flood.another(standstill::now()) => return HsmError::Worker(WorkerFault::Floods).into(),
                report => {
                    match report {
                        Report::SessionOpened { result: Ok(()), .. } => self.count_sessions(|sessions| sessions + 1),
                        Report::SessionClosed => self.count_sessions(|sessions| sessions.saturating_sub(1)),
                        _ => {}
                    }
                    tell(News::Report(report));
                }
            }
            buffer.wipe(len);
            in_a_row += 1;
            if in_a_row == FRAMES_IN_A_ROW {
                in_a_row = 0;
                tokio::task::yield_now().await;
            }
        }
    }

    /// The task that reads is the only one that changes the count.
    fn count_sessions(&self, count: impl FnOnce(usize) -> usize) {
        let sessions = count(self.sessions());
        self.sessions.store(sessions, Ordering::Release);
        self.outstanding().set_sessions(sessions, standstill::now());
    }

    /// Hands a reply to its caller. A caller that has been sent elsewhere, or has left, does not take the result: it is
    /// zeroised right here. Whether the id is one that a worker may answer.
    fn replied(&self, id: u32, cost: Cost, result: Result<Answer<'_>, HsmError>) -> bool {
        let mut outstanding = self.outstanding();
        let value = match result {
            Ok(Answer::Keys { mut keys, more }) => {
                let Some(entry) = outstanding.get(id) else { return false };
                entry.owner.parts += 1;
                if entry.owner.parts > MOST_PARTS {
                    return false;
                }
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
        entry.owner.answer(Some(CallResult { result: value, cost }));
        true
    }

    /// Nothing is sent any more. Every call that runs fails with this error; one that only waits was not asked of the token.
    pub(crate) fn fail(&self, error: HsmError) {
        let mut outstanding = self.outstanding();
        self.over.store(true, Ordering::Release);
        let all = outstanding.take_all();
        drop(outstanding);
        for entry in all {
            let reply = entry.runs().then(|| CallResult::none(error, Duration::ZERO));
            entry.owner.answer(reply);
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

    /// The calls that take too long since the last look, whose callers are to be told; and the operation that hangs, if one
    /// does. The callers are not told here, so that the member can go down first.
    pub(crate) fn look(&self, now: Instant) -> (Vec<Late>, Option<Operation>) {
        let mut late = Vec::new();
        let hung = self.outstanding().look(now, |operation, limits, owner| {
            late.push(Late { operation, limits, reply: owner.reply.take() });
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

    /// Whether the worker has answered everything.
    pub(crate) fn is_idle(&self) -> bool {
        self.sent() == 0
    }

    /// Whether no further answer can be expected in time: all calls that run are late, so that those behind them in the socket
    /// will not run.
    pub(crate) fn is_stuck(&self) -> bool {
        let outstanding = self.outstanding();
        outstanding.late() == outstanding.running()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
