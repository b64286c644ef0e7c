//! Why a file is not opened.

use claviger_protocol::ber::BerError;
use claviger_protocol::rsa_key::KeyError;

/// Why a file is not opened. Each message is to stand after the file's name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PfxError {
    /// It is something else.
    #[error("it is no PFX (PKCS#12): {0}")]
    Other(String),
    /// It is damaged.
    #[error("it is a damaged PFX: {part}: {source}; copy or export it again")]
    Damaged {
        /// Which part of it.
        part: &'static str,
        /// What is wrong with it.
        source: BerError,
    },
    /// The MAC is another one than that of this password.
    #[error("the password is wrong: the MAC of the file is not that of this password (or somebody changed the file)")]
    Password,
    /// There is no MAC, and what comes out of the decryption is nothing.
    #[error(
        "{part} is not decrypted by this password; the file has no MAC, so it may be the password that is wrong, or the file \
         that is damaged"
    )]
    Unauthenticated {
        /// Which part of it.
        part: &'static str,
    },
    /// The MAC is right, and the decryption gives nothing.
    #[error(
        "the password is right for the file, but {part} is not decrypted by it: it has a password of its own, or is damaged; \
         export the file again, with one password"
    )]
    OtherPassword {
        /// Which part of it.
        part: &'static str,
    },
    /// An algorithm or a mode that is not read.
    #[error("{part} is protected by {name}, which is not read; {}", EXPORT_AGAIN)]
    Unsupported {
        /// Which part of it.
        part: &'static str,
        /// Name and object identifier.
        name: String,
    },
    /// More work than an honest file makes.
    #[error(
        "its password is to be hashed {0} times, which is more than is done here; export it again, with fewer iterations"
    )]
    TooMuchWork(u64),
    /// Another number of private keys than one.
    #[error("it holds {0} private keys, and exactly one is needed; export the one that is meant, with its certificate")]
    Keys(usize),
    /// The private key.
    #[error("its private key: {0}")]
    Key(KeyError),
    /// No certificate is that of the key.
    #[error(
        "it holds no certificate of its private key (certificates: {found}, of which unreadable: {unreadable}); export it again, with the certificate"
    )]
    NoCertificate {
        /// How many there are.
        found: usize,
        /// How many of them are none.
        unreadable: usize,
    },
}

/// What to do about an algorithm that is not read.
const EXPORT_AGAIN: &str = "export it again with AES: in Windows choose \"AES256-SHA256\"; with openssl: openssl pkcs12 -in FILE \
                            -nodes | openssl pkcs12 -export -out NEW";

pub(super) fn damaged(part: &'static str) -> impl Fn(BerError) -> PfxError {
    move |source| PfxError::Damaged { part, source }
}
