//! The audit trail: one line of JSON for every release, attestation and change, written before the answer leaves.
//!
//! [`Audit`] is what everybody else uses. One thread writes (`writer`), to a file that it looks after (`file`), and gives every
//! line its place in a chain of hashes (`chain`) that an HSM signs now and then (`checkpoint`). What anybody can cause without
//! being known is counted, and told in a line a second (`summary`). [`verify`] reads all of it again.

pub(crate) mod cef;
mod chain;
pub(crate) mod checkpoint;
mod entry;
mod file;
pub(crate) mod head;
mod peer;
mod record;
mod reserve;
mod sink;
pub(crate) mod summary;
pub(crate) mod verify;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use claviger_hsm::standstill;
use claviger_process::lock::lock;
use claviger_protocol::certificate::Certificate;
use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};
use tokio::sync::oneshot;

#[cfg(test)]
pub(crate) use self::chain::Link;
pub(crate) use self::entry::Entry;
#[cfg(test)]
pub(crate) use self::file::EVENT as TRAIL_EVENT;
pub(crate) use self::file::last_line;
pub(crate) use self::head::Head;
pub(crate) use self::peer::Peer;
pub(crate) use self::record::{AuditError, Class};

use self::checkpoint::{Draft, Pace};
use self::file::Trail;
use self::record::WAITING;
use self::reserve::Reserve;
use self::sink::Sink;
use self::summary::{Summary, What};
use self::writer::{Job, Line, Reply, Shown, Writer};
use crate::config;
use crate::observe::metrics;
use crate::sys::id::request_id;
use crate::sys::rate::Rate;

/// How long the trail may take for what has no deadline of its own: an administrator's change, opening it again.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// The least time that a record gets, whatever is left until the deadline of its request.
const LEAST: Duration = Duration::from_millis(100);
/// How long records may take to be written before the disk is said to hang.
const DISK_HANGS: Duration = Duration::from_secs(2);
/// Sustained number of refusal lines per second. At 600 bytes a line, this is about 1 GB a day.
const REFUSALS: u32 = 20;
/// Number of refusal lines that may come at once.
const REFUSALS_AT_ONCE: u32 = 4096;
/// How long the end of the process waits for a disk that hangs.
const END: Duration = Duration::from_secs(5);

/// How a request was decided, and so what the trail has to say of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Something is to be given out: only with its line.
    Granted,
    /// Refused for its own sake, to a registered host that has proved that it is the one.
    Refused,
    /// Refused to anybody, or as often as anybody likes: counted.
    Counted,
    /// What was given out with its line a moment ago is given out once more: counted, since anybody who recorded the request
    /// can send it again.
    Repeated,
}

impl Decision {
    /// The decision on a request that was answered with the error of this `status`, or granted, where the sender is `known`
    /// as a host. What anybody may cause, and what a host may cause as often as it likes, is counted.
    #[must_use]
    pub fn of(status: Option<u16>, known: bool) -> Self {
        match status {
            None => Self::Granted,
            Some(429 | 503) => Self::Counted,
            Some(_) if known => Self::Refused,
            Some(_) => Self::Counted,
        }
    }
}

/// The outcome in a line of what was granted or done.
pub(crate) const SUCCESS: &str = "success";

/// What a caller is told whose request was not recorded.
pub(crate) const NOT_RECORDED: &str = "the decision cannot be recorded now; try again";

/// The open audit trail. Share it with an `Arc`; the last one that is dropped writes what waits, and ends the thread.
#[derive(Debug)]
pub struct Audit {
    path: PathBuf,
    node: String,
    pace: Option<Pace>,
    reserve: u64,
    shown: Arc<Shown>,
    summary: Mutex<Summary>,
    /// Lines that refusals to known hosts may have: a health certificate that was seen on its way lets anybody cause one.
    refusals: Rate<()>,
    /// `Some` until dropped: the writer ends when the sender is gone.
    jobs: Option<Sender<Job>>,
    /// Disconnected when the writer has ended.
    ended: Receiver<()>,
}

impl Audit {
    /// Opens the trail and starts its writer. The file is made with mode 0640 when missing, and only ever appended to. `node`
    /// is the name of this machine, in every line.
    ///
    /// With `config.sync`, every group of records is forced to the disk before it counts as written.
    ///
    /// # Errors
    /// [`AuditError::Write`] when the file cannot be opened now: a daemon should not start without its trail.
    pub fn open(path: &Path, config: &config::Audit, node: &str) -> Result<Self, AuditError> {
        let error = |source| AuditError::Write { path: path.to_owned(), source: Arc::new(source) };
        let sink = config.syslog.clone().map(Sink::new);
        let trail = Trail::open(path, config.sync, node).map_err(error)?.with_sink(sink);
        let reserve = Reserve::open(&path.with_extension("reserve"), config.reserve(), standstill::now());
        let (writer, shown) = Writer::new(trail, reserve);
        let (jobs, waiting) = bounded(WAITING);
        let (end, ended) = bounded(0);
        let run = move || {
            let _end = end;
            writer.run(&waiting);
        };
        std::thread::Builder::new().name("audit".to_owned()).spawn(run).map_err(error)?;
        let pace = config.checkpoints().map(|(lines, time)| Pace { lines, time });
        let (path, node) = (path.to_owned(), node.to_owned());
        Ok(Self {
            path,
            node,
            pace,
            reserve: config.reserve(),
            shown,
            summary: Mutex::default(),
            refusals: Rate::new(REFUSALS, REFUSALS_AT_ONCE),
            jobs: Some(jobs),
            ended,
        })
    }

    /// Writes a record. Returns when its line is in the file (and, with `sync`, on the disk), or at `until`.
    ///
    /// A record that failed may be in the file all the same, or come to be there later: a line may tell of what did not
    /// happen, and nothing happens without its line.
    ///
    /// # Errors
    /// [`AuditError`]; the next record tries again.
    pub async fn record(&self, entry: &Entry, class: Class, until: Instant) -> Result<(), AuditError> {
        wait(self.send_entry(entry, class), until).await
    }

    fn send_entry(&self, entry: &Entry, class: Class) -> Sent {
        // JSON escapes line breaks inside strings, so the only one is the one that ends the record.
        let body = serde_json::to_vec(entry).map_err(|error| AuditError::Unserialisable(error.to_string()))?;
        self.send(|reply| Job::Line(Line { body, class, covers: None, reply }))
    }

    /// Records an administrator's change. `false`: it cannot be recorded, and must not be made.
    pub async fn administration(&self, entry: &Entry) -> bool {
        self.record(entry, Class::Administration, standstill::now() + PATIENCE).await.is_ok()
    }

    /// Records how a request was decided. When this returns, the writer has the line; the future waits until it is written, or for
    /// the request's deadline. `false`: what was granted cannot be recorded, and must not leave.
    ///
    /// Nothing is given out with a refusal, so it does not fail for want of its line: it is counted then, and so are refusals
    /// that come faster than they may have lines.
    pub fn decided<'a>(
        &'a self,
        entry: &'a Entry,
        decision: Decision,
        deadline: Instant,
    ) -> impl Future<Output = bool> + Send + 'a {
        let until = deadline.max(standstill::now() + LEAST);
        let sent = match decision {
            Decision::Granted => Some(self.send_entry(entry, Class::Grant)),
            Decision::Refused if self.refusals.take(&()).is_ok() => Some(self.send_entry(entry, Class::Refusal)),
            Decision::Refused | Decision::Counted => {
                self.count(entry);
                None
            }
            Decision::Repeated => {
                metrics::audit_counted();
                self.summary().add(What::Repeated, entry);
                None
            }
        };
        async move {
            let Some(sent) = sent else { return true };
            let is_written = wait(sent, until).await.is_ok();
            if !is_written && decision == Decision::Refused {
                self.count(entry);
            }
            is_written || decision == Decision::Refused
        }
    }

    /// Counts a refusal, for the next summary.
    pub fn count(&self, entry: &Entry) {
        metrics::audit_counted();
        self.summary().add(What::Refused, entry);
    }

    /// Writes what was counted. What cannot be written is kept for the next time. Waits for as long as the disk takes: lines
    /// that were given up could be written all the same, and counted twice. When this is cancelled, they are still written.
    pub async fn write_summary(&self) {
        let counted = self.summary().take();
        // All of them are with the writer before the first is waited for.
        let lines: Vec<_> = counted
            .into_iter()
            .map(|(of, counts)| {
                let line = summary::line(&of, &counts, &request_id(), SystemTime::now());
                let line = line.to_string().into_bytes();
                let sent = self.send(|reply| Job::Line(Line { body: line, class: Class::Own, covers: None, reply }));
                (of, counts, sent)
            })
            .collect();
        for (of, counts, sent) in lines {
            let written = match sent {
                Ok(answer) => answer.await.unwrap_or(Err(AuditError::Closed)),
                Err(error) => Err(error),
            };
            if written.is_err() {
                self.summary().put_back(of, counts);
            }
        }
    }

    /// A checkpoint to be signed, if one is due; with `at_once`, also when there is only something to sign.
    #[must_use]
    pub fn due_checkpoint(&self, now: Instant, at_once: bool) -> Option<Draft> {
        let (pace, head) = (self.pace?, self.shown.head());
        let is_due = pace.is_due(head.unsigned(), head.unsigned_since, now) || at_once && head.unsigned() > 0;
        is_due.then(|| Draft::new(head.link, head.records, &self.node, SystemTime::now()))
    }

    /// Writes a checkpoint that was signed with the key of `certificate`, and keeps beside the trail how far it has come. Blocks
    /// on no disk.
    ///
    /// # Errors
    /// [`AuditError`].
    pub async fn checkpoint(
        &self,
        draft: &Draft,
        certificate: &Certificate,
        signature: &[u8],
    ) -> Result<(), AuditError> {
        let line = draft.line(&request_id(), certificate, signature).to_string().into_bytes();
        let covers = Some((draft.records, draft.link.n));
        let job = |reply| Job::Line(Line { body: line, class: Class::Own, covers, reply });
        self.submit(job, standstill::now() + PATIENCE).await?;
        self.keep_head().await;
        Ok(())
    }

    /// Keeps beside the trail how far it has come, so that the next start notices when it was cut.
    pub async fn keep_head(&self) {
        let (path, link) = (self.path.clone(), self.head().link);
        let kept = tokio::task::spawn_blocking(move || file::write_head(&path, link));
        match standstill::timeout(PATIENCE, kept).await {
            Ok(Ok(Ok(()))) => {}
            failed => tracing::warn!(
                ?failed,
                "the number and the hash of the last audit line cannot be stored; the next start may not notice that the trail was cut"
            ),
        }
    }

    /// Closes the file and opens it by its name again, after all that waits was written: for log rotation.
    ///
    /// # Errors
    /// [`AuditError`]; the next record tries again.
    pub async fn reopen(&self) -> Result<(), AuditError> {
        self.submit(Job::Reopen, standstill::now() + PATIENCE).await
    }

    /// How many records wait for the disk, and for how long those that are being written have been: more than a moment is a
    /// disk that hangs.
    #[must_use]
    pub fn backlog(&self) -> (usize, Duration) {
        let waiting = self.jobs.as_ref().map_or(0, Sender::len);
        let since = match self.shown.writing.load(Ordering::Acquire) {
            0 => Duration::ZERO,
            began => standstill::since(self.shown.epoch).saturating_sub(Duration::from_millis(began)),
        };
        (waiting, since)
    }

    /// Why records are refused at the moment, as far as is known without writing one.
    #[must_use]
    pub fn refuses(&self) -> Option<String> {
        let (waiting, writing) = self.backlog();
        if writing >= DISK_HANGS {
            Some(format!("the disk of the audit trail has not answered for {} s", writing.as_secs()))
        } else if waiting >= WAITING {
            Some("the audit trail is overloaded".to_owned())
        } else {
            self.head().failing.then(|| "the audit trail cannot be written: the log says why".to_owned())
        }
    }

    /// How much of the reserve is left, in bytes.
    #[must_use]
    pub fn reserve_left(&self) -> u64 {
        self.reserve.saturating_sub(self.head().reserve_missing)
    }

    /// How far the trail has come.
    #[must_use]
    pub fn head(&self) -> Head {
        self.shown.head()
    }

    async fn submit(&self, job: impl FnOnce(Reply) -> Job, until: Instant) -> Result<(), AuditError> {
        wait(self.send(job), until).await
    }

    fn send(&self, job: impl FnOnce(Reply) -> Job) -> Sent {
        let (reply, answer) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or(AuditError::Closed)?;
        jobs.try_send(job(reply)).map_err(|error| match error {
            TrySendError::Full(_) => {
                metrics::audit_errors(1);
                AuditError::Overloaded
            }
            TrySendError::Disconnected(_) => AuditError::Closed,
        })?;
        Ok(answer)
    }

    fn summary(&self) -> MutexGuard<'_, Summary> {
        lock(&self.summary)
    }
}

/// A job that the writer has, and its answer to come.
type Sent = Result<oneshot::Receiver<Result<(), AuditError>>, AuditError>;

async fn wait(sent: Sent, until: Instant) -> Result<(), AuditError> {
    match standstill::timeout_at(until, sent?).await {
        Ok(answer) => answer.unwrap_or(Err(AuditError::Closed)),
        Err(_) => {
            metrics::audit_errors(1);
            Err(AuditError::Late)
        }
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        drop(self.jobs.take());
        // Nothing is ever sent: it ends with the writer, also with one that panicked.
        if self.ended.recv_timeout(END) == Err(crossbeam::channel::RecvTimeoutError::Timeout) {
            tracing::error!(file = %self.path.display(), "the audit trail's disk does not respond; waiting lines are not written");
        }
    }
}

#[cfg(test)]
mod tests;
