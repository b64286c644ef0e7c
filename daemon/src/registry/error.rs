//! Errors of following the state and of changing it.

use claviger_protocol::certificate::CertificateError;
use tokio::task::JoinError;

use crate::store::StateError;

/// A certificate of the state that cannot be read.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the certificate {thumbprint}: {error}")]
pub struct Unreadable {
    /// SHA-256 of the stored bytes, hexadecimal.
    pub thumbprint: String,
    /// The reason.
    pub error: CertificateError,
}

fn list(unreadable: &[Unreadable]) -> String {
    unreadable.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Why not all of the state is in force.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The state cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The registered hosts or the baselines cannot be read: hosts that were removed, or whose baseline was disabled, may
    /// still be served.
    #[error("the registered hosts or the baselines cannot be read: {0}")]
    Hosts(StateError),
    /// Certificates of the state that cannot be read. Everything else in it is in force.
    #[error("the state holds certificates that cannot be read: {}", list(.0))]
    Unreadable(Vec<Unreadable>),
}

/// Why a change is not made, or has no effect yet.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// It was not made.
    #[error(transparent)]
    State(#[from] StateError),
    /// It was made.
    #[error("the change is stored but has no effect yet, and the daemon tries every second to take it in: {0}")]
    NoEffectYet(StateError),
    /// It was made, and brought certificates that cannot be read.
    #[error("the change is stored, but what it brought cannot be read and has no effect: {}", list(.0))]
    Unreadable(Vec<Unreadable>),
    /// It may have been made.
    #[error("the change failed: {0}")]
    Task(#[from] JoinError),
}
