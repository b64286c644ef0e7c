//! Baselines, and what hosts proved last.

use std::collections::BTreeMap;

use claviger_protocol::tpm::pcr::PcrValues;
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};

/// PCR values by their numbers, hexadecimal. The numbers are text on their way: a command's members are read through a form of
/// serde in which the names of members are nothing else.
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

/// A baseline, for people and machines.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Shown {
    /// Its name.
    pub name: String,
    /// Whether hosts with its values are healthy.
    pub enabled: bool,
    /// When it was added, seconds since 1970.
    pub added: i64,
    /// Its values.
    pub pcrs: Pcrs,
    /// The events of its log for its PCRs, where it has a log and is shown alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<MeasuredEvent>,
    /// What its log is worth, where it has one: an entry for each of its PCRs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replayed: Vec<Replayed>,
}

/// A PCR of a baseline beside the baseline's log.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Replayed {
    /// The PCR's number.
    pub pcr: usize,
    /// Whether the replay of the log gives the baseline's value. Otherwise the events of this PCR prove nothing.
    pub log_agrees: bool,
    /// Number of events that are not listed.
    pub omitted: usize,
}

/// An event of a boot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MeasuredEvent {
    /// The PCR that it was measured into.
    pub pcr: usize,
    /// Its digest, SHA-256, hexadecimal.
    pub digest: String,
    /// What it is.
    pub event: String,
    /// Whether only the host has it, or only the baseline; `None` where nothing is compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_new: Option<bool>,
}

/// What the policies say of a host's last evidence.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Checked {
    /// The host.
    pub host: String,
    /// When it proved this, seconds since 1970.
    pub at: i64,
    /// SHA-256 of its endorsement key's SubjectPublicKeyInfo.
    pub endorsement_key: String,
    /// Times that the TPM was restarted since its reset.
    pub restart_count: u32,
    /// Whether it would be healthy now.
    pub healthy: bool,
    /// The enabled baseline that it matches.
    pub baseline: Option<String>,
    /// The policies.
    pub policies: Vec<PolicyShown>,
    /// The values that were quoted.
    pub pcrs: Pcrs,
    /// What differs from each baseline, the closest first.
    pub baselines: Vec<Compared>,
}

/// A policy and what it says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PolicyShown {
    /// Its name.
    pub policy: String,
    /// Whether it holds.
    pub holds: bool,
}

/// A baseline beside a host's values.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Compared {
    /// Its name.
    pub name: String,
    /// Whether it is enabled.
    pub enabled: bool,
    /// Whether all its values are the host's.
    pub matches: bool,
    /// The PCRs that differ.
    pub differs: Vec<Differs>,
}

/// A PCR that differs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Differs {
    /// Its number.
    pub pcr: usize,
    /// The baseline's value.
    pub expected: String,
    /// The host's; `None`: it was not quoted.
    pub quoted: Option<String>,
    /// Whether the replay of the host's log gives the quoted value. Otherwise the events prove nothing: the log of a host
    /// whose kernel lies may show the events that are expected.
    #[serde(default)]
    pub log_agrees: bool,
    /// The events that only one of the two logs has. Where the baseline has no log that gives its value: those of the host.
    pub events: Vec<MeasuredEvent>,
    /// Number of such events that are not listed.
    #[serde(default)]
    pub omitted: usize,
}
