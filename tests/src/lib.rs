//! The harness of the system tests: real daemons on real soft tokens, looked at from outside.
//!
//! [`Lab`] is a folder with tokens, keys, a registered host and a tenant; [`Daemon`] is a `claviger` that serves it, and
//! ends with the value, also when a test fails. [`Lab::behind_faulty`] makes the tokens misbehave on command, and
//! [`Lab::behind_servers`] puts them behind sockets. Addresses are always the kernel's choice. No test judges by time:
//! what waits, waits for [`PATIENCE`].
//!
//! `CLAVIGER_BIN` and `CLAVIGER_LOADGEN_BIN` name the binaries to test; without them, they are built.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)]

mod administrator;
mod binary;
mod daemon;
mod faulty;
mod lab;
mod process;
mod remote;
mod scrape;

pub mod attackers;
pub mod imports;
pub mod openloop;
pub mod prometheus;
pub mod protector;
pub mod raw;
pub mod stats;
pub mod tpm;

use std::time::Duration;

pub use administrator::Administrator;
pub use binary::{claviger, loadgen, run, worker};
pub use daemon::Daemon;
pub use faulty::{FaultyMembers, Stats};
pub use lab::{ALGORITHMS, HOST, Lab, Options, metadata, open_release, roll_request, until_attested};
pub use process::{Process, lives};
pub use remote::Remote;
pub use scrape::Metrics;

/// How long a test waits for something that has to happen. Only a failure takes this long.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The path of a release in `v2.0`.
pub const ROLL: &str = "/KeyProtection/service/v2.0/RollTransportKey";
/// The path of host-key attestation.
pub const ATTEST: &str = "/Attestation/v2.0/hostkeyattest";
/// The path of the metadata document.
pub const METADATA: &str = "/KeyProtection/service/metadata/2014-07/metadata.xml";

/// Asks `done` again and again until it gives something; panics with `what` after [`PATIENCE`].
pub fn until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let begun = std::time::Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(begun.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Runs a future to its end, for tests that are not asynchronous themselves.
pub fn block<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Runs another program to its end; says which package to install where it is missing.
///
/// # Panics
/// When it cannot be run.
pub fn tool(package: &str, command: &mut std::process::Command) -> std::process::Output {
    let name = command.get_program().to_owned();
    command.output().unwrap_or_else(|error| panic!("{}: {error}: apt-get install {package}", name.display()))
}

/// Both outputs of a program, as text.
#[must_use]
pub fn said(output: &std::process::Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
