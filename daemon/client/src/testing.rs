//! What the tests of several modules need: certificates and protectors.
#![allow(clippy::unwrap_used)]

use claviger_protocol::certificate::build::{DistinguishedName, Template, random_serial};
use claviger_protocol::certificate::{Certificate, KeyUsage};
use claviger_protocol::owner::Owner;
use claviger_protocol::protector::TransportKey;
use claviger_protocol::rsa_key::RsaPrivateKey;

/// Makes a self-signed certificate for a key, valid now.
pub(crate) fn self_signed(common_name: &str, key: &RsaPrivateKey) -> Certificate {
    let now = claviger_process::clock::unix_now();
    let template = Template {
        subject: DistinguishedName::new(common_name),
        issuer_der: None,
        key: key.public().clone(),
        serial: random_serial().unwrap(),
        not_before: now - 300,
        not_after: now + 300,
        key_usage: KeyUsage::DIGITAL_SIGNATURE,
        extended_key_usages: Vec::new(),
        ca: None,
        subject_key_id: None,
        authority_key_id: None,
        dns_names: Vec::new(),
    };
    Certificate::parse(&template.to_be_signed().unwrap().sign_with(key).unwrap()).unwrap()
}

/// A fresh protector of one owner for nobody else, and its transport key.
pub(crate) fn protector() -> (Vec<u8>, TransportKey) {
    static OWNER: std::sync::LazyLock<Owner> = std::sync::LazyLock::new(|| {
        let [signing_key, encryption_key] = [(); 2].map(|()| RsaPrivateKey::generate(2048).unwrap());
        let signing_certificate = self_signed("owner signing", &signing_key);
        let encryption_certificate = self_signed("owner encryption", &encryption_key);
        Owner { signing_key, signing_certificate, encryption_key, encryption_certificate }
    });
    OWNER.create(&[]).unwrap()
}
