//! The table of metrics. A new metric needs a line here, a recording function in `metrics.rs`, and a panel or rule in
//! the dashboards, whose tests check that.

use ::metrics::Unit;

/// The kind of a metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Counts up from zero at the start of the process.
    Counter,
    /// The number of values up to each of these bucket boundaries (ascending), with sum and count.
    Histogram(&'static [f64]),
    /// A counter that is read when the page is rendered.
    CounterReading,
    /// A gauge that is read when the page is rendered.
    GaugeReading,
}

/// A metric as `/metrics` and the documentation show it.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// The name, with the suffix for its unit or `_total`, following Prometheus' conventions.
    pub name: &'static str,
    /// The kind.
    pub kind: Kind,
    /// The unit of its values.
    pub unit: Unit,
    /// One line that describes the value.
    pub help: &'static str,
    /// The names of its labels.
    pub labels: &'static [&'static str],
}

/// The service level objective: 99 of 100 successful releases take at most this time, in seconds. It is a bucket
/// boundary of the release histogram, so that the share is exact.
pub const SLO_SECONDS: f64 = 0.5;

/// Bucket boundaries for times that clients wait.
const RELEASE_SECONDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, SLO_SECONDS, 1.0, 2.5, 5.0, 10.0];
/// Bucket boundaries for an operation at a token: soft tokens take less than a millisecond, network HSMs up to tens of
/// milliseconds.
const HSM_SECONDS: &[f64] =
    &[0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Bucket boundaries for disk writes.
const DISK_SECONDS: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];
/// Bucket boundaries for group sizes.
const SIZES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

macro_rules! metrics {
    ($($id:ident: $kind:ident $(($edges:ident))? $unit:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(pub(super) const $id: Metric = Metric {
            name: $name, kind: Kind::$kind $(($edges))?, unit: Unit::$unit, help: $help, labels: &[$($label),*],
        };)*
        /// All metrics.
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
        "Bodies of requests that were not taken: no memory (all), too much of one connection or address (connection, address), gave way to others while it arrived slowly, its sender was not known yet, or its reply was not read (gave_way), too slow (slow), too long (too_large), a batch beyond the size of a single release before its health certificate was found right (unproven).";
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
    ETCD_CONNECTED: GaugeReading Count "claviger_etcd_connected" []
        "1 while etcd confirms the state of this node, 0 otherwise: then nothing can be changed. Only with [etcd].";
    STATE_AGE: GaugeReading Seconds "claviger_state_age_seconds" []
        "Time since etcd last confirmed the state of this node. Only with [etcd].";
    STATE_AGE_LIMIT: GaugeReading Seconds "claviger_state_age_limit_seconds" []
        "Age of the state beyond which this node releases nothing (etcd.max_staleness_ms). Only with [etcd].";
    STATE_REVISION: GaugeReading Count "claviger_state_revision" []
        "etcd's revision of the state that this node has. Only with [etcd].";
    AUDIT_ERRORS: Counter Count "claviger_audit_errors_total" []
        "Audit records that could not be written; what they would have recorded was refused.";
    AUDIT_WRITE_DURATION: Histogram(DISK_SECONDS) Seconds "claviger_audit_write_duration_seconds" []
        "How long a group of audit records took to be written, and forced to the disk where that is set.";
    AUDIT_WAITING: GaugeReading Count "claviger_audit_waiting" []
        "Audit records that wait for the disk.";
    AUDIT_WRITING: GaugeReading Seconds "claviger_audit_writing_seconds" []
        "For how long the audit records that are being written now have been: more than a moment is a disk that hangs.";
    LOG_DROPPED: Counter Count "claviger_log_lines_dropped_total" []
        "Lines of the log that were dropped, because nothing read the log or it could not be written.";
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
