//! Certificates for the tests of several modules.
#![allow(clippy::unwrap_used)]

use claviger_protocol::certificate::build::{DistinguishedName, Template, random_serial};
use claviger_protocol::certificate::{Certificate, KeyUsage};
use claviger_protocol::rsa_key::RsaPrivateKey;

/// Makes a self-signed certificate for a key, valid now.
pub(crate) fn self_signed(common_name: &str, key: &RsaPrivateKey) -> Certificate {
    let now = crate::failover::unix_now();
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
    };
    Certificate::parse(&template.to_be_signed().unwrap().sign_with(key).unwrap()).unwrap()
}
