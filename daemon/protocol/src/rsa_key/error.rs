//! Errors of parsing and using keys.

use crate::pem::NotOneBlock;

/// Why bytes are not an accepted key.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KeyError {
    /// The bytes have none of the expected formats.
    #[error("the key is in none of the accepted formats")]
    Format,
    /// Bytes follow the key.
    #[error("there are octets after the key")]
    TrailingOctets,
    /// The key's algorithm is not plain RSA (`rsaEncryption`).
    #[error("the key is not an RSA key (rsaEncryption)")]
    NotRsa,
    /// The modulus has this number of bits, which is not accepted.
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
    /// Keys with this number of bits cannot be generated.
    #[error("cannot generate an RSA key of {0} bits: 2048, 3072, 4096 and 8192 are possible")]
    CannotGenerate(u32),
}

/// The signature is not valid for this key and this message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the signature is wrong")]
pub struct BadSignature;

/// Why an encryption failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EncryptError {
    /// The plaintext is longer than OAEP allows with these digests and this key.
    #[error("the plaintext is too long for this key and these digests")]
    TooLong,
    /// The cryptographic library failed: no memory or no randomness.
    #[error("RSA-OAEP encryption failed")]
    Failed,
}

/// The decryption failed. There is no reason given, because it would be an oracle.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("RSA-OAEP decryption failed")]
pub struct DecryptError;

/// The signature failed in the cryptographic library: no memory, or a fault in its arithmetic.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("RSA signing failed")]
pub struct SignError;

impl From<NotOneBlock> for KeyError {
    fn from(error: NotOneBlock) -> Self {
        match error {
            NotOneBlock::Unreadable => Self::Format,
            NotOneBlock::Several => Self::TrailingOctets,
        }
    }
}
