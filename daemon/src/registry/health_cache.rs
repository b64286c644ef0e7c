//! A cache of verified health certificates: a host presents the same one for hours.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use claviger_process::lock::lock;
use claviger_protocol::certificate::Certificate;
use claviger_protocol::health::{self, HealthClaims, HealthError};
use ring::digest;

/// Maximum number of entries; each takes about a kilobyte.
const MOST: usize = 50_000;

/// The claims of verified health certificates by the SHA-256 of their DER, until they expire. Only properties of the
/// certificate itself are cached; the caller checks each time whether the signer is still trusted and the host still
/// registered.
#[derive(Default)]
pub struct HealthCache {
    verified: Mutex<HashMap<[u8; 32], Arc<HealthClaims>>>,
}

impl HealthCache {
    /// Returns the claims of a certificate from one of `signers` that is valid at `now`.
    ///
    /// # Errors
    /// As [`health::check`].
    pub fn check(&self, der: &[u8], signers: &[Certificate], now: i64) -> Result<Arc<HealthClaims>, HealthError> {
        if let Some(claims) = self.known(der, signers, now) {
            return Ok(claims);
        }
        // If a cached certificate has expired or its signer was removed, a full check gives the reason.
        let claims = Arc::new(health::check(der, signers, now)?);
        let mut verified = self.lock();
        if verified.len() >= MOST {
            verified.retain(|_, claims| now <= claims.not_after);
            if verified.len() >= MOST {
                verified.clear();
            }
        }
        verified.insert(key(der), claims.clone());
        Ok(claims)
    }

    /// Returns the claims of a certificate that was verified earlier, is valid at `now`, and is from one of `signers`.
    pub fn known(&self, der: &[u8], signers: &[Certificate], now: i64) -> Option<Arc<HealthClaims>> {
        let known = self.lock().get(&key(der)).cloned();
        let still_right = |claims: &Arc<HealthClaims>| {
            (claims.not_before..=claims.not_after).contains(&now)
                && signers.iter().any(|signer| signer.thumbprint() == claims.signer)
        };
        known.filter(still_right)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<[u8; 32], Arc<HealthClaims>>> {
        lock(&self.verified)
    }
}

fn key(der: &[u8]) -> [u8; 32] {
    let mut key = [0; 32];
    key.copy_from_slice(digest::digest(&digest::SHA256, der).as_ref());
    key
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::service::testing::{certificate, key};
    use claviger_protocol::health::{ResultType, issue};

    const NOW: i64 = 1_800_000_000;

    #[test]
    fn what_is_known_is_as_good_as_its_signer() {
        // A signer's key may be certified twice.
        let signers = [(); 2].map(|()| Certificate::parse(&certificate()).unwrap());
        let public = key().public();
        let issued = issue(&signers[0], "host", public, public, ResultType::EncryptionCertificate, NOW);
        let der = issued.unwrap().sign_with(key()).unwrap();
        let cache = HealthCache::default();
        let first = cache.check(&der, &signers, NOW).unwrap();
        assert!(Arc::ptr_eq(&first, &cache.check(&der, &signers, NOW + 1).unwrap()), "not remembered");
        assert_eq!(cache.check(&der, &[], NOW), Err(HealthError::Issuer));
        assert_eq!(cache.check(&der, &signers, NOW + 24 * 3600), Err(HealthError::Expired));
        // One of the two certificates is sufficient.
        assert_eq!(cache.check(&der, &signers[1..], NOW).unwrap().signer, signers[1].thumbprint());
        assert!(cache.check(&der, &signers, NOW).is_ok());
    }
}
