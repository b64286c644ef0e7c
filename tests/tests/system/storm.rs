//! Test of many hosts at once: every answer is right, and the tokens do no unnecessary operations.

#![allow(clippy::print_stdout)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use claviger::admin;
use claviger_client::host::Host;
use claviger_protocol::payload::ApiVersion;
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_tests::{Lab, Options, metadata};
use data_encoding::{BASE64, HEXLOWER};
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const HOSTS: usize = 100;
const RELEASES: usize = 20;
const AT_ONCE: usize = 32;
const IDENTITIES: usize = 4;

async fn keys(count: usize) -> Vec<RsaPrivateKey> {
    let mut making = JoinSet::new();
    for _ in 0..count {
        making.spawn_blocking(|| RsaPrivateKey::generate(2048).unwrap());
    }
    making.join_all().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_hosts_get_what_is_theirs() {
    // Served by `serve`, whose counters start at zero, unlike those of a lab that was just created.
    let lab = Lab::make(Options { hsms: 3, vms: 1, ..Options::default() });
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    let before = daemon.metrics().await;
    let lines_before = lab.audit().len();
    let guardian = metadata(&daemon.client()).await;
    let owner = Arc::new(lab.owner());
    let owner_name = HEXLOWER.encode(&owner.signing_certificate.thumbprint());

    let identities: Vec<_> = keys(IDENTITIES).await.into_iter().map(Arc::new).collect();
    let mut playing = JoinSet::new();
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let keys = keys(HOSTS).await;
    let begun = Instant::now();
    for (at, key) in keys.into_iter().enumerate() {
        let name = format!("storm-{at:03}");
        let public_key = BASE64.encode(key.public().spki_der());
        let command = json!({"command": "hosts.add", "name": name, "public_key": public_key});
        assert_eq!(admin::call(&lab.socket(), &command).await.unwrap()["name"], name);
        let host = Host::new(daemon.client(), key, identities[at % IDENTITIES].clone());
        let (owner, room, guardian) = (owner.clone(), room.clone(), guardian.clone());
        playing.spawn(async move {
            let making = owner.clone();
            let made = tokio::task::spawn_blocking(move || making.create(&[guardian]).unwrap());
            let (mut protector, mut key) = made.await.unwrap();
            let _permit = room.acquire().await.unwrap();
            let health = host.attest().await.unwrap();
            // The digest of each protector sent: the audit trail must contain the same digests for this host.
            let mut shown = Vec::with_capacity(RELEASES);
            for turn in 0..RELEASES {
                let api = if turn % 3 == 0 { ApiVersion::V1 } else { ApiVersion::V2 };
                shown.push(HEXLOWER.encode(digest(&SHA256, &protector).as_ref()));
                let released = host.roll(api, &health, &protector).await.unwrap();
                assert!(*released.keys.ingress == *key, "{name}: another ingress key");
                assert!(*released.keys.egress != *key, "{name}: the same key twice");
                if turn % 7 == at % 7 {
                    let (opener, egress) = (owner.clone(), released.egress_protector.clone());
                    let opened = tokio::task::spawn_blocking(move || opener.open(&egress).unwrap()).await.unwrap();
                    assert!(*opened == *released.keys.egress, "{name}: not the owner's key");
                }
                (protector, key) = (released.egress_protector, released.keys.egress);
            }
            (name, shown)
        });
    }
    let hosts: BTreeMap<String, Vec<String>> = playing.join_all().await.into_iter().collect();
    let total = HOSTS * RELEASES;
    println!("{HOSTS} hosts added, {total} releases: {:.0} a second", total as f64 / begun.elapsed().as_secs_f64());
    assert_eq!(hosts.len(), HOSTS);

    let after = daemon.metrics().await;
    let rise = |name, labels: &[(&str, &str)]| after.count(name, labels) - before.count(name, labels);
    assert_eq!(rise("claviger_releases_total", &[("outcome", "success")]), total as u64);
    assert_eq!(rise("claviger_releases_total", &[]), total as u64, "some failed");
    assert_eq!(rise("claviger_attestations_total", &[("outcome", "success")]), HOSTS as u64);
    assert_eq!(rise("claviger_audit_errors_total", &[]), 0);
    let mut members = after.values_of("claviger_hsm_sessions_open", "hsm");
    members.sort();
    assert_eq!(members, ["hsm-a", "hsm-b", "hsm-c"]);
    for member in &members {
        let of = [("hsm", member.as_str())];
        assert_eq!(after.count("claviger_hsm_logins_total", &of), 1, "logins to {member}");
        let sessions = after.count("claviger_hsm_sessions_open", &of);
        assert_eq!(after.count("claviger_hsm_key_searches_total", &of), sessions, "searches on {member}");
        assert!((1..=4).contains(&sessions), "{sessions} sessions on {member}");
    }
    // Nothing was repeated: as many decryptions and signatures as the releases need, not counting known-answer tests.
    for op in ["decrypt", "sign"] {
        let ok = rise("claviger_hsm_calls_total", &[("op", op), ("rv", "ok")]);
        assert_eq!(rise("claviger_hsm_calls_total", &[("op", op)]), ok, "{op} failed at times");
        assert!(ok >= total as u64, "{ok} {op}");
    }

    let trail = lab.audit();
    // A command has two lines, with one outcome each.
    let of = |line: &Value| (line["request"].as_str().unwrap().to_owned(), line["outcome"].to_string());
    let ids: BTreeSet<_> = trail.iter().map(of).collect();
    assert_eq!(ids.len(), trail.len(), "a request id twice");
    assert!(ids.iter().map(|(id, _)| id).all(|id| id.len() == 16 && id.bytes().all(|b| b.is_ascii_hexdigit())));
    let trail = &trail[lines_before..];
    assert_eq!(trail.len(), HOSTS * (2 + 1 + RELEASES), "one line for each decision, two for a command");
    let mut told: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in trail {
        let text = |field: &str| line[field].as_str().unwrap_or_else(|| panic!("no {field} in {line}"));
        assert!(text("time").ends_with('Z') && line["ms"].as_f64().unwrap() >= 0.0, "{line}");
        let name = text("host").to_owned();
        match text("event") {
            "hosts.add" => assert!(["requested", "success"].contains(&text("outcome")), "{line}"),
            "attest" => {
                assert_eq!(text("outcome"), "success");
                assert!(members.iter().any(|m| m == text("hsm")), "{line}");
            }
            "release" => {
                assert_eq!((text("outcome"), text("owner")), ("success", owner_name.as_str()));
                assert!(text("hsm").split(',').all(|used| members.iter().any(|m| m == used)), "{line}");
                told.entry(name).or_default().push(text("protector").to_owned());
            }
            other => panic!("an event {other}: {line}"),
        }
    }
    assert_eq!(told, hosts, "the trail tells of other protectors");
    assert!(daemon.stop().success());
}
