//! Every metric of the daemon, once: its name, unit, help, labels and buckets (`table.rs`), and the function that records it.
//!
//! Code elsewhere calls the typed functions; a series that is not in [`ALL`] cannot be made. The recorder belongs to
//! the process: before [`install`] the functions do nothing, so libraries and tests may call them at any time.
//!
//! Events are recorded when they happen. What can be looked at at any time - states, sessions, expiry - is a *reading*, taken
//! when somebody asks for the page (`gauges.rs`): it is never out of date, and the series of a member that was removed end.
//!
//! Labels are bounded: no host, virtual machine or protector is ever one.

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

pub use self::gauges::{CONTENT_TYPE, Load, Readings};
pub use self::recorder::Handle;
pub use self::table::{ALL, Kind, Metric, SLO_SECONDS};

/// Makes the process's recorder, once; later calls return the same one.
pub fn install() -> Handle {
    INSTALLED
        .get_or_init(|| {
            let mut builder = PrometheusBuilder::new();
            for metric in ALL {
                if let Kind::Histogram(edges) = metric.kind {
                    builder = match builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), edges) {
                        Ok(builder) => builder,
                        // Only a histogram without edges, which none in the table is.
                        Err(_) => PrometheusBuilder::new(),
                    };
                }
            }
            let recorder = builder.build_recorder();
            let handle = Handle::of(recorder.handle());
            if ::metrics::set_global_recorder(recorder).is_err() {
                // Only another user of the `metrics` crate in this process can have done that.
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

/// The label values that are known when the daemon starts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known<'a> {
    /// The members' names.
    pub members: &'a [&'a str],
    /// The outcomes of a release.
    pub release_outcomes: &'a [&'static str],
    /// The API versions of a release.
    pub apis: &'a [&'static str],
    /// The outcomes of an attestation.
    pub attestation_outcomes: &'a [&'static str],
    /// The policies of attestation by TPM.
    pub policies: &'a [&'static str],
    /// Why a release or an attestation may not be let in.
    pub drop_reasons: &'a [&'static str],
    /// What can be asked for at the service address.
    pub resources: &'a [&'static str],
    /// Why a body may not be taken.
    pub body_refusals: &'a [&'static str],
    /// Why a connection is closed before its client wants it.
    pub cut_reasons: &'a [&'static str],
}

/// Operations that every member does; those of key management have no series before they are asked for.
const OPERATIONS: [&str; 4] = ["decrypt", "sign", "probe", "open"];
/// The classes of status codes.
const CODES: [&str; 3] = ["2xx", "4xx", "5xx"];
/// What a release spends its time on.
const PARTS: [&str; 3] = ["queue", "hsm", "own"];

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
        // Opening a session waits in no queue.
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

/// Counts an egress protector that was made ahead.
pub fn stock_made() {
    counter!(STOCK_MADE.name).increment(1);
}

/// Counts one that was given out.
pub fn stock_used() {
    counter!(STOCK_USED.name).increment(1);
}

/// Counts one that waited for too long.
pub fn stock_aged() {
    counter!(STOCK_AGED.name).increment(1);
}

/// Counts one that was made for what is not in force any more.
pub fn stock_dropped() {
    counter!(STOCK_DROPPED.name).increment(1);
}

/// Registers the releases of a key at zero.
pub fn preregister_key(certificate: SharedString) {
    counter!(KEY_RELEASES.name, "certificate" => certificate).increment(0);
}

/// Who is to answer for how a release ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Nobody has to.
    Success,
    /// The request: what is wrong with it, or that it came too fast.
    Refused,
    /// The service: it was too busy, or could not.
    Failed,
}

impl Class {
    /// Its name as a label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// How long a release took, and what it spent the time on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// From arrival to decision.
    pub total: Duration,
    /// Waiting for its turn; `None` when it never asked for one.
    pub queue: Option<Duration>,
    /// Waiting for the HSMs; `None` when it did not come that far.
    pub hsm: Option<Duration>,
}

/// Counts a release that was answered. `outcome` is `success` or the error's code, `api` like `v2.0`; `certificate` the one
/// whose key served.
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

/// Notes how many protectors a batch request has.
pub fn batch(items: usize) {
    histogram!(BATCH_ITEMS.name).record(items as f64);
}

/// Counts an attestation that was answered.
pub fn attestation(outcome: &'static str, took: Duration) {
    counter!(ATTESTATIONS.name, "outcome" => outcome).increment(1);
    histogram!(ATTESTATION_DURATION.name).record(took);
}

/// Counts what a policy said of a host.
pub fn attestation_policy(policy: &'static str, holds: bool) {
    let result = if holds { "pass" } else { "fail" };
    counter!(ATTESTATION_POLICIES.name, "policy" => policy, "result" => result).increment(1);
}

/// Counts an answer at the service address.
pub fn response(resource: &'static str, status: u16) {
    let code = match status {
        500.. => "5xx",
        400.. => "4xx",
        _ => "2xx",
    };
    counter!(RESPONSES.name, "resource" => resource, "code" => code).increment(1);
}

/// Counts a release that was not let in.
pub fn queue_dropped(reason: &'static str) {
    counter!(QUEUE_DROPPED.name, "reason" => reason).increment(1);
}

/// Counts an attestation that was not let in.
pub fn attestation_dropped(reason: &'static str) {
    counter!(ATTESTATIONS_DROPPED.name, "reason" => reason).increment(1);
}

/// Counts what happened at a member.
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
        Event::Closed => count(HSM_CLOSINGS),
        Event::Retry => count(HSM_RETRIES),
        Event::Stuck => count(HSM_STUCK_CALLS),
        Event::WrongAnswer => count(HSM_WRONG_ANSWERS),
        Event::ModuleRenewed => count(HSM_MODULES_RENEWED),
        // How many there are is a reading.
        Event::SessionOpened | Event::SessionClosed => {}
    }
}

/// Lines of the log were dropped.
pub fn log_lines_dropped(lines: u64) {
    counter!(LOG_DROPPED.name).increment(lines);
}

/// Counts audit records that could not be written.
pub fn audit_errors(records: u64) {
    counter!(AUDIT_ERRORS.name).increment(records);
}

/// What becomes of the audit file without the daemon.
const AUDIT_FILE_CHANGED: [&str; 4] = ["deleted", "renamed", "replaced", "shortened"];

/// Counts that the audit file is not what it was, by one of `AUDIT_FILE_CHANGED`.
pub fn audit_file_changed(how: &'static str) {
    counter!(AUDIT_FILE_CHANGES.name, "how" => how).increment(1);
}

/// Counts a refusal that has no audit line of its own.
pub fn audit_counted() {
    counter!(AUDIT_COUNTED.name).increment(1);
}

/// Counts a host that has got another identity key.
pub fn identity_changed() {
    counter!(IDENTITY_CHANGES.name).increment(1);
}

/// Notes how long a group of audit records took to be written.
pub fn audit_written(took: Duration) {
    histogram!(AUDIT_WRITE_DURATION.name).record(took);
}

/// Counts a body that was not taken.
pub fn body_refused(reason: &'static str) {
    counter!(BODIES_REFUSED.name, "reason" => reason).increment(1);
}

/// Counts a connection that was closed before its client wanted it.
pub fn connection_cut(reason: &'static str) {
    counter!(CONNECTIONS_CUT.name, "reason" => reason).increment(1);
}

static OPEN: AtomicUsize = AtomicUsize::new(0);

/// Notes that a connection to the service address was opened.
pub fn connection_opened() {
    counter!(CONNECTIONS.name).increment(1);
    OPEN.fetch_add(1, Ordering::Relaxed);
}

/// Notes that a connection to the service address was closed.
pub fn connection_closed() {
    OPEN.fetch_sub(1, Ordering::Relaxed);
}

/// How many connections to the service address are open.
#[must_use]
pub fn connections_open() -> usize {
    OPEN.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests;
