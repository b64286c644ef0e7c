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
mod paths;
pub mod process;
mod remote;
mod scrape;
mod tool;
mod wait;

pub mod attackers;
pub mod authority;
pub mod imports;
pub mod openloop;
pub mod prometheus;
pub mod protector;
pub mod raw;
pub mod stats;
pub mod tpm;

pub use administrator::Administrator;
pub use binary::{claviger, loadgen, run, worker};
pub use daemon::Daemon;
pub use faulty::{FaultyMembers, Stats};
pub use lab::{ALGORITHMS, HOST, Lab, Options, metadata, open_release, roll_request, until_attested};
pub use paths::{ATTEST, METADATA, ROLL};
pub use process::{Process, lives};
pub use remote::Remote;
pub use scrape::Metrics;
pub use tool::{said, tool};
pub use wait::{PATIENCE, block, until};
