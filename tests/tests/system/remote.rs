//! Tests of HSMs behind a network: servers die, hang and come back under open-loop load.

#![allow(clippy::print_stdout)]

use std::time::{Duration, Instant};

use claviger_tests::openloop::{Answer, Load, Sample, Traffic};
use claviger_tests::{Daemon, Lab, Options, PATIENCE, Remote};
use tokio::sync::{Semaphore, SemaphorePermit};

const MEMBERS: [&str; 3] = ["hsm-a", "hsm-b", "hsm-c"];
/// Releases per second.
const RATE: f64 = 50.0;
/// Time limit of a release in the daemon's configuration; the host waits a little longer.
const DEADLINE: Duration = Duration::from_secs(5);
/// Number of decryptions that prove that a member serves again. It exceeds the number of hung calls that may return late.
const SERVES: u64 = 12;
/// Time for which load continues after each event, to see late effects.
const AFTERWARDS: Duration = Duration::from_secs(1);

/// Limits the number of concurrent scenarios: processors are few, and the watchdog's time is short.
static PLACES: Semaphore = Semaphore::const_new(2);

/// A daemon with three servers, under load.
struct Scene {
    remote: Remote,
    daemon: Daemon,
    load: Load,
    /// Events with their times.
    events: Vec<(Instant, String)>,
    _lab: Lab,
    _place: SemaphorePermit<'static>,
}

impl Scene {
    async fn begin() -> Self {
        let place = PLACES.acquire().await.unwrap();
        let lab = Lab::make(Options { hsms: 3, vms: 1, ..Options::default() });
        lab.configure(|config| {
            config.release.watchdog_ms = 300;
            config.release.deadline_ms = DEADLINE.as_millis() as u64;
        });
        let remote = lab.behind_servers();
        let daemon = lab.serve();
        daemon.until_ready_is(200).await;
        let health = lab.host(daemon.client()).attest().await.unwrap();
        let load = Traffic::of_vms(&lab, &health).start(&daemon, RATE, 2 * DEADLINE);
        let mut scene = Self { remote, daemon, load, events: Vec::new(), _lab: lab, _place: place };
        scene.until_all_serve().await;
        scene
    }

    fn event(&mut self, what: &str) {
        self.events.push((Instant::now(), what.to_owned()));
    }

    fn kill(&mut self, member: &str) {
        self.event(&format!("{member} killed"));
        self.remote.kill(member);
    }

    fn restart(&mut self, member: &str) {
        self.event(&format!("{member} restarted"));
        self.remote.restart(member);
    }

    fn mute(&mut self, member: &str) {
        self.event(&format!("{member} muted"));
        self.remote.mute(member);
    }

    fn stop(&mut self, member: &str) {
        self.event(&format!("{member} stopped"));
        self.remote.stop(member);
    }

    fn cont(&mut self, member: &str) {
        self.event(&format!("{member} goes on"));
        self.remote.cont(member);
    }

    async fn served(&self, member: &str) -> u64 {
        let labels = [("hsm", member), ("op", "decrypt"), ("rv", "ok")];
        self.daemon.metrics().await.count("claviger_hsm_calls_total", &labels)
    }

    async fn until_serves(&mut self, member: &str) {
        let (begun, before) = (Instant::now(), self.served(member).await);
        while self.served(member).await < before + SERVES {
            let why = self.daemon.probe("/metrics").await.body;
            let why: Vec<_> = std::str::from_utf8(&why).unwrap().lines().filter(|l| l.contains(member)).collect();
            assert!(begun.elapsed() < PATIENCE, "{member} does not serve:\n{}", why.join("\n"));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.event(&format!("{member} serves"));
    }

    async fn until_all_serve(&mut self) {
        for member in MEMBERS {
            self.until_serves(member).await;
        }
    }

    async fn go_on(&self) {
        tokio::time::sleep(AFTERWARDS).await;
    }

    /// Ends the load and stops the daemon. Every release must be answered and right, except that refusals are right in the
    /// time `nobody_served`.
    async fn end(self, nobody_served: Option<(Instant, Instant)>) {
        let report = self.load.stop().await;
        let begun = Instant::now();
        let status = self.daemon.stop();
        println!("{}; the daemon stopped within {} ms", report.line(), begun.elapsed().as_millis());
        let mut rest = report.clone();
        for (when, what) in &self.events {
            let (before, after) = rest.split(*when);
            println!("{}\n{what}", before.line());
            rest = after;
        }
        println!("{}", rest.line());
        // Requests in flight when the last server died may be refused too.
        let may_be_refused = |sample: &Sample| {
            sample.answer == (Answer::Refused { retry_after: true })
                && nobody_served.is_some_and(|(from, to)| sample.end >= from && sample.due < to)
        };
        let bad = report.samples.iter().filter(|sample| sample.answer != Answer::Right && !may_be_refused(sample));
        let bad: Vec<String> = bad
            .map(|sample| {
                let after = self.events.iter().rfind(|(when, _)| *when <= sample.due);
                let (when, what) = after.map_or((sample.due, "the first"), |(when, what)| (*when, what.as_str()));
                format!("{what}, +{:?}: {:?} after {:?}", sample.due - when, sample.answer, sample.took())
            })
            .collect();
        assert!(bad.is_empty(), "{} of {} releases:\n{}", bad.len(), report.samples.len(), bad.join("\n"));
        assert!(status.success(), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_servers_serve() {
    let scene = Scene::begin().await;
    scene.go_on().await;
    scene.end(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_is_replaced_and_taken_in_again() {
    let mut scene = Scene::begin().await;
    for member in ["hsm-b", "hsm-a"] {
        scene.kill(member);
        scene.go_on().await;
        scene.restart(member);
        scene.until_serves(member).await;
    }
    scene.go_on().await;
    scene.end(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_is_passed_over_until_it_goes_on_or_is_replaced() {
    let mut scene = Scene::begin().await;
    scene.stop("hsm-b");
    scene.go_on().await;
    scene.cont("hsm-b");
    scene.until_serves("hsm-b").await;
    scene.stop("hsm-b");
    scene.go_on().await;
    scene.kill("hsm-b");
    scene.go_on().await;
    scene.restart("hsm-b");
    scene.until_serves("hsm-b").await;
    scene.go_on().await;
    scene.end(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_of_three_are_restarted_in_turn() {
    let mut scene = Scene::begin().await;
    for member in ["hsm-a", "hsm-b", "hsm-a", "hsm-b"] {
        scene.restart(member);
        scene.until_serves(member).await;
    }
    scene.go_on().await;
    scene.end(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_server_the_daemon_says_so_and_resumes_by_itself() {
    let mut scene = Scene::begin().await;
    let from = Instant::now();
    MEMBERS.iter().for_each(|member| scene.kill(member));
    let not_ready = scene.daemon.until_ready_is(503).await;
    assert!(not_ready.body.starts_with(b"not ready: hsm-a: "), "{not_ready:?}");
    scene.event("/ready says no");
    scene.go_on().await;
    assert_eq!(scene.daemon.probe("/ready").await.status, 503);
    assert_eq!(scene.daemon.probe("/live").await.status, 200);
    MEMBERS.iter().for_each(|member| scene.restart(member));
    scene.until_all_serve().await;
    let to = Instant::now();
    scene.daemon.until_ready_is(200).await;
    scene.go_on().await;
    scene.end(Some((from, to))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_is_stopped_while_a_server_hangs() {
    let mut scene = Scene::begin().await;
    scene.stop("hsm-c");
    scene.go_on().await;
    scene.end(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_greets_keeps_nobody_else() {
    let mut scene = Scene::begin().await;
    scene.mute("hsm-a");
    scene.go_on().await;
    scene.kill("hsm-b");
    scene.go_on().await;
    scene.restart("hsm-b");
    scene.until_serves("hsm-b").await;
    scene.restart("hsm-a");
    scene.until_serves("hsm-a").await;
    scene.go_on().await;
    scene.end(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_is_stopped_while_a_server_does_not_greet() {
    let mut scene = Scene::begin().await;
    scene.mute("hsm-a");
    scene.go_on().await;
    scene.kill("hsm-b");
    scene.go_on().await;
    scene.end(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_starts_while_a_server_does_not_greet() {
    let _place = PLACES.acquire().await.unwrap();
    let lab = Lab::make(Options { hsms: 2, vms: 1, ..Options::default() });
    let mut remote = lab.behind_servers();
    remote.mute("hsm-a");
    let begun = Instant::now();
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    println!("ready within {} ms", begun.elapsed().as_millis());
    assert!(daemon.stop().success());
}
