//! The whole release, in this process: what it takes of the processors beside the PKCS#11 operations, and how long it takes
//! with them.

#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use claviger::release::roll;
use claviger::request::Attempt;
use claviger::run::daemon::load_cluster;
use claviger::service::{Service, request_id};
use claviger::sys::process;
use claviger_bench::ceiling::{Settings, Stage};
use claviger_protocol::payload::ApiVersion;
use claviger_tests::worker;
use criterion::{Criterion, criterion_group, criterion_main};

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
    // The HSMs' time taken out: the processors' time of this process less that within PKCS#11 operations.
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

criterion_group!(benches, whole);
criterion_main!(benches);
