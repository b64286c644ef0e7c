//! Commands about baselines, and about the last evidence of hosts.

use std::sync::Arc;
use std::time::Duration;

use claviger_protocol::tpm::compare::{Difference, differences};
use claviger_protocol::tpm::context::MAX_LOG;
use claviger_protocol::tpm::log::Log;
use claviger_protocol::tpm::pcr::{PcrSet, PcrValues, Value as PcrValue};
use claviger_protocol::tpm::policy::{self, Policy};
use data_encoding::{BASE64, HEXLOWER, HEXLOWER_PERMISSIVE};
use serde_json::Value;

use super::change::{Change, read, reply};
use crate::admin::message::baselines::{Checked, Compared, Differs, MeasuredEvent, Pcrs, PolicyShown, Replayed, Shown};
use crate::observe::audit::Peer;
use crate::service::Service;
use crate::store::evidence::Evidence;
use crate::store::{self, Host, State, check_baseline_name, check_host_name};
use crate::sys::clock::unix_now;

/// Longest reservation of a name for which a command waits.
const SHORT_RESERVATION: Duration = Duration::from_secs(15);

/// Parses PCR values.
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

fn measured(pcr: usize, event: Difference, is_compared: bool) -> MeasuredEvent {
    MeasuredEvent {
        pcr,
        digest: HEXLOWER.encode(&event.digest),
        event: event.description,
        is_new: is_compared.then_some(event.is_new),
    }
}

fn shown(baseline: &store::Baseline) -> Shown {
    let (mut events, mut replayed) = (Vec::new(), Vec::new());
    if let Some(log) = baseline.log.as_deref().and_then(|log| Log::parse(log).ok()) {
        let given = log.replay();
        for (pcr, value) in baseline.values.iter() {
            let all = differences(pcr as u32, None, &log);
            events.extend(all.events.into_iter().map(|event| measured(pcr, event, false)));
            replayed.push(Replayed { pcr, log_agrees: given.get(pcr) == Some(value), omitted: all.omitted });
        }
    }
    Shown {
        name: baseline.name.clone(),
        enabled: baseline.enabled,
        added: baseline.added,
        pcrs: (&baseline.values).into(),
        events,
        replayed,
    }
}

pub(super) async fn list(service: &Arc<Service>) -> Result<Value, String> {
    let all = read(service, |state| state.baselines_without_logs()).await?;
    reply(all.iter().map(shown).collect::<Vec<_>>())
}

pub(super) async fn show(service: &Arc<Service>, name: String) -> Result<Value, String> {
    reply(shown(&read(service, move |state| state.baseline_by_name(&name)).await?))
}

/// Changes a baseline, with records in the audit trail.
async fn change(
    service: &Arc<Service>,
    event: &'static str,
    name: &str,
    what: Option<String>,
    peer: Peer,
    work: impl FnOnce(&mut State) -> Result<store::Baseline, store::StateError> + Send + 'static,
) -> Result<Value, String> {
    // Validate the name, because it is written to the audit trail.
    check_baseline_name(name).map_err(|e| e.to_string())?;
    let mut change = Change::new(event, peer);
    change.attempt.baseline = Some(name.to_owned());
    change.attempt.change = what;
    let note = |attempt: &mut crate::request::Attempt, baseline: &store::Baseline| {
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
    log.as_deref().map(check_log).transpose()?;
    store(service, "baselines.add", name, values, log, None, peer).await
}

/// Checks the event log of a baseline before it is stored.
pub(super) fn check_log(log: &[u8]) -> Result<(), String> {
    if log.len() > MAX_LOG {
        return Err(format!("the log is longer than {MAX_LOG} bytes"));
    }
    Log::parse(log).map(drop).map_err(|error| format!("the log cannot be read: {error}"))
}

/// The source of a captured baseline.
#[derive(Debug)]
pub(super) struct Source {
    /// The reference host.
    pub(super) host: String,
    /// Time of the evidence that the administrator has seen, seconds since 1970.
    pub(super) at: Option<i64>,
    /// PCRs in addition to 0, 2, 4 and 7.
    pub(super) pcrs: Vec<usize>,
    /// Whether values of PCRs that were not quoted are taken from the event log.
    pub(super) from_log: bool,
}

pub(super) async fn capture(service: &Arc<Service>, name: String, source: Source, peer: Peer) -> Result<Value, String> {
    let evidence = last_evidence(service, &source.host).await?;
    let values = source.values(&evidence)?;
    let what = format!("from host {}, which proved it at {}", source.host, evidence.at);
    store(service, "baselines.capture", name, values, Some(evidence.log), Some(what), peer).await
}

impl Source {
    /// Collects the baseline's values.
    fn values(&self, evidence: &Evidence) -> Result<PcrValues, String> {
        let Self { host, at, pcrs, from_log } = self;
        if let Some(at) = at
            && *at != evidence.at
        {
            return Err(format!(
                "the last evidence of host {host} is of {}, not of {at}; look at it first: claviger hosts check {host}",
                evidence.at
            ));
        }
        let log = Log::parse(&evidence.log).map_err(|error| format!("the host's log cannot be read: {error}"))?;
        let replayed = log.replay();
        let mut values = PcrValues::default();
        for pcr in PcrSet::ALWAYS.union(pcrs.iter().copied().collect()).iter() {
            let value = match (evidence.values.get(pcr), replayed.get(pcr)) {
                (Some(quoted), _) => quoted,
                (None, Some(replayed)) if *from_log => replayed,
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
        Ok(values)
    }
}

/// Describes accepted values for the audit trail: the PCRs, and their digest as it appears in a quote.
fn accepted(values: &PcrValues, what: Option<String>) -> String {
    let pcrs: Vec<_> = values.iter().map(|(pcr, _)| pcr.to_string()).collect();
    let what = what.map(|what| format!("{what}; ")).unwrap_or_default();
    format!("{what}PCRs {}, SHA-256 of their values {}", pcrs.join(" "), HEXLOWER.encode(&values.digest()))
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
    name_is_free(service, &name, &values).await?;
    let now = unix_now();
    let of = name.clone();
    let what = accepted(&values, what);
    let work = move |state: &mut State| state.add_baseline(&of, &values, log.as_deref(), now);
    change(service, event, &name, Some(what), peer, work).await
}

/// If the name is reserved for a few seconds only, waits until it is free. On one machine it never takes longer, so
/// administrators need not know of it. A longer reservation is refused when the change is made.
async fn name_is_free(service: &Arc<Service>, name: &str, values: &PcrValues) -> Result<(), String> {
    loop {
        let (of, with, now) = (name.to_owned(), values.clone(), unix_now());
        let until = read(service, move |state| state.reserved_until(&of, &with, now)).await?;
        let wait = until.and_then(|until| u64::try_from(until.saturating_sub(now)).ok()).map(Duration::from_secs);
        let Some(wait) = wait.filter(|wait| *wait <= SHORT_RESERVATION) else { return Ok(()) };
        tokio::time::sleep(wait).await;
    }
}

pub(super) async fn enable(service: &Arc<Service>, name: String, enabled: bool, peer: Peer) -> Result<Value, String> {
    let event = if enabled { "baselines.enable" } else { "baselines.disable" };
    let of = name.clone();
    change(service, event, &name, None, peer, move |state| state.enable_baseline(&of, enabled)).await
}

pub(super) async fn remove(service: &Arc<Service>, name: String, peer: Peer) -> Result<Value, String> {
    let of = name.clone();
    let work = move |state: &mut State| state.remove_baseline(&of, unix_now());
    change(service, "baselines.remove", &name, None, peer, work).await
}

/// Returns the evidence if it is from this host. An earlier host with this name had another TPM.
fn of_host(found: Option<Evidence>, host: &Host) -> Option<Evidence> {
    found.filter(|evidence| evidence.endorsement_key == host.spki_sha256)
}

async fn last_evidence(service: &Arc<Service>, host: &str) -> Result<Evidence, String> {
    check_host_name(host).map_err(|e| e.to_string())?;
    let (of, name) = (Arc::clone(service), host.to_owned());
    let registered = read(service, move |state| state.host_by_name(&name)).await?;
    let registered = registered.ok_or_else(|| format!("no host {host:?} is registered"))?;
    let found = tokio::task::spawn_blocking(move || {
        of.evidence.of(&registered.name).map(|evidence| of_host(evidence, &registered))
    });
    let found = found.await.map_err(|e| e.to_string())?;
    let found = found.map_err(|e| format!("what hosts proved last cannot be read: {e}"))?;
    found.ok_or_else(|| format!("host {host} has not proved by its TPM what it booted; have it attest first"))
}

/// Evaluates the policies for a host's last evidence.
pub(super) async fn check(service: &Arc<Service>, host: String) -> Result<Value, String> {
    let evidence = Arc::new(last_evidence(service, &host).await?);
    let baselines = read(service, |state| state.baselines_without_logs()).await?;
    let mut compared = Vec::with_capacity(baselines.len());
    for baseline in &baselines {
        let mut with_log = baseline.clone();
        if baseline.values.iter().any(|(pcr, value)| evidence.values.get(pcr) != Some(value)) {
            // Read the logs one by one: together they may be large, and others need the state as well.
            let (name, added) = (baseline.name.clone(), baseline.added);
            with_log.log = read(service, move |state| state.baseline_log(&name, added)).await?;
        }
        let of = Arc::clone(&evidence);
        let done = tokio::task::spawn_blocking(move || compare(&with_log, &of)).await;
        compared.push(done.map_err(|e| e.to_string())??);
    }
    let checked = tokio::task::spawn_blocking(move || checked(host, &evidence, &baselines, compared)).await;
    reply(checked.map_err(|e| e.to_string())??)
}

fn log_of(evidence: &Evidence) -> Result<Log<'_>, String> {
    Log::parse(&evidence.log).map_err(|error| format!("the host's log cannot be read: {error}"))
}

fn checked(
    host: String,
    evidence: &Evidence,
    baselines: &[store::Baseline],
    mut compared: Vec<Compared>,
) -> Result<Checked, String> {
    let enabled: Vec<_> = baselines
        .iter()
        .filter(|baseline| baseline.enabled)
        .map(|baseline| policy::Baseline { name: baseline.name.clone(), values: baseline.values.clone() })
        .collect();
    let verdict = policy::judge(&log_of(evidence)?, &evidence.values, evidence.restart_count, &enabled);
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

fn compare(baseline: &store::Baseline, evidence: &Evidence) -> Result<Compared, String> {
    let differing: Vec<_> =
        baseline.values.iter().filter(|(pcr, expected)| evidence.values.get(*pcr) != Some(*expected)).collect();
    let (name, enabled) = (baseline.name.clone(), baseline.enabled);
    if differing.is_empty() {
        return Ok(Compared { name, enabled, matches: true, differs: Vec::new() });
    }
    let log = log_of(evidence)?;
    let given = log.replay();
    let before = baseline.log.as_deref().and_then(|log| Log::parse(log).ok());
    let given_before = before.as_ref().map(Log::replay).unwrap_or_default();
    let mut differs = Vec::new();
    for (pcr, expected) in differing {
        let quoted = evidence.values.get(pcr);
        // If the log does not replay to the baseline's value, its events say nothing about the baseline.
        let before = before.as_ref().filter(|_| given_before.get(pcr) == Some(expected));
        let found = differences(pcr as u32, before, &log);
        differs.push(Differs {
            pcr,
            expected: HEXLOWER.encode(expected),
            quoted: quoted.map(|value| HEXLOWER.encode(value)),
            log_agrees: quoted.is_some_and(|value| given.get(pcr) == Some(value)),
            events: found.events.into_iter().map(|event| measured(pcr, event, before.is_some())).collect(),
            omitted: found.omitted,
        });
    }
    Ok(Compared { name, enabled, matches: false, differs })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use claviger_protocol::tpm::log::{LogWriter, short_boot};

    use super::*;
    use crate::store::{HostKind, Labels};

    /// EV_IPL.
    const IPL: u32 = 13;

    /// A boot that measured this initrd into PCR 9.
    fn boot(initrd: &str) -> Vec<u8> {
        // The header has the length of an empty log.
        let header = LogWriter::new().finish().len();
        let measured = LogWriter::new().measured(9, IPL, initrd.as_bytes()).finish();
        [&short_boot("firmware 1", "kernel 1")[..], &measured[header..]].concat()
    }

    fn values(log: &[u8]) -> PcrValues {
        let replayed = Log::parse(log).unwrap().replay();
        let mut values = PcrValues::default();
        [0, 2, 4, 7, 9].into_iter().for_each(|pcr| assert!(values.set(pcr, *replayed.get(pcr).unwrap())));
        values
    }

    fn evidence(log: Vec<u8>, quoted: PcrValues) -> Evidence {
        Evidence { at: 100, endorsement_key: "ek".to_owned(), values: quoted, log, restart_count: 0 }
    }

    fn baseline(log: Vec<u8>) -> store::Baseline {
        store::Baseline { name: "base".to_owned(), values: values(&log), log: Some(log), enabled: true, added: 1 }
    }

    fn source(at: Option<i64>, pcrs: Vec<usize>) -> Source {
        Source { host: "node".to_owned(), at, pcrs, from_log: false }
    }

    #[tokio::test]
    async fn a_name_with_other_values_is_free_after_a_few_seconds() {
        let (_folder, service) = crate::service::testing::service();
        let peer = Peer { uid: 0, pid: None };
        let pcrs = |initrd: &str| Pcrs::from(&values(&boot(initrd)));
        add(&service, "a".to_owned(), &pcrs("1"), None, peer).await.unwrap();
        let issued = unix_now();
        let allow = |at: i64| service.registry.baselines().allow("a", at);
        assert!(allow(issued));
        // Most of the ten seconds are over.
        service.registry.change(move |state| state.remove_baseline("a", issued - 8)).await.unwrap();
        assert!(!allow(issued));
        add(&service, "a".to_owned(), &pcrs("2"), None, peer).await.unwrap();
        // Another daemon with the same file may have noticed the removal a second late.
        assert!(allow(unix_now()) && !allow(issued) && !allow(issued + 1));
        // The same values have the name at once, and nothing waits for a free name.
        remove(&service, "a".to_owned(), peer).await.unwrap();
        add(&service, "b".to_owned(), &pcrs("3"), None, peer).await.unwrap();
        add(&service, "a".to_owned(), &pcrs("2"), None, peer).await.unwrap();
        let other = values(&boot("3"));
        let reserved = service.registry.with_state(|state| state.reserved_until("a", &other, unix_now()));
        assert_eq!(reserved.unwrap(), None, "it is in use");
    }

    #[test]
    fn events_that_do_not_give_the_quoted_value_are_said_to_prove_nothing() {
        let base = baseline(boot("initrd 1"));
        // An updated host: its log shows the new initrd.
        let updated = boot("initrd 2");
        let honest = compare(&base, &evidence(updated.clone(), values(&updated))).unwrap();
        let [differs] = &honest.differs[..] else { panic!("{honest:?}") };
        assert!(differs.pcr == 9 && differs.log_agrees);
        let signs: Vec<_> = differs.events.iter().map(|event| (event.is_new, &*event.event)).collect();
        assert_eq!(signs, [(Some(true), "EV_IPL initrd 2"), (Some(false), "EV_IPL initrd 1")]);
        // A host that booted another initrd, but presents the log of the update.
        let rooted = compare(&base, &evidence(updated.clone(), values(&boot("evil")))).unwrap();
        assert!(!rooted.differs[0].log_agrees, "{rooted:?}");
        // A PCR that was not quoted is not proven.
        let mut unquoted = values(&updated);
        unquoted.remove(9);
        let unquoted = compare(&base, &evidence(updated.clone(), unquoted)).unwrap();
        assert!(!unquoted.differs[0].log_agrees && unquoted.differs[0].quoted.is_none());
        // The log of this baseline does not replay to its value, so it cannot be compared with the host's events.
        let captured = store::Baseline { values: values(&boot("evil")), ..baseline(boot("initrd 1")) };
        let compared = compare(&captured, &evidence(updated.clone(), values(&updated))).unwrap();
        assert_eq!(compared.differs[0].events.iter().map(|event| event.is_new).collect::<Vec<_>>(), [None]);
        let replayed: Vec<_> = shown(&captured).replayed.iter().map(|of| (of.pcr, of.log_agrees)).collect();
        assert_eq!(replayed, [(0, true), (2, true), (4, true), (7, true), (9, false)]);
    }

    #[test]
    fn what_is_left_out_is_counted() {
        let long = |digit: char| {
            (0..70).fold(boot("x"), |log, number| {
                let header = LogWriter::new().finish().len();
                let event = LogWriter::new().measured(9, IPL, format!("{digit}{number}").as_bytes()).finish();
                [&log[..], &event[header..]].concat()
            })
        };
        assert_eq!(shown(&baseline(long('a'))).replayed.last().map(|of| of.omitted), Some(7));
        let compared = compare(&baseline(long('a')), &evidence(long('b'), values(&long('b')))).unwrap();
        let events = &compared.differs[0].events;
        assert!(events.len() == 64 && events.iter().all(|event| event.is_new == Some(true)));
        assert_eq!(compared.differs[0].omitted, 76);
    }

    #[test]
    fn evidence_of_an_earlier_host_of_the_name_is_not_the_hosts() {
        let host = |key: &str| Host {
            name: "node".to_owned(),
            kind: HostKind::EndorsementKey,
            spki: Vec::new(),
            spki_sha256: key.to_owned(),
            enabled: true,
            added: 1,
            labels: Labels::default(),
        };
        let kept = evidence(boot("x"), values(&boot("x")));
        assert_eq!(of_host(Some(kept.clone()), &host("ek")), Some(kept.clone()));
        assert_eq!(of_host(Some(kept), &host("another ek")), None);
    }

    #[test]
    fn only_the_evidence_that_was_looked_at_is_captured() {
        let kept = evidence(boot("x"), values(&boot("x")));
        for at in [None, Some(100)] {
            assert_eq!(source(at, vec![9]).values(&kept).unwrap(), kept.values);
        }
        let error = source(Some(99), vec![9]).values(&kept).unwrap_err();
        assert!(error.contains("is of 100, not of 99"), "{error}");
        assert!(source(None, vec![11]).values(&kept).unwrap_err().contains("did not quote PCR 11"));
    }

    #[test]
    fn the_trail_tells_the_accepted_values_by_their_digest() {
        let values = values(&boot("x"));
        let digest = HEXLOWER.encode(&values.digest());
        let expected = format!("from host node; PCRs 0 2 4 7 9, SHA-256 of their values {digest}");
        assert_eq!(accepted(&values, Some("from host node".to_owned())), expected);
        assert!(accepted(&values, None).starts_with("PCRs 0 2 4 7 9, "));
    }
}
