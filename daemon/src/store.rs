//! What must survive a restart: registered hosts, baselines, key-protection certificates and attestation signers.
//!
//! [`Contents`] is all of it as plain values, with the rules that every change obeys. A [`Store`] keeps them, today in one SQLite
//! file, and decides every change on the newest contents. [`State`] is what the rest of the daemon sees.
//!
//! Nothing here is on the path of a release: callers keep a snapshot in memory. All calls block on the store, so async callers
//! use `spawn_blocking`; they bring the lock that makes it one at a time, so that a change and the reading that follows it can be
//! one step.
//!
//! Times are seconds since 1970 (UTC) and come from the caller.

mod baselines;
mod certificates;
mod contents;
mod error;
mod hosts;
mod import;
mod labels;
mod signers;
mod sqlite;
mod state;
mod table;
pub mod usage_counts;

use std::fmt;
use std::sync::Arc;

use data_encoding::HEXLOWER;

pub use baselines::{Baseline, MAX_BASELINES, check_baseline_name};
pub use certificates::{Certificate, Kind, NewCertificate};
pub use contents::Contents;
pub use error::StateError;
pub use hosts::{Host, HostKind, check_host_name};
pub use import::{Import, Merged};
pub use labels::Labels;
pub use signers::{NewSigner, RevokedSigner, Signer};
pub use state::{State, View};

/// Longest public key or certificate that is stored, in bytes of DER.
const DER_LIMIT: usize = 64 * 1024;

/// Makes a change in a copy of the contents. It may be called several times, each time with newer contents; the last outcome
/// counts.
type Decision<'a> = &'a mut dyn FnMut(&mut Contents) -> Result<(), StateError>;

/// Where the contents are kept.
trait Store: fmt::Debug + Send {
    /// The contents now: the same value for as long as nothing has changed.
    ///
    /// # Errors
    /// When the store cannot be reached. Single tables that cannot be read say so themselves.
    fn contents(&self) -> Result<Arc<Contents>, StateError>;

    /// Makes a change, all of it or nothing, of the contents that it was decided on.
    ///
    /// # Errors
    /// Those of `decide`, and then nothing is changed; or when the store cannot be written.
    fn change(&mut self, decide: Decision<'_>) -> Result<(), StateError>;

    /// The log of the baseline that was added under this name at this time, if it has one.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn baseline_log(&self, name: &str, added: i64) -> Result<Option<Vec<u8>>, StateError>;
}

fn check_der(what: &str, der: &[u8]) -> Result<(), StateError> {
    if (1..=DER_LIMIT).contains(&der.len()) {
        return Ok(());
    }
    Err(StateError::Invalid(format!("{what} has 1 to {DER_LIMIT} octets of DER, not {}", der.len())))
}

fn check_key_id(key_id: &[u8]) -> Result<(), StateError> {
    if (1..=255).contains(&key_id.len()) {
        return Ok(());
    }
    Err(StateError::Invalid(format!("a key's CKA_ID has 1 to 255 octets, not {}", key_id.len())))
}

fn sha256_hex(bytes: &[u8]) -> String {
    HEXLOWER.encode(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref())
}

#[cfg(test)]
mod tests;
