//! Baselines, and what hosts proved last.

use std::collections::BTreeMap;
use std::sync::Arc;

use claviger_protocol::tpm::compare::differences;
use claviger_protocol::tpm::context::MAX_LOG;
use claviger_protocol::tpm::log::Log;
use claviger_protocol::tpm::pcr::{PcrSet, PcrValues, Value as PcrValue};
use claviger_protocol::tpm::policy::{self, Policy};
use data_encoding::{BASE64, HEXLOWER, HEXLOWER_PERMISSIVE};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Change, read};
use crate::admin::Peer;
use crate::attest::baselines::until_next_second;
use crate::attest::evidence::Evidence;
use crate::service::{Service, unix_now};
use crate::state::{self, State, check_baseline_name, check_host_name};

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
    /// What was measured into its PCRs, where the log is known that it was taken from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<MeasuredEvent>,
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
    /// The events behind it.
    pub events: Vec<MeasuredEvent>,
}

fn reply(value: impl Serialize) -> Result<Value, String> {
    serde_json::to_value(value).map_err(|e| e.to_string())
}

/// Reads PCR values.
pub(super) fn pcr_values(pcrs: &Pcrs) -> Result<PcrValues, String> {
    let mut values = PcrValues::default();
    for (pcr, value) in &pcrs.0 {
        let value = HEXLOWER_PERMISSIVE.decode(value.as_bytes()).ok().and_then(|value| PcrValue::try_from(value).ok());
        let value = value.ok_or_else(|| format!("the value of PCR {pcr} is not 64 hexadecimal digits (SHA-256)"))?;
        if !values.set(*pcr, value) {
            return Err(format!("there is no PCR {pcr}; they are 0 to 23"));
        }
    }
    Ok(values)
}

fn shown(baseline: &state::Baseline) -> Shown {
    let log = baseline.log.as_deref().and_then(|log| Log::parse(log).ok());
    let set = baseline.values.set_of();
    let events = log.iter().flat_map(|log| {
        set.iter().flat_map(|pcr| differences(pcr as u32, None, log).into_iter().map(move |event| (pcr, event)))
    });
    Shown {
        name: baseline.name.clone(),
        enabled: baseline.enabled,
        added: baseline.added,
        pcrs: (&baseline.values).into(),
        events: events
            .map(|(pcr, event)| MeasuredEvent {
                pcr,
                digest: HEXLOWER.encode(&event.digest),
                event: event.description,
                is_new: None,
            })
            .collect(),
    }
}

pub(super) async fn list(service: &Arc<Service>) -> Result<Value, String> {
    let all = read(service, |state| state.baselines_without_logs()).await?;
    reply(all.iter().map(shown).collect::<Vec<_>>())
}

pub(super) async fn show(service: &Arc<Service>, name: String) -> Result<Value, String> {
    reply(shown(&read(service, move |state| state.baseline_by_name(&name)).await?))
}

/// Makes a change of a baseline, on record.
async fn change(
    service: &Arc<Service>,
    event: &'static str,
    name: &str,
    what: Option<String>,
    peer: Peer,
    work: impl FnOnce(&mut State) -> Result<state::Baseline, state::StateError> + Send + 'static,
) -> Result<Value, String> {
    // Names in the trail are names.
    check_baseline_name(name).map_err(|e| e.to_string())?;
    let mut change = Change::new(event, peer);
    change.attempt.baseline = Some(name.to_owned());
    change.attempt.change = what;
    let note = |attempt: &mut crate::attempt::Attempt, baseline: &state::Baseline| {
        attempt.baseline = Some(baseline.name.clone());
    };
    let changed = change.make(service, work, note).await?;
    reply(Shown { events: Vec::new(), ..shown(&changed) })
}

pub(super) async fn add(
    service: &Arc<Service>,
    name: String,
    pcrs: &Pcrs,
    log: Option<&str>,
    peer: Peer,
) -> Result<Value, String> {
    let values = pcr_values(pcrs)?;
    let log = log.map(|log| BASE64.decode(log.as_bytes())).transpose().map_err(|_| "the log is not base64")?;
    if let Some(log) = &log {
        if log.len() > MAX_LOG {
            return Err(format!("the log is longer than {MAX_LOG} bytes"));
        }
        Log::parse(log).map_err(|error| format!("the log cannot be read: {error}"))?;
    }
    store(service, "baselines.add", name, values, log, None, peer).await
}

pub(super) async fn capture(
    service: &Arc<Service>,
    name: String,
    host: String,
    pcrs: Vec<usize>,
    from_log: bool,
    peer: Peer,
) -> Result<Value, String> {
    let evidence = last_evidence(service, &host).await?;
    let log = Log::parse(&evidence.log).map_err(|error| format!("the host's log cannot be read: {error}"))?;
    let replayed = log.replay();
    let mut values = PcrValues::default();
    for pcr in PcrSet::ALWAYS.union(pcrs.into_iter().collect()).iter() {
        let value = match (evidence.values.get(pcr), replayed.get(pcr)) {
            (Some(quoted), _) => quoted,
            (None, Some(replayed)) if from_log => replayed,
            _ => {
                return Err(format!(
                    "host {host} did not quote PCR {pcr}, because no enabled baseline has it; --from-log takes its value \
                     from the host's event log, which nothing proves until hosts quote that PCR"
                ));
            }
        };
        if *value == [0; 32] {
            return Err(format!("PCR {pcr} of host {host} is zero: nothing was measured into it"));
        }
        values.set(pcr, *value);
    }
    let what = format!("from host {host}");
    store(service, "baselines.capture", name, values, Some(evidence.log), Some(what), peer).await
}

async fn store(
    service: &Arc<Service>,
    event: &'static str,
    name: String,
    values: PcrValues,
    log: Option<Vec<u8>>,
    what: Option<String>,
    peer: Peer,
) -> Result<Value, String> {
    let now = unix_now();
    let of = name.clone();
    let work = move |state: &mut State| state.add_baseline(&of, &values, log.as_deref(), now);
    change(service, event, &name, what, peer, work).await
}

pub(super) async fn enable(service: &Arc<Service>, name: String, enabled: bool, peer: Peer) -> Result<Value, String> {
    let event = if enabled { "baselines.enable" } else { "baselines.disable" };
    let of = name.clone();
    change(service, event, &name, None, peer, move |state| state.enable_baseline(&of, enabled)).await
}

pub(super) async fn remove(service: &Arc<Service>, name: String, peer: Peer) -> Result<Value, String> {
    let of = name.clone();
    let removed = change(service, "baselines.remove", &name, None, peer, move |state| state.remove_baseline(&of)).await;
    // A later baseline of the name is added in a later second than any certificate that names this one was issued in.
    until_next_second().await;
    removed
}

/// What a host proved last.
async fn last_evidence(service: &Arc<Service>, host: &str) -> Result<Evidence, String> {
    check_host_name(host).map_err(|e| e.to_string())?;
    let (of, name) = (Arc::clone(service), host.to_owned());
    let registered = read(service, move |state| state.host_by_name(&name)).await?;
    let registered = registered.ok_or_else(|| format!("no host {host:?} is registered"))?;
    let found = tokio::task::spawn_blocking(move || of.evidence.of(&registered.name)).await;
    let found = found.map_err(|e| e.to_string())?.map_err(|e| format!("what hosts proved last cannot be read: {e}"))?;
    found.ok_or_else(|| format!("host {host} has not proved by its TPM what it booted; have it attest first"))
}

/// What the policies would say of a host's last evidence now.
pub(super) async fn check(service: &Arc<Service>, host: String) -> Result<Value, String> {
    let evidence = last_evidence(service, &host).await?;
    let baselines = read(service, |state| state.baselines()).await?;
    let checked = tokio::task::spawn_blocking(move || checked(host, &evidence, baselines)).await;
    reply(checked.map_err(|e| e.to_string())??)
}

fn checked(host: String, evidence: &Evidence, baselines: Vec<state::Baseline>) -> Result<Checked, String> {
    let log = Log::parse(&evidence.log).map_err(|error| format!("the host's log cannot be read: {error}"))?;
    let enabled: Vec<_> = baselines
        .iter()
        .filter(|baseline| baseline.enabled)
        .map(|baseline| policy::Baseline { name: baseline.name.clone(), values: baseline.values.clone() })
        .collect();
    let verdict = policy::judge(&log, &evidence.values, evidence.restart_count, &enabled);
    let mut compared: Vec<_> = baselines.iter().map(|baseline| compare(baseline, evidence, &log)).collect();
    compared.sort_by_key(|compared| (compared.differs.len(), !compared.enabled));
    Ok(Checked {
        host,
        at: evidence.at,
        endorsement_key: evidence.endorsement_key.clone(),
        restart_count: evidence.restart_count,
        healthy: verdict.failed.is_empty(),
        baseline: verdict.baseline.map(|baseline| baseline.name.clone()),
        policies: Policy::ALL
            .iter()
            .map(|policy| PolicyShown { policy: policy.name().to_owned(), holds: !verdict.failed.contains(policy) })
            .collect(),
        pcrs: (&evidence.values).into(),
        baselines: compared,
    })
}

fn compare(baseline: &state::Baseline, evidence: &Evidence, log: &Log<'_>) -> Compared {
    let before = baseline.log.as_deref().and_then(|log| Log::parse(log).ok());
    let mut differs = Vec::new();
    for (pcr, expected) in baseline.values.iter() {
        let quoted = evidence.values.get(pcr);
        if quoted == Some(expected) {
            continue;
        }
        let events = differences(pcr as u32, before.as_ref(), log).into_iter().map(|event| MeasuredEvent {
            pcr,
            digest: HEXLOWER.encode(&event.digest),
            event: event.description,
            is_new: before.is_some().then_some(event.is_new),
        });
        differs.push(Differs {
            pcr,
            expected: HEXLOWER.encode(expected),
            quoted: quoted.map(|value| HEXLOWER.encode(value)),
            events: events.collect(),
        });
    }
    let (name, enabled) = (baseline.name.clone(), baseline.enabled);
    Compared { name, enabled, matches: differs.is_empty(), differs }
}
