//! Disk space that only grants and administration may use: a preallocated file that is truncated when the disk is full.
//! Checking the free space would not be enough, because other programs fill the disk as well.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate, fstatvfs};

/// Bytes that are given back at a time.
const STEP: u64 = 1024 * 1024;
/// Free space that must remain when the reserve is refilled; otherwise refilling would fill the disk again.
const MARGIN: u64 = 4 * STEP;
/// Space for an administrator's change in addition to its lines: the state file and its journal.
const ROOM_FOR_A_CHANGE: u64 = 2 * STEP;
/// Pause between attempts to refill it.
const PAUSE: Duration = Duration::from_secs(5);
/// Time limit of one refill, in steps, while lines wait for the disk. If it is not enough, it continues after a shorter
/// pause.
const AT_A_TIME: Duration = Duration::from_millis(10);
const SHORT_PAUSE: Duration = Duration::from_millis(100);
/// Longest delay of the daemon's start by it.
const AT_THE_START: Duration = Duration::from_secs(2);

/// The reserve. All methods block on the disk.
#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
    file: Option<File>,
    wanted: u64,
    has: u64,
    next_try: Option<Instant>,
}

impl Reserve {
    /// Allocates `wanted` bytes on the disk of `path`, or keeps what was allocated before.
    pub(super) fn open(path: &Path, wanted: u64, now: Instant) -> Self {
        let mut reserve = Self { path: path.to_owned(), file: None, wanted, has: 0, next_try: None };
        if wanted == 0 {
            // An earlier configuration may have had a reserve.
            let _ = std::fs::remove_file(path);
            return reserve;
        }
        match reserve.fill(AT_THE_START) {
            Ok(()) => reserve.next_try = (!reserve.is_whole()).then(|| now + SHORT_PAUSE),
            Err(error) => {
                tracing::warn!(
                    file = %path.display(), %error,
                    "the reserve of the audit trail cannot be allocated: when the disk is full, nothing is released"
                );
                reserve.next_try = Some(now + PAUSE);
            }
        }
        reserve
    }

    /// Missing bytes.
    pub(super) fn missing(&self) -> u64 {
        self.wanted.saturating_sub(self.has)
    }

    /// Whether it is complete. If not, the disk is full, and only grants and administration are written.
    pub(super) fn is_whole(&self) -> bool {
        self.missing() == 0
    }

    /// Gives a part back to the disk; `false` if nothing is left.
    pub(super) fn give(&mut self, now: Instant) -> bool {
        let Some(file) = self.file.as_ref().filter(|_| self.has > 0) else { return false };
        let rest = self.has.saturating_sub(STEP);
        if file.set_len(rest).is_err() {
            return false;
        }
        if self.is_whole() {
            tracing::error!(
                file = %self.path.display(),
                "the audit trail's disk is full; grants and administration use the reserve; free disk space"
            );
        }
        self.has = rest;
        self.next_try = Some(now + PAUSE);
        true
    }

    /// Whether the disk is full. If it has free space, giving back the reserve would not help.
    pub(super) fn could_help(&self) -> bool {
        self.file.as_ref().and_then(free).is_some_and(|free| free < MARGIN)
    }

    /// Makes room on the disk for an administrator's change.
    pub(super) fn make_room(&mut self, now: Instant) {
        while let Some(free) = self.file.as_ref().and_then(free)
            && free < ROOM_FOR_A_CHANGE
            && self.give(now)
        {}
    }

    /// The time at which [`Reserve::restore`] has work to do.
    pub(super) fn due(&self) -> Option<Instant> {
        self.next_try.filter(|_| !self.is_whole())
    }

    /// Refills the reserve when the disk has free space again. Only from time to time, and only briefly, because grants
    /// wait meanwhile.
    pub(super) fn restore(&mut self, now: Instant) {
        self.restore_within(AT_A_TIME, now);
    }

    fn restore_within(&mut self, time: Duration, now: Instant) {
        if self.is_whole() || self.next_try.is_some_and(|at| now < at) {
            return;
        }
        self.next_try = Some(now + PAUSE);
        // If the file was deleted, it is created again.
        let is_ours = |file: &File| file.metadata().is_ok_and(|metadata| metadata.nlink() > 0);
        if !self.file.as_ref().is_some_and(is_ours) {
            (self.file, self.has) = (None, 0);
        }
        if self.file.as_ref().and_then(free).is_some_and(|free| free < self.missing() + MARGIN) {
            return;
        }
        match self.fill(time) {
            Ok(()) if self.is_whole() => {
                tracing::info!(file = %self.path.display(), "the reserve of the audit trail is allocated again");
            }
            Ok(()) => self.next_try = Some(now + SHORT_PAUSE),
            Err(_) => {}
        }
    }

    /// Allocates in steps until it is complete or the time is over; at least one step.
    fn fill(&mut self, time: Duration) -> io::Result<()> {
        let file = match self.file.take() {
            Some(file) => file,
            None => OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&self.path)?,
        };
        self.has = file.metadata()?.len().min(self.wanted);
        file.set_len(self.has)?;
        let begun = Instant::now();
        let mut filled = Ok(());
        while filled.is_ok() && self.missing() > 0 {
            let step = self.missing().min(STEP);
            filled = allocate(&file, self.has, step);
            if filled.is_ok() {
                self.has += step;
            } else {
                // Give up what was allocated beyond it: its size is unknown.
                let _ = file.set_len(self.has);
            }
            if begun.elapsed() >= time {
                break;
            }
        }
        self.file = Some(file);
        filled
    }
}

fn allocate(file: &File, from: u64, bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::empty(), from, bytes).map_err(io::Error::from) {
        // Without support by the file system, write the bytes instead.
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::InvalidInput) => {
            let (zeros, mut file, mut left) = ([0; 64 * 1024], file, bytes);
            io::Seek::seek(&mut file, io::SeekFrom::Start(from))?;
            while left > 0 {
                let part = left.min(zeros.len() as u64);
                file.write_all(&zeros[..usize::try_from(part).unwrap_or(zeros.len())])?;
                left -= part;
            }
            Ok(())
        }
        done => done,
    }
}

fn free(file: &File) -> Option<u64> {
    let disk = fstatvfs(file).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn it_is_given_in_steps_and_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.reserve");
        let now = Instant::now();
        let mut reserve = Reserve::open(&path, 2 * STEP + 1, now);
        let allocated = || std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(reserve.is_whole() && allocated() > 2 * STEP, "{reserve:?}");
        for missing in [STEP, 2 * STEP, 2 * STEP + 1] {
            assert!(reserve.give(now));
            assert_eq!(reserve.missing(), missing);
        }
        assert!(!reserve.give(now) && allocated() == 0);
        reserve.restore(now);
        assert!(!reserve.is_whole(), "too early");
        reserve.restore_within(Duration::from_secs(60), now + PAUSE);
        assert!(reserve.is_whole() && allocated() > 2 * STEP);
        // One step at a time if there is no time for more; grants are written in between.
        let mut now = now + PAUSE;
        while reserve.give(now) {}
        for missing in [STEP + 1, 1, 0] {
            now = reserve.due().unwrap();
            reserve.restore_within(Duration::ZERO, now);
            assert_eq!((reserve.missing(), std::fs::metadata(&path).unwrap().len()), (missing, 2 * STEP + 1 - missing));
        }
        assert_eq!(reserve.due(), None);
        assert!(allocated() > 2 * STEP);
        // Another size, and none.
        drop(reserve);
        assert!(Reserve::open(&path, STEP, now).is_whole());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), STEP);
        assert!(Reserve::open(&path, 0, now).is_whole());
        assert!(!path.exists());
    }
}
