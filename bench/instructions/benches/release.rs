//! The parts of a release, and complete ones, each in its own process under valgrind. Preparations are not counted.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use claviger::registry::health_cache::HealthCache;
use claviger::release::testing::{ALGORITHMS, NullHsm, OtherKeys, Parties, Stage};
use claviger::release::{decide, roll};
use claviger::request::Attempt;
use claviger::sys::id::request_id;
use claviger_instructions::{Bytes, Fixture};
use claviger_protocol::algorithm::{Oaep, SignatureAlgorithm};
use claviger_protocol::build::{Unsigned, fresh_transport_key};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::payload::{ApiVersion, EncryptedKeys, HostKeys, Payload};
use claviger_protocol::protector::{Protector, TransportKey};
use claviger_protocol::request::{RollRequest, RollResponse};
use claviger_protocol::rsa_key::{RsaPrivateKey, RsaPublicKey};
use claviger_protocol::verify::{KnownCertificates, Verified, verify, verify_counting};
use claviger_protocol::work::Work;
use claviger_protocol::{c14n, xml};
use gungraun::Callgrind;
use gungraun::prelude::*;
use tempfile::TempDir;
use tokio::runtime::Runtime;

fn fixture() -> Fixture {
    Fixture::read().unwrap()
}

/// A thread's first random bytes cost a hundred times as much as a release. They are read before the count, so that no part includes
/// them.
fn start_randomness(key: &RsaPublicKey) {
    fresh_transport_key().unwrap();
    key.encrypt_oaep(Oaep::SHA1, &[7; 32]).unwrap();
}

fn protector() -> Vec<u8> {
    fixture().protector.0
}

fn request() -> Vec<u8> {
    let Fixture { protector, health_certificate, .. } = fixture();
    let (ingress_protector, health_certificate) = (protector.0, health_certificate.0);
    RollRequest { ingress_protector, health_certificate, algorithms: ALGORITHMS }.to_xml()
}

// Reading.

#[library_benchmark]
#[bench::usual(request())]
fn request_parse(body: Vec<u8>) -> (RollRequest, Vec<u8>) {
    (black_box(RollRequest::parse(black_box(&body)).unwrap()), body)
}

struct Health {
    cache: HealthCache,
    certificate: Vec<u8>,
    signers: [Certificate; 1],
    now: i64,
}

fn health_certificate() -> Health {
    let Fixture { signer, health_certificate, issued, .. } = fixture();
    let signers = [Certificate::parse(&signer.certificate.0).unwrap()];
    Health { cache: HealthCache::default(), certificate: health_certificate.0, signers, now: issued }
}

fn known_health_certificate() -> Health {
    let health = health_certificate();
    health.cache.check(&health.certificate, &health.signers, health.now).unwrap();
    health
}

#[library_benchmark]
#[bench::first(health_certificate())]
#[bench::known(known_health_certificate())]
fn health_certificate_check(health: Health) -> Health {
    black_box(health.cache.check(black_box(&health.certificate), &health.signers, health.now).unwrap());
    health
}

#[library_benchmark]
#[bench::usual(protector())]
fn protector_parse(file: Vec<u8>) -> (Protector, Vec<u8>) {
    (black_box(Protector::parse(black_box(&file)).unwrap()), file)
}

#[library_benchmark]
#[bench::usual(protector())]
fn xml_parse(file: Vec<u8>) -> Vec<u8> {
    let text = xml::decode(&file).unwrap();
    black_box(xml::parse(black_box(&text)).unwrap());
    file
}

#[library_benchmark]
#[bench::usual(protector())]
fn xml_parse_and_canonical_form(file: Vec<u8>) -> (String, Vec<u8>) {
    let text = xml::decode(&file).unwrap();
    let document = xml::parse(black_box(&text)).unwrap();
    (black_box(c14n::document(black_box(&document)).unwrap()), file.clone())
}

library_benchmark_group!(
    name = read,
    benchmarks = [request_parse, health_certificate_check, protector_parse, xml_parse, xml_parse_and_canonical_form]
);

// Checking.

fn unknown() -> (Protector, KnownCertificates) {
    (Protector::parse(&protector()).unwrap(), KnownCertificates::new(64))
}

fn known() -> (Protector, KnownCertificates) {
    let (protector, known) = unknown();
    verify(Protector::parse(&self::protector()).unwrap(), &known).unwrap();
    (protector, known)
}

#[library_benchmark]
#[bench::first(unknown())]
#[bench::known(known())]
fn protector_verify(input: (Protector, KnownCertificates)) -> (Verified, KnownCertificates) {
    let (protector, known) = input;
    (black_box(verify_counting(protector, &known, &mut Work::default()).unwrap()), known)
}

fn verified() -> Verified {
    verify(Protector::parse(&protector()).unwrap(), &KnownCertificates::new(64)).unwrap()
}

fn signed() -> (Verified, TransportKey) {
    (verified(), fixture().transport_key().unwrap())
}

#[library_benchmark]
#[bench::usual(signed())]
fn transport_key_signature_verify(input: (Verified, TransportKey)) -> (Verified, TransportKey) {
    let protector = &input.0.protector;
    assert!(protector.transport_key_signature.verify(black_box(&input.1), &protector.signed_octets));
    input
}

library_benchmark_group!(name = check, benchmarks = [protector_verify, transport_key_signature_verify]);

// Writing.

fn randomness_and_signed() -> (Verified, TransportKey) {
    let (verified, key) = signed();
    recipients(&verified).for_each(start_randomness);
    (verified, key)
}

fn recipients(verified: &Verified) -> impl Iterator<Item = &RsaPublicKey> {
    verified.parties.iter().map(|party| party.encryption.key())
}

#[library_benchmark]
#[bench::usual(randomness_and_signed())]
fn egress_protector_build(input: (Verified, TransportKey)) -> (Unsigned, (Verified, TransportKey)) {
    let (verified, key) = &input;
    let unsigned = Unsigned::new(&verified.protector.wrappings, recipients(verified), black_box(key), 0).unwrap();
    (black_box(unsigned), input)
}

fn unsigned() -> Unsigned {
    let (verified, key) = signed();
    Unsigned::new(&verified.protector.wrappings, recipients(&verified), &key, 0).unwrap()
}

#[library_benchmark]
#[bench::usual((unsigned(), vec![7; 256]))]
fn egress_protector_finish(input: (Unsigned, Vec<u8>)) -> (Vec<u8>, Unsigned) {
    let (unsigned, signature) = input;
    (black_box(unsigned.finish(2, SignatureAlgorithm::DEFAULT, black_box(signature)).unwrap()), unsigned)
}

fn payload() -> (Payload, RsaPublicKey) {
    let key = fixture().transport_key().unwrap();
    let payload = Payload { ingress: key.clone(), egress: key, max_offline_unwraps: 0 };
    let identity = RsaPrivateKey::from_pkcs8_der(&fixture().identity.0).unwrap();
    start_randomness(identity.public());
    (payload, identity.public().clone())
}

#[library_benchmark]
#[bench::usual(payload())]
fn keys_encrypt_to_host(input: (Payload, RsaPublicKey)) -> (EncryptedKeys, (Payload, RsaPublicKey)) {
    (black_box(input.0.seal(ApiVersion::V2, HostKeys::fresh(black_box(&input.1), ALGORITHMS).unwrap()).unwrap()), input)
}

fn response() -> RollResponse {
    let (payload, public) = payload();
    let keys = payload.seal(ApiVersion::V2, HostKeys::fresh(&public, ALGORITHMS).unwrap()).unwrap();
    RollResponse { egress_protector: protector(), keys }
}

#[library_benchmark]
#[bench::usual(response())]
fn reply_write(response: RollResponse) -> (Vec<u8>, RollResponse) {
    (black_box(black_box(&response).to_xml()), response)
}

fn attempt() -> Attempt {
    let health = known_health_certificate();
    let mut attempt = Attempt::new(request_id()).sent_from(Some([192, 0, 2, 1].into()));
    attempt.health(&health.cache.check(&health.certificate, &health.signers, health.now).unwrap());
    let digits = "0".repeat(64);
    (attempt.owner, attempt.guardian_key) = (Some(digits.clone()), Some(digits));
    attempt.used("hsm-a");
    attempt.used("hsm-b");
    attempt
}

// Everything except the link to the previous line and the write, which the writer thread does. The hash of the egress
// protector is computed while it is written.
#[library_benchmark]
#[bench::usual((attempt(), protector()))]
fn audit_line(input: (Attempt, Vec<u8>)) -> (Vec<u8>, Attempt, Vec<u8>) {
    let (mut attempt, file) = input;
    attempt.protector(black_box(&file));
    attempt.egress(black_box([7; 32]));
    let entry = attempt.entry("release", "success");
    (black_box(serde_json::to_vec(&entry).unwrap()), attempt, file)
}

library_benchmark_group!(
    name = write,
    benchmarks = [egress_protector_build, egress_protector_finish, keys_encrypt_to_host, reply_write, audit_line]
);

// The complete release.

struct Whole {
    stage: Stage,
    hsm: NullHsm,
    body: Vec<u8>,
    runtime: Runtime,
    /// Dropped last.
    _folder: TempDir,
}

impl Whole {
    fn new() -> Self {
        let fixture = fixture();
        let key = |key: &Bytes| RsaPrivateKey::from_pkcs8_der(&key.0).unwrap();
        let keys =
            OtherKeys { signer: key(&fixture.signer.key), host: key(&fixture.host), identity: key(&fixture.identity) };
        start_randomness(keys.identity.public());
        let parties = Parties::new(fixture.owner.owner().unwrap(), fixture.guardian.owner().unwrap(), keys);
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let stage = Stage::of(Box::leak(Box::new(parties)), folder.path(), |config| config.audit.reserve_mib = 0);
        let body = stage.request(&fixture.protector.0).to_xml();
        let hsm = NullHsm::new([(&fixture.protector.0[..], fixture.transport_key().unwrap())]).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { stage, hsm, body, runtime, _folder: folder }
    }

    fn warm() -> Self {
        let whole = Self::new();
        (0..3).for_each(|_| drop(whole.release()));
        whole
    }

    fn release(&self) -> Vec<u8> {
        let service = &self.stage.service;
        self.runtime.block_on(async {
            let mut attempt = Attempt::new(request_id()).sent_from(Some([192, 0, 2, 1].into()));
            let result = roll(service, &self.hsm, ApiVersion::V2, &self.body, &mut attempt).await;
            decide(service, ApiVersion::V2, &attempt, result).await.unwrap().to_xml()
        })
    }
}

#[library_benchmark]
#[bench::usual(Whole::new())]
fn first(whole: Whole) -> (Vec<u8>, Whole) {
    (black_box(whole.release()), whole)
}

/// Number of releases that [`next`] counts together, because work that waits for another thread varies in its steps.
/// `claviger_bench::instructions::counts` has the same number.
const RELEASES: usize = 10;

#[library_benchmark]
#[bench::usual(Whole::warm())]
fn next(whole: Whole) -> Whole {
    for _ in 0..RELEASES {
        black_box(whole.release());
    }
    whole
}

library_benchmark_group!(name = whole, benchmarks = [first, next]);

main!(
    config = LibraryBenchmarkConfig::default().tool(Callgrind::with_args(["--cache-sim=no"])),
    library_benchmark_groups = [read, check, write, whole]
);
