//! One line of the trail, before the writer gives it its number.

use std::net::IpAddr;
use std::time::SystemTime;

use serde::{Serialize, Serializer};
use time::OffsetDateTime;
use time::macros::format_description;

use super::peer::Peer;

/// One record. Serialised in this order; what is `None` is left out. The writer puts `n`, `prev` and `node` in front.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    /// When it happened; written as RFC 3339 in UTC with milliseconds.
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// The request's id, as in the log and in the answer's header.
    pub request: String,
    /// `release`, `attest`, or an administrator's command.
    pub event: String,
    /// The version of the API that a release came by, like `v2.0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api: Option<&'static str>,
    /// The administrator, as the kernel says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<Peer>,
    /// The address that the request came from, as the connection says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// The registered name of the host that asked, as far as it is known; or of the one that a command is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// SHA-256 of the SubjectPublicKeyInfo of the host key or endorsement key, lower-case hexadecimal, where a command is about a
    /// host, or a host attests by its TPM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// SHA-256 of the SubjectPublicKeyInfo of the host's identity key, which the keys were encrypted to or which was certified.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity_key: Option<String>,
    /// Serial number of the health certificate that was shown, or issued; lower-case hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health_serial: Option<String>,
    /// `success` or the error's code. A command has two lines: `requested` before it is done; after it `success`, `failed`,
    /// or `stored` for a change that has no effect yet.
    pub outcome: String,
    /// SHA-256 of the ingress protector, lower-case hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protector: Option<String>,
    /// SHA-256 of the egress protector that was given out, lower-case hexadecimal: the next release of that machine has it as
    /// its `protector`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<String>,
    /// Thumbprint of the owner's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Thumbprint of the encryption certificate of the wrapping that was for this service: which guardian key decrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guardian_key: Option<String>,
    /// Thumbprint of the certificate that a command is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// What a command changes, where its name does not say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub change: Option<String>,
    /// The baseline that the host's measurements matched, where it attests by its TPM; or the one that a command is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<String>,
    /// The policies that a host which attests by its TPM fails.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failed_policies: Vec<&'static str>,
    /// The members that were used, or the one that a command is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hsm: Option<String>,
    /// How long it took until this record, milliseconds.
    pub ms: f64,
}

fn rfc3339<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&timestamp(*time).map_err(serde::ser::Error::custom)?)
}

/// A time as every line of the trail has it.
pub(super) fn timestamp(time: SystemTime) -> Result<String, time::error::Format> {
    let format = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    OffsetDateTime::from(time).format(format)
}
