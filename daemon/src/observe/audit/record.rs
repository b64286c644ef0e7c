//! What a record is about, and why it may not be in the file.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Most records that wait for the writer. More than the release queues let through, so only a stuck disk fills it.
pub(super) const WAITING: usize = 16_384;

/// What a record is about: what becomes of it when the disk is full, and when its caller has given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Something is given out.
    Grant,
    /// A registered host is refused.
    Refusal,
    /// An administrator's change.
    Administration,
    /// What the trail says of itself, and sums up.
    Own,
}

/// Why a record is not in the file (or not surely). What it was to record must not happen then.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AuditError {
    /// The file cannot be opened or written, or its data cannot be synced to the disk.
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
    /// The disk does not answer in time.
    #[error("the audit trail's disk does not answer in time")]
    Late,
    /// The disk is full, and what is left is for grants and administration.
    #[error("the audit trail's disk is full: its reserve is for grants and administration")]
    Reserved,
    /// The record cannot be written as JSON.
    #[error("an audit record cannot be serialised: {0}")]
    Unserialisable(String),
    /// The writer is gone, which only a fault in this program can bring about.
    #[error("the audit trail's writer has ended")]
    Closed,
}
