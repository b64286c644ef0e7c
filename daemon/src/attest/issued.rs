//! Health certificates that were issued a moment ago, and are handed out again for the same host and identity key.
//!
//! A host whose reply was lost asks again at once, and a request that was recorded on its way can be sent again as it is.
//! Neither is worth an operation of an HSM. A certificate that is handed out again is at most `AGAIN_SECONDS` older than
//! a fresh one would be, and so are its validity's two ends.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use claviger_protocol::health::ResultType;
use claviger_protocol::rsa_key::RsaPublicKey;
use ring::digest;

use crate::state::Host;

/// For how many seconds a certificate is handed out again.
const AGAIN_SECONDS: i64 = 2;

/// Most certificates that are remembered; one takes about a kilobyte.
const MOST: usize = 4_096;

/// What a certificate was issued for: a digest of everything in it that is not of the moment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct IssuedFor([u8; 32]);

impl IssuedFor {
    /// A certificate of this kind for `host` and `identity_key`, from the attestation signer with this thumbprint.
    #[must_use]
    pub fn new(signer: &[u8; 32], host: &Host, identity_key: &RsaPublicKey, result: ResultType) -> Self {
        let mut context = digest::Context::new(&digest::SHA256);
        let kind = result.number().to_le_bytes();
        // The name comes last: all others have a fixed length.
        for part in [&signer[..], &kind, host.spki_sha256.as_bytes(), &identity_key.spki_sha256(), host.name.as_bytes()]
        {
            context.update(part);
        }
        let mut bytes = [0; 32];
        bytes.copy_from_slice(context.finish().as_ref());
        Self(bytes)
    }
}

/// The certificates (DER), with the second in which each was issued.
#[derive(Debug, Default)]
pub struct RecentlyIssued(Mutex<HashMap<IssuedFor, (i64, Bytes)>>);

impl RecentlyIssued {
    /// The certificate that was issued for the same a moment before `now`, in seconds since 1970.
    #[must_use]
    pub fn get(&self, of: &IssuedFor, now: i64) -> Option<Bytes> {
        // A clock that was set back is no reason to hand out what is not valid yet.
        let recent = |at: i64| (0..=AGAIN_SECONDS).contains(&now.saturating_sub(at));
        self.lock().get(of).filter(|(at, _)| recent(*at)).map(|(_, certificate)| certificate.clone())
    }

    /// Remembers a certificate that was issued at `now`.
    pub fn remember(&self, of: IssuedFor, certificate: Bytes, now: i64) {
        let mut issued = self.lock();
        if issued.len() >= MOST {
            issued.retain(|_, (at, _)| (0..=AGAIN_SECONDS).contains(&now.saturating_sub(*at)));
            if issued.len() >= MOST {
                issued.clear();
            }
        }
        issued.insert(of, (now, certificate));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IssuedFor, (i64, Bytes)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::testing::key;
    use crate::state::Labels;

    const NOW: i64 = 1_800_000_000;

    fn host(name: &str, key: &str) -> Host {
        let labels = Labels::default();
        Host { name: name.to_owned(), spki: Vec::new(), spki_sha256: key.repeat(64), enabled: true, added: 1, labels }
    }

    #[test]
    fn only_what_was_issued_a_moment_ago_for_the_very_same_is_handed_out_again() {
        let issued = RecentlyIssued::default();
        let identity = key().public();
        let (one, other) = (ResultType::EncryptionCertificate, ResultType::SigningCertificate);
        let of = IssuedFor::new(&[1; 32], &host("a", "0"), identity, one);
        issued.remember(of, Bytes::from_static(b"der"), NOW);
        for now in [NOW, NOW + AGAIN_SECONDS] {
            assert_eq!(issued.get(&of, now).as_deref(), Some(&b"der"[..]));
        }
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
