//! RSA public keys: verification and encryption.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, OnceLock};

use aws_lc_rs::signature::{ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256};
use aws_lc_rs::{digest as aws_digest, rsa as aws};
use data_encoding::HEXLOWER;
use der::asn1::{AnyRef, BitStringRef, ObjectIdentifier, UintRef};
use der::{Decode, Encode, Sequence};
use ring::signature::{self as ring_signature, RsaPublicKeyComponents};
use x509_cert::spki::{AlgorithmIdentifier, SubjectPublicKeyInfo};

use super::error::{BadSignature, EncryptError, KeyError};
use crate::algorithm::{Digest, Oaep, SignatureAlgorithm, SignatureDigest};
use crate::hash::sha256;
use crate::oaep::PublicOperation;
use crate::pem;

/// Fewest bits a modulus may have.
pub(crate) const MIN_MODULUS_BITS: usize = 2048;
/// Most bits a modulus may have.
pub(crate) const MAX_MODULUS_BITS: usize = 8192;
/// Smallest public exponent.
pub(crate) const MIN_EXPONENT: u64 = 65537;
/// Largest public exponent. The protocol sets no upper bound; this is the largest that ring supports.
pub(crate) const MAX_EXPONENT: u64 = (1 << 33) - 1;

const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");

/// `BCRYPT_RSAPUBLIC_MAGIC`, the first four bytes of the blob.
pub(crate) const BCRYPT_MAGIC: &[u8; 4] = b"RSA1";
/// Bytes of the header `BCRYPT_RSAKEY_BLOB`: magic, bit length, and four lengths, each a little-endian u32.
const BCRYPT_HEADER: usize = 24;

/// `RSAPublicKey` (RFC 8017, A.1.1).
#[derive(Sequence)]
struct Pkcs1PublicKey<'a> {
    modulus: UintRef<'a>,
    public_exponent: UintRef<'a>,
}

/// An RSA public key of accepted strength. Cheap to clone. Two keys are equal if their SubjectPublicKeyInfos are.
#[derive(Clone)]
pub struct RsaPublicKey(Arc<PublicKey>);

struct PublicKey {
    modulus: Vec<u8>,
    exponent: Vec<u8>,
    spki: Vec<u8>,
    /// The key in aws-lc's form, made at the first encryption and shared by all clones, because making it costs more
    /// than an encryption. `None` if aws-lc rejects the key.
    encrypter: OnceLock<Option<aws::OaepPublicEncryptingKey>>,
    /// The key for OAEP combinations that aws-lc lacks.
    bare_operation: OnceLock<Option<PublicOperation>>,
    /// The key for verification with [`SignatureAlgorithm::DEFAULT`], also made on first use.
    verifier: OnceLock<Option<ParsedPublicKey>>,
}

impl RsaPublicKey {
    /// Makes a key from modulus and public exponent, big-endian; leading zeros are allowed.
    ///
    /// # Errors
    /// [`KeyError::ModulusSize`], [`KeyError::ModulusEven`] or [`KeyError::Exponent`] if the key is not strong enough.
    pub fn from_components(n: &[u8], e: &[u8]) -> Result<Self, KeyError> {
        let modulus = without_leading_zeros(n);
        let exponent = without_leading_zeros(e);
        let bits = bit_length(modulus);
        if !(MIN_MODULUS_BITS..=MAX_MODULUS_BITS).contains(&bits) {
            return Err(KeyError::ModulusSize(bits));
        }
        if modulus.last().is_none_or(|octet| octet & 1 == 0) {
            return Err(KeyError::ModulusEven);
        }
        if exponent.len() > size_of::<u64>() {
            return Err(KeyError::Exponent);
        }
        let value = value_of(exponent);
        if !(MIN_EXPONENT..=MAX_EXPONENT).contains(&value) || value & 1 == 0 {
            return Err(KeyError::Exponent);
        }
        let spki = encode_spki(modulus, exponent).map_err(|_| KeyError::Format)?;
        Ok(Self(Arc::new(PublicKey {
            modulus: modulus.to_vec(),
            exponent: exponent.to_vec(),
            spki,
            encrypter: OnceLock::new(),
            bare_operation: OnceLock::new(),
            verifier: OnceLock::new(),
        })))
    }

    /// Reads the DER of a SubjectPublicKeyInfo. Absent algorithm parameters count as NULL; [`Self::spki_der`] always
    /// writes NULL.
    ///
    /// # Errors
    /// [`KeyError`]; [`KeyError::NotRsa`] for any algorithm except `rsaEncryption`.
    pub fn from_spki_der(der: &[u8]) -> Result<Self, KeyError> {
        let spki = SubjectPublicKeyInfo::<AnyRef<'_>, BitStringRef<'_>>::from_der(der).map_err(|e| der_error(&e))?;
        if spki.algorithm.oid != RSA_ENCRYPTION {
            return Err(KeyError::NotRsa);
        }
        if spki.algorithm.parameters.is_some_and(|parameters| !parameters.is_null()) {
            return Err(KeyError::Format);
        }
        Self::from_pkcs1_der(spki.subject_public_key.as_bytes().ok_or(KeyError::Format)?)
    }

    /// Reads the DER of an `RSAPublicKey` (PKCS#1), as `openssl rsa -RSAPublicKey_out` writes it.
    ///
    /// # Errors
    /// [`KeyError`].
    pub(crate) fn from_pkcs1_der(der: &[u8]) -> Result<Self, KeyError> {
        let key = Pkcs1PublicKey::from_der(der).map_err(|e| der_error(&e))?;
        Self::from_components(key.modulus.as_bytes(), key.public_exponent.as_bytes())
    }

    pub(crate) fn from_bcrypt_blob(blob: &[u8]) -> Result<Self, KeyError> {
        let field = |index: usize| -> Result<usize, KeyError> {
            let octets = blob.get(index * 4..index * 4 + 4).and_then(|octets| octets.try_into().ok());
            let value = u32::from_le_bytes(octets.ok_or(KeyError::Format)?);
            usize::try_from(value).map_err(|_| KeyError::Format)
        };
        let (bits, exponent_len, modulus_len) = (field(1)?, field(2)?, field(3)?);
        // A public blob contains no primes.
        if field(4)? != 0 || field(5)? != 0 {
            return Err(KeyError::Format);
        }
        let modulus_at = BCRYPT_HEADER.checked_add(exponent_len).ok_or(KeyError::Format)?;
        let end = modulus_at.checked_add(modulus_len).ok_or(KeyError::Format)?;
        let exponent = blob.get(BCRYPT_HEADER..modulus_at).ok_or(KeyError::Format)?;
        let modulus = blob.get(modulus_at..end).ok_or(KeyError::Format)?;
        if blob.len() > end {
            return Err(KeyError::TrailingOctets);
        }
        let key = Self::from_components(modulus, exponent)?;
        if bits != bit_length(key.modulus()) {
            return Err(KeyError::Format);
        }
        Ok(key)
    }

    /// The DER of the canonical SubjectPublicKeyInfo: `rsaEncryption`, parameters NULL.
    #[must_use]
    pub fn spki_der(&self) -> &[u8] {
        &self.0.spki
    }

    /// The key as a PEM block `PUBLIC KEY`.
    #[must_use]
    pub fn to_pem(&self) -> String {
        pem::encode("PUBLIC KEY", self.spki_der()).to_string()
    }

    /// SHA-256 of [`Self::spki_der`].
    #[must_use]
    pub fn spki_sha256(&self) -> [u8; 32] {
        sha256(&self.0.spki)
    }

    /// Bytes of memory that it takes, shared by all clones; the forms that the libraries make of it are estimated.
    pub(crate) fn memory(&self) -> usize {
        // A form has the modulus, what Montgomery's multiplication needs of it, and its bookkeeping. A key has one of them as a
        // rule: it verifies or encrypts.
        let form = 4 * self.0.modulus.len() + 1024;
        size_of::<PublicKey>() + self.0.modulus.len() + self.0.exponent.len() + self.0.spki.len() + form
    }

    /// The modulus, big-endian, without leading zeros.
    #[must_use]
    pub fn modulus(&self) -> &[u8] {
        &self.0.modulus
    }

    /// The public exponent, big-endian, without leading zeros.
    #[must_use]
    pub fn exponent(&self) -> &[u8] {
        &self.0.exponent
    }

    /// Bytes of the modulus, and of every signature and ciphertext.
    #[must_use]
    pub fn modulus_len(&self) -> usize {
        self.0.modulus.len()
    }

    /// The key as a `BCRYPT_RSAPUBLIC_BLOB`.
    #[must_use]
    pub fn to_bcrypt_blob(&self) -> Vec<u8> {
        let (modulus, exponent) = (self.modulus(), self.exponent());
        let mut blob = Vec::with_capacity(BCRYPT_HEADER + exponent.len() + modulus.len());
        blob.extend_from_slice(BCRYPT_MAGIC);
        for length in [bit_length(modulus), exponent.len(), modulus.len(), 0, 0] {
            // All lengths are at most 8192.
            blob.extend_from_slice(&(length as u32).to_le_bytes());
        }
        blob.extend_from_slice(exponent);
        blob.extend_from_slice(modulus);
        blob
    }

    /// Verifies that `signature` over `message` is from this key.
    ///
    /// # Errors
    /// [`BadSignature`] for every failure.
    pub fn verify(&self, algorithm: SignatureAlgorithm, message: &[u8], signature: &[u8]) -> Result<(), BadSignature> {
        use SignatureAlgorithm::{Pkcs1, Pss};
        if algorithm == SignatureAlgorithm::DEFAULT
            && let Some(key) = self.verifier()
        {
            return key.verify_sig(message, signature).map_err(|_| BadSignature);
        }
        let parameters = match algorithm {
            Pkcs1(SignatureDigest::Sha256) => &ring_signature::RSA_PKCS1_2048_8192_SHA256,
            Pkcs1(SignatureDigest::Sha384) => &ring_signature::RSA_PKCS1_2048_8192_SHA384,
            Pkcs1(SignatureDigest::Sha512) => &ring_signature::RSA_PKCS1_2048_8192_SHA512,
            Pss(SignatureDigest::Sha256) => &ring_signature::RSA_PSS_2048_8192_SHA256,
            Pss(SignatureDigest::Sha384) => &ring_signature::RSA_PSS_2048_8192_SHA384,
            Pss(SignatureDigest::Sha512) => &ring_signature::RSA_PSS_2048_8192_SHA512,
        };
        RsaPublicKeyComponents { n: self.modulus(), e: self.exponent() }
            .verify(parameters, message, signature)
            .map_err(|_| BadSignature)
    }

    /// Verifies a signature with [`SignatureAlgorithm::DEFAULT`] over the message with this SHA-256.
    ///
    /// # Errors
    /// [`BadSignature`] for every failure.
    pub fn verify_digest(&self, digest: &[u8], signature: &[u8]) -> Result<(), BadSignature> {
        let digest = aws_digest::Digest::import_less_safe(digest, &aws_digest::SHA256).map_err(|_| BadSignature)?;
        let key = self.verifier().ok_or(BadSignature)?;
        key.verify_digest_sig(&digest, signature).map_err(|_| BadSignature)
    }

    fn verifier(&self) -> Option<&ParsedPublicKey> {
        let make = || ParsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, &self.0.spki).ok();
        self.0.verifier.get_or_init(make).as_ref()
    }

    /// Longest plaintext of [`Self::encrypt_oaep`] with these digests, in bytes.
    #[must_use]
    pub(crate) fn max_plaintext_len(&self, oaep: Oaep) -> usize {
        self.modulus_len().saturating_sub(2 * digest_len(oaep.digest) + 2)
    }

    /// Encrypts with RSA-OAEP and an empty label. The ciphertext has [`Self::modulus_len`] bytes.
    ///
    /// # Errors
    /// [`EncryptError::TooLong`] if the plaintext is longer than `Self::max_plaintext_len`; [`EncryptError::Failed`]
    /// if the library failed.
    pub fn encrypt_oaep(&self, oaep: Oaep, plaintext: &[u8]) -> Result<Vec<u8>, EncryptError> {
        if plaintext.len() > self.max_plaintext_len(oaep) {
            return Err(EncryptError::TooLong);
        }
        match aws_oaep(oaep) {
            Some(algorithm) => {
                let mut ciphertext = vec![0; self.modulus_len()];
                let written = self
                    .encrypter()?
                    .encrypt(algorithm, plaintext, &mut ciphertext, None)
                    .map_err(|_| EncryptError::Failed)?
                    .len();
                ciphertext.truncate(written);
                Ok(ciphertext)
            }
            None => self.bare_operation()?.encrypt(oaep, plaintext).ok_or(EncryptError::Failed),
        }
    }

    /// Encrypts with RSA-OAEP, two equal digests and a label, as TPMs do.
    ///
    /// # Errors
    /// As [`Self::encrypt_oaep`]; [`EncryptError::Failed`] also for two different digests.
    pub(crate) fn encrypt_oaep_with_label(
        &self,
        oaep: Oaep,
        label: &[u8],
        plaintext: &[u8],
    ) -> Result<Vec<u8>, EncryptError> {
        if plaintext.len() > self.max_plaintext_len(oaep) {
            return Err(EncryptError::TooLong);
        }
        let algorithm = aws_oaep(oaep).ok_or(EncryptError::Failed)?;
        let mut ciphertext = vec![0; self.modulus_len()];
        let written = self.encrypter()?.encrypt(algorithm, plaintext, &mut ciphertext, Some(label));
        let written = written.map_err(|_| EncryptError::Failed)?.len();
        ciphertext.truncate(written);
        Ok(ciphertext)
    }

    fn bare_operation(&self) -> Result<&PublicOperation, EncryptError> {
        let make = || PublicOperation::new(&self.0.modulus, value_of(&self.0.exponent));
        self.0.bare_operation.get_or_init(make).as_ref().ok_or(EncryptError::Failed)
    }

    fn encrypter(&self) -> Result<&aws::OaepPublicEncryptingKey, EncryptError> {
        self.0
            .encrypter
            .get_or_init(|| {
                let key = aws::PublicEncryptingKey::from_der(&self.0.spki).ok()?;
                aws::OaepPublicEncryptingKey::new(key).ok()
            })
            .as_ref()
            .ok_or(EncryptError::Failed)
    }
}

impl PartialEq for RsaPublicKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.spki == other.0.spki
    }
}

impl Eq for RsaPublicKey {}

impl Hash for RsaPublicKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.spki.hash(state);
    }
}

impl fmt::Debug for RsaPublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RsaPublicKey")
            .field("bits", &bit_length(self.modulus()))
            .field("spki_sha256", &HEXLOWER.encode(&self.spki_sha256()))
            .finish()
    }
}

/// The OAEP algorithm of aws-lc. It supports only two equal digests.
pub(super) fn aws_oaep(oaep: Oaep) -> Option<&'static aws::OaepAlgorithm> {
    match (oaep.digest, oaep.mgf) {
        (Digest::Sha1, Digest::Sha1) => Some(&aws::OAEP_SHA1_MGF1SHA1),
        (Digest::Sha256, Digest::Sha256) => Some(&aws::OAEP_SHA256_MGF1SHA256),
        (Digest::Sha384, Digest::Sha384) => Some(&aws::OAEP_SHA384_MGF1SHA384),
        (Digest::Sha512, Digest::Sha512) => Some(&aws::OAEP_SHA512_MGF1SHA512),
        _ => None,
    }
}

/// Bytes of a digest.
fn digest_len(digest: Digest) -> usize {
    match digest {
        Digest::Sha1 => 20,
        Digest::Sha256 => 32,
        Digest::Sha384 => 48,
        Digest::Sha512 => 64,
    }
}

/// The value of a big-endian number of at most 8 bytes.
fn value_of(exponent: &[u8]) -> u64 {
    exponent.iter().fold(0, |value, octet| value << 8 | u64::from(*octet))
}

fn encode_spki(modulus: &[u8], exponent: &[u8]) -> der::Result<Vec<u8>> {
    let key = Pkcs1PublicKey { modulus: UintRef::new(modulus)?, public_exponent: UintRef::new(exponent)? }.to_der()?;
    SubjectPublicKeyInfo {
        algorithm: AlgorithmIdentifier { oid: RSA_ENCRYPTION, parameters: Some(AnyRef::NULL) },
        subject_public_key: BitStringRef::from_bytes(&key)?,
    }
    .to_der()
}

fn der_error(error: &der::Error) -> KeyError {
    match error.kind() {
        der::ErrorKind::TrailingData { .. } => KeyError::TrailingOctets,
        _ => KeyError::Format,
    }
}

fn without_leading_zeros(octets: &[u8]) -> &[u8] {
    let zeros = octets.iter().take_while(|octet| **octet == 0).count();
    octets.get(zeros..).unwrap_or_default()
}

/// Bits of a big-endian number without leading zeros.
fn bit_length(octets: &[u8]) -> usize {
    octets.first().map_or(0, |first| octets.len() * 8 - first.leading_zeros() as usize)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const F4: &[u8] = &[1, 0, 1];

    /// A random odd number with this number of bits. A modulus is not checked for two prime factors.
    fn modulus(bits: usize) -> Vec<u8> {
        let mut octets = vec![0xff; bits.div_ceil(8)];
        octets[0] >>= octets.len() * 8 - bits;
        octets
    }

    #[test]
    fn strength_is_judged_exactly() {
        for bits in [0, 1, 1024, 2040, 2041, 2047, 8193, 16384, 65536] {
            let refused = RsaPublicKey::from_components(&modulus(bits.max(1)), F4).unwrap_err();
            assert_eq!(refused, KeyError::ModulusSize(bits.max(1)));
        }
        assert_eq!(RsaPublicKey::from_components(&[], F4).unwrap_err(), KeyError::ModulusSize(0));
        for bits in [2048, 2049, 3072, 8191, 8192] {
            let key = RsaPublicKey::from_components(&modulus(bits), F4).unwrap();
            assert_eq!(key.modulus_len(), bits.div_ceil(8));
        }
        let n = modulus(2048);
        for e in [&[][..], &[0], &[1], &[3], &[0xff, 0xff], &[1, 0, 0], &[1, 0, 2], &[2, 0, 0, 0, 1], &[0xff; 9]] {
            assert_eq!(RsaPublicKey::from_components(&n, e).unwrap_err(), KeyError::Exponent, "{e:?}");
        }
        for e in [F4, &[0, 0, 1, 0, 1], &[1, 0, 3], &[1, 0xff, 0xff, 0xff, 0xff], &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1]] {
            assert!(RsaPublicKey::from_components(&n, e).is_ok(), "{e:?}");
        }
        let mut even = n.clone();
        even[255] = 0xfe;
        assert_eq!(RsaPublicKey::from_components(&even, F4).unwrap_err(), KeyError::ModulusEven);
        let padded = [&[0, 0], &n[..]].concat();
        let canonical = RsaPublicKey::from_components(&padded, &[0, 1, 0, 1]).unwrap();
        assert_eq!(canonical, RsaPublicKey::from_components(&n, F4).unwrap());
        assert_eq!((canonical.modulus(), canonical.exponent()), (&n[..], F4));
    }

    #[test]
    fn every_accepted_key_works_in_both_libraries() {
        // ring, aws-lc and the rsa crate have different bounds. None may reject a key that our check accepts.
        for bits in [2048, 2049, 8191, 8192] {
            for e in [F4, &[1, 0xff, 0xff, 0xff, 0xff]] {
                let key = RsaPublicKey::from_components(&modulus(bits), e).unwrap();
                for mgf in [Digest::Sha1, Digest::Sha256] {
                    let sealed = key.encrypt_oaep(Oaep { digest: Digest::Sha256, mgf }, b"x").unwrap();
                    assert_eq!(sealed.len(), key.modulus_len());
                }
            }
        }
    }
}
