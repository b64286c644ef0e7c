//! Tests of dashboards and rules with a real Prometheus, under load, while a member fails and comes back.

use std::path::Path;
use std::time::{Duration, Instant};

use claviger_dashboards::{panels, variables};
use claviger_protocol::batch::BatchRequest;
use claviger_tests::openloop::Traffic;
use claviger_tests::prometheus::Prometheus;
use claviger_tests::{ALGORITHMS, ATTEST, Daemon, Lab, Options, PATIENCE, ROLL};

const BATCH: &str = "/KeyProtection/service/v2.0/RollTransportKeys";
/// A low rate, because the machine runs everything else at the same time.
const RATE: f64 = 10.0;
const DEADLINE: Duration = Duration::from_secs(20);
/// Metrics of a state in etcd.
const SHARED: [&str; 3] = ["claviger_etcd_connected", "claviger_state_age", "claviger_state_revision"];

/// Returns the rules of the repository with short delays of their alerts; `promtool test rules` tests the real delays.
fn hasty_rules() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dashboards/prometheus/claviger.rules.yml");
    let rules = std::fs::read_to_string(path).unwrap();
    let hasty = rules.lines().filter_map(|line| match line.trim_start().split_once(": ") {
        Some(("for", _)) => Some(format!("{}for: 1s", &line[..line.len() - line.trim_start().len()])),
        Some(("keep_firing_for" | "interval", _)) => None,
        _ => Some(line.to_owned()),
    });
    hasty.collect::<Vec<_>>().join("\n") + "\n"
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !done().await {
        assert!(begun.elapsed() < PATIENCE, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Sends one request of each kind, right and wrong, beside the load.
async fn ask_for_everything(lab: &Lab, daemon: &Daemon, health: &[u8]) {
    let client = daemon.client();
    let ingress_protectors = lab.protectors();
    let health_certificate = health.to_vec();
    let batch = BatchRequest { health_certificate, algorithms: ALGORITHMS, ingress_protectors };
    assert_eq!(client.post(BATCH, "application/xml", batch.to_xml()).await.unwrap().status, 200);
    lab.host(daemon.client()).attest().await.unwrap();
    assert_eq!(client.post(ROLL, "application/xml", "<nothing/>").await.unwrap().status, 400);
    assert_eq!(client.post(ATTEST, "application/json", "{}").await.unwrap().status, 400);
    claviger_tests::metadata(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_query_has_data_every_rule_is_sound_and_a_member_that_fails_is_an_alert() {
    let lab = Lab::make(Options { hsms: 3, vms: 4, ..Options::default() });
    let daemon = lab.serve();
    let health = lab.host(daemon.client()).attest().await.unwrap();
    let traffic = Traffic::of_vms(&lab, &health);
    assert!(daemon.stop().success());
    let faulty = lab.behind_faulty();
    lab.configure(|config| {
        config.release.deadline_ms = DEADLINE.as_millis() as u64;
        // A machine that stands still for a moment must not look like a call that hangs.
        config.release.watchdog_ms = DEADLINE.as_millis() as u64;
    });
    let daemon = lab.serve();
    let prometheus = Prometheus::watch(&daemon, &hasty_rules(), &lab.file("prometheus")).await;
    let load = traffic.start(&daemon, RATE, DEADLINE);
    ask_for_everything(&lab, &daemon, &health).await;
    let down = ("ClavigerMemberDown".to_owned(), Some("hsm-b".to_owned()));
    until("a first release is seen", async || {
        let seen = prometheus.query("claviger_releases_total{outcome=\"success\"} > 10").await.unwrap();
        !seen.is_empty()
    })
    .await;
    assert!(!prometheus.firing().await.contains(&down));

    // The member fails: the fault is visible, and the status page describes it.
    faulty.set("hsm-b", &["call=* rv=CKR_DEVICE_REMOVED"]);
    until("the member's failure is an alert", async || prometheus.firing().await.contains(&down)).await;
    let page = daemon.probe("/").await;
    assert_eq!(page.status, 200);
    let page = String::from_utf8(page.body.to_vec()).unwrap();
    assert!(page.contains("2 of 3 HSMs serve, hsm-b does not"), "{page}");
    let firing = prometheus.firing().await;
    let others: Vec<_> = firing.iter().filter(|(name, hsm)| *name == down.0 && *hsm != down.1).collect();
    assert!(others.is_empty(), "{others:?}");

    // The member comes back, and the alert ends.
    faulty.clear("hsm-b");
    until("the alert ends", async || !prometheus.firing().await.contains(&down)).await;
    ask_for_everything(&lab, &daemon, &health).await;
    tokio::time::sleep(Duration::from_secs(3)).await;

    let mut faults = Vec::new();
    let mut asked = 0;
    for panel in panels() {
        for expression in panel.filled("15s") {
            asked += 1;
            match prometheus.query(&expression).await {
                // Only nodes with a shared state have these; the tests of nodes read them.
                Ok(result) if SHARED.iter().any(|name| expression.contains(name)) => {
                    assert!(result.is_empty(), "{expression}: this daemon has no etcd");
                }
                Ok(result) if result.is_empty() => {
                    faults.push(format!("{}, {}: no data\n    {expression}", panel.dashboard, panel.title));
                }
                // A division by zero gives NaN: a gap in one of several series, and no answer if it is the only one.
                Ok(result) if result.iter().all(|series| series["value"][1] == "NaN") => {
                    faults.push(format!("{}, {}: not a number\n    {expression}", panel.dashboard, panel.title));
                }
                Ok(_) => {}
                Err(error) => {
                    faults.push(format!("{}, {}: {error}\n    {expression}", panel.dashboard, panel.title));
                }
            }
        }
    }
    assert!(asked >= 60, "{asked} queries");
    for variable in variables() {
        if prometheus.label_values(&variable.filled(), &variable.label).await.is_empty() {
            faults.push(format!("{}: ${} has no values", variable.dashboard, variable.name));
        }
    }
    let rules = prometheus.rules().await;
    assert!(!rules.is_empty());
    for rule in &rules {
        if rule["health"] != "ok" {
            faults.push(format!("rule {}: {} {}", rule["name"], rule["health"], rule["lastError"]));
        }
    }
    for recorded in rules.iter().filter(|rule| rule["type"] == "recording") {
        let name = recorded["name"].as_str().unwrap();
        if prometheus.query(name).await.is_ok_and(|result| result.is_empty()) {
            faults.push(format!("the recording rule {name} records nothing"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));

    let page = daemon.probe("/metrics").await;
    let checked = lab.file("metrics.txt");
    std::fs::write(&checked, &page.body).unwrap();
    let promtool = std::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::fs::File::open(&checked).unwrap())
        .output()
        .unwrap();
    let said = claviger_tests::said(&promtool);
    assert!(promtool.status.success() && said.trim().is_empty(), "promtool check metrics: {said}");

    load.stop().await.assert_all_right();
    assert!(daemon.stop().success());
}
