//! Attestation signers.

use claviger_protocol::certificate::Certificate;
use rusqlite::{Row, Transaction, params};

use super::{State, StateError, check_der, check_key_id, one, sha256_hex};

/// A certificate that issues health certificates, or did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signer {
    /// SHA-256 of [`Signer::der`], 64 lower-case hexadecimal digits.
    pub thumbprint: String,
    /// The certificate, DER.
    pub der: Vec<u8>,
    /// CKA_ID of its private key on every member.
    pub key_id: Vec<u8>,
    /// Start of its validity, seconds since 1970.
    pub not_before: i64,
    /// End of its validity, seconds since 1970.
    pub not_after: i64,
    /// Whether it issues now; exactly one does once there is any.
    pub current: bool,
    /// When another one took its place, seconds since 1970; `None` for the current one.
    pub replaced: Option<i64>,
}

/// A certificate whose health certificates are refused, though they are in date.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevokedSigner {
    /// SHA-256 of its DER, 64 lower-case hexadecimal digits.
    pub thumbprint: String,
    /// End of its validity, seconds since 1970.
    pub not_after: i64,
    /// When it was revoked, seconds since 1970.
    pub revoked: i64,
}

/// A certificate that is to issue health certificates from now on.
#[derive(Clone, Copy, Debug)]
pub struct NewSigner<'a> {
    /// The certificate, DER.
    pub der: &'a [u8],
    /// CKA_ID of its private key on every member.
    pub key_id: &'a [u8],
    /// Start of its validity, seconds since 1970.
    pub not_before: i64,
    /// End of its validity, seconds since 1970.
    pub not_after: i64,
}

const ALL: &str = "SELECT thumbprint, der, key_id, not_before, not_after, current, replaced FROM attestation_signers";

impl State {
    /// All attestation signers, the current one first, then the latest replaced first.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn signers(&self) -> Result<Vec<Signer>, StateError> {
        self.read(&format!("{ALL} ORDER BY current DESC, replaced DESC, rowid DESC"), [], signer)
    }

    /// Adds an attestation signer, which becomes the current one in place of the one that `replaces` names, as of `now`.
    ///
    /// # Errors
    /// [`StateError::Invalid`] for an empty field or validity, [`StateError::Revoked`] when it or another one of its key was
    /// revoked, [`StateError::Conflict`] when it is there already, or the
    /// current one is another one: somebody else has made a new one meanwhile, and that one is to be used.
    pub fn add_signer(&mut self, new: &NewSigner<'_>, replaces: Option<&str>, now: i64) -> Result<Signer, StateError> {
        check_der("an attestation signer's certificate", new.der)?;
        check_key_id(new.key_id)?;
        if new.not_before >= new.not_after {
            return Err(StateError::Invalid("an attestation signer's validity ends before it starts".to_owned()));
        }
        let added = Signer {
            thumbprint: sha256_hex(new.der),
            der: new.der.to_owned(),
            key_id: new.key_id.to_owned(),
            not_before: new.not_before,
            not_after: new.not_after,
            current: true,
            replaced: None,
        };
        self.write(|transaction| {
            if is_revoked(transaction, &added.der)? {
                return Err(StateError::Revoked(format!(
                    "the attestation signer {}, or another one of its key, is revoked",
                    added.thumbprint
                ))
                .into());
            }
            let sql = "SELECT 1 FROM attestation_signers WHERE thumbprint = ?1";
            if one::<i64>(transaction, sql, [&added.thumbprint])?.is_some() {
                return Err(StateError::Conflict(format!(
                    "the attestation signer {} is there already",
                    added.thumbprint
                ))
                .into());
            }
            let sql = "SELECT thumbprint FROM attestation_signers WHERE current";
            if one::<String>(transaction, sql, [])?.as_deref() != replaces {
                return Err(StateError::Conflict("the attestation signer was replaced meanwhile".to_owned()).into());
            }
            transaction.execute("UPDATE attestation_signers SET current = 0, replaced = ?1 WHERE current", [now])?;
            transaction.execute(
                "INSERT INTO attestation_signers (thumbprint, der, key_id, not_before, not_after, current, replaced)
                 VALUES (?1, ?2, ?3, ?4, ?5, 1, NULL)",
                params![added.thumbprint, added.der, added.key_id, added.not_before, added.not_after],
            )?;
            Ok(())
        })?;
        Ok(added)
    }

    /// The signers that were revoked, the latest first.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn revoked_signers(&self) -> Result<Vec<RevokedSigner>, StateError> {
        let sql = "SELECT thumbprint, not_after, revoked FROM revoked_signers ORDER BY revoked DESC, rowid DESC";
        self.read(sql, [], |row| {
            Ok(RevokedSigner { thumbprint: row.get(0)?, not_after: row.get(1)?, revoked: row.get(2)? })
        })
    }

    /// All signers that have the key of the one with this thumbprint, itself included: a key may be certified several times.
    ///
    /// # Errors
    /// [`StateError::NotFound`], [`StateError::Database`].
    pub fn signers_of_key(&self, thumbprint: &str) -> Result<Vec<Signer>, StateError> {
        of_key(self.signers()?, thumbprint)
    }

    /// Trusts a signer no longer, and none that has its key; returns their thumbprints. With `force` also the current one,
    /// and then there is none.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Conflict`] for the current one without `force`.
    pub fn revoke_signer(&mut self, thumbprint: &str, force: bool, now: i64) -> Result<Vec<String>, StateError> {
        self.write(|transaction| {
            let all = {
                let mut statement = transaction.prepare_cached(&format!("{ALL} ORDER BY current DESC"))?;
                statement.query_map([], signer)?.collect::<rusqlite::Result<Vec<_>>>()?
            };
            let revoked = of_key(all, thumbprint)?;
            if !force && revoked.iter().any(|signer| signer.current) {
                return Err(StateError::Conflict(
                    "the attestation signer issues health certificates; another one has to take over first".to_owned(),
                )
                .into());
            }
            for signer in &revoked {
                transaction.execute(
                    "INSERT INTO revoked_signers (thumbprint, spki_sha256, not_after, revoked) VALUES (?1, ?2, ?3, ?4)",
                    params![signer.thumbprint, key_hash(&signer.der), signer.not_after, now],
                )?;
                transaction.execute("DELETE FROM attestation_signers WHERE thumbprint = ?1", [&signer.thumbprint])?;
            }
            Ok(revoked.into_iter().map(|signer| signer.thumbprint).collect())
        })
    }

    /// Forgets the signers that were replaced before `time`, and returns how many those were.
    ///
    /// Health certificates of a replaced signer are good until they expire: `time` is to be at least their longest
    /// validity ago, unless they are to be refused at once.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn forget_signers_before(&mut self, time: i64) -> Result<usize, StateError> {
        self.write(|transaction| {
            Ok(transaction.execute("DELETE FROM attestation_signers WHERE NOT current AND replaced < ?1", [time])?)
        })
    }
}

/// Whether this certificate, or another one of its key, was revoked.
pub(super) fn is_revoked(transaction: &Transaction<'_>, der: &[u8]) -> rusqlite::Result<bool> {
    let sql = "SELECT 1 FROM revoked_signers WHERE thumbprint = ?1 OR spki_sha256 = ?2";
    Ok(one::<i64>(transaction, sql, [sha256_hex(der), key_hash(der)])?.is_some())
}

/// The signers that have the key of one of them: the same key of the HSMs, or the same public key.
fn of_key(mut all: Vec<Signer>, thumbprint: &str) -> Result<Vec<Signer>, StateError> {
    let Some(named) = all.iter().find(|signer| signer.thumbprint == thumbprint).cloned() else {
        return Err(StateError::NotFound(format!("there is no attestation signer {thumbprint}")));
    };
    let key = key_hash(&named.der);
    all.retain(|signer| signer.key_id == named.key_id || key_hash(&signer.der) == key);
    Ok(all)
}

/// The SHA-256 of the public key; of what is no certificate, that of all of it.
fn key_hash(der: &[u8]) -> String {
    Certificate::parse(der).map_or_else(|_| sha256_hex(der), |certificate| sha256_hex(certificate.key().spki_der()))
}

pub(super) fn signer(row: &Row<'_>) -> rusqlite::Result<Signer> {
    Ok(Signer {
        thumbprint: row.get(0)?,
        der: row.get(1)?,
        key_id: row.get(2)?,
        not_before: row.get(3)?,
        not_after: row.get(4)?,
        current: row.get(5)?,
        replaced: row.get(6)?,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::tests::{message, open};

    #[test]
    fn a_new_signer_replaces_the_current_one() {
        let (_folder, mut state) = open();
        let new = |der| NewSigner { der, key_id: b"id", not_before: 10, not_after: 20 };
        let one = state.add_signer(&new(b"one"), None, 11).unwrap();
        let two = state.add_signer(&new(b"two"), Some(&one.thumbprint), 12).unwrap();
        let three = state.add_signer(&new(b"three"), Some(&two.thumbprint), 13).unwrap();
        assert!(message(state.add_signer(&new(b"one"), Some(&three.thumbprint), 14)).contains("is there already"));
        let replaced = |signer: &Signer, at| Signer { current: false, replaced: Some(at), ..signer.clone() };
        assert_eq!(state.signers().unwrap(), [three.clone(), replaced(&two, 13), replaced(&one, 12)]);
        assert_eq!(state.forget_signers_before(13).unwrap(), 1);
        assert_eq!(state.signers().unwrap(), [three.clone(), replaced(&two, 13)]);
        assert_eq!(state.forget_signers_before(i64::MAX).unwrap(), 1, "the current one stays");
        assert_eq!(state.signers().unwrap(), [three]);
        assert!(message(state.add_signer(&NewSigner { not_after: 10, ..new(b"four") }, None, 15)).contains("validity"));
    }

    #[test]
    fn a_revoked_signer_is_gone_with_all_certificates_of_its_key_and_is_remembered() {
        let (_folder, mut state) = open();
        let mut current = None;
        let mut add = |state: &mut State, der: &[u8], key_id: &[u8]| {
            let new = NewSigner { der, key_id, not_before: 10, not_after: 20 };
            let added = state.add_signer(&new, current.as_deref(), 11).unwrap().thumbprint;
            current = Some(added.clone());
            added
        };
        let [one, two, three] = [(b"one", b"a"), (b"two", b"b"), (b"333", b"a")].map(|(d, k)| add(&mut state, d, k));
        assert!(message(state.revoke_signer(&one, false, 30)).contains("another one has to take over first"));
        assert_eq!(state.signers().unwrap().len(), 3);
        let four = add(&mut state, b"four", b"c");
        let mut revoked = state.revoke_signer(&one, false, 31).unwrap();
        revoked.sort();
        let mut expected = [one.clone(), three];
        expected.sort();
        assert_eq!(revoked, expected);
        let left: Vec<_> = state.signers().unwrap().into_iter().map(|signer| signer.thumbprint).collect();
        assert_eq!(left, [four.clone(), two]);
        assert!(message(state.revoke_signer(&one, false, 32)).contains("there is no attestation signer"));
        assert!(state.revoked_signers().unwrap().iter().all(|r| (r.revoked, r.not_after) == (31, 20)));
        // By force also the current one, and then there is none.
        assert_eq!(state.revoke_signer(&four, true, 33).unwrap(), std::slice::from_ref(&four));
        assert!(state.signers().unwrap().iter().all(|signer| !signer.current));
        assert_eq!(state.revoked_signers().unwrap()[0].thumbprint, four);
        // None of them comes back, nor does another certificate of the same key.
        let again = |state: &mut State, der: &[u8]| {
            state.add_signer(&NewSigner { der, key_id: b"d", not_before: 10, not_after: 20 }, None, 34)
        };
        assert!(matches!(again(&mut state, b"four"), Err(StateError::Revoked(_))));
        let [one, two] = [(); 2].map(|()| crate::service::testing::certificate());
        let added = again(&mut state, &one).unwrap().thumbprint;
        state.revoke_signer(&added, true, 35).unwrap();
        assert!(matches!(again(&mut state, &two), Err(StateError::Revoked(_))), "a certificate of a revoked key");
    }

    #[test]
    fn of_two_that_make_one_at_the_same_time_the_first_wins() {
        let (folder, mut ours) = open();
        let mut theirs = State::open(&folder.path().join("a/state")).unwrap();
        let new = |der| NewSigner { der, key_id: b"id", not_before: 10, not_after: 20 };
        for (round, (one, two)) in [(b"a", b"b"), (b"c", b"d")].into_iter().enumerate() {
            let seen = ours.signers().unwrap().first().map(|signer| signer.thumbprint.clone());
            let won = theirs.add_signer(&new(one), seen.as_deref(), 11).unwrap();
            assert!(message(ours.add_signer(&new(two), seen.as_deref(), 11)).contains("replaced meanwhile"));
            assert_eq!((ours.signers().unwrap()[0].clone(), ours.signers().unwrap().len()), (won, round + 1));
        }
    }
}
