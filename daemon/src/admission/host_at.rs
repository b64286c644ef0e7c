//! The identity to which rates and turns belong.

use std::sync::Arc;

use crate::request::{Attempt, Network};

/// A host in connection with the network of its requests. Each pair has its own rate: an attacker who uses a host's
/// health certificate elsewhere does not use up the host's rate.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct HostAt {
    pub(super) host: Arc<str>,
    /// `None` if unknown, as in a program without connections.
    pub(super) network: Option<Network>,
}

impl HostAt {
    /// The host with this name, at the network of `attempt`.
    #[must_use]
    pub fn new(host: &str, attempt: &Attempt) -> Self {
        Self { host: Arc::from(host), network: attempt.network() }
    }

    /// A sender that is not known as a host: its network stands for the host.
    pub(super) fn stranger(attempt: &Attempt) -> Self {
        let network = attempt.network();
        Self { host: network.map_or_else(|| Arc::from(""), |network| Arc::from(network.to_string())), network }
    }
}
