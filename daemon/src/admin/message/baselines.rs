//! Messages about baselines and the last evidence of hosts.

use std::collections::BTreeMap;

use claviger_protocol::tpm::pcr::PcrValues;
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};

/// PCR values by PCR number, hexadecimal. The numbers are text in JSON, because serde reads a command through a form
/// that allows only text as member names.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
pub struct Pcrs(pub BTreeMap<usize, String>);

impl TryFrom<BTreeMap<String, String>> for Pcrs {
    type Error = String;

    fn try_from(named: BTreeMap<String, String>) -> Result<Self, Self::Error> {
        let number = |(name, value): (String, String)| match name.parse() {
            Ok(pcr) => Ok((pcr, value)),
            Err(_) => Err(format!("{name:?} is not the number of a PCR")),
        };
        named.into_iter().map(number).collect::<Result<_, _>>().map(Self)
    }
}

impl From<Pcrs> for BTreeMap<String, String> {
    fn from(pcrs: Pcrs) -> Self {
        pcrs.0.into_iter().map(|(pcr, value)| (pcr.to_string(), value)).collect()
    }
}

impl From<&PcrValues> for Pcrs {
    fn from(values: &PcrValues) -> Self {
        Self(values.iter().map(|(pcr, value)| (pcr, HEXLOWER.encode(value))).collect())
    }
}

/// A baseline, for people and programs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Shown {
    /// The baseline's name.
    pub name: String,
    /// Whether hosts with its values are accepted.
    pub enabled: bool,
    /// Time at which it was added, seconds since 1970.
    pub added: i64,
    /// The PCR values.
    pub pcrs: Pcrs,
    /// The events of its PCRs, if it has a log and only this baseline is shown.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<MeasuredEvent>,
    /// Whether its log proves the values: one entry for each PCR. Empty without a log.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replayed: Vec<Replayed>,
}

/// Compares a PCR of a baseline with the baseline's log.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Replayed {
    /// Number of the PCR.
    pub pcr: usize,
    /// Whether the replay of the log gives the baseline's value. If not, the events of this PCR prove nothing.
    pub log_agrees: bool,
    /// Number of events that are not listed.
    pub omitted: usize,
}

/// An event of a boot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MeasuredEvent {
    /// The PCR that the event extended.
    pub pcr: usize,
    /// SHA-256 digest of the event, hexadecimal.
    pub digest: String,
    /// Description of the event.
    pub event: String,
    /// `true`: only the host has the event; `false`: only the baseline has it; `None`: not compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_new: Option<bool>,
}

/// The result of all policies for a host's last evidence.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Checked {
    /// Name of the host.
    pub host: String,
    /// Time of the evidence, seconds since 1970.
    pub at: i64,
    /// SHA-256 of the endorsement key's SubjectPublicKeyInfo.
    pub endorsement_key: String,
    /// Number of times that the TPM was restarted since its last reset.
    pub restart_count: u32,
    /// Whether the evidence would be accepted now.
    pub healthy: bool,
    /// The enabled baseline that matches.
    pub baseline: Option<String>,
    /// The results of the policies.
    pub policies: Vec<PolicyShown>,
    /// The quoted values.
    pub pcrs: Pcrs,
    /// The differences from each baseline, the closest baseline first.
    pub baselines: Vec<Compared>,
}

/// The result of a policy.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PolicyShown {
    /// Name of the policy.
    pub policy: String,
    /// Whether it is met.
    pub holds: bool,
}

/// The comparison of a baseline with a host's values.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Compared {
    /// Name of the baseline.
    pub name: String,
    /// Whether it is enabled.
    pub enabled: bool,
    /// Whether the host has all of its values.
    pub matches: bool,
    /// The PCRs with different values.
    pub differs: Vec<Differs>,
}

/// A PCR with different values.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Differs {
    /// Number of the PCR.
    pub pcr: usize,
    /// The baseline's value.
    pub expected: String,
    /// The host's value; `None`: not quoted.
    pub quoted: Option<String>,
    /// Whether the replay of the host's log gives the quoted value. If not, the events prove nothing: a host with a
    /// compromised kernel can present any events.
    #[serde(default)]
    pub log_agrees: bool,
    /// The events that only one of the two logs has. If the baseline has no log that gives its value: all events of the
    /// host.
    pub events: Vec<MeasuredEvent>,
    /// Number of events that are not listed.
    #[serde(default)]
    pub omitted: usize,
}
