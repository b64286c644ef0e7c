//! `TPMT_PUBLIC`: the public area of a TPM's key. It decides whether the key can be an attestation key.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ParsedPublicKey};
use ring::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};

use super::reader::{P256_BYTES, Reader, padded};
use super::signature::Signature;
use super::{Malformed, NIST_P256, algorithm};
use crate::algorithm::{SignatureAlgorithm, SignatureDigest};
use crate::hash::sha256;
use crate::rsa_key::RsaPublicKey;

/// Bits of `TPMA_OBJECT` (TPM 2.0 Part 2, table 31).
mod attribute {
    pub(super) const FIXED_TPM: u32 = 1 << 1;
    pub(super) const FIXED_PARENT: u32 = 1 << 4;
    pub(super) const SENSITIVE_DATA_ORIGIN: u32 = 1 << 5;
    pub(super) const USER_WITH_AUTH: u32 = 1 << 6;
    pub(super) const ADMIN_WITH_POLICY: u32 = 1 << 7;
    pub(super) const NO_DA: u32 = 1 << 10;
    pub(super) const RESTRICTED: u32 = 1 << 16;
    pub(super) const DECRYPT: u32 = 1 << 17;
    pub(super) const SIGN: u32 = 1 << 18;
}

/// Longest policy digest.
const MAX_DIGEST: usize = 64;
/// Longest RSA modulus of a TPM's key.
const MAX_RSA: usize = 512;
/// Sizes of an attestation key's modulus in bits.
const RSA_BITS: std::ops::RangeInclusive<u16> = 2048..=4096;

/// The policy of the endorsement key of TCG's default template: `PolicySecret` of the endorsement hierarchy.
const EK_POLICY: [u8; 32] = [
    0x83, 0x71, 0x97, 0x67, 0x44, 0x84, 0xb3, 0xf8, 0x1a, 0x90, 0xcc, 0x8d, 0x46, 0xa5, 0xd7, 0x24, 0xfd, 0x52, 0xd7,
    0x6e, 0x06, 0x52, 0x0b, 0x64, 0xf2, 0xa1, 0xda, 0x1b, 0x33, 0x14, 0x69, 0xaa,
];

/// An accepted attestation key: by its public area, a restricted signing key that never leaves its TPM.
#[derive(Clone, Debug)]
pub struct AttestationKey {
    name: [u8; 34],
    key: Key,
}

#[derive(Clone, Debug)]
enum Key {
    Rsa(RsaPublicKey),
    /// An uncompressed point.
    P256([u8; 1 + 2 * P256_BYTES]),
}

impl AttestationKey {
    /// Parses the `TPMT_PUBLIC` of an attestation key and checks its kind.
    ///
    /// # Errors
    /// [`Malformed`], also if the protocol does not accept this kind of key.
    pub fn parse(public: &[u8]) -> Result<Self, Malformed> {
        const REQUIRED: u32 = attribute::FIXED_TPM
            | attribute::FIXED_PARENT
            | attribute::SENSITIVE_DATA_ORIGIN
            | attribute::RESTRICTED
            | attribute::SIGN;
        let mut reader = Reader::new(public);
        let kind = reader.u16_be()?;
        if reader.u16_be()? != algorithm::SHA256 {
            return Err(Malformed("the key's name algorithm is not SHA-256"));
        }
        let attributes = reader.u32_be()?;
        if attributes & REQUIRED != REQUIRED || attributes & attribute::DECRYPT != 0 {
            return Err(Malformed("the key is not a restricted signing key that is fixed to its TPM"));
        }
        reader.sized(MAX_DIGEST)?;
        if reader.u16_be()? != algorithm::NULL {
            return Err(Malformed("the key has a symmetric algorithm"));
        }
        let key = match kind {
            algorithm::RSA => Key::Rsa(rsa(&mut reader)?),
            algorithm::ECC => Key::P256(p256(&mut reader)?),
            _ => return Err(Malformed("the key is neither RSA nor ECC")),
        };
        reader.finish()?;
        Ok(Self { name: name(public), key })
    }

    /// The key's name: its name algorithm and the digest of its public area.
    #[must_use]
    pub fn name(&self) -> &[u8; 34] {
        &self.name
    }

    /// Whether the signature over `message` is from this key, with the key's own scheme.
    #[must_use]
    pub fn verifies(&self, message: &[u8], signature: &Signature<'_>) -> bool {
        match (&self.key, signature) {
            (Key::Rsa(key), Signature::Rsassa(signature)) => {
                key.verify(SignatureAlgorithm::Pkcs1(SignatureDigest::Sha256), message, signature).is_ok()
            }
            (Key::P256(point), Signature::Ecdsa(signature)) => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(message, signature).is_ok()
            }
            _ => false,
        }
    }
}

/// The parameters and modulus of an RSA key that signs with RSASSA and SHA-256.
fn rsa(reader: &mut Reader<'_>) -> Result<RsaPublicKey, Malformed> {
    if reader.u16_be()? != algorithm::RSASSA || reader.u16_be()? != algorithm::SHA256 {
        return Err(Malformed("the key's scheme is not RSASSA with SHA-256"));
    }
    let bits = reader.u16_be()?;
    if !RSA_BITS.contains(&bits) {
        return Err(Malformed("the key does not have 2048 to 4096 bits"));
    }
    if reader.u32_be()? != 0 {
        return Err(Malformed("the key's exponent is not written as 0, which means 65537"));
    }
    let modulus = reader.sized(MAX_RSA)?;
    if modulus.len() * 8 != usize::from(bits) || modulus.first().is_none_or(|first| first >> 7 == 0) {
        return Err(Malformed("the key's modulus is shorter or longer than it says"));
    }
    RsaPublicKey::from_components(modulus, &[1, 0, 1]).map_err(|_| Malformed("the key's modulus is not accepted"))
}

/// The parameters and point of a key on P-256 that signs with ECDSA and SHA-256.
fn p256(reader: &mut Reader<'_>) -> Result<[u8; 1 + 2 * P256_BYTES], Malformed> {
    if reader.u16_be()? != algorithm::ECDSA || reader.u16_be()? != algorithm::SHA256 {
        return Err(Malformed("the key's scheme is not ECDSA with SHA-256"));
    }
    if reader.u16_be()? != NIST_P256 {
        return Err(Malformed("the key's curve is not P-256"));
    }
    if reader.u16_be()? != algorithm::NULL {
        return Err(Malformed("the key has a key derivation"));
    }
    let mut point = [0; 1 + 2 * P256_BYTES];
    point[0] = 4;
    for coordinate in point[1..].as_chunks_mut::<P256_BYTES>().0 {
        *coordinate = padded(reader.sized(P256_BYTES)?);
    }
    match ParsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point) {
        Ok(_) => Ok(point),
        Err(_) => Err(Malformed("the key is not a point of its curve")),
    }
}

/// The name of a key: the identifier of SHA-256, then the SHA-256 of its public area.
fn name(public: &[u8]) -> [u8; 34] {
    let mut name = [0; 34];
    name[..2].copy_from_slice(&algorithm::SHA256.to_be_bytes());
    name[2..].copy_from_slice(&sha256(public));
    name
}

/// The public key in the `TPMT_PUBLIC` of an RSA endorsement key, as `TPM2_CreatePrimary` returns it.
///
/// # Errors
/// [`Malformed`], also if the key does not follow TCG's default template.
pub fn endorsement_key(public: &[u8]) -> Result<RsaPublicKey, Malformed> {
    let template = endorsement_template();
    let modulus = template.len().checked_sub(2 + 256).and_then(|at| public.split_at_checked(at));
    match modulus {
        Some((front, back)) if template.starts_with(front) => {
            let mut reader = Reader::new(back);
            let modulus = reader.sized(256)?;
            reader.finish()?;
            RsaPublicKey::from_components(modulus, &[1, 0, 1]).map_err(|_| Malformed("the modulus is not accepted"))
        }
        _ => Err(Malformed("the key is not an endorsement key of TCG's default template")),
    }
}

/// The `TPMT_PUBLIC` template of an RSA endorsement key: TCG's default template (EK Credential Profile, L-1).
#[must_use]
pub fn endorsement_template() -> Vec<u8> {
    const ATTRIBUTES: u32 = attribute::FIXED_TPM
        | attribute::FIXED_PARENT
        | attribute::SENSITIVE_DATA_ORIGIN
        | attribute::ADMIN_WITH_POLICY
        | attribute::RESTRICTED
        | attribute::DECRYPT;
    let mut out = front(algorithm::RSA, ATTRIBUTES, &EK_POLICY);
    // AES with 128 bits in CFB, no scheme, 2048 bits.
    for field in [0x0006, 128, 0x0043, algorithm::NULL, 2048] {
        out.extend_from_slice(&u16::to_be_bytes(field));
    }
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&256_u16.to_be_bytes());
    out.extend_from_slice(&[0; 256]);
    out
}

/// The `TPMT_PUBLIC` template of an attestation key on P-256.
#[must_use]
pub fn attestation_template() -> Vec<u8> {
    const ATTRIBUTES: u32 = attribute::FIXED_TPM
        | attribute::FIXED_PARENT
        | attribute::SENSITIVE_DATA_ORIGIN
        | attribute::USER_WITH_AUTH
        | attribute::NO_DA
        | attribute::RESTRICTED
        | attribute::SIGN;
    let mut out = front(algorithm::ECC, ATTRIBUTES, &[]);
    for field in [algorithm::NULL, algorithm::ECDSA, algorithm::SHA256, NIST_P256, algorithm::NULL, 0, 0] {
        out.extend_from_slice(&u16::to_be_bytes(field));
    }
    out
}

/// The fields at the beginning of every kind of key.
fn front(kind: u16, attributes: u32, policy: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&algorithm::SHA256.to_be_bytes());
    out.extend_from_slice(&attributes.to_be_bytes());
    out.extend_from_slice(&(policy.len() as u16).to_be_bytes());
    out.extend_from_slice(policy);
    out
}
