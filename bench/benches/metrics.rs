//! The cost of metrics for a release: alternating rounds with and without metrics in one process, and the recording
//! alone.
//!
//! The rounds show the total effect on the processors, including noise; the recording alone shows its own cost without
//! noise.

#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use claviger::observe::history::History;
use claviger::observe::metrics::{self, Class};
use claviger::release::roll;
use claviger::request::Attempt;
use claviger::run::members::{member, member_queue};
use claviger::service::Service;
use claviger::sys::id::request_id;
use claviger::sys::process;
use claviger_bench::ceiling::{Figure, Settings, Stage};
use claviger_hsm::{CallTimeouts, Cluster, Event, Observer, Operation};
use claviger_protocol::payload::ApiVersion;
use claviger_tests::worker;
use criterion::{Criterion, criterion_group, criterion_main};

/// Releases of a round.
const RELEASES: usize = 200;
/// Rounds with metrics, and rounds without.
const ROUNDS: usize = 40;

/// Everything that is recorded at the end of a release.
fn record(history: &History, attempt: &Attempt) {
    let spent = attempt.spent();
    history.released(Class::Success, spent.total, true);
    metrics::release("success", "v2.0", Class::Success, spent, attempt.certificate_used.clone());
    metrics::response("release_v2", 200);
}

/// The events of the members for a release.
fn operations(observer: &Observer) {
    for (hsm, op) in [("hsm-a", Operation::Decrypt), ("hsm-b", Operation::Sign)] {
        let took = black_box(Duration::from_micros(800));
        observer(hsm, Event::Batch { jobs: 1 });
        observer(hsm, Event::Call { op, rv: "ok", took });
        observer(hsm, Event::Answered { op, took });
    }
}

fn cost(c: &mut Criterion) {
    let stage = Stage::set(&Settings::default());
    let requests = stage.requests();
    let config = stage.lab.config();
    let handle = metrics::install();
    let measured = Arc::new(AtomicBool::new(false));
    let switch = Arc::clone(&measured);
    let observer: Observer = Arc::new(move |hsm, event| {
        if switch.load(Ordering::Relaxed) {
            metrics::hsm(hsm, event);
        }
    });
    let queue = member_queue(&config);
    let members = config.hsm.iter().map(|hsm| member(&config.env, hsm, queue).unwrap()).collect();
    let timeouts = CallTimeouts { watchdog: config.release.watchdog() };
    let cluster = Cluster::new(members, timeouts, worker(), observer).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let service = Arc::new(Service::open(config, cluster).unwrap());
    runtime.block_on(service.cluster.start()).unwrap();

    // Processor time of this process in microseconds per release. The workers, which record nothing, are other processes.
    let round = |with: bool| {
        measured.store(with, Ordering::Relaxed);
        let before = process::usage().cpu;
        for at in 0..RELEASES {
            let mut attempt = Attempt::new(request_id());
            let request = &requests[at % requests.len()];
            runtime.block_on(roll(&service, &service.cluster, ApiVersion::V2, request, &mut attempt)).unwrap();
            if with {
                record(&service.history, &attempt);
            }
        }
        if with {
            // Sorting values into buckets is part of the cost.
            handle.upkeep();
        }
        (process::usage().cpu - before).as_secs_f64() * 1e6 / RELEASES as f64
    };
    let _ = (round(false), round(true));
    let rounds: Vec<_> = (0..ROUNDS)
        .map(|at| {
            // Also alternate which one runs first.
            let (first, second) = (round(at % 2 == 0), round(at % 2 == 1));
            if at % 2 == 0 { (second, first) } else { (first, second) }
        })
        .collect();
    let of = |pick: fn(&(f64, f64)) -> f64| Figure::of(&rounds.iter().map(pick).collect::<Vec<_>>());
    let (without, with) = (of(|round| round.0), of(|round| round.1));
    let ratio = of(|round| round.1 / round.0);
    println!(
        "own cost of a release: {:.1} µs without metrics, {:.1} µs with; ratio {:.3} (median of {ROUNDS} pairs of rounds)",
        without.median, with.median, ratio.median
    );

    measured.store(true, Ordering::Relaxed);
    let history = History::default();
    let observer: Observer = Arc::new(metrics::hsm);
    let attempt = Attempt::new(request_id());
    let mut recorded = 0_u64;
    c.bench_function("metrics/of_one_release", |b| {
        b.iter(|| {
            operations(&observer);
            record(&history, &attempt);
            recorded += 1;
            if recorded.is_multiple_of(1024) {
                handle.upkeep();
            }
        });
    });
    runtime.block_on(service.cluster.close());
}

criterion_group!(benches, cost);
criterion_main!(benches);
