//! The instruments work and say what they promise. What they measure is nobody's business here.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

use claviger_tests::said;
use serde_json::Value;

fn ceiling(json: &Path, arguments: &[&str]) -> (Output, Value) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ceiling"));
    command.args(["--seconds", "0.2", "--rounds", "2", "--json"]).arg(json).args(arguments);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let figures = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    (output, figures)
}

fn positive(figures: &Value, pointer: &str) -> f64 {
    let value = figures.pointer(pointer).and_then(Value::as_f64);
    value.filter(|value| *value > 0.0).unwrap_or_else(|| panic!("no {pointer} in {figures:#}"))
}

#[test]
fn the_daemon_beside_the_raw_token() {
    let folder = tempfile::tempdir().unwrap();
    let (output, figures) = ceiling(&folder.path().join("ceiling.json"), &["--hsms", "2", "--sessions", "2"]);
    for pointer in [
        "/ratio",
        "/ratio_spread/least",
        "/own_cost_us",
        "/pkcs11_cost_us",
        "/raw_pairs_per_second",
        "/releases_per_second",
        "/raw_pair_seconds/p50",
        "/raw_pair_seconds/p99",
        "/release_seconds/p50",
        "/release_seconds/p99",
        "/light/ratio/median",
        "/light/release_seconds",
        "/light/decrypt_seconds",
        "/light/sign_seconds",
        "/resident_bytes",
        "/checked",
        "/machine/processors",
    ] {
        positive(&figures, pointer);
    }
    assert!(positive(&figures, "/efficiency") < 1.0, "more time inside the calls than there was: {figures:#}");
    let text = said(&output);
    assert!(text.contains("efficiency") && text.contains("2 HSMs of 2 sessions, RSA-2048"), "{text}");
    assert_eq!(text.contains("NOT OPTIMISED"), cfg!(debug_assertions), "{text}");
}

#[test]
fn throughput_over_members_that_are_far_away() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["--hsms", "1,2", "--sessions", "1", "--rtt", "30ms"];
    let (_, figures) = ceiling(&folder.path().join("scaling.json"), &arguments);
    let steps = figures["steps"].as_array().unwrap();
    assert_eq!(steps.iter().map(|step| step["hsms"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    // Two operations of 30 ms on one session: 17 a second, and some that were begun before a short round. Without the delay
    // it is hundreds.
    assert!(positive(&figures, "/steps/0/releases_per_second") < 60.0, "the delay has no effect: {figures:#}");
    assert!((positive(&figures, "/steps/0/of_linear") - 1.0).abs() < 1e-9);
    positive(&figures, "/steps/1/of_linear");
}

#[test]
fn idle_connections() {
    let folder = tempfile::tempdir().unwrap();
    let (_, figures) = ceiling(&folder.path().join("idle.json"), &["--idle", "300"]);
    assert_eq!(figures["connections"], 300);
    positive(&figures, "/p99_ratio/median");
    assert!(positive(&figures, "/resident_bytes") >= positive(&figures, "/resident_bytes_without") * 0.5);
}
