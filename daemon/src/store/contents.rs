//! The stored data as plain values. Both stores read and write it, and every change is decided on it.
//!
//! The rules of the state (unique names and keys, one primary certificate of a kind, and so on) are methods of
//! [`Contents`] in the modules of their records. They do not depend on files or networks.

use super::labels::Labels;
use super::records::{Certificate, Host, KeptBaseline, Kind, RemovedBaseline, RevokedSigner, Signer};
use super::table::{Changes, Table};

/// All stored data at one point in time. Copies share the records.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// Key: name in lower case.
    pub(super) hosts: Table<String, Host>,
    /// Key: name in lower case.
    pub(super) baselines: Table<String, KeptBaseline>,
    /// Names that are reserved. Key: name in lower case.
    pub(super) removed_baselines: Table<String, RemovedBaseline>,
    /// Key: kind and thumbprint. The restrictions are in `limits`.
    pub(super) certificates: Table<(Kind, String), Certificate>,
    /// The labels that a host needs for a restricted key. Key: public key (DER SubjectPublicKeyInfo). A restriction
    /// outlives the certificates of its key.
    pub(super) limits: Table<Vec<u8>, Labels>,
    /// Key: thumbprint.
    pub(super) signers: Table<String, Signer>,
    /// Key: thumbprint.
    pub(super) revoked: Table<String, RevokedSigner>,
}

/// The difference between two [`Contents`].
#[derive(Debug)]
pub(super) struct Delta {
    pub(super) hosts: Changes<String, Host>,
    pub(super) baselines: Changes<String, KeptBaseline>,
    pub(super) removed_baselines: Changes<String, RemovedBaseline>,
    pub(super) certificates: Changes<(Kind, String), Certificate>,
    pub(super) limits: Changes<Vec<u8>, Labels>,
    pub(super) signers: Changes<String, Signer>,
    pub(super) revoked: Changes<String, RevokedSigner>,
}

impl Contents {
    /// The changes that lead from `older` to this.
    pub(super) fn delta_since(&self, older: &Self) -> Delta {
        Delta {
            hosts: self.hosts.changes_since(&older.hosts),
            baselines: self.baselines.changes_since(&older.baselines),
            removed_baselines: self.removed_baselines.changes_since(&older.removed_baselines),
            certificates: self.certificates.changes_since(&older.certificates),
            limits: self.limits.changes_since(&older.limits),
            signers: self.signers.changes_since(&older.signers),
            revoked: self.revoked.changes_since(&older.revoked),
        }
    }

    /// Whether every table can be read.
    pub(super) fn is_whole(&self) -> bool {
        let Self { hosts, baselines, removed_baselines, certificates, limits, signers, revoked } = self;
        hosts.is_readable()
            && baselines.is_readable()
            && removed_baselines.is_readable()
            && certificates.is_readable()
            && limits.is_readable()
            && signers.is_readable()
            && revoked.is_readable()
    }
}

impl Delta {
    pub(super) fn is_empty(&self) -> bool {
        let Self { hosts, baselines, removed_baselines, certificates, limits, signers, revoked } = self;
        hosts.is_empty()
            && baselines.is_empty()
            && removed_baselines.is_empty()
            && certificates.is_empty()
            && limits.is_empty()
            && signers.is_empty()
            && revoked.is_empty()
    }
}
