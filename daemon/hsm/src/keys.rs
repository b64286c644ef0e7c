//! Keys and what is done with them: the vocabulary of the crate.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::identity::{Fingerprint, KeyId, KeyRef};

/// A hash function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Hash {
    /// SHA-1: what older peers use inside OAEP, where its collisions do no harm.
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

    /// Length of a digest in bytes.
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
    /// How many combinations there are; each has its own [`index`](Self::index).
    pub(crate) const COUNT: usize = Hash::ALL.len() * Hash::ALL.len();

    pub(crate) fn all() -> impl Iterator<Item = Oaep> {
        Hash::ALL.into_iter().flat_map(|hash| Hash::ALL.into_iter().map(move |mgf| Oaep { hash, mgf }))
    }

    pub(crate) fn index(self) -> usize {
        self.hash as usize * Hash::ALL.len() + self.mgf as usize
    }
}

/// How a digest is signed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum SignScheme {
    /// RSASSA-PKCS1-v1_5 over a digest by this hash.
    Pkcs1(Hash),
    /// RSASSA-PSS over a digest by this hash; MGF1 with the same hash, salt as long as the digest.
    Pss(Hash),
}

impl SignScheme {
    /// The hash that made the digest.
    #[must_use]
    pub fn hash(self) -> Hash {
        match self {
            SignScheme::Pkcs1(hash) | SignScheme::Pss(hash) => hash,
        }
    }
}

/// What a new key may be used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum KeyUsage {
    /// Signatures only.
    Sign,
    /// Decryption only.
    Decrypt,
    /// Both.
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

/// A key to be made or imported.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NewKey {
    /// Its `CKA_ID`, which must be free on the token.
    pub id: KeyId,
    /// Its `CKA_LABEL`, for people.
    pub label: String,
    /// Length of the modulus; not looked at when a key is imported.
    pub bits: u32,
    /// What it may do.
    pub usage: KeyUsage,
}

/// An RSA public key; big-endian, without leading zeros.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RsaPublic {
    /// The modulus.
    pub n: Vec<u8>,
    /// The public exponent.
    pub e: Vec<u8>,
}

/// An RSA private key in its CRT form, all numbers big-endian. Zeroised on drop.
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

/// An RSA private key of a token, for administrators.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TokenKey {
    /// Its `CKA_ID`; `None`: it has none, and cannot be used.
    pub id: Option<KeyId>,
    /// Its `CKA_LABEL`.
    pub label: String,
    /// Its public key; `None` when the token tells it neither of the private key nor by a public key object.
    pub public: Option<RsaPublic>,
    /// Whether `CKA_DECRYPT` is set.
    pub decrypts: bool,
    /// Whether `CKA_SIGN` is set.
    pub signs: bool,
    /// Whether `CKA_ALWAYS_AUTHENTICATE` is set: every operation wants a login of its own.
    pub always_authenticate: bool,
    /// Of its modulus; `None` when the token does not tell it.
    pub fingerprint: Option<Fingerprint>,
}

impl TokenKey {
    /// Whether it has this `CKA_ID` and this modulus.
    #[must_use]
    pub fn is(&self, wanted: &KeyRef) -> bool {
        self.has_id(&wanted.id) && self.fingerprint == Some(wanted.public)
    }

    /// Whether it has this `CKA_ID`.
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
