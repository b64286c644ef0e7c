//! Every metric of the daemon: its name, unit, help, labels and the function that records it, once.
//!
//! Code elsewhere calls the typed functions; a series that is not in [`ALL`] cannot be made. The recorder belongs to
//! the process: before [`install`] the functions do nothing, so libraries and tests may call them at any time.

use std::sync::OnceLock;
use std::time::Duration;

use ::metrics::{SharedString, Unit, counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use crate::process;

/// What kind of number a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only ever grows, from zero at the start of the process.
    Counter,
    /// The same in fractions, which the recorder's counters do not have: read when the page is rendered.
    Reading,
    /// Goes up and down.
    Gauge,
}

/// One metric, as `/metrics` and the documentation show it.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// The name, with the unit or `_total` at its end as Prometheus wants it.
    pub name: &'static str,
    /// What kind of number it is.
    pub kind: Kind,
    /// The unit of its values.
    pub unit: Unit,
    /// One line that says what is counted.
    pub help: &'static str,
    /// The names of its labels.
    pub labels: &'static [&'static str],
}

macro_rules! metrics {
    ($($id:ident: $kind:ident $unit:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(const $id: Metric = Metric {
            name: $name, kind: Kind::$kind, unit: Unit::$unit, help: $help, labels: &[$($label),*],
        };)*
        /// Every metric that there is.
        pub const ALL: &[Metric] = &[$($id),*];
    };
}

metrics! {
    RELEASES: Counter Count "claviger_releases_total" ["outcome", "api"]
        "Releases of transport keys that were answered, by outcome (success or the error's code) and API version.";
    ATTESTATIONS: Counter Count "claviger_attestations_total" ["outcome"]
        "Attestations that were answered, by outcome.";
    RELEASES_RUNNING: Gauge Count "claviger_releases_running" []
        "Releases that were let in and are worked on.";
    QUEUE_WAITING: Gauge Count "claviger_queue_waiting" []
        "Releases that wait for their turn.";
    QUEUE_DROPPED: Counter Count "claviger_queue_dropped_total" ["reason"]
        "Releases that were not let in: their host asks too fast (rate), no room (full), no time (late, deadline), caller gone (left).";
    HSM_CALLS: Counter Count "claviger_hsm_calls_total" ["hsm", "op", "rv"]
        "PKCS#11 operations that returned, by member, operation and return code.";
    HSM_LOGINS: Counter Count "claviger_hsm_logins_total" ["hsm"]
        "Logins to a member's token. Steady load needs none.";
    HSM_KEY_SEARCHES: Counter Count "claviger_hsm_key_searches_total" ["hsm"]
        "Searches for key objects on a member's token: one for a session, none for a release.";
    HSM_SESSIONS_OPEN: Gauge Count "claviger_hsm_sessions_open" ["hsm"]
        "Sessions that are open on a member's token.";
    HSM_CLOSINGS: Counter Count "claviger_hsm_closings_total" ["hsm"]
        "How often a member was closed for a fault: its breaker opened.";
    HSM_RETRIES: Counter Count "claviger_hsm_retries_total" ["hsm"]
        "Operations that failed at a member and were tried at another, out of the retry budget.";
    HSM_STUCK_CALLS: Counter Count "claviger_hsm_stuck_calls_total" ["hsm"]
        "Calls that hung at a member for longer than the watchdog allows.";
    HSM_MODULES_RENEWED: Counter Count "claviger_hsm_modules_renewed_total" ["hsm"]
        "How often a member's module was finalised and initialised again.";
    AUDIT_ERRORS: Counter Count "claviger_audit_errors_total" []
        "Audit records that could not be written; what they would have recorded was refused.";
    CONNECTIONS_OPEN: Gauge Count "claviger_connections_open" []
        "Connections to the service address that are open.";
    HSM_CPU: Reading Seconds "claviger_hsm_cpu_seconds_total" ["hsm"]
        "Processor time of this process within operations of a member's token: its library's.";
    PROCESS_CPU: Reading Seconds "process_cpu_seconds_total" []
        "Processor time of this process, user and system.";
    PROCESS_MEMORY: Gauge Bytes "process_resident_memory_bytes" []
        "Memory of this process that is resident.";
    PROCESS_THREADS: Gauge Count "process_threads" []
        "Threads of this process.";
    BUILD_INFO: Gauge Count "claviger_build_info" ["version", "commit"]
        "Always 1; the labels say which version runs, and the commit it was built from (empty where that is not known).";
}

/// Access to what the process recorded.
#[derive(Clone)]
pub struct Handle(PrometheusHandle);

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Handle")
    }
}

impl Handle {
    /// The page for `/metrics`, in the Prometheus text format (`text/plain; version=0.0.4`). `members` are the names of the
    /// members and the processor time within their operations.
    pub fn render(&self, members: &[(String, Duration)]) -> String {
        let usage = process::usage();
        gauge!(PROCESS_MEMORY.name).set(usage.resident as f64);
        gauge!(PROCESS_THREADS.name).set(usage.threads as f64);
        let mut page = self.0.render();
        let series = |(name, time): &(String, Duration)| (format!("{{hsm=\"{}\"}}", escaped(name)), *time);
        write_reading(&mut page, &HSM_CPU, members.iter().map(series));
        write_reading(&mut page, &PROCESS_CPU, [(String::new(), usage.cpu)]);
        page
    }
}

fn write_reading(page: &mut String, metric: &Metric, series: impl IntoIterator<Item = (String, Duration)>) {
    let Metric { name, help, .. } = metric;
    page.push_str(&format!("# HELP {name} {help}\n# TYPE {name} counter\n"));
    for (labels, time) in series {
        page.push_str(&format!("{name}{labels} {}\n", time.as_secs_f64()));
    }
    page.push('\n');
}

/// A label's value as the text format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The content type of [`Handle::render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Makes the process's recorder, once; later calls return the same one.
pub fn install() -> Handle {
    static INSTALLED: OnceLock<Handle> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            let recorder = PrometheusBuilder::new().build_recorder();
            let handle = Handle(recorder.handle());
            if ::metrics::set_global_recorder(recorder).is_err() {
                // Only another user of the `metrics` crate in this process can have done that.
                tracing::error!("another metrics recorder is installed: /metrics will stay empty");
            }
            for metric in ALL {
                match metric.kind {
                    Kind::Counter => describe_counter!(metric.name, metric.unit, metric.help),
                    Kind::Reading => {}
                    Kind::Gauge => describe_gauge!(metric.name, metric.unit, metric.help),
                }
            }
            gauge!(BUILD_INFO.name, "version" => env!("CARGO_PKG_VERSION"), "commit" => env!("CLAVIGER_COMMIT"))
                .set(1.0);
            counter!(AUDIT_ERRORS.name).absolute(0);
            gauge!(CONNECTIONS_OPEN.name).increment(0.0);
            gauge!(RELEASES_RUNNING.name).increment(0.0);
            gauge!(QUEUE_WAITING.name).increment(0.0);
            handle
        })
        .clone()
}

/// The label values that are known when the daemon starts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known<'a> {
    /// The members' names.
    pub members: &'a [&'a str],
    /// The operations that members are asked for.
    pub operations: &'a [&'static str],
    /// The outcomes of a release.
    pub release_outcomes: &'a [&'static str],
    /// The API versions of a release.
    pub apis: &'a [&'static str],
    /// The outcomes of an attestation.
    pub attestation_outcomes: &'a [&'static str],
    /// Why a release may not be let in.
    pub drop_reasons: &'a [&'static str],
}

/// Registers every series that can be known in advance at zero, so that its first event is a rise that
/// Prometheus can see, not a new series that starts at 1.
pub fn preregister(known: &Known<'_>) {
    for outcome in known.release_outcomes {
        for api in known.apis {
            counter!(RELEASES.name, "outcome" => *outcome, "api" => *api).increment(0);
        }
    }
    for outcome in known.attestation_outcomes {
        counter!(ATTESTATIONS.name, "outcome" => *outcome).increment(0);
    }
    for reason in known.drop_reasons {
        counter!(QUEUE_DROPPED.name, "reason" => *reason).increment(0);
    }
    for member in known.members {
        let hsm = SharedString::from((*member).to_owned());
        for op in known.operations {
            counter!(HSM_CALLS.name, "hsm" => hsm.clone(), "op" => *op, "rv" => "ok").increment(0);
        }
        counter!(HSM_LOGINS.name, "hsm" => hsm.clone()).increment(0);
        for metric in [HSM_KEY_SEARCHES, HSM_CLOSINGS, HSM_RETRIES, HSM_STUCK_CALLS, HSM_MODULES_RENEWED] {
            counter!(metric.name, "hsm" => hsm.clone()).increment(0);
        }
        gauge!(HSM_SESSIONS_OPEN.name, "hsm" => hsm).increment(0.0);
    }
}

/// Counts a release that was answered. `outcome` is `success` or the error's code, `api` like `v2.0`.
pub fn release(outcome: &'static str, api: &'static str) {
    counter!(RELEASES.name, "outcome" => outcome, "api" => api).increment(1);
}

/// Counts an attestation that was answered.
pub fn attestation(outcome: &'static str) {
    counter!(ATTESTATIONS.name, "outcome" => outcome).increment(1);
}

/// Counts a release that was not let in.
pub fn queue_dropped(reason: &'static str) {
    counter!(QUEUE_DROPPED.name, "reason" => reason).increment(1);
}

/// Says how many releases run and how many wait for their turn.
pub fn load(running: usize, waiting: usize) {
    gauge!(RELEASES_RUNNING.name).set(running as f64);
    gauge!(QUEUE_WAITING.name).set(waiting as f64);
}

/// Counts a PKCS#11 operation that returned `rv`. An `Arc<str>` is the cheapest way to name the member.
pub fn hsm_call(hsm: impl Into<SharedString>, op: &'static str, rv: impl Into<SharedString>) {
    let (hsm, rv) = (hsm.into(), rv.into());
    counter!(HSM_CALLS.name, "hsm" => hsm, "op" => op, "rv" => rv).increment(1);
}

/// Counts a login to a member's token.
pub fn hsm_login(hsm: impl Into<SharedString>) {
    counter!(HSM_LOGINS.name, "hsm" => hsm.into()).increment(1);
}

/// Counts a search for a key object on a member's token.
pub fn hsm_key_search(hsm: impl Into<SharedString>) {
    counter!(HSM_KEY_SEARCHES.name, "hsm" => hsm.into()).increment(1);
}

/// Counts that a member was closed for a fault.
pub fn hsm_closed(hsm: impl Into<SharedString>) {
    counter!(HSM_CLOSINGS.name, "hsm" => hsm.into()).increment(1);
}

/// Counts an operation that was taken elsewhere after it had failed at a member.
pub fn hsm_retry(hsm: impl Into<SharedString>) {
    counter!(HSM_RETRIES.name, "hsm" => hsm.into()).increment(1);
}

/// Counts a call that hangs at a member.
pub fn hsm_stuck_call(hsm: impl Into<SharedString>) {
    counter!(HSM_STUCK_CALLS.name, "hsm" => hsm.into()).increment(1);
}

/// Counts that a member's module was initialised anew.
pub fn hsm_module_renewed(hsm: impl Into<SharedString>) {
    counter!(HSM_MODULES_RENEWED.name, "hsm" => hsm.into()).increment(1);
}

/// Says how many sessions are open on a member's token.
pub fn hsm_sessions_open(hsm: impl Into<SharedString>, sessions: usize) {
    gauge!(HSM_SESSIONS_OPEN.name, "hsm" => hsm.into()).set(sessions as f64);
}

/// Counts audit records that could not be written.
pub fn audit_errors(records: u64) {
    counter!(AUDIT_ERRORS.name).increment(records);
}

/// Notes that a connection to the service address was opened.
pub fn connection_opened() {
    gauge!(CONNECTIONS_OPEN.name).increment(1.0);
}

/// Notes that a connection to the service address was closed.
pub fn connection_closed() {
    gauge!(CONNECTIONS_OPEN.name).decrement(1.0);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::sync::Arc;

    fn value(page: &str, series: &str) -> f64 {
        let line = page.lines().find(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')));
        line.unwrap_or_else(|| panic!("no {series} in\n{page}")).rsplit_once(' ').unwrap().1.parse().unwrap()
    }

    #[test]
    fn the_page_shows_every_metric_with_help_and_only_declared_labels() {
        let handle = install();
        let known = Known {
            members: &["table"],
            operations: &["decrypt", "sign"],
            release_outcomes: &["success"],
            apis: &["v2.0"],
            attestation_outcomes: &["success"],
            drop_reasons: &["table"],
        };
        preregister(&known);
        let table = [("table \"1\"".to_owned(), Duration::from_millis(1500))];
        let page = install().render(&table);
        assert_eq!(handle.render(&table).lines().count(), page.lines().count());
        assert_eq!(value(&page, "claviger_hsm_calls_total{hsm=\"table\",op=\"sign\",rv=\"ok\"}"), 0.0);
        assert_eq!(value(&page, "claviger_hsm_cpu_seconds_total{hsm=\"table \\\"1\\\"\"}"), 1.5);
        assert!(value(&page, "process_cpu_seconds_total") > 0.0);
        assert!(value(&page, "process_resident_memory_bytes") > 1e6 && value(&page, "process_threads") >= 1.0);
        let version = (env!("CARGO_PKG_VERSION"), env!("CLAVIGER_COMMIT"));
        let build = format!("claviger_build_info{{version=\"{}\",commit=\"{}\"}}", version.0, version.1);
        assert_eq!(value(&page, &build), 1.0);
        for metric in ALL {
            assert!(page.contains(&format!("# HELP {} {}", metric.name, metric.help)), "{}", metric.name);
            let lines: Vec<_> = page.lines().filter(|line| line.starts_with(metric.name)).collect();
            assert!(!lines.is_empty(), "{} has no series", metric.name);
            for line in lines {
                let labels: BTreeSet<_> = match line.split_once('{') {
                    Some((_, rest)) => rest
                        .split_once('}')
                        .unwrap()
                        .0
                        .split(',')
                        .map(|label| label.split_once('=').unwrap().0)
                        .collect(),
                    None => BTreeSet::new(),
                };
                assert_eq!(labels, metric.labels.iter().copied().collect(), "{line}");
            }
        }
        let names: BTreeSet<_> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len(), "a name twice");
    }

    #[test]
    fn every_function_records_its_metric() {
        let handle = install();
        let hsm: Arc<str> = Arc::from("recorded");
        preregister(&Known { members: &[&hsm], ..Known::default() });
        release("recorded", "v1.0");
        release("recorded", "v1.0");
        attestation("recorded");
        queue_dropped("recorded");
        load(3, 14);
        hsm_call(hsm.clone(), "sign", "general_error");
        hsm_login(hsm.clone());
        hsm_key_search(hsm.clone());
        hsm_sessions_open(hsm, 7);
        let page = handle.render(&[]);
        assert_eq!(value(&page, "claviger_releases_total{outcome=\"recorded\",api=\"v1.0\"}"), 2.0);
        assert_eq!(value(&page, "claviger_attestations_total{outcome=\"recorded\"}"), 1.0);
        assert_eq!(value(&page, "claviger_queue_dropped_total{reason=\"recorded\"}"), 1.0);
        assert_eq!(value(&page, "claviger_releases_running"), 3.0);
        assert_eq!(value(&page, "claviger_queue_waiting"), 14.0);
        assert_eq!(value(&page, "claviger_hsm_calls_total{hsm=\"recorded\",op=\"sign\",rv=\"general_error\"}"), 1.0);
        assert_eq!(value(&page, "claviger_hsm_logins_total{hsm=\"recorded\"}"), 1.0);
        assert_eq!(value(&page, "claviger_hsm_key_searches_total{hsm=\"recorded\"}"), 1.0);
        assert_eq!(value(&page, "claviger_hsm_sessions_open{hsm=\"recorded\"}"), 7.0);
        // Other tests of this process move these two: they are only sure to be there.
        let before = value(&page, "claviger_audit_errors_total");
        audit_errors(2);
        assert!(value(&handle.render(&[]), "claviger_audit_errors_total") >= before + 2.0);
        connection_opened();
        connection_closed();
        value(&handle.render(&[]), "claviger_connections_open");
    }
}
