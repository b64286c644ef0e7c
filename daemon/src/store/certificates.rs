//! Key-protection certificates.

use std::cmp::Reverse;

use super::contents::Contents;
use super::error::StateError;
use super::labels::Labels;
use super::limits::{check_der, check_key_id};
use super::records::{Certificate, Kind, NewCertificate, sha256_hex};

impl Contents {
    /// All key-protection certificates: sorted by kind, the primary one first, then the newest first.
    ///
    /// # Errors
    /// [`StateError::Unreadable`].
    pub fn certificates(&self) -> Result<Vec<Certificate>, StateError> {
        let mut rows: Vec<_> = self.certificates.rows()?.values().collect();
        rows.sort_by_key(|row| {
            let of = &row.value;
            (of.kind.as_str(), Reverse((of.is_primary, of.added, row.order)))
        });
        rows.into_iter().map(|row| self.limited(&row.value)).collect()
    }

    /// A certificate with the restriction of its key.
    fn limited(&self, certificate: &Certificate) -> Result<Certificate, StateError> {
        Ok(Certificate { labels: self.limit_of(&certificate.spki)?, ..certificate.clone() })
    }

    /// The restriction of a key, whether it has certificates or not.
    pub(super) fn limit_of(&self, spki: &[u8]) -> Result<Labels, StateError> {
        Ok(self.limits.rows()?.get(spki).map(|row| Labels::clone(&row.value)).unwrap_or_default())
    }

    pub(super) fn set_limit(&mut self, spki: &[u8], labels: &Labels) -> Result<(), StateError> {
        let key = spki.to_owned();
        if labels.is_empty() { self.limits.remove(&key).map(drop) } else { self.limits.put(key, labels.clone()) }
    }

    /// The certificate with this kind and thumbprint, without its restriction.
    pub(super) fn certificate(&self, kind: Kind, thumbprint: &str) -> Result<Option<&Certificate>, StateError> {
        Ok(self.certificates.get(&(kind, thumbprint.to_owned()))?.map(|found| &**found))
    }

    fn registered_certificate(&self, kind: Kind, thumbprint: &str) -> Result<Certificate, StateError> {
        let found = self.certificate(kind, thumbprint)?;
        found.cloned().ok_or_else(|| StateError::NotFound(format!("there is no {kind} certificate {thumbprint}")))
    }

    /// Stores a certificate, replacing the one with its kind and thumbprint. Its labels are those of its key.
    pub(super) fn put_certificate(&mut self, certificate: Certificate) -> Result<(), StateError> {
        let key = (certificate.kind, certificate.thumbprint.clone());
        self.certificates.put(key, Certificate { labels: Labels::default(), ..certificate })
    }

    /// Adds a key-protection certificate, enabled. An existing restriction of its key applies to it: a renewed
    /// certificate must not give access to more hosts than the previous one.
    ///
    /// # Errors
    /// [`StateError::Invalid`] for an empty field, [`StateError::Conflict`] if the certificate already exists for this
    /// kind.
    pub fn add_certificate(&mut self, new: &NewCertificate<'_>, now: i64) -> Result<Certificate, StateError> {
        check_der("a certificate", new.der)?;
        check_der("a certificate's public key", new.spki)?;
        check_key_id(new.key_id)?;
        let (kind, thumbprint) = (new.kind, sha256_hex(new.der));
        if self.certificate(kind, &thumbprint)?.is_some() {
            return Err(StateError::Conflict(format!("the {kind} certificate {thumbprint} is there already")));
        }
        let added = Certificate {
            thumbprint,
            kind,
            der: new.der.to_owned(),
            key_id: new.key_id.to_owned(),
            spki: new.spki.to_owned(),
            is_primary: false,
            enabled: true,
            added: now,
            is_communications: false,
            labels: self.limit_of(new.spki)?,
        };
        self.put_certificate(added.clone())?;
        if new.primary {
            self.give_role(Role::Primary, kind, Some(&added.thumbprint))?;
        }
        Ok(Certificate { is_primary: new.primary, ..added })
    }

    /// As [`Contents::add_certificate`], and restricts the certificate's key to hosts with these labels in the same
    /// change, so that there is no moment in which the key is released to every host.
    ///
    /// # Errors
    /// As that method; [`StateError::Invalid`] for too many labels.
    pub fn add_limited_certificate(
        &mut self,
        new: &NewCertificate<'_>,
        labels: &Labels,
        now: i64,
    ) -> Result<Certificate, StateError> {
        labels.check()?;
        let added = self.add_certificate(new, now)?;
        self.set_limit(new.spki, labels)?;
        Ok(Certificate { labels: labels.clone(), ..added })
    }

    /// Gives a role to one certificate of a kind and removes it from all others of that kind.
    pub(super) fn give_role(&mut self, role: Role, kind: Kind, thumbprint: Option<&str>) -> Result<(), StateError> {
        let all = self.certificates.values()?.filter(|of| of.kind == kind);
        let wrong = all.filter(|of| role.is_of(of) != (Some(&*of.thumbprint) == thumbprint));
        let wrong: Vec<Certificate> = wrong.map(|of| Certificate::clone(of)).collect();
        for mut certificate in wrong {
            let has_it = Some(&*certificate.thumbprint) == thumbprint;
            match role {
                Role::Primary => certificate.is_primary = has_it,
                Role::Communications => certificate.is_communications = has_it,
            }
            self.put_certificate(certificate)?;
        }
        Ok(())
    }

    /// Makes a certificate the primary one of its kind. The previous one stays enabled.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Conflict`] if the certificate is disabled.
    pub fn set_primary(&mut self, kind: Kind, thumbprint: &str) -> Result<(), StateError> {
        if !self.registered_certificate(kind, thumbprint)?.enabled {
            return Err(StateError::Conflict(format!(
                "the {kind} certificate {thumbprint} is disabled; enable it before it becomes primary"
            )));
        }
        self.give_role(Role::Primary, kind, Some(thumbprint))
    }

    /// Selects an enabled signing certificate to sign the metadata document; `None` selects the primary one.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Conflict`] if the certificate is disabled.
    pub fn set_communications(&mut self, thumbprint: Option<&str>) -> Result<(), StateError> {
        if let Some(thumbprint) = thumbprint
            && !self.registered_certificate(Kind::Signing, thumbprint)?.enabled
        {
            return Err(StateError::Conflict(format!(
                "the signing certificate {thumbprint} is disabled; enable it before it signs the metadata"
            )));
        }
        self.give_role(Role::Communications, Kind::Signing, thumbprint)
    }

    /// Restricts the key of a certificate to hosts with all of `labels`; without labels, removes the restriction.
    /// Applies to all certificates of that key, which are returned.
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
        let spki = self.registered_certificate(kind, thumbprint)?.spki;
        self.set_limit(&spki, labels)?;
        let of_key = self.certificates.values()?.filter(|certificate| certificate.spki == spki);
        of_key.map(|certificate| self.limited(certificate)).collect()
    }

    /// Enables or disables a certificate. The primary one and the one that signs the metadata document cannot be
    /// disabled.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Conflict`] for these two.
    pub fn enable_certificate(&mut self, kind: Kind, thumbprint: &str, enabled: bool) -> Result<(), StateError> {
        let certificate = self.registered_certificate(kind, thumbprint)?;
        if !enabled {
            must_be_spare(&certificate)?;
        }
        self.put_certificate(Certificate { enabled, ..certificate })
    }

    /// Removes a certificate. Its key stays in the HSMs, and the key's restriction is kept. The primary certificate and
    /// the one that signs the metadata document cannot be removed.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Conflict`] for these two.
    pub fn remove_certificate(&mut self, kind: Kind, thumbprint: &str) -> Result<(), StateError> {
        must_be_spare(&self.registered_certificate(kind, thumbprint)?)?;
        self.certificates.remove(&(kind, thumbprint.to_owned())).map(drop)
    }
}

/// A role that at most one certificate of a kind has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Primary,
    Communications,
}

impl Role {
    pub(super) fn is_of(self, certificate: &Certificate) -> bool {
        match self {
            Self::Primary => certificate.is_primary,
            Self::Communications => certificate.is_communications,
        }
    }
}

/// Fails if the service needs this certificate.
fn must_be_spare(certificate: &Certificate) -> Result<(), StateError> {
    let (kind, thumbprint) = (certificate.kind, &certificate.thumbprint);
    if certificate.is_primary {
        return Err(StateError::Conflict(format!(
            "{thumbprint} is the primary {kind} certificate; make another one primary first"
        )));
    }
    if certificate.is_communications {
        return Err(StateError::Conflict(format!(
            "{thumbprint} is the communications certificate, which signs the metadata; choose another one first"
        )));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::State;
    use crate::store::tests::{Place, message, on_every_store};

    on_every_store!(
        a_kind_has_at_most_one_primary_certificate,
        a_limit_belongs_to_the_key,
        the_communications_certificate_is_an_enabled_signing_one
    );

    fn a_kind_has_at_most_one_primary_certificate(place: &Place) {
        let mut state = place.open();
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

    fn a_limit_belongs_to_the_key(place: &Place) {
        let mut state = place.open();
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
        // The restriction outlives the last certificate of the key.
        state.limit_certificate(Kind::Encryption, &one.thumbprint, &acme).unwrap();
        for gone in [&one, &renewed] {
            state.remove_certificate(Kind::Encryption, &gone.thumbprint).unwrap();
        }
        assert_eq!(state.add_certificate(&new(Kind::Encryption, b"again", b"key"), 3).unwrap().labels, acme);
        assert!(
            message(state.limit_certificate(Kind::Signing, &one.thumbprint, &acme)).contains("there is no signing")
        );
    }

    fn the_communications_certificate_is_an_enabled_signing_one(place: &Place) {
        let mut state = place.open();
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
