//! The capacity dashboard: spare capacity, and the effect of a storm.

use serde_json::Value;

use super::dashboard::{Dashboard, Row, typed};
use super::panel::{GREEN, Panel, RED, YELLOW};

pub(super) const UID: &str = "claviger-capacity";

/// Releases a second that the members which are up can do: the measured value if one is entered, or else the estimate
/// of the rules.
const CEILING: &str = "((vector($ceiling) > 0) or sum(instance:claviger_releases:ceiling{@}))";
/// Releases a second that succeed.
const LOAD: &str = r#"sum(rate(claviger_releases_total{@, outcome="success"}[~]))"#;

pub(super) fn dashboard() -> Value {
    let rows = vec![
        Row::open("Headroom", headroom()),
        Row::open("What limits", limits()),
        Row::open("Storm", storm()),
        Row::closed("Cost and resources", cost()),
    ];
    let ceiling = typed(
        "ceiling",
        "Measured ceiling, releases/s",
        "What `claviger-loadgen capacity` found for the selected daemons together; 0: reckoned from the HSMs' service \
         times.",
        "0",
    );
    Dashboard {
        uid: UID,
        title: "Claviger / Capacity",
        description: "Load against the ceiling, how many members could be lost, and how a storm is borne.",
        variables: vec![ceiling],
        rows,
    }
    .json()
}

fn headroom() -> Vec<Panel> {
    vec![
        Panel::stat("Load of ceiling", "percentunit", "Releases now against what the members that are up can do.")
            .ask(&format!("{LOAD} / {CEILING}"), "load")
            .colours(GREEN, &[(0.7, YELLOW), (0.9, RED)])
            .wide(6),
        Panel::stat(
            "Ceiling",
            "reqps",
            "Releases a second that the members which serve can do: typed in above, or \
         reckoned from their sessions and service times. Daemons that share HSMs each count them: type in \
         what was measured.",
        )
        .ask(CEILING, "ceiling")
        .wide(6),
        Panel::stat(
            "Most in 30 days",
            "reqps",
            "The highest rate of releases of each daemon, over five minutes, in the last 30 days, together.",
        )
        .ask("sum(max_over_time(instance:claviger_releases_succeeded:rate5m{@}[30d]))", "most")
        .wide(6),
        Panel::stat(
            "Members that could be lost",
            "short",
            "How many members could fail at the load of now, if all of them carry the same; where several daemons are \
             selected, of the one with the fewest.",
        )
        .ask(
            "min(clamp_min(ceil(instance:claviger_hsm_up:sum{@} * (1 - (sum by (job, instance) \
             (rate(claviger_releases_total{@, outcome=\"success\"}[~])) / instance:claviger_releases:ceiling{@}))) - 1, 0))",
            "members",
        )
        .colours(RED, &[(1.0, YELLOW), (2.0, GREEN)])
        .leads_to("Cluster", super::cluster::UID)
        .wide(6),
        Panel::lines("Load and ceiling", "reqps", "Releases that succeed, and what the members that are up can do.")
            .ask(LOAD, "load")
            .ask(CEILING, "ceiling")
            .wide(12),
        Panel::lines(
            "Ceiling by member",
            "reqps",
            "What each member adds to the ceiling, reckoned; nothing while it \
         is not up.",
        )
        .ask("sum by (hsm) (hsm:claviger_releases:ceiling{@})", "{{hsm}}")
        .wide(12),
    ]
}

fn limits() -> Vec<Panel> {
    vec![
        Panel::lines(
            "Utilisation by member",
            "percentunit",
            "Time in the token, of the time that the wanted sessions have.",
        )
        .ask("hsm:claviger_hsm_sessions:utilisation5m{@}", "{{hsm}} at {{instance}}")
        .colours(GREEN, &[(0.7, YELLOW), (0.9, RED)]),
        Panel::lines(
            "Room in the queue",
            "percentunit",
            "How much of the waiting room is free. Without any, releases are refused.",
        )
        .ask(
            "1 - sum by (instance) (claviger_queue_waiting{@}) / sum by (instance) (claviger_queue_limit{@})",
            "{{instance}}",
        )
        .colours(RED, &[(0.2, YELLOW), (0.5, GREEN)])
        .up_to(1.0),
        Panel::lines(
            "A pair of operations",
            "s",
            "Average time of a decryption and a signature at each member: a release needs one of each.",
        )
        .ask("hsm:claviger_hsm_pair_seconds:mean1h{@}", "{{hsm}} at {{instance}}"),
    ]
}

fn storm() -> Vec<Panel> {
    vec![
        Panel::lines("Waiting and room", "short", "Releases that wait for their turn, and how many may.")
            .ask("sum(claviger_queue_waiting{@})", "waiting")
            .ask("sum(claviger_queue_limit{@})", "limit")
            .wide(6),
        Panel::lines("Running and limit", "short", "Releases that are worked on, and how many may be at a time.")
            .ask("sum(claviger_releases_running{@})", "running")
            .ask("sum(claviger_releases_running_limit{@})", "limit")
            .wide(6),
        Panel::stacked("Dropped", "reqps", "Releases that were not let in, by reason.")
            .ask("sum by (reason) (rate(claviger_queue_dropped_total{@}[~]))", "{{reason}}")
            .wide(6),
        Panel::lines(
            "Stock",
            "short",
            "Egress protectors that were made ahead and wait: as many releases take one operation of the HSMs instead of two.",
        )
        .ask("sum(claviger_stock_depth{@})", "waiting")
        .wide(6),
        Panel::lines(
            "Stock, a second",
            "ops",
            "Egress protectors made ahead, given out, and thrown away because nobody asked for them in their time (aged) or what \
             they depend on changed (dropped).",
        )
        .ask("sum(rate(claviger_stock_made_total{@}[~]))", "made")
        .ask("sum(rate(claviger_stock_used_total{@}[~]))", "used")
        .ask("sum(rate(claviger_stock_aged_total{@}[~]))", "aged")
        .ask("sum(rate(claviger_stock_dropped_total{@}[~]))", "dropped")
        .wide(6),
        Panel::lines("Time to drain", "s", "How long the queue of now takes at the ceiling, if nothing more comes.")
            .ask(&format!("sum(claviger_queue_waiting{{@}}) / {CEILING}"), "drain")
            .wide(6),
    ]
}

fn cost() -> Vec<Panel> {
    vec![
        Panel::lines(
            "Own processor time of a release",
            "s",
            "What the daemon and its worker processes spend on a release, without the HSMs' libraries.",
        )
        .ask(
            &format!(
                "(sum(rate(process_cpu_seconds_total{{@}}[~])) + sum(rate(claviger_hsm_worker_cpu_seconds_total{{@}}[~])) \
                 - sum(rate(claviger_hsm_cpu_seconds_total{{@}}[~]))) / ({LOAD} > 0)"
            ),
            "own",
        ),
        Panel::lines("Registered hosts", "short", "Hosts that are registered and enabled.")
            .ask("max(claviger_hosts_registered{@})", "hosts"),
        Panel::lines("Memory in use", "bytes", "Resident memory, by daemon.")
            .ask("sum by (instance) (process_resident_memory_bytes{@})", "{{instance}}"),
        Panel::lines(
            "Connections and files",
            "percentunit",
            "How many there are of those that may be, every connection is an open file; and memory for bodies of requests.",
        )
        .ask(
            "sum by (instance) (claviger_connections_open{@}) / sum by (instance) (claviger_connections_limit{@})",
            "{{instance}} connections",
        )
        .ask(
            "sum by (instance) (claviger_body_memory_bytes{@}) / sum by (instance) (claviger_body_memory_limit_bytes{@})",
            "{{instance}} memory for bodies",
        )
        .ask("sum by (instance) (process_open_fds{@}) / sum by (instance) (process_max_fds{@})", "{{instance}} files")
        .colours(GREEN, &[(0.7, YELLOW), (0.9, RED)])
        .up_to(1.0),
    ]
}
