//! What the cluster costs beside its tokens: choosing a member, handing a call to a member's worker process and back, alone and
//! with others. The call asks a soft token for a few random bytes, which is next to nothing.

#![allow(missing_docs, clippy::unwrap_used)]

use std::time::{Duration, Instant};

use claviger::run::daemon::member;
use claviger_bench::ceiling::{Settings, Stage};
use claviger_hsm::policy::pick::{Candidate, Tiers, pick};
use claviger_hsm::{CallTimeouts, Cluster};
use claviger_tests::worker;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tokio::task::JoinSet;

fn choosing(c: &mut Criterion) {
    let candidate = |at: usize| Candidate {
        weight: 1,
        latency: Duration::from_micros(900 + 10 * at as u64),
        oldest: None,
        in_flight: at % 5,
    };
    let candidates: Vec<_> = (0..16).map(candidate).collect();
    let tiers = Tiers::new(&[0; 16]);
    let mut drawn = 0;
    c.bench_function("hsm/pick_of_16", |b| {
        b.iter(|| {
            let random = |below| {
                drawn = (drawn + 7) % 1021;
                drawn % below
            };
            pick(&tiers, |at| (at % 7 != 3).then(|| candidates[at]), random).unwrap()
        });
    });
}

fn handing_over(c: &mut Criterion) {
    let stage = Stage::set(&Settings::default());
    let mut group = c.benchmark_group("hsm");
    let config = stage.lab.config();
    let members = config.hsm.iter().map(|hsm| member(&config.env, hsm, 4096).unwrap()).collect();
    let timeouts = CallTimeouts { watchdog: Duration::from_secs(10) };
    let cluster = Cluster::new(members, timeouts, worker(), std::sync::Arc::new(|_, _| {})).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(cluster.start()).unwrap();
    let deadline = || Instant::now() + Duration::from_secs(10);
    group.throughput(Throughput::Elements(1));
    group.bench_function("hand_off", |b| {
        b.iter(|| runtime.block_on(cluster.random(8, deadline())).unwrap());
    });
    // Sixteen times the sessions: there is always something to take.
    let calls = 64;
    group.throughput(Throughput::Elements(calls));
    group.bench_function(format!("{calls}_calls"), |b| {
        b.iter(|| {
            runtime.block_on(async {
                let mut running = JoinSet::new();
                for _ in 0..calls {
                    let cluster = cluster.clone();
                    running.spawn(async move { cluster.random(8, deadline()).await.unwrap() });
                }
                running.join_all().await
            })
        });
    });
    runtime.block_on(cluster.close());
    group.finish();
}

criterion_group!(benches, choosing, handing_over);
criterion_main!(benches);
