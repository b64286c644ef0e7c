//! Errors of the administrators' socket, on both sides of it.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Longest path of a Unix socket: `sun_path` less its NUL.
pub(super) const PATH_LIMIT: usize = 107;

/// Why the socket could not be served or asked.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The operating system takes no path of this length for a socket.
    #[error("the path of the socket {} is too long: {} bytes, and the system takes {PATH_LIMIT} at most", path.display(), path.as_os_str().len())]
    PathTooLong {
        /// The socket.
        path: PathBuf,
    },
    /// Another daemon is running with this folder of sockets.
    #[error("another claviger runs here: it holds {}; stop it first", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// There is something else where the socket should be.
    #[error("{} is not a socket; move it away", path.display())]
    NotASocket {
        /// The socket.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("the administrators' socket {} cannot be made: {source}", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// There is no socket.
    #[error("there is no administrators' socket at {}; is the daemon running, and with this --config?", path.display())]
    Missing {
        /// The socket.
        path: PathBuf,
    },
    /// There is a socket, but nobody behind it.
    #[error("nobody answers at {}: the daemon that made it has ended; start it again", path.display())]
    Dead {
        /// The socket.
        path: PathBuf,
    },
    /// This user may not use the socket.
    #[error("{} may not be used by this user; run this as root or as {owner}", path.display())]
    Denied {
        /// The socket.
        path: PathBuf,
        /// Whose it is.
        owner: String,
    },
    /// The conversation broke.
    #[error("the daemon behind {} did not answer: {source}; its log may say why", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The daemon answered that it did not do it; the text is its own.
    #[error("{0}")]
    Refused(String),
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
