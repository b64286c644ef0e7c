//! Tests with a hundred anonymous attackers of each kind beside honest hosts: every release succeeds, `/ready` stays true,
//! memory is limited. The binary `attackers` measures how much slower honest hosts become.

#![allow(clippy::print_stdout)]

use std::time::Duration;

use claviger_protocol::batch::{BatchRequest, parse_results};
use claviger_protocol::error::{Code, Refusal};
use claviger_tests::attackers::{Addresses, Attack, Crowd, Kind, Target};
use claviger_tests::{ALGORITHMS, Daemon, Lab, Options, PATIENCE, ROLL, open_release, roll_request};

const ATTACKERS: usize = 100;
const BATCH: &str = "/KeyProtection/service/v2.0/RollTransportKeys";
const XML: &str = "application/xml";
/// Maximum growth of the daemon's memory under attack, in MiB: the budget for bodies, and half of it for the rest. Without
/// limits, it grew by gigabytes.
const MEMORY: u64 = 768;

fn lab() -> Lab {
    let lab = Lab::make(Options::default());
    lab.configure(|config| {
        // Fewer connections than the attackers want, and a budget for bodies that they can exhaust.
        config.server.max_connections = 2 * ATTACKERS;
        config.server.body_memory_mib = 64;
        config.server.body_memory_per_address_mib = 0;
    });
    lab
}

/// Attackers at the address of the honest hosts.
fn crowd(pause: Duration) -> Crowd {
    Crowd { attackers: ATTACKERS, pause, nice: 0, addresses: Addresses::OfHosts }
}

async fn ready(daemon: &Daemon, beside: Kind) {
    let reply = daemon.probe("/ready").await;
    assert_eq!(reply.status, 200, "beside {beside:?}: {}", String::from_utf8_lossy(&reply.body));
}

#[tokio::test(flavor = "multi_thread")]
async fn honest_hosts_are_served_beside_a_hundred_attackers_of_each_kind() {
    let lab = lab();
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    let health = lab.host(daemon.client()).attest().await.unwrap();
    let (protector, identity) = (lab.protector(), lab.identity());
    let key = lab.owner().open(&protector).unwrap();
    let request = roll_request(&health, &protector);
    let target = Target::new(&lab, &daemon);
    let idle = daemon.process.status("VmRSS") / 1024;
    for kind in Kind::ALL.into_iter().filter(|kind| !kind.needs_tls()) {
        let attack = Attack::start(kind, &target, crowd(Duration::from_millis(100)));
        // As many as they come to.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        let kept = daemon.client();
        for turn in 0..4 {
            // Alternates between a new connection and the one used before.
            let fresh = daemon.client();
            let client = if turn % 2 == 0 { &fresh } else { &kept };
            let reply = client.post(ROLL, XML, request.clone()).await.unwrap();
            assert_eq!(reply.status, 200, "beside {kind:?}: {}", String::from_utf8_lossy(&reply.body));
            assert!(*open_release(&reply.body, &identity).unwrap().0.ingress == *key);
            ready(&daemon, kind).await;
        }
        let memory = daemon.process.status("VmRSS") / 1024;
        println!("{:42} {memory} MiB, {idle} before all", kind.describe());
        assert!(memory < idle + MEMORY, "{kind:?}: {memory} MiB, {idle} before");
        drop(attack);
    }
    let metrics = daemon.metrics().await;
    for (name, reasons) in [
        ("claviger_connections_cut_total", &["room"][..]),
        ("claviger_bodies_refused_total", &["unproven", "gave_way"]),
    ] {
        for reason in reasons {
            assert!(metrics.count(name, &[("reason", reason)]) > 0, "{name}: {reason}");
        }
    }
    assert!(daemon.stop().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn honest_hosts_are_served_beside_a_hundred_that_only_shake_hands() {
    let lab = lab();
    let plain = lab.serve();
    let health = lab.host(plain.client()).attest().await.unwrap();
    assert!(plain.stop().success());
    let daemon = lab.serve_tls();
    daemon.until_ready_is(200).await;
    let (protector, identity) = (lab.protector(), lab.identity());
    let key = lab.owner().open(&protector).unwrap();
    let request = roll_request(&health, &protector);
    let attack = Attack::start(Kind::Handshakes, &Target::new(&lab, &daemon), crowd(Duration::ZERO));
    tokio::time::sleep(Duration::from_millis(2500)).await;
    for turn in 0..4 {
        // Each on a connection of its own, from the attackers' address.
        let reply = daemon.client().post(ROLL, XML, request.clone()).await.unwrap();
        assert_eq!(reply.status, 200, "{turn}: {}", String::from_utf8_lossy(&reply.body));
        assert!(*open_release(&reply.body, &identity).unwrap().0.ingress == *key);
        ready(&daemon, Kind::Handshakes).await;
    }
    drop(attack);
    assert!(daemon.stop().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_batch_has_to_begin_with_a_certificate_that_is_right() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    let health = lab.host(daemon.client()).attest().await.unwrap();
    let protector = lab.protector();
    let items = 2 * 1024 * 1024 / protector.len();
    let batch = |health_certificate: &[u8], items| BatchRequest {
        health_certificate: health_certificate.to_vec(),
        algorithms: ALGORITHMS,
        ingress_protectors: vec![protector.clone(); items],
    };
    let send = async |body: Vec<u8>| {
        let reply = daemon.client().with_timeout(PATIENCE).post(BATCH, XML, body).await.unwrap();
        let code = (reply.status != 200).then(|| Refusal::parse(&reply.body).unwrap().code);
        (reply, code)
    };
    // A valid batch of more than 2 MiB.
    let body = batch(&health, items).to_xml();
    assert!(body.len() > 2 * 1024 * 1024);
    let (reply, _) = send(body).await;
    let results = parse_results(&reply.body).unwrap();
    assert_eq!((results.len(), results.iter().filter(|item| item.is_ok()).count()), (items, items));
    // An invalid certificate, and none.
    let mut forged = health.clone();
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(send(batch(&forged, items).to_xml()).await.1, Some(Code::HealthCertificate));
    let spaces = vec![b' '; 2 * 1024 * 1024];
    assert_eq!(send(spaces).await.1, Some(Code::RequestTooLarge));
    // Small batches are judged as before: first the structure.
    assert_eq!(send(batch(&forged, 1).to_xml()).await.1, Some(Code::HealthCertificate));
    assert_eq!(send(b"<x/>".to_vec()).await.1, Some(Code::InvalidRequest));
    let metrics = daemon.metrics().await;
    assert_eq!(metrics.count("claviger_bodies_refused_total", &[("reason", "unproven")]), 2);
    assert!(daemon.stop().success());
}
