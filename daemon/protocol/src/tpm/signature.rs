//! `TPMT_SIGNATURE`: an attestation key's signature over a quote.

use super::reader::{P256_BYTES, Reader, padded};
use super::{Malformed, algorithm};

/// Longest RSA signature.
const MAX_RSA: usize = 512;

/// A signature with SHA-256. It is not verified yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Signature<'a> {
    /// RSASSA-PKCS1-v1_5.
    Rsassa(&'a [u8]),
    /// ECDSA on P-256: r and s, 32 bytes each.
    Ecdsa([u8; 64]),
}

impl<'a> Signature<'a> {
    /// Parses a `TPMT_SIGNATURE`.
    ///
    /// # Errors
    /// [`Malformed`], also for other schemes or digests.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let scheme = reader.u16_be()?;
        if reader.u16_be()? != algorithm::SHA256 {
            return Err(Malformed("the signature is not of SHA-256"));
        }
        let signature = match scheme {
            algorithm::RSASSA => Self::Rsassa(reader.sized(MAX_RSA)?),
            algorithm::ECDSA => {
                let mut both = [0; 64];
                for number in both.as_chunks_mut::<P256_BYTES>().0 {
                    *number = padded(reader.sized(P256_BYTES)?);
                }
                Self::Ecdsa(both)
            }
            _ => return Err(Malformed("the signature's scheme is neither RSASSA nor ECDSA")),
        };
        reader.finish()?;
        Ok(signature)
    }

    /// The signature as `TPMT_SIGNATURE`.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let scheme = match self {
            Self::Rsassa(_) => algorithm::RSASSA,
            Self::Ecdsa(_) => algorithm::ECDSA,
        };
        let mut out = [scheme.to_be_bytes(), algorithm::SHA256.to_be_bytes()].concat();
        let numbers = match self {
            Self::Rsassa(signature) => vec![*signature],
            Self::Ecdsa(both) => both.chunks(P256_BYTES).collect(),
        };
        for number in numbers {
            out.extend_from_slice(&(number.len() as u16).to_be_bytes());
            out.extend_from_slice(number);
        }
        out
    }
}
