//! Errors of reading the state and of changing it.

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

/// Why a part of the state is not in effect.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The state cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The registered hosts or the baselines cannot be read: hosts that were removed, or whose baseline was disabled, may
    /// still be served.
    #[error("the registered hosts or the baselines cannot be read: {0}")]
    Hosts(StateError),
    /// The state contains certificates that cannot be read. All other records are in effect.
    #[error("the state holds certificates that cannot be read: {}", list(.0))]
    Unreadable(Vec<Unreadable>),
}

/// Why a change was not made, or is not in effect yet.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// It was not made.
    #[error(transparent)]
    State(#[from] StateError),
    /// It is stored but not in effect yet.
    #[error("the change is stored but has no effect yet, and the daemon tries every second to take it in: {0}")]
    NoEffectYet(StateError),
    /// It is stored, but it contains certificates that cannot be parsed.
    #[error("the change is stored, but these certificates cannot be parsed and have no effect: {}", list(.0))]
    Unreadable(Vec<Unreadable>),
    /// It may have been made.
    #[error("it is not known whether the change was made ({0}); look before you repeat it")]
    Task(#[from] JoinError),
}
