//! The document of an export.

use serde::{Deserialize, Serialize};

use super::baselines::Pcrs;
use crate::store::{HostKind, Kind, Labels};

/// An export. The command that requests it encrypts it before it is written to a file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// Version of the format.
    pub(in crate::admin) version: u32,
    /// Time of the export, seconds since 1970.
    pub(in crate::admin) created: i64,
    pub(in crate::admin) hosts: Vec<Host>,
    /// Absent in documents of older daemons.
    #[serde(default)]
    pub(in crate::admin) baselines: Vec<Baseline>,
    pub(in crate::admin) certificates: Vec<KeyCertificate>,
    pub(in crate::admin) signers: Vec<Signer>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::admin) struct Host {
    pub(in crate::admin) name: String,
    /// SubjectPublicKeyInfo in DER, base64.
    pub(in crate::admin) public_key: String,
    pub(in crate::admin) enabled: bool,
    pub(in crate::admin) labels: Labels,
    /// Kind of the key. Documents of older daemons have only host keys.
    #[serde(default)]
    pub(in crate::admin) kind: HostKind,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::admin) struct Baseline {
    pub(in crate::admin) name: String,
    /// SHA-256 values by PCR number.
    pub(in crate::admin) pcrs: Pcrs,
    /// The event log of the values, base64.
    #[serde(default)]
    pub(in crate::admin) log: Option<String>,
    pub(in crate::admin) enabled: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::admin) struct KeyCertificate {
    pub(in crate::admin) kind: Kind,
    /// DER, base64.
    pub(in crate::admin) certificate: String,
    /// CKA_ID, hexadecimal.
    pub(in crate::admin) hsm_key: String,
    pub(in crate::admin) primary: bool,
    pub(in crate::admin) communications: bool,
    pub(in crate::admin) enabled: bool,
    pub(in crate::admin) labels: Labels,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::admin) struct Signer {
    /// DER, base64.
    pub(in crate::admin) certificate: String,
    /// CKA_ID, hexadecimal.
    pub(in crate::admin) hsm_key: String,
    pub(in crate::admin) current: bool,
    #[serde(default)]
    pub(in crate::admin) replaced: Option<i64>,
}
