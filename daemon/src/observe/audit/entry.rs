//! A record of the trail, before the writer numbers it.

use std::net::IpAddr;
use std::time::SystemTime;

use serde::{Serialize, Serializer};
use time::OffsetDateTime;
use time::macros::format_description;

use super::peer::Peer;

/// A record. The fields are written in this order; `None` is omitted. The writer adds `n`, `prev` and `node` in front.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    /// Time of the event; written as RFC 3339 in UTC with milliseconds.
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// The request's id, as in the log and in the reply's header.
    pub request: String,
    /// `release`, `attest`, or an administrator's command.
    pub event: String,
    /// API version of a release, for example `v2.0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api: Option<&'static str>,
    /// The administrator, as identified by the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<Peer>,
    /// The client's address, from the connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Registered name of the host that sent the request, if known; or of the host in a command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Whether this host has proved itself; not written. A summary names few others.
    #[serde(skip)]
    pub proved: bool,
    /// SHA-256 of the SubjectPublicKeyInfo of the host key or endorsement key, lower-case hexadecimal; for commands
    /// about a host, and for attestations by TPM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// SHA-256 of the SubjectPublicKeyInfo of the host's identity key, to which the keys were encrypted or which was
    /// certified.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity_key: Option<String>,
    /// Serial number of the presented or issued health certificate, lower-case hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health_serial: Option<String>,
    /// `success` or the error's code. A command has two lines: `requested` before it is executed, then `success`,
    /// `failed`, or `stored` for a change without effect so far.
    pub outcome: String,
    /// SHA-256 of the ingress protector, lower-case hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protector: Option<String>,
    /// SHA-256 of the egress protector that was sent, lower-case hexadecimal. The machine's next release has it as its
    /// `protector`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<String>,
    /// Thumbprint of the owner's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Thumbprint of the encryption certificate of this service's wrapping: the guardian key that decrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guardian_key: Option<String>,
    /// Thumbprint of the certificate in a command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// The change of a command, if its name does not say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub change: Option<String>,
    /// The baseline that the host matches, for attestation by TPM; or the baseline in a command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<String>,
    /// The policies that the host does not meet, for attestation by TPM.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failed_policies: Vec<&'static str>,
    /// The members that were used, or the member in a command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hsm: Option<String>,
    /// Time until this record, in milliseconds.
    pub ms: f64,
}

fn rfc3339<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&timestamp(*time).map_err(serde::ser::Error::custom)?)
}

/// A time in the format of the trail.
pub(super) fn timestamp(time: SystemTime) -> Result<String, time::error::Format> {
    let format = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    OffsetDateTime::from(time).format(format)
}
