//! The cluster dashboard: utilisation, saturation and errors of each HSM.

use serde_json::Value;

use super::dashboard::{Dashboard, Row, choice};
use super::panel::{GREEN, Panel, RED, YELLOW};

pub(super) const UID: &str = "claviger-cluster";

/// The states of a member as numbers, with their colours. Grafana's timeline maps numbers to words.
const STATES: [(u32, &str, &str); 8] = [
    (1, "up", "green"),
    (2, "probing", "blue"),
    (3, "draining", "light-blue"),
    (4, "drained", "purple"),
    (5, "down", "red"),
    (6, "hung", "dark-red"),
    (7, "pin_refused", "orange"),
    (8, "off", "gray"),
];

pub(super) fn dashboard() -> Value {
    let rows = vec![
        Row::open("Members", members()),
        Row::open("Utilisation", utilisation()),
        Row::open("Saturation", saturation()),
        Row::open("Errors", errors()),
        Row::open("Time at a member", times()),
        Row::closed("Housekeeping", housekeeping()),
    ];
    let query = r#"label_values(claviger_hsm_state{job=~"$job", instance=~"$instance"}, hsm)"#;
    Dashboard {
        uid: UID,
        title: "Claviger / Cluster",
        description: "Every HSM as the daemon sees it: what it does, what waits for it, what goes wrong.",
        variables: vec![choice("hsm", "Member", query)],
        rows,
    }
    .json()
}

fn members() -> Vec<Panel> {
    let states: Vec<_> =
        STATES.iter().map(|(code, name, _)| format!("claviger_hsm_state{{@hsm, state=\"{name}\"}} * {code}")).collect();
    vec![
        Panel::timeline("State", "short", "The state of each member over time. docs/cluster.md says what each means.")
            .ask(&format!("sum by (instance, hsm) ({})", states.join(" or ")), "{{hsm}} at {{instance}}")
            .words(&STATES),
    ]
}

fn utilisation() -> Vec<Panel> {
    vec![
        Panel::lines(
            "Utilisation",
            "percentunit",
            "Time that a member's sessions spend in the token, of the time that all the wanted ones have.",
        )
        .ask(
            "sum by (instance, hsm) (rate(claviger_hsm_service_time_seconds_sum{@hsm}[~])) \
             / sum by (instance, hsm) (claviger_hsm_sessions_limit{@hsm})",
            "{{hsm}} at {{instance}}",
        )
        .colours(GREEN, &[(0.7, YELLOW), (0.9, RED)]),
        Panel::lines("Operations", "ops", "Operations that returned, by member and operation.")
            .ask("sum by (hsm, op) (rate(claviger_hsm_calls_total{@hsm}[~]))", "{{hsm}} {{op}}"),
        Panel::lines(
            "Sessions",
            "short",
            "Sessions: wanted by the configuration, open, in an operation, in a call that hangs.",
        )
        .ask("sum by (hsm) (claviger_hsm_sessions_wanted{@hsm})", "{{hsm}} wanted")
        .ask("sum by (hsm) (claviger_hsm_sessions_open{@hsm})", "{{hsm}} open")
        .ask("sum by (hsm) (claviger_hsm_sessions_busy{@hsm})", "{{hsm}} busy")
        .ask("sum by (hsm) (claviger_hsm_sessions_stuck{@hsm})", "{{hsm}} stuck"),
        Panel::lines(
            "Processor time of workers",
            "short",
            "Processors of the daemon's machine that a member's worker process uses, and how much of that is in the vendor's \
             library: soft tokens calculate there.",
        )
        .ask("sum by (hsm) (rate(claviger_hsm_worker_cpu_seconds_total{@hsm}[~]))", "{{hsm}}")
        .ask("sum by (hsm) (rate(claviger_hsm_cpu_seconds_total{@hsm}[~]))", "{{hsm}} in the library"),
        Panel::lines(
            "Replies at once",
            "short",
            "How many replies of a worker process the daemon reads at one wake-up: the average.",
        )
        .ask(
            "sum by (hsm) (rate(claviger_hsm_batch_jobs_sum{@hsm}[~])) \
             / sum by (hsm) (rate(claviger_hsm_batch_jobs_count{@hsm}[~]))",
            "{{hsm}}",
        ),
    ]
}

fn saturation() -> Vec<Panel> {
    vec![
        Panel::lines("Waiting", "short", "Operations that wait for a session of a member.")
            .ask("sum by (instance, hsm) (claviger_hsm_waiting{@hsm})", "{{hsm}} at {{instance}}"),
        Panel::lines("In flight", "short", "Operations that wait or run at a member.")
            .ask("sum by (instance, hsm) (claviger_hsm_in_flight{@hsm})", "{{hsm}} at {{instance}}"),
        Panel::lines(
            "Time in the member's queue",
            "s",
            "Response time less service time: what an average decryption and signature waits before a session takes \
             it.",
        )
        .ask(
            "sum by (hsm) (rate(claviger_hsm_response_time_seconds_sum{@hsm, op=~\"decrypt|sign\"}[~])) \
             / sum by (hsm) (rate(claviger_hsm_response_time_seconds_count{@hsm, op=~\"decrypt|sign\"}[~])) \
             - sum by (hsm) (rate(claviger_hsm_service_time_seconds_sum{@hsm, op=~\"decrypt|sign\"}[~])) \
             / sum by (hsm) (rate(claviger_hsm_service_time_seconds_count{@hsm, op=~\"decrypt|sign\"}[~]))",
            "{{hsm}}",
        ),
    ]
}

fn errors() -> Vec<Panel> {
    let count = |title, metric: &str, description| {
        Panel::lines(title, "cps", description)
            .ask(&format!("sum by (instance, hsm) (rate({metric}{{@hsm}}[~]))"), "{{hsm}} at {{instance}}")
            .colours(GREEN, &[(0.001, RED)])
            .wide(6)
    };
    vec![
        Panel::lines(
            "Calls that failed",
            "ops",
            "By class of return code: refused (the input), unable, stale (renewed), busy, pin, broken.",
        )
        .ask(r#"sum by (hsm, rv) (rate(claviger_hsm_calls_total{@hsm, rv!="ok"}[~]))"#, "{{hsm}} {{rv}}"),
        Panel::lines(
            "Who took over from whom",
            "ops",
            "Operations that another member did after one had failed at them.",
        )
        .ask("sum by (hsm, to) (rate(claviger_hsm_failovers_total{@hsm}[~]))", "{{hsm}} → {{to}}"),
        Panel::lines("Retries", "ops", "Operations that failed at a member and were tried at another.")
            .ask("sum by (hsm) (rate(claviger_hsm_retries_total{@hsm}[~]))", "{{hsm}}"),
        Panel::lines("Retry budget", "short", "Retries that are left. At zero, what fails is not tried again.")
            .ask("min by (instance) (claviger_hsm_retry_budget{@})", "{{instance}}")
            .wide(6),
        count(
            "Closings",
            "claviger_hsm_closings_total",
            "How often a member was closed for a fault: its breaker opened.",
        ),
        count("Calls that hung", "claviger_hsm_stuck_calls_total", "Calls that took longer than the watchdog allows."),
        count(
            "Wrong answers",
            "claviger_hsm_wrong_answers_total",
            "Plaintexts and signatures that were wrong by the member's fault. None of them left the service.",
        ),
    ]
}

fn times() -> Vec<Panel> {
    let quantile = |title, kind: &str, quantile: &str, description| {
        Panel::lines(title, "s", description).wide(6).ask(
            &format!(
                "histogram_quantile({quantile}, \
                 sum by (hsm, op, le) (rate(claviger_hsm_{kind}_time_seconds_bucket{{@hsm}}[~])))"
            ),
            "{{hsm}} {{op}}",
        )
    };
    vec![
        quantile("Service time, p50", "service", "0.5", "How long the token takes, without queueing: half are faster."),
        quantile(
            "Service time, p99",
            "service",
            "0.99",
            "How long the token takes, without queueing: 99 in 100 are faster.",
        ),
        quantile("Response time, p50", "response", "0.5", "From submission to result, with queueing: half are faster."),
        quantile(
            "Response time, p99",
            "response",
            "0.99",
            "From submission to result, with queueing: 99 in 100 are faster.",
        ),
    ]
}

fn housekeeping() -> Vec<Panel> {
    let count = |title, metric: &str, description| {
        Panel::lines(title, "cps", description)
            .ask(&format!("sum by (instance, hsm) (rate({metric}{{@hsm}}[~]))"), "{{hsm}} at {{instance}}")
    };
    vec![
        count("Logins", "claviger_hsm_logins_total", "Logins to a token. Steady load needs none."),
        count("Key searches", "claviger_hsm_key_searches_total", "One for a session, none for a release."),
        count(
            "Modules initialised anew",
            "claviger_hsm_modules_renewed_total",
            "How often a member's module was finalised and initialised again.",
        ),
    ]
}
