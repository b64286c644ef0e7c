//! The work of a release outside of the HSMs: parsing, verification, writing.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::LazyLock;

use claviger_bench::parts::Parts;
use claviger_protocol::algorithm::{Oaep, SignatureAlgorithm};
use claviger_protocol::build::{self, Unsigned};
use claviger_protocol::payload::{ApiVersion, HostKeys, Payload};
use claviger_protocol::protector::Protector;
use claviger_protocol::request::{RollRequest, RollResponse};
use claviger_protocol::verify::{KnownCertificates, verify};
use claviger_protocol::{c14n, xml};
use claviger_tests::ALGORITHMS;
use criterion::{Criterion, criterion_group, criterion_main};

/// One lab for all benches.
static PARTS: LazyLock<Parts> = LazyLock::new(Parts::new);

fn reading(c: &mut Criterion) {
    let parts = &*PARTS;
    let mut group = c.benchmark_group("read");
    group.bench_function("request", |b| b.iter(|| RollRequest::parse(black_box(&parts.request)).unwrap()));
    group.bench_function("protector", |b| b.iter(|| Protector::parse(black_box(&parts.protector)).unwrap()));
    let text = xml::decode(&parts.protector).unwrap();
    group.bench_function("xml", |b| b.iter(|| xml::parse(black_box(&text)).unwrap().root_element().has_children()));
    let document = xml::parse(&text).unwrap();
    group.bench_function("c14n", |b| b.iter(|| c14n::document(black_box(&document)).unwrap()));
    group.finish();
}

fn checking(c: &mut Criterion) {
    let parts = &*PARTS;
    let mut group = c.benchmark_group("verify");
    let protector = || Protector::parse(&parts.protector).unwrap();
    group.bench_function("cold", |b| {
        b.iter_batched(
            protector,
            |p| verify(p, &KnownCertificates::new(64)).unwrap(),
            criterion::BatchSize::SmallInput,
        );
    });
    let known = KnownCertificates::new(64);
    verify(protector(), &known).unwrap();
    group.bench_function("cached", |b| {
        b.iter_batched(protector, |p| verify(p, &known).unwrap(), criterion::BatchSize::SmallInput);
    });
    let verified = verify(protector(), &known).unwrap();
    let signature = &verified.protector.transport_key_signature;
    let key = build::fresh_transport_key().unwrap();
    group.bench_function("transport_key_signature", |b| {
        b.iter(|| signature.verify(black_box(&key), &verified.protector.signed_octets));
    });
    let signed = parts.owner_key.sign(SignatureAlgorithm::DEFAULT, &verified.protector.signed_octets).unwrap();
    let public = parts.owner_key.public();
    group.bench_function("rsa_2048", |b| {
        b.iter(|| public.verify(SignatureAlgorithm::DEFAULT, &verified.protector.signed_octets, &signed).unwrap());
    });
    group.finish();
}

fn writing(c: &mut Criterion) {
    let parts = &*PARTS;
    let verified = verify(Protector::parse(&parts.protector).unwrap(), &KnownCertificates::new(64)).unwrap();
    let mut group = c.benchmark_group("write");
    let public = parts.owner_key.public();
    group.bench_function("oaep_2048", |b| b.iter(|| public.encrypt_oaep(Oaep::SHA1, black_box(&[7; 32])).unwrap()));
    let key = build::fresh_transport_key().unwrap();
    let unsigned = || {
        let recipients = verified.parties.iter().map(|party| party.encryption.key());
        Unsigned::new(&verified.protector.wrappings, recipients, &key, 0).unwrap()
    };
    group.bench_function("protector", |b| b.iter(unsigned));
    let ready = unsigned();
    group.bench_function("finish", |b| {
        b.iter(|| ready.finish(1, SignatureAlgorithm::DEFAULT, black_box(vec![7; 256])).unwrap());
    });
    let payload = Payload { ingress: key.clone(), egress: key.clone(), max_offline_unwraps: 0 };
    group.bench_function("seal", |b| {
        b.iter(|| payload.seal(ApiVersion::V2, HostKeys::fresh(public, ALGORITHMS).unwrap()).unwrap())
    });
    let keys = payload.seal(ApiVersion::V2, HostKeys::fresh(public, ALGORITHMS).unwrap()).unwrap();
    let response = RollResponse { egress_protector: parts.protector.clone(), keys };
    group.bench_function("reply", |b| b.iter(|| black_box(&response).to_xml()));
    group.finish();
}

criterion_group!(benches, reading, checking, writing);
criterion_main!(benches);
