//! The service dashboard: rates, errors, durations and the service objective.

use claviger::observe::metrics::SLO_SECONDS;
use serde_json::Value;

use super::dashboard::{Dashboard, Row};
use super::panel::{GREEN, Panel, RED, YELLOW};
use crate::prometheus::{FAILED, LATENCY_OBJECTIVE, OBJECTIVE};

pub(super) const UID: &str = "claviger-service";

pub(super) fn dashboard() -> Value {
    let rows = vec![
        Row::open("Are keys being released?", first()),
        Row::open("Releases", releases()),
        Row::open("Attestation and HTTP", surface()),
        Row::open("Audit log", audit()),
        Row::closed("Certificates and clock", certificates()),
        Row::closed("Process", process()),
    ];
    Dashboard {
        uid: UID,
        title: "Claviger / Service",
        description: "Are keys being released, how fast, and is the promise kept?",
        variables: Vec::new(),
        rows,
    }
    .json()
}

fn first() -> Vec<Panel> {
    let budget = format!(
        "1 - (sum(instance:claviger_releases_failed:rate30d{{@}}) / \
         (sum(instance:claviger_releases_decided:rate30d{{@}}) > 0)) \
         / {:.3}",
        1.0 - OBJECTIVE
    );
    vec![
        Panel::stat("Releases", "reqps", "Keys that are released now, a second.")
            .ask(r#"sum(rate(claviger_releases_total{@, outcome="success"}[~]))"#, "releases")
            .leads_to("Capacity", super::capacity::UID),
        Panel::stat(
            "Success",
            "percentunit",
            "Of the releases that are not the caller's fault, the share that succeeded. Refusals are not counted.",
        )
        .ask(
            &format!(
                "1 - sum(rate(claviger_releases_total{{@, outcome=~\"{FAILED}\"}}[~])) \
                 / (sum(rate(claviger_releases_total{{@, outcome=~\"success|{FAILED}\"}}[~])) > 0)"
            ),
            "success",
        )
        .colours(RED, &[(0.99, YELLOW), (OBJECTIVE, GREEN)]),
        Panel::stat("p99", "s", "Of the releases that succeeded, 99 in 100 took no longer than this.")
            .ask(
                "histogram_quantile(0.99, \
                 sum by (le) (rate(claviger_release_duration_seconds_bucket{@, class=\"success\"}[~])))",
                "p99",
            )
            .colours(GREEN, &[(SLO_SECONDS / 2.0, YELLOW), (SLO_SECONDS, RED)]),
        Panel::stat(
            "Error budget left, 30 d",
            "percentunit",
            "What is left of the failures that the promise allows in 30 days; below zero it is broken. From recording \
             rules.",
        )
        .ask(&budget, "left")
        .colours(RED, &[(0.0, YELLOW), (0.5, GREEN)]),
        Panel::stat(
            "Members up",
            "short",
            "HSMs that serve; where several daemons are selected, of the one with the \
         fewest.",
        )
        .ask(r#"min(sum by (job, instance) (claviger_hsm_state{@, state="up"}))"#, "up")
        .colours(RED, &[(1.0, YELLOW), (2.0, GREEN)])
        .leads_to("Cluster", super::cluster::UID),
        Panel::stat("Waiting", "short", "Releases that wait for their turn.")
            .ask("sum(claviger_queue_waiting{@})", "waiting")
            .colours(GREEN, &[(100.0, YELLOW), (1000.0, RED)])
            .leads_to("Capacity", super::capacity::UID),
    ]
}

fn releases() -> Vec<Panel> {
    let part = |quantile: &str| {
        format!(
            "histogram_quantile({quantile}, \
             sum by (le) (rate(claviger_release_duration_seconds_bucket{{@, class=\"success\"}}[~])))"
        )
    };
    let within = format!(
        "sum(rate(claviger_release_duration_seconds_bucket{{@, class=\"success\", le=\"{SLO_SECONDS}\"}}[~])) \
         / sum(rate(claviger_release_duration_seconds_count{{@, class=\"success\"}}[~]))"
    );
    vec![
        Panel::stacked("Releases by outcome", "reqps", "Success, or the code of the error that was answered.")
            .ask("sum by (outcome) (rate(claviger_releases_total{@}[~]))", "{{outcome}}"),
        Panel::lines("Latency", "s", "From a release's arrival to its decision, for those that succeeded.")
            .ask(&part("0.5"), "p50")
            .ask(&part("0.9"), "p90")
            .ask(&part("0.99"), "p99")
            .colours(GREEN, &[(SLO_SECONDS, RED)]),
        Panel::lines(
            "Share within the objective",
            "percentunit",
            "Of the releases that succeeded, the share that took no longer than the promise. Exact: the promise is an \
             edge.",
        )
        .ask(&within, "within")
        .colours(RED, &[(LATENCY_OBJECTIVE, GREEN)])
        .up_to(1.0),
        Panel::stacked(
            "Where the time goes",
            "s",
            "What an average release spends its time on: its turn, the HSMs, and everything else.",
        )
        .ask(
            "sum by (part) (rate(claviger_release_part_duration_seconds_sum{@}[~])) \
             / on () group_left sum(rate(claviger_release_duration_seconds_count{@}[~]))",
            "{{part}}",
        ),
        Panel::lines(
            "Failures and refusals, p99",
            "s",
            "How long those wait who get no key: refused (the request is at fault) and failed (the service is).",
        )
        .ask(
            "histogram_quantile(0.99, \
             sum by (class, le) (rate(claviger_release_duration_seconds_bucket{@, class!=\"success\"}[~])))",
            "{{class}}",
        ),
        Panel::stacked(
            "Not let in, by reason",
            "reqps",
            "rate: their host asks too fast; full: no room; late, deadline: no time; left: the caller is gone.",
        )
        .ask("sum by (reason) (rate(claviger_queue_dropped_total{@}[~]))", "{{reason}}"),
        Panel::stacked(
            "Releases by certificate",
            "reqps",
            "By the key that opened the protector, named after its primary or newest encryption certificate. One that \
             stays at zero can be retired.",
        )
        .ask("sum by (certificate) (rate(claviger_key_releases_total{@}[~]))", "{{certificate}}"),
        Panel::lines("Batch sizes", "short", "Protectors in a batch request.")
            .ask("histogram_quantile(0.5, sum by (le) (rate(claviger_batch_items_bucket{@}[~])))", "p50")
            .ask("histogram_quantile(0.99, sum by (le) (rate(claviger_batch_items_bucket{@}[~])))", "p99"),
        Panel::stacked("Releases by API version", "reqps", "Which version of the protocol hosts speak.")
            .ask("sum by (api) (rate(claviger_releases_total{@}[~]))", "{{api}}"),
    ]
}

fn surface() -> Vec<Panel> {
    vec![
        Panel::stacked("Attestations by outcome", "reqps", "Success, or the type of the error that was answered.")
            .ask("sum by (outcome) (rate(claviger_attestations_total{@}[~]))", "{{outcome}}"),
        Panel::stacked(
            "Policies that hosts fail",
            "short",
            "In the time of one point, by policy, of hosts that attest by their TPM. claviger hosts check says which and why.",
        )
        .ask(
            "sum by (policy) (increase(claviger_attestation_policies_total{result=\"fail\", @}[~]))",
            "{{policy}}",
        ),
        Panel::lines("Attestation latency", "s", "From an attestation's arrival to its decision.")
            .ask(
                "histogram_quantile(0.5, sum by (le) (rate(claviger_attestation_duration_seconds_bucket{@}[~])))",
                "p50",
            )
            .ask(
                "histogram_quantile(0.99, sum by (le) (rate(claviger_attestation_duration_seconds_bucket{@}[~])))",
                "p99",
            ),
        Panel::stacked("HTTP answers", "reqps", "By resource and class of the status code.")
            .ask("sum by (resource, code) (rate(claviger_http_responses_total{@}[~]))", "{{resource}} {{code}}"),
        Panel::lines("Connections open", "short", "Connections to the service address, by daemon.")
            .ask("sum by (instance) (claviger_connections_open{@})", "{{instance}}"),
        Panel::lines(
            "Connections taken",
            "cps",
            "New connections a second. As many as requests: the hosts do not keep them open.",
        )
        .ask("sum by (instance) (rate(claviger_connections_total{@}[~]))", "{{instance}}"),
        Panel::stacked(
            "Connections cut, by reason",
            "cps",
            "room: its place was needed; address: its address has too many; silent: no request; header: slow; unread: \
             answers not read; resets: requests given up.",
        )
        .ask("sum by (reason) (rate(claviger_connections_cut_total{@}[~]))", "{{reason}}"),
        Panel::stacked(
            "Bodies not taken, by reason",
            "reqps",
            "all, connection, address: no memory; gave_way: slow while memory was short; slow; too_large; unproven: a \
             large batch without a valid health certificate.",
        )
        .ask("sum by (reason) (rate(claviger_bodies_refused_total{@}[~]))", "{{reason}}"),
        Panel::lines(
            "State file",
            "bool",
            "1 while the state file cannot be read: removed hosts may go on being served.",
        )
        .ask("max by (instance) (claviger_state_stale{@})", "{{instance}}")
        .colours(GREEN, &[(1.0, RED)])
        .up_to(1.0),
        Panel::lines(
            "Age of the state in etcd",
            "s",
            "Time since etcd confirmed the state of a node. At its limit (300 s by default) a node releases nothing.",
        )
        .ask("max by (instance) (claviger_state_age_seconds{@})", "{{instance}}")
        .ask("max by (instance) (claviger_state_age_limit_seconds{@})", "limit of {{instance}}")
        .colours(GREEN, &[(5.0, YELLOW), (300.0, RED)]),
        Panel::lines(
            "Revision of the state in etcd",
            "short",
            "The newest change that a node has. A node that stays behind the others does not follow etcd.",
        )
        .ask("max by (instance) (claviger_state_revision{@})", "{{instance}}"),
    ]
}

fn audit() -> Vec<Panel> {
    vec![
        Panel::lines(
            "Write time",
            "s",
            "How long a group of records took to be written, forced to the disk where that is set.",
        )
        .ask("histogram_quantile(0.5, sum by (le) (rate(claviger_audit_write_duration_seconds_bucket{@}[~])))", "p50")
        .ask("histogram_quantile(0.99, sum by (le) (rate(claviger_audit_write_duration_seconds_bucket{@}[~])))", "p99")
        .ask("max(claviger_audit_writing_seconds{@})", "the one under way"),
        Panel::lines("Backlog", "short", "Records that wait for the disk. At 16,384 nothing more is taken.")
            .ask("sum by (instance) (claviger_audit_waiting{@})", "{{instance}}")
            .colours(GREEN, &[(1000.0, YELLOW), (16_384.0, RED)]),
        Panel::lines("Records not written", "ops", "What they would have recorded was refused.")
            .ask("sum by (instance) (rate(claviger_audit_errors_total{@}[~]))", "{{instance}}")
            .colours(GREEN, &[(0.001, RED)]),
        Panel::lines("Log lines dropped", "ops", "The log's reader stands still, or it cannot be written.")
            .ask("sum by (instance) (rate(claviger_log_lines_dropped_total{@}[~]))", "{{instance}}")
            .colours(GREEN, &[(0.001, YELLOW)]),
        Panel::lines(
            "Lines",
            "ops",
            "Lines that are written, and refusals of anybody that are only counted. Lines go on over restarts.",
        )
        .ask("sum by (instance) (deriv(claviger_audit_last_line{@}[~]))", "{{instance}}: lines")
        .ask("sum by (instance) (rate(claviger_audit_counted_refusals_total{@}[~]))", "{{instance}}: counted"),
        Panel::lines(
            "Not signed",
            "s",
            "Age of the oldest record that no checkpoint covers; an HSM signs the trail every minute while it grows.",
        )
        .ask("max by (instance) (claviger_audit_unsigned_seconds{@})", "{{instance}}")
        .colours(GREEN, &[(600.0, YELLOW), (3600.0, RED)]),
        Panel::lines("Records not signed", "short", "Records that no checkpoint covers.")
            .ask("sum by (instance) (claviger_audit_unsigned_records{@})", "{{instance}}"),
        Panel::lines(
            "File not what it was",
            "short",
            "How often the audit file was found deleted, renamed, replaced or shortened within the time shown; a rotation \
             replaces it.",
        )
        .ask("sum by (how) (increase(claviger_audit_file_changes_total{@}[~]))", "{{how}}"),
        Panel::lines("Reserve used", "bytes", "How much of the reserve is used: above zero the disk is full.")
            .ask("sum by (instance) (claviger_audit_reserve_missing_bytes{@})", "{{instance}}")
            .colours(GREEN, &[(1.0, RED)]),
        Panel::lines(
            "Other identity keys",
            "short",
            "Hosts that got another identity key certified than before; the log names them.",
        )
        .ask("sum by (instance) (increase(claviger_host_identity_changes_total{@}[~]))", "{{instance}}"),
    ]
}

fn certificates() -> Vec<Panel> {
    vec![
        Panel::table(
            "Certificates",
            "s",
            "How long each certificate is still good. The signer of attestations renews itself 30 days before its end.",
        )
        .ask("min by (kind, certificate) (claviger_certificate_expiry_timestamp_seconds{@}) - time()", "")
        .columns(&["Time"], &[("kind", "Kind"), ("certificate", "Certificate"), ("Value", "Left")])
        .unit_of("Left", "s")
        .wide(12),
        Panel::lines(
            "Clock skew",
            "s",
            "The daemon's clock against that of Prometheus. Certificates are judged by the daemon's.",
        )
        .ask("claviger_clock_timestamp_seconds{@} - timestamp(claviger_clock_timestamp_seconds{@})", "{{instance}}")
        .signed()
        .wide(12),
    ]
}

fn process() -> Vec<Panel> {
    vec![
        Panel::lines(
            "Processor",
            "short",
            "Processors that the daemon and its worker processes use, and how much of the latter is in the HSMs' libraries.",
        )
        .ask("sum by (instance) (rate(process_cpu_seconds_total{@}[~]))", "{{instance}} daemon")
        .ask("sum by (instance) (rate(claviger_hsm_worker_cpu_seconds_total{@}[~]))", "{{instance}} workers")
        .ask("sum by (instance) (rate(claviger_hsm_cpu_seconds_total{@}[~]))", "{{instance}} in libraries"),
        Panel::lines("Memory", "bytes", "Resident memory of the daemon, and of the worker processes of its HSMs together.")
            .ask("sum by (instance) (process_resident_memory_bytes{@})", "{{instance}}")
            .ask("sum by (instance) (claviger_hsm_worker_resident_memory_bytes{@})", "{{instance}} workers"),
        Panel::lines("Threads", "short", "Threads of the daemon.")
            .ask("sum by (instance) (process_threads{@})", "{{instance}}"),
        Panel::lines("Files", "percentunit", "Files that are open, of those that may be. Every connection is one.")
            .ask("process_open_fds{@} / process_max_fds{@}", "{{instance}}")
            .colours(GREEN, &[(0.8, RED)])
            .up_to(1.0),
        Panel::table("Versions", "short", "Which version runs where, and for how long.")
            .ask("max by (instance, version, commit) (claviger_build_info{@})", "")
            .ask("time() - max by (instance) (process_start_time_seconds{@})", "")
            .columns(
                &["Time", "Value #A"],
                &[("instance", "Instance"), ("version", "Version"), ("commit", "Commit"), ("Value #B", "Runs for")],
            )
            .unit_of("Runs for", "s")
            .wide(16),
    ]
}
