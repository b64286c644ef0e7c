//! Connections that idle: what they take of memory, and what others notice of them.

use std::net::SocketAddr;

use claviger_tests::METADATA;
use claviger_tests::raw::{Connection, get};
use claviger_tests::stats::median;
use serde::Serialize;

use crate::ceiling::{Figure, Settings, Stage};
use crate::histogram::seconds;
use crate::machine::Machine;
use crate::service::Service;

/// Callers beside the idle connections: enough to keep the processors busy, without a queue.
const CALLERS: usize = 2;

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Idle {
    /// Where and when.
    pub machine: Machine,
    /// Keep-alive connections that had one answer each and then said nothing.
    pub connections: usize,
    /// Memory of the daemon with them, in octets.
    pub resident_bytes: f64,
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
        // All of them come from one address, and the first are to live as long as the last.
        config.server.max_connections_per_address = 0;
    });
    let service = Service::start(&stage.lab);
    let _ = service.round(CALLERS, settings.time);
    let resident_bytes_without = service.snapshot().resident;
    let (mut with, mut without, mut ratios) = (vec![], vec![], vec![]);
    let mut resident_bytes: f64 = 0.0;
    for round in 1..=settings.rounds {
        let p99 = || seconds(&service.round(CALLERS, settings.time).releases, 0.99);
        let alone = p99();
        let idle = open(service.daemon.address(), connections);
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
    Idle {
        machine: Machine::here(),
        connections,
        resident_bytes,
        resident_bytes_without,
        p99_seconds: median(&with),
        p99_seconds_without: median(&without),
        p99_ratio: Figure::of(&ratios),
    }
}

fn open(address: SocketAddr, connections: usize) -> Vec<Connection> {
    let request = get(METADATA);
    (0..connections)
        .map(|_| {
            let mut connection = Connection::open(address).unwrap();
            let answer = connection.exchange(&request).unwrap();
            assert!(answer.status == 200 && !answer.closes(), "{} {}", answer.status, answer.text());
            connection
        })
        .collect()
}
