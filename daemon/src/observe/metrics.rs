//! All metrics of the daemon: the table `table.rs` defines name, unit, help, labels and buckets; functions here record
//! the values.
//!
//! Other code calls these typed functions, so no series outside of [`ALL`] can be created. The recorder is
//! process-wide. Before [`install`] the functions do nothing, so libraries and tests can call them at any time.
//!
//! Events are recorded when they happen. Values that can be queried (states, sessions, expiry) are *readings*, taken
//! when the page is rendered (`gauges.rs`): they are always current, and the series of a removed member end.
//!
//! Label values are bounded: hosts, virtual machines and protectors are never labels.

mod gauges;
mod hsm_series;
mod recorder;
mod table;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ::metrics::{SharedString, counter, describe_counter, describe_histogram, histogram};
use claviger_hsm::Event;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};

use self::recorder::INSTALLED;
use self::table::*;

pub use self::gauges::{CONTENT_TYPE, Load, Readings, SharedState};
pub use self::recorder::Handle;
pub use self::table::{ALL, Kind, Metric, SLO_SECONDS};

/// Creates the process' recorder; later calls return the same one.
pub fn install() -> Handle {
    INSTALLED
        .get_or_init(|| {
            let mut builder = PrometheusBuilder::new();
            for metric in ALL {
                if let Kind::Histogram(edges) = metric.kind {
                    builder = match builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), edges) {
                        Ok(builder) => builder,
                        // This fails only for a histogram without bucket boundaries; the table has none.
                        Err(_) => PrometheusBuilder::new(),
                    };
                }
            }
            let recorder = builder.build_recorder();
            let handle = Handle::of(recorder.handle());
            if ::metrics::set_global_recorder(recorder).is_err() {
                // Only another user of the crate `metrics` in this process can cause this.
                tracing::error!("another metrics recorder is installed: /metrics will stay empty");
            }
            for metric in ALL {
                match metric.kind {
                    Kind::Counter => describe_counter!(metric.name, metric.unit, metric.help),
                    Kind::Histogram(_) => describe_histogram!(metric.name, metric.unit, metric.help),
                    Kind::CounterReading | Kind::GaugeReading => {}
                }
            }
            for metric in [AUDIT_ERRORS, AUDIT_COUNTED, IDENTITY_CHANGES, LOG_DROPPED, CONNECTIONS] {
                counter!(metric.name).absolute(0);
            }
            for how in AUDIT_FILE_CHANGED {
                counter!(AUDIT_FILE_CHANGES.name, "how" => how).absolute(0);
            }
            for metric in [BATCH_ITEMS, ATTESTATION_DURATION, AUDIT_WRITE_DURATION] {
                let _ = histogram!(metric.name);
            }
            for class in [Class::Success, Class::Refused, Class::Failed] {
                let _ = histogram!(RELEASE_DURATION.name, "class" => class.as_str());
            }
            for part in PARTS {
                let _ = histogram!(RELEASE_PARTS.name, "part" => part);
            }
            handle
        })
        .clone()
}

/// The label values that are known at the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known<'a> {
    /// Names of the members.
    pub members: &'a [&'a str],
    /// Outcomes of a release.
    pub release_outcomes: &'a [&'static str],
    /// API versions of a release.
    pub apis: &'a [&'static str],
    /// Outcomes of an attestation.
    pub attestation_outcomes: &'a [&'static str],
    /// Policies of attestation by TPM.
    pub policies: &'a [&'static str],
    /// Reasons for rejecting a release or an attestation.
    pub drop_reasons: &'a [&'static str],
    /// Resources at the service address.
    pub resources: &'a [&'static str],
    /// Reasons for refusing a body.
    pub body_refusals: &'a [&'static str],
    /// Reasons for which the server closes a connection.
    pub cut_reasons: &'a [&'static str],
}

/// Operations of every member. Key management operations get a series on their first use.
const OPERATIONS: [&str; 4] = ["decrypt", "sign", "probe", "open"];
/// Classes of status codes.
const CODES: [&str; 3] = ["2xx", "4xx", "5xx"];
/// Parts of a release's duration.
const PARTS: [&str; 3] = ["queue", "hsm", "own"];

/// Registers all series with known labels at zero. Then Prometheus sees the first event as an increase, not as a new
/// series that starts at 1.
pub fn preregister(known: &Known<'_>) {
    for outcome in known.release_outcomes {
        for api in known.apis {
            counter!(RELEASES.name, "outcome" => *outcome, "api" => *api).increment(0);
        }
    }
    for outcome in known.attestation_outcomes {
        counter!(ATTESTATIONS.name, "outcome" => *outcome).increment(0);
    }
    for policy in known.policies {
        for result in ["pass", "fail"] {
            counter!(ATTESTATION_POLICIES.name, "policy" => *policy, "result" => result).increment(0);
        }
    }
    for reason in known.drop_reasons {
        counter!(QUEUE_DROPPED.name, "reason" => *reason).increment(0);
        counter!(ATTESTATIONS_DROPPED.name, "reason" => *reason).increment(0);
    }
    for reason in known.body_refusals {
        counter!(BODIES_REFUSED.name, "reason" => *reason).increment(0);
    }
    for metric in [STOCK_MADE, STOCK_USED, STOCK_AGED, STOCK_DROPPED] {
        counter!(metric.name).increment(0);
    }
    for reason in known.cut_reasons {
        counter!(CONNECTIONS_CUT.name, "reason" => *reason).increment(0);
    }
    for resource in known.resources {
        for code in CODES {
            counter!(RESPONSES.name, "resource" => *resource, "code" => code).increment(0);
        }
    }
    for member in known.members {
        let hsm = SharedString::from((*member).to_owned());
        for op in OPERATIONS {
            for rv in claviger_hsm::RV_CLASSES {
                counter!(HSM_CALLS.name, "hsm" => hsm.clone(), "op" => op, "rv" => rv).increment(0);
            }
            let _ = histogram!(HSM_SERVICE_TIME.name, "hsm" => hsm.clone(), "op" => op);
        }
        // Opening a session does not wait in a queue.
        for op in OPERATIONS.into_iter().filter(|op| *op != "open") {
            let _ = histogram!(HSM_RESPONSE_TIME.name, "hsm" => hsm.clone(), "op" => op);
        }
        let _ = histogram!(HSM_BATCH_JOBS.name, "hsm" => hsm.clone());
        for metric in [
            HSM_CLOSINGS,
            HSM_RETRIES,
            HSM_STUCK_CALLS,
            HSM_WRONG_ANSWERS,
            HSM_MODULES_RENEWED,
            HSM_LOGINS,
            HSM_KEY_SEARCHES,
        ] {
            counter!(metric.name, "hsm" => hsm.clone()).increment(0);
        }
        for other in known.members.iter().filter(|other| *other != member) {
            counter!(HSM_FAILOVERS.name, "hsm" => hsm.clone(), "to" => (*other).to_owned()).increment(0);
        }
    }
}

/// Counts an egress protector that was made for the stock.
pub fn stock_made() {
    counter!(STOCK_MADE.name).increment(1);
}

/// Counts an item of the stock that was given out.
pub fn stock_used() {
    counter!(STOCK_USED.name).increment(1);
}

/// Counts an item of the stock that became too old.
pub fn stock_aged() {
    counter!(STOCK_AGED.name).increment(1);
}

/// Counts an item of the stock whose keys or settings are no longer current.
pub fn stock_dropped() {
    counter!(STOCK_DROPPED.name).increment(1);
}

/// Registers the release counter of a key at zero.
pub fn preregister_key(certificate: SharedString) {
    counter!(KEY_RELEASES.name, "certificate" => certificate).increment(0);
}

/// Who is responsible for the outcome of a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It succeeded.
    Success,
    /// The request: it was invalid or exceeded a rate.
    Refused,
    /// The service: it was too busy, or had a failure.
    Failed,
}

impl Class {
    /// The label value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// The duration of a release and of its parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// From arrival to decision.
    pub total: Duration,
    /// Time waiting for its turn; `None` if it did not get that far.
    pub queue: Option<Duration>,
    /// Time waiting for the HSMs; `None` if it did not get that far.
    pub hsm: Option<Duration>,
}

/// Counts an answered release. `outcome` is `success` or the error's code, `api` for example `v2.0`, `certificate` the
/// name of the certificate whose key was used.
pub fn release(
    outcome: &'static str,
    api: &'static str,
    class: Class,
    spent: Spent,
    certificate: Option<SharedString>,
) {
    counter!(RELEASES.name, "outcome" => outcome, "api" => api).increment(1);
    histogram!(RELEASE_DURATION.name, "class" => class.as_str()).record(spent.total);
    let part = |part: &'static str, time: Duration| histogram!(RELEASE_PARTS.name, "part" => part).record(time);
    spent.queue.into_iter().for_each(|time| part("queue", time));
    spent.hsm.into_iter().for_each(|time| part("hsm", time));
    let elsewhere = spent.queue.unwrap_or_default() + spent.hsm.unwrap_or_default();
    part("own", spent.total.saturating_sub(elsewhere));
    if let (Class::Success, Some(certificate)) = (class, certificate) {
        counter!(KEY_RELEASES.name, "certificate" => certificate).increment(1);
    }
}

/// Records the number of protectors in a batch request.
pub fn batch(items: usize) {
    histogram!(BATCH_ITEMS.name).record(items as f64);
}

/// Counts an answered attestation.
pub fn attestation(outcome: &'static str, took: Duration) {
    counter!(ATTESTATIONS.name, "outcome" => outcome).increment(1);
    histogram!(ATTESTATION_DURATION.name).record(took);
}

/// Counts the result of a policy for a host.
pub fn attestation_policy(policy: &'static str, holds: bool) {
    let result = if holds { "pass" } else { "fail" };
    counter!(ATTESTATION_POLICIES.name, "policy" => policy, "result" => result).increment(1);
}

/// Counts a response at the service address.
pub fn response(resource: &'static str, status: u16) {
    let code = match status {
        500.. => "5xx",
        400.. => "4xx",
        _ => "2xx",
    };
    counter!(RESPONSES.name, "resource" => resource, "code" => code).increment(1);
}

/// Counts a rejected release.
pub fn queue_dropped(reason: &'static str) {
    counter!(QUEUE_DROPPED.name, "reason" => reason).increment(1);
}

/// Counts a rejected attestation.
pub fn attestation_dropped(reason: &'static str) {
    counter!(ATTESTATIONS_DROPPED.name, "reason" => reason).increment(1);
}

/// Counts an event at a member.
pub fn hsm(hsm: &str, event: Event<'_>) {
    let count = |metric: Metric| counter!(metric.name, "hsm" => hsm.to_owned()).increment(1);
    match event {
        Event::Call { op, rv, took } => hsm_series::call(hsm, op.name(), rv, took),
        Event::Answered { op, took } => hsm_series::answered(hsm, op.name(), took),
        Event::Batch { jobs } => hsm_series::batch(hsm, jobs),
        Event::FailedOver { to } => {
            counter!(HSM_FAILOVERS.name, "hsm" => hsm.to_owned(), "to" => to.to_owned()).increment(1);
        }
        Event::Login => count(HSM_LOGINS),
        Event::KeySearch => count(HSM_KEY_SEARCHES),
        Event::Down => count(HSM_CLOSINGS),
        Event::Retry => count(HSM_RETRIES),
        Event::Stuck => count(HSM_STUCK_CALLS),
        Event::WrongAnswer => count(HSM_WRONG_ANSWERS),
        Event::ModuleRenewed => count(HSM_MODULES_RENEWED),
        // The number of sessions is a reading.
        Event::SessionOpened | Event::SessionClosed => {}
    }
}

/// Counts dropped log lines.
pub fn log_lines_dropped(lines: u64) {
    counter!(LOG_DROPPED.name).increment(lines);
}

/// Counts audit records that could not be written.
pub fn audit_errors(records: u64) {
    counter!(AUDIT_ERRORS.name).increment(records);
}

/// Kinds of changes to the audit file by others.
const AUDIT_FILE_CHANGED: [&str; 4] = ["deleted", "renamed", "replaced", "shortened"];

/// Counts a change of the audit file by others, one of `AUDIT_FILE_CHANGED`.
pub fn audit_file_changed(how: &'static str) {
    counter!(AUDIT_FILE_CHANGES.name, "how" => how).increment(1);
}

/// Counts a refusal without an audit line of its own.
pub fn audit_counted() {
    counter!(AUDIT_COUNTED.name).increment(1);
}

/// Counts a host with a new identity key.
pub fn identity_changed() {
    counter!(IDENTITY_CHANGES.name).increment(1);
}

/// Records the duration of writing a group of audit records.
pub fn audit_written(took: Duration) {
    histogram!(AUDIT_WRITE_DURATION.name).record(took);
}

/// Counts a refused body.
pub fn body_refused(reason: &'static str) {
    counter!(BODIES_REFUSED.name, "reason" => reason).increment(1);
}

/// Counts a connection that the server closed.
pub fn connection_cut(reason: &'static str) {
    counter!(CONNECTIONS_CUT.name, "reason" => reason).increment(1);
}

static OPEN: AtomicUsize = AtomicUsize::new(0);

/// Counts a new connection to the service address.
pub fn connection_opened() {
    counter!(CONNECTIONS.name).increment(1);
    OPEN.fetch_add(1, Ordering::Relaxed);
}

/// Counts a closed connection to the service address.
pub fn connection_closed() {
    OPEN.fetch_sub(1, Ordering::Relaxed);
}

/// Number of open connections to the service address.
#[must_use]
pub fn connections_open() -> usize {
    OPEN.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests;
