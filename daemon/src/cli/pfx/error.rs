//! Errors of reading a PFX file.

use claviger_protocol::ber::BerError;
use claviger_protocol::rsa_key::KeyError;

/// Why a PFX file cannot be read. The message follows the file's name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PfxError {
    /// The file is not a PFX.
    #[error("it is no PFX (PKCS#12): {0}")]
    Other(String),
    /// The file is damaged.
    #[error("it is a damaged PFX: {part}: {source}; copy or export it again")]
    Damaged {
        /// The damaged part.
        part: &'static str,
        /// The parser's error.
        source: BerError,
    },
    /// The MAC does not match this password.
    #[error("the password is wrong: the MAC of the file is not that of this password (or somebody changed the file)")]
    Password,
    /// The file has no MAC, and the decrypted data is not valid.
    #[error(
        "{part} is not decrypted by this password; the file has no MAC, so it may be the password that is wrong, or the file \
         that is damaged"
    )]
    Unauthenticated {
        /// The encrypted part.
        part: &'static str,
    },
    /// The MAC matches, but the decrypted data is not valid.
    #[error(
        "the password is right for the file, but {part} is not decrypted by it: it has a password of its own, or is damaged; \
         export the file again, with one password"
    )]
    OtherPassword {
        /// The encrypted part.
        part: &'static str,
    },
    /// An algorithm or mode is not supported.
    #[error("{part} is protected by {name}, which is not read; {}", EXPORT_AGAIN)]
    Unsupported {
        /// The encrypted part.
        part: &'static str,
        /// Name and object identifier of the algorithm.
        name: String,
    },
    /// More work than an honest file makes.
    #[error(
        "its password is to be hashed {0} times, which is more than is done here; export it again, with fewer iterations"
    )]
    TooMuchWork(u64),
    /// The file contains no private key, or several.
    #[error("it holds {0} private keys, and exactly one is needed; export the one that is meant, with its certificate")]
    Keys(usize),
    /// The private key is not accepted.
    #[error("its private key: {0}")]
    Key(KeyError),
    /// No certificate in the file belongs to the key.
    #[error(
        "it holds no certificate of its private key (certificates: {found}, of which unreadable: {unreadable}); export it again, with the certificate"
    )]
    NoCertificate {
        /// Number of certificates in the file.
        found: usize,
        /// Number of certificates that cannot be parsed.
        unreadable: usize,
    },
}

/// The remedy for an unsupported algorithm.
const EXPORT_AGAIN: &str = "export it again with AES: in Windows choose \"AES256-SHA256\"; with openssl: openssl pkcs12 -in FILE \
                            -nodes | openssl pkcs12 -export -out NEW";

pub(super) fn damaged(part: &'static str) -> impl Fn(BerError) -> PfxError {
    move |source| PfxError::Damaged { part, source }
}
