//! Errors of the administrators' socket, for the daemon and for its clients.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Longest path of a Unix socket: `sun_path` without its NUL.
pub(super) const PATH_LIMIT: usize = 107;

/// Errors of serving or using the socket.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The path is too long for a Unix socket.
    #[error("the path of the socket {} is too long: {} bytes, and the system takes {PATH_LIMIT} at most", path.display(), path.as_os_str().len())]
    PathTooLong {
        /// The socket.
        path: PathBuf,
    },
    /// Another daemon is using this folder of sockets.
    #[error("another claviger runs here: it holds {}; stop it first", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// The path exists and is not a socket.
    #[error("{} is not a socket; move it away", path.display())]
    NotASocket {
        /// The socket.
        path: PathBuf,
    },
    /// The socket cannot be created.
    #[error("the administrators' socket {} cannot be made: {source}", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The socket does not exist.
    #[error("there is no administrators' socket at {}; is the daemon running, and with this --config?", path.display())]
    Missing {
        /// The socket.
        path: PathBuf,
    },
    /// The socket exists, but no daemon listens on it.
    #[error("nobody answers at {}: the daemon that made it has ended; start it again", path.display())]
    Dead {
        /// The socket.
        path: PathBuf,
    },
    /// This user may not use the socket.
    #[error("{} may not be used by this user; run this as root{}", path.display(), others(owner, group.as_deref()))]
    Denied {
        /// The socket.
        path: PathBuf,
        /// The user who owns it.
        owner: String,
        /// The group that may use it, if there is one.
        group: Option<String>,
    },
    /// The connection failed.
    #[error("the daemon behind {} did not answer: {source}; its log may say why", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// The daemon refused the command; the text is the daemon's.
    #[error("{0}")]
    Refused(String),
}

/// Who may use the socket beside root.
fn others(owner: &str, group: Option<&str>) -> String {
    match group {
        Some(group) => {
            format!(", as {owner} or as a member of the group {group} (after a new login: usermod -aG {group} USER)")
        }
        None => format!(" or as {owner}"),
    }
}

/// Checks the length of a socket's path, which the kernel limits.
///
/// # Errors
/// [`AdminError::PathTooLong`].
pub fn check_length(path: &Path) -> Result<(), AdminError> {
    if path.as_os_str().as_bytes().len() > PATH_LIMIT {
        return Err(AdminError::PathTooLong { path: path.to_owned() });
    }
    Ok(())
}
