//! The thread that writes. It takes all records that wait (group commit), writes them at once, and only then tells
//! the callers. A write that fails fails the records of its group and nothing else: the trail heals by itself.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use claviger_hsm::standstill;
use claviger_process::lock::lock;
use crossbeam::channel::{Receiver, RecvTimeoutError};
use tokio::sync::oneshot;

use super::file::Trail;
use super::head::Head;
use super::record::{AuditError, Class};
use super::reserve::Reserve;
use crate::observe::metrics;

/// Most records that are written, and forced to the disk, together.
const GROUP: usize = 256;

pub(super) type Reply = oneshot::Sender<Result<(), AuditError>>;

/// What the writer is to do.
pub(super) enum Job {
    Line(Line),
    Reopen(Reply),
}

pub(super) struct Line {
    /// A JSON object.
    pub(super) body: Vec<u8>,
    pub(super) class: Class,
    /// Of a checkpoint: how many records it covers, and up to which line.
    pub(super) covers: Option<(u64, u64)>,
    pub(super) reply: Reply,
}

impl Line {
    /// Grants and administration, which may use the reserve.
    fn is_essential(&self) -> bool {
        matches!(self.class, Class::Grant | Class::Administration)
    }

    /// The caller has given up and refused: a line would tell of what did not happen. What an administrator changed has
    /// happened, and what was counted, too.
    fn is_abandoned(&self) -> bool {
        matches!(self.class, Class::Grant | Class::Refusal) && self.reply.is_closed()
    }
}

/// What the writer shows to others.
#[derive(Debug)]
pub(super) struct Shown {
    /// When the writer began with what it is writing, in milliseconds since `epoch`; 0 while it writes nothing.
    pub(super) writing: AtomicU64,
    pub(super) epoch: Instant,
    pub(super) head: Mutex<Head>,
}

impl Shown {
    pub(super) fn head(&self) -> Head {
        *lock(&self.head)
    }
}

pub(super) struct Writer {
    trail: Trail,
    reserve: Reserve,
    /// Records that failed since the last one that was written.
    lost: u64,
    head: Head,
    shown: Arc<Shown>,
}

impl Writer {
    pub(super) fn new(trail: Trail, reserve: Reserve) -> (Self, Arc<Shown>) {
        let epoch = standstill::now();
        let mut head = Head { link: trail.link(), reserve_missing: reserve.missing(), ..Head::default() };
        if trail.is_unsigned() {
            // How many there are is not known; that there are some is what matters.
            (head.records, head.unsigned_since) = (1, Some(epoch));
        }
        let shown = Arc::new(Shown { writing: AtomicU64::new(0), epoch, head: Mutex::new(head) });
        (Self { trail, reserve, lost: 0, head, shown: Arc::clone(&shown) }, shown)
    }

    pub(super) fn run(mut self, waiting: &Receiver<Job>) {
        loop {
            let first = match self.reserve.due() {
                Some(due) => waiting.recv_timeout(due.saturating_duration_since(standstill::now())),
                None => waiting.recv().map_err(RecvTimeoutError::from),
            };
            let first = match first {
                Ok(first) => first,
                Err(RecvTimeoutError::Timeout) => {
                    self.at_the_disk(|writer| writer.reserve.restore(standstill::now()));
                    self.head.reserve_missing = self.reserve.missing();
                    *lock(&self.shown.head) = self.head;
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let (mut lines, mut reopen) = (Vec::new(), None);
            for job in std::iter::once(first).chain(waiting.try_iter()) {
                match job {
                    Job::Line(line) if line.is_abandoned() => {}
                    Job::Line(line) => lines.push(line),
                    Job::Reopen(reply) => reopen = Some(reply),
                }
                if lines.len() == GROUP || reopen.is_some() {
                    break;
                }
            }
            if !lines.is_empty() {
                self.commit(lines);
            }
            if let Some(reply) = reopen {
                let opened = self.at_the_disk(|writer| writer.trail.reopen());
                let _ = reply.send(opened.map_err(|error| failed(self.trail.path(), error)));
            }
            self.head.reserve_missing = self.reserve.missing();
            *lock(&self.shown.head) = self.head;
        }
    }

    /// Does what may take as long as the disk likes, so that others can see for how long.
    fn at_the_disk<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let since = standstill::since(self.shown.epoch).as_millis();
        self.shown.writing.store(u64::try_from(since).unwrap_or(u64::MAX).max(1), Ordering::Release);
        let result = work(self);
        self.shown.writing.store(0, Ordering::Release);
        result
    }

    fn commit(&mut self, lines: Vec<Line>) {
        let began = standstill::now();
        let (lines, written) = self.at_the_disk(|writer| writer.write(lines, began));
        metrics::audit_written(standstill::since(began));
        // None are left where all were refused for want of room: nothing was tried.
        if !lines.is_empty() {
            self.head.failing = written.is_err();
        }
        match &written {
            Ok(()) => {
                if self.lost > 0 {
                    tracing::warn!(file = %self.trail.path().display(), lost = self.lost, "the audit trail can be written again");
                    self.lost = 0;
                }
                self.note(&lines, began);
            }
            Err(error) => {
                // A summary is kept and tried again: nothing was refused for it.
                let records = lines.iter().filter(|line| line.class != Class::Own).count() as u64;
                if self.lost == 0 && records > 0 {
                    tracing::error!(
                        file = %self.trail.path().display(), %error,
                        "the audit trail cannot be written, so nothing is released; check the disk"
                    );
                }
                self.lost += records;
                metrics::audit_errors(records);
            }
        }
        // Before the callers: who is told of a line finds it there.
        *lock(&self.shown.head) = self.head;
        for line in lines {
            // A caller that stopped waiting needs no answer.
            let _ = line.reply.send(written.clone());
        }
    }

    /// Writes lines; those of refusals only while the disk has room for them, and they are told so. Returns the others.
    fn write(&mut self, lines: Vec<Line>, now: Instant) -> (Vec<Line>, Result<(), AuditError>) {
        self.reserve.restore(now);
        if lines.iter().any(|line| line.class == Class::Administration) {
            self.reserve.make_room(now);
        }
        let mut lines = lines;
        loop {
            if !self.reserve.is_whole() {
                lines = essential(lines);
            }
            if lines.is_empty() {
                return (lines, Ok(()));
            }
            let bodies: Vec<Vec<u8>> = lines.iter_mut().map(|line| std::mem::take(&mut line.body)).collect();
            let written = self.trail.append(&bodies);
            for (line, body) in lines.iter_mut().zip(bodies) {
                line.body = body;
            }
            // Only room on the disk can be given: a limit on the size of the file stays one. What a quota leaves cannot be seen.
            let may_give = written.as_ref().is_err_and(|error| match error.kind() {
                ErrorKind::StorageFull => self.reserve.could_help(),
                kind => kind == ErrorKind::QuotaExceeded,
            });
            if may_give && self.reserve.give(now) {
                continue;
            }
            return (lines, written.map_err(|error| failed(self.trail.path(), error)));
        }
    }

    /// Notes what was written.
    fn note(&mut self, lines: &[Line], now: Instant) {
        let head = &mut self.head;
        head.link = self.trail.link();
        for line in lines {
            match line.covers {
                Some((records, n)) => {
                    head.covered = head.covered.max(records);
                    head.checkpoint = Some(n);
                    head.unsigned_since = None;
                }
                None => head.records += 1,
            }
        }
        if head.unsigned() > 0 && head.unsigned_since.is_none() {
            head.unsigned_since = Some(now);
        }
    }
}

/// The lines that may use the reserve; the callers of the others are told that theirs are not written.
fn essential(lines: Vec<Line>) -> Vec<Line> {
    let (essential, others): (Vec<_>, Vec<_>) = lines.into_iter().partition(Line::is_essential);
    for line in others {
        let _ = line.reply.send(Err(AuditError::Reserved));
    }
    essential
}

fn failed(path: &Path, source: io::Error) -> AuditError {
    AuditError::Write { path: path.to_owned(), source: Arc::new(source) }
}
