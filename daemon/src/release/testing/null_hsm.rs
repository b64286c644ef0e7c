//! An HSM that takes no time: it knows the answers.

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

/// The length of a signature by an RSA-2048 key.
const SIGNATURE: usize = 256;

/// In the place of the cluster: it answers at once, so that what a release costs is what it costs outside of the HSMs.
///
/// It decrypts what it was told of beforehand. Its signatures are wrong. They are checked all the same, because a release
/// has to, at the same cost as right ones; then they are given out.
#[derive(Clone, Default)]
pub struct NullHsm(Arc<HashMap<Vec<u8>, TransportKey>>);

impl NullHsm {
    /// Knows the transport keys of these protectors.
    ///
    /// # Errors
    /// When one of them is no protector.
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

    /// None: every release makes its own egress protector.
    fn idle(&self) -> usize {
        0
    }
}
