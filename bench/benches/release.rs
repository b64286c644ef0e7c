//! The complete release in this process: its processor time outside of PKCS#11 operations, and its duration with them.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use claviger::release::testing::NullHsm;
use claviger::release::{decide, roll};
use claviger::request::Attempt;
use claviger::run::members::load_cluster;
use claviger::service::Service;
use claviger::sys::id::request_id;
use claviger::sys::process;
use claviger_bench::ceiling::{Settings, Stage};
use claviger_protocol::payload::ApiVersion;
use claviger_tests::worker;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tokio::task::JoinSet;

fn whole(c: &mut Criterion) {
    let stage = Stage::set(&Settings::default());
    let requests = stage.requests();
    let config = stage.lab.config();
    let cluster = load_cluster(&config, worker()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let service = Arc::new(Service::open(config, cluster).unwrap());
    runtime.block_on(service.cluster.start()).unwrap();
    let release = |at: u64| {
        let mut attempt = Attempt::new(request_id());
        let request = &requests[at as usize % requests.len()];
        let grant = runtime.block_on(roll(&service, &service.cluster, ApiVersion::V2, request, &mut attempt)).unwrap();
        grant.confirm(&service).unwrap().to_xml()
    };
    let spent = || service.cluster.members().iter().map(|member| member.spent).sum::<Duration>();
    let mut group = c.benchmark_group("release");
    // Processor time of this process minus the time within PKCS#11 operations.
    group.bench_function("without_hsm_time", |b| {
        b.iter_custom(|count| {
            let before = (process::usage().cpu, spent());
            (0..count).for_each(|at| drop(release(at)));
            (process::usage().cpu - before.0).saturating_sub(spent() - before.1)
        });
    });
    group.bench_function("whole", |b| {
        let mut at = 0;
        b.iter(|| {
            at += 1;
            release(at)
        });
    });
    group.finish();
    runtime.block_on(service.cluster.close());
}

/// Concurrent releases of `null_keys`.
const AT_A_TIME: usize = 16;
/// Releases per iteration of `null_keys`.
const TOGETHER: usize = 256;

/// On all processors, with an HSM that knows the results: the cost of a release without the HSMs' time.
fn null_keys(c: &mut Criterion) {
    let stage = Stage::set(&Settings::default());
    let requests = Arc::new(stage.requests());
    let owner = stage.lab.owner();
    let protectors = stage.lab.protectors();
    let hsm = NullHsm::new(protectors.iter().map(|file| (&file[..], owner.open(file).unwrap()))).unwrap();
    let config = stage.lab.config();
    // Never started, because nothing uses it.
    let cluster = load_cluster(&config, worker()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let service = runtime.block_on(async { Arc::new(Service::open(config, cluster).unwrap()) });
    let mut group = c.benchmark_group("release");
    group.throughput(Throughput::Elements(TOGETHER as u64));
    group.bench_function("null_keys", |b| {
        b.iter(|| {
            runtime.block_on(async {
                let mut running = JoinSet::new();
                for first in 0..AT_A_TIME {
                    let (service, hsm, requests) = (Arc::clone(&service), hsm.clone(), Arc::clone(&requests));
                    running.spawn(async move {
                        for at in (first..TOGETHER).step_by(AT_A_TIME) {
                            let mut attempt = Attempt::new(request_id());
                            let request = &requests[at % requests.len()];
                            let result = roll(&service, &hsm, ApiVersion::V2, request, &mut attempt).await;
                            black_box(decide(&service, ApiVersion::V2, &attempt, result).await.unwrap().to_xml());
                        }
                    });
                }
                running.join_all().await
            });
        });
    });
    group.finish();
}

criterion_group!(benches, whole, null_keys);
criterion_main!(benches);
