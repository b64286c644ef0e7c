//! RSA private keys in software.

use std::fmt;
use std::sync::OnceLock;

use aws_lc_rs::encoding::AsDer as _;
use aws_lc_rs::{digest as aws_digest, rsa as aws};
use rsa::sha2::digest::DynDigest;
use rsa::traits::PublicKeyParts as _;
use zeroize::Zeroizing;

use super::error::{DecryptError, KeyError, SignError};
use super::public::{RsaPublicKey, aws_oaep};
use crate::algorithm::{Digest, Oaep, SignatureAlgorithm, SignatureDigest};
use crate::pem;

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

/// An RSA private key in software: for owners, hosts, laboratories, and for import into a token. A guardian's
/// production key never leaves its HSM and never has this type. Wiped from memory on drop.
pub struct RsaPrivateKey {
    public: RsaPublicKey,
    /// PKCS#8, two primes.
    pkcs8: Zeroizing<Vec<u8>>,
    parts: PrivateParts,
    signer: aws::KeyPair,
    decrypter: aws::OaepPrivateDecryptingKey,
    /// The key for OAEP combinations that aws-lc lacks; made on first use. `None` if the rsa crate rejects the key.
    mixed: OnceLock<Option<rsa::RsaPrivateKey>>,
}

impl RsaPrivateKey {
    /// Generates a key with public exponent 65537. `bits` is 2048, 3072, 4096 or 8192 (which takes seconds to minutes).
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

    /// Reads an unencrypted PKCS#8 structure in DER; only keys with two primes.
    ///
    /// # Errors
    /// [`KeyError`]: not PKCS#8 ([`KeyError::Format`]), not RSA, not strong enough, or inconsistent.
    pub fn from_pkcs8_der(der: &[u8]) -> Result<Self, KeyError> {
        // aws-lc gives no reason when it rejects a key, so our own checks run first.
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

    /// Reads PEM: one unencrypted `PRIVATE KEY` block.
    ///
    /// # Errors
    /// As [`Self::from_pkcs8_der`]; [`KeyError::TrailingOctets`] if anything but white space follows the block.
    pub fn from_pkcs8_pem(text: &str) -> Result<Self, KeyError> {
        match pem::only_block(text)? {
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

    /// The key as unencrypted PKCS#8 in DER.
    #[must_use]
    pub fn to_pkcs8_der(&self) -> &[u8] {
        &self.pkcs8
    }

    /// The key as unencrypted PKCS#8 in PEM.
    #[must_use]
    pub fn to_pkcs8_pem(&self) -> Zeroizing<String> {
        pem::encode("PRIVATE KEY", &self.pkcs8)
    }

    /// The public key.
    #[must_use]
    pub fn public(&self) -> &RsaPublicKey {
        &self.public
    }

    /// Signs `message`. The signature has as many bytes as the modulus.
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

    /// Signs a message by its SHA-256, with [`SignatureAlgorithm::DEFAULT`].
    ///
    /// # Errors
    /// [`SignError`] if `digest` does not have 32 bytes, or the library failed.
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
    /// [`DecryptError`] for every failure.
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

    /// Decrypts RSA-OAEP with an empty label.
    ///
    /// # Errors
    /// [`DecryptError`] for every failure.
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

    /// The numbers of the key, for import into a token.
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
    /// Parses PKCS#8 in DER without checking the numbers.
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use data_encoding::HEXLOWER;

    use super::super::error::{BadSignature, EncryptError};
    use super::super::testing::key;
    use super::*;

    const DIGESTS: [Digest; 4] = [Digest::Sha1, Digest::Sha256, Digest::Sha384, Digest::Sha512];

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
        // The last byte belongs to q⁻¹ mod p.
        let mut wrong = der.to_vec();
        *wrong.last_mut().unwrap() ^= 1;
        assert_eq!(RsaPrivateKey::from_pkcs8_der(&wrong).unwrap_err(), KeyError::Inconsistent);
        assert_eq!(RsaPrivateKey::from_pkcs8_pem("").unwrap_err(), KeyError::Format);
        assert_eq!(RsaPrivateKey::generate(1024).unwrap_err(), KeyError::CannotGenerate(1024));
    }
}
