//! Reads keys and certificates in all forms that hosts and administrators use.
//!
//! These functions are not next to their types, because the formats depend on each other: a public key may come in a
//! certificate.

use crate::certificate::{Certificate, CertificateError};
use crate::input::{self, InputError};
use crate::rsa_key::{BCRYPT_MAGIC, KeyError, RsaPublicKey};

impl RsaPublicKey {
    /// Reads a key in a form that hosts send: the DER of a SubjectPublicKeyInfo or of an X.509 certificate, or a
    /// `BCRYPT_RSAPUBLIC_BLOB` (`RSA1`).
    ///
    /// # Errors
    /// [`KeyError`]; [`KeyError::Format`] if the bytes have none of the three forms.
    pub fn from_any(octets: &[u8]) -> Result<Self, KeyError> {
        if octets.starts_with(BCRYPT_MAGIC) {
            return Self::from_bcrypt_blob(octets);
        }
        match Self::from_spki_der(octets) {
            // A certificate's first element is not an algorithm identifier, so `from_spki_der` returns `Format` for it.
            Err(KeyError::Format) => match Certificate::parse(octets) {
                Ok(certificate) => Ok(certificate.key().clone()),
                Err(CertificateError::NotX509) => Err(KeyError::Format),
                Err(CertificateError::TrailingOctets) => Err(KeyError::TrailingOctets),
                Err(CertificateError::Key(e)) => Err(e),
            },
            other => other,
        }
    }

    /// Reads a key from an administrator's file, in any form that [`input::public_key`] supports.
    ///
    /// # Errors
    /// [`InputError`].
    pub fn from_file(bytes: &[u8]) -> Result<Self, InputError> {
        input::public_key(bytes)
    }
}

impl Certificate {
    /// Reads the one certificate of an administrator's file, in any form that [`input::certificate`] supports.
    ///
    /// # Errors
    /// [`InputError`].
    pub fn from_file(bytes: &[u8]) -> Result<Self, InputError> {
        input::certificate(bytes)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use der::asn1::ObjectIdentifier;

    use super::*;
    use crate::rsa_key::testing::key;

    const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");

    #[test]
    fn every_form_of_a_key_is_the_same_key() {
        let key = key(0).public();
        let spki = key.spki_der();
        let blob = key.to_bcrypt_blob();
        assert_eq!(&RsaPublicKey::from_spki_der(spki).unwrap(), key);
        assert_eq!(&RsaPublicKey::from_any(spki).unwrap(), key);
        assert_eq!(&RsaPublicKey::from_any(&blob).unwrap(), key);
        assert_eq!(
            &blob[..24],
            b"RSA1\x00\x08\x00\x00\x03\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
        );
        let without_null = spki_with(&[&tlv(0x06, RSA_ENCRYPTION.as_bytes())], spki);
        assert_eq!(&RsaPublicKey::from_any(&without_null).unwrap(), key);
    }

    fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
        crate::ber::tlv(tag, &[content])
    }

    /// A SubjectPublicKeyInfo with the key of `spki` and these parts as its AlgorithmIdentifier.
    fn spki_with(algorithm: &[&[u8]], spki: &[u8]) -> Vec<u8> {
        // The key follows 4 bytes of header and 15 bytes of AlgorithmIdentifier.
        crate::ber::tlv(0x30, &[&tlv(0x30, &algorithm.concat()), &spki[19..]])
    }

    #[test]
    fn what_is_not_exactly_a_key_is_refused() {
        let key = key(0).public();
        let spki = key.spki_der();
        let blob = key.to_bcrypt_blob();
        for good in [spki, &blob] {
            let longer = [good, &[0]].concat();
            assert_eq!(RsaPublicKey::from_any(&longer).unwrap_err(), KeyError::TrailingOctets);
            for length in 0..good.len() {
                assert_eq!(RsaPublicKey::from_any(&good[..length]).unwrap_err(), KeyError::Format);
            }
        }
        let rsa = tlv(0x06, RSA_ENCRYPTION.as_bytes());
        let pss = tlv(0x06, ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10").as_bytes());
        assert_eq!(RsaPublicKey::from_any(&spki_with(&[&pss], spki)).unwrap_err(), KeyError::NotRsa);
        assert_eq!(RsaPublicKey::from_any(&spki_with(&[&rsa, &tlv(4, b"")], spki)).unwrap_err(), KeyError::Format);

        let changed = |at: usize, value: u8| {
            let mut blob = blob.clone();
            blob[at] = value;
            RsaPublicKey::from_any(&blob).unwrap_err()
        };
        assert_eq!(changed(3, b'2'), KeyError::Format, "a private blob");
        assert_eq!(changed(4, 1), KeyError::Format, "another bit length");
        assert_eq!(changed(11, 0xff), KeyError::Format, "an exponent of 4 GB");
        assert_eq!(changed(15, 0xff), KeyError::Format, "a modulus of 4 GB");
        assert_eq!(changed(16, 1), KeyError::Format, "a prime");
        assert_eq!(changed(26, 0), KeyError::Exponent);
    }
}
