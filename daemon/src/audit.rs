//! The audit trail: one line of JSON for every release and attestation, written before the answer leaves.
//!
//! One thread writes. It takes all records that wait (group commit), writes them at once, and only then tells
//! the callers. A write that fails fails the records of its group and nothing else: the file is opened anew for the next
//! one, so the trail heals by itself when the disk has room again.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};
use serde::{Serialize, Serializer};
use time::OffsetDateTime;
use time::macros::format_description;
use tokio::sync::oneshot;

use crate::admin::Peer;

/// Most records that are written, and forced to the disk, together.
const GROUP: usize = 256;

/// Most records that wait for the writer. More than the release queues let through, so only a stuck disk fills it.
const WAITING: usize = 16_384;

/// How long records may take to be written before the disk is said to hang.
const DISK_HANGS: Duration = Duration::from_secs(2);

/// One record. Serialised in this order; what is `None` is left out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    /// When it happened; written as RFC 3339 in UTC with milliseconds.
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// The request's id, as in the log and in the answer's header.
    pub request: String,
    /// `release`, `attest`, or an administrator's command.
    pub event: String,
    /// The administrator, as the kernel says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<Peer>,
    /// The registered name of the host that asked, as far as it is known; or of the one that a command is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// SHA-256 of the host key's SubjectPublicKeyInfo, lower-case hexadecimal, where a command is about a host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// `success` or the error's code. A command has two lines: `requested` before it is done; after it `success`, `failed`,
    /// or `stored` for a change that has no effect yet.
    pub outcome: String,
    /// SHA-256 of the ingress protector, lower-case hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protector: Option<String>,
    /// Thumbprint of the owner's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Thumbprint of the certificate that a command is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// What a command changes, where its name does not say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub change: Option<String>,
    /// The members that were used, or the one that a command is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hsm: Option<String>,
    /// How long it took until this record, milliseconds.
    pub ms: f64,
}

fn rfc3339<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    let format = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    let text = OffsetDateTime::from(*time).format(format).map_err(serde::ser::Error::custom)?;
    serializer.serialize_str(&text)
}

/// Why a record is not in the file (or not surely). What it was to record must not happen then.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AuditError {
    /// The file cannot be opened, written or forced to the disk.
    #[error("the audit trail {} cannot be written: {source}", path.display())]
    Write {
        /// The audit file.
        path: PathBuf,
        /// What the operating system says.
        source: Arc<io::Error>,
    },
    /// As many records wait as may: the disk hangs.
    #[error("the audit trail is overloaded: {WAITING} records wait for the disk")]
    Overloaded,
    /// The record cannot be written as JSON.
    #[error("an audit record cannot be serialised: {0}")]
    Unserialisable(String),
    /// The writer is gone, which only a fault in this program can bring about.
    #[error("the audit trail's writer has ended")]
    Closed,
}

enum Job {
    Line(Vec<u8>, Reply),
    Reopen(Reply),
}

type Reply = oneshot::Sender<Result<(), AuditError>>;

/// The open audit trail. Share it with an `Arc`; the last one that is dropped writes what waits, and ends the thread.
#[derive(Debug)]
pub struct Audit {
    /// Whether the last group of records could not be written.
    failing: Arc<AtomicBool>,
    /// When the writer began with what it is writing, in milliseconds since `epoch`; 0 while it writes nothing.
    writing: Arc<AtomicU64>,
    epoch: Instant,
    /// `Some` until dropped: the writer ends when the sender is gone.
    jobs: Option<Sender<Job>>,
    writer: Option<JoinHandle<()>>,
}

impl Audit {
    /// Opens the trail and starts its writer. The file is made with mode 0640 when missing, and only ever appended to.
    ///
    /// With `sync`, every group of records is forced to the disk before it counts as written.
    ///
    /// # Errors
    /// [`AuditError::Write`] when the file cannot be opened now: a daemon should not start without its trail.
    pub fn open(path: &Path, sync: bool) -> Result<Self, AuditError> {
        let error = |source| AuditError::Write { path: path.to_owned(), source: Arc::new(source) };
        let (writing, epoch) = (Arc::new(AtomicU64::new(0)), Instant::now());
        let (now, failing) = (Arc::clone(&writing), Arc::<AtomicBool>::default());
        let mut writer = Writer {
            path: path.to_owned(),
            sync,
            file: None,
            torn: false,
            lost: 0,
            failing: failing.clone(),
            writing: now,
            epoch,
        };
        writer.open().map_err(error)?;
        let (jobs, waiting) = bounded(WAITING);
        let thread = std::thread::Builder::new().name("audit".to_owned()).spawn(move || writer.run(&waiting));
        Ok(Self { failing, writing, epoch, jobs: Some(jobs), writer: Some(thread.map_err(error)?) })
    }

    /// Writes a record. Returns when its line is in the file (and, with `sync`, on the disk).
    ///
    /// A caller that stops waiting does not take the record back. A record that failed may be in the file all the same.
    ///
    /// # Errors
    /// [`AuditError`]; the next record tries again.
    pub async fn record(&self, entry: &Entry) -> Result<(), AuditError> {
        // JSON escapes line breaks inside strings, so the only one is the one that ends the record.
        let mut line = serde_json::to_vec(entry).map_err(|error| AuditError::Unserialisable(error.to_string()))?;
        line.push(b'\n');
        self.submit(|reply| Job::Line(line, reply)).await
    }

    /// Closes the file and opens it by its name again, after all that waits was written: for log rotation.
    ///
    /// # Errors
    /// [`AuditError`]; the next record tries again.
    pub async fn reopen(&self) -> Result<(), AuditError> {
        self.submit(Job::Reopen).await
    }

    /// How many records wait for the disk, and for how long those that are being written have been: more than a moment is a
    /// disk that hangs.
    #[must_use]
    pub fn backlog(&self) -> (usize, Duration) {
        let waiting = self.jobs.as_ref().map_or(0, Sender::len);
        let since = match self.writing.load(Ordering::Acquire) {
            0 => Duration::ZERO,
            began => self.epoch.elapsed().saturating_sub(Duration::from_millis(began)),
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
            let failing = self.failing.load(Ordering::Acquire);
            failing.then(|| "the audit trail cannot be written: the log says why".to_owned())
        }
    }

    async fn submit(&self, job: impl FnOnce(Reply) -> Job) -> Result<(), AuditError> {
        let (reply, answer) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or(AuditError::Closed)?;
        jobs.try_send(job(reply)).map_err(|error| match error {
            TrySendError::Full(_) => {
                crate::metrics::audit_errors(1);
                AuditError::Overloaded
            }
            TrySendError::Disconnected(_) => AuditError::Closed,
        })?;
        answer.await.unwrap_or(Err(AuditError::Closed))
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the audit trail's writer panicked");
        }
    }
}

struct Writer {
    path: PathBuf,
    sync: bool,
    /// `None` after a failure, until it can be opened again.
    file: Option<File>,
    /// Whether the file may end in the middle of a line.
    torn: bool,
    /// Records that failed since the last one that was written.
    lost: u64,
    /// See [`Audit`].
    failing: Arc<AtomicBool>,
    /// See [`Audit`].
    writing: Arc<AtomicU64>,
    epoch: Instant,
}

impl Writer {
    fn run(mut self, waiting: &Receiver<Job>) {
        let mut lines = Vec::new();
        let mut replies = Vec::with_capacity(GROUP);
        while let Ok(first) = waiting.recv() {
            let mut reopen = None;
            for job in std::iter::once(first).chain(waiting.try_iter()) {
                match job {
                    Job::Line(line, reply) => {
                        lines.extend_from_slice(&line);
                        replies.push(reply);
                    }
                    Job::Reopen(reply) => reopen = Some(reply),
                }
                if replies.len() == GROUP || reopen.is_some() {
                    break;
                }
            }
            if !replies.is_empty() {
                let result = self.commit(&lines, replies.len() as u64);
                for reply in replies.drain(..) {
                    // A caller that stopped waiting needs no answer.
                    let _ = reply.send(result.clone());
                }
            }
            if let Some(reply) = reopen {
                self.file = None;
                let opened = self.at_the_disk(Self::open);
                let _ = reply.send(opened.map_err(|error| self.error(error)));
            }
            lines.clear();
            // One burst of long records must not hold its memory for ever.
            lines.shrink_to(256 * 1024);
        }
    }

    /// Does what may take as long as the disk likes, so that others can see for how long.
    fn at_the_disk<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let since = self.epoch.elapsed().as_millis();
        self.writing.store(u64::try_from(since).unwrap_or(u64::MAX).max(1), Ordering::Release);
        let result = work(self);
        self.writing.store(0, Ordering::Release);
        result
    }

    fn commit(&mut self, lines: &[u8], records: u64) -> Result<(), AuditError> {
        let began = Instant::now();
        let written = self.at_the_disk(|writer| writer.write(lines));
        crate::metrics::audit_written(began.elapsed());
        self.failing.store(written.is_err(), Ordering::Release);
        match written {
            Ok(()) => {
                if self.lost > 0 {
                    tracing::warn!(file = %self.path.display(), lost = self.lost, "the audit trail is written again");
                    self.lost = 0;
                }
                Ok(())
            }
            Err(error) => {
                // Whatever the file's state is now, the next record starts with a fresh look at it.
                self.file = None;
                if self.lost == 0 {
                    tracing::error!(
                        file = %self.path.display(), %error,
                        "the audit trail cannot be written; nothing is released until it can: check the disk"
                    );
                }
                self.lost += records;
                crate::metrics::audit_errors(records);
                Err(self.error(error))
            }
        }
    }

    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        self.open()?;
        let Some(file) = self.file.as_mut() else { return Err(io::Error::other("not open")) };
        if self.torn {
            file.write_all(b"\n")?;
        }
        // Until the whole group is written, the file may end anywhere.
        self.torn = true;
        file.write_all(lines)?;
        self.torn = false;
        if self.sync {
            file.sync_data()?;
        }
        Ok(())
    }

    fn open(&mut self) -> io::Result<()> {
        if self.file.is_some() {
            return Ok(());
        }
        let mut file = OpenOptions::new().create(true).append(true).read(true).mode(0o640).open(&self.path)?;
        // The file itself knows best whether its last line is whole: it may be another one than before (rotation), or
        // have been left torn by the end of a former process.
        let metadata = file.metadata()?;
        if metadata.is_file() {
            self.torn = false;
            if metadata.len() > 0 {
                let mut last = [0];
                file.seek(SeekFrom::End(-1))?;
                file.read_exact(&mut last)?;
                self.torn = last != *b"\n";
            }
        }
        self.file = Some(file);
        Ok(())
    }

    fn error(&self, source: io::Error) -> AuditError {
        AuditError::Write { path: self.path.clone(), source: Arc::new(source) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn entry(request: &str) -> Entry {
        Entry {
            time: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_007),
            request: request.to_owned(),
            event: "release".to_owned(),
            by: None,
            host: Some("host\nwith \"break\"".to_owned()),
            key: None,
            outcome: "success".to_owned(),
            protector: None,
            owner: Some("ab".to_owned()),
            certificate: None,
            change: None,
            hsm: None,
            ms: 1.25,
        }
    }

    fn requests(path: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.ends_with('\n'));
        let parse = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok();
        text.lines().filter_map(parse).map(|value| value["request"].as_str().unwrap().to_owned()).collect()
    }

    #[tokio::test]
    async fn a_record_is_one_line_of_json_that_is_there_on_return() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        for sync in [false, true] {
            let audit = Audit::open(&path, sync).unwrap();
            audit.record(&entry("r")).await.unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            assert_eq!(
                text.lines().last().unwrap(),
                r#"{"time":"2023-11-14T22:13:20.007Z","request":"r","event":"release","host":"host\nwith \"break\"","outcome":"success","owner":"ab","ms":1.25}"#
            );
        }
        assert_eq!(requests(&path).len(), 2);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640 & !umask(&folder));
    }

    /// What the umask of this process takes away, seen on a file that asks for everything.
    fn umask(folder: &tempfile::TempDir) -> u32 {
        let path = folder.path().join("umask");
        OpenOptions::new().create(true).write(true).truncate(true).mode(0o777).open(&path).unwrap();
        0o777 & !std::fs::metadata(&path).unwrap().permissions().mode()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn concurrent_records_are_all_there_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let audit = Arc::new(Audit::open(&path, false).unwrap());
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..2_000 {
            let audit = audit.clone();
            tasks.spawn(async move { audit.record(&entry(&number.to_string())).await.unwrap() });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        let mut found: Vec<usize> = requests(&path).iter().map(|request| request.parse().unwrap()).collect();
        found.sort_unstable();
        assert_eq!(found, (0..2_000).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn what_waits_is_written_when_the_trail_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let audit = Audit::open(&path, false).unwrap();
        for number in 0..100 {
            let (reply, _) = oneshot::channel();
            let mut line = serde_json::to_vec(&entry(&number.to_string())).unwrap();
            line.push(b'\n');
            audit.jobs.as_ref().unwrap().send(Job::Line(line, reply)).unwrap();
        }
        drop(audit);
        assert_eq!(requests(&path).len(), 100);
    }

    #[tokio::test]
    async fn a_full_disk_fails_the_record_and_heals() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let audit = Audit::open(&path, false).unwrap();
        for _ in 0..2 {
            let error = audit.record(&entry("lost")).await.unwrap_err();
            assert!(matches!(&error, AuditError::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull));
            assert!(error.to_string().contains("audit.jsonl cannot be written"), "{error}");
        }
        assert!(audit.refuses().unwrap().contains("cannot be written"));
        std::fs::remove_file(&path).unwrap();
        audit.record(&entry("healed")).await.unwrap();
        assert_eq!(audit.refuses(), None);
        assert_eq!(requests(&path), ["healed"]);
        // A folder that is away is no different from a full disk.
        audit.reopen().await.unwrap();
        std::fs::rename(folder.path(), folder.path().with_extension("away")).unwrap();
        assert!(audit.reopen().await.is_err());
        assert!(audit.record(&entry("lost")).await.is_err());
        std::fs::rename(folder.path().with_extension("away"), folder.path()).unwrap();
        audit.record(&entry("again")).await.unwrap();
        assert_eq!(requests(&path), ["healed", "again"]);
    }

    #[tokio::test]
    async fn a_torn_line_does_not_spoil_the_next_record() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        std::fs::write(&path, "{\"request\":\"who").unwrap();
        let audit = Audit::open(&path, false).unwrap();
        audit.record(&entry("next")).await.unwrap();
        assert_eq!(requests(&path), ["next"]);
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("{\"request\":\"who\n{\"time\""));
    }

    #[tokio::test]
    async fn rotation_continues_in_a_new_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let old = folder.path().join("audit.jsonl.1");
        let audit = Audit::open(&path, false).unwrap();
        audit.record(&entry("1")).await.unwrap();
        std::fs::rename(&path, &old).unwrap();
        audit.record(&entry("2")).await.unwrap();
        audit.reopen().await.unwrap();
        audit.record(&entry("3")).await.unwrap();
        assert_eq!((requests(&old), requests(&path)), (vec!["1".to_owned(), "2".to_owned()], vec!["3".to_owned()]));
    }
}
