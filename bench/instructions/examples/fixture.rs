//! Creates new inputs with new keys: `cargo run --release --manifest-path bench/instructions/Cargo.toml --target-dir
//! target --example fixture`. Afterwards all counts have to be accepted again.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use claviger::release::testing::{self, OtherKeys};
use claviger::sys::clock::unix_now;
use claviger_instructions::{Bytes, Fixture, Pair, Pairs};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::health::{self, ResultType, signer_template};
use claviger_protocol::metadata::Metadata;
use claviger_protocol::rsa_key::RsaPrivateKey;

const YEAR: i64 = 365 * 24 * 3600;

fn main() {
    let (owner, guardian) = (testing::pairs("tenant"), testing::pairs("guardian"));
    let OtherKeys { signer, host, identity } =
        OtherKeys { signer: testing::generate(), host: testing::generate(), identity: testing::generate() };
    let now = unix_now();
    let template = signer_template(signer.public(), now - 300, now + YEAR).unwrap();
    let signer_certificate = Certificate::parse(&template.to_be_signed().unwrap().sign_with(&signer).unwrap()).unwrap();
    let content = ResultType::EncryptionCertificate;
    let issued =
        health::issue(&signer_certificate, testing::HOST, host.public(), identity.public(), content, now).unwrap();
    let metadata = Metadata::parse(&guardian.metadata().unwrap()).unwrap();
    let (protector, transport_key) = owner.create(&[metadata]).unwrap();
    let private = |key: &RsaPrivateKey| Bytes(key.to_pkcs8_der().to_vec());
    let fixture = Fixture {
        owner: Pairs::of(&owner),
        guardian: Pairs::of(&guardian),
        health_certificate: Bytes(issued.sign_with(&signer).unwrap()),
        signer: Pair { key: private(&signer), certificate: Bytes(signer_certificate.der().to_vec()) },
        host: private(&host),
        identity: private(&identity),
        protector: Bytes(protector),
        transport_key: Bytes(transport_key.to_vec()),
        issued: now,
    };
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/fixture.json");
    std::fs::write(file, serde_json::to_string_pretty(&fixture).unwrap() + "\n").unwrap();
    println!("made {file}; now accept its counts: make bench-instructions-accept");
}
