//! The cost of the cluster beyond its tokens: selecting a member and passing a call to its worker process and back,
//! alone and with concurrent calls. The call asks a soft token for a few random bytes, which costs almost nothing. Also
//! the cost of a decryption and a signature outside of the token at saturation.

#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use claviger::config::Config;
use claviger::run::members::member;
use claviger::sys::process;
use claviger_bench::ceiling::{Settings, Stage, callers};
use claviger_bench::cpu;
use claviger_bench::raw::{OAEP, SCHEME, Work};
use claviger_hsm::policy::pick::{Candidate, Tiers, pick};
use claviger_hsm::{CallTimeouts, Cluster};
use claviger_tests::worker;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tokio::runtime::Runtime;
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

/// A running cluster of the configured members. Its operations are not recorded in metrics.
fn started(config: &Config) -> (Runtime, Cluster) {
    let members = config.hsm.iter().map(|hsm| member(&config.env, hsm, 4096).unwrap()).collect();
    let timeouts = CallTimeouts { watchdog: Duration::from_secs(10) };
    let cluster = Cluster::new(members, timeouts, worker(), Arc::new(|_, _| {})).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(cluster.start()).unwrap();
    (runtime, cluster)
}

fn handing_over(c: &mut Criterion) {
    let stage = Stage::set(&Settings::default());
    let mut group = c.benchmark_group("hsm");
    let (runtime, cluster) = started(&stage.lab.config());
    let deadline = || Instant::now() + Duration::from_secs(10);
    group.throughput(Throughput::Elements(1));
    group.bench_function("hand_off", |b| {
        b.iter(|| runtime.block_on(cluster.random(8, deadline())).unwrap());
    });
    // Sixteen calls per session, so that there is always one to take.
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

/// Pairs of a measurement, at least: at its beginning and its end not every session is busy.
const AT_LEAST: u64 = 1_000;

/// Processor time of this process and of the worker processes outside of PKCS#11 operations, for a concurrent
/// decryption and signature as in a release. There are enough callers to keep every session busy.
fn pair(c: &mut Criterion) {
    let stage = Stage::set(&Settings::default());
    let config = stage.lab.config();
    let (runtime, cluster) = started(&config);
    let work = Arc::new(stage.work.clone());
    // Total, and within PKCS#11 operations.
    let spent = || {
        let members = cluster.members();
        let workers = members.iter().filter_map(|member| member.worker).map(cpu::of_process).sum::<Duration>();
        let inside = members.iter().map(|member| member.spent).sum::<Duration>();
        (process::usage().cpu + workers, inside)
    };
    let callers = callers(config.hsm.iter().map(|hsm| hsm.sessions).sum());
    let mut group = c.benchmark_group("hsm");
    // The measured time is a small part of the elapsed time.
    group.sample_size(10).measurement_time(Duration::from_millis(500)).warm_up_time(Duration::from_secs(1));
    group.bench_function("own_cost_of_a_pair", |b| {
        b.iter_custom(|count| {
            let made = count.max(AT_LEAST);
            let before = spent();
            let left = Arc::new(AtomicU64::new(made));
            runtime.block_on(async {
                let mut running = JoinSet::new();
                for _ in 0..callers {
                    running.spawn(pairs(cluster.clone(), Arc::clone(&work), Arc::clone(&left)));
                }
                running.join_all().await
            });
            let after = spent();
            (after.0 - before.0).saturating_sub(after.1 - before.1).mul_f64(count as f64 / made as f64)
        });
    });
    runtime.block_on(cluster.close());
    group.finish();
}

/// A caller, which makes pairs until none is left.
async fn pairs(cluster: Cluster, work: Arc<Work>, left: Arc<AtomicU64>) {
    while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
        let deadline = Instant::now() + Duration::from_secs(10);
        let (decrypted, signed) = tokio::join!(
            cluster.decrypt(&work.encryption, OAEP, &work.ciphertext, deadline, None),
            cluster.sign(&work.signing, SCHEME, &[0x5a; 32], deadline, None),
        );
        assert!(decrypted.unwrap().value.len() == 32 && signed.unwrap().value.len() == 256);
    }
}

criterion_group!(benches, choosing, handing_over, pair);
criterion_main!(benches);
