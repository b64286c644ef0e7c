//! An HSM that takes no time, because it knows the results.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use claviger_hsm::{Check, Done, KeyRef};
use claviger_protocol::algorithm::Oaep;
use claviger_protocol::error::Refusal;
use claviger_protocol::protector::{Protector, TransportKey};
use zeroize::Zeroizing;

use super::done;
use crate::release::hsm::{DecryptError, Hsm, Unavailable};

/// Length of a signature by a 2048-bit key.
const SIGNATURE: usize = 256;

/// Takes the place of the cluster and returns at once, so that a benchmark measures only the cost outside of the HSMs.
///
/// It decrypts the ciphertexts that it was given in advance. Its signatures are wrong. A release verifies them at the
/// same cost as valid ones; then they are accepted.
#[derive(Clone, Default)]
pub struct NullHsm(Arc<HashMap<Vec<u8>, TransportKey>>);

impl NullHsm {
    /// Knows the transport keys of these protectors.
    ///
    /// # Errors
    /// One of them is not a protector.
    pub fn new<'p>(protectors: impl IntoIterator<Item = (&'p [u8], TransportKey)>) -> Result<Self, Refusal> {
        let mut answers = HashMap::new();
        for (file, key) in protectors {
            for wrapping in Protector::parse(file)?.wrappings {
                answers.insert(wrapping.cipher_value, key.clone());
            }
        }
        Ok(Self(Arc::new(answers)))
    }
}

impl Hsm for NullHsm {
    async fn decrypt(
        &self,
        _key: &KeyRef,
        _oaep: Oaep,
        ciphertext: &[u8],
        _deadline: Instant,
        check: Check,
    ) -> Result<Done<Zeroizing<Vec<u8>>>, DecryptError> {
        let known = self.0.get(ciphertext).map(|key| Zeroizing::new(key.to_vec()));
        known.filter(|key| check(key)).map(done).ok_or(DecryptError::Rejected)
    }

    async fn sign(
        &self,
        _key: &KeyRef,
        _digest: &[u8],
        _deadline: Instant,
        check: Check,
    ) -> Result<Done<Vec<u8>>, Unavailable> {
        let signature = vec![7; SIGNATURE];
        let _ = check(&signature);
        Ok(done(signature))
    }

    /// None, so every release makes its own egress protector.
    fn idle(&self) -> usize {
        0
    }
}
