//! The classes of records, and the errors of writing them.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Most records that wait for the writer. This is more than the release queues admit, so only a hanging disk can reach
/// it.
pub(super) const WAITING: usize = 16_384;

/// The class of a record. It decides what happens if the disk is full or the caller has given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Something will be sent.
    Grant,
    /// A registered host is refused.
    Refusal,
    /// An administrator's change.
    Administration,
    /// The trail's own lines and summaries.
    Own,
}

/// Why a record is not, or possibly not, in the file. Then the recorded event must not happen.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AuditError {
    /// The file cannot be opened, written or synced.
    #[error("the audit trail {} cannot be written: {source}", path.display())]
    Write {
        /// The audit file.
        path: PathBuf,
        /// The operating system's error.
        source: Arc<io::Error>,
    },
    /// Too many records wait: the disk hangs.
    #[error("the audit trail is overloaded: {WAITING} records wait for the disk")]
    Overloaded,
    /// The disk did not answer in time.
    #[error("the audit trail's disk does not answer in time")]
    Late,
    /// The disk is full, and the reserve is for grants and administration only.
    #[error("the audit trail's disk is full: its reserve is for grants and administration")]
    Reserved,
    /// The record cannot be written as JSON.
    #[error("an audit record cannot be serialised: {0}")]
    Unserialisable(String),
    /// The writer has ended, which only a bug in this program can cause.
    #[error("the audit trail's writer has ended")]
    Closed,
}
