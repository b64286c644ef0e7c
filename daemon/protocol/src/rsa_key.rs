//! RSA keys: strength checks, canonical form, operations.
//!
//! Every [`RsaPublicKey`] has passed the strength check of the protocol; callers need not repeat it.

mod error;
mod private;
mod public;

pub use self::error::{BadSignature, DecryptError, EncryptError, KeyError, SignError};
pub use self::private::{PrivateParts, RsaPrivateKey};
pub(crate) use self::public::BCRYPT_MAGIC;
pub use self::public::RsaPublicKey;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod testing {
    //! Keys that the unit tests of this crate share, because generating a key is slow.

    use std::sync::OnceLock;

    use super::RsaPrivateKey;

    /// One of three 2048-bit keys.
    pub(crate) fn key(index: usize) -> &'static RsaPrivateKey {
        static KEYS: [OnceLock<RsaPrivateKey>; 3] = [const { OnceLock::new() }; 3];
        KEYS[index].get_or_init(|| RsaPrivateKey::generate(2048).unwrap())
    }
}
