//! Harness of the system tests: real daemons on real soft tokens, tested from outside.
//!
//! [`Lab`] is a directory with tokens, keys, a registered host and a tenant. [`Daemon`] is a `claviger` that serves a lab;
//! it is stopped when the value is dropped, even if a test fails. [`Lab::behind_faulty`] makes the tokens misbehave on
//! command, and [`Lab::behind_servers`] puts them behind sockets. The kernel chooses all ports. No test fails because of a
//! timing; waits end after [`PATIENCE`].
//!
//! `CLAVIGER_BIN` and `CLAVIGER_LOADGEN_BIN` name the binaries under test; without them, the binaries are built.
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
pub mod sandbox;
mod scrape;
mod tool;
mod wait;

pub mod attackers;
pub mod authority;
pub mod etcd;
pub mod idle;
pub mod imports;
pub mod openloop;
pub mod prometheus;
pub mod protector;
pub mod qemu;
pub mod raw;
pub mod stats;
pub mod tpm;
pub mod wire;

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
