//! What a large state in etcd costs each of three nodes: their start, a change, memory. Starts real etcd and real daemons.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::time::{Duration, Instant};

use clap::Parser;
use claviger::admin::{self, Command};
use claviger::config::{Config, Etcd as EtcdSection, Link};
use claviger::store::{Certificate, Host, HostKind, Import, Kind, Labels, State};
use claviger_protocol::certificate::Certificate as Parsed;
use claviger_protocol::health::signer_template;
use claviger_protocol::rsa_key::{RsaPrivateKey, RsaPublicKey};
use claviger_tests::etcd::Etcd;
use claviger_tests::process::processor_time;
use claviger_tests::{Daemon, Lab, Options, block, until};
use ring::rand::{SecureRandom, SystemRandom};

/// Measures nodes with a large state in etcd
#[derive(Debug, Parser)]
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

fn main() {
    let arguments = Arguments::parse();
    let etcd = Etcd::start(1);
    let lab = Lab::make(Options { hsms: 1, vms: 1, bits: 2048 });
    let config = |node: usize| {
        let mut config = lab.config();
        config.server.node = Some(format!("node-{node}"));
        config.server.state = lab.file(&format!("state-{node}"));
        config.hsm.iter_mut().for_each(|hsm| hsm.sessions = 1);
        config.etcd = Some(EtcdSection {
            endpoints: etcd.endpoints(),
            prefix: "/bench/".to_owned(),
            link: Link::Loopback,
            login: None,
            max_staleness_ms: 300_000,
        });
        config
    };
    let mut state = State::of(&config(0)).unwrap();
    state.copy_from(&State::view(&lab.file("state")).unwrap().state).unwrap();
    let import = import(arguments.hosts, arguments.keys);
    let begun = Instant::now();
    state.import(&import, 1, true).unwrap();
    println!("an import of {} hosts and {} keys: {:.1?}", arguments.hosts, arguments.keys, begun.elapsed());
    drop(state);

    let (mut nodes, mut sockets) = (Vec::new(), Vec::new());
    for number in 1..=NODES {
        let config: Config = config(number);
        let file = lab.file(&format!("node-{number}.toml"));
        std::fs::write(&file, config.to_toml().unwrap()).unwrap();
        let begun = Instant::now();
        let node = Daemon::serve(&file);
        println!("the start of node {number} until it listens: {:.2?}", begun.elapsed());
        sockets.push(config.server.admin_socket());
        nodes.push(node);
    }
    let hosts = |node: &Daemon| block(node.metrics()).sum("claviger_hosts_registered", &[]).unwrap();
    // The keys are looked for on the HSMs, and the counts written, in the first minute.
    std::thread::sleep(Duration::from_secs(20));
    let spent = || -> Vec<Duration> { nodes.iter().map(|node| processor_time(node.process.pid())).collect() };
    let measured = |work: &dyn Fn()| {
        let (before, begun) = (spent(), Instant::now());
        work();
        let used: Vec<_> = spent().into_iter().zip(before).map(|(after, before)| after - before).collect();
        (used, begun.elapsed())
    };
    let (changing, lasted) = measured(&|| {
        for number in 0..arguments.changes {
            let command = Command::RemoveHost { name: format!("host-{number}") };
            block(admin::call(&sockets[0], &command)).unwrap();
        }
        let left = (arguments.hosts + 1) as f64 - f64::from(arguments.changes);
        nodes.iter().for_each(|node| until("the changes", || (hosts(node) == left).then_some(())));
    });
    let (idle, _) = measured(&|| std::thread::sleep(lasted));
    println!(
        "{} changes at node 1, one after the other: {:.1?} for each",
        arguments.changes,
        lasted / arguments.changes
    );
    for (number, node) in nodes.iter().enumerate() {
        let change = changing[number].saturating_sub(idle[number]) / arguments.changes;
        let memory = node.process.status("VmRSS") / 1024;
        println!("node {}: {change:.2?} of processor time for a change, {memory} MiB of memory", number + 1);
    }
}
