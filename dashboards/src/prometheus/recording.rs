//! Recorded series for the alerts on the service objective, for the long windows of the dashboards, and for the
//! estimated capacity of the HSMs.

use claviger::observe::metrics::SLO_SECONDS;

use super::rule::{FAILED, Group, Recording, Rule};

/// Windows that are evaluated at the default interval.
const SHORT: [&str; 5] = ["5m", "30m", "1h", "2h", "6h"];
/// Windows that change slowly and are expensive to evaluate.
const LONG: [&str; 3] = ["1d", "3d", "30d"];

const DAEMON: &[&str] = &["job", "instance"];
const MEMBER: &[&str] = &["job", "instance", "hsm"];

pub(super) fn groups() -> Vec<Group> {
    let windows = |windows: &[&str]| windows.iter().flat_map(|window| promise(window)).collect();
    vec![
        Group { name: "claviger-promise", interval: None, rules: windows(&SHORT) },
        Group { name: "claviger-promise-long", interval: Some("2m"), rules: windows(&LONG) },
        Group { name: "claviger-cluster", interval: None, rules: cluster() },
    ]
}

fn record(name: impl Into<String>, labels: &'static [&'static str], expression: impl Into<String>) -> Rule {
    Rule::Recording(Recording { name: name.into(), labels, expression: expression.into() })
}

/// The service objective in one window: counts by daemon, for any selection, and ratios by job, for the alerts. Without
/// traffic there is no ratio.
fn promise(window: &str) -> Vec<Rule> {
    let ratio = |part: &str, whole: &str| {
        format!(
            "sum by (job) (instance:claviger_releases_{part}:rate{window})\n\
             / (sum by (job) (instance:claviger_releases_{whole}:rate{window}) > 0)"
        )
    };
    vec![
        record(
            format!("instance:claviger_releases_failed:rate{window}"),
            DAEMON,
            format!("sum by (job, instance) (rate(claviger_releases_total{{outcome=~\"{FAILED}\"}}[{window}]))"),
        ),
        record(
            format!("instance:claviger_releases_decided:rate{window}"),
            DAEMON,
            format!(
                "sum by (job, instance) (rate(claviger_releases_total{{outcome=~\"success|{FAILED}\"}}[{window}]))"
            ),
        ),
        record(format!("job:claviger_releases_failed:ratio_rate{window}"), &["job"], ratio("failed", "decided")),
        record(
            format!("instance:claviger_releases_succeeded:rate{window}"),
            DAEMON,
            format!(
                "sum by (job, instance) (rate(claviger_release_duration_seconds_count{{class=\"success\"}}[{window}]))"
            ),
        ),
        record(
            format!("instance:claviger_releases_slow:rate{window}"),
            DAEMON,
            format!(
                "instance:claviger_releases_succeeded:rate{window}\n\
                 - sum by (job, instance) (rate(claviger_release_duration_seconds_bucket\
                 {{class=\"success\", le=\"{SLO_SECONDS}\"}}[{window}]))"
            ),
        ),
        record(format!("job:claviger_releases_slow:ratio_rate{window}"), &["job"], ratio("slow", "succeeded")),
    ]
}

fn cluster() -> Vec<Rule> {
    let mean = |op: &str| {
        format!(
            "sum by (job, instance, hsm) (rate(claviger_hsm_service_time_seconds_sum{{op=\"{op}\"}}[1h]))\n    \
             / (sum by (job, instance, hsm) (rate(claviger_hsm_service_time_seconds_count{{op=\"{op}\"}}[1h])) > 0)"
        )
    };
    // A standby member only runs probes: a decryption and a signature, each counted as one.
    let pair = format!(
        "(\n  (\n    {}\n  ) + (\n    {}\n  )\n)\nor 2 * (\n    {}\n)",
        mean("decrypt"),
        mean("sign"),
        mean("probe")
    );
    vec![
        record("instance:claviger_hsm_up:sum", DAEMON, r#"sum by (job, instance) (claviger_hsm_state{state="up"})"#),
        record(
            "instance:claviger_hsm_members:count",
            DAEMON,
            r#"count by (job, instance) (claviger_hsm_state{state="up"})"#,
        ),
        record(
            "hsm:claviger_hsm_sessions:utilisation5m",
            MEMBER,
            "sum by (job, instance, hsm) (rate(claviger_hsm_service_time_seconds_sum[5m]))\n\
             / sum by (job, instance, hsm) (claviger_hsm_sessions_limit)",
        ),
        record("hsm:claviger_hsm_pair_seconds:mean1h", MEMBER, pair),
        // Members whose priority is worse than the best one that is up are on standby.
        record(
            "hsm:claviger_releases:ceiling",
            MEMBER,
            "sum by (job, instance, hsm) (claviger_hsm_sessions_limit)\n\
             * sum by (job, instance, hsm) (claviger_hsm_state{state=\"up\"})\n\
             / hsm:claviger_hsm_pair_seconds:mean1h\n\
             and on (job, instance, hsm) (\n  \
             claviger_hsm_priority\n  \
             == on (job, instance) group_left () min by (job, instance) (\n    \
             claviger_hsm_priority and on (job, instance, hsm) (claviger_hsm_state{state=\"up\"} == 1)\n  \
             )\n\
             )",
        ),
        record("instance:claviger_releases:ceiling", DAEMON, "sum by (job, instance) (hsm:claviger_releases:ceiling)"),
    ]
}
