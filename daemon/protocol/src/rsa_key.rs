//! RSA keys: judged, in canonical form, and put to use.
//!
//! A key that exists as an [`RsaPublicKey`] has passed the profile's judgement of strength; no caller has to repeat it.

mod error;
mod private;
mod public;

pub use self::error::{BadSignature, DecryptError, EncryptError, KeyError, SignError};
pub use self::private::{PrivateParts, RsaPrivateKey};
pub(crate) use self::public::BCRYPT_MAGIC;
pub use self::public::{MAX_EXPONENT, MAX_MODULUS_BITS, MIN_EXPONENT, MIN_MODULUS_BITS, RsaPublicKey};

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
