//! A cache of health certificates from the last seconds. Repeated requests for the same host and identity key get the
//! same certificate.
//!
//! A host whose reply was lost retries at once, and an attacker can replay a recorded request. Neither should cost an
//! HSM operation. A cached certificate is at most `AGAIN_SECONDS` older than a fresh one.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use bytes::Bytes;
use claviger_process::lock::lock;
use claviger_protocol::health::ResultType;
use claviger_protocol::rsa_key::RsaPublicKey;
use ring::digest;

use crate::store::Host;

/// Time in seconds for which a certificate is reused.
const AGAIN_SECONDS: i64 = 2;

/// Maximum number of entries; each takes about a kilobyte.
const MOST: usize = 4_096;

/// The key of the cache: a digest of everything in a certificate except its serial number and its times.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct IssuedFor([u8; 32]);

impl IssuedFor {
    /// The key of a certificate for `host` and `identity_key` from the attestation signer with the thumbprint `signer`.
    #[must_use]
    pub fn new(signer: &[u8; 32], host: &Host, identity_key: &RsaPublicKey, result: ResultType) -> Self {
        let mut context = digest::Context::new(&digest::SHA256);
        let kind = result.number().to_le_bytes();
        // The name comes last, because all other parts have a fixed length.
        for part in [&signer[..], &kind, host.spki_sha256.as_bytes(), &identity_key.spki_sha256(), host.name.as_bytes()]
        {
            context.update(part);
        }
        let mut bytes = [0; 32];
        bytes.copy_from_slice(context.finish().as_ref());
        Self(bytes)
    }
}

/// An entry of the cache.
#[derive(Clone, Debug)]
struct Recent {
    /// Time of issue in seconds since 1970.
    at: i64,
    certificate: Bytes,
    is_recorded: bool,
}

/// A cached certificate.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Again {
    /// The certificate, DER.
    pub certificate: Bytes,
    /// Whether the audit trail has recorded it.
    pub is_recorded: bool,
}

/// The cache of recently issued certificates.
#[derive(Debug, Default)]
pub struct RecentlyIssued(Mutex<HashMap<IssuedFor, Recent>>);

impl RecentlyIssued {
    /// Returns a certificate that was issued at most `AGAIN_SECONDS` before `now` (seconds since 1970).
    #[must_use]
    pub fn get(&self, of: &IssuedFor, now: i64) -> Option<Again> {
        let issued = self.lock();
        let recent = issued.get(of).filter(|recent| recent.is_recent(now))?;
        Some(Again { certificate: recent.certificate.clone(), is_recorded: recent.is_recorded })
    }

    /// Marks a certificate as recorded in the audit trail.
    pub fn recorded(&self, of: &IssuedFor) {
        if let Some(recent) = self.lock().get_mut(of) {
            recent.is_recorded = true;
        }
    }

    /// Adds a certificate that was issued at `now` and is not recorded yet.
    pub fn remember(&self, of: IssuedFor, certificate: Bytes, now: i64) {
        let mut issued = self.lock();
        if issued.len() >= MOST {
            issued.retain(|_, recent| recent.is_recent(now));
            if issued.len() >= MOST {
                issued.clear();
            }
        }
        issued.insert(of, Recent { at: now, certificate, is_recorded: false });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IssuedFor, Recent>> {
        lock(&self.0)
    }
}

impl Recent {
    /// Excludes certificates from the future: if the clock was set back, they may not be valid yet.
    fn is_recent(&self, now: i64) -> bool {
        (0..=AGAIN_SECONDS).contains(&now.saturating_sub(self.at))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::service::testing::key;
    use crate::store::{HostKind, Labels};

    const NOW: i64 = 1_800_000_000;

    fn host(name: &str, key: &str) -> Host {
        let labels = Labels::default();
        let kind = HostKind::HostKey;
        Host {
            name: name.to_owned(),
            kind,
            spki: Vec::new(),
            spki_sha256: key.repeat(64),
            enabled: true,
            added: 1,
            labels,
        }
    }

    #[test]
    fn only_what_was_issued_a_moment_ago_for_the_very_same_is_handed_out_again() {
        let issued = RecentlyIssued::default();
        let identity = key().public();
        let (one, other) = (ResultType::EncryptionCertificate, ResultType::SigningCertificate);
        let of = IssuedFor::new(&[1; 32], &host("a", "0"), identity, one);
        issued.remember(of, Bytes::from_static(b"der"), NOW);
        for now in [NOW, NOW + AGAIN_SECONDS] {
            let again = issued.get(&of, now).unwrap();
            assert_eq!((&again.certificate[..], again.is_recorded), (&b"der"[..], false));
        }
        issued.recorded(&of);
        assert!(issued.get(&of, NOW).unwrap().is_recorded);
        for now in [NOW - 1, NOW + AGAIN_SECONDS + 1] {
            assert_eq!(issued.get(&of, now), None, "{now}");
        }
        for different in [
            IssuedFor::new(&[2; 32], &host("a", "0"), identity, one),
            IssuedFor::new(&[1; 32], &host("b", "0"), identity, one),
            IssuedFor::new(&[1; 32], &host("a", "1"), identity, one),
            IssuedFor::new(&[1; 32], &host("a", "0"), identity, other),
        ] {
            assert_eq!(issued.get(&different, NOW), None);
        }
        // A new certificate that replaces a recorded one is not recorded yet.
        issued.remember(of, Bytes::from_static(b"new"), NOW);
        assert!(!issued.get(&of, NOW).unwrap().is_recorded);
    }

    #[test]
    fn the_number_of_remembered_certificates_is_bounded() {
        let issued = RecentlyIssued::default();
        for at in 0..3 * MOST {
            let mut of = [0; 32];
            of[..8].copy_from_slice(&at.to_le_bytes());
            issued.remember(IssuedFor(of), Bytes::new(), NOW);
            assert!(issued.lock().len() <= MOST);
        }
    }
}
