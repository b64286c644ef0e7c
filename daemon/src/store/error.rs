//! Errors of reading and changing the state.

use std::path::PathBuf;

/// Why the state cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// An argument is invalid; the text says what is valid.
    #[error("{0}")]
    Invalid(String),
    /// An argument conflicts with a stored record; the text names it.
    #[error("{0}")]
    Conflict(String),
    /// The named record does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The attestation signer, or its key, was revoked.
    #[error("{0}")]
    Revoked(String),
    /// A newer version of this program wrote the file.
    #[error("{} has schema version {found}, and this program knows only up to {known}; run the version that wrote it, or a newer one", path.display())]
    TooNew {
        /// The database file.
        path: PathBuf,
        /// Its schema version.
        found: i64,
        /// The newest schema version that this program supports.
        known: i64,
    },
    /// The folder or file cannot be created or opened.
    #[error("{} cannot be made or opened: {source}; check that the daemon's user owns the state folder", path.display())]
    File {
        /// The folder or file.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The file was removed or replaced after it was opened, so a change would be lost.
    #[error("{} is not the file that this daemon opened: it was removed or replaced; start the daemon again", path.display())]
    Replaced {
        /// The database file.
        path: PathBuf,
    },
    /// SQLite failed: the disk is full, the file is damaged, or another process locked it for more than 5 seconds.
    #[error("the state in {} cannot be used: {source}; check the disk, and that no other program holds the file", path.display())]
    Database {
        /// The database file.
        path: PathBuf,
        /// The error of SQLite.
        source: rusqlite::Error,
    },
    /// The records of one table cannot be read; the other tables are not affected.
    #[error(
        "the {table} in {place} cannot be read: {problem}; bring the state back from a backup, or correct it there"
    )]
    Unreadable {
        /// Name of the table.
        table: &'static str,
        /// The file, or the key in the store.
        place: String,
        /// The cause.
        problem: String,
    },
    /// No etcd member with a majority can be reached.
    #[error("etcd cannot be reached, so nothing is changed: {reason}; claviger doctor checks the way to it")]
    Unavailable {
        /// The cause.
        reason: String,
    },
    /// etcd does not take the change: it is too large, or this user may not write it.
    #[error(
        "etcd has refused the change, and nothing is changed: {reason}; docs/nodes.md says which rights and limits etcd needs"
    )]
    Refused {
        /// etcd's answer.
        reason: String,
    },
    /// The change was made in etcd, and this node has not read it from there in time.
    #[error("the change is made, and this node has not read it from etcd yet")]
    NotSeen,
    /// The connection to etcd was lost during a change.
    #[error("the connection to etcd was lost, and the change may have been made or not: look before you repeat it")]
    Unknown,
}
