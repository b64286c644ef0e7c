//! What anonymous attackers of each kind cost honest hosts: goodput with them ÷ without them, in one run, in rounds beside each
//! other; whether `/ready` stayed 200; and how much memory the daemon took.
//!
//! `cargo run -p claviger-tests --bin attackers -- --attackers 100 --seconds 5 --rounds 3 --pause-ms 50 [--kind TEXT]`; with
//! `CLAVIGER_BIN` it looks at that binary. Ends with status 1 when a ratio is below 0.9, an answer was wrong, `/ready` was
//! not 200, or the memory grew beyond its bounds.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::process::ExitCode;
use std::time::Duration;

use claviger_client::http::Client;
use claviger_tests::attackers::{Attack, Kind, Target};
use claviger_tests::openloop::Traffic;
use claviger_tests::stats::median;
use claviger_tests::{Daemon, Lab, Options};

const DEADLINE: Duration = Duration::from_secs(20);
/// Goodput with attackers that the service promises, of what it is without them.
const PROMISED: f64 = 0.9;
/// Memory that attackers may add, in MiB: what there is for bodies, and as much again for connections.
const MEMORY: u64 = 1024;

struct Settings {
    attackers: usize,
    callers: u64,
    seconds: f64,
    rounds: usize,
    pause: Duration,
    kind: String,
}

fn settings() -> Settings {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str, default: &str| {
        let at = arguments.iter().position(|argument| argument == name);
        at.map_or(default, |at| arguments[at + 1].as_str()).to_owned()
    };
    Settings {
        attackers: value("--attackers", "100").parse().unwrap(),
        callers: value("--callers", "8").parse().unwrap(),
        seconds: value("--seconds", "5").parse().unwrap(),
        rounds: value("--rounds", "3").parse().unwrap(),
        pause: Duration::from_millis(value("--pause-ms", "50").parse().unwrap()),
        kind: value("--kind", ""),
    }
}

/// Looks at `/ready` until it is dropped; counts what is not 200.
async fn watch_readiness(daemon: &Daemon) -> (usize, usize) {
    let (mut asked, mut not_ready) = (0, 0);
    loop {
        let client = Client::new(&daemon.metrics_url).unwrap().with_timeout(DEADLINE);
        if !client.get("/ready").await.is_ok_and(|reply| reply.status == 200) {
            not_ready += 1;
        }
        asked += 1;
        if asked == 4 {
            return (asked, not_ready);
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let settings = settings();
    let time = Duration::from_secs_f64(settings.seconds);
    let lab = Lab::make(Options { hsms: 1, vms: 8, ..Options::default() });
    lab.configure(|config| {
        // Fewer places than the attackers want, and no host is limited.
        config.server.max_connections = 3 * settings.attackers;
        config.release.host_rate = 0;
    });
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    let health = lab.host(daemon.client()).attest().await.unwrap();
    let target = Target::new(&lab, &daemon);
    let traffic = Traffic::of_vms(&lab, &health);
    let burst = async || traffic.burst(&daemon, time, settings.callers, DEADLINE).await;
    let _ = burst().await;
    let idle = daemon.process.status("VmRSS") / 1024;
    println!(
        "{} attackers, {} callers, {} rounds of {} s, pause {:?}; {idle} MiB without attackers",
        settings.attackers, settings.callers, settings.rounds, settings.seconds, settings.pause
    );
    println!(
        "{:42} {:>10} {:>10} {:>6} {:>6} {:>9} {:>8}",
        "kind", "without/s", "with/s", "ratio", "lost", "not ready", "MiB"
    );
    let mut all_well = true;
    for kind in Kind::ALL.into_iter().filter(|kind| kind.describe().contains(&settings.kind)) {
        let (mut without, mut with, mut ratios) = (vec![], vec![], vec![]);
        let (mut lost, mut wrong, mut not_ready, mut memory) = (0, 0, 0, 0);
        for _ in 0..settings.rounds {
            let alone = burst().await;
            let attack = Attack::start(kind, &target, settings.attackers, settings.pause);
            // As many as they come to.
            tokio::time::sleep(Duration::from_millis(1500)).await;
            let (beside, (_, unready)) = tokio::join!(burst(), watch_readiness(&daemon));
            memory = memory.max(daemon.process.status("VmRSS") / 1024);
            drop(attack);
            // Whatever they left behind.
            tokio::time::sleep(Duration::from_millis(500)).await;
            let rate = |right: usize| right as f64 / settings.seconds;
            lost += beside.lost().len();
            wrong += beside.wrong().len() + alone.wrong().len();
            not_ready += unready;
            without.push(rate(alone.right()));
            with.push(rate(beside.right()));
            ratios.push(rate(beside.right()) / rate(alone.right()));
        }
        let ratio = median(&ratios);
        let (without, with) = (median(&without), median(&with));
        println!("{:42} {without:10.1} {with:10.1} {ratio:6.2} {lost:6} {not_ready:9} {memory:8}", kind.describe());
        all_well &= ratio >= PROMISED && wrong == 0 && not_ready == 0 && memory < idle + MEMORY;
    }
    assert!(daemon.stop().success());
    if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
