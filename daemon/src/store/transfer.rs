//! Copies all records from one store to another one, which must be empty.

use super::contents::Contents;
use super::error::StateError;
use super::records::{KeptBaseline, KeptLog};
use super::state::State;

/// Number of records of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Records {
    /// Registered hosts.
    pub hosts: usize,
    /// Baselines.
    pub baselines: usize,
    /// Removed baselines whose names are reserved.
    pub removed_baselines: usize,
    /// Key-protection certificates.
    pub certificates: usize,
    /// Keys that are limited to hosts with labels.
    pub limits: usize,
    /// Attestation signers.
    pub signers: usize,
    /// Revoked attestation signers.
    pub revoked_signers: usize,
}

impl Records {
    /// Whether there is none.
    #[must_use]
    pub fn are_none(self) -> bool {
        self == Self::default()
    }
}

impl Contents {
    /// The number of records of each kind.
    ///
    /// # Errors
    /// [`StateError::Unreadable`].
    pub fn records(&self) -> Result<Records, StateError> {
        let Self { hosts, baselines, removed_baselines, certificates, limits, signers, revoked } = self;
        Ok(Records {
            hosts: hosts.rows()?.len(),
            baselines: baselines.rows()?.len(),
            removed_baselines: removed_baselines.rows()?.len(),
            certificates: certificates.rows()?.len(),
            limits: limits.rows()?.len(),
            signers: signers.rows()?.len(),
            revoked_signers: revoked.rows()?.len(),
        })
    }
}

impl State {
    /// Copies all records of `from` into this state, in one change. They keep their order and their times.
    ///
    /// # Errors
    /// [`StateError::Conflict`] if there are records here; those of reading and changing.
    pub fn copy_from(&mut self, from: &Self) -> Result<Records, StateError> {
        let mut all = Contents::clone(&*from.contents()?);
        let copied = all.records()?;
        let with_log: Vec<_> =
            all.baselines.rows()?.iter().filter(|(_, row)| row.value.log != KeptLog::Absent).collect();
        let with_log: Vec<_> =
            with_log.into_iter().map(|(key, row)| (key.clone(), row.value.baseline.clone())).collect();
        for (key, baseline) in with_log {
            let log = from.baseline_log(&baseline.name, baseline.added)?;
            let missing = || StateError::NotFound(format!("the log of the baseline {} cannot be found", baseline.name));
            let log = KeptLog::New(log.ok_or_else(missing)?.into());
            all.baselines.put(key, KeptBaseline { baseline, log })?;
        }
        self.change(|contents| {
            if !contents.records()?.are_none() {
                return Err(StateError::Conflict("there are records already; nothing is copied over them".to_owned()));
            }
            *contents = all.clone();
            Ok(copied)
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::store::tests::{Place, message, on_every_store};
    use crate::store::{Kind, Labels, NewCertificate, NewSigner, State};
    use claviger_protocol::tpm::pcr::PcrValues;

    on_every_store!(everything_is_copied_into_an_empty_state_and_only_there);

    fn everything_is_copied_into_an_empty_state_and_only_there(place: &Place) {
        // From each kind of store to each kind.
        for (elsewhere, here) in [(Place::sqlite(), place.another()), (Place::etcd(), place.another().another())] {
            let (mut from, mut to) = (elsewhere.open(), here.open());
            let labels: Labels = "tenant=acme".parse().unwrap();
            for number in 0..300 {
                let name = format!("host-{}", 300 - number);
                from.add_host(&name, name.as_bytes(), &labels, number).unwrap();
            }
            let mut values = PcrValues::default();
            [0, 4, 7].into_iter().for_each(|pcr| assert!(values.set(pcr, [1; 32])));
            from.add_baseline("with", &values, Some(&[7; 100_000]), 1).unwrap();
            from.add_baseline("without", &values, None, 1).unwrap();
            from.add_baseline("removed", &values, Some(b"log"), 1).unwrap();
            from.remove_baseline("removed", 2).unwrap();
            let mut other = values.clone();
            other.set(9, [1; 32]);
            for der in [&b"one"[..], b"two"] {
                let new = NewCertificate { kind: Kind::Signing, der, key_id: b"id", spki: der, primary: false };
                let added = from.add_certificate(&new, 1).unwrap();
                from.limit_certificate(Kind::Signing, &added.thumbprint, &labels).unwrap();
            }
            let signer = |der| NewSigner { der, key_id: b"id", not_before: 1, not_after: 9 };
            let first = from.add_signer(&signer(b"s"), None, 1).unwrap();
            from.add_signer(&signer(b"t"), Some(&first.thumbprint), 2).unwrap();
            from.revoke_signer(&first.thumbprint, true, 3).unwrap();

            let copied = to.copy_from(&from).unwrap();
            assert_eq!((copied.hosts, copied.baselines, copied.certificates, copied.limits), (300, 2, 2, 2));
            assert_eq!(copied.removed_baselines, 1);
            assert_eq!(copied, to.contents().unwrap().records().unwrap());
            assert_eq!(
                (to.hosts().unwrap(), to.baselines().unwrap()),
                (from.hosts().unwrap(), from.baselines().unwrap())
            );
            // In the new place, the name is reserved for as long as either store needs.
            let until = |state: &State| state.reserved_until("REMOVED", &other, 3).unwrap();
            assert!(until(&from).is_some() && until(&to) >= until(&from));
            assert_eq!(to.certificates().unwrap(), from.certificates().unwrap());
            assert_eq!(to.signers().unwrap(), from.signers().unwrap());
            assert_eq!(to.revoked_signers().unwrap(), from.revoked_signers().unwrap());
            assert!(message(to.copy_from(&from)).contains("there are records already"));
        }
    }
}
