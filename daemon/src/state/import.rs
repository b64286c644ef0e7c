//! Taking in what another state holds: nothing that is only here goes away.

use rusqlite::{OptionalExtension, Transaction, TransactionBehavior, params};

use super::certificates::{self, certificate};
use super::hosts::{self, host};
use super::{Certificate, Host, Signer, State, StateError, WriteError, check_der, check_host_name, check_key_id, one};

/// What is to be taken in.
#[derive(Clone, Debug, Default)]
pub struct Import {
    /// Hosts, found by name and key.
    pub hosts: Vec<Host>,
    /// Key-protection certificates, found by kind and thumbprint.
    pub certificates: Vec<Certificate>,
    /// Attestation signers: their health certificates are trusted here, too.
    pub signers: Vec<Signer>,
    /// Whether the one of those that issues there is to issue here. Its key has to be here.
    pub adopt_signer: bool,
}

impl State {
    /// Takes in another state's content, all of it or nothing, and returns a sentence for each change. Without `apply` it
    /// only says what would change.
    ///
    /// # Errors
    /// [`StateError::Conflict`] where the two contradict each other; [`StateError::Invalid`].
    pub fn import(&mut self, import: &Import, now: i64, apply: bool) -> Result<Vec<String>, StateError> {
        let merged = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(WriteError::from)
            .and_then(|transaction| {
                let mut changes = Vec::new();
                for host in &import.hosts {
                    merge_host(&transaction, host, now, &mut changes)?;
                }
                merge_certificates(&transaction, &import.certificates, now, &mut changes)?;
                merge_signers(&transaction, import, now, &mut changes)?;
                // Dropped, it undoes what was only tried.
                if apply && !changes.is_empty() {
                    transaction.commit()?;
                }
                Ok(changes)
            });
        self.wrote |= apply && !matches!(merged, Err(WriteError::State(_)));
        merged.map_err(|error| match error {
            WriteError::State(error) => error,
            WriteError::Sqlite(error) => self.database(error),
        })
    }
}

fn conflict(text: String) -> WriteError {
    StateError::Conflict(text).into()
}

fn merge_host(
    transaction: &Transaction<'_>,
    new: &Host,
    now: i64,
    changes: &mut Vec<String>,
) -> Result<(), WriteError> {
    check_host_name(&new.name)?;
    check_der("a host's public key", &new.spki)?;
    new.labels.check()?;
    let name = &new.name;
    let sql = format!("SELECT {} FROM hosts WHERE name = ?1", hosts::COLUMNS);
    let Some(old) = transaction.query_row(&sql, [name], host).optional()? else {
        if let Some(other) = one::<String>(transaction, "SELECT name FROM hosts WHERE spki = ?1", [&new.spki])? {
            return Err(conflict(format!("the key of host {name:?} is registered here as host {other:?}")));
        }
        transaction.execute(
            "INSERT INTO hosts (name, spki, spki_sha256, enabled, added, labels) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![name, new.spki, new.spki_sha256, new.enabled, now, new.labels.to_string()],
        )?;
        let disabled = if new.enabled { "" } else { ", disabled" };
        let labels = if new.labels.is_empty() { String::new() } else { format!(", labels {}", new.labels) };
        changes.push(format!("host {name} is added{disabled}{labels}"));
        return Ok(());
    };
    if old.spki != new.spki {
        return Err(conflict(format!("host {name:?} is registered here with another key; remove it first")));
    }
    if old.enabled != new.enabled {
        changes.push(format!("host {name} is {}", if new.enabled { "enabled" } else { "disabled" }));
    }
    if old.labels != new.labels {
        changes.push(format!(
            "host {name} has labels {:?} instead of {:?}",
            new.labels.to_string(),
            old.labels.to_string()
        ));
    }
    transaction.execute(
        "UPDATE hosts SET enabled = ?2, labels = ?3 WHERE name = ?1",
        params![name, new.enabled, new.labels.to_string()],
    )?;
    Ok(())
}

fn merge_certificates(
    transaction: &Transaction<'_>,
    all: &[Certificate],
    now: i64,
    changes: &mut Vec<String>,
) -> Result<(), WriteError> {
    for new in all {
        check_der("a certificate", &new.der)?;
        check_der("a certificate's public key", &new.spki)?;
        check_key_id(&new.key_id)?;
        new.labels.check()?;
        let (kind, thumbprint) = (new.kind.as_str(), &new.thumbprint);
        let sql = format!("SELECT {} FROM certificates WHERE kind = ?1 AND thumbprint = ?2", certificates::COLUMNS);
        let old = transaction.query_row(&sql, [kind, thumbprint], certificate).optional()?;
        match &old {
            Some(old) if old.key_id != new.key_id => {
                return Err(conflict(format!("the {kind} certificate {thumbprint} has another key of the HSMs here")));
            }
            Some(_) => {}
            None => {
                transaction.execute(
                    "INSERT INTO certificates (thumbprint, kind, der, key_id, spki, added) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                    params![thumbprint, kind, new.der, new.key_id, new.spki, now],
                )?;
                changes.push(format!("the {kind} certificate {thumbprint} is added"));
            }
        }
        let limit = one::<String>(
            transaction,
            "SELECT labels FROM certificates WHERE spki = ?1 ORDER BY labels DESC",
            [&new.spki],
        )?;
        if limit.as_deref() != Some(&new.labels.to_string()) {
            let to = if new.labels.is_empty() { "every host".to_owned() } else { format!("hosts with {}", new.labels) };
            changes.push(format!("what the key of {thumbprint} opens is released to {to}"));
        }
        transaction.execute(
            "UPDATE certificates SET labels = ?2 WHERE spki = ?1",
            params![new.spki, new.labels.to_string()],
        )?;
        if new.enabled && old.is_some_and(|old| !old.enabled) {
            changes.push(format!("the {kind} certificate {thumbprint} is enabled"));
            transaction.execute(
                "UPDATE certificates SET enabled = 1 WHERE kind = ?1 AND thumbprint = ?2",
                [kind, thumbprint],
            )?;
        }
    }
    for (column, role) in [("is_primary", "primary"), ("is_communications", "communications")] {
        for new in all.iter().filter(|c| if role == "primary" { c.is_primary } else { c.is_communications }) {
            let (kind, thumbprint) = (new.kind.as_str(), &new.thumbprint);
            let sql = format!("SELECT {column} FROM certificates WHERE kind = ?1 AND thumbprint = ?2");
            if one::<bool>(transaction, &sql, [kind, thumbprint])? == Some(true) {
                continue;
            }
            transaction.execute(&format!("UPDATE certificates SET {column} = 0 WHERE kind = ?1"), [kind])?;
            transaction.execute(
                &format!("UPDATE certificates SET {column} = 1 WHERE kind = ?1 AND thumbprint = ?2"),
                [kind, thumbprint],
            )?;
            changes.push(format!("the {kind} certificate {thumbprint} becomes the {role} one"));
        }
    }
    for new in all.iter().filter(|new| !new.enabled) {
        let (kind, thumbprint) = (new.kind.as_str(), &new.thumbprint);
        let sql =
            "SELECT enabled, is_primary OR is_communications FROM certificates WHERE kind = ?1 AND thumbprint = ?2";
        let (enabled, needed) = transaction
            .query_row(sql, [kind, thumbprint], |row| Ok((row.get::<_, bool>(0)?, row.get::<_, bool>(1)?)))?;
        if needed {
            return Err(conflict(format!(
                "the {kind} certificate {thumbprint} is disabled there, but is primary or signs the metadata here"
            )));
        }
        if enabled {
            transaction.execute(
                "UPDATE certificates SET enabled = 0 WHERE kind = ?1 AND thumbprint = ?2",
                [kind, thumbprint],
            )?;
            changes.push(format!("the {kind} certificate {thumbprint} is disabled"));
        }
    }
    Ok(())
}

fn merge_signers(
    transaction: &Transaction<'_>,
    import: &Import,
    now: i64,
    changes: &mut Vec<String>,
) -> Result<(), WriteError> {
    for new in &import.signers {
        check_der("an attestation signer's certificate", &new.der)?;
        check_key_id(&new.key_id)?;
        let thumbprint = &new.thumbprint;
        let here =
            one::<bool>(transaction, "SELECT current FROM attestation_signers WHERE thumbprint = ?1", [thumbprint])?;
        if here.is_none() {
            transaction.execute(
                "INSERT INTO attestation_signers (thumbprint, der, key_id, not_before, not_after, current, replaced)
                 VALUES (?1, ?2, ?3, ?4, ?5, 0, ?6)",
                params![thumbprint, new.der, new.key_id, new.not_before, new.not_after, new.replaced.unwrap_or(now)],
            )?;
            changes.push(format!("health certificates of the attestation signer {thumbprint} are trusted"));
        }
        if new.current && import.adopt_signer && here != Some(true) {
            transaction.execute("UPDATE attestation_signers SET current = 0, replaced = ?1 WHERE current", [now])?;
            transaction.execute(
                "UPDATE attestation_signers SET current = 1, replaced = NULL WHERE thumbprint = ?1",
                [thumbprint],
            )?;
            changes.push(format!("the attestation signer {thumbprint} issues health certificates"));
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::state::tests::{message, open};
    use crate::state::{Kind, Labels, NewCertificate, NewSigner};

    fn exported(state: &State) -> Import {
        Import {
            hosts: state.hosts().unwrap(),
            certificates: state.certificates().unwrap(),
            signers: state.signers().unwrap(),
            adopt_signer: true,
        }
    }

    #[test]
    fn what_was_exported_is_taken_in_once() {
        let (_one, mut there) = open();
        let (_two, mut here) = open();
        let acme: Labels = "tenant=acme".parse().unwrap();
        there.add_host("a", b"a", &acme, 1).unwrap();
        there.add_host("b", b"b", &Labels::default(), 1).unwrap();
        there.enable_host("b", false).unwrap();
        let new = |kind, der, primary| NewCertificate { kind, der, key_id: b"id", spki: der, primary };
        let one = there.add_certificate(&new(Kind::Signing, b"one", false), 1).unwrap();
        there.add_certificate(&new(Kind::Signing, b"two", true), 1).unwrap();
        let three = there.add_certificate(&new(Kind::Encryption, b"three", true), 1).unwrap();
        let four = there.add_certificate(&new(Kind::Encryption, b"four", false), 1).unwrap();
        there.set_communications(Some(&one.thumbprint)).unwrap();
        there.limit_certificate(Kind::Encryption, &three.thumbprint, &acme).unwrap();
        there.enable_certificate(Kind::Encryption, &four.thumbprint, false).unwrap();
        let signer = |der| NewSigner { der, key_id: b"id", not_before: 1, not_after: 9 };
        there.add_signer(&signer(b"s"), None, 1).unwrap();
        here.add_signer(&signer(b"t"), None, 2).unwrap();
        here.add_host("c", b"c", &Labels::default(), 2).unwrap();
        here.add_certificate(&new(Kind::Signing, b"five", true), 2).unwrap();

        let import = exported(&there);
        let planned = here.import(&import, 3, false).unwrap();
        assert_eq!((here.hosts().unwrap().len(), here.certificates().unwrap().len()), (1, 1), "only said");
        assert_eq!(here.import(&import, 3, true).unwrap(), planned);
        assert_eq!(planned.len(), 13, "{planned:#?}");
        assert_eq!(here.import(&import, 4, true).unwrap(), Vec::<String>::new());
        let mut hosts = here.hosts().unwrap();
        assert_eq!(hosts.pop().unwrap().name, "c");
        let plain = |hosts: Vec<Host>| hosts.into_iter().map(|h| (h.name, h.enabled, h.labels)).collect::<Vec<_>>();
        assert_eq!(plain(hosts), plain(there.hosts().unwrap()));
        let plain = |state: &State| {
            let all = state.certificates().unwrap().into_iter().filter(|c| c.der != b"five");
            let mut all: Vec<_> =
                all.map(|c| (c.kind, c.thumbprint, c.is_primary, c.enabled, c.is_communications, c.labels)).collect();
            all.sort();
            all
        };
        assert_eq!(plain(&here), plain(&there));
        let signers = here.signers().unwrap();
        assert_eq!((signers[0].der.as_slice(), signers[1].replaced), (&b"s"[..], Some(3)));

        // Without its key here, a signer is only trusted.
        let current = signers[0].thumbprint.clone();
        here.add_signer(&signer(b"u"), Some(&current), 5).unwrap();
        assert!(here.import(&Import { adopt_signer: false, ..import.clone() }, 6, true).unwrap().is_empty());
        assert_eq!(here.signers().unwrap()[0].der, b"u");

        // What contradicts is refused as a whole.
        there.add_host("d", b"d", &Labels::default(), 1).unwrap();
        there.add_host("C", b"other", &Labels::default(), 1).unwrap();
        assert!(message(here.import(&exported(&there), 7, true)).contains("with another key"));
        assert!(here.host_by_name("d").unwrap().is_none());
    }
}
