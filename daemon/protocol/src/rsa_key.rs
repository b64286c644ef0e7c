//! RSA keys: judged, in canonical form, and put to use.
//!
//! A key that exists as an [`RsaPublicKey`] has passed the profile's judgement of strength; no caller has to repeat it.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, OnceLock};

use aws_lc_rs::encoding::AsDer as _;
use aws_lc_rs::signature::{ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256};
use aws_lc_rs::{digest as aws_digest, rsa as aws};
use data_encoding::HEXLOWER;
use der::asn1::{AnyRef, BitStringRef, ObjectIdentifier, UintRef};
use der::{Decode, Encode, Sequence};
use ring::signature::{self as ring_signature, RsaPublicKeyComponents};
use rsa::sha2::digest::DynDigest;
use rsa::traits::PublicKeyParts as _;
use x509_cert::spki::{AlgorithmIdentifier, SubjectPublicKeyInfo};
use zeroize::Zeroizing;

use crate::algorithm::{Digest, Oaep, SignatureAlgorithm, SignatureDigest};
use crate::certificate::{Certificate, CertificateError};
use crate::input::{self, InputError};
use crate::oaep::PublicOperation;
use crate::pem;

/// Fewest bits a modulus may have.
pub const MIN_MODULUS_BITS: usize = 2048;
/// Most bits a modulus may have.
pub const MAX_MODULUS_BITS: usize = 8192;
/// Smallest public exponent.
pub const MIN_EXPONENT: u64 = 65537;
/// Largest public exponent. The protocol sets no upper bound; this is the largest that ring verifies with.
pub const MAX_EXPONENT: u64 = (1 << 33) - 1;

const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");

/// `BCRYPT_RSAPUBLIC_MAGIC`, as its four octets stand in the blob.
const BCRYPT_MAGIC: &[u8; 4] = b"RSA1";
/// Octets of `BCRYPT_RSAKEY_BLOB`: magic, bit length, and four lengths, each a little-endian u32.
const BCRYPT_HEADER: usize = 24;

/// Why octets are not a key that may be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KeyError {
    /// The octets are in none of the formats asked for.
    #[error("the key is in none of the accepted formats")]
    Format,
    /// A key, and then something else.
    #[error("there are octets after the key")]
    TrailingOctets,
    /// A key of another algorithm than plain RSA (`rsaEncryption`).
    #[error("the key is not an RSA key (rsaEncryption)")]
    NotRsa,
    /// The modulus has this many bits.
    #[error("the RSA modulus has {0} bits; 2048 to 8192 are accepted")]
    ModulusSize(usize),
    /// The modulus is even.
    #[error("the RSA modulus is even")]
    ModulusEven,
    /// The public exponent is even, smaller than 65537 or longer than 33 bits.
    #[error("the RSA public exponent must be odd, at least 65537 and at most 33 bits long")]
    Exponent,
    /// The parts of a private key do not belong together.
    #[error("the parts of the RSA private key do not belong together")]
    Inconsistent,
    /// A key of this many bits cannot be generated.
    #[error("cannot generate an RSA key of {0} bits: 2048, 3072, 4096 and 8192 are possible")]
    CannotGenerate(u32),
}

/// A signature that is not this key's over this message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the signature is wrong")]
pub struct BadSignature;

/// Why nothing was encrypted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EncryptError {
    /// The plaintext is longer than OAEP with these digests can carry under this key.
    #[error("the plaintext is too long for this key and these digests")]
    TooLong,
    /// The cryptographic library failed: out of memory, or without randomness.
    #[error("RSA-OAEP encryption failed")]
    Failed,
}

/// Nothing was decrypted. Says no more than that: the reason would be an oracle.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("RSA-OAEP decryption failed")]
pub struct DecryptError;

/// Nothing was signed: the cryptographic library failed (out of memory, or a fault in its arithmetic).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("RSA signing failed")]
pub struct SignError;

/// `RSAPublicKey` (RFC 8017, A.1.1).
#[derive(Sequence)]
struct Pkcs1PublicKey<'a> {
    modulus: UintRef<'a>,
    public_exponent: UintRef<'a>,
}

/// An RSA public key of accepted strength. Cheap to clone; equal to another when its SubjectPublicKeyInfo is.
#[derive(Clone)]
pub struct RsaPublicKey(Arc<PublicKey>);

struct PublicKey {
    modulus: Vec<u8>,
    exponent: Vec<u8>,
    spki: Vec<u8>,
    /// The key as aws-lc wants it, made at the first encryption and shared by all clones: it costs more to make than
    /// one encryption. `None` if aws-lc refuses the key.
    encrypter: OnceLock<Option<aws::OaepPublicEncryptingKey>>,
    /// For the OAEP combinations that aws-lc lacks.
    bare_operation: OnceLock<Option<PublicOperation>>,
    /// The same for signatures by [`SignatureAlgorithm::DEFAULT`].
    verifier: OnceLock<Option<ParsedPublicKey>>,
}

impl RsaPublicKey {
    /// A key from its modulus and public exponent, big-endian; leading zeros are allowed.
    ///
    /// # Errors
    /// [`KeyError::ModulusSize`], [`KeyError::ModulusEven`] or [`KeyError::Exponent`] if the key is not of accepted strength.
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

    /// A key from the DER of a SubjectPublicKeyInfo. Absent algorithm parameters are taken for NULL, which
    /// [`Self::spki_der`] always has.
    ///
    /// # Errors
    /// [`KeyError`], and [`KeyError::NotRsa`] for any algorithm but `rsaEncryption`.
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

    /// A key from whatever hosts send: the DER of a SubjectPublicKeyInfo or of an X.509 certificate, or a
    /// `BCRYPT_RSAPUBLIC_BLOB` (`RSA1`).
    ///
    /// # Errors
    /// [`KeyError`]; [`KeyError::Format`] if the octets are none of the three.
    pub fn from_any(octets: &[u8]) -> Result<Self, KeyError> {
        if octets.starts_with(BCRYPT_MAGIC) {
            return Self::from_bcrypt_blob(octets);
        }
        match Self::from_spki_der(octets) {
            // A certificate's first element is not an algorithm identifier, so it never gets further than this.
            Err(KeyError::Format) => match Certificate::parse(octets) {
                Ok(certificate) => Ok(certificate.key().clone()),
                Err(CertificateError::NotX509) => Err(KeyError::Format),
                Err(CertificateError::TrailingOctets) => Err(KeyError::TrailingOctets),
                Err(CertificateError::Key(e)) => Err(e),
            },
            other => other,
        }
    }

    /// A key from a file of an administrator, in any of the forms that [`input::public_key`] reads.
    ///
    /// # Errors
    /// [`InputError`].
    pub fn from_file(bytes: &[u8]) -> Result<Self, InputError> {
        input::public_key(bytes)
    }

    /// A key from the DER of an `RSAPublicKey` (PKCS#1), as `openssl rsa -RSAPublicKey_out` writes it.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn from_pkcs1_der(der: &[u8]) -> Result<Self, KeyError> {
        let key = Pkcs1PublicKey::from_der(der).map_err(|e| der_error(&e))?;
        Self::from_components(key.modulus.as_bytes(), key.public_exponent.as_bytes())
    }

    fn from_bcrypt_blob(blob: &[u8]) -> Result<Self, KeyError> {
        let field = |index: usize| -> Result<usize, KeyError> {
            let octets = blob.get(index * 4..index * 4 + 4).and_then(|octets| octets.try_into().ok());
            let value = u32::from_le_bytes(octets.ok_or(KeyError::Format)?);
            usize::try_from(value).map_err(|_| KeyError::Format)
        };
        let (bits, exponent_len, modulus_len) = (field(1)?, field(2)?, field(3)?);
        // A public blob has no primes.
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

    /// The key in a PEM file (`PUBLIC KEY`).
    #[must_use]
    pub fn to_pem(&self) -> String {
        pem::encode("PUBLIC KEY", self.spki_der()).to_string()
    }

    /// SHA-256 of [`Self::spki_der`].
    #[must_use]
    pub fn spki_sha256(&self) -> [u8; 32] {
        sha256(&self.0.spki)
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

    /// Octets of the modulus, and so of every signature and ciphertext.
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
            // All are at most 8192.
            blob.extend_from_slice(&(length as u32).to_le_bytes());
        }
        blob.extend_from_slice(exponent);
        blob.extend_from_slice(modulus);
        blob
    }

    /// Checks that `signature` is this key's over `message`.
    ///
    /// # Errors
    /// [`BadSignature`] if it is not, for whatever reason.
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

    /// Checks that `signature` is this key's, by [`SignatureAlgorithm::DEFAULT`], over the message with this SHA-256.
    ///
    /// # Errors
    /// [`BadSignature`] if it is not, for whatever reason.
    pub fn verify_digest(&self, digest: &[u8], signature: &[u8]) -> Result<(), BadSignature> {
        let digest = aws_digest::Digest::import_less_safe(digest, &aws_digest::SHA256).map_err(|_| BadSignature)?;
        let key = self.verifier().ok_or(BadSignature)?;
        key.verify_digest_sig(&digest, signature).map_err(|_| BadSignature)
    }

    fn verifier(&self) -> Option<&ParsedPublicKey> {
        let make = || ParsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, &self.0.spki).ok();
        self.0.verifier.get_or_init(make).as_ref()
    }

    /// Most octets [`Self::encrypt_oaep`] can carry with these digests.
    #[must_use]
    pub fn max_plaintext_len(&self, oaep: Oaep) -> usize {
        self.modulus_len().saturating_sub(2 * digest_len(oaep.digest) + 2)
    }

    /// Encrypts with RSA-OAEP, empty label. The ciphertext has [`Self::modulus_len`] octets.
    ///
    /// # Errors
    /// [`EncryptError::TooLong`] if the plaintext is longer than [`Self::max_plaintext_len`]; [`EncryptError::Failed`] if the
    /// library failed.
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

/// The numbers of a two-prime RSA private key, big-endian without leading zeros, as PKCS#11 imports them.
pub struct PrivateParts {
    /// Modulus.
    pub n: Zeroizing<Vec<u8>>,
    /// Public exponent.
    pub e: Zeroizing<Vec<u8>>,
    /// Private exponent.
    pub d: Zeroizing<Vec<u8>>,
    /// First prime.
    pub p: Zeroizing<Vec<u8>>,
    /// Second prime.
    pub q: Zeroizing<Vec<u8>>,
    /// `d mod (p - 1)`.
    pub dp: Zeroizing<Vec<u8>>,
    /// `d mod (q - 1)`.
    pub dq: Zeroizing<Vec<u8>>,
    /// `q⁻¹ mod p`.
    pub qinv: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for PrivateParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrivateParts").finish_non_exhaustive()
    }
}

/// An RSA private key in software: for owners, hosts, laboratories, and for importing into a token. A guardian's key in
/// service never leaves its HSM and is never one of these. Wiped from memory on drop.
pub struct RsaPrivateKey {
    public: RsaPublicKey,
    /// PKCS#8, two primes.
    pkcs8: Zeroizing<Vec<u8>>,
    parts: PrivateParts,
    signer: aws::KeyPair,
    decrypter: aws::OaepPrivateDecryptingKey,
    /// The key for the OAEP combinations that aws-lc lacks; made when one is first met. `None` if the rsa crate refuses it.
    mixed: OnceLock<Option<rsa::RsaPrivateKey>>,
}

impl RsaPrivateKey {
    /// A fresh key with public exponent 65537. `bits` is 2048, 3072, 4096 or 8192 (which takes seconds to minutes).
    ///
    /// # Errors
    /// [`KeyError::CannotGenerate`] for another size, or if the library failed.
    pub fn generate(bits: u32) -> Result<Self, KeyError> {
        let size = match bits {
            2048 => aws::KeySize::Rsa2048,
            3072 => aws::KeySize::Rsa3072,
            4096 => aws::KeySize::Rsa4096,
            8192 => aws::KeySize::Rsa8192,
            _ => return Err(KeyError::CannotGenerate(bits)),
        };
        Self::from_pair(aws::KeyPair::generate(size).map_err(|_| KeyError::CannotGenerate(bits))?)
    }

    /// A key from an unencrypted PKCS#8 structure in DER; two primes only.
    ///
    /// # Errors
    /// [`KeyError`]: not PKCS#8 ([`KeyError::Format`]), not RSA, not of accepted strength, or parts that do not belong together.
    pub fn from_pkcs8_der(der: &[u8]) -> Result<Self, KeyError> {
        // aws-lc says only yes or no; a reading of our own first says what is wrong.
        let public = {
            let parts = PrivateParts::read(der)?;
            RsaPublicKey::from_components(&parts.n, &parts.e)?
        };
        let key = Self::from_pair(aws::KeyPair::from_pkcs8(der).map_err(|_| KeyError::Inconsistent)?)?;
        if key.public != public {
            return Err(KeyError::Inconsistent);
        }
        Ok(key)
    }

    /// A key from PEM: one block `PRIVATE KEY`, not encrypted.
    ///
    /// # Errors
    /// As [`Self::from_pkcs8_der`]; [`KeyError::TrailingOctets`] if anything but white space follows the block.
    pub fn from_pkcs8_pem(text: &str) -> Result<Self, KeyError> {
        match pem_decode(text)? {
            ("PRIVATE KEY", der) => Self::from_pkcs8_der(&der),
            _ => Err(KeyError::Format),
        }
    }

    fn from_pair(signer: aws::KeyPair) -> Result<Self, KeyError> {
        let encoded = signer.as_der().map_err(|_| KeyError::Inconsistent)?;
        let pkcs8 = Zeroizing::new(encoded.as_ref().to_vec());
        let parts = PrivateParts::read(&pkcs8)?;
        let public = RsaPublicKey::from_components(&parts.n, &parts.e)?;
        let decrypter = aws::PrivateDecryptingKey::from_pkcs8(&pkcs8).map_err(|_| KeyError::Inconsistent)?;
        let decrypter = aws::OaepPrivateDecryptingKey::new(decrypter).map_err(|_| KeyError::Inconsistent)?;
        Ok(Self { public, pkcs8, parts, signer, decrypter, mixed: OnceLock::new() })
    }

    /// The key as PKCS#8 in DER, not encrypted.
    #[must_use]
    pub fn to_pkcs8_der(&self) -> &[u8] {
        &self.pkcs8
    }

    /// The key as PKCS#8 in PEM, not encrypted.
    #[must_use]
    pub fn to_pkcs8_pem(&self) -> Zeroizing<String> {
        pem::encode("PRIVATE KEY", &self.pkcs8)
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> &RsaPublicKey {
        &self.public
    }

    /// Signs `message`. The signature has as many octets as the modulus.
    ///
    /// # Errors
    /// [`SignError`] if the library failed.
    pub fn sign(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, SignError> {
        use SignatureAlgorithm::{Pkcs1, Pss};
        use aws_lc_rs::signature as aws_signature;
        let encoding: &'static dyn aws_signature::RsaEncoding = match algorithm {
            Pkcs1(SignatureDigest::Sha256) => &aws_signature::RSA_PKCS1_SHA256,
            Pkcs1(SignatureDigest::Sha384) => &aws_signature::RSA_PKCS1_SHA384,
            Pkcs1(SignatureDigest::Sha512) => &aws_signature::RSA_PKCS1_SHA512,
            Pss(SignatureDigest::Sha256) => &aws_signature::RSA_PSS_SHA256,
            Pss(SignatureDigest::Sha384) => &aws_signature::RSA_PSS_SHA384,
            Pss(SignatureDigest::Sha512) => &aws_signature::RSA_PSS_SHA512,
        };
        let mut signature = vec![0; self.public.modulus_len()];
        self.signer
            .sign(encoding, &aws_lc_rs::rand::SystemRandom::new(), message, &mut signature)
            .map_err(|_| SignError)?;
        Ok(signature)
    }

    /// Signs the message with this SHA-256, by [`SignatureAlgorithm::DEFAULT`].
    ///
    /// # Errors
    /// [`SignError`] if `digest` is no SHA-256, or the library failed.
    pub fn sign_digest(&self, digest: &[u8]) -> Result<Vec<u8>, SignError> {
        let digest = aws_digest::Digest::import_less_safe(digest, &aws_digest::SHA256).map_err(|_| SignError)?;
        let mut signature = vec![0; self.public.modulus_len()];
        let encoding = &aws_lc_rs::signature::RSA_PKCS1_SHA256;
        self.signer.sign_digest(encoding, &digest, &mut signature).map_err(|_| SignError)?;
        Ok(signature)
    }

    /// Decrypts RSA-OAEP with two equal digests and a label, as TPMs do.
    ///
    /// # Errors
    /// [`DecryptError`], whatever was wrong.
    pub(crate) fn decrypt_oaep_with_label(
        &self,
        oaep: Oaep,
        label: &[u8],
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, DecryptError> {
        self.decrypt_by_aws(aws_oaep(oaep).ok_or(DecryptError)?, Some(label), ciphertext)
    }

    fn decrypt_by_aws(
        &self,
        algorithm: &'static aws::OaepAlgorithm,
        label: Option<&[u8]>,
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, DecryptError> {
        let mut plaintext = Zeroizing::new(vec![0; self.decrypter.min_output_size()]);
        let written =
            self.decrypter.decrypt(algorithm, ciphertext, &mut plaintext, label).map_err(|_| DecryptError)?.len();
        plaintext.truncate(written);
        Ok(plaintext)
    }

    /// Decrypts RSA-OAEP, empty label.
    ///
    /// # Errors
    /// [`DecryptError`], whatever was wrong.
    pub fn decrypt_oaep(&self, oaep: Oaep, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, DecryptError> {
        match aws_oaep(oaep) {
            Some(algorithm) => self.decrypt_by_aws(algorithm, None, ciphertext),
            None => {
                let key = self.mixed.get_or_init(|| {
                    let parts = &self.parts;
                    let number = |octets: &[u8]| rsa::BigUint::from_bytes_be(octets);
                    let primes = vec![number(&parts.p), number(&parts.q)];
                    rsa::RsaPrivateKey::from_components(number(&parts.n), number(&parts.e), number(&parts.d), primes)
                        .ok()
                });
                let key = key.as_ref().ok_or(DecryptError)?;
                if ciphertext.len() != key.size() {
                    return Err(DecryptError);
                }
                key.decrypt_blinded(&mut rsa::rand_core::OsRng, mixed_oaep(oaep), ciphertext)
                    .map(Zeroizing::new)
                    .map_err(|_| DecryptError)
            }
        }
    }

    /// The numbers of the key.
    #[must_use]
    pub fn parts(&self) -> &PrivateParts {
        &self.parts
    }
}

impl fmt::Debug for RsaPrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RsaPrivateKey").field("public", &self.public).finish_non_exhaustive()
    }
}

impl PrivateParts {
    /// Reads PKCS#8 in DER without judging the numbers.
    fn read(pkcs8: &[u8]) -> Result<Self, KeyError> {
        use rsa::pkcs1::der::ErrorKind;
        let info = rsa::pkcs8::PrivateKeyInfo::try_from(pkcs8).map_err(|e| match e {
            rsa::pkcs8::Error::Asn1(e) if matches!(e.kind(), ErrorKind::TrailingData { .. }) => {
                KeyError::TrailingOctets
            }
            _ => KeyError::Format,
        })?;
        info.algorithm.assert_algorithm_oid(rsa::pkcs1::ALGORITHM_OID).map_err(|_| KeyError::NotRsa)?;
        let key = rsa::pkcs1::RsaPrivateKey::try_from(info.private_key).map_err(|_| KeyError::Format)?;
        if key.other_prime_infos.is_some() {
            return Err(KeyError::Format);
        }
        let octets = |number: rsa::pkcs1::UintRef<'_>| Zeroizing::new(number.as_bytes().to_vec());
        Ok(Self {
            n: octets(key.modulus),
            e: octets(key.public_exponent),
            d: octets(key.private_exponent),
            p: octets(key.prime1),
            q: octets(key.prime2),
            dp: octets(key.exponent1),
            dq: octets(key.exponent2),
            qinv: octets(key.coefficient),
        })
    }
}

/// aws-lc's name for OAEP with two equal digests; it has no others.
fn aws_oaep(oaep: Oaep) -> Option<&'static aws::OaepAlgorithm> {
    match (oaep.digest, oaep.mgf) {
        (Digest::Sha1, Digest::Sha1) => Some(&aws::OAEP_SHA1_MGF1SHA1),
        (Digest::Sha256, Digest::Sha256) => Some(&aws::OAEP_SHA256_MGF1SHA256),
        (Digest::Sha384, Digest::Sha384) => Some(&aws::OAEP_SHA384_MGF1SHA384),
        (Digest::Sha512, Digest::Sha512) => Some(&aws::OAEP_SHA512_MGF1SHA512),
        _ => None,
    }
}

fn mixed_oaep(oaep: Oaep) -> rsa::Oaep {
    rsa::Oaep { digest: dyn_digest(oaep.digest), mgf_digest: dyn_digest(oaep.mgf), label: None }
}

fn dyn_digest(digest: Digest) -> Box<dyn DynDigest + Send + Sync> {
    match digest {
        Digest::Sha1 => Box::new(sha1::Sha1::default()),
        Digest::Sha256 => Box::new(rsa::sha2::Sha256::default()),
        Digest::Sha384 => Box::new(rsa::sha2::Sha384::default()),
        Digest::Sha512 => Box::new(rsa::sha2::Sha512::default()),
    }
}

/// Octets of a digest.
fn digest_len(digest: Digest) -> usize {
    match digest {
        Digest::Sha1 => 20,
        Digest::Sha256 => 32,
        Digest::Sha384 => 48,
        Digest::Sha512 => 64,
    }
}

/// The value of at most 8 octets.
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

pub(crate) fn sha256(octets: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, octets).as_ref());
    out
}

/// The one PEM block of a text: its label and its content.
pub(crate) fn pem_decode(text: &str) -> Result<(&str, Zeroizing<Vec<u8>>), KeyError> {
    let mut blocks = pem::blocks(text).map_err(|_| KeyError::Format)?;
    match &mut blocks[..] {
        [block] if !block.encrypted => Ok((block.label, std::mem::take(&mut block.bytes))),
        [] | [_] => Err(KeyError::Format),
        _ => Err(KeyError::TrailingOctets),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod testing {
    //! Keys that the crate's unit tests share: making one takes a while.

    use std::sync::OnceLock;

    use super::RsaPrivateKey;

    /// One of three 2048-bit keys.
    pub(crate) fn key(index: usize) -> &'static RsaPrivateKey {
        static KEYS: [OnceLock<RsaPrivateKey>; 3] = [const { OnceLock::new() }; 3];
        KEYS[index].get_or_init(|| RsaPrivateKey::generate(2048).unwrap())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::testing::key;
    use super::*;

    const DIGESTS: [Digest; 4] = [Digest::Sha1, Digest::Sha256, Digest::Sha384, Digest::Sha512];
    const F4: &[u8] = &[1, 0, 1];

    /// An odd number of so many bits; nobody checks that a modulus has two prime factors.
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
        // The bounds of ring, aws-lc and the rsa crate differ; none may refuse what the judgement accepts.
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

    #[test]
    fn every_form_of_a_key_is_the_same_key() {
        let key = key(0).public();
        let spki = key.spki_der();
        let blob = key.to_bcrypt_blob();
        assert_eq!(&RsaPublicKey::from_spki_der(spki).unwrap(), key);
        assert_eq!(&RsaPublicKey::from_any(spki).unwrap(), key);
        assert_eq!(&RsaPublicKey::from_any(&blob).unwrap(), key);
        assert_eq!(
            &blob[..24],
            b"RSA1\x00\x08\x00\x00\x03\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
        );
        let without_null = spki_with(&[&tlv(0x06, RSA_ENCRYPTION.as_bytes())], spki);
        assert_eq!(&RsaPublicKey::from_any(&without_null).unwrap(), key);
    }

    fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
        crate::certificate::tlv(tag, &[content])
    }

    /// A SubjectPublicKeyInfo with these parts of an AlgorithmIdentifier and the key of `spki`.
    fn spki_with(algorithm: &[&[u8]], spki: &[u8]) -> Vec<u8> {
        // 4 octets of header and 15 of AlgorithmIdentifier precede the key.
        crate::certificate::tlv(0x30, &[&tlv(0x30, &algorithm.concat()), &spki[19..]])
    }

    #[test]
    fn what_is_not_exactly_a_key_is_refused() {
        let key = key(0).public();
        let spki = key.spki_der();
        let blob = key.to_bcrypt_blob();
        for good in [spki, &blob] {
            let longer = [good, &[0]].concat();
            assert_eq!(RsaPublicKey::from_any(&longer).unwrap_err(), KeyError::TrailingOctets);
            for length in 0..good.len() {
                assert_eq!(RsaPublicKey::from_any(&good[..length]).unwrap_err(), KeyError::Format);
            }
        }
        let rsa = tlv(0x06, RSA_ENCRYPTION.as_bytes());
        let pss = tlv(0x06, ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10").as_bytes());
        assert_eq!(RsaPublicKey::from_any(&spki_with(&[&pss], spki)).unwrap_err(), KeyError::NotRsa);
        assert_eq!(RsaPublicKey::from_any(&spki_with(&[&rsa, &tlv(4, b"")], spki)).unwrap_err(), KeyError::Format);

        let changed = |at: usize, value: u8| {
            let mut blob = blob.clone();
            blob[at] = value;
            RsaPublicKey::from_any(&blob).unwrap_err()
        };
        assert_eq!(changed(3, b'2'), KeyError::Format, "a private blob");
        assert_eq!(changed(4, 1), KeyError::Format, "another bit length");
        assert_eq!(changed(11, 0xff), KeyError::Format, "an exponent of 4 GB");
        assert_eq!(changed(15, 0xff), KeyError::Format, "a modulus of 4 GB");
        assert_eq!(changed(16, 1), KeyError::Format, "a prime");
        assert_eq!(changed(26, 0), KeyError::Exponent);
    }

    #[test]
    fn signatures() {
        use SignatureDigest::{Sha256, Sha384, Sha512};
        let all = [Sha256, Sha384, Sha512].into_iter();
        let all = all.flat_map(|digest| [SignatureAlgorithm::Pkcs1(digest), SignatureAlgorithm::Pss(digest)]);
        let all: Vec<_> = all.collect();
        for algorithm in &all {
            let signature = key(0).sign(*algorithm, b"message").unwrap();
            assert_eq!(signature.len(), key(0).public().modulus_len());
            for verifier in &all {
                let result = key(0).public().verify(*verifier, b"message", &signature);
                assert_eq!(result.is_ok(), algorithm == verifier, "{algorithm:?} {verifier:?}");
            }
            let public = key(0).public();
            assert_eq!(public.verify(*algorithm, b"massage", &signature), Err(BadSignature));
            assert_eq!(public.verify(*algorithm, b"message", &signature[1..]), Err(BadSignature));
            assert_eq!(public.verify(*algorithm, b"message", b""), Err(BadSignature));
            assert_eq!(key(1).public().verify(*algorithm, b"message", &signature), Err(BadSignature));
        }
    }

    #[test]
    fn oaep_in_every_combination() {
        for digest in DIGESTS {
            for mgf in DIGESTS {
                let oaep = Oaep { digest, mgf };
                let longest = vec![7; key(0).public().max_plaintext_len(oaep)];
                for plaintext in [&b""[..], b"a transport key", &longest] {
                    let sealed = key(0).public().encrypt_oaep(oaep, plaintext).unwrap();
                    assert_eq!(sealed.len(), 256);
                    assert_ne!(sealed, key(0).public().encrypt_oaep(oaep, plaintext).unwrap());
                    assert_eq!(key(0).decrypt_oaep(oaep, &sealed).unwrap().as_slice(), plaintext);
                    assert!(key(1).decrypt_oaep(oaep, &sealed).is_err());
                    let other = Oaep { digest, mgf: if mgf == Digest::Sha1 { Digest::Sha256 } else { Digest::Sha1 } };
                    assert!(key(0).decrypt_oaep(other, &sealed).is_err());
                }
                let too_long = [&longest[..], &[7]].concat();
                assert_eq!(key(0).public().encrypt_oaep(oaep, &too_long), Err(EncryptError::TooLong));
                for bad in [&[][..], &[0; 256], &[0xff; 256], &[1; 255], &[1; 257]] {
                    assert_eq!(key(0).decrypt_oaep(oaep, bad), Err(DecryptError));
                }
            }
        }
    }

    #[test]
    fn private_keys_travel_and_keep_quiet() {
        let key = key(0);
        let pem = key.to_pkcs8_pem();
        let again = RsaPrivateKey::from_pkcs8_pem(&pem).unwrap();
        assert_eq!(again.public(), key.public());
        assert_eq!(again.to_pkcs8_der(), key.to_pkcs8_der());
        let parts = again.parts();
        assert_eq!((parts.n.as_slice(), parts.e.as_slice()), (key.public().modulus(), key.public().exponent()));
        assert!([&parts.p, &parts.q, &parts.dp, &parts.dq, &parts.qinv].iter().all(|part| part.len() <= 128));
        let debug = format!("{key:?} {parts:?}");
        assert!(debug.len() < 300 && !debug.contains(&HEXLOWER.encode(&parts.d[..4])), "{debug}");

        let der = key.to_pkcs8_der();
        assert_eq!(RsaPrivateKey::from_pkcs8_der(&[der, &[0]].concat()).unwrap_err(), KeyError::TrailingOctets);
        for length in [0, 1, 30, der.len() - 1] {
            assert_eq!(RsaPrivateKey::from_pkcs8_der(&der[..length]).unwrap_err(), KeyError::Format);
        }
        // The last octet belongs to q⁻¹ mod p.
        let mut wrong = der.to_vec();
        *wrong.last_mut().unwrap() ^= 1;
        assert_eq!(RsaPrivateKey::from_pkcs8_der(&wrong).unwrap_err(), KeyError::Inconsistent);
        assert_eq!(RsaPrivateKey::from_pkcs8_pem("").unwrap_err(), KeyError::Format);
        assert_eq!(RsaPrivateKey::generate(1024).unwrap_err(), KeyError::CannotGenerate(1024));
    }
}
