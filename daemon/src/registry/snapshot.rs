//! What one request reads from its start to its end.

use std::sync::Arc;

use super::baselines::Baselines;
use super::hosts::Hosts;
use super::keys::Keys;
use super::signers::Signers;
use crate::config::Config;
use crate::request::Attempt;

/// The settings and the registry for one request, unchanged from its start to its end.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The settings.
    pub config: Arc<Config>,
    /// The key-protection certificates.
    pub keys: Arc<Keys>,
    /// The registered hosts.
    pub hosts: Arc<Hosts>,
    /// The enabled baselines.
    pub baselines: Arc<Baselines>,
    /// The attestation signers.
    pub signers: Arc<Signers>,
}

impl Snapshot {
    /// Whether the sender of `attempt` may act as the host with this name. Always true, unless TLS client
    /// certificates are bound to hosts: then the certificate must have this name.
    #[must_use]
    pub fn may_act_as(&self, host: &str, attempt: &Attempt) -> bool {
        let bound = self.config.server.tls.as_ref().is_some_and(|tls| tls.clients.are_hosts());
        !bound || attempt.client.as_ref().is_some_and(|client| client.is_for(host))
    }
}
