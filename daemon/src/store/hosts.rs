//! Registered hosts.

use std::sync::Arc;

use super::contents::Contents;
use super::error::StateError;
use super::labels::Labels;
use super::limits::check_der;
use super::records::{Host, HostKind, sha256_hex};

impl Contents {
    /// All hosts, by name.
    ///
    /// # Errors
    /// [`StateError::Unreadable`].
    pub fn hosts(&self) -> Result<impl Iterator<Item = &Arc<Host>>, StateError> {
        self.hosts.values()
    }

    /// The host with this name, ignoring case.
    ///
    /// # Errors
    /// [`StateError::Unreadable`].
    pub fn host_by_name(&self, name: &str) -> Result<Option<&Arc<Host>>, StateError> {
        self.hosts.get(&name.to_ascii_lowercase())
    }

    /// The host with this public key (DER SubjectPublicKeyInfo).
    ///
    /// # Errors
    /// [`StateError::Unreadable`].
    pub fn host_by_spki(&self, spki: &[u8]) -> Result<Option<&Arc<Host>>, StateError> {
        Ok(self.hosts()?.find(|host| host.spki == spki))
    }

    fn registered_host(&self, name: &str) -> Result<Host, StateError> {
        self.host_by_name(name)?.map(|host| Host::clone(host)).ok_or_else(|| no_host(name))
    }

    /// Stores a host, replacing the one with its name.
    pub(super) fn put_host(&mut self, host: Host) -> Result<(), StateError> {
        self.hosts.put(host.name.to_ascii_lowercase(), host)
    }

    /// Registers a host, enabled, with a key of this kind (DER SubjectPublicKeyInfo, which the caller has parsed).
    ///
    /// # Errors
    /// [`StateError::Invalid`] for an invalid name, [`StateError::Conflict`] if the name or the key is already
    /// registered.
    pub fn add_host(
        &mut self,
        kind: HostKind,
        name: &str,
        spki: &[u8],
        labels: &Labels,
        now: i64,
    ) -> Result<Host, StateError> {
        check_host_name(name)?;
        labels.check()?;
        check_der("a host's public key", spki)?;
        if let Some(other) = self.host_by_name(name)? {
            return Err(StateError::Conflict(format!(
                "a host {:?} is registered already; remove it first, or choose another name",
                other.name
            )));
        }
        if let Some(other) = self.host_by_spki(spki)? {
            return Err(StateError::Conflict(format!(
                "this key is registered already, as host {:?}; a host has a key of its own",
                other.name
            )));
        }
        let host = Host {
            name: name.to_owned(),
            kind,
            spki: spki.to_owned(),
            spki_sha256: sha256_hex(spki),
            enabled: true,
            added: now,
            labels: labels.clone(),
        };
        self.put_host(host.clone())?;
        Ok(host)
    }

    /// Removes a host and returns it.
    ///
    /// # Errors
    /// [`StateError::NotFound`].
    pub fn remove_host(&mut self, name: &str) -> Result<Host, StateError> {
        let removed = self.registered_host(name)?;
        self.hosts.remove(&name.to_ascii_lowercase())?;
        Ok(removed)
    }

    /// Enables or disables a host.
    ///
    /// # Errors
    /// [`StateError::NotFound`].
    pub fn enable_host(&mut self, name: &str, enabled: bool) -> Result<Host, StateError> {
        let host = Host { enabled, ..self.registered_host(name)? };
        self.put_host(host.clone())?;
        Ok(host)
    }

    /// Replaces a host's labels by the result of `change`.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Invalid`] for too many labels.
    pub fn label_host(&mut self, name: &str, change: impl FnOnce(&Labels) -> Labels) -> Result<Host, StateError> {
        let mut host = self.registered_host(name)?;
        host.labels = change(&host.labels);
        host.labels.check()?;
        self.put_host(host.clone())?;
        Ok(host)
    }
}

fn no_host(name: &str) -> StateError {
    StateError::NotFound(format!("no host {name:?} is registered"))
}

/// Checks that this can be the name of a host.
///
/// # Errors
/// [`StateError::Invalid`].
pub fn check_host_name(name: &str) -> Result<(), StateError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if (1..=64).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    // Names come from outside and may have any length: quote only a part.
    let shown: String = name.chars().take(64).collect();
    Err(StateError::Invalid(format!("{shown:?} cannot name a host; use 1 to 64 letters, digits, '.', '-' or '_'")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::tests::{Place, message, on_every_store};

    on_every_store!(hosts_are_unique_by_name_and_key);

    fn hosts_are_unique_by_name_and_key(place: &Place) {
        let mut state = place.open();
        state.add_host("Alpha", b"key-a", &Labels::default(), 1).unwrap();
        let beta = state.add_host("beta", b"key-b", &Labels::default(), 2).unwrap();
        assert!(
            message(state.add_host("ALPHA", b"key-c", &Labels::default(), 3))
                .contains("a host \"Alpha\" is registered already")
        );
        assert!(
            message(state.add_host("gamma", b"key-b", &Labels::default(), 3))
                .contains("registered already, as host \"beta\"")
        );
        for name in ["", "a b", "ä", "a/b", &"x".repeat(65)] {
            assert!(
                message(state.add_host(name, b"key-d", &Labels::default(), 3)).contains("1 to 64 letters"),
                "{name}"
            );
        }
        assert!(message(state.add_host("delta", b"", &Labels::default(), 3)).contains("octets of DER"));
        assert_eq!(state.host_by_name("BETA").unwrap(), Some(beta.clone()));
        assert_eq!(state.host_by_spki(b"key-b").unwrap(), Some(beta));
        assert_eq!(state.host_by_spki(b"key-z").unwrap(), None);
        state.enable_host("Beta", false).unwrap();
        assert!(!state.host_by_name("beta").unwrap().unwrap().enabled);
        let labels = |text: &str| text.parse::<Labels>().unwrap();
        let labelled = state.label_host("BETA", |labels_now| labels_now.with(&labels("site tenant=acme"))).unwrap();
        assert_eq!((labelled.name.as_str(), labelled.labels.to_string().as_str()), ("beta", "site tenant=acme"));
        state.label_host("beta", |labels_now| labels_now.without(&labels("site"))).unwrap();
        assert_eq!(state.host_by_name("beta").unwrap().unwrap().labels, labels("tenant=acme"));
        assert!(message(state.label_host("nobody", Labels::clone)).contains("no host"));
        assert_eq!(state.remove_host("alpha").unwrap().name, "Alpha");
        assert!(message(state.remove_host("alpha")).contains("no host \"alpha\" is registered"));
        assert!(message(state.enable_host("alpha", true)).contains("no host"));
        state.add_host("alpha", b"key-a", &Labels::default(), 4).unwrap();
        assert_eq!(state.hosts().unwrap().iter().map(|host| &*host.name).collect::<Vec<_>>(), ["alpha", "beta"]);
    }
}
