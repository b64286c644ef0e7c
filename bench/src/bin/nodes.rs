//! What a large state costs each of three nodes with etcd, and one daemon without: their start, a change, memory. Starts real
//! etcd and real daemons.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;
use claviger::admin::{self, Command};
use claviger::config::{Config, Etcd as EtcdSection, Link};
use claviger::store::{Certificate, Host, HostKind, Import, Kind, Labels, State};
use claviger_bench::machine::Machine;
use claviger_protocol::certificate::Certificate as Parsed;
use claviger_protocol::health::signer_template;
use claviger_protocol::rsa_key::{RsaPrivateKey, RsaPublicKey};
use claviger_tests::etcd::Etcd;
use claviger_tests::process::processor_time;
use claviger_tests::{Daemon, Lab, Options, block, until};
use ring::rand::{SecureRandom, SystemRandom};
use serde::Serialize;

/// Measures nodes with a large state in etcd, and a daemon with the same state in a file of SQLite
#[derive(Debug, Parser)]
#[command(after_help = "Example: cargo run --release -p claviger-bench --bin nodes -- --json nodes.json")]
struct Arguments {
    /// Registered hosts
    #[arg(long, default_value_t = 10_000)]
    hosts: usize,
    /// Keys, each with a certificate
    #[arg(long, default_value_t = 500)]
    keys: usize,
    /// Changes that are measured
    #[arg(long, default_value_t = 100)]
    changes: u32,
    /// Write the figures to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Number of nodes.
const NODES: usize = 3;

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A public key that has no private key: nothing is decrypted here, and such a key is made in no time.
fn public_key() -> RsaPublicKey {
    let mut modulus = vec![0; 256];
    SystemRandom::new().fill(&mut modulus).unwrap();
    modulus[0] |= 0x80;
    modulus[255] |= 1;
    RsaPublicKey::from_components(&modulus, &[1, 0, 1]).unwrap()
}

fn import(hosts: usize, keys: usize) -> Import {
    let host = |number: usize| {
        let key = public_key();
        Host {
            name: format!("host-{number}"),
            kind: HostKind::HostKey,
            spki: key.spki_der().to_vec(),
            spki_sha256: hexadecimal(&key.spki_sha256()),
            enabled: true,
            added: 1,
            labels: Labels::default(),
        }
    };
    let signer = RsaPrivateKey::generate(2048).unwrap();
    let certificate = |_| {
        let key = public_key();
        let der = signer_template(&key, 1, 4_000_000_000).unwrap().to_be_signed().unwrap().sign_with(&signer).unwrap();
        let parsed = Parsed::parse(&der).unwrap();
        Certificate {
            thumbprint: hexadecimal(&parsed.thumbprint()),
            kind: Kind::Encryption,
            key_id: key.spki_sha256()[..20].to_vec(),
            spki: key.spki_der().to_vec(),
            der,
            is_primary: false,
            enabled: true,
            added: 1,
            is_communications: false,
            labels: Labels::default(),
        }
    };
    Import {
        hosts: (0..hosts).map(host).collect(),
        certificates: (0..keys).map(certificate).collect(),
        ..Import::default()
    }
}

/// What a node took.
#[derive(Debug, Serialize)]
struct NodeFigures {
    /// From the start of its process until it listens, in seconds.
    start_seconds: f64,
    /// Processor time for a change, in milliseconds.
    change_ms: f64,
    /// Resident memory of the daemon after the changes, in bytes.
    resident_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Figures {
    machine: Machine,
    hosts: usize,
    keys: usize,
    changes: u32,
    /// Nodes with their state in etcd. The changes are made at the first.
    etcd: Vec<NodeFigures>,
    /// One daemon with the same state in its own file.
    sqlite: NodeFigures,
    /// The slowest start of a node in etcd, in seconds.
    start_seconds: f64,
    /// The largest processor time of a node in etcd for a change, in milliseconds.
    change_ms: f64,
}

/// Starts daemons with these configurations, and removes hosts at the first, one after the other.
fn measured(lab: &Lab, configs: &[Config], arguments: &Arguments) -> Vec<NodeFigures> {
    let (mut nodes, mut starts) = (Vec::new(), Vec::new());
    for (number, config) in configs.iter().enumerate() {
        let file = lab.file(&format!("node-{number}.toml"));
        std::fs::write(&file, config.to_toml().unwrap()).unwrap();
        let begun = Instant::now();
        nodes.push(Daemon::serve(&file));
        starts.push(begun.elapsed().as_secs_f64());
    }
    let hosts = |node: &Daemon| block(node.metrics()).sum("claviger_hosts_registered", &[]).unwrap();
    // The keys are looked for on the HSMs, and the counts written, in the first minute.
    std::thread::sleep(Duration::from_secs(20));
    let spent = || -> Vec<Duration> { nodes.iter().map(|node| processor_time(node.process.pid())).collect() };
    let during = |work: &dyn Fn()| {
        let (before, begun) = (spent(), Instant::now());
        work();
        let used: Vec<_> = spent().into_iter().zip(before).map(|(after, before)| after - before).collect();
        (used, begun.elapsed())
    };
    let socket = configs[0].server.admin_socket();
    let before = hosts(&nodes[0]);
    let (changing, lasted) = during(&|| {
        for number in 0..arguments.changes {
            let command = Command::RemoveHost { name: format!("host-{number}") };
            block(admin::call(&socket, &command)).unwrap();
        }
        let left = before - f64::from(arguments.changes);
        nodes.iter().for_each(|node| until("the changes", || (hosts(node) == left).then_some(())));
    });
    let (idle, _) = during(&|| std::thread::sleep(lasted));
    println!("  {} changes, one after the other: {:.1?} for each", arguments.changes, lasted / arguments.changes);
    let figures = nodes.iter().zip(starts).enumerate().map(|(number, (node, start_seconds))| NodeFigures {
        start_seconds,
        change_ms: (changing[number].saturating_sub(idle[number]) / arguments.changes).as_secs_f64() * 1e3,
        resident_bytes: node.process.status("VmRSS") * 1024,
    });
    let figures: Vec<_> = figures.collect();
    for (number, NodeFigures { start_seconds, change_ms, resident_bytes }) in figures.iter().enumerate() {
        println!(
            "  node {}: listens after {start_seconds:.2} s, {change_ms:.1} ms of processor time for a change, {} MiB",
            number + 1,
            resident_bytes / 1_048_576
        );
    }
    figures
}

fn main() {
    let arguments = Arguments::parse();
    let etcd = Etcd::start(1);
    let lab = Lab::make(Options { hsms: 1, vms: 1, bits: 2048 });
    let config = |name: &str, in_etcd: bool| {
        let mut config = lab.config();
        config.server.node = Some(name.to_owned());
        config.server.state = lab.file(&format!("state-{name}"));
        config.hsm.iter_mut().for_each(|hsm| hsm.sessions = 1);
        config.etcd = in_etcd.then(|| EtcdSection {
            endpoints: etcd.endpoints(),
            prefix: "/bench/".to_owned(),
            link: Link::Loopback,
            login: None,
            max_staleness_ms: 300_000,
        });
        config
    };
    let import = import(arguments.hosts, arguments.keys);
    let (single, first) = (config("single", false), config("node-0", true));
    for (place, config) in [("a file of SQLite", &single), ("etcd", &first)] {
        let mut state = State::of(config).unwrap();
        state.copy_from(&State::view(&lab.file("state")).unwrap().state).unwrap();
        let begun = Instant::now();
        let planned = state.plan_import(&import, 1).unwrap();
        state.import(&import, 1, &planned.changes).unwrap();
        let (took, Arguments { hosts, keys, .. }) = (begun.elapsed(), &arguments);
        println!("an import of {hosts} hosts and {keys} keys into {place}: {took:.1?}");
    }
    println!("one daemon, its state in a file of SQLite");
    let sqlite = measured(&lab, &[single], &arguments).remove(0);
    println!("{NODES} nodes, their state in etcd");
    let nodes: Vec<_> = (1..=NODES).map(|number| config(&format!("node-{number}"), true)).collect();
    let etcd = measured(&lab, &nodes, &arguments);
    let most = |figure: fn(&NodeFigures) -> f64| etcd.iter().map(figure).fold(0.0, f64::max);
    let figures = Figures {
        machine: Machine::here(),
        hosts: arguments.hosts,
        keys: arguments.keys,
        changes: arguments.changes,
        start_seconds: most(|node| node.start_seconds),
        change_ms: most(|node| node.change_ms),
        etcd,
        sqlite,
    };
    if let Some(file) = arguments.json {
        std::fs::write(file, serde_json::to_vec_pretty(&figures).unwrap()).unwrap();
    }
}
