//! Why a key is not accepted, and what goes wrong with one that is.

use crate::pem::NotOneBlock;

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

impl From<NotOneBlock> for KeyError {
    fn from(error: NotOneBlock) -> Self {
        match error {
            NotOneBlock::Unreadable => Self::Format,
            NotOneBlock::Several => Self::TrailingOctets,
        }
    }
}
