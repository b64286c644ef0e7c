//! Registered hosts.

use std::fmt;

use rusqlite::{OptionalExtension, Row, params};

use super::{Labels, State, StateError, check_der, no_host, one, read_labels, sha256_hex};

/// The columns of [`host`].
pub(super) const COLUMNS: &str = "name, spki, spki_sha256, enabled, added, labels, kind";

/// What a host attests with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostKind {
    /// A key of its own, in host-key mode.
    #[default]
    HostKey,
    /// The endorsement key of its TPM, in TPM mode. A host key never passes for one: its owner could sign anything.
    EndorsementKey,
}

impl HostKind {
    /// Its name in the state and for people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::HostKey => "host-key",
            Self::EndorsementKey => "endorsement-key",
        }
    }
}

impl fmt::Display for HostKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A host that may attest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its name, unique without regard to case, as it was given.
    pub name: String,
    /// What it attests with.
    pub kind: HostKind,
    /// The public half of that key: DER SubjectPublicKeyInfo, unique.
    pub spki: Vec<u8>,
    /// SHA-256 of [`Host::spki`], 64 lower-case hexadecimal digits.
    pub spki_sha256: String,
    /// Whether it may attest and be given keys.
    pub enabled: bool,
    /// When it was added, seconds since 1970.
    pub added: i64,
    /// What is said of it; certificates may be limited to hosts of some labels.
    pub labels: Labels,
}

impl State {
    /// All hosts, by name.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn hosts(&self) -> Result<Vec<Host>, StateError> {
        self.read(&format!("SELECT {COLUMNS} FROM hosts ORDER BY name"), [], host)
    }

    /// The host of a name, without regard to case.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn host_by_name(&self, name: &str) -> Result<Option<Host>, StateError> {
        Ok(self.read(&format!("SELECT {COLUMNS} FROM hosts WHERE name = ?1"), [name], host)?.pop())
    }

    /// The host of a public key (DER SubjectPublicKeyInfo).
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn host_by_spki(&self, spki: &[u8]) -> Result<Option<Host>, StateError> {
        Ok(self.read(&format!("SELECT {COLUMNS} FROM hosts WHERE spki = ?1"), [spki], host)?.pop())
    }

    /// Registers a host, enabled, by its host key (DER SubjectPublicKeyInfo, which the caller has parsed).
    ///
    /// # Errors
    /// [`StateError::Invalid`] for a name that is none, [`StateError::Conflict`] for a name or a key that is registered.
    pub fn add_host(&mut self, name: &str, spki: &[u8], labels: &Labels, now: i64) -> Result<Host, StateError> {
        self.add_host_with(HostKind::HostKey, name, spki, labels, now)
    }

    /// Registers a host, enabled, by a key of this kind.
    ///
    /// # Errors
    /// As [`State::add_host`].
    pub fn add_host_with(
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
        let host = Host {
            name: name.to_owned(),
            kind,
            spki: spki.to_owned(),
            spki_sha256: sha256_hex(spki),
            enabled: true,
            added: now,
            labels: labels.clone(),
        };
        self.write(|transaction| {
            if let Some(other) = one::<String>(transaction, "SELECT name FROM hosts WHERE name = ?1", [name])? {
                return Err(StateError::Conflict(format!(
                    "a host {other:?} is registered already; remove it first, or choose another name"
                ))
                .into());
            }
            if let Some(other) = one::<String>(transaction, "SELECT name FROM hosts WHERE spki = ?1", [spki])? {
                return Err(StateError::Conflict(format!(
                    "this key is registered already, as host {other:?}; a host has a key of its own"
                ))
                .into());
            }
            transaction.execute(
                "INSERT INTO hosts (name, spki, spki_sha256, enabled, added, labels, kind)
                 VALUES (?1, ?2, ?3, 1, ?4, ?5, ?6)",
                params![host.name, host.spki, host.spki_sha256, host.added, host.labels.to_string(), kind.as_str()],
            )?;
            Ok(())
        })?;
        Ok(host)
    }

    /// Removes a host and returns what it was.
    ///
    /// # Errors
    /// [`StateError::NotFound`].
    pub fn remove_host(&mut self, name: &str) -> Result<Host, StateError> {
        self.write(|transaction| {
            let sql = format!("DELETE FROM hosts WHERE name = ?1 RETURNING {COLUMNS}");
            let removed = transaction.query_row(&sql, [name], host).optional()?;
            removed.ok_or_else(|| no_host(name).into())
        })
    }

    /// Enables or disables a host.
    ///
    /// # Errors
    /// [`StateError::NotFound`].
    pub fn enable_host(&mut self, name: &str, enabled: bool) -> Result<Host, StateError> {
        self.write(|transaction| {
            let sql = format!("UPDATE hosts SET enabled = ?2 WHERE name = ?1 RETURNING {COLUMNS}");
            let changed = transaction.query_row(&sql, params![name, enabled], host).optional()?;
            changed.ok_or_else(|| no_host(name).into())
        })
    }

    /// Gives a host other labels, which `change` makes of those it has.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Invalid`] for too many.
    pub fn label_host(&mut self, name: &str, change: impl FnOnce(&Labels) -> Labels) -> Result<Host, StateError> {
        self.write(|transaction| {
            let found = one::<String>(transaction, "SELECT labels FROM hosts WHERE name = ?1", [name])?;
            let labels = change(&found.ok_or_else(|| no_host(name))?.parse()?);
            labels.check()?;
            let sql = format!("UPDATE hosts SET labels = ?2 WHERE name = ?1 RETURNING {COLUMNS}");
            Ok(transaction.query_row(&sql, params![name, labels.to_string()], host)?)
        })
    }
}

pub(super) fn host(row: &Row<'_>) -> rusqlite::Result<Host> {
    Ok(Host {
        name: row.get(0)?,
        spki: row.get(1)?,
        spki_sha256: row.get(2)?,
        enabled: row.get(3)?,
        added: row.get(4)?,
        labels: read_labels(row, 5)?,
        kind: match row.get_ref(6)?.as_str()? {
            "endorsement-key" => HostKind::EndorsementKey,
            _ => HostKind::HostKey,
        },
    })
}

/// Whether this can name a host.
///
/// # Errors
/// [`StateError::Invalid`].
pub fn check_host_name(name: &str) -> Result<(), StateError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if (1..=64).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    // As much of it as is needed to recognise it: names come from outside and may be of any length.
    let shown: String = name.chars().take(64).collect();
    Err(StateError::Invalid(format!("{shown:?} cannot name a host; use 1 to 64 letters, digits, '.', '-' or '_'")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::tests::{message, open};

    #[test]
    fn hosts_are_unique_by_name_and_key() {
        let (_folder, mut state) = open();
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
