//! Alerts. `critical` is for a fault that callers feel now or will feel within the hour. Everything else is a `warning`.

use super::rule::{Alert, Group, LATENCY_OBJECTIVE, OBJECTIVE, Rule};

pub(super) fn groups() -> Vec<Group> {
    let group =
        |name, alerts: Vec<Alert>| Group { name, interval: None, rules: alerts.into_iter().map(Rule::Alert).collect() };
    vec![
        group("claviger-promise-alerts", promise()),
        group("claviger-daemon-alerts", daemon()),
        group("claviger-cluster-alerts", cluster()),
        group("claviger-records-alerts", records()),
        group("claviger-trust-alerts", trust()),
        group("claviger-limits-alerts", limits()),
    ]
}

fn alert(
    name: &'static str,
    severity: &'static str,
    wait: &'static str,
    expression: &str,
    summary: &'static str,
    description: &str,
) -> Alert {
    Alert { name, severity, wait, expression: expression.to_owned(), summary, description: description.to_owned() }
}

/// A burn rate; the long window that proves it, with its hours; and the short window, which ends the alert soon after
/// the cause.
type Burn = (f64, &'static str, u32, &'static str);
/// 2 % of a month's budget in one hour, or 5 % in six hours.
const PAGE: [Burn; 2] = [(14.4, "1h", 1, "5m"), (6.0, "6h", 6, "30m")];
/// 10 % of a month's budget in one day, or in three days.
const TICKET: [Burn; 2] = [(3.0, "1d", 24, "2h"), (1.0, "3d", 72, "6h")];
/// Minimum number of failures in the long window. In a quiet hour, one failure of ten releases is 10 %, and must not
/// page anybody. The minimum is three failures; rates are extrapolated, so three may appear as slightly less.
const FEWEST: f64 = 2.5;

/// The budget of `objective` is consumed faster than one of the burn rates allows.
fn burning(part: &str, objective: f64, burns: &[Burn]) -> String {
    let budget = 1.0 - objective;
    let either: Vec<_> = burns
        .iter()
        .map(|(rate, long, hours, short)| {
            let ratio = |window| format!("job:claviger_releases_{part}:ratio_rate{window} > {rate} * {budget:.3}");
            let many =
                format!("sum by (job) (instance:claviger_releases_{part}:rate{long}) * {hours} * 3600 > {FEWEST}");
            format!("(\n  {}\n  and {}\n  and {many}\n)", ratio(long), ratio(short))
        })
        .collect();
    either.join("\nor\n")
}

fn promise() -> Vec<Alert> {
    let failed = "{{ $value | humanizePercentage }} of the releases of {{ $labels.job }} that are not their caller's \
                  fault failed; 0.1 % is allowed.";
    let slow = "{{ $value | humanizePercentage }} of the releases of {{ $labels.job }} that succeeded took longer than \
                promised; 1 % may.";
    vec![
        alert(
            "ClavigerReleasesFailFast",
            "critical",
            "2m",
            &burning("failed", OBJECTIVE, &PAGE),
            "Releases fail: the month's error budget will not last",
            failed,
        ),
        alert(
            "ClavigerReleasesFailSlowly",
            "warning",
            "15m",
            &burning("failed", OBJECTIVE, &TICKET),
            "Releases fail now and then: the error budget is consumed too fast",
            failed,
        ),
        alert(
            "ClavigerReleasesSlowFast",
            "critical",
            "2m",
            &burning("slow", LATENCY_OBJECTIVE, &PAGE),
            "Releases are slow: the month's latency budget will not last",
            slow,
        ),
        alert(
            "ClavigerReleasesSlowSlowly",
            "warning",
            "15m",
            &burning("slow", LATENCY_OBJECTIVE, &TICKET),
            "Releases are slow now and then: the latency budget is consumed too fast",
            slow,
        ),
    ]
}

fn daemon() -> Vec<Alert> {
    vec![
        alert(
            "ClavigerDown",
            "critical",
            "2m",
            r#"up{job=~"claviger.*"} == 0"#,
            "A daemon does not answer",
            "{{ $labels.instance }} of {{ $labels.job }} has not answered Prometheus for two minutes.",
        ),
        alert(
            "ClavigerAbsent",
            "critical",
            "5m",
            r#"absent(up{job=~"claviger.*"})"#,
            "Prometheus has no daemon to scrape",
            "Prometheus has no target in a job whose name begins with claviger. A failure to release keys would not \
             be noticed.",
        ),
        alert(
            "ClavigerRestarts",
            "warning",
            "0m",
            "changes(process_start_time_seconds[1h]) > 2 and on (job, instance) claviger_build_info",
            "A daemon restarts repeatedly",
            "{{ $labels.instance }} was started {{ $value | humanize }} times within an hour.",
        ),
    ]
}

fn cluster() -> Vec<Alert> {
    vec![
        alert(
            "ClavigerMemberDown",
            "warning",
            "5m",
            r#"sum by (job, instance, hsm) (claviger_hsm_state{state=~"down|probing|hung"}) > 0"#,
            "An HSM does not serve",
            "{{ $labels.hsm }} at {{ $labels.instance }} has not been up for five minutes. Others serve.",
        ),
        alert(
            "ClavigerLastMember",
            "critical",
            "2m",
            "instance:claviger_hsm_up:sum == 1 and instance:claviger_hsm_members:count > 1",
            "Only one HSM is up",
            "Only one of several HSMs of {{ $labels.instance }} is up. If it fails, no key is released.",
        ),
        alert(
            "ClavigerNoMember",
            "critical",
            "1m",
            "instance:claviger_hsm_up:sum == 0",
            "No HSM serves",
            "{{ $labels.instance }} has no HSM that is up. It releases no keys and attests no hosts.",
        ),
        alert(
            "ClavigerCallsHung",
            "warning",
            "0m",
            "increase(claviger_hsm_stuck_calls_total[15m]) > 1.5",
            "Calls into an HSM hang",
            "Calls into {{ $labels.hsm }} at {{ $labels.instance }} hung {{ $value | humanize }} times within a \
             quarter of an \
             hour.",
        ),
        alert(
            "ClavigerWrongAnswer",
            "critical",
            "0m",
            "increase(claviger_hsm_wrong_answers_total[15m]) > 0",
            "An HSM returns wrong results",
            "{{ $labels.hsm }} at {{ $labels.instance }} returned wrong results within a quarter of an hour. None \
             of them left the service.",
        ),
        alert(
            "ClavigerMemberFlapping",
            "warning",
            "0m",
            "increase(claviger_hsm_closings_total[1h]) > 3.5",
            "An HSM fails repeatedly",
            "{{ $labels.hsm }} at {{ $labels.instance }} was closed for a fault {{ $value | humanize }} times within \
             an hour.",
        ),
        alert(
            "ClavigerPinRefused",
            "warning",
            "0m",
            r#"claviger_hsm_state{state="pin_refused"} == 1"#,
            "An HSM refuses the PIN",
            "{{ $labels.hsm }} at {{ $labels.instance }} refused its PIN. The daemon does not try it again, because \
             tokens count wrong PINs and lock.",
        ),
        alert(
            "ClavigerRetryBudgetEmpty",
            "warning",
            "2m",
            "claviger_hsm_retry_budget < 1",
            "Failed operations are not retried at another HSM",
            "The retry budget of {{ $labels.instance }} is used up. So many operations fail that retries would make \
             it worse.",
        ),
    ]
}

fn records() -> Vec<Alert> {
    vec![
        alert(
            "ClavigerAuditStuck",
            "critical",
            "1m",
            "claviger_audit_writing_seconds > 5 or claviger_audit_waiting > 4096",
            "The audit log's disk hangs",
            "The audit log of {{ $labels.instance }} is not written. Nothing is released without its record.",
        ),
        alert(
            "ClavigerAuditFailing",
            "critical",
            "0m",
            "increase(claviger_audit_errors_total[5m]) > 0",
            "The audit log cannot be written",
            "{{ $value | humanize }} audit records of {{ $labels.instance }} could not be written within five minutes. \
             The operations to be recorded were refused.",
        ),
        alert(
            "ClavigerLogDropped",
            "warning",
            "0m",
            "increase(claviger_log_lines_dropped_total[15m]) > 0",
            "Lines of the log are lost",
            "{{ $value | humanize }} lines of the log of {{ $labels.instance }} were dropped within 15 minutes: its \
             reader has stopped, or it cannot be written. Keys are still released.",
        ),
        alert(
            "ClavigerAuditFileLost",
            "critical",
            "0m",
            "increase(claviger_audit_file_changes_total{how=~\"deleted|shortened\"}[15m]) > 0",
            "The audit log was deleted or cut",
            "The audit log of {{ $labels.instance }} was {{ $labels.how }} while it was written. Lines of it are lost.",
        ),
        alert(
            "ClavigerAuditDiskFull",
            "critical",
            "1m",
            "claviger_audit_reserve_missing_bytes > 0",
            "The audit log's disk is full",
            "The disk of the audit log of {{ $labels.instance }} is full: {{ $value | humanize1024 }}B of the \
             reserve are used. When the reserve is used up, nothing is released.",
        ),
        alert(
            "ClavigerAuditUnsigned",
            "warning",
            "15m",
            "claviger_audit_unsigned_seconds > 3600",
            "The audit log is not signed",
            "The audit log of {{ $labels.instance }} has had no checkpoint for {{ $value | humanizeDuration }}. A \
             person with write access to the files can change unsigned lines without a trace.",
        ),
        alert(
            "ClavigerStateStale",
            "critical",
            "2m",
            "claviger_state_stale == 1",
            "The state file cannot be read",
            "{{ $labels.instance }} cannot read its state: changes have no effect, and removed hosts may still be \
             served.",
        ),
        alert(
            "ClavigerEtcdLost",
            "critical",
            "1m",
            "claviger_etcd_connected == 0",
            "A node has lost etcd",
            "{{ $labels.instance }} has no connection to etcd: nothing can be changed there, hosts that are removed \
             elsewhere may still be served, and at the limit of `etcd.max_staleness_ms` it stops to release keys.",
        ),
        alert(
            "ClavigerStateExpired",
            "critical",
            "0m",
            "claviger_state_age_seconds > on (instance, job) claviger_state_age_limit_seconds",
            "A node releases nothing, because it has lost etcd for too long",
            "{{ $labels.instance }} has not heard from etcd for {{ $value | humanizeDuration }}: it answers releases \
             and attestations with 503 until it has read the state again.",
        ),
        alert(
            "ClavigerNodeBehind",
            "critical",
            "1m",
            "claviger_state_revision < on (job) group_left () max by (job) (claviger_state_revision) \
             and on (instance, job) claviger_etcd_connected == 1",
            "A node does not follow the state in etcd",
            "{{ $labels.instance }} has an older revision of the state than another node: changes have no effect there, \
             and removed hosts may still be served.",
        ),
    ]
}

/// Alerts on certificates. The daemon makes a new attestation signer 30 days before the current one expires. A signer
/// with less than three weeks left means that the daemon has failed to do so for more than a week. An encryption key
/// stays in use after its certificate has expired, as long as virtual machines need it, so its alert ends a week later.
/// TLS and attestation stop when their certificate expires.
fn trust() -> Vec<Alert> {
    const LEFT: &str = "claviger_certificate_expiry_timestamp_seconds";
    const WHICH: &str = "The {{ $labels.kind }} certificate {{ $labels.certificate }} of {{ $labels.instance }} ends \
     in \
                         {{ $value | humanizeDuration }}.";
    vec![
        alert(
            "ClavigerCertificateExpiring",
            "warning",
            "1h",
            &format!("({LEFT}{{kind=~\"signing|encryption|tls\"}} - time() < 30 * 86400) > -7 * 86400"),
            "A certificate ends within 30 days, or has just ended",
            WHICH,
        ),
        alert(
            "ClavigerSignerExpiring",
            "warning",
            "1h",
            &format!("{LEFT}{{kind=\"attestation\"}} - time() < 21 * 86400"),
            "The attestation signer was not renewed",
            &format!("{WHICH} The daemon should have made a new one 30 days before the end."),
        ),
        alert(
            "ClavigerCertificateEnds",
            "critical",
            "15m",
            &format!("{LEFT}{{kind=~\"tls|attestation\"}} - time() < 3 * 86400"),
            "A certificate that hosts check ends within three days",
            WHICH,
        ),
        alert(
            "ClavigerClockSkew",
            "warning",
            "5m",
            "abs(timestamp(claviger_clock_timestamp_seconds) - claviger_clock_timestamp_seconds) > 10",
            "A clock is wrong",
            "The clock of {{ $labels.instance }} and that of Prometheus are {{ $value | humanizeDuration }} apart. \
             The daemon uses this clock to check certificates.",
        ),
        alert(
            "ClavigerAttestationsFail",
            "critical",
            "5m",
            "sum by (job) (rate(claviger_attestations_total{outcome=~\"ErrorReply|UnavailableErrorReply\"}[10m]))\n\
             / (sum by (job) (rate(claviger_attestations_total[10m])) > 0)\n> 0.05",
            "Hosts cannot attest",
            "{{ $value | humanizePercentage }} of the attestations at {{ $labels.job }} fail because of the \
             service. Health certificates last eight hours; after that, hosts get no keys.",
        ),
        alert(
            "ClavigerAttestationsRefused",
            "warning",
            "0m",
            "sum by (job, outcome) \
             (increase(claviger_attestations_total{outcome!~\"success|ErrorReply|UnavailableErrorReply\"}\
             [1h])) > 10",
            "Attestations of hosts are refused",
            "{{ $labels.job }} refused {{ $value | humanize }} attestations within an hour with {{ $labels.outcome }}.",
        ),
        alert(
            "ClavigerHostsFailPolicies",
            "warning",
            "0m",
            "sum by (job, policy) (increase(claviger_attestation_policies_total{result=\"fail\"}[1h])) > 0",
            "Hosts begin to fail a policy",
            "Hosts of {{ $labels.job }} failed {{ $labels.policy }} {{ $value | humanize }} times within an hour: \
             they booted software that no enabled baseline has, booted without Secure Boot, or slept. They get no \
             keys.",
        ),
        alert(
            "ClavigerHealthRefused",
            "warning",
            "0m",
            "sum by (job) (increase(claviger_releases_total{outcome=\"HealthCertificateException\"}[1h])) > 10",
            "Releases without a valid health certificate",
            "{{ $labels.job }} refused {{ $value | humanize }} releases within an hour because of their health \
             certificate.",
        ),
    ]
}

fn limits() -> Vec<Alert> {
    vec![
        alert(
            "ClavigerQueueDropping",
            "warning",
            "5m",
            "sum by (job, instance) (rate(claviger_queue_dropped_total{reason=~\"full|late|deadline\"}[5m])) > 0.1",
            "More releases are requested than the HSMs can do",
            "{{ $labels.instance }} refuses {{ $value | humanize }} releases a second, because the queue is full or \
             the time is too short.",
        ),
        alert(
            "ClavigerHeadroomLow",
            "warning",
            "30m",
            "instance:claviger_releases_succeeded:rate5m / instance:claviger_releases:ceiling > 0.7",
            "Little headroom is left",
            "{{ $labels.instance }} runs at {{ $value | humanizePercentage }} of the capacity of its HSMs.",
        ),
        alert(
            "ClavigerMemoryHigh",
            "warning",
            "15m",
            "process_resident_memory_bytes > 2 * 1024 ^ 3 and on (job, instance) claviger_build_info",
            "A daemon uses a lot of memory",
            "{{ $labels.instance }} uses {{ $value | humanize1024 }}B of memory; a few hundred MiB are usual.",
        ),
        alert(
            "ClavigerFilesNearLimit",
            "warning",
            "5m",
            "process_open_fds / process_max_fds > 0.8 and on (job, instance) claviger_build_info",
            "A daemon is near its limit of open files",
            "{{ $labels.instance }} uses {{ $value | humanizePercentage }} of its limit of open files. Every \
             connection is a file.",
        ),
        alert(
            "ClavigerConnectionsNearLimit",
            "critical",
            "2m",
            "claviger_connections_open / claviger_connections_limit > 0.9",
            "A daemon is near its limit of connections",
            "{{ $labels.instance }} uses {{ $value | humanizePercentage }} of its limit of connections.",
        ),
        alert(
            "ClavigerCrowdedOut",
            "warning",
            "5m",
            r#"sum by (job, instance) (rate(claviger_connections_cut_total{reason=~"room|address|resets|unread"}[5m]))
+ sum by (job, instance) (rate(claviger_bodies_refused_total[5m])) > 1"#,
            "Clients take connections or memory without requesting keys",
            "{{ $labels.instance }} closes connections or refuses request bodies, {{ $value | humanize }} a second: \
             to make room for other clients, or because of a client's behaviour.",
        ),
    ]
}
