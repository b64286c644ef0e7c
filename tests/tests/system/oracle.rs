//! Tests that all kinds of wrong transport keys look the same from outside.
//!
//! Times are printed for information; they never fail the test.

#![allow(clippy::print_stdout)]

use std::time::Instant;

use claviger_protocol::algorithm::Oaep;
use claviger_tests::protector::{with_cipher, with_oaep};
use claviger_tests::raw::{Answer, Connection, post};
use claviger_tests::stats::{mann_whitney_z, median};
use claviger_tests::{Lab, Options, ROLL, block, metadata, open_release, roll_request};

const TRIES: usize = 100;
/// Number of concurrent requests. Refusals wait for known-answer tests, whose rate is limited, and are delayed to points of a
/// time grid, so sequential requests would take long.
const AT_ONCE: usize = 4;

/// Returns the answer without the fields that differ between any two answers.
fn constant(mut answer: Answer) -> Answer {
    answer.headers.retain(|(name, _)| name != "x-request-id" && name != "date");
    answer
}

/// The metrics do not distinguish the two cases either, by class or by time.
#[test]
fn the_metrics_of_a_garbled_and_a_wrong_transport_key_are_alike() {
    const REFUSALS: usize = 12;
    const CLASSES: [&str; 7] = ["ok", "refused", "unable", "stale", "busy", "pin", "broken"];
    let lab = Lab::make(Options { hsms: 1, vms: 1, ..Options::default() });
    let daemon = lab.serve();
    let (health, guardian) =
        block(async { (lab.host(daemon.client()).attest().await.unwrap(), metadata(&daemon.client()).await) });
    let owner = lab.owner();
    let (file, _) = with_oaep(&owner, &guardian, Oaep::SHA1);
    let send = |file: &[u8]| {
        let request = post(ROLL, "application/xml", &roll_request(&health, file));
        Connection::open(daemon.address()).unwrap().exchange(&request).unwrap().status
    };
    for _ in 0..4 {
        assert_eq!(send(&file), 200);
    }
    // Returns the figures about decryptions: for each class the number of times and their sum; and the member's latency.
    let look = || {
        let page = block(daemon.metrics());
        let sum = |name: &str, labels: &[(&str, &str)]| page.sum(name, labels).unwrap_or_default();
        let decrypt = ("op", "decrypt");
        let mut seen: Vec<f64> =
            CLASSES.iter().map(|rv| sum("claviger_hsm_calls_total", &[decrypt, ("rv", rv)])).collect();
        for name in ["claviger_hsm_service_time_seconds", "claviger_hsm_response_time_seconds"] {
            seen.push(sum(&format!("{name}_count"), &[decrypt]));
        }
        (seen, sum("claviger_hsm_service_time_seconds_sum", &[decrypt]))
    };
    let refused_by = |change: &dyn Fn(&[u8]) -> Vec<u8>| {
        let before = look();
        for _ in 0..REFUSALS {
            assert_eq!(send(&with_cipher(&owner, &file, change)), 400);
        }
        let after = look();
        let counts: Vec<f64> = after.0.iter().zip(&before.0).map(|(after, before)| after - before).collect();
        (counts, after.1 - before.1)
    };
    let garbled = refused_by(&|cipher| {
        let mut cipher = cipher.to_vec();
        cipher[100] ^= 4;
        cipher
    });
    let wrong = refused_by(&|_| {
        let other = claviger_protocol::build::fresh_transport_key().unwrap();
        guardian.encryption_key.encrypt_oaep(Oaep::SHA1, &other[..]).unwrap()
    });
    println!("garbled {garbled:?}, wrong {wrong:?}");
    assert_eq!(garbled.0, wrong.0, "{:?}", CLASSES);
    let decryptions = garbled.0[CLASSES.iter().position(|rv| *rv == "refused").unwrap()];
    assert!(decryptions >= REFUSALS as f64, "{garbled:?}");
    assert_eq!(garbled.0.iter().sum::<f64>(), 3.0 * decryptions, "one class, and one time each: {garbled:?}");
    // No release succeeded in between, so each decryption was recorded with exactly the same time.
    assert!((garbled.1 - wrong.1).abs() < 1e-9 * decryptions, "{garbled:?}, {wrong:?}");
    assert!(daemon.stop().success());
}

#[test]
fn a_garbled_and_a_wrong_transport_key_are_refused_alike() {
    let lab = Lab::make(Options { hsms: 2, vms: 1, ..Options::default() });
    let daemon = lab.serve();
    let (health, guardian) =
        block(async { (lab.host(daemon.client()).attest().await.unwrap(), metadata(&daemon.client()).await) });
    let (owner, identity) = (lab.owner(), lab.identity());
    let address = daemon.address();
    let mut seen: Vec<Answer> = Vec::new();
    for (name, oaep) in [("OAEP mgf1p", Oaep::SHA1), ("OAEP SHA-256", Oaep::SHA256)] {
        let (file, key) = with_oaep(&owner, &guardian, oaep);
        // The unchanged file is served, so the changed ones are refused for their ciphertext alone.
        let send = |file: &[u8]| {
            let request = post(ROLL, "application/xml", &roll_request(&health, file));
            Connection::open(address).unwrap().exchange(&request).unwrap()
        };
        let answer = send(&file);
        assert_eq!(answer.status, 200, "{name}: {}", answer.text());
        assert!(*open_release(&answer.body, &identity).unwrap().0.ingress == *key);
        let same = with_cipher(&owner, &file, <[u8]>::to_vec);
        assert_eq!(send(&same).status, 200, "{name}: the tool of this test is broken");

        let mut samples = [Vec::new(), Vec::new()];
        let per_worker = TRIES / AT_ONCE;
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..AT_ONCE)
                .map(|worker| {
                    let (owner, guardian, health, file) = (&owner, &guardian, &health, &file);
                    scope.spawn(move || {
                        let mut connection = Connection::open(address).unwrap();
                        let mut told = Vec::with_capacity(per_worker);
                        for turn in 0..per_worker {
                            let at = (worker * per_worker + turn) * 256 / TRIES;
                            let flipped = with_cipher(owner, file, |cipher| {
                                let mut cipher = cipher.to_vec();
                                // Not the first byte: the number must not exceed the modulus.
                                cipher[at.max(1)] ^= 1 << (turn % 8);
                                cipher
                            });
                            let wrong = with_cipher(owner, file, |_| {
                                let other = claviger_protocol::build::fresh_transport_key().unwrap();
                                guardian.encryption_key.encrypt_oaep(oaep, &other[..]).unwrap()
                            });
                            let requests =
                                [flipped, wrong].map(|f| post(ROLL, "application/xml", &roll_request(health, &f)));
                            // Alternates, so that each kind is first equally often.
                            for kind in if turn % 2 == 0 { [0, 1] } else { [1, 0] } {
                                let begun = Instant::now();
                                let answer = connection.exchange(&requests[kind]).unwrap();
                                told.push((kind, begun.elapsed().as_secs_f64() * 1e3, constant(answer)));
                            }
                        }
                        told
                    })
                })
                .collect();
            for (kind, ms, answer) in workers.into_iter().flat_map(|worker| worker.join().unwrap()) {
                samples[kind].push(ms);
                seen.push(answer);
            }
        });
        let [flipped, wrong] = &samples;
        assert_eq!((flipped.len(), wrong.len()), (TRIES, TRIES));
        println!(
            "{name}: garbled {:.2} ms, wrong key {:.2} ms, z = {:+.2}",
            median(flipped),
            median(wrong),
            mann_whitney_z(flipped, wrong)
        );
    }
    // All of them, with both paddings.
    let first = seen[0].clone();
    assert_eq!(first.status, 400);
    assert!(first.text().contains("<Code>InvalidProtectorException</Code>"), "{}", first.text());
    for answer in &seen {
        assert_eq!(*answer, first);
    }
    // The audit trail does not distinguish them either.
    let trail = lab.audit();
    let refused =
        trail.iter().filter(|line| line["outcome"] == "InvalidProtectorException" && line["owner"].is_string());
    assert!(refused.count() >= 4 * TRIES);
    assert!(daemon.stop().success());
}
