//! Test of the architecture: imports run downwards, without a circle.

use std::path::{Path, PathBuf};

use claviger_tests::imports::Imports;

/// The rooms of the daemon from top to bottom, as in `docs/ARCHITECTURE.md`. Each imports rooms below it only.
const ROOMS: [&str; 21] = [
    "cli",
    "lab",
    "run",
    "admin",
    "checks",
    "status",
    "http",
    "release",
    "attest",
    "nodes",
    "service",
    "admission",
    "stock",
    "tls",
    "registry",
    "signing",
    "store",
    "request",
    "observe",
    "config",
    "sys",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/")).to_owned()
}

#[test]
fn no_crate_imports_in_circles() {
    let daemon = ["daemon/src", "daemon/protocol/src", "daemon/hsm/src", "daemon/process/src", "daemon/client/src"];
    let others = ["bench/src", "dashboards/src", "loadgen/src", "tests/src"];
    for sources in daemon.into_iter().chain(others) {
        let circles = Imports::of_crate(&root().join(sources)).circles();
        let told: Vec<_> = circles.iter().map(ToString::to_string).collect();
        assert!(circles.is_empty(), "{sources}: {}", told.join("\n"));
    }
}

#[test]
fn rooms_of_the_daemon_import_downwards() {
    let disorder = Imports::of_crate(&root().join("daemon/src")).disorder(&ROOMS);
    let told: Vec<_> = disorder.iter().map(ToString::to_string).collect();
    assert!(disorder.is_empty(), "daemon/src:\n{}", told.join("\n"));
}
