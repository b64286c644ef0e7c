//! Every metric of the daemon, once: its name, unit, help, labels and buckets, and the function that records it.
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

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ::metrics::{SharedString, Unit, counter, describe_counter, describe_histogram, histogram};
use claviger_hsm::Event;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

pub use gauges::{CONTENT_TYPE, Load, Readings};

/// What kind of number a metric is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Only ever grows, from zero at the start of the process.
    Counter,
    /// How many were at most so large, for each of these edges, in ascending order; with sum and count.
    Histogram(&'static [f64]),
    /// A counter that is read when the page is rendered.
    CounterReading,
    /// A gauge that is read when the page is rendered.
    GaugeReading,
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

/// What the service promises: of the releases that succeed, 99 in 100 take no longer than this, in seconds. An edge of
/// the histogram of releases, so that the share is exact.
pub const SLO_SECONDS: f64 = 0.5;

/// Edges for what a caller waits for.
const RELEASE_SECONDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, SLO_SECONDS, 1.0, 2.5, 5.0, 10.0];
/// Edges for an operation at a token: soft tokens take less than a millisecond, network HSMs up to tens of them.
const HSM_SECONDS: &[f64] =
    &[0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Edges for writing to the disk.
const DISK_SECONDS: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];
/// Edges for how many come together.
const SIZES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

macro_rules! metrics {
    ($($id:ident: $kind:ident $(($edges:ident))? $unit:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(const $id: Metric = Metric {
            name: $name, kind: Kind::$kind $(($edges))?, unit: Unit::$unit, help: $help, labels: &[$($label),*],
        };)*
        /// Every metric that there is.
        pub const ALL: &[Metric] = &[$($id),*];
    };
}

metrics! {
    RELEASES: Counter Count "claviger_releases_total" ["outcome", "api"]
        "Releases of transport keys that were answered, by outcome (success or the error's code) and API version.";
    RELEASE_DURATION: Histogram(RELEASE_SECONDS) Seconds "claviger_release_duration_seconds" ["class"]
        "From a release's arrival to its decision, by class: success, refused (the request is at fault), failed (the service is).";
    RELEASE_PARTS: Histogram(RELEASE_SECONDS) Seconds "claviger_release_part_duration_seconds" ["part"]
        "What a release spent its time on: queue (waiting for its turn), hsm (waiting for the HSMs), own (everything else).";
    KEY_RELEASES: Counter Count "claviger_key_releases_total" ["certificate"]
        "Releases that succeeded, by the key that opened the protector: the first 8 digits of the thumbprint of its encryption certificate, of several the primary or else the newest.";
    STOCK_MADE: Counter Count "claviger_stock_made_total" []
        "Egress protectors that were made ahead, while sessions of the HSMs were idle.";
    STOCK_USED: Counter Count "claviger_stock_used_total" []
        "Releases that gave out an egress protector which was made ahead: they took one operation of the HSMs instead of two.";
    STOCK_AGED: Counter Count "claviger_stock_aged_total" []
        "Egress protectors that were made ahead and thrown away because nobody asked for them in their time.";
    STOCK_DROPPED: Counter Count "claviger_stock_dropped_total" []
        "Egress protectors that were made ahead and thrown away because a key, its labels or a setting changed, or there was no room.";
    STOCK_DEPTH: GaugeReading Count "claviger_stock_depth" []
        "Egress protectors that were made ahead and wait to be given out.";
    BATCH_ITEMS: Histogram(SIZES) Count "claviger_batch_items" []
        "Protectors in a batch request.";
    ATTESTATIONS: Counter Count "claviger_attestations_total" ["outcome"]
        "Attestations that were answered, by outcome.";
    ATTESTATION_POLICIES: Counter Count "claviger_attestation_policies_total" ["policy", "result"]
        "What policies said of hosts that proved by their TPM what they booted: pass or fail.";
    ATTESTATION_DURATION: Histogram(RELEASE_SECONDS) Seconds "claviger_attestation_duration_seconds" []
        "From an attestation's arrival to its decision.";
    RESPONSES: Counter Count "claviger_http_responses_total" ["resource", "code"]
        "Answers at the service address, by resource and class of the status code (2xx, 4xx, 5xx).";
    RELEASES_RUNNING: GaugeReading Count "claviger_releases_running" []
        "Releases that were let in and are worked on.";
    RELEASES_RUNNING_LIMIT: GaugeReading Count "claviger_releases_running_limit" []
        "Releases that may be worked on at the same time.";
    QUEUE_WAITING: GaugeReading Count "claviger_queue_waiting" []
        "Releases that wait for their turn.";
    QUEUE_LIMIT: GaugeReading Count "claviger_queue_limit" []
        "Releases that may wait for their turn.";
    QUEUE_DROPPED: Counter Count "claviger_queue_dropped_total" ["reason"]
        "Releases that were not let in: their host asks too fast (rate), too much from their address was refused (address), no room (full), no time (late, deadline), caller gone (left).";
    ATTESTATIONS_DROPPED: Counter Count "claviger_attestations_dropped_total" ["reason"]
        "Attestations that were not let in: their host asks too fast (rate), too much from their address was refused (address), no room (full) or no time (late, deadline) in the attestations' share of the HSMs, caller gone (left).";
    CONNECTIONS: Counter Count "claviger_connections_total" []
        "Connections to the service address that were taken.";
    CONNECTIONS_OPEN: GaugeReading Count "claviger_connections_open" []
        "Connections to the service address that are open.";
    CONNECTIONS_LIMIT: GaugeReading Count "claviger_connections_limit" []
        "Connections to the service address that may be open.";
    CONNECTIONS_CUT: Counter Count "claviger_connections_cut_total" ["reason"]
        "Connections to the service address that were closed before their client wanted it: its place was needed (room), its address has too many (address), no request (silent), a slow header or handshake (header), answers not read (unread), requests given up (resets).";
    BODIES_REFUSED: Counter Count "claviger_bodies_refused_total" ["reason"]
        "Bodies of requests that were not taken: no memory (all), too much of one connection or address (connection, address), gave way to others while it arrived slowly (gave_way), too slow (slow), too long (too_large), a batch beyond the size of a single release before its health certificate was found right (unproven).";
    BODY_MEMORY: GaugeReading Bytes "claviger_body_memory_bytes" []
        "Memory that is set aside for bodies of requests and the work on them.";
    BODY_MEMORY_LIMIT: GaugeReading Bytes "claviger_body_memory_limit_bytes" []
        "Memory that there is for bodies of requests and the work on them.";

    HSM_STATE: GaugeReading Count "claviger_hsm_state" ["hsm", "state"]
        "1 for the state that a member is in, 0 for the others: up, down, probing, hung, draining, drained, pin_refused, off.";
    HSM_PRIORITY: GaugeReading Count "claviger_hsm_priority" ["hsm"]
        "Priority of a member: of those that are up, the ones with the smallest serve, and the others stand by.";
    HSM_CALLS: Counter Count "claviger_hsm_calls_total" ["hsm", "op", "rv"]
        "Operations at a token that returned, by class of return code: ok, refused, unable, stale, busy, pin, broken. A decryption whose result its check does not accept is refused, whatever the token said.";
    HSM_SERVICE_TIME: Histogram(HSM_SECONDS) Seconds "claviger_hsm_service_time_seconds" ["hsm", "op"]
        "How long a token took for an operation that returned, without any queueing. A refused decryption is booked with what accepted ones usually take.";
    HSM_RESPONSE_TIME: Histogram(HSM_SECONDS) Seconds "claviger_hsm_response_time_seconds" ["hsm", "op"]
        "How long an operation took at a member from its submission to its result, with queueing. The token's part of a refused decryption is what accepted ones usually take.";
    HSM_BATCH_JOBS: Histogram(SIZES) Count "claviger_hsm_batch_jobs" ["hsm"]
        "Replies of a member's worker process that the daemon read at one wake-up.";
    HSM_IN_FLIGHT: GaugeReading Count "claviger_hsm_in_flight" ["hsm"]
        "Operations that wait or run at a member.";
    HSM_WAITING: GaugeReading Count "claviger_hsm_waiting" ["hsm"]
        "Operations that wait for a session of a member.";
    HSM_SESSIONS_OPEN: GaugeReading Count "claviger_hsm_sessions_open" ["hsm"]
        "Sessions that are open on a member's token.";
    HSM_SESSIONS_WANTED: GaugeReading Count "claviger_hsm_sessions_wanted" ["hsm"]
        "Sessions that the configuration asks for.";
    HSM_SESSIONS_LIMIT: GaugeReading Count "claviger_hsm_sessions_limit" ["hsm"]
        "Sessions that there can be: fewer than wanted where the token gave fewer.";
    HSM_SESSIONS_BUSY: GaugeReading Count "claviger_hsm_sessions_busy" ["hsm"]
        "Sessions that are in an operation.";
    HSM_SESSIONS_STUCK: GaugeReading Count "claviger_hsm_sessions_stuck" ["hsm"]
        "Calls that have hung for longer than their caller waited; they end with their worker process.";
    HSM_CLOSINGS: Counter Count "claviger_hsm_closings_total" ["hsm"]
        "How often a fault took a member down.";
    HSM_FAILOVERS: Counter Count "claviger_hsm_failovers_total" ["hsm", "to"]
        "Operations that another member (to) did after this one (hsm) had failed at them or had sent them away.";
    HSM_RETRIES: Counter Count "claviger_hsm_retries_total" ["hsm"]
        "Operations that failed at a member and were tried at another, out of the retry budget.";
    HSM_RETRY_BUDGET: GaugeReading Count "claviger_hsm_retry_budget" []
        "Retries that the budget has left.";
    HSM_STUCK_CALLS: Counter Count "claviger_hsm_stuck_calls_total" ["hsm"]
        "Calls that hung at a member for longer than the watchdog allows.";
    HSM_WRONG_ANSWERS: Counter Count "claviger_hsm_wrong_answers_total" ["hsm"]
        "Plaintexts and signatures of a member that were wrong, and its fault. None of them left the service.";
    HSM_MODULES_RENEWED: Counter Count "claviger_hsm_modules_renewed_total" ["hsm"]
        "How often a fresh worker process brought a member up again after a fault: it initialises the module anew.";
    HSM_LOGINS: Counter Count "claviger_hsm_logins_total" ["hsm"]
        "Logins to a member's token. Steady load needs none.";
    HSM_KEY_SEARCHES: Counter Count "claviger_hsm_key_searches_total" ["hsm"]
        "Searches for key objects on a member's token: one for a session, none for a release.";
    HSM_CPU: CounterReading Seconds "claviger_hsm_cpu_seconds_total" ["hsm"]
        "Processor time of a member's worker processes within operations of its token: the vendor's library. A refused decryption is booked with what accepted ones usually take.";
    HSM_WORKER_CPU: CounterReading Seconds "claviger_hsm_worker_cpu_seconds_total" ["hsm"]
        "Processor time of a member's worker processes, all of it. Less claviger_hsm_cpu_seconds_total it is what they cost outside PKCS#11.";
    HSM_WORKER_MEMORY: GaugeReading Bytes "claviger_hsm_worker_resident_memory_bytes" ["hsm"]
        "Resident memory of a member's worker process; 0 while there is none.";

    CERTIFICATE_EXPIRY: GaugeReading Seconds "claviger_certificate_expiry_timestamp_seconds" ["kind", "certificate"]
        "When a certificate ends, in seconds since 1970, by kind (signing, encryption, attestation, tls) and the first 8 digits of its thumbprint.";
    HOSTS_REGISTERED: GaugeReading Count "claviger_hosts_registered" []
        "Hosts that are registered and enabled.";
    STATE_STALE: GaugeReading Count "claviger_state_stale" []
        "1 while the state file cannot be read: changes have no effect, and hosts that were removed may go on being served.";
    AUDIT_ERRORS: Counter Count "claviger_audit_errors_total" []
        "Audit records that could not be written; what they would have recorded was refused.";
    AUDIT_WRITE_DURATION: Histogram(DISK_SECONDS) Seconds "claviger_audit_write_duration_seconds" []
        "How long a group of audit records took to be written, and forced to the disk where that is set.";
    AUDIT_WAITING: GaugeReading Count "claviger_audit_waiting" []
        "Audit records that wait for the disk.";
    AUDIT_WRITING: GaugeReading Seconds "claviger_audit_writing_seconds" []
        "For how long the audit records that are being written now have been: more than a moment is a disk that hangs.";
    LOG_DROPPED: Counter Count "claviger_log_lines_dropped_total" []
        "Lines of the log that were dropped, because its reader stood still or it could not be written.";
    AUDIT_COUNTED: Counter Count "claviger_audit_counted_refusals_total" []
        "Refusals that have no audit line of their own: they are counted in a summary, a line a second.";
    AUDIT_FILE_CHANGES: Counter Count "claviger_audit_file_changes_total" ["how"]
        "How often the audit file was not what it was any more, and no reload said so: deleted, renamed, replaced (by a rotation, as a rule), shortened.";
    AUDIT_LINE: GaugeReading Count "claviger_audit_last_line" []
        "Number of the last line of the audit trail: what Prometheus keeps of it shows when lines are missing at its end.";
    AUDIT_UNSIGNED: GaugeReading Count "claviger_audit_unsigned_records" []
        "Audit records that no checkpoint covers yet.";
    AUDIT_UNSIGNED_FOR: GaugeReading Seconds "claviger_audit_unsigned_seconds" []
        "Age of the oldest audit record that no checkpoint covers.";
    AUDIT_RESERVE_MISSING: GaugeReading Bytes "claviger_audit_reserve_missing_bytes" []
        "How much of the audit trail's reserve is used, or could not be allocated: the disk is full.";
    IDENTITY_CHANGES: Counter Count "claviger_host_identity_changes_total" []
        "Attestations that certified another identity key than the one before of the same host.";
    CLOCK: GaugeReading Seconds "claviger_clock_timestamp_seconds" []
        "The clock of this machine, in seconds since 1970: certificates are judged by it.";

    PROCESS_CPU: CounterReading Seconds "process_cpu_seconds_total" []
        "Processor time of this process, user and system.";
    PROCESS_MEMORY: GaugeReading Bytes "process_resident_memory_bytes" []
        "Memory of this process that is resident.";
    PROCESS_THREADS: GaugeReading Count "process_threads" []
        "Threads of this process.";
    PROCESS_FILES: GaugeReading Count "process_open_fds" []
        "Files that this process has open; every connection is one.";
    PROCESS_MAX_FILES: GaugeReading Count "process_max_fds" []
        "Files that this process may have open.";
    PROCESS_START: GaugeReading Seconds "process_start_time_seconds" []
        "When this process started, in seconds since 1970.";
    BUILD_INFO: GaugeReading Count "claviger_build_info" ["version", "commit"]
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
    /// The page for `/metrics`, in the Prometheus text format (`text/plain; version=0.0.4`).
    #[must_use]
    pub fn render(&self, readings: &Readings) -> String {
        let mut page = self.0.render();
        readings.write(&mut page);
        page
    }

    /// Sorts what histograms were told since the last time into their buckets. Until then every value takes memory, also when
    /// nobody ever asks for the page.
    pub fn upkeep(&self) {
        self.0.run_upkeep();
    }
}

static INSTALLED: OnceLock<Handle> = OnceLock::new();

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
            let handle = Handle(recorder.handle());
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
