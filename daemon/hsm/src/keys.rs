//! Types for keys and the operations on them, used by the whole crate.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::identity::{Fingerprint, KeyId, KeyRef};

/// A hash function for OAEP and signatures.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Hash {
    /// SHA-1. Older peers use it inside OAEP, where its collisions do no harm.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl Hash {
    pub(crate) const ALL: [Hash; 4] = [Hash::Sha1, Hash::Sha256, Hash::Sha384, Hash::Sha512];

    /// Returns the length of a digest in bytes.
    #[must_use]
    pub fn output_len(self) -> usize {
        self.digest_algorithm().output_len()
    }

    pub(crate) fn digest_algorithm(self) -> &'static ring::digest::Algorithm {
        match self {
            Hash::Sha1 => &ring::digest::SHA1_FOR_LEGACY_USE_ONLY,
            Hash::Sha256 => &ring::digest::SHA256,
            Hash::Sha384 => &ring::digest::SHA384,
            Hash::Sha512 => &ring::digest::SHA512,
        }
    }
}

/// The parameters of RSAES-OAEP. The label is always empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Oaep {
    /// The hash of the label.
    pub hash: Hash,
    /// The hash inside MGF1.
    pub mgf: Hash,
}

impl Oaep {
    /// Number of combinations of the two hashes; each combination has its own [`index`](Self::index).
    pub(crate) const COUNT: usize = Hash::ALL.len() * Hash::ALL.len();

    pub(crate) fn all() -> impl Iterator<Item = Oaep> {
        Hash::ALL.into_iter().flat_map(|hash| Hash::ALL.into_iter().map(move |mgf| Oaep { hash, mgf }))
    }

    pub(crate) fn index(self) -> usize {
        self.hash as usize * Hash::ALL.len() + self.mgf as usize
    }
}

/// A signature scheme, with the hash of the digest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum SignScheme {
    /// RSASSA-PKCS1-v1_5 over a digest made with this hash.
    Pkcs1(Hash),
    /// RSASSA-PSS over a digest made with this hash; MGF1 uses the same hash, and the salt is as long as the digest.
    Pss(Hash),
}

impl SignScheme {
    /// Returns the hash that made the digest.
    #[must_use]
    pub fn hash(self) -> Hash {
        match self {
            SignScheme::Pkcs1(hash) | SignScheme::Pss(hash) => hash,
        }
    }
}

/// Permitted uses of a new key.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum KeyUsage {
    /// Signing only.
    Sign,
    /// Decryption only.
    Decrypt,
    /// Signing and decryption.
    Both,
}

impl KeyUsage {
    pub(crate) fn signs(self) -> bool {
        self != KeyUsage::Decrypt
    }

    pub(crate) fn decrypts(self) -> bool {
        self != KeyUsage::Sign
    }
}

/// A key that is to be generated or imported.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NewKey {
    /// The `CKA_ID`, which no key on the token may have yet.
    pub id: KeyId,
    /// The `CKA_LABEL`, a name for people.
    pub label: String,
    /// Length of the modulus in bits; ignored when a key is imported.
    pub bits: u32,
    /// Permitted uses.
    pub usage: KeyUsage,
}

/// An RSA public key. Its numbers are big-endian, without leading zeros.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RsaPublic {
    /// The modulus.
    pub n: Vec<u8>,
    /// The public exponent.
    pub e: Vec<u8>,
}

/// An RSA private key in CRT form. All numbers are big-endian, and are zeroised on drop.
#[derive(Clone, Zeroize, ZeroizeOnDrop, Serialize, Deserialize)]
pub struct RsaPrivateParts {
    /// The modulus.
    pub n: Vec<u8>,
    /// The public exponent.
    pub e: Vec<u8>,
    /// The private exponent.
    pub d: Vec<u8>,
    /// The first prime.
    pub p: Vec<u8>,
    /// The second prime.
    pub q: Vec<u8>,
    /// d mod (p - 1).
    pub dp: Vec<u8>,
    /// d mod (q - 1).
    pub dq: Vec<u8>,
    /// The inverse of q mod p.
    pub qinv: Vec<u8>,
}

impl fmt::Debug for RsaPrivateParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[private key]")
    }
}

/// An RSA private key on a token, as shown to administrators.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TokenKey {
    /// The `CKA_ID`; `None` if the key has none, which makes it unusable.
    pub id: Option<KeyId>,
    /// The `CKA_LABEL`.
    pub label: String,
    /// The public key; `None` if the token reveals it neither in the private key nor in a public key object.
    pub public: Option<RsaPublic>,
    /// The value of `CKA_DECRYPT`.
    pub decrypts: bool,
    /// The value of `CKA_SIGN`.
    pub signs: bool,
    /// The value of `CKA_ALWAYS_AUTHENTICATE`: if true, every operation requires a login of its own.
    pub always_authenticate: bool,
    /// Fingerprint of the modulus; `None` if the token does not reveal the modulus.
    pub fingerprint: Option<Fingerprint>,
}

impl TokenKey {
    /// Returns true if this key has the `CKA_ID` and the modulus of `wanted`.
    #[must_use]
    pub fn is(&self, wanted: &KeyRef) -> bool {
        self.has_id(&wanted.id) && self.fingerprint == Some(wanted.public)
    }

    /// Returns true if this key has this `CKA_ID`.
    #[must_use]
    pub fn has_id(&self, id: &KeyId) -> bool {
        self.id.as_ref() == Some(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_oaep_combination_has_its_own_index() {
        let indices: Vec<usize> = Oaep::all().map(Oaep::index).collect();
        assert_eq!(indices, (0..Oaep::COUNT).collect::<Vec<_>>());
    }
}
