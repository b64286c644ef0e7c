//! Protectors that the tenant's own tools do not create.

use claviger_protocol::algorithm::{Oaep, SignatureAlgorithm};
use claviger_protocol::build::{Unsigned, fresh_transport_key};
use claviger_protocol::metadata::Metadata;
use claviger_protocol::owner::Owner;
use claviger_protocol::protector::{Encryption, Protector, TransportKey};
use data_encoding::BASE64;

/// Creates a protector for the owner and one guardian, whose wrapping is encrypted with `oaep`; also returns its transport
/// key.
///
/// # Panics
/// If it cannot be created.
#[must_use]
pub fn with_oaep(owner: &Owner, guardian: &Metadata, oaep: Oaep) -> (Vec<u8>, TransportKey) {
    let (file, _) = owner.create(std::slice::from_ref(guardian)).unwrap();
    let mut wrappings = Protector::parse(&file).unwrap().wrappings;
    wrappings[1].encryption = Encryption { oaep, version_11: oaep != Oaep::SHA1 };
    let key = fresh_transport_key().unwrap();
    let recipients = [owner.encryption_key.public(), &guardian.encryption_key];
    let unsigned = Unsigned::new(&wrappings, recipients, &key, 0).unwrap();
    let algorithm = SignatureAlgorithm::DEFAULT;
    let signature = owner.signing_key.sign(algorithm, &unsigned.signed_octets()).unwrap();
    (unsigned.finish(wrappings[0].id, algorithm, signature).unwrap(), key)
}

/// Replaces the ciphertext of the second wrapping and renews the owner's signature, so that only the transport key is
/// wrong.
///
/// # Panics
/// If the protector was not created by [`with_oaep`].
#[must_use]
pub fn with_cipher(owner: &Owner, file: &[u8], change: impl FnOnce(&[u8]) -> Vec<u8>) -> Vec<u8> {
    let text = std::str::from_utf8(file).unwrap();
    let parsed = Protector::parse(file).unwrap();
    let (old, new) = (&parsed.wrappings[1].cipher_value, change(&parsed.wrappings[1].cipher_value));
    let (old, new) = (BASE64.encode(old), BASE64.encode(&new));
    assert_eq!(text.matches(&old).count(), 1);
    let changed = text.replace(&old, &new);
    let octets = Protector::parse(changed.as_bytes()).unwrap().signed_octets;
    let signature = owner.signing_key.sign(parsed.guardian_signature.algorithm, &octets).unwrap();
    let (old, new) = (BASE64.encode(&parsed.guardian_signature.value), BASE64.encode(&signature));
    assert_eq!(changed.matches(&old).count(), 1);
    changed.replace(&old, &new).into_bytes()
}
