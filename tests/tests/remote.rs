//! HSMs behind a network: servers that die, hang, and come back, under load that does not wait for anybody.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use claviger::client::Client;
use claviger_protocol::owner::Owner;
use claviger_protocol::protector::TransportKey;
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_tests::{Daemon, Lab, Options, PATIENCE, ROLL, Remote, open_release, roll_request};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::{JoinHandle, JoinSet};

const MEMBERS: [&str; 3] = ["hsm-a", "hsm-b", "hsm-c"];
/// Releases a second.
const RATE: u32 = 50;
/// How many of a member's decryptions show that it serves again: more than calls that hung may bring when they return.
const SERVES: u64 = 12;
/// Load goes on for so long after each event, for what comes late.
const AFTERWARDS: Duration = Duration::from_secs(1);

/// Two scenarios at a time: processors are few, and a watchdog is impatient.
static PLACES: Semaphore = Semaphore::const_new(2);

/// What became of one release.
enum Fate {
    Right,
    /// 503 with `Retry-After`.
    Refused,
    /// An answer that should never be.
    Wrong(String),
    /// No answer, or another refusal.
    Lost(String),
}

struct Told {
    sent: Instant,
    answered: Instant,
    fate: Fate,
}

/// What it takes to ask for a release and to judge the answer.
struct Tenant {
    client: Client,
    request: Vec<u8>,
    key: TransportKey,
    identity: Arc<RsaPrivateKey>,
    owner: Owner,
}

impl Tenant {
    async fn release(self: Arc<Self>) -> Told {
        let sent = Instant::now();
        let reply = self.client.post(ROLL, "application/xml", self.request.clone()).await;
        let answered = Instant::now();
        let fate = match reply {
            Ok(reply) if reply.status == 200 => {
                tokio::task::spawn_blocking(move || self.judge(&reply.body)).await.unwrap()
            }
            Ok(reply) if reply.status == 503 && reply.headers.contains_key("retry-after") => Fate::Refused,
            Ok(reply) => Fate::Lost(format!("{} {}", reply.status, String::from_utf8_lossy(&reply.body))),
            Err(error) => Fate::Lost(error.to_string()),
        };
        Told { sent, answered, fate }
    }

    fn judge(&self, body: &[u8]) -> Fate {
        let (keys, egress_protector) = match open_release(body, &self.identity) {
            Ok(released) => released,
            Err(error) => return Fate::Wrong(error),
        };
        match self.owner.open(&egress_protector) {
            _ if *keys.ingress != *self.key => Fate::Wrong("another ingress key".to_owned()),
            Ok(egress) if *egress != *keys.egress => Fate::Wrong("not the owner's egress key".to_owned()),
            Ok(_) => Fate::Right,
            Err(error) => Fate::Wrong(format!("the egress protector: {error}")),
        }
    }
}

/// Releases at a steady rate, whatever becomes of them.
struct Load {
    ended: Arc<AtomicBool>,
    sending: JoinHandle<Vec<Told>>,
}

impl Load {
    fn begin(tenant: Arc<Tenant>) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let end = ended.clone();
        let sending = tokio::spawn(async move {
            let (mut all, mut ticks) = (JoinSet::new(), tokio::time::interval(Duration::from_secs(1) / RATE));
            while !end.load(Ordering::Relaxed) {
                ticks.tick().await;
                all.spawn(tenant.clone().release());
            }
            all.join_all().await
        });
        Self { ended, sending }
    }

    async fn end(self) -> Vec<Told> {
        self.ended.store(true, Ordering::Relaxed);
        self.sending.await.unwrap()
    }
}

/// A daemon before three servers, under load.
struct Scene {
    remote: Remote,
    daemon: Daemon,
    load: Load,
    /// What happened when.
    events: Vec<(Instant, String)>,
    _lab: Lab,
    _place: SemaphorePermit<'static>,
}

impl Scene {
    async fn begin() -> Self {
        let place = PLACES.acquire().await.unwrap();
        let lab = Lab::make(Options { hsms: 3, vms: 1 });
        lab.configure(|config| {
            config.release.watchdog_ms = 300;
            config.release.deadline_ms = 5_000;
        });
        let remote = lab.behind_servers();
        let daemon = lab.serve();
        daemon.until_ready_is(200).await;
        let health = lab.host(daemon.client()).attest().await.unwrap();
        let (protector, owner) = (lab.protector(), lab.owner());
        let tenant = Tenant {
            client: daemon.client(),
            request: roll_request(&health, &protector),
            key: owner.open(&protector).unwrap(),
            identity: lab.identity(),
            owner,
        };
        let load = Load::begin(Arc::new(tenant));
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

    /// Ends the load and stops the daemon. Every release that was asked for has to be there, and right; but while nobody
    /// served, which may have been for a time, a refusal was right.
    async fn end(self, nobody_served: Option<(Instant, Instant)>) {
        let told = self.load.end().await;
        let begun = Instant::now();
        let status = self.daemon.stop();
        println!("{} releases; the daemon stopped within {} ms", told.len(), begun.elapsed().as_millis());
        for (at, (when, what)) in self.events.iter().enumerate() {
            let until = self.events.get(at + 1).map_or(begun, |(next, _)| *next);
            println!("{what}, {}", sum_up(&told, *when, until));
        }
        // What was under way when the last one died counts as well.
        let may_be_refused =
            |told: &Told| nobody_served.is_some_and(|(from, to)| told.answered >= from && told.sent < to);
        let bad: Vec<String> = told
            .iter()
            .filter_map(|told| {
                let why = match &told.fate {
                    Fate::Right => return None,
                    Fate::Refused if may_be_refused(told) => return None,
                    Fate::Refused => "refused",
                    Fate::Wrong(why) | Fate::Lost(why) => why,
                };
                let after = self.events.iter().rfind(|(when, _)| *when <= told.sent);
                let (when, what) = after.map_or((told.sent, "the first"), |(when, what)| (*when, what.as_str()));
                Some(format!("{what}, +{:?}: {why} after {:?}", told.sent - when, told.answered - told.sent))
            })
            .collect();
        assert!(bad.is_empty(), "{} of {} releases:\n{}", bad.len(), told.len(), bad.join("\n"));
        assert!(status.success(), "{status}");
    }
}

fn sum_up(told: &[Told], from: Instant, to: Instant) -> String {
    let right = told.iter().filter(|told| matches!(told.fate, Fate::Right)).map(|told| told.answered);
    let mut times: Vec<_> = right.filter(|answered| *answered > from && *answered < to).chain([from, to]).collect();
    times.sort();
    let gap = times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default();
    let sent = || told.iter().filter(|told| told.sent >= from && told.sent < to);
    let slowest = sent().map(|told| told.answered - told.sent).max().unwrap_or_default();
    format!(
        "for {} ms: {} asked, {} refused, longest gap {} ms, slowest answer {} ms",
        (to - from).as_millis(),
        sent().count(),
        sent().filter(|told| matches!(told.fate, Fate::Refused)).count(),
        gap.as_millis(),
        slowest.as_millis()
    )
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
    let lab = Lab::make(Options { hsms: 2, vms: 1 });
    let mut remote = lab.behind_servers();
    remote.mute("hsm-a");
    let begun = Instant::now();
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    println!("ready within {} ms", begun.elapsed().as_millis());
    assert!(daemon.stop().success());
}
