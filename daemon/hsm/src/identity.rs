//! Identity of a private key across members.
//!
//! PKCS#11 does not make `CKA_ID` unique: two RSA keys of a token may have the same id. The id narrows the search; the
//! public key decides.

use std::fmt;
use std::fmt::Write as _;

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

/// A key's `CKA_ID`. It is the same on every member, unlike object handles.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct KeyId(pub Vec<u8>);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|octet| write!(f, "{octet:02x}"))
    }
}

/// SHA-256 of an RSA modulus (big-endian, without leading zeros). It identifies a public key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Computes the fingerprint of a big-endian modulus; leading zeros are ignored.
    #[must_use]
    pub fn of_modulus(n: &[u8]) -> Self {
        let mut sum = [0; 32];
        sum.copy_from_slice(digest(&SHA256, without_leading_zeros(n)).as_ref());
        Fingerprint(sum)
    }

    /// Returns the SHA-256 value.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Identifies one private key on every member.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct KeyRef {
    /// The `CKA_ID`.
    pub id: KeyId,
    /// Fingerprint of the public key.
    pub public: Fingerprint,
}

impl KeyRef {
    /// Creates the reference to the key with this `CKA_ID` and this modulus.
    #[must_use]
    pub fn new(id: KeyId, modulus: &[u8]) -> Self {
        KeyRef { id, public: Fingerprint::of_modulus(modulus) }
    }
}

impl fmt::Display for KeyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.public.0.iter().take(4).fold(String::new(), |mut digits, byte| {
            let _ = write!(digits, "{byte:02x}");
            digits
        });
        write!(f, "{} (modulus {digits}…)", self.id)
    }
}

pub(crate) fn without_leading_zeros(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    number.split_at(zeros).1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_ids_print_as_lower_hex() {
        assert_eq!(KeyId(vec![0, 0xab, 0x10]).to_string(), "00ab10");
    }

    #[test]
    fn leading_zeros_do_not_make_another_key() {
        assert_eq!(Fingerprint::of_modulus(&[0, 0, 0x9f, 1]), Fingerprint::of_modulus(&[0x9f, 1]));
        assert_ne!(Fingerprint::of_modulus(&[0x9f, 1, 0]), Fingerprint::of_modulus(&[0x9f, 1]));
    }

    #[test]
    fn keys_of_one_id_are_told_apart() {
        let [one, other] = [1, 2].map(|n| KeyRef::new(KeyId(vec![5]), &[n]));
        assert_ne!(one, other);
        assert_ne!(one.to_string(), other.to_string());
        assert!(one.to_string().starts_with("05 (modulus "), "{one}");
    }
}
