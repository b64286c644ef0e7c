//! Tests of all faults of tokens, one after the other, under open-loop load whose answers are all checked: no answer is
//! wrong, none is lost while a member can serve, and a failed member serves again by itself.
//!
//! Times are printed for information; they never fail a test.

#![allow(clippy::print_stdout)]

mod deeds;
mod errors;
mod hangs;
mod modules;
mod speed;
mod stale;
mod wrong;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger_tests::openloop::{Load, Report, Traffic};
use claviger_tests::{Administrator, Daemon, FaultyMembers, Lab, Options, PATIENCE, lives};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::{Semaphore, SemaphorePermit};

const MEMBERS: [&str; 3] = ["hsm-a", "hsm-b", "hsm-c"];
const VMS: usize = 8;
/// Load as a share of the machine's capacity. It is low because a busy machine may have less capacity a moment later.
const SHARE: f64 = 0.35;
/// Time and number of callers with which the capacity is measured.
const TRIAL: (Duration, u64) = (Duration::from_millis(700), 4);
/// Time limit of a release. It is long, because a machine that stands still is not the daemon's fault.
const DEADLINE: Duration = Duration::from_secs(20);
/// Time for which the daemon lets a release wait for a restarting member when no other member serves.
const RETURN: Duration = Duration::from_secs(2);
/// Limits the number of concurrent scenarios, since the machine's capacity is not under test.
static ROOM: Semaphore = Semaphore::const_new(2);

/// Initial setup of a scenario.
#[derive(Clone, Copy)]
struct Setup {
    /// Number of members, taken from the start of [`MEMBERS`].
    members: usize,
    sessions: usize,
    /// The default, unless a test waits for the watchdog: a machine that stands still must not look like a call that hangs.
    watchdog_ms: u64,
}

const USUAL: Setup = Setup { members: MEMBERS.len(), sessions: 4, watchdog_ms: 5_000 };

/// A daemon whose tokens are behind the faulty module, and the load of its hosts.
struct Stage {
    lab: Lab,
    faulty: FaultyMembers,
    daemon: Daemon,
    health: Vec<u8>,
    traffic: Arc<Traffic>,
    /// Releases per second.
    rate: f64,
    /// Usual time of a release.
    usual: Duration,
    members: &'static [&'static str],
    watchdog: Duration,
    _turn: SemaphorePermit<'static>,
}

impl Stage {
    async fn open(setup: Setup) -> Self {
        Self::open_with(setup, |_| ()).await
    }

    /// Starts with faults that exist when the daemon starts.
    async fn open_with(setup: Setup, faults: impl FnOnce(&FaultyMembers)) -> Self {
        let turn = ROOM.acquire().await.unwrap();
        let members = &MEMBERS[..setup.members];
        let lab = Lab::make(Options { hsms: members.len(), vms: VMS, ..Options::default() });
        // The host gets its health certificate before the faults.
        let daemon = lab.serve();
        let health = lab.host(daemon.client()).attest().await.unwrap();
        let traffic = Traffic::of_vms(&lab, &health);
        let trial = traffic.burst(&daemon, TRIAL.0, TRIAL.1, DEADLINE).await;
        trial.assert_all_right();
        let rate = (trial.right() as f64 / TRIAL.0.as_secs_f64() * SHARE).clamp(8.0, 60.0);
        assert!(daemon.stop().success());
        let faulty = lab.behind_faulty();
        lab.configure(|config| {
            config.release.deadline_ms = DEADLINE.as_millis() as u64;
            config.release.watchdog_ms = setup.watchdog_ms;
            config.hsm.iter_mut().for_each(|hsm| hsm.sessions = setup.sessions);
        });
        faults(&faulty);
        let daemon = lab.serve();
        let (usual, watchdog) = (trial.quantile(0.5), Duration::from_millis(setup.watchdog_ms));
        Self { lab, faulty, daemon, health, traffic, rate, usual, members, watchdog, _turn: turn }
    }

    fn load(&self) -> Load {
        self.traffic.start(&self.daemon, self.rate, DEADLINE)
    }

    /// Returns a line that slows operations down until about `in_progress` of them run at a member at once.
    fn slow(&self, in_progress: f64) -> String {
        let operations = self.rate * 2.0 / self.members.len() as f64;
        format!("call=C_Decrypt,C_Sign delay_ms={:.0}", in_progress / operations * 1e3)
    }

    async fn until_faults(&self, member: &str, kind: &str, many: u64) {
        until(&format!("{member}: {kind}"), async || self.faulty.stats(member).faults(kind) >= many).await;
    }

    /// Returns a counter of a member.
    async fn count(&self, name: &str, member: &str, labels: &[(&str, &str)]) -> u64 {
        let labels = [&[("hsm", member)], labels].concat();
        self.daemon.metrics().await.sum(name, &labels).unwrap_or_default() as u64
    }

    /// Returns the number of operations that a member has done successfully for callers.
    async fn served(&self, member: &str) -> u64 {
        let decrypted = self.count("claviger_hsm_calls_total", member, &[("op", "decrypt"), ("rv", "ok")]).await;
        decrypted + self.count("claviger_hsm_calls_total", member, &[("op", "sign"), ("rv", "ok")]).await
    }

    async fn closings(&self, member: &str) -> u64 {
        self.count("claviger_hsm_closings_total", member, &[]).await
    }

    /// Waits until a member serves callers, under load. Returns the time this took.
    async fn until_serves(&self, member: &str) -> Duration {
        let before = self.served(member).await;
        until(&format!("{member} serves again"), async || self.served(member).await >= before + 5).await
    }

    /// Returns the number of times that a fresh worker brought a member up again.
    async fn renewals(&self, member: &str) -> u64 {
        self.count("claviger_hsm_modules_renewed_total", member, &[]).await
    }

    /// Returns the process of a member's worker; `None` without a worker.
    fn worker(&self, member: &str) -> Option<Pid> {
        Administrator(&self.lab).worker(member)
    }

    /// Sends SIGKILL to a member's worker. Returns false if the process had already ended.
    fn kill_worker(&self, member: &str) -> bool {
        self.worker(member).is_some_and(|worker| kill_process(worker, Signal::KILL).is_ok())
    }

    async fn until_closed(&self, member: &str, times: u64) {
        until(&format!("{member} is closed"), async || self.closings(member).await >= times).await;
    }

    /// Stops the load, prints a summary, and stops the daemon; checks that no worker outlives it.
    async fn end(self, name: &str, load: Load) -> Report {
        let report = load.stop().await;
        println!("{name}: {:.0} a second: {}", self.rate, report.line());
        let workers: Vec<Pid> = self.members.iter().filter_map(|member| self.worker(member)).collect();
        let mut daemon = self.daemon;
        if report.right() < report.samples.len() {
            println!("--- the daemon said:\n{}\n---", daemon.process.output());
        }
        daemon.process.terminate();
        assert!(daemon.process.wait().success());
        until("the workers end", async || !workers.iter().any(|worker| lives(*worker))).await;
        report
    }
}

async fn seconds(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
}

/// Checks a condition repeatedly; returns the time until it was true.
async fn until<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) -> Duration {
    let begun = Instant::now();
    while !done().await {
        assert!(begun.elapsed() < PATIENCE, "in vain: {what}");
        seconds(0.05).await;
    }
    begun.elapsed()
}
