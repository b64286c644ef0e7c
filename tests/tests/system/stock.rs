//! The stock on a real token: what a release costs with it, and what empties it.

#![allow(clippy::print_stdout)]

use std::sync::Arc;
use std::time::Duration;

use claviger::admin;
use claviger_client::host::Host;
use claviger_protocol::payload::ApiVersion;
use claviger_tests::Metrics;
use claviger_tests::{Administrator, Daemon, Lab, Options};
use serde_json::{Value, json};
use tokio::task::JoinSet;

const MACHINES: usize = 24;

/// Releases every protector at once. What the hosts have afterwards.
async fn storm(lab: &Lab, host: &Arc<Host>, protectors: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let health = host.attest().await.unwrap();
    let owner = Arc::new(lab.owner());
    let mut releasing = JoinSet::new();
    for protector in protectors {
        let (host, health, owner) = (host.clone(), health.clone(), owner.clone());
        releasing.spawn(async move {
            let released = host.roll(ApiVersion::V2, &health, &protector).await.unwrap();
            assert!(*owner.open(&protector).unwrap() == *released.keys.ingress);
            assert!(*owner.open(&released.egress_protector).unwrap() == *released.keys.egress);
            released.egress_protector
        });
    }
    releasing.join_all().await
}

async fn full(daemon: &Daemon, items: usize) -> Metrics {
    for _ in 0..600 {
        let metrics = daemon.metrics().await;
        if metrics.count("claviger_stock_depth", &[]) >= items as u64 {
            return metrics;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the stock is not filled with {items} items");
}

async fn depth(daemon: &Daemon) -> u64 {
    daemon.metrics().await.count("claviger_stock_depth", &[])
}

async fn ask(lab: &Lab, command: Value) -> Value {
    admin::call(&lab.socket(), &command).await.unwrap()
}

fn operations(metrics: &Metrics) -> u64 {
    ["decrypt", "sign"]
        .into_iter()
        .map(|op| metrics.count("claviger_hsm_calls_total", &[("op", op), ("rv", "ok")]))
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_on_a_full_stock_takes_one_operation_a_release() {
    let lab = Lab::make(Options { vms: MACHINES, ..Options::default() });
    lab.configure(|config| config.release.stock_mib = 64);
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    let host = Arc::new(lab.host(daemon.client()));
    let protectors = storm(&lab, &host, lab.protectors()).await;
    let before = full(&daemon, MACHINES).await;
    let protectors = storm(&lab, &host, protectors).await;
    let after = daemon.metrics().await;
    let rise = |name: &str| after.count(name, &[]) - before.count(name, &[]);
    assert_eq!(rise("claviger_releases_total"), MACHINES as u64);
    assert_eq!(rise("claviger_stock_used_total"), MACHINES as u64, "all of it was used");
    // Beside the releases: one health certificate, and what was made for the next storm since the queue was empty.
    let beside = 1 + rise("claviger_stock_made_total");
    let each = (operations(&after) - operations(&before) - beside) as f64 / MACHINES as f64;
    println!("{each:.3} operations of the HSMs for a release");
    // An item may have been signed and not been counted yet, or a probe came in between.
    assert!((0.9..=1.2).contains(&each), "{each}");

    // A daemon that starts after a power cut fills its stock before the machines ask.
    assert!(daemon.stop().success());
    let daemon = lab.serve();
    let filled = full(&daemon, MACHINES).await;
    assert_eq!(filled.count("claviger_releases_total", &[]), 0);
    let host = Arc::new(lab.host(daemon.client()));
    storm(&lab, &host, protectors).await;
    assert!(daemon.metrics().await.count("claviger_stock_used_total", &[]) >= MACHINES as u64);
    assert!(daemon.stop().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_limited_or_disabled_empties_the_stock_at_once() {
    let lab = Lab::make(Options { vms: 4, ..Options::default() });
    lab.configure(|config| config.release.stock_mib = 64);
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    let host = Arc::new(lab.host(daemon.client()));
    let protectors = storm(&lab, &host, lab.protectors()).await;
    full(&daemon, 4).await;

    let keys = ask(&lab, json!({"command": "keys.list"})).await;
    let of =
        |kind: &str| keys.as_array().unwrap().iter().find(|key| key["kind"] == kind).unwrap()["thumbprint"].clone();
    let dropped = async || daemon.metrics().await.count("claviger_stock_dropped_total", &[]);
    let health = host.attest().await.unwrap();
    for kind in ["encryption", "signing"] {
        let before = dropped().await;
        let limit =
            |labels: Value| json!({"command": "keys.limit", "certificate": of(kind), "kind": kind, "labels": labels});
        ask(&lab, limit(json!(["site=elsewhere"]))).await;
        assert!(dropped().await >= before + 4, "what was made before the change is gone when the command returns");
        // The host lacks the label: nothing that was made ahead leaves.
        let used = daemon.metrics().await.count("claviger_stock_used_total", &[]);
        assert!(host.roll(ApiVersion::V2, &health, &protectors[0]).await.is_err());
        assert_eq!(daemon.metrics().await.count("claviger_stock_used_total", &[]), used);
        ask(&lab, limit(json!([]))).await;
        full(&daemon, 4).await;
    }

    // A key that is not primary any more can be disabled.
    let administrator = Administrator(&lab);
    let made = administrator.json(&["keys", "generate", "--kind", "encryption", "--bits", "2048"]);
    let (id, file) = (made["hsm_key"].as_str().unwrap(), lab.file("next.pem"));
    let file = file.to_str().unwrap();
    assert!(
        administrator.run(&["keys", "self-sign", "--hsm-key", id, "--subject", "next", "--out", file]).status.success()
    );
    administrator.json(&["keys", "add", "--kind", "encryption", "--certificate", file, "--primary"]);
    full(&daemon, 4).await;
    let before = dropped().await;
    administrator.json(&["keys", "disable", of("encryption").as_str().unwrap()]);
    assert!(dropped().await >= before + 4);
    assert_eq!(depth(&daemon).await, 0);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(depth(&daemon).await, 0, "nothing is made for a key that does not serve");
    assert!(host.roll(ApiVersion::V2, &health, &protectors[0]).await.is_err());
    assert!(daemon.stop().success());
}
