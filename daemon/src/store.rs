//! The data that survives a restart: registered hosts, baselines, key-protection certificates and attestation signers.
//!
//! [`Contents`] holds all of it as plain values and has the rules for every change. A store (`backend`) keeps it in one
//! SQLite file (`sqlite`) or in etcd (`etcd`), and decides every change on the newest contents. The rest of the daemon
//! uses [`State`].
//!
//! Releases do not use this module: they read a snapshot in memory. All calls block on the store, so async callers use
//! `spawn_blocking`. The callers also lock the state, so that a change and the following read are one step.
//!
//! Times are seconds since 1970 (UTC) and are passed in by the caller.

mod backend;
mod baselines;
mod certificates;
mod contents;
mod error;
mod etcd;
pub(crate) mod evidence;
mod hosts;
mod import;
mod labels;
mod limits;
mod records;
mod signers;
mod sqlite;
mod state;
mod table;
mod transfer;
pub(crate) mod usage_counts;

pub use backend::Condition;
pub use baselines::{MAX_BASELINES, check_baseline_name};
pub use contents::Contents;
pub use error::StateError;
#[cfg(test)]
pub(crate) use etcd::testing::Server as EtcdServer;
pub use etcd::{Board, BoardError, EndpointAnswer, Entry, EtcdSettings, Lease, probe};
pub use hosts::check_host_name;
pub use import::{Import, Merged};
pub use labels::Labels;
pub use records::{Baseline, Certificate, Host, HostKind, Kind, NewCertificate, NewSigner, RevokedSigner, Signer};
pub use state::{State, View};
pub use transfer::Records;

#[cfg(test)]
mod tests;
