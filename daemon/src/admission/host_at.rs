//! Whose rate and whose turn it is.

use std::sync::Arc;

use crate::request::{Attempt, Network};

/// A host as it asks from one network. Its rate is that of the pair: who got hold of its health certificate and shows it
/// elsewhere does not ask in its place.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct HostAt {
    pub(super) host: Arc<str>,
    /// `None` where it is not known, as in a program that has no connections.
    pub(super) network: Option<Network>,
}

impl HostAt {
    /// The host of this name, as the sender of `attempt`.
    #[must_use]
    pub fn new(host: &str, attempt: &Attempt) -> Self {
        Self { host: Arc::from(host), network: attempt.network() }
    }
}
