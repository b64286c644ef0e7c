//! Attestation signers.

use std::cmp::Reverse;

use claviger_protocol::certificate::Certificate;

use super::contents::Contents;
use super::error::StateError;
use super::limits::{check_der, check_key_id};
use super::records::{NewSigner, RevokedSigner, Signer, sha256_hex};

impl Contents {
    /// All attestation signers: the current one, then the others, the last replaced first.
    ///
    /// # Errors
    /// [`StateError::Unreadable`].
    pub fn signers(&self) -> Result<Vec<Signer>, StateError> {
        let mut rows: Vec<_> = self.signers.rows()?.values().collect();
        rows.sort_by_key(|row| Reverse((row.value.current, row.value.replaced, row.order)));
        Ok(rows.into_iter().map(|row| Signer::clone(&row.value)).collect())
    }

    fn put_signer(&mut self, signer: Signer) -> Result<(), StateError> {
        self.signers.put(signer.thumbprint.clone(), signer)
    }

    /// Makes this signer the current one, as of `now`.
    pub(super) fn make_current(&mut self, signer: Signer, now: i64) -> Result<(), StateError> {
        let replaced: Vec<_> = self.signers.values()?.filter(|signer| signer.current).cloned().collect();
        for other in replaced {
            self.put_signer(Signer { current: false, replaced: Some(now), ..Signer::clone(&other) })?;
        }
        self.put_signer(Signer { current: true, replaced: None, ..signer })
    }

    /// Adds an attestation signer as the current one, in place of the signer that `replaces` names, as of `now`.
    ///
    /// # Errors
    /// [`StateError::Invalid`] for an empty field or validity; [`StateError::Revoked`] if it, or another certificate of
    /// its key, was revoked; [`StateError::Conflict`] if it already exists or `replaces` is not the current one
    /// (another daemon has just created a signer, which should be used).
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
        let thumbprint = &added.thumbprint;
        if self.is_revoked(&added.der)? {
            return Err(StateError::Revoked(format!(
                "the attestation signer {thumbprint}, or another one of its key, is revoked"
            )));
        }
        if self.signers.get(thumbprint)?.is_some() {
            return Err(StateError::Conflict(format!("the attestation signer {thumbprint} is there already")));
        }
        let current = self.signers.values()?.find(|signer| signer.current);
        if current.map(|signer| &*signer.thumbprint) != replaces {
            return Err(StateError::Conflict("the attestation signer was replaced meanwhile".to_owned()));
        }
        self.make_current(added.clone(), now)?;
        Ok(added)
    }

    /// Adds a signer that is only trusted, as if it had been replaced at that time.
    pub(super) fn trust_signer(&mut self, signer: &Signer, replaced: i64) -> Result<(), StateError> {
        self.put_signer(Signer { current: false, replaced: Some(replaced), ..signer.clone() })
    }

    /// The revoked signers, the latest first.
    ///
    /// # Errors
    /// [`StateError::Unreadable`].
    pub fn revoked_signers(&self) -> Result<Vec<RevokedSigner>, StateError> {
        let mut rows: Vec<_> = self.revoked.rows()?.values().collect();
        rows.sort_by_key(|row| Reverse((row.value.revoked, row.order)));
        Ok(rows.into_iter().map(|row| RevokedSigner::clone(&row.value)).collect())
    }

    /// All signers with the same key as the one with this thumbprint, including itself: a key may have several
    /// certificates.
    ///
    /// # Errors
    /// [`StateError::NotFound`], [`StateError::Unreadable`].
    pub fn signers_of_key(&self, thumbprint: &str) -> Result<Vec<Signer>, StateError> {
        of_key(self.signers()?, thumbprint)
    }

    /// Revokes a signer and all others with its key; returns their thumbprints. With `force` it may be the current one;
    /// then there is no current signer.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Conflict`] for the current signer without `force`.
    pub fn revoke_signer(&mut self, thumbprint: &str, force: bool, now: i64) -> Result<Vec<String>, StateError> {
        let revoked = self.signers_of_key(thumbprint)?;
        if !force && revoked.iter().any(|signer| signer.current) {
            return Err(StateError::Conflict(
                "the attestation signer issues health certificates; another one has to take over first".to_owned(),
            ));
        }
        for signer in &revoked {
            let entry = RevokedSigner {
                thumbprint: signer.thumbprint.clone(),
                spki_sha256: key_hash(&signer.der),
                not_after: signer.not_after,
                revoked: now,
            };
            self.revoked.put(signer.thumbprint.clone(), entry)?;
            self.signers.remove(&signer.thumbprint)?;
        }
        Ok(revoked.into_iter().map(|signer| signer.thumbprint).collect())
    }

    /// Deletes the signers that were replaced before `time`, and returns their number.
    ///
    /// Health certificates of a replaced signer are valid until they expire. So `time` must be at least their maximum
    /// lifetime ago, unless they should be rejected at once.
    ///
    /// # Errors
    /// [`StateError::Unreadable`].
    pub fn forget_signers_before(&mut self, time: i64) -> Result<usize, StateError> {
        let old = self
            .signers
            .values()?
            .filter(|signer| !signer.current && signer.replaced.is_some_and(|replaced| replaced < time));
        let old: Vec<_> = old.map(|signer| signer.thumbprint.clone()).collect();
        for thumbprint in &old {
            self.signers.remove(thumbprint)?;
        }
        Ok(old.len())
    }

    /// Whether this certificate, or another one of its key, was revoked.
    pub(super) fn is_revoked(&self, der: &[u8]) -> Result<bool, StateError> {
        let (thumbprint, key) = (sha256_hex(der), key_hash(der));
        Ok(self.revoked.values()?.any(|of| of.thumbprint == thumbprint || of.spki_sha256 == key))
    }
}

/// The signers with the same key as one of them: the same key in the HSMs, or the same public key.
fn of_key(mut all: Vec<Signer>, thumbprint: &str) -> Result<Vec<Signer>, StateError> {
    let Some(named) = all.iter().find(|signer| signer.thumbprint == thumbprint).cloned() else {
        return Err(StateError::NotFound(format!("there is no attestation signer {thumbprint}")));
    };
    let key = key_hash(&named.der);
    all.retain(|signer| signer.key_id == named.key_id || key_hash(&signer.der) == key);
    Ok(all)
}

/// SHA-256 of the public key; if the bytes are not a certificate, of all bytes.
fn key_hash(der: &[u8]) -> String {
    Certificate::parse(der).map_or_else(|_| sha256_hex(der), |certificate| sha256_hex(certificate.key().spki_der()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::State;
    use crate::store::tests::{Place, message, on_every_store, soon};

    on_every_store!(
        a_new_signer_replaces_the_current_one,
        a_revoked_signer_is_gone_with_all_certificates_of_its_key_and_is_remembered,
        of_two_that_make_one_at_the_same_time_the_first_wins
    );

    fn a_new_signer_replaces_the_current_one(place: &Place) {
        let mut state = place.open();
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

    fn a_revoked_signer_is_gone_with_all_certificates_of_its_key_and_is_remembered(place: &Place) {
        let mut state = place.open();
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
        // With `force` also the current one; then there is no current signer.
        assert_eq!(state.revoke_signer(&four, true, 33).unwrap(), std::slice::from_ref(&four));
        assert!(state.signers().unwrap().iter().all(|signer| !signer.current));
        assert_eq!(state.revoked_signers().unwrap()[0].thumbprint, four);
        // None of them can be added again, nor another certificate of the same key.
        let again = |state: &mut State, der: &[u8]| {
            state.add_signer(&NewSigner { der, key_id: b"d", not_before: 10, not_after: 20 }, None, 34)
        };
        assert!(matches!(again(&mut state, b"four"), Err(StateError::Revoked(_))));
        let [one, two] = [(); 2].map(|()| crate::service::testing::certificate());
        let added = again(&mut state, &one).unwrap().thumbprint;
        state.revoke_signer(&added, true, 35).unwrap();
        assert!(matches!(again(&mut state, &two), Err(StateError::Revoked(_))), "a certificate of a revoked key");
    }

    fn of_two_that_make_one_at_the_same_time_the_first_wins(place: &Place) {
        let mut ours = place.open();
        let mut theirs = place.open();
        let new = |der| NewSigner { der, key_id: b"id", not_before: 10, not_after: 20 };
        for (round, (one, two)) in [(b"a", b"b"), (b"c", b"d")].into_iter().enumerate() {
            let seen = ours.signers().unwrap().first().map(|signer| signer.thumbprint.clone());
            soon(|| theirs.signers().unwrap() == ours.signers().unwrap());
            let won = theirs.add_signer(&new(one), seen.as_deref(), 11).unwrap();
            assert!(message(ours.add_signer(&new(two), seen.as_deref(), 11)).contains("replaced meanwhile"));
            assert_eq!((ours.signers().unwrap()[0].clone(), ours.signers().unwrap().len()), (won, round + 1));
        }
    }
}
