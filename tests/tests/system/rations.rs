//! Tests of limits on work for unverified callers: replayed attestations, stolen health certificates, protectors that are
//! made expensive, and requests of strangers.
//!
//! Figures are printed for information. Only counts can fail a test.

#![allow(clippy::print_stdout)]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use claviger::config::Config;
use claviger_client::host::Host;
use claviger_protocol::algorithm::{Oaep, SignatureAlgorithm};
use claviger_protocol::attestation::{host_key_request, signed_octets};
use claviger_protocol::health::ResultType;
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_tests::protector::{with_cipher, with_oaep};
use claviger_tests::raw::{Answer, Connection, get, post, post_head};
use claviger_tests::{
    ATTEST, Daemon, Lab, METADATA, Options, ROLL, block, metadata, open_release, roll_request, until,
};
use data_encoding::BASE64;
use serde_json::Value;

const OWN: Ipv4Addr = Ipv4Addr::LOCALHOST;
const OTHER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const BATCH: &str = "/KeyProtection/service/v2.0/RollTransportKeys";

fn served(change: impl FnOnce(&mut Config)) -> (Lab, Daemon) {
    let lab = Lab::make(Options::default());
    lab.configure(change);
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    (lab, daemon)
}

/// Returns the bytes of an attestation request, as anyone on the network path can record them.
fn attestation(host_key: &RsaPrivateKey, identity: &RsaPrivateKey) -> Vec<u8> {
    let [host, own] = [host_key, identity].map(|key| key.public().spki_der());
    let signature = host_key.sign(SignatureAlgorithm::DEFAULT, &signed_octets(host, own)).unwrap();
    let body = host_key_request([7; 16], &[ResultType::EncryptionCertificate], host, own, &signature);
    post(ATTEST, "application/json", &body)
}

fn ask(source: Ipv4Addr, address: SocketAddr, request: &[u8]) -> Answer {
    Connection::open_from(source, address).unwrap().exchange(request).unwrap()
}

/// Checks the format of a refusal by rate in attestation.
fn assert_too_many_attestations(answer: &Answer) {
    assert_eq!(answer.status, 429, "{}", answer.text());
    let seconds: u64 = answer.header("retry-after").expect("no Retry-After").parse().unwrap();
    assert!((1..=30).contains(&seconds), "come again in {seconds} s");
    let body: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(body["__type"], "ErrorReply:#Microsoft.Windows.RemoteAttestation.Core");
    assert_eq!(body["Retryable"], true);
    assert!(answer.body.starts_with(b"{\"__type\""), "__type is not first");
}

/// Sends releases one after the other for `time`; returns releases per second. Every release must succeed.
fn honest(address: SocketAddr, request: &[u8], identity: &RsaPrivateKey, time: Duration) -> f64 {
    let (begun, mut released) = (Instant::now(), 0);
    let mut connection = Connection::open_from(OWN, address).unwrap();
    while begun.elapsed() < time || released == 0 {
        let answer = connection.exchange(request).unwrap();
        assert_eq!(answer.status, 200, "an honest release: {}", answer.text());
        if released == 0 {
            open_release(&answer.body, identity).unwrap();
        }
        released += 1;
    }
    f64::from(released) / begun.elapsed().as_secs_f64()
}

#[test]
fn a_replayed_attestation_costs_no_hsm_and_is_told_to_come_again() {
    const CONNECTIONS: usize = 64;
    let (lab, daemon) = served(|config| config.attest.host_burst = 100);
    let address = daemon.address();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    let release = post(ROLL, "application/xml", &roll_request(&health, &lab.protector()));
    let identity = lab.identity();
    let recorded = attestation(&lab.key("host/hostkey.pem"), &identity);
    let quiet = honest(address, &release, &identity, Duration::from_secs(2));

    let before = block(daemon.metrics());
    let over = AtomicBool::new(false);
    let begun = Instant::now();
    let (stormy, answers) = std::thread::scope(|scope| {
        let replaying: Vec<_> = (0..CONNECTIONS)
            .map(|_| {
                scope.spawn(|| {
                    let mut connection = Connection::open_from(OTHER, address).unwrap();
                    let mut answers = Vec::new();
                    while !over.load(Ordering::Relaxed) {
                        answers.push(connection.exchange(&recorded).unwrap());
                    }
                    answers
                })
            })
            .collect();
        let stormy = honest(address, &release, &identity, Duration::from_secs(3));
        over.store(true, Ordering::Relaxed);
        let answers: Vec<_> = replaying.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        (stormy, answers)
    });
    let seconds = begun.elapsed().as_secs_f64();
    let (granted, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == 200);
    println!(
        "releases a second: {quiet:.0} without, {stormy:.0} with a replay from {CONNECTIONS} connections ({:.2}); {} replays in \
         {seconds:.1} s, {} of them granted",
        stormy / quiet,
        answers.len(),
        granted.len()
    );
    refused.iter().for_each(|answer| assert_too_many_attestations(answer));
    assert!(!refused.is_empty(), "never a 429");
    let most = 100.0 + 5.0 * (seconds + 1.0);
    assert!((granted.len() as f64) <= most, "{} granted", granted.len());

    // One certificate is signed per two seconds, not one for each granted request.
    let after = block(daemon.metrics());
    let rise = |name: &str, labels: &[(&str, &str)]| after.count(name, labels) - before.count(name, labels);
    let signed = rise("claviger_hsm_calls_total", &[("op", "sign")]);
    let releases = rise("claviger_releases_total", &[("outcome", "success")]);
    let certificates = signed.saturating_sub(releases);
    println!("{certificates} certificates signed");
    assert!(certificates as f64 <= seconds + 3.0, "{certificates} certificates signed in {seconds} s");
    assert_eq!(rise("claviger_attestations_dropped_total", &[]), refused.len() as u64);

    // The host itself can attest from its own address without limit; requests from elsewhere do not affect it.
    assert_eq!(ask(OWN, address, &recorded).status, 200);
    let other = Arc::new(RsaPrivateKey::generate(2048).unwrap());
    block(Host::new(daemon.client(), lab.key("host/hostkey.pem"), other).attest()).unwrap();
    assert!(daemon.stop().success());

    // A new certificate has its own line; repeated answers with it are counted.
    let (trail, other) = (lab.trail(), OTHER.to_string());
    let lines = trail.iter().filter(|line| line["event"] == "attest" && line["outcome"] == "success");
    let lines = lines.filter(|line| line["address"] == other).count();
    let repeats = trail.iter().filter(|line| line["event"] == "repeats");
    let repeats: u64 = repeats.filter_map(|line| line["addresses"][&other].as_u64()).sum();
    println!("{lines} lines, {repeats} repeats");
    assert_eq!(lines as u64 + repeats, granted.len() as u64);
    // Requests that arrive before the first line of a certificate is written each get their own line.
    assert!(repeats > 0 && lines <= CONNECTIONS * certificates as usize, "{lines} lines, {repeats} repeats");
}

#[test]
fn a_certificate_that_was_issued_a_moment_ago_is_handed_out_again() {
    let (lab, daemon) = served(|_| {});
    let address = daemon.address();
    let (host_key, identity) = (lab.key("host/hostkey.pem"), lab.identity());
    let content = |request: &[u8]| -> String {
        let answer = ask(OWN, address, request);
        assert_eq!(answer.status, 200, "{}", answer.text());
        serde_json::from_slice::<Value>(&answer.body).unwrap()["Content"].to_string()
    };
    let request = attestation(&host_key, &identity);
    // Repeated, since on a slow machine two requests may be further apart than that.
    let again = claviger_tests::until("the same certificate twice", || {
        let first = content(&request);
        (first == content(&request)).then_some(first)
    });
    // Another identity key gets another certificate.
    assert_ne!(content(&attestation(&host_key, &RsaPrivateKey::generate(2048).unwrap())), again);
    // Some time later a new certificate is issued.
    claviger_tests::until("a fresh certificate", || (content(&request) != again).then_some(()));
    assert!(daemon.stop().success());
}

#[test]
fn a_host_does_not_pay_for_its_health_certificate_in_other_hands() {
    const JUNK: usize = 300;
    let (lab, daemon) = served(|config| {
        let release = &mut config.release;
        (release.host_rate, release.host_burst, release.refused_rate, release.refused_burst) = (1, 60, 1, 50);
    });
    let address = daemon.address();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    let protector = lab.protector();
    let honest = post(ROLL, "application/xml", &roll_request(&health, &protector));
    // A protector with a broken guardian signature fails before anything is decrypted.
    let broken = String::from_utf8(protector).unwrap();
    let at = broken.find("<GuardianSignature").unwrap();
    let at = at + broken[at..].find("<SignatureValue>").unwrap() + "<SignatureValue>".len();
    let digit = if broken.as_bytes()[at] == b'A' { "B" } else { "A" };
    let broken = format!("{}{digit}{}", &broken[..at], &broken[at + 1..]);
    let junk = post(ROLL, "application/xml", &roll_request(&health, broken.as_bytes()));

    let mut connection = Connection::open_from(OTHER, address).unwrap();
    let statuses: Vec<_> = (0..JUNK).map(|_| connection.exchange(&junk).unwrap().status).collect();
    let told = statuses.iter().filter(|status| **status == 429).count();
    assert!(statuses.iter().all(|status| [400, 429].contains(status)), "{statuses:?}");
    assert!(told > 0, "junk has no end");
    let mut connection = Connection::open_from(OWN, address).unwrap();
    for turn in 0..50 {
        let answer = connection.exchange(&honest).unwrap();
        assert_eq!(answer.status, 200, "release {turn}: {}", answer.text());
    }
    // Some invalid requests do not affect the releases from the same address either.
    let (lab, daemon) = {
        assert!(daemon.stop().success());
        lab.configure(|config| config.release.host_burst = 10);
        let daemon = lab.serve();
        block(daemon.until_ready_is(200));
        (lab, daemon)
    };
    let mut connection = Connection::open_from(OWN, daemon.address()).unwrap();
    for turn in 0..40 {
        assert_eq!(connection.exchange(&junk).unwrap().status, 400, "junk {turn}");
    }
    for turn in 0..10 {
        assert_eq!(connection.exchange(&honest).unwrap().status, 200, "release {turn}");
    }
    drop(lab);
    assert!(daemon.stop().success());
}

#[test]
fn a_bad_protector_is_paid_for_also_by_an_empty_bucket() {
    const RATE: f64 = 20.0;
    let (lab, daemon) = served(|config| (config.release.host_rate, config.release.host_burst) = (RATE as u32, 1));
    let address = daemon.address();
    let (health, guardian) =
        block(async { (lab.host(daemon.client()).attest().await.unwrap(), metadata(&daemon.client()).await) });
    let (file, _) = with_oaep(&lab.owner(), &guardian, Oaep::SHA256);
    let garbled = with_cipher(&lab.owner(), &file, |cipher| cipher.iter().map(|byte| byte ^ 1).collect());
    let request = post(ROLL, "application/xml", &roll_request(&health, &garbled));
    let before = block(daemon.metrics());
    let begun = Instant::now();
    let mut connection = Connection::open(address).unwrap();
    let mut decrypted = 0_u32;
    while begun.elapsed() < Duration::from_secs(4) {
        match connection.exchange(&request).unwrap().status {
            400 => decrypted += 1,
            429 => std::thread::sleep(Duration::from_millis(5)),
            other => panic!("status {other}"),
        }
    }
    let tokens = RATE * begun.elapsed().as_secs_f64() + 1.0;
    let after = block(daemon.metrics());
    let calls = after.count("claviger_hsm_calls_total", &[]) - before.count("claviger_hsm_calls_total", &[]);
    println!(
        "{decrypted} bad protectors for {tokens:.0} tokens, {:.1} HSM calls each",
        calls as f64 / f64::from(decrypted)
    );
    assert!(decrypted > 0);
    // Each decryption costs five tokens, and one may be on credit.
    assert!(f64::from(decrypted - 1) * 5.0 <= tokens, "{decrypted} for {tokens} tokens");
    assert!(daemon.stop().success());
}

#[test]
fn strangers_use_up_the_patience_with_their_address_and_no_host_pays_for_it() {
    let (lab, daemon) = served(|config| (config.server.stranger_rate, config.server.stranger_burst) = (1, 30));
    let address = daemon.address();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    let honest = post(ROLL, "application/xml", &roll_request(&health, &lab.protector()));
    let unknown = attestation(&RsaPrivateKey::generate(2048).unwrap(), &lab.identity());
    let forged = post(ROLL, "application/xml", &roll_request(b"no certificate", &lab.protector()));

    let mut connection = Connection::open_from(OWN, address).unwrap();
    let refused: Vec<_> = (0..60).map(|_| connection.exchange(&unknown).unwrap()).collect();
    let (told, judged): (Vec<_>, Vec<_>) = refused.iter().partition(|answer| answer.status == 429);
    assert!(judged.iter().all(|answer| answer.status == 403) && judged.len() >= 30);
    assert!(!told.is_empty(), "strangers may go on for ever");
    told.iter().for_each(|answer| assert_too_many_attestations(answer));
    // The host's own attestations are served; a request that only shows the host's key counts as a stranger's.
    let host_key = lab.key("host/hostkey.pem");
    let answer = connection.exchange(&attestation(&host_key, &lab.identity())).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    let [host, own] = [host_key.public(), lab.identity().public()].map(|key| key.spki_der().to_vec());
    let body = host_key_request([7; 16], &[ResultType::EncryptionCertificate], &host, &own, &[1; 256]);
    assert_too_many_attestations(&connection.exchange(&post(ATTEST, "application/json", &body)).unwrap());
    // A release without a valid health certificate is also a stranger's request; one with a certificate is a host's.
    let answer = connection.exchange(&forged).unwrap();
    assert_eq!(answer.status, 429, "{}", answer.text());
    assert!(answer.text().contains("<Code>TooManyRequestsException</Code>") && answer.header("retry-after").is_some());
    for turn in 0..10 {
        let answer = connection.exchange(&honest).unwrap();
        assert_eq!(answer.status, 200, "release {turn}: {}", answer.text());
    }
    // Other addresses are not affected.
    assert_eq!(ask(OTHER, address, &unknown).status, 403);
    assert_eq!(ask(OTHER, address, &forged).status, 403);
    // A health certificate that is not cached yet must not be refused either.
    assert!(daemon.stop().success());
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    let mut connection = Connection::open_from(OWN, daemon.address()).unwrap();
    while connection.exchange(&unknown).unwrap().status != 429 {}
    assert_eq!(connection.exchange(&honest).unwrap().status, 200);
    assert!(daemon.stop().success());
}

#[test]
fn junk_with_a_health_certificate_that_was_seen_is_paid_for_by_that_host_at_that_address() {
    const ALLOWED: usize = 40;
    let (lab, daemon) = served(|config| {
        (config.server.stranger_rate, config.server.stranger_burst) = (1, 10);
        let release = &mut config.release;
        (release.host_rate, release.host_burst, release.refused_rate, release.refused_burst) = (1, 20, 1, 20);
    });
    let address = daemon.address();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    let seen = BASE64.encode(&health);
    let element = format!("<HealthCertificate>{seen}</HealthCertificate>");
    for (at, (path, junk)) in [
        (ROLL, format!("<RollTransportKeyRequest>{element}</RollTransportKeyRequest>")),
        (BATCH, format!("<RollTransportKeysRequest>{element}</RollTransportKeysRequest>")),
    ]
    .into_iter()
    .enumerate()
    {
        let source = Ipv4Addr::new(127, 0, 0, 3 + at as u8);
        let nothing = post(path, "application/xml", b"<x/>");
        let junk = post(path, "application/xml", junk.as_bytes());
        claviger_tests::until("an address that is over its rate", || {
            (ask(source, address, &nothing).status == 429).then_some(())
        });
        let statuses: Vec<_> = (0..ALLOWED + 20).map(|_| ask(source, address, &junk).status).collect();
        let read = statuses.iter().filter(|status| **status == 400).count();
        assert!(statuses.iter().all(|status| [400, 429].contains(status)), "{statuses:?}");
        // The number that both buckets hold, plus the tokens that return meanwhile.
        assert!((1..=ALLOWED + 10).contains(&read) && read < statuses.len(), "{path}: {read} were read");
    }
    // From another address, the host has its whole rate.
    let honest = post(ROLL, "application/xml", &roll_request(&health, &lab.protector()));
    for turn in 0..20 {
        assert_eq!(ask(OWN, address, &honest).status, 200, "release {turn}");
    }
    assert!(daemon.stop().success());
}

#[test]
fn documents_have_a_rate_for_each_address_and_information_is_always_given() {
    const INFORMATION: &str = "/Attestation/getinfo";
    let (lab, daemon) = served(|config| (config.server.document_rate, config.server.document_burst) = (1, 20));
    let address = daemon.address();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    let honest = post(ROLL, "application/xml", &roll_request(&health, &lab.protector()));
    for path in [METADATA, "/Attestation/v2.0/signingcertificates", "/nothing"] {
        until("a document too many", || {
            let answer = ask(OTHER, address, &get(path));
            (answer.status == 429).then(|| assert!(answer.header("retry-after").is_some(), "{path}"))
        });
    }
    for _ in 0..3 {
        assert_eq!(ask(OTHER, address, &get(INFORMATION)).status, 200);
    }
    // Elsewhere nothing has happened, and releases are no documents.
    assert_eq!(ask(OWN, address, &get(METADATA)).status, 200);
    assert_eq!(ask(OTHER, address, &honest).status, 200);
    assert!(daemon.stop().success());
}

#[test]
fn the_other_mode_is_refused_before_its_body_has_come_and_charged() {
    let (lab, daemon) = served(|config| {
        (config.server.stranger_rate, config.server.stranger_burst) = (1, 1_000);
    });
    let address = daemon.address();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    let honest = post(ROLL, "application/xml", &roll_request(&health, &lab.protector()));
    let announced = |path| post_head(path, "application/json", 1024 * 1024);
    for path in ["/Attestation/v1.0/attest", "/Attestation/v2.0/attest", "/Attestation/v1.0/domainattest"] {
        // Announced, and never sent.
        let answer = ask(OTHER, address, &announced(path));
        assert_eq!(answer.status, 409, "{path}: {}", answer.text());
        let body: Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(body["ExpectedOperationMode"], 3, "{path}");
        // A small one on a connection that goes on.
        let mut connection = Connection::open_from(OTHER, address).unwrap();
        for _ in 0..2 {
            assert_eq!(connection.exchange(&post(path, "application/json", b"{}")).unwrap().status, 409, "{path}");
        }
    }
    // Each mebibyte counts as 64 requests.
    let told = (0..20).map(|_| ask(OTHER, address, &announced("/Attestation/v2.0/attest")));
    let told: Vec<_> = told.filter(|answer| answer.status != 409).collect();
    assert!(!told.is_empty(), "it is not charged");
    told.iter().for_each(assert_too_many_attestations);
    assert_eq!(ask(OTHER, address, &honest).status, 200);
    assert_eq!(ask(OWN, address, &post("/Attestation/v2.0/attest", "application/json", b"{}")).status, 409);
    assert!(daemon.stop().success());
}

#[test]
fn connections_of_an_address_that_used_up_its_time_wait_and_none_is_closed() {
    let (lab, daemon) = served(|config| {
        config.server.unproven_time_percent = 1;
        (config.server.document_rate, config.server.stranger_rate) = (0, 0);
    });
    let address = daemon.address();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    let honest = post(ROLL, "application/xml", &roll_request(&health, &lab.protector()));
    let mut host = Connection::open_from(OTHER, address).unwrap();
    assert_eq!(host.exchange(&honest).unwrap().status, 200);
    // Ever new connections, until one of them has to wait.
    let document = get(METADATA);
    let waited = |time: Duration| {
        let begun = Instant::now();
        assert_eq!(ask(OTHER, address, &document).status, 200);
        begun.elapsed() >= time
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(ask(OTHER, address, &document).status, 200);
                }
            });
        }
        until("a connection that waits", || waited(Duration::from_millis(100)).then_some(()));
        // A host that has proved itself does not wait for them, and one on a new connection comes to its turn.
        for turn in 0..10 {
            assert_eq!(host.exchange(&honest).unwrap().status, 200, "{turn}");
        }
        assert_eq!(ask(OTHER, address, &honest).status, 200);
        stop.store(true, Ordering::Relaxed);
    });
    assert!(daemon.stop().success());
}
