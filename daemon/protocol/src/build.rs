//! Creates protectors: a fresh transport key for the same parties (step 8 of a release).
//!
//! The document is written in canonical form, so that the signed bytes are a part of the sent bytes.

use std::sync::Arc;

use ring::{digest, hkdf, hmac, rand::SecureRandom};

use crate::algorithm::{Oaep, SignatureAlgorithm};
use crate::error::Refusal;
use crate::protector::{Hkdf, MAX_PROTECTOR, Signature, TransportKey, TransportKeySignature, Wrapping};
use crate::random;
use crate::rsa_key::RsaPublicKey;
use crate::skeleton::{Ciphers, Skeleton};

impl TransportKeySignature {
    /// Whether `key` made this signature over `signed_octets`. Runs in constant time.
    #[must_use]
    pub fn verify(&self, key: &TransportKey, signed_octets: &[u8]) -> bool {
        hmac::verify(&self.derivation.key(key), signed_octets, &self.value).is_ok()
    }
}

impl Hkdf {
    /// A derivation with a fresh salt of 32 bytes and without `info`.
    fn fresh() -> Result<Self, Refusal> {
        Ok(Self { salt: random::octets::<32>().map_err(|_| Refusal::internal())?.to_vec(), info: Vec::new() })
    }

    /// Derives the HMAC key from the transport key.
    fn key(&self, transport_key: &TransportKey) -> hmac::Key {
        let info = [self.info.as_slice()];
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &self.salt).extract(&transport_key[..]);
        // `expand` fails only for more than 255 blocks; HMAC-SHA-256 needs one.
        match prk.expand(&info, hmac::HMAC_SHA256) {
            Ok(okm) => hmac::Key::from(okm),
            Err(_) => hmac::Key::new(hmac::HMAC_SHA256, &[]),
        }
    }
}

/// Generates a transport key.
///
/// # Errors
/// `InternalErrorException` if the system has no randomness.
pub fn fresh_transport_key() -> Result<TransportKey, Refusal> {
    let mut key = TransportKey::default();
    random::source().fill(&mut key[..]).map_err(|_| Refusal::internal())?;
    Ok(key)
}

/// A protector that is complete except for the guardian signature.
#[derive(Debug)]
pub struct Unsigned {
    skeleton: Arc<Skeleton>,
    ciphers: Ciphers,
    signature: TransportKeySignature,
    max_offline_unwraps: u32,
}

impl Unsigned {
    /// Encrypts `key` for every wrapping with the wrapping's own algorithm, and signs with a key derived from `key`.
    /// `recipients` are the encryption keys in the order of `wrappings`. All other parts of the wrappings are kept.
    ///
    /// # Errors
    /// `InternalErrorException` if an encryption fails or the system has no randomness; `InvalidProtectorException` if
    /// the file would be larger than a protector may be.
    pub fn new<'a>(
        wrappings: &[Wrapping],
        recipients: impl IntoIterator<Item = &'a RsaPublicKey>,
        key: &TransportKey,
        max_offline_unwraps: u32,
    ) -> Result<Self, Refusal> {
        let recipients = wrappings.iter().zip(recipients).map(|(wrapping, key)| (key, wrapping.encryption.oaep));
        Self::with(Arc::new(Skeleton::of(wrappings)), recipients, key, max_offline_unwraps)
    }

    /// The same from a skeleton. `recipients` has a key and its OAEP parameters for each hole.
    pub(crate) fn with<'a>(
        skeleton: Arc<Skeleton>,
        recipients: impl IntoIterator<Item = (&'a RsaPublicKey, Oaep)>,
        key: &TransportKey,
        max_offline_unwraps: u32,
    ) -> Result<Self, Refusal> {
        let mut ciphers = Ciphers::with_capacity(skeleton.holes());
        for (recipient, oaep) in recipients {
            ciphers.push(&recipient.encrypt_oaep(oaep, &key[..]).map_err(|_| Refusal::internal())?);
        }
        if ciphers.len() != skeleton.holes() {
            return Err(Refusal::internal());
        }
        // Refuse a file that is too large before an HSM signs it.
        within_limit(skeleton.signed_len(&ciphers))?;
        let derivation = Hkdf::fresh()?;
        let mut context = hmac::Context::with_key(&derivation.key(key));
        skeleton.signed(&ciphers).for_each(|piece| context.update(piece.as_bytes()));
        let value = context.sign().as_ref().to_vec();
        Ok(Self { skeleton, ciphers, signature: TransportKeySignature { derivation, value }, max_offline_unwraps })
    }

    /// The bytes that the guardian signs.
    #[must_use]
    pub fn signed_octets(&self) -> Vec<u8> {
        let mut octets = Vec::with_capacity(self.skeleton.signed_len(&self.ciphers));
        self.skeleton.signed(&self.ciphers).for_each(|piece| octets.extend_from_slice(piece.as_bytes()));
        octets
    }

    /// SHA-256 of the bytes that the guardian signs.
    #[must_use]
    pub fn signed_sha256(&self) -> digest::Digest {
        self.skeleton.signed_sha256(&self.ciphers)
    }

    /// Adds the guardian signature `value`, made by the signing key of wrapping `guardian` (an Id), and returns the
    /// protector file.
    ///
    /// # Errors
    /// `InvalidProtectorException` if the file would be larger than a protector may be.
    pub fn finish(&self, guardian: u32, algorithm: SignatureAlgorithm, value: Vec<u8>) -> Result<Vec<u8>, Refusal> {
        let signature = Signature { algorithm, parameters: None, value };
        let file = self.skeleton.write(self.max_offline_unwraps, &self.ciphers, &self.signature, guardian, &signature);
        within_limit(file.len())?;
        Ok(file)
    }

    /// SHA-256 of a file that [`finish`](Self::finish) returned.
    #[must_use]
    pub fn file_sha256(&self, file: &[u8]) -> digest::Digest {
        self.skeleton.file_sha256(file, self.max_offline_unwraps)
    }

    /// Memory use in bytes, without the parts that are shared within its wrapping set.
    #[must_use]
    pub fn size(&self) -> usize {
        size_of::<Self>() + self.ciphers.size() + self.signature.derivation.salt.len() + self.signature.value.len()
    }
}

fn within_limit(octets: usize) -> Result<(), Refusal> {
    if octets > MAX_PROTECTOR {
        return Err(Refusal::protector(format!("the new protector would be larger than {MAX_PROTECTOR} octets")));
    }
    Ok(())
}
