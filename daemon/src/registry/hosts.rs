//! The registered hosts, as an immutable snapshot for requests.

use std::collections::HashMap;
use std::sync::Arc;

use crate::store::{Host, HostKind};

/// The registered hosts, by name and by key.
#[derive(Debug, Default)]
pub struct Hosts {
    by_name: HashMap<String, Arc<Host>>,
    by_spki: HashMap<Vec<u8>, Arc<Host>>,
}

impl Hosts {
    pub(crate) fn new<'a>(hosts: impl Iterator<Item = &'a Arc<Host>>) -> Self {
        let mut all = Self::default();
        for host in hosts {
            all.by_name.insert(host.name.clone(), Arc::clone(host));
            all.by_spki.insert(host.spki.clone(), Arc::clone(host));
        }
        all
    }

    /// Number of enabled hosts.
    #[must_use]
    pub fn enabled(&self) -> usize {
        self.by_name.values().filter(|host| host.enabled).count()
    }

    /// The enabled host whose host key has this SubjectPublicKeyInfo.
    #[must_use]
    pub fn by_host_key(&self, spki: &[u8]) -> Option<&Arc<Host>> {
        self.by_key(HostKind::HostKey, spki)
    }

    /// The enabled host whose endorsement key has this SubjectPublicKeyInfo.
    #[must_use]
    pub fn by_endorsement_key(&self, spki: &[u8]) -> Option<&Arc<Host>> {
        self.by_key(HostKind::EndorsementKey, spki)
    }

    fn by_key(&self, kind: HostKind, spki: &[u8]) -> Option<&Arc<Host>> {
        self.by_spki.get(spki).filter(|host| host.enabled && host.kind == kind)
    }

    /// The enabled host with this name, if the hash of its key is still the same.
    #[must_use]
    pub fn by_name_and_key(&self, name: &str, spki_sha256: &str) -> Option<&Arc<Host>> {
        self.by_name.get(name).filter(|host| host.enabled && host.spki_sha256 == spki_sha256)
    }

    /// Whether a host with this name is registered, enabled or not.
    #[cfg(test)]
    pub(crate) fn is_registered(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }
}
