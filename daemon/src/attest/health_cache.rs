//! Health certificates that were verified before. A host shows the same one for hours.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use claviger_protocol::certificate::Certificate;
use claviger_protocol::health::{self, HealthClaims, HealthError};
use ring::digest;

/// Most certificates that are remembered; one takes about a kilobyte.
const MOST: usize = 50_000;

/// Verified health certificates by the SHA-256 of their DER, until they expire. Only the certificate's own properties
/// are remembered; whether its host is still registered is asked each time.
#[derive(Default)]
pub struct HealthCache {
    verified: Mutex<HashMap<[u8; 32], Arc<HealthClaims>>>,
}

impl HealthCache {
    /// What the certificate says, if it was issued by one of `signers` and is valid at `now`.
    ///
    /// # Errors
    /// As [`health::check`].
    pub fn check(&self, der: &[u8], signers: &[Certificate], now: i64) -> Result<Arc<HealthClaims>, HealthError> {
        if let Some(claims) = self.known(der, now) {
            return Ok(claims);
        }
        // Also where the known one is outside its validity: the check says how.
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

    /// What the certificate says, if it was found right before and is valid at `now`.
    pub fn known(&self, der: &[u8], now: i64) -> Option<Arc<HealthClaims>> {
        let known = self.lock().get(&key(der)).cloned();
        known.filter(|claims| (claims.not_before..=claims.not_after).contains(&now))
    }

    /// Forgets everything: signers changed.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<[u8; 32], Arc<HealthClaims>>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(der: &[u8]) -> [u8; 32] {
    let mut key = [0; 32];
    key.copy_from_slice(digest::digest(&digest::SHA256, der).as_ref());
    key
}
