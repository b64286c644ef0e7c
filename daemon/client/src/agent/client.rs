//! The client of this host's agent.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixStream;

use super::wire::{self, Refused, Reply};

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent cannot be reached, or the connection ended.
    #[error("the agent at {}: {source}; does claviger host agent run, and with this --socket?", path.display())]
    Io {
        /// Path of its socket.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The socket belongs to another user, so the agent there cannot be trusted.
    #[error("the agent at {} runs as user {user}, which is neither root nor the user of this command; is it the right socket?", path.display())]
    Stranger {
        /// Path of its socket.
        path: PathBuf,
        /// User id of the process that answers there.
        user: u32,
    },
    /// The agent did not answer in time.
    #[error("the agent at {} did not answer within {timeout:?}", path.display())]
    Timeout {
        /// Path of its socket.
        path: PathBuf,
        /// The time limit.
        timeout: Duration,
    },
    /// The agent refused the request.
    #[error("{}", .0.text)]
    Refused(Refused),
}

impl AgentError {
    /// Whether the same request may succeed later.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Io { .. } | Self::Timeout { .. } => true,
            Self::Stranger { .. } => false,
            Self::Refused(refused) => refused.temporary,
        }
    }
}

/// Requests a release from the agent at `path`.
///
/// # Errors
/// [`AgentError`].
pub async fn release(path: &Path, protector: &[u8], timeout: Duration) -> Result<crate::host::Unwrapped, AgentError> {
    let reply = tokio::time::timeout(timeout, ask(path, wire::shorter(timeout), protector)).await;
    reply.unwrap_or_else(|_| Err(AgentError::Timeout { path: path.to_owned(), timeout }))?.map_err(AgentError::Refused)
}

async fn ask(path: &Path, patience: Duration, protector: &[u8]) -> Result<Reply, AgentError> {
    let failed = |source| AgentError::Io { path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).await.map_err(failed)?;
    let user = stream.peer_cred().map_err(failed)?.uid();
    if ![0, rustix::process::geteuid().as_raw()].contains(&user) {
        return Err(AgentError::Stranger { path: path.to_owned(), user });
    }
    // An agent refuses a user without permission before it reads the request.
    let written = wire::write_request(&mut stream, patience, protector).await;
    let reply = wire::read_reply(&mut stream).await;
    reply.map_err(|error| failed(written.err().unwrap_or(error)))
}
