//! Connections that idle: what they take of memory, and what others notice of them.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use claviger_tests::idle::{Opener, Speaks};
use claviger_tests::stats::median;
use claviger_tests::{METADATA, block};
use serde::Serialize;

use crate::ceiling::{Figure, Settings, Stage};
use crate::histogram::seconds;
use crate::machine::Machine;
use crate::service::{Service, snapshot};

/// Callers beside the idle connections: enough to keep the processors busy, without a queue.
const CALLERS: usize = 2;
/// From the last connection to the measurement: for the daemon to give back what an idle one does not need.
const REST: Duration = Duration::from_secs(2);

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Idle {
    /// Where and when.
    pub machine: Machine,
    /// Keep-alive connections that had one answer each and then said nothing.
    pub connections: usize,
    /// Memory of the daemon with them, in bytes. They speak HTTP/1.1, and come and go in every round.
    pub resident_bytes: f64,
    /// Memory of a fresh daemon with as many that speak something else, by what they speak, in bytes.
    pub resident_bytes_of: BTreeMap<String, f64>,
    /// Before there was the first of them.
    pub resident_bytes_without: f64,
    /// 99th percentile of a release beside them, in seconds.
    pub p99_seconds: f64,
    /// The same without them.
    pub p99_seconds_without: f64,
    /// With ÷ without, of rounds beside each other.
    pub p99_ratio: Figure,
}

/// Runs it; `tell` hears of every round.
///
/// # Panics
/// When anything goes wrong: such figures would mean nothing.
#[must_use]
pub fn run(stage: &Stage, settings: &Settings, connections: usize, mut tell: impl FnMut(&str)) -> Idle {
    // Its own end of them; as many again are the daemon's.
    claviger::sys::process::raise_open_files().unwrap();
    stage.lab.configure(|config| {
        config.server.max_connections = connections + 16 + CALLERS;
        // All of them come from one address, and the first are to live as long as the last. Each asks for a document.
        config.server.max_connections_per_address = 0;
        config.server.document_rate = 0;
        config.server.unproven_time_percent = 0;
    });
    let service = Service::start(&stage.lab);
    let _ = service.round(CALLERS, settings.time);
    let resident_bytes_without = service.snapshot().resident;
    let (mut with, mut without, mut ratios) = (vec![], vec![], vec![]);
    let mut resident_bytes: f64 = 0.0;
    for round in 1..=settings.rounds {
        let p99 = || seconds(&service.round(CALLERS, settings.time).releases, 0.99);
        let alone = p99();
        let idle = open(service.daemon.address(), Speaks::Http1, connections);
        let beside = p99();
        let resident = service.snapshot().resident;
        resident_bytes = resident_bytes.max(resident);
        drop(idle);
        without.push(alone);
        with.push(beside);
        ratios.push(beside / alone);
        tell(&format!(
            "round {round} of {}: p99 {:.2} ms without, {:.2} ms beside {connections} idle connections, {:.0} MiB",
            settings.rounds,
            alone * 1e3,
            beside * 1e3,
            resident / 1048576.0
        ));
    }
    drop(service);
    let resident_bytes_of = Speaks::ALL.map(|speaks| {
        let daemon = if speaks.is_encrypted() { stage.lab.serve_tls() } else { stage.lab.serve() };
        block(daemon.until_ready_is(200));
        let idle = open(daemon.address(), speaks, connections);
        std::thread::sleep(REST);
        let resident = snapshot(&daemon).resident;
        tell(&format!("{} connections of {speaks}: {:.0} MiB", idle.len(), resident / 1048576.0));
        (speaks.to_string(), resident)
    });
    Idle {
        machine: Machine::here(),
        connections,
        resident_bytes,
        resident_bytes_of: resident_bytes_of.into(),
        resident_bytes_without,
        p99_seconds: median(&with),
        p99_seconds_without: median(&without),
        p99_ratio: Figure::of(&ratios),
    }
}

fn open(address: SocketAddr, speaks: Speaks, connections: usize) -> Vec<TcpStream> {
    let opener = Opener::new(address, speaks);
    (0..connections).map(|_| opener.open(METADATA)).collect()
}
