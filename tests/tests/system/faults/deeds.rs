//! Tests of modules that harm their process, and of workers that are killed. No release is lost while a member can serve,
//! and the member comes back by itself. With a single member, releases wait for its return.

use std::time::{Duration, Instant};

use claviger_tests::openloop::{Answer, Report, Sample};
use rustix::process::{Signal, kill_process};

use super::{MEMBERS, RETURN, Setup, Stage, USUAL, seconds, until};

const THREE: Setup = Setup { watchdog_ms: 2_000, ..USUAL };
const ALONE: Setup = Setup { members: 1, ..THREE };
/// A worker that no longer answers is given up as fast as with the default settings.
const HASTY: Setup = Setup { watchdog_ms: 1_000, ..ALONE };

/// Deeds that end the process.
const DEADLY: [&str; 4] = ["abort", "exit", "segv", "heap"];
/// Deeds after which the process no longer answers.
const MUTE: [&str; 3] = ["close", "reconnect", "deadlock"];

/// Returns the calls that do a deed, one after the other. Deeds that use a gigabyte are done once.
fn calls(deed: &str) -> &'static [&'static str] {
    if ["leak", "print"].contains(&deed) { &["C_Decrypt"] } else { &["C_Decrypt", "C_Sign"] }
}

/// A time in which no member could serve.
struct Outage {
    begun: Instant,
    /// Minimum time that the daemon takes to notice the fault.
    noticed_after: Duration,
    over: Instant,
}

impl Outage {
    /// Returns true if the outage explains the refusal of a sample. The daemon waits for a member and then refuses. A
    /// machine that starts a process too slowly is not the daemon's fault.
    fn excuses(&self, sample: &Sample) -> bool {
        let given_up = self.begun + self.noticed_after + RETURN;
        sample.answer == (Answer::Refused { retry_after: true }) && sample.end >= given_up && sample.due <= self.over
    }
}

/// Checks that every release is right, except those that an outage explains.
fn judge(name: &str, report: &Report, outages: &[Outage]) {
    let excused = |sample: &&Sample| outages.iter().any(|outage| outage.excuses(sample));
    let number = report.samples.iter().filter(excused).count();
    println!("{name}: gap {:.0?}, {number} refused while no member served", report.gap());
    let first = report.samples.iter().find(|sample| sample.answer != Answer::Right && !excused(sample));
    assert!(first.is_none() && report.right() > 0, "{}; the first: {first:?}", report.line());
}

/// Makes a member's module do a deed in a call, and waits until the member serves again.
async fn perform(stage: &Stage, member: &str, call: &str, deed: &str) -> Outage {
    let name = format!("{deed} in {call} of {member}");
    let (begun, before) = (Instant::now(), stage.faulty.stats(member));
    stage.faulty.set(member, &[&format!("call={call} deed={deed}")]);
    stage.until_faults(member, "deed", before.faults("deed") + 1).await;
    if DEADLY.contains(&deed) || MUTE.contains(&deed) {
        until(&format!("a fresh worker after {name}"), async || {
            stage.faulty.stats(member).processes() > before.processes()
        })
        .await;
    } else {
        // The module continues, but the call may have taken so long that it counts as hung.
        seconds(stage.watchdog.as_secs_f64() + 0.5).await;
    }
    let back = stage.until_serves(member).await;
    let stats = stage.faulty.stats(member);
    // The deed was done once, whatever process was started since.
    assert_eq!(stats.faults("deed"), before.faults("deed") + 1, "{name}");
    println!("{name}: serves after {back:.0?}, {} workers were started", stats.processes() - before.processes());
    // The end of a process is noticed at once; a missing answer is noticed at the time limit.
    let noticed_after = if DEADLY.contains(&deed) { Duration::ZERO } else { stage.watchdog };
    Outage { begun, noticed_after, over: Instant::now() }
}

/// Runs the deeds one after the other, on one member after the other, while the others serve.
async fn beside_others(deeds: &[&str]) {
    let stage = Stage::open(THREE).await;
    let load = stage.load();
    seconds(0.5).await;
    for (turn, deed) in deeds.iter().enumerate() {
        for (at, call) in calls(deed).iter().enumerate() {
            let member = MEMBERS[(turn + at) % MEMBERS.len()];
            perform(&stage, member, call, deed).await;
        }
    }
    let name = format!("{}, beside others", deeds.join(", "));
    judge(&name, &stage.end(&name, load).await, &[]);
}

/// Runs the deeds on a single member.
async fn alone(setup: Setup, deeds: &[&str]) {
    let stage = Stage::open(setup).await;
    let load = stage.load();
    seconds(0.5).await;
    let mut outages = Vec::new();
    for deed in deeds {
        for call in calls(deed) {
            outages.push(perform(&stage, MEMBERS[0], call, deed).await);
        }
    }
    seconds(0.5).await;
    let name = format!("{}, alone", deeds.join(", "));
    judge(&name, &stage.end(&name, load).await, &outages);
}

#[tokio::test(flavor = "multi_thread")]
async fn modules_that_end_their_process_beside_others() {
    beside_others(&DEADLY).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn modules_that_end_their_process_alone() {
    alone(ALONE, &DEADLY).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_closes_or_replaces_the_workers_socket_beside_others() {
    beside_others(&["close", "reconnect"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_closes_or_replaces_the_workers_socket_alone() {
    alone(HASTY, &["close", "reconnect"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_changes_signal_handlers_beside_others() {
    beside_others(&["handlers"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_changes_signal_handlers_alone() {
    alone(ALONE, &["handlers"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_prints_a_gigabyte_beside_others() {
    beside_others(&["print"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_prints_a_gigabyte_alone() {
    alone(ALONE, &["print"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_leaks_a_gigabyte_beside_others() {
    beside_others(&["leak"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_leaks_a_gigabyte_alone() {
    alone(ALONE, &["leak"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_deadlocks_beside_others() {
    beside_others(&["deadlock"]).await;
}

/// The call never returns, and only the daemon ends it: the member comes up again.
#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_deadlocks_alone() {
    alone(HASTY, &["deadlock"]).await;
}

/// Memory that a module leaks and bytes that it prints do not make the daemon grow.
#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_does_not_grow_by_what_a_module_leaks_or_prints() {
    let stage = Stage::open(THREE).await;
    let load = stage.load();
    seconds(0.5).await;
    let before = stage.daemon.process.status("VmRSS");
    for (deed, member) in ["leak", "print"].iter().zip(MEMBERS) {
        perform(&stage, member, "C_Decrypt", deed).await;
    }
    let after = stage.daemon.process.status("VmRSS");
    println!("the daemon has {} MiB, {} MiB before", after / 1024, before / 1024);
    // In KiB: a tenth of the bytes that were leaked and printed.
    assert!(after < before + 200 * 1024, "the daemon has grown by {} MiB", (after - before) / 1024);
    judge("leak and print", &stage.end("leak and print", load).await, &[]);
}

/// Kills a member's worker several times; each time the next worker serves.
async fn killed_by_hand(setup: Setup, members: &[&str], rounds: usize) {
    let stage = Stage::open(setup).await;
    let load = stage.load();
    for member in members {
        stage.until_serves(member).await;
    }
    let mut outages = Vec::new();
    for _ in 0..rounds {
        for member in members {
            let (begun, before) = (Instant::now(), stage.renewals(member).await);
            until(&format!("a worker of {member} to kill"), async || stage.kill_worker(member)).await;
            until(&format!("{member} is back"), async || stage.renewals(member).await > before).await;
            let back = begun.elapsed();
            stage.until_serves(member).await;
            println!("the worker of {member} was killed: up again after {back:.0?}");
            outages.push(Outage { begun, noticed_after: Duration::ZERO, over: Instant::now() });
        }
    }
    let excused = if setup.members == 1 { outages } else { Vec::new() };
    judge("killed by hand", &stage.end("killed by hand", load).await, &excused);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_killed_one_after_the_other() {
    killed_by_hand(THREE, &MEMBERS, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_worker_is_killed_again_and_again() {
    killed_by_hand(ALONE, &MEMBERS[..1], 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_workers_are_killed_at_once() {
    let stage = Stage::open(THREE).await;
    let load = stage.load();
    let mut before = Vec::new();
    for member in MEMBERS {
        stage.until_serves(member).await;
        before.push(stage.renewals(member).await);
    }
    let workers = MEMBERS.map(|member| stage.worker(member).unwrap_or_else(|| panic!("{member} has no worker")));
    let begun = Instant::now();
    for worker in workers {
        kill_process(worker, Signal::KILL).unwrap();
    }
    for (member, before) in MEMBERS.iter().zip(before) {
        until(&format!("{member} is back"), async || stage.renewals(member).await > before).await;
    }
    println!("all workers were killed: all are up after {:.0?}", begun.elapsed());
    for member in MEMBERS {
        stage.until_serves(member).await;
    }
    let outage = Outage { begun, noticed_after: Duration::ZERO, over: Instant::now() };
    judge("all killed at once", &stage.end("all killed at once", load).await, &[outage]);
}

/// A fresh worker hangs before its first report: it is given up, and the next one serves.
#[tokio::test(flavor = "multi_thread")]
async fn c_initialize_deadlocks_beside_others() {
    let stage = Stage::open(THREE).await;
    let load = stage.load();
    stage.until_serves("hsm-b").await;
    stage.faulty.set_module("hsm-b", &["initialize deed=deadlock"]);
    until("a worker of hsm-b to kill", async || stage.kill_worker("hsm-b")).await;
    until("C_Initialize deadlocks", async || stage.faulty.module_stats("hsm-b").faults("deed") == 1).await;
    let back = stage.until_serves("hsm-b").await;
    println!("C_Initialize deadlocks: serves after {back:.0?}");
    let stats = stage.faulty.module_stats("hsm-b");
    assert_eq!((stats.faults("deed"), stats.processes() >= 3), (1, true));
    judge("C_Initialize deadlocks", &stage.end("C_Initialize deadlocks", load).await, &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn c_initialize_deadlocks_alone_at_the_start() {
    let deadlock = ["initialize deed=deadlock"];
    let stage = Stage::open_with(ALONE, |faulty| faulty.set_all_modules(&deadlock)).await;
    until("C_Initialize deadlocks", async || stage.faulty.module_stats(MEMBERS[0]).faults("deed") == 1).await;
    assert_eq!(stage.daemon.probe("/live").await.status, 200);
    let begun = Instant::now();
    stage.daemon.until_ready_is(200).await;
    println!("C_Initialize deadlocks at the start: ready after {:.0?}", begun.elapsed());
    let load = stage.load();
    stage.until_serves(MEMBERS[0]).await;
    judge("after a deadlock at the start", &stage.end("after a deadlock at the start", load).await, &[]);
}
