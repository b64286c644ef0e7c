//! Writing protectors: a fresh transport key for the same parties (step 8 of a release).
//!
//! The document is written in canonical form from the start, so that what is signed is a part of what is sent.

use std::sync::Arc;

use ring::{digest, hkdf, hmac, rand::SecureRandom};

use crate::algorithm::{Oaep, SignatureAlgorithm};
use crate::error::Refusal;
use crate::protector::{Hkdf, MAX_PROTECTOR, Signature, TransportKey, TransportKeySignature, Wrapping};
use crate::random;
use crate::rsa_key::RsaPublicKey;
use crate::skeleton::{Ciphers, Skeleton};

impl TransportKeySignature {
    /// Whether `key` made this signature over `signed_octets`. Takes the same time whatever the answer.
    #[must_use]
    pub fn verify(&self, key: &TransportKey, signed_octets: &[u8]) -> bool {
        hmac::verify(&self.derivation.key(key), signed_octets, &self.value).is_ok()
    }
}

impl Hkdf {
    /// A derivation with a fresh salt of 32 octets and no info.
    fn fresh() -> Result<Self, Refusal> {
        Ok(Self { salt: random::octets::<32>().map_err(|_| Refusal::internal())?.to_vec(), info: Vec::new() })
    }

    /// The HMAC key that the transport key gives.
    fn key(&self, transport_key: &TransportKey) -> hmac::Key {
        let info = [self.info.as_slice()];
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &self.salt).extract(&transport_key[..]);
        // `expand` fails only for more than 255 blocks; HMAC-SHA-256 takes one.
        match prk.expand(&info, hmac::HMAC_SHA256) {
            Ok(okm) => hmac::Key::from(okm),
            Err(_) => hmac::Key::new(hmac::HMAC_SHA256, &[]),
        }
    }
}

/// A fresh transport key.
///
/// # Errors
/// `InternalErrorException` when the system has no randomness.
pub fn fresh_transport_key() -> Result<TransportKey, Refusal> {
    let mut key = TransportKey::default();
    random::source().fill(&mut key[..]).map_err(|_| Refusal::internal())?;
    Ok(key)
}

/// A protector that lacks nothing but the guardian's signature.
#[derive(Debug)]
pub struct Unsigned {
    skeleton: Arc<Skeleton>,
    ciphers: Ciphers,
    signature: TransportKeySignature,
    max_offline_unwraps: u32,
}

impl Unsigned {
    /// Encrypts `key` for every wrapping by the algorithm it used before, and signs with a key derived from it.
    /// `recipients` are the encryption keys, in the order of `wrappings`; the rest of each wrapping is kept.
    ///
    /// # Errors
    /// `InternalErrorException` when an encryption fails or the system has no randomness; `InvalidProtectorException` when
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

    /// The same with a skeleton, and for each of its holes a key and how it encrypts.
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
        // What is hopeless is refused before anybody signs it.
        within_limit(skeleton.signed_len(&ciphers))?;
        let derivation = Hkdf::fresh()?;
        let mut context = hmac::Context::with_key(&derivation.key(key));
        skeleton.signed(&ciphers).for_each(|piece| context.update(piece.as_bytes()));
        let value = context.sign().as_ref().to_vec();
        Ok(Self { skeleton, ciphers, signature: TransportKeySignature { derivation, value }, max_offline_unwraps })
    }

    /// What the guardian signs.
    #[must_use]
    pub fn signed_octets(&self) -> Vec<u8> {
        let mut octets = Vec::with_capacity(self.skeleton.signed_len(&self.ciphers));
        self.skeleton.signed(&self.ciphers).for_each(|piece| octets.extend_from_slice(piece.as_bytes()));
        octets
    }

    /// SHA-256 of what the guardian signs.
    #[must_use]
    pub fn signed_sha256(&self) -> digest::Digest {
        self.skeleton.signed_sha256(&self.ciphers)
    }

    /// The protector file, with the guardian's signature `value` made by the signing key of wrapping `guardian` (an Id).
    ///
    /// # Errors
    /// `InvalidProtectorException` when the file would be larger than a protector may be.
    pub fn finish(&self, guardian: u32, algorithm: SignatureAlgorithm, value: Vec<u8>) -> Result<Vec<u8>, Refusal> {
        let signature = Signature { algorithm, parameters: None, value };
        let file = self.skeleton.write(self.max_offline_unwraps, &self.ciphers, &self.signature, guardian, &signature);
        within_limit(file.len())?;
        Ok(file)
    }

    /// SHA-256 of a file that [`finish`](Self::finish) gave.
    #[must_use]
    pub fn file_sha256(&self, file: &[u8]) -> digest::Digest {
        self.skeleton.file_sha256(file, self.max_offline_unwraps)
    }

    /// Bytes of memory that it takes, without what it shares with others of its wrapping set.
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
