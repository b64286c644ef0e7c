//! Everything that can happen to tokens, one after the other, under open-loop load that is checked answer by answer: no
//! answer is wrong, none is lost while somebody can serve, and what failed serves again by itself.
//!
//! Times are printed, for information; they never fail a test.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

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
/// How much of what the machine carries is asked of it: a machine with much else to do carries less in a moment.
const SHARE: f64 = 0.35;
/// For how long, and by how many callers, it is tried out how much that is.
const TRIAL: (Duration, u64) = (Duration::from_millis(700), 4);
/// What a release has. Long, since a machine that stands still is not the daemon's fault.
const DEADLINE: Duration = Duration::from_secs(20);
/// How long the daemon lets a release wait for the return of a member that went down, when no other one serves.
const RETURN: Duration = Duration::from_secs(2);
/// A scenario is about load, not about how many of them a machine carries.
static ROOM: Semaphore = Semaphore::const_new(2);

/// How a scenario begins.
#[derive(Clone, Copy)]
struct Setup {
    /// The first so many of [`MEMBERS`].
    members: usize,
    sessions: usize,
    /// As long as the default, but where a test waits for it: a machine that stands still is no call that hangs.
    watchdog_ms: u64,
}

const USUAL: Setup = Setup { members: MEMBERS.len(), sessions: 4, watchdog_ms: 5_000 };

/// A daemon with its tokens behind the faulty module, and what hosts ask of it.
struct Stage {
    lab: Lab,
    faulty: FaultyMembers,
    daemon: Daemon,
    health: Vec<u8>,
    traffic: Arc<Traffic>,
    /// Releases a second.
    rate: f64,
    /// What one takes in good times.
    usual: Duration,
    members: &'static [&'static str],
    watchdog: Duration,
    _turn: SemaphorePermit<'static>,
}

impl Stage {
    async fn open(setup: Setup) -> Self {
        Self::open_with(setup, |_| ()).await
    }

    /// With faults that are there when the daemon starts.
    async fn open_with(setup: Setup, faults: impl FnOnce(&FaultyMembers)) -> Self {
        let turn = ROOM.acquire().await.unwrap();
        let members = &MEMBERS[..setup.members];
        let lab = Lab::make(Options { hsms: members.len(), vms: VMS, ..Options::default() });
        // A host asks for its health certificate in good times.
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

    /// A line that makes operations so slow that about so many of them are in progress at a member at once.
    fn slow(&self, in_progress: f64) -> String {
        let operations = self.rate * 2.0 / self.members.len() as f64;
        format!("call=C_Decrypt,C_Sign delay_ms={:.0}", in_progress / operations * 1e3)
    }

    async fn until_faults(&self, member: &str, kind: &str, many: u64) {
        until(&format!("{member}: {kind}"), async || self.faulty.stats(member).faults(kind) >= many).await;
    }

    /// A counter of a member.
    async fn count(&self, name: &str, member: &str, labels: &[(&str, &str)]) -> u64 {
        let labels = [&[("hsm", member)], labels].concat();
        self.daemon.metrics().await.sum(name, &labels).unwrap_or_default() as u64
    }

    /// Operations that a member has done right for callers.
    async fn served(&self, member: &str) -> u64 {
        let decrypted = self.count("claviger_hsm_calls_total", member, &[("op", "decrypt"), ("rv", "ok")]).await;
        decrypted + self.count("claviger_hsm_calls_total", member, &[("op", "sign"), ("rv", "ok")]).await
    }

    async fn closings(&self, member: &str) -> u64 {
        self.count("claviger_hsm_closings_total", member, &[]).await
    }

    /// Waits until a member serves callers; under load. Says how long that took.
    async fn until_serves(&self, member: &str) -> Duration {
        let before = self.served(member).await;
        until(&format!("{member} serves again"), async || self.served(member).await >= before + 5).await
    }

    /// How often a member came up again with a fresh worker.
    async fn renewals(&self, member: &str) -> u64 {
        self.count("claviger_hsm_modules_renewed_total", member, &[]).await
    }

    /// The process that serves a member; `None` while there is none.
    fn worker(&self, member: &str) -> Option<Pid> {
        Administrator(&self.lab).worker(member)
    }

    /// SIGKILL, by hand. `false` when there was nothing to kill: the process had ended meanwhile.
    fn kill_worker(&self, member: &str) -> bool {
        self.worker(member).is_some_and(|worker| kill_process(worker, Signal::KILL).is_ok())
    }

    async fn until_closed(&self, member: &str, times: u64) {
        until(&format!("{member} is closed"), async || self.closings(member).await >= times).await;
    }

    /// Stops the load, says how it went, and ends the daemon in good order; no worker outlives it.
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

/// Asks again and again; says how long it took.
async fn until<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) -> Duration {
    let begun = Instant::now();
    while !done().await {
        assert!(begun.elapsed() < PATIENCE, "in vain: {what}");
        seconds(0.05).await;
    }
    begun.elapsed()
}
