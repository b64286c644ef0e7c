//! Tests that the instruments work. The measured values are not judged here.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output};

use claviger_tests::said;
use serde_json::Value;

/// The names and versions of all packages of a lock file.
fn locked(file: &str) -> BTreeSet<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let lock: toml::Table = std::fs::read_to_string(path).unwrap().parse().unwrap();
    let text = |package: &toml::Value, field: &str| package[field].as_str().unwrap().to_owned();
    let packages = lock["package"].as_array().unwrap().iter();
    packages.map(|package| (text(package, "name"), text(package, "version"))).collect()
}

#[test]
fn instructions_are_counted_of_the_packages_that_the_daemon_is_built_from() {
    let (daemon, counted) = (locked("../Cargo.lock"), locked("instructions/Cargo.lock"));
    let names: BTreeSet<_> = daemon.iter().map(|(name, _)| name).collect();
    let others: Vec<_> = counted.difference(&daemon).filter(|(name, _)| names.contains(name)).collect();
    assert!(
        others.is_empty(),
        "other versions in bench/instructions/Cargo.lock: {others:?}; copy Cargo.lock over it and let cargo add what is missing"
    );
}

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
        "/own_cost_in_public_ops",
        "/own_cost_in_public_ops_spread/least",
        "/public_op_us",
        "/own_cost_us",
        "/daemon_cost_us",
        "/worker_cost_us",
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
    let sum = positive(&figures, "/daemon_cost_us") + positive(&figures, "/worker_cost_us");
    let own = positive(&figures, "/own_cost_us");
    // The medians of few rounds do not add up exactly.
    assert!((0.5..2.0).contains(&(sum / own)), "the parts are not the whole: {figures:#}");
    // Known-answer tests and checkpoints also use the HSMs, and operations in flight at the ends of a round count on
    // one side only.
    let operations = positive(&figures, "/hsm_operations_per_release");
    assert!(
        (0.9..2.6).contains(&operations),
        "a release is a decryption, and a signature that may be in stock: {figures:#}"
    );
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
    // Two operations of 30 ms on one session: 17 per second, and some that began before the short round. Without the
    // delay there would be hundreds.
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

#[test]
fn a_storm_of_many_owners() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["--storm", "60", "--owners", "3", "--hosts", "2", "--within", "500ms"];
    let (output, figures) = ceiling(&folder.path().join("storm.json"), &arguments);
    for pointer in
        ["/bound_seconds/median", "/empty/to_last_seconds/median", "/empty/of_bound/median", "/empty/wait_seconds/p99"]
    {
        positive(&figures, pointer);
    }
    let phases = ["full", "empty"].map(|phase| &figures[phase]);
    for phase in phases.into_iter().filter(|phase| !phase.is_null()) {
        assert_eq!(phase["lost"], 0, "{figures:#}");
        // Known-answer tests and checkpoints are added.
        assert!(positive(phase, "/hsm_operations_per_release/median") >= 0.9, "{figures:#}");
    }
    assert!(positive(&figures, "/empty/hsm_operations_per_release/median") >= 1.9, "{figures:#}");
    assert_eq!(figures["full"].is_null(), figures["has_stock"] == false, "{figures:#}");
    assert!(said(&output).contains("60 machines of 3 owners, by 2 hosts"), "{}", said(&output));
}
