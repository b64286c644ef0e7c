//! The credential: a secret that only the TPM with both the endorsement key and the attestation key can recover
//! (`TPM2_MakeCredential`, `TPM2_ActivateCredential`; TPM 2.0 Part 1, section 24).

use aws_lc_rs::cipher::{
    AES_128, DecryptingKey, DecryptionContext, EncryptingKey, EncryptionContext, UnboundCipherKey,
};
use aws_lc_rs::iv::FixedLength;
use ring::hmac;
use zeroize::Zeroizing;

use super::Malformed;
use super::reader::Reader;
use crate::algorithm::{Digest, Oaep};
use crate::random;
use crate::rsa_key::{RsaPrivateKey, RsaPublicKey};

/// Bytes of a credential.
pub(crate) const LENGTH: usize = 32;

/// The OAEP label, with its final zero byte.
const IDENTITY: &[u8] = b"IDENTITY\0";
/// Digests for endorsement keys of TCG's default template.
const SHA256: Oaep = Oaep { digest: Digest::Sha256, mgf: Digest::Sha256 };
/// Bytes of an AES key.
const AES_BYTES: usize = 16;
/// Bytes of an HMAC-SHA-256.
const HMAC_BYTES: usize = 32;

/// The cryptographic library failed: no memory or no randomness.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the credential cannot be protected")]
pub struct ProtectError;

/// A credential that is encrypted for an endorsement key and bound to the name of an attestation key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Protected {
    /// The contents of a `TPM2B_ID_OBJECT`.
    pub id_object: Vec<u8>,
    /// The contents of a `TPM2B_ENCRYPTED_SECRET`.
    pub encrypted_secret: Vec<u8>,
}

/// Generates a credential.
///
/// # Errors
/// [`ProtectError`].
pub fn fresh() -> Result<Zeroizing<[u8; LENGTH]>, ProtectError> {
    random::octets().map(Zeroizing::new).map_err(|_| ProtectError)
}

/// Protects a credential for this endorsement key and this object name, as `TPM2_MakeCredential` does.
///
/// # Errors
/// [`ProtectError`].
pub fn protect(
    endorsement_key: &RsaPublicKey,
    name: &[u8; 34],
    credential: &[u8; LENGTH],
) -> Result<Protected, ProtectError> {
    let seed: Zeroizing<[u8; 32]> = Zeroizing::new(random::octets().map_err(|_| ProtectError)?);
    let encrypted_secret =
        endorsement_key.encrypt_oaep_with_label(SHA256, IDENTITY, &*seed).map_err(|_| ProtectError)?;
    // The credential with its size in front.
    let mut identity = Vec::with_capacity(2 + LENGTH);
    identity.extend_from_slice(&(LENGTH as u16).to_be_bytes());
    identity.extend_from_slice(credential);
    let mut identity = Zeroizing::new(identity);
    let key = UnboundCipherKey::new(&AES_128, &*storage_key(&seed, name)).map_err(|_| ProtectError)?;
    let no_iv = EncryptionContext::Iv128(FixedLength::from([0; AES_BYTES]));
    EncryptingKey::cfb128(key).and_then(|key| key.less_safe_encrypt(&mut identity, no_iv)).map_err(|_| ProtectError)?;

    let mut mac = hmac::Context::with_key(&integrity_key(&seed));
    mac.update(&identity);
    mac.update(name);
    let mut id_object = Vec::with_capacity(2 + HMAC_BYTES + identity.len());
    id_object.extend_from_slice(&(HMAC_BYTES as u16).to_be_bytes());
    id_object.extend_from_slice(mac.sign().as_ref());
    id_object.extend_from_slice(&identity);
    Ok(Protected { id_object, encrypted_secret })
}

/// Recovers a credential with an endorsement key in software, as `TPM2_ActivateCredential` does for the object with
/// this name.
///
/// # Errors
/// [`Malformed`]: the credential is for another key or name, or was changed.
pub fn activate(
    endorsement_key: &RsaPrivateKey,
    name: &[u8; 34],
    protected: &Protected,
) -> Result<Zeroizing<[u8; LENGTH]>, Malformed> {
    const WRONG: Malformed = Malformed("the credential is for another key, or was changed");
    let seed = endorsement_key.decrypt_oaep_with_label(SHA256, IDENTITY, &protected.encrypted_secret);
    let seed = seed.map_err(|_| WRONG)?;
    let seed: &[u8; 32] = seed.as_slice().try_into().map_err(|_| WRONG)?;
    let mut reader = Reader::new(&protected.id_object);
    let mac = reader.sized(HMAC_BYTES)?;
    let identity = reader.rest();
    hmac::verify(&integrity_key(seed), &[identity, name].concat(), mac).map_err(|_| WRONG)?;

    let mut identity = Zeroizing::new(identity.to_vec());
    let key = UnboundCipherKey::new(&AES_128, &*storage_key(seed, name)).map_err(|_| WRONG)?;
    let no_iv = DecryptionContext::Iv128(FixedLength::from([0; AES_BYTES]));
    let opened = DecryptingKey::cfb128(key).map_err(|_| WRONG)?;
    let opened = opened.decrypt(&mut identity, no_iv).map_err(|_| WRONG)?;
    let mut reader = Reader::new(opened);
    let credential = reader.sized(LENGTH)?;
    reader.finish()?;
    credential.try_into().map(Zeroizing::new).map_err(|_| WRONG)
}

/// The key that encrypts the credential.
fn storage_key(seed: &[u8; 32], name: &[u8; 34]) -> Zeroizing<[u8; AES_BYTES]> {
    let mut key = Zeroizing::new([0; AES_BYTES]);
    key.copy_from_slice(&kdfa(seed, b"STORAGE", name, 128)[..AES_BYTES]);
    key
}

/// The key of the outer HMAC.
fn integrity_key(seed: &[u8; 32]) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, &*kdfa(seed, b"INTEGRITY", &[], 256))
}

/// The first block of `KDFa` (TPM 2.0 Part 1, section 11.4.10.2) with SHA-256: SP 800-108 in counter mode. The caller
/// uses the first `bits` bits as the key, at most 256.
fn kdfa(key: &[u8; 32], label: &[u8], context: &[u8], bits: u32) -> Zeroizing<[u8; 32]> {
    let mut mac = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    for part in [&1_u32.to_be_bytes()[..], label, &[0], context, &bits.to_be_bytes()] {
        mac.update(part);
    }
    let mut out = Zeroizing::new([0; 32]);
    out.copy_from_slice(mac.sign().as_ref());
    out
}
