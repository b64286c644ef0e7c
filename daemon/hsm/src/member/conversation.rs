//! The conversation of a member with one worker process: calls go out, reports come in.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use claviger_process::lock::lock;
use rustix::io::Errno;
use tokio::sync::oneshot;
use zeroize::Zeroizing;

use super::outstanding::{Limits, Outstanding};
use crate::error::{Failure, HsmError, WorkerFault};
use crate::job::Job;
use crate::keys::TokenKey;
use crate::link::{Answer, Cost, DaemonEnd, FrameBuffer, Report, Value, decode_report};
use crate::operation::Operation;
use crate::standstill;

/// Result of a call, with its cost.
pub(crate) struct CallResult {
    pub(crate) result: Result<Value, HsmError>,
    pub(crate) cost: Cost,
}

impl CallResult {
    /// The failure of a call that the worker did not answer; no processor time is known.
    pub(crate) fn none(error: HsmError, took: Duration) -> Self {
        CallResult { result: Err(error), cost: Cost { took, ..Cost::default() } }
    }
}

/// Reason why a call was not sent.
pub(crate) enum Unsent<G> {
    /// The socket is full: the worker has not yet read earlier calls. Returns the guard.
    Full(G),
    /// The worker has ended.
    Gone,
}

/// Receives the result of a call; `None` if the call only waited in the socket when its worker ended.
pub(crate) type Waiting = oneshot::Receiver<Option<CallResult>>;

/// The caller that waits for an outstanding call. `G` is its guard (place and queue position), released when the call
/// ends.
struct Owner<G> {
    reply: Option<oneshot::Sender<Option<CallResult>>>,
    /// The parts of a list received so far.
    keys: Vec<TokenKey>,
    parts: u32,
    guard: G,
}

impl<G> Owner<G> {
    /// Drops the guard first, so that the caller finds its place free.
    fn answer(self, reply: Option<CallResult>) {
        drop(self.guard);
        if let Some(caller) = self.reply {
            let _ = caller.send(reply);
        }
    }
}

/// A call that takes too long. Its caller waits until [`tell`](Self::tell) is called.
pub(crate) struct Late {
    pub(crate) operation: Operation,
    pub(crate) limits: Limits,
    reply: Option<oneshot::Sender<Option<CallResult>>>,
}

impl Late {
    /// Sends the caller to another member.
    pub(crate) fn tell(self) {
        if let Some(reply) = self.reply {
            let _ = reply.send(Some(CallResult::none(HsmError::Hung(self.operation), self.limits.share)));
        }
    }
}

/// An item passed to the reader of the conversation.
pub(crate) enum News<'a> {
    /// A report other than a reply.
    Report(Report<'a>),
    /// Number of replies read in one wake-up.
    Replies(usize),
}

/// Maximum number of reports other than replies in a second. A worker that sends more is faulty and would keep the daemon
/// busy.
const MOST_REPORTS: u32 = 10_000;
/// Maximum number of frames of one list.
const MOST_PARTS: u32 = 256;
/// Number of frames read before other tasks of the thread run.
const FRAMES_IN_A_ROW: u32 = 64;

/// Counts reports other than replies. A plain value that is handed `now`.
struct Flood {
    second: Instant,
    reports: u32,
}

impl Flood {
    /// Counts one more report; returns true if there are too many.
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
    /// No other lock is taken while this one is held.
    outstanding: Mutex<Outstanding<Owner<G>>>,
    /// Number of open sessions.
    sessions: AtomicUsize,
    /// True once nothing may be sent any more.
    over: AtomicBool,
    /// Number of this worker: distinguishes its results from those of earlier and later workers.
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

    /// Sends a call. Holds the lock during the send, so that calls are outstanding in the order in which the worker reads
    /// them.
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

    /// Reads reports until the conversation ends, and returns the reason for its end.
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

    /// Changes the number of sessions. Only the task that reads calls this.
    fn count_sessions(&self, count: impl FnOnce(usize) -> usize) {
        let sessions = count(self.sessions());
        self.sessions.store(sessions, Ordering::Release);
        self.outstanding().set_sessions(sessions, standstill::now());
    }

    /// Hands a reply to its caller. If the caller was sent elsewhere or has left, the result is zeroised here. Returns
    /// false if the worker may not answer this id.
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

    /// Stops sending. Calls that run fail with this error; calls that only wait in the socket were not given to the token.
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

    /// Stops sending; calls that were sent may finish.
    pub(crate) fn stop_sending(&self) {
        let _outstanding = self.outstanding();
        self.over.store(true, Ordering::Release);
    }

    /// Tells the worker to end once it has answered its calls.
    pub(crate) fn finish(&self) {
        self.stop_sending();
        self.end.finish();
    }

    /// Returns the calls that became late since the last check, whose callers are to be told, and the operation that hangs,
    /// if any. The caller of this function tells them, so that the member can go down first.
    pub(crate) fn look(&self, now: Instant) -> (Vec<Late>, Option<Operation>) {
        let mut late = Vec::new();
        let hung = self.outstanding().look(now, |operation, limits, owner| {
            late.push(Late { operation, limits, reply: owner.reply.take() });
        });
        (late, hung)
    }

    /// Leaves this time, which has just passed, out of the time that calls have run.
    pub(crate) fn forgive(&self, unread: Duration, now: Instant) {
        self.outstanding().forgive(unread, now);
    }

    pub(crate) fn oldest(&self, now: Instant) -> Option<Duration> {
        self.outstanding().oldest(now)
    }

    pub(crate) fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Acquire)
    }

    /// Returns the number of running calls and the number of late ones among them.
    pub(crate) fn running(&self) -> (usize, usize) {
        let outstanding = self.outstanding();
        (outstanding.running(), outstanding.late())
    }

    /// Returns the number of calls that were sent and are not answered.
    pub(crate) fn sent(&self) -> usize {
        self.outstanding().len()
    }

    /// Returns true if the worker has answered all calls.
    pub(crate) fn is_idle(&self) -> bool {
        self.sent() == 0
    }

    /// Returns true if no further answer can be expected in time: all running calls are late, so the calls behind them in
    /// the socket will not run.
    pub(crate) fn is_stuck(&self) -> bool {
        let outstanding = self.outstanding();
        outstanding.late() == outstanding.running()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
