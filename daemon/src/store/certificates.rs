//! Key-protection certificates.

use rusqlite::{OptionalExtension, Row, Transaction, params};
use serde::{Deserialize, Serialize};

use super::{Labels, State, StateError, WriteError, check_der, check_key_id, one, read_labels, sha256_hex};

/// The columns of [`certificate`].
pub(super) const COLUMNS: &str = "thumbprint, kind, der, key_id, spki, is_primary, enabled, added, is_communications,
     coalesce((SELECT labels FROM limits WHERE limits.spki = certificates.spki), '')";

/// What a key-protection certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It signs protectors.
    Signing,
    /// Transport keys are encrypted to it.
    Encryption,
}

impl Kind {
    /// `signing` or `encryption`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Signing => "signing",
            Self::Encryption => "encryption",
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Kind {
    type Err = StateError;

    fn from_str(text: &str) -> Result<Self, StateError> {
        match text {
            "signing" => Ok(Self::Signing),
            "encryption" => Ok(Self::Encryption),
            _ => Err(StateError::Invalid(format!(
                "{text:?} is no kind of certificate; use \"signing\" or \"encryption\""
            ))),
        }
    }
}

/// A key-protection certificate whose private key is in the HSMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// SHA-256 of [`Certificate::der`], 64 lower-case hexadecimal digits; names the certificate in commands.
    pub thumbprint: String,
    /// What it is for.
    pub kind: Kind,
    /// The certificate, DER.
    pub der: Vec<u8>,
    /// CKA_ID of its private key on every member.
    pub key_id: Vec<u8>,
    /// Its public key, DER SubjectPublicKeyInfo.
    pub spki: Vec<u8>,
    /// Whether new protectors use it; at most one of a kind is primary, and it is enabled.
    pub is_primary: bool,
    /// Whether protectors that name it are still served.
    pub enabled: bool,
    /// When it was added, seconds since 1970.
    pub added: i64,
    /// Whether it signs the metadata document, in place of the primary signing certificate; at most one does.
    pub is_communications: bool,
    /// A host needs all of these to be given what its key opens. The same for all certificates of a key.
    pub labels: Labels,
}

/// A key-protection certificate that is to be added, enabled.
#[derive(Clone, Copy, Debug)]
pub struct NewCertificate<'a> {
    /// What it is for.
    pub kind: Kind,
    /// The certificate, DER.
    pub der: &'a [u8],
    /// CKA_ID of its private key on every member.
    pub key_id: &'a [u8],
    /// Its public key, DER SubjectPublicKeyInfo.
    pub spki: &'a [u8],
    /// Whether it becomes the primary one of its kind, in place of the one that is.
    pub primary: bool,
}

impl State {
    /// All key-protection certificates: by kind, the primary one first, then the newest first.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn certificates(&self) -> Result<Vec<Certificate>, StateError> {
        let order = "ORDER BY kind, is_primary DESC, added DESC, rowid DESC";
        self.read(&format!("SELECT {COLUMNS} FROM certificates {order}"), [], certificate)
    }

    /// Adds a key-protection certificate, enabled. What its key is limited to holds for it, too: a certificate that was
    /// renewed must not open to everybody what the one before did not.
    ///
    /// # Errors
    /// [`StateError::Invalid`] for an empty field, [`StateError::Conflict`] when it is there for this kind already.
    pub fn add_certificate(&mut self, new: &NewCertificate<'_>, now: i64) -> Result<Certificate, StateError> {
        check_der("a certificate", new.der)?;
        check_der("a certificate's public key", new.spki)?;
        check_key_id(new.key_id)?;
        let mut added = Certificate {
            thumbprint: sha256_hex(new.der),
            kind: new.kind,
            der: new.der.to_owned(),
            key_id: new.key_id.to_owned(),
            spki: new.spki.to_owned(),
            is_primary: new.primary,
            enabled: true,
            added: now,
            is_communications: false,
            labels: Labels::default(),
        };
        let kind = new.kind.as_str();
        self.write(|transaction| {
            let sql = "SELECT 1 FROM certificates WHERE kind = ?1 AND thumbprint = ?2";
            if one::<i64>(transaction, sql, [kind, &added.thumbprint])?.is_some() {
                return Err(StateError::Conflict(format!(
                    "the {kind} certificate {} is there already",
                    added.thumbprint
                ))
                .into());
            }
            added.labels = limit_of(transaction, &added.spki)?;
            if new.primary {
                transaction.execute("UPDATE certificates SET is_primary = 0 WHERE kind = ?1", [kind])?;
            }
            transaction.execute(
                "INSERT INTO certificates (thumbprint, kind, der, key_id, spki, is_primary, enabled, added)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, 1, ?7)",
                params![added.thumbprint, kind, added.der, added.key_id, added.spki, added.is_primary, added.added],
            )?;
            Ok(())
        })?;
        Ok(added)
    }

    /// Makes a certificate the primary one of its kind; the one that was stays enabled.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Conflict`] when it is disabled.
    pub fn set_primary(&mut self, kind: Kind, thumbprint: &str) -> Result<(), StateError> {
        self.write(|transaction| {
            if !standing(transaction, kind, thumbprint)?.enabled {
                return Err(StateError::Conflict(format!(
                    "the {kind} certificate {thumbprint} is disabled; enable it before it becomes primary"
                ))
                .into());
            }
            // Two steps, because the index that keeps primaries single is checked row by row.
            transaction.execute("UPDATE certificates SET is_primary = 0 WHERE kind = ?1", [kind.as_str()])?;
            transaction.execute(
                "UPDATE certificates SET is_primary = 1 WHERE kind = ?1 AND thumbprint = ?2",
                [kind.as_str(), thumbprint],
            )?;
            Ok(())
        })
    }

    /// Makes an enabled signing certificate the one that signs the metadata document; `None`: the primary one does again.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Conflict`] when it is disabled.
    pub fn set_communications(&mut self, thumbprint: Option<&str>) -> Result<(), StateError> {
        self.write(|transaction| {
            transaction.execute("UPDATE certificates SET is_communications = 0 WHERE is_communications", [])?;
            let Some(thumbprint) = thumbprint else { return Ok(()) };
            if !standing(transaction, Kind::Signing, thumbprint)?.enabled {
                return Err(StateError::Conflict(format!(
                    "the signing certificate {thumbprint} is disabled; enable it before it signs the metadata"
                ))
                .into());
            }
            let sql = "UPDATE certificates SET is_communications = 1 WHERE kind = 'signing' AND thumbprint = ?1";
            transaction.execute(sql, [thumbprint])?;
            Ok(())
        })
    }

    /// Limits the key of a certificate to hosts that have all of `labels`; none: every host. Holds for all certificates of
    /// that key, which are returned.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Invalid`] for too many labels.
    pub fn limit_certificate(
        &mut self,
        kind: Kind,
        thumbprint: &str,
        labels: &Labels,
    ) -> Result<Vec<Certificate>, StateError> {
        labels.check()?;
        self.write(|transaction| {
            standing(transaction, kind, thumbprint)?;
            let sql = "SELECT spki FROM certificates WHERE kind = ?1 AND thumbprint = ?2";
            let spki: Vec<u8> = transaction.query_row(sql, [kind.as_str(), thumbprint], |row| row.get(0))?;
            set_limit(transaction, &spki, labels)?;
            let mut statement = transaction.prepare(&format!("SELECT {COLUMNS} FROM certificates WHERE spki = ?1"))?;
            let changed = statement.query_map([&spki], certificate)?;
            Ok(changed.collect::<Result<Vec<_>, _>>()?)
        })
    }

    /// Enables or disables a certificate. The primary one cannot be disabled, nor the one that signs the metadata document.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Conflict`] for one of those.
    pub fn enable_certificate(&mut self, kind: Kind, thumbprint: &str, enabled: bool) -> Result<(), StateError> {
        self.write(|transaction| {
            let standing = standing(transaction, kind, thumbprint)?;
            if !enabled {
                standing.must_be_spare(kind, thumbprint)?;
            }
            transaction.execute(
                "UPDATE certificates SET enabled = ?3 WHERE kind = ?1 AND thumbprint = ?2",
                params![kind.as_str(), thumbprint, enabled],
            )?;
            Ok(())
        })
    }

    /// Removes a certificate. Its key stays in the HSMs, and what that is limited to is remembered. The primary one cannot
    /// be removed, nor the one that signs the metadata document.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Conflict`] for one of those.
    pub fn remove_certificate(&mut self, kind: Kind, thumbprint: &str) -> Result<(), StateError> {
        self.write(|transaction| {
            standing(transaction, kind, thumbprint)?.must_be_spare(kind, thumbprint)?;
            transaction
                .execute("DELETE FROM certificates WHERE kind = ?1 AND thumbprint = ?2", [kind.as_str(), thumbprint])?;
            Ok(())
        })
    }
}

pub(super) fn certificate(row: &Row<'_>) -> rusqlite::Result<Certificate> {
    let kind: String = row.get(1)?;
    Ok(Certificate {
        thumbprint: row.get(0)?,
        kind: kind.parse().map_err(|error: StateError| {
            rusqlite::Error::FromSqlConversionFailure(1, rusqlite::types::Type::Text, Box::new(error))
        })?,
        der: row.get(2)?,
        key_id: row.get(3)?,
        spki: row.get(4)?,
        is_primary: row.get(5)?,
        enabled: row.get(6)?,
        added: row.get(7)?,
        is_communications: row.get(8)?,
        labels: read_labels(row, 9)?,
    })
}

/// What a certificate is to the service.
struct Standing {
    primary: bool,
    communications: bool,
    enabled: bool,
}

impl Standing {
    /// Refuses what the service cannot do without.
    fn must_be_spare(&self, kind: Kind, thumbprint: &str) -> Result<(), StateError> {
        if self.primary {
            return Err(StateError::Conflict(format!(
                "{thumbprint} is the primary {kind} certificate; make another one primary first"
            )));
        }
        if self.communications {
            return Err(StateError::Conflict(format!(
                "{thumbprint} is the communications certificate, which signs the metadata; choose another one first"
            )));
        }
        Ok(())
    }
}

fn standing(transaction: &Transaction<'_>, kind: Kind, thumbprint: &str) -> Result<Standing, WriteError> {
    let sql = "SELECT is_primary, is_communications, enabled FROM certificates WHERE kind = ?1 AND thumbprint = ?2";
    let read = |row: &Row<'_>| Ok(Standing { primary: row.get(0)?, communications: row.get(1)?, enabled: row.get(2)? });
    let found = transaction.query_row(sql, [kind.as_str(), thumbprint], read).optional()?;
    found.ok_or_else(|| StateError::NotFound(format!("there is no {kind} certificate {thumbprint}")).into())
}

/// What a key is limited to, whether it has certificates or not.
pub(super) fn limit_of(transaction: &Transaction<'_>, spki: &[u8]) -> Result<Labels, WriteError> {
    let labels = one::<String>(transaction, "SELECT labels FROM limits WHERE spki = ?1", [spki])?;
    Ok(labels.unwrap_or_default().parse()?)
}

pub(super) fn set_limit(transaction: &Transaction<'_>, spki: &[u8], labels: &Labels) -> rusqlite::Result<()> {
    transaction.execute("DELETE FROM limits WHERE spki = ?1", [spki])?;
    if !labels.is_empty() {
        transaction.execute("INSERT INTO limits (spki, labels) VALUES (?1, ?2)", params![spki, labels.to_string()])?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::tests::{message, open};

    #[test]
    fn a_kind_has_at_most_one_primary_certificate() {
        let (_folder, mut state) = open();
        let new = |kind, der, primary| NewCertificate { kind, der, key_id: b"id", spki: b"spki", primary };
        let one = state.add_certificate(&new(Kind::Signing, b"one", true), 1).unwrap();
        let two = state.add_certificate(&new(Kind::Signing, b"two", true), 2).unwrap();
        let three = state.add_certificate(&new(Kind::Encryption, b"one", true), 3).unwrap();
        assert!(message(state.add_certificate(&new(Kind::Signing, b"two", false), 4)).contains("is there already"));
        let primaries = |state: &State| {
            let certificates = state.certificates().unwrap();
            certificates.into_iter().filter(|c| c.is_primary).map(|c| (c.kind, c.thumbprint)).collect::<Vec<_>>()
        };
        assert_eq!(
            primaries(&state),
            [(Kind::Encryption, three.thumbprint.clone()), (Kind::Signing, two.thumbprint.clone())]
        );
        assert!(message(state.enable_certificate(Kind::Signing, &two.thumbprint, false)).contains("is the primary"));
        assert!(message(state.remove_certificate(Kind::Signing, &two.thumbprint)).contains("is the primary"));
        state.enable_certificate(Kind::Signing, &one.thumbprint, false).unwrap();
        assert!(message(state.set_primary(Kind::Signing, &one.thumbprint)).contains("is disabled"));
        assert_eq!(primaries(&state).len(), 2, "a refusal changes nothing");
        state.enable_certificate(Kind::Signing, &one.thumbprint, true).unwrap();
        state.set_primary(Kind::Signing, &one.thumbprint).unwrap();
        assert_eq!(primaries(&state)[1], (Kind::Signing, one.thumbprint.clone()));
        state.remove_certificate(Kind::Signing, &two.thumbprint).unwrap();
        assert!(message(state.set_primary(Kind::Signing, &two.thumbprint)).contains("there is no signing certificate"));
        let expected = [three, Certificate { is_primary: true, ..one }];
        assert_eq!(state.certificates().unwrap(), expected);
    }

    #[test]
    fn a_limit_belongs_to_the_key() {
        let (_folder, mut state) = open();
        let new = |kind, der, spki| NewCertificate { kind, der, key_id: b"id", spki, primary: false };
        let one = state.add_certificate(&new(Kind::Encryption, b"one", b"key"), 1).unwrap();
        state.add_certificate(&new(Kind::Encryption, b"other", b"other key"), 1).unwrap();
        let acme: Labels = "tenant=acme".parse().unwrap();
        assert_eq!(state.limit_certificate(Kind::Encryption, &one.thumbprint, &acme).unwrap().len(), 1);
        let renewed = state.add_certificate(&new(Kind::Encryption, b"renewed", b"key"), 2).unwrap();
        assert_eq!(renewed.labels, acme, "a renewed certificate is limited like the one before");
        let limited = |state: &State| {
            let certificates = state.certificates().unwrap();
            certificates.into_iter().filter(|c| !c.labels.is_empty()).map(|c| c.der).collect::<Vec<_>>()
        };
        assert_eq!(limited(&state), [b"renewed".to_vec(), b"one".to_vec()]);
        let none = state.limit_certificate(Kind::Encryption, &renewed.thumbprint, &Labels::default()).unwrap();
        assert_eq!((none.len(), limited(&state).len()), (2, 0));
        // It outlives the last certificate of its key.
        state.limit_certificate(Kind::Encryption, &one.thumbprint, &acme).unwrap();
        for gone in [&one, &renewed] {
            state.remove_certificate(Kind::Encryption, &gone.thumbprint).unwrap();
        }
        assert_eq!(state.add_certificate(&new(Kind::Encryption, b"again", b"key"), 3).unwrap().labels, acme);
        assert!(
            message(state.limit_certificate(Kind::Signing, &one.thumbprint, &acme)).contains("there is no signing")
        );
    }

    #[test]
    fn the_communications_certificate_is_an_enabled_signing_one() {
        let (_folder, mut state) = open();
        let new = |kind, der| NewCertificate { kind, der, key_id: b"id", spki: b"spki", primary: false };
        let [one, two] =
            [b"one", b"two"].map(|der| state.add_certificate(&new(Kind::Signing, der), 1).unwrap().thumbprint);
        let encryption = state.add_certificate(&new(Kind::Encryption, b"three"), 1).unwrap().thumbprint;
        let chosen = |state: &State| {
            state.certificates().unwrap().into_iter().find(|c| c.is_communications).map(|c| c.thumbprint)
        };
        assert_eq!(chosen(&state), None);
        for thumbprint in [&one, &two] {
            state.set_communications(Some(thumbprint)).unwrap();
            assert_eq!(chosen(&state).as_ref(), Some(thumbprint));
        }
        assert!(message(state.set_communications(Some(&encryption))).contains("no signing certificate"));
        assert!(message(state.enable_certificate(Kind::Signing, &two, false)).contains("communications certificate"));
        assert!(message(state.remove_certificate(Kind::Signing, &two)).contains("communications certificate"));
        state.enable_certificate(Kind::Signing, &one, false).unwrap();
        assert!(message(state.set_communications(Some(&one))).contains("is disabled"));
        assert_eq!(chosen(&state).as_ref(), Some(&two), "a refusal changes nothing");
        state.set_communications(None).unwrap();
        assert_eq!(chosen(&state), None);
        state.remove_certificate(Kind::Signing, &two).unwrap();
    }
}
