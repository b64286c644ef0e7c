//! The operations that a release needs from the HSMs. Below this trait, the cluster decides which member works, how
//! often an operation is tried, and who is at fault.

use std::error::Error;
use std::time::Instant;

use claviger_hsm::{Check, Cluster, Done, Hash, KeyRef, SignScheme};
use claviger_protocol::algorithm;
use zeroize::Zeroizing;

use crate::registry::keys::pkcs11_oaep;

/// The two operations of a release. This is a handle: clones use the same private keys.
pub trait Hsm: Clone + Send + Sync + 'static {
    /// Decrypts `ciphertext` with RSA-OAEP until `deadline`. Returns only a plaintext that `check` accepts.
    ///
    /// # Errors
    /// See [`DecryptError`].
    fn decrypt(
        &self,
        key: &KeyRef,
        oaep: algorithm::Oaep,
        ciphertext: &[u8],
        deadline: Instant,
        check: Check,
    ) -> impl Future<Output = Result<Done<Zeroizing<Vec<u8>>>, DecryptError>> + Send;

    /// Signs with RSASSA-PKCS1-v1_5 the message that has this SHA-256 `digest`, until `deadline`. Returns only a
    /// signature that `check` accepts.
    ///
    /// # Errors
    /// [`Unavailable`].
    fn sign(
        &self,
        key: &KeyRef,
        digest: &[u8],
        deadline: Instant,
        check: Check,
    ) -> impl Future<Output = Result<Done<Vec<u8>>, Unavailable>> + Send;

    /// Number of further operations that could start now without waiting for a session.
    fn idle(&self) -> usize;
}

/// Why a decryption failed.
#[derive(Debug, thiserror::Error)]
pub enum DecryptError {
    /// The input is invalid: it cannot be decrypted, or `check` rejects the plaintext. Deliberately does not say which.
    #[error("the input is not right")]
    Rejected,
    /// The HSMs are at fault.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
}

/// No HSM returned a valid result before the deadline.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Unavailable(pub(super) Box<dyn Error + Send + Sync>);

impl Hsm for Cluster {
    async fn decrypt(
        &self,
        key: &KeyRef,
        oaep: algorithm::Oaep,
        ciphertext: &[u8],
        deadline: Instant,
        check: Check,
    ) -> Result<Done<Zeroizing<Vec<u8>>>, DecryptError> {
        let done = Cluster::decrypt(self, key, pkcs11_oaep(oaep), ciphertext, deadline, Some(check)).await;
        done.map_err(|error| if error.is_data() { DecryptError::Rejected } else { Unavailable(error.into()).into() })
    }

    async fn sign(
        &self,
        key: &KeyRef,
        digest: &[u8],
        deadline: Instant,
        check: Check,
    ) -> Result<Done<Vec<u8>>, Unavailable> {
        let scheme = SignScheme::Pkcs1(Hash::Sha256);
        Cluster::sign(self, key, scheme, digest, deadline, Some(check)).await.map_err(|error| Unavailable(error.into()))
    }

    fn idle(&self) -> usize {
        self.idle_sessions()
    }
}
