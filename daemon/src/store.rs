//! What must survive a restart: registered hosts, baselines, key-protection certificates and attestation signers.
//!
//! [`Contents`] is all of it as plain values, with the rules that every change obeys. A store (`backend`) keeps them, in one SQLite
//! file (`sqlite`) or in etcd (`etcd`), and decides every change on the newest contents. [`State`] is what the rest of the daemon
//! sees.
//!
//! Nothing here is on the path of a release: callers keep a snapshot in memory. All calls block on the store, so async callers
//! use `spawn_blocking`; they bring the lock that makes it one at a time, so that a change and the reading that follows it can be
//! one step.
//!
//! Times are seconds since 1970 (UTC) and come from the caller.

mod backend;
mod baselines;
mod certificates;
mod contents;
mod error;
mod etcd;
pub mod evidence;
mod hosts;
mod import;
mod labels;
mod limits;
mod records;
mod signers;
mod sqlite;
mod state;
mod table;
pub mod usage_counts;

pub use backend::Condition;
pub use baselines::{MAX_BASELINES, check_baseline_name};
pub use contents::Contents;
pub use error::StateError;
pub use etcd::EtcdSettings;
pub use hosts::check_host_name;
pub use import::{Import, Merged};
pub use labels::Labels;
pub use records::{Baseline, Certificate, Host, HostKind, Kind, NewCertificate, NewSigner, RevokedSigner, Signer};
pub use state::{State, View};

#[cfg(test)]
mod tests;
