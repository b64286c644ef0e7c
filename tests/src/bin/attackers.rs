//! Measures the cost of anonymous attackers of each kind to honest hosts: goodput with attackers ÷ goodput without, in one
//! run, in alternating rounds. Also checks that `/ready` stays 200, and measures the daemon's memory.
//!
//! `attackers --help` has an example. It ends with status 1 if a ratio is below 0.9, an answer was wrong, `/ready` was not 200,
//! or the memory exceeded its bounds.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use claviger_client::http::Client;
use claviger_tests::attackers::{Addresses, Attack, Crowd, Kind, Target};
use claviger_tests::openloop::Traffic;
use claviger_tests::process::{processor_time, processor_time_of_threads};
use claviger_tests::stats::median;
use claviger_tests::{Daemon, Lab, Options};
use rustix::process::getpid;

const DEADLINE: Duration = Duration::from_secs(20);
/// Minimum goodput under attack, as a share of the goodput without attackers.
const PROMISED: f64 = 0.9;
/// Maximum growth of memory in MiB: the budget for bodies, and as much again for connections.
const MEMORY: u64 = 1024;

/// Measures how much slower honest hosts become beside anonymous attackers: in alternating rounds with and without attackers,
/// on a daemon with one soft token.
#[derive(Parser)]
#[command(after_help = "\
Example: 100 attackers from one address of their own, only the kinds of TLS:

  CLAVIGER_BIN=target/release/claviger cargo run --release -p claviger-tests --bin attackers -- --kind TLS

CLAVIGER_BIN names the daemon to test; without it, the debug build is tested.")]
struct Settings {
    /// Number of attackers.
    #[arg(long, default_value_t = 100)]
    attackers: usize,
    /// Number of honest callers. Each repeats its request as soon as it has an answer.
    #[arg(long, default_value_t = 8)]
    callers: u64,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Rounds for each kind of attackers: one measurement without attackers and one with them.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Pause in milliseconds between two requests of an attacker.
    #[arg(long, default_value_t = 50)]
    pause_ms: u64,
    /// Priority of the attackers' threads. At 19 they take the processor time that others leave.
    #[arg(long, default_value_t = 19)]
    nice: i32,
    /// Only kinds whose description contains this text.
    #[arg(long, default_value = "")]
    kind: String,
    /// Addresses of the attackers: one of their own, one for each attacker, or the address of the honest hosts.
    #[arg(long, value_enum, default_value_t = From::One)]
    from: From,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum From {
    One,
    Many,
    Hosts,
}

impl Settings {
    fn crowd(&self) -> Crowd {
        let addresses = match self.from {
            From::One => Addresses::One,
            From::Many => Addresses::Many,
            From::Hosts => Addresses::OfHosts,
        };
        Crowd { attackers: self.attackers, pause: Duration::from_millis(self.pause_ms), nice: self.nice, addresses }
    }
}

/// Polls `/ready` until it is dropped; counts answers other than 200.
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

/// Processors that were busy for something, given its processor time before and after.
fn processors(before: Duration, after: Duration, time: Duration) -> f64 {
    after.saturating_sub(before).as_secs_f64() / time.as_secs_f64()
}

fn lab(settings: &Settings) -> Lab {
    let lab = Lab::make(Options { hsms: 1, vms: 8, ..Options::default() });
    lab.configure(|config| {
        // Fewer connections than the attackers want, and no rate limit for hosts.
        config.server.max_connections = 3 * settings.attackers;
        config.release.host_rate = 0;
    });
    lab
}

/// Measures the kinds that this daemon is for. Returns whether all is as it is promised.
async fn measure(settings: &Settings, lab: &Lab, daemon: Daemon, kinds: &[Kind]) -> bool {
    let time = Duration::from_secs_f64(settings.seconds);
    daemon.until_ready_is(200).await;
    let health = lab.host(daemon.client()).attest().await.unwrap();
    let target = Target::new(lab, &daemon);
    let traffic = Traffic::of_vms(lab, &health);
    let burst = async || traffic.burst(&daemon, time, settings.callers, DEADLINE).await;
    let of_daemon = || processor_time(daemon.process.pid());
    let of_attackers = || processor_time_of_threads(getpid(), Attack::THREADS);
    let _ = burst().await;
    let idle = daemon.process.status("VmRSS") / 1024;
    let mut all_well = true;
    for kind in kinds {
        let (mut without, mut with, mut ratios) = (vec![], vec![], vec![]);
        let (mut alone_with_them, mut theirs) = (vec![], vec![]);
        let (mut lost, mut wrong, mut not_ready, mut memory) = (0, 0, 0, 0);
        for _ in 0..settings.rounds {
            let alone = burst().await;
            let attack = Attack::start(*kind, &target, settings.crowd());
            // As many as they come to; and what a burst is good for is used up.
            tokio::time::sleep(Duration::from_secs(3)).await;
            let before = of_daemon();
            tokio::time::sleep(time / 2).await;
            alone_with_them.push(processors(before, of_daemon(), time / 2));
            let (before, begun) = (of_attackers(), Instant::now());
            let (beside, (_, unready)) = tokio::join!(burst(), watch_readiness(&daemon));
            theirs.push(processors(before, of_attackers(), begun.elapsed()));
            memory = memory.max(daemon.process.status("VmRSS") / 1024);
            drop(attack);
            // Waits for the remains of the attack to end.
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
        let [without, with, alone, theirs] = [without, with, alone_with_them, theirs].map(|values| median(&values));
        println!(
            "{:42} {without:10.1} {with:10.1} {ratio:6.2} {alone:8.2} {theirs:9.2} {lost:6} {not_ready:9} {memory:8}",
            kind.describe()
        );
        all_well &= ratio >= PROMISED && wrong == 0 && not_ready == 0 && memory < idle + MEMORY;
    }
    assert!(daemon.stop().success());
    all_well
}

#[tokio::main]
async fn main() -> ExitCode {
    let settings = Settings::parse();
    let wanted = |kind: &Kind| kind.describe().contains(&settings.kind);
    let (by_tls, plain): (Vec<_>, Vec<_>) = Kind::ALL.into_iter().filter(wanted).partition(|kind| kind.needs_tls());
    println!(
        "{:?}, {} callers, {} rounds of {} s, {} processors",
        settings.crowd(),
        settings.callers,
        settings.rounds,
        settings.seconds,
        std::thread::available_parallelism().unwrap()
    );
    println!(
        "{:42} {:>10} {:>10} {:>6} {:>8} {:>9} {:>6} {:>9} {:>8}",
        "kind", "without/s", "with/s", "ratio", "daemon", "attackers", "lost", "not ready", "MiB"
    );
    let mut all_well = true;
    for (kinds, tls) in [(plain, false), (by_tls, true)] {
        if !kinds.is_empty() {
            let lab = lab(&settings);
            let daemon = if tls { lab.serve_tls() } else { lab.serve() };
            all_well &= measure(&settings, &lab, daemon, &kinds).await;
        }
    }
    if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
