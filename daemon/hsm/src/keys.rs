//! Keys and what is done with them: the vocabulary of the crate.

use std::fmt;

use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource, PkcsPssParams};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki_sys::CK_ULONG;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// A key's `CKA_ID`. The same on every member, unlike object handles.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct KeyId(pub Vec<u8>);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|octet| write!(f, "{octet:02x}"))
    }
}

/// A hash function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
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

    /// Length of a digest in octets.
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

    fn mechanism(self) -> MechanismType {
        match self {
            Hash::Sha1 => MechanismType::SHA1,
            Hash::Sha256 => MechanismType::SHA256,
            Hash::Sha384 => MechanismType::SHA384,
            Hash::Sha512 => MechanismType::SHA512,
        }
    }

    fn mgf(self) -> PkcsMgfType {
        match self {
            Hash::Sha1 => PkcsMgfType::MGF1_SHA1,
            Hash::Sha256 => PkcsMgfType::MGF1_SHA256,
            Hash::Sha384 => PkcsMgfType::MGF1_SHA384,
            Hash::Sha512 => PkcsMgfType::MGF1_SHA512,
        }
    }

    /// The DER of a `DigestInfo` up to the digest itself (RFC 8017, section 9.2, note 1).
    fn digest_info_prefix(self) -> &'static [u8] {
        match self {
            Hash::Sha1 => b"\x30\x21\x30\x09\x06\x05\x2b\x0e\x03\x02\x1a\x05\x00\x04\x14",
            Hash::Sha256 => b"\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20",
            Hash::Sha384 => b"\x30\x41\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x02\x05\x00\x04\x30",
            Hash::Sha512 => b"\x30\x51\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x03\x05\x00\x04\x40",
        }
    }
}

/// The parameters of RSAES-OAEP. The label is always empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
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

    pub(crate) fn mechanism(self) -> Mechanism<'static> {
        Mechanism::RsaPkcsOaep(PkcsOaepParams::new(self.hash.mechanism(), self.mgf.mgf(), PkcsOaepSource::empty()))
    }
}

/// How a digest is signed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
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

    pub(crate) fn mechanism(self) -> Mechanism<'static> {
        match self {
            SignScheme::Pkcs1(_) => Mechanism::RsaPkcs,
            SignScheme::Pss(hash) => Mechanism::RsaPkcsPss(PkcsPssParams {
                hash_alg: hash.mechanism(),
                mgf: hash.mgf(),
                // At most 64.
                s_len: CK_ULONG::from(hash.output_len() as u32).into(),
            }),
        }
    }

    /// What the token is handed: CKM_RSA_PKCS pads but does not build the DigestInfo, CKM_RSA_PKCS_PSS takes the digest.
    pub(crate) fn input(self, digest: &[u8]) -> Vec<u8> {
        match self {
            SignScheme::Pkcs1(hash) => [hash.digest_info_prefix(), digest].concat(),
            SignScheme::Pss(_) => digest.to_vec(),
        }
    }
}

/// What a new key may be used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
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
#[derive(Clone, PartialEq, Eq, Debug)]
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
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RsaPublic {
    /// The modulus.
    pub n: Vec<u8>,
    /// The public exponent.
    pub e: Vec<u8>,
}

/// An RSA private key in its CRT form, all numbers big-endian. Zeroised on drop.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn key_ids_print_as_lower_hex() {
        assert_eq!(KeyId(vec![0, 0xab, 0x10]).to_string(), "00ab10");
    }

    #[test]
    fn every_oaep_combination_has_its_own_index() {
        let indices: Vec<usize> = Oaep::all().map(Oaep::index).collect();
        assert_eq!(indices, (0..Oaep::COUNT).collect::<Vec<_>>());
    }

    #[test]
    fn digest_info_says_its_own_length() {
        for hash in Hash::ALL {
            let info = SignScheme::Pkcs1(hash).input(&vec![0; hash.output_len()]);
            assert_eq!(usize::from(info[1]), info.len() - 2);
            assert_eq!(usize::from(*hash.digest_info_prefix().last().unwrap()), hash.output_len());
        }
    }
}
