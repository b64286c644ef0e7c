//! Tests of the page's content, and that every function records its metric.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::observe::metrics::Load;
use crate::status::testing::member;
use claviger_hsm::{MemberState, MemberStatus};
use std::collections::BTreeSet;
use std::time::SystemTime;

fn value(page: &str, series: &str) -> f64 {
    let line = page.lines().find(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')));
    line.unwrap_or_else(|| panic!("no {series} in\n{page}")).rsplit_once(' ').unwrap().1.parse().unwrap()
}

fn readings() -> Readings {
    Readings {
        stock_depth: 7,
        members: vec![MemberStatus {
            priority: 2,
            in_flight: 5,
            waiting: 2,
            sessions_open: 7,
            sessions_limit: 6,
            sessions_busy: 3,
            sessions_stuck: 1,
            spent: Duration::from_millis(1500),
            worker_processor: Duration::from_millis(1750),
            worker_resident: 4096,
            ..member("table \"1\"", MemberState::PinRefused)
        }],
        retry_budget: 12.5,
        load: Load { running: 3, waiting: 14 },
        limits: Load { running: 16, waiting: 4096 },
        certificates: vec![("tls", "0a1b2c3d".to_owned(), 1_800_000_000)],
        hosts: 9,
        state_stale: true,
        shared: Some(SharedState {
            confirmed: true,
            age: Duration::from_millis(250),
            limit: Duration::from_secs(300),
            revision: 42,
            why: None,
        }),
        audit_waiting: 6,
        audit_writing: Duration::from_millis(250),
        audit: crate::observe::audit::Head {
            link: crate::observe::audit::Link { n: 41, hash: [0; 32] },
            records: 12,
            covered: 5,
            reserve_missing: 1024,
            ..crate::observe::audit::Head::default()
        },
        connections_open: 12,
        connections_limit: 10_000,
        body_memory: (65_536, 536_870_912),
        primaries: true,
        usage: crate::sys::process::usage(),
    }
}

/// The label names of a series, without the bucket boundary.
fn labels(line: &str) -> BTreeSet<&str> {
    let Some((_, rest)) = line.split_once('{') else { return BTreeSet::new() };
    let names = rest.split_once('}').unwrap().0.split(',').map(|label| label.split_once('=').unwrap().0);
    names.filter(|name| *name != "le").collect()
}

#[test]
fn the_page_shows_every_metric_with_help_and_only_declared_labels() {
    let handle = install();
    preregister(&Known {
        members: &["table", "other"],
        release_outcomes: &["success"],
        apis: &["v2.0"],
        attestation_outcomes: &["success"],
        policies: &["FullBoot"],
        drop_reasons: &["table"],
        resources: &["table"],
        body_refusals: &["table"],
        cut_reasons: &["table"],
    });
    preregister_key("table".into());
    let page = handle.render(&readings());
    for metric in ALL {
        assert_eq!(page.matches(&format!("# HELP {} {}\n", metric.name, metric.help)).count(), 1, "{}", metric.name);
        let kind = match metric.kind {
            Kind::Counter | Kind::CounterReading => "counter",
            Kind::GaugeReading => "gauge",
            Kind::Histogram(_) => "histogram",
        };
        assert_eq!(page.matches(&format!("# TYPE {} {kind}\n", metric.name)).count(), 1, "{}", metric.name);
        let suffixes: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
        for suffix in suffixes {
            let name = format!("{}{suffix}", metric.name);
            let is_its = |rest: &str| rest.starts_with(['{', ' ']);
            let lines: Vec<_> = page.lines().filter(|line| line.strip_prefix(&*name).is_some_and(is_its)).collect();
            assert!(!lines.is_empty(), "{name} has no series");
            for line in lines {
                assert_eq!(labels(line), metric.labels.iter().copied().collect(), "{line}");
            }
        }
        if let Kind::Histogram(edges) = metric.kind {
            assert!(edges.is_sorted(), "{}", metric.name);
            for edge in edges {
                assert!(page.contains(&format!("le=\"{edge}\"}}")), "{}: {edge}", metric.name);
            }
        }
    }
    // The page contains nothing else.
    let described: BTreeSet<_> = page.lines().filter_map(|line| line.strip_prefix("# HELP ")).collect();
    assert_eq!(described.len(), ALL.len());
    let names: BTreeSet<_> = ALL.iter().map(|metric| metric.name).collect();
    assert_eq!(names.len(), ALL.len(), "a name twice");
}

#[test]
fn the_promise_is_an_edge() {
    assert!(matches!(RELEASE_DURATION.kind, Kind::Histogram(edges) if edges.contains(&SLO_SECONDS)));
}

#[test]
fn readings_are_as_they_were_read() {
    let page = install().render(&readings());
    let member = |name: &str, more: &str| value(&page, &format!("{name}{{hsm=\"table \\\"1\\\"\"{more}}}"));
    for state in MemberState::ALL {
        let expected = f64::from(state == MemberState::PinRefused);
        assert_eq!(member("claviger_hsm_state", &format!(",state=\"{state}\"")), expected);
    }
    for (name, expected) in [
        ("claviger_hsm_in_flight", 5.0),
        ("claviger_hsm_priority", 2.0),
        ("claviger_hsm_waiting", 2.0),
        ("claviger_hsm_sessions_open", 7.0),
        ("claviger_hsm_sessions_wanted", 8.0),
        ("claviger_hsm_sessions_busy", 3.0),
        ("claviger_hsm_sessions_limit", 6.0),
        ("claviger_hsm_sessions_stuck", 1.0),
        ("claviger_hsm_cpu_seconds_total", 1.5),
        ("claviger_hsm_worker_cpu_seconds_total", 1.75),
        ("claviger_hsm_worker_resident_memory_bytes", 4096.0),
    ] {
        assert_eq!(member(name, ""), expected, "{name}");
    }
    for (series, expected) in [
        ("claviger_hsm_retry_budget", 12.5),
        ("claviger_releases_running", 3.0),
        ("claviger_releases_running_limit", 16.0),
        ("claviger_queue_waiting", 14.0),
        ("claviger_queue_limit", 4096.0),
        ("claviger_certificate_expiry_timestamp_seconds{kind=\"tls\",certificate=\"0a1b2c3d\"}", 1.8e9),
        ("claviger_hosts_registered", 9.0),
        ("claviger_state_stale", 1.0),
        ("claviger_etcd_connected", 1.0),
        ("claviger_state_age_seconds", 0.25),
        ("claviger_state_age_limit_seconds", 300.0),
        ("claviger_state_revision", 42.0),
        ("claviger_audit_waiting", 6.0),
        ("claviger_audit_last_line", 41.0),
        ("claviger_audit_unsigned_records", 7.0),
        ("claviger_audit_unsigned_seconds", 0.0),
        ("claviger_audit_reserve_missing_bytes", 1024.0),
        ("claviger_connections_open", 12.0),
        ("claviger_connections_limit", 10_000.0),
        ("claviger_body_memory_bytes", 65_536.0),
        ("claviger_body_memory_limit_bytes", 536_870_912.0),
        ("claviger_audit_writing_seconds", 0.25),
    ] {
        assert_eq!(value(&page, series), expected, "{series}");
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((now - value(&page, "claviger_clock_timestamp_seconds")).abs() < 60.0);
    let started = value(&page, "process_start_time_seconds");
    assert!(started <= now + 1.0 && started > now - 24.0 * 3600.0, "{started}");
    assert!(value(&page, "process_cpu_seconds_total") > 0.0);
    assert!(value(&page, "process_resident_memory_bytes") > 1e6 && value(&page, "process_threads") >= 1.0);
    assert!(value(&page, "process_open_fds") >= 3.0 && value(&page, "process_max_fds") >= 10.0);
    let version = (env!("CARGO_PKG_VERSION"), env!("CLAVIGER_COMMIT"));
    let build = format!("claviger_build_info{{version=\"{}\",commit=\"{}\"}}", version.0, version.1);
    assert_eq!(value(&page, &build), 1.0);
}

#[test]
fn every_function_records_its_metric() {
    let handle = install();
    preregister(&Known { members: &["recorded", "second"], ..Known::default() });
    let ms = Duration::from_millis;
    let spent = Spent { total: ms(500), queue: Some(ms(100)), hsm: Some(ms(300)) };
    release("recorded", "v1.0", Class::Success, spent, Some("recorded".into()));
    release("recorded", "v1.0", Class::Refused, Spent { total: ms(1), ..Spent::default() }, Some("recorded".into()));
    batch(7);
    attestation("recorded", ms(2));
    response("recorded", 200);
    response("recorded", 403);
    response("recorded", 503);
    queue_dropped("recorded");
    for event in [
        Event::Call { op: claviger_hsm::Operation::Sign, rv: "busy", took: ms(4) },
        Event::Answered { op: claviger_hsm::Operation::Sign, took: ms(40) },
        Event::Batch { jobs: 16 },
        Event::FailedOver { to: "second" },
        Event::Login,
        Event::KeySearch,
        Event::Down,
        Event::Retry,
        Event::Stuck,
        Event::WrongAnswer,
        Event::ModuleRenewed,
        Event::SessionOpened,
        Event::SessionClosed,
    ] {
        hsm("recorded", event);
    }
    audit_written(ms(1));
    let page = handle.render(&Readings::default());
    let value = |series: &str| value(&page, series);
    assert_eq!(value("claviger_releases_total{outcome=\"recorded\",api=\"v1.0\"}"), 2.0);
    assert_eq!(value("claviger_key_releases_total{certificate=\"recorded\"}"), 1.0, "of a refusal no key is used");
    // Other tests in this process release nothing.
    assert_eq!(value("claviger_release_duration_seconds_bucket{class=\"success\",le=\"0.5\"}"), 1.0);
    assert_eq!(value("claviger_release_duration_seconds_bucket{class=\"success\",le=\"0.25\"}"), 0.0);
    for (part, sum) in [("queue", 0.1), ("hsm", 0.3), ("own", 0.101)] {
        let found = value(&format!("claviger_release_part_duration_seconds_sum{{part=\"{part}\"}}"));
        // Other tests in this process run releases as well.
        assert!(found - sum > -1e-9, "{part}: {found}");
    }
    assert_eq!(value("claviger_batch_items_sum"), 7.0);
    assert_eq!(value("claviger_attestations_total{outcome=\"recorded\"}"), 1.0);
    assert!(value("claviger_attestation_duration_seconds_count") >= 1.0);
    for code in ["2xx", "4xx", "5xx"] {
        let series = format!("claviger_http_responses_total{{resource=\"recorded\",code=\"{code}\"}}");
        assert_eq!(value(&series), 1.0);
    }
    assert_eq!(value("claviger_queue_dropped_total{reason=\"recorded\"}"), 1.0);
    assert_eq!(value("claviger_hsm_calls_total{hsm=\"recorded\",op=\"sign\",rv=\"busy\"}"), 1.0);
    assert_eq!(value("claviger_hsm_service_time_seconds_sum{hsm=\"recorded\",op=\"sign\"}"), 0.004);
    assert_eq!(value("claviger_hsm_response_time_seconds_sum{hsm=\"recorded\",op=\"sign\"}"), 0.04);
    assert_eq!(value("claviger_hsm_batch_jobs_sum{hsm=\"recorded\"}"), 16.0);
    assert_eq!(value("claviger_hsm_failovers_total{hsm=\"recorded\",to=\"second\"}"), 1.0);
    for name in [
        "logins_total",
        "key_searches_total",
        "closings_total",
        "retries_total",
        "stuck_calls_total",
        "wrong_answers_total",
        "modules_renewed_total",
    ] {
        assert_eq!(value(&format!("claviger_hsm_{name}{{hsm=\"recorded\"}}")), 1.0, "{name}");
    }
    assert!(value("claviger_audit_write_duration_seconds_count") >= 1.0);
    // Other tests in this process change these values, so only an increase is certain.
    let before = value("claviger_audit_errors_total");
    let connections = value("claviger_connections_total");
    audit_errors(2);
    connection_opened();
    connection_closed();
    let page = handle.render(&Readings::default());
    assert!(super::tests::value(&page, "claviger_audit_errors_total") >= before + 2.0);
    assert!(super::tests::value(&page, "claviger_connections_total") > connections);
}
