//! Tests of overload: hosts are served in turn, hosts above their rate are told so, and the throughput does not drop.

#![allow(clippy::print_stdout)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use claviger::admin;
use claviger_client::host::Host;
use claviger_client::http::{Client, Reply};
use claviger_protocol::batch::{BatchRequest, parse_results};
use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::protector::TransportKey;
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_tests::{
    ALGORITHMS, Daemon, HOST, Lab, Options, PATIENCE, ROLL, open_release, roll_request, stats::median,
};
use data_encoding::BASE64;
use http_body_util::Full;
use hyper::Request;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const BATCH: &str = "/KeyProtection/service/v2.0/RollTransportKeys";
const XML: &str = "application/xml";

/// A host with its health certificate, and a protector that it sends repeatedly.
struct Asker {
    clients: Vec<Client>,
    health: Vec<u8>,
    body: Bytes,
    identity: Arc<RsaPrivateKey>,
    key: Arc<TransportKey>,
}

impl Asker {
    /// Creates a host with this name: the lab's own, or a new one.
    async fn new(lab: &Lab, daemon: &Daemon, name: &str) -> Self {
        let identity = lab.identity();
        let host = if name == HOST {
            lab.host(daemon.client())
        } else {
            let key = tokio::task::spawn_blocking(|| RsaPrivateKey::generate(2048).unwrap()).await.unwrap();
            let public_key = BASE64.encode(key.public().spki_der());
            let command = json!({"command": "hosts.add", "name": name, "public_key": public_key});
            admin::call(&lab.socket(), &command).await.unwrap();
            Host::new(daemon.client(), key, identity.clone())
        };
        let health = host.attest().await.unwrap();
        let protector = lab.protector();
        let body = roll_request(&health, &protector).into();
        let key = Arc::new(lab.owner().open(&protector).unwrap());
        // One client limits its number of connections.
        let clients = (0..8).map(|_| daemon.client()).collect();
        Self { clients, health, body, identity, key }
    }

    async fn ask(&self, turn: usize) -> Reply {
        self.clients[turn % self.clients.len()].post(ROLL, XML, self.body.clone()).await.unwrap()
    }

    /// Returns true if the answer is a release. Checks that any other answer is a valid refusal.
    fn is_released(&self, reply: &Reply) -> bool {
        let Some(code) = refused_with(reply) else {
            let (keys, _) = open_release(&reply.body, &self.identity).unwrap();
            assert!(*keys.ingress == **self.key, "another ingress key");
            return true;
        };
        assert!(matches!(code, Code::TooManyRequests | Code::ServiceUnavailable), "{code:?}");
        false
    }
}

/// Returns the code of a refusal. A refusal with a retryable code must say when to retry.
fn refused_with(reply: &Reply) -> Option<Code> {
    if reply.status == 200 {
        return None;
    }
    let refusal = Refusal::parse(&reply.body).unwrap();
    assert_eq!(reply.status.as_u16(), refusal.code.status());
    if matches!(refusal.code, Code::TooManyRequests | Code::ServiceUnavailable) {
        let seconds: u64 = reply.headers["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=30).contains(&seconds), "come again in {seconds} s");
    }
    Some(refusal.code)
}

fn lab_with(change: impl FnOnce(&mut claviger::config::Release)) -> (Lab, Daemon) {
    let lab = Lab::make(Options::default());
    lab.configure(|config| change(&mut config.release));
    let daemon = lab.serve();
    (lab, daemon)
}

fn milliseconds(times: &[f64]) -> String {
    let worst = times.iter().copied().fold(0.0, f64::max);
    format!("{:.0} ms, at worst {worst:.0}", median(times))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_of_a_host_that_is_removed_gets_nothing() {
    const WAITING: usize = 8;
    let lab = Lab::make(Options::default());
    let faulty = lab.behind_faulty();
    lab.configure(|config| (config.release.watchdog_ms, config.release.concurrency) = (60_000, 1));
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    let host = Arc::new(Asker::new(&lab, &daemon, HOST).await);
    let other = Arc::new(Asker::new(&lab, &daemon, "other").await);

    // One release is at the token, and the others wait.
    faulty.set("hsm-a", &["call=C_Decrypt hang"]);
    let ask = |asker: &Arc<Asker>, turn: usize| {
        let asker = asker.clone();
        tokio::spawn(async move { asker.ask(turn).await })
    };
    let first = ask(&other, 0);
    faulty.until("hsm-a", "a release at the token", |stats| stats.hanging() == 1);
    let waiting: Vec<_> = (0..WAITING).map(|turn| ask(&host, turn)).collect();
    let begun = Instant::now();
    while daemon.metrics().await.sum("claviger_queue_waiting", &[]) != Some(WAITING as f64) {
        assert!(begun.elapsed() < PATIENCE, "the releases do not wait");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    admin::call(&lab.socket(), &json!({"command": "hosts.remove", "name": HOST})).await.unwrap();
    faulty.clear("hsm-a");
    assert!(other.is_released(&first.await.unwrap()));
    for reply in waiting {
        assert_eq!(refused_with(&reply.await.unwrap()), Some(Code::HealthCertificate));
    }
    // The host that is still registered is served.
    assert!(other.is_released(&other.ask(0).await));
    assert!(daemon.stop().success());
    let released =
        |line: &&serde_json::Value| line["event"] == "release" && line["outcome"] == "success" && line["host"] == HOST;
    // Ignores the lab's own checks, which come before the removal.
    let removed = lab.audit().iter().position(|line| line["event"] == "hosts.remove").unwrap();
    assert_eq!(lab.audit()[removed..].iter().filter(released).count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_is_its_hosts_own_to_wait_out() {
    let (lab, daemon) = lab_with(|release| release.queue = 64);
    daemon.until_ready_is(200).await;
    let stormy = Arc::new(Asker::new(&lab, &daemon, HOST).await);
    let polite = Asker::new(&lab, &daemon, "polite").await;

    let over = Arc::new(AtomicBool::new(false));
    let mut storm = JoinSet::new();
    for at in 0..200 {
        let (asker, over) = (stormy.clone(), over.clone());
        storm.spawn(async move {
            let (mut times, mut refused) = (Vec::new(), 0);
            while !over.load(Ordering::Relaxed) {
                let begun = Instant::now();
                let reply = asker.ask(at).await;
                match refused_with(&reply) {
                    None => times.push(begun.elapsed().as_secs_f64() * 1e3),
                    Some(code) => {
                        assert_eq!(code, Code::ServiceUnavailable);
                        refused += 1;
                        // The pause is shorter than the server asked for: this is a storm.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
            (times, refused)
        });
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut times = Vec::new();
    for turn in 0..30 {
        let begun = Instant::now();
        let reply = polite.ask(0).await;
        times.push(begun.elapsed().as_secs_f64() * 1e3);
        assert!(polite.is_released(&reply), "the polite one's {turn} was refused");
    }
    over.store(true, Ordering::Relaxed);
    let (mut storm_times, mut refused) = (Vec::new(), 0);
    for (times, times_refused) in storm.join_all().await {
        storm_times.extend(times);
        refused += times_refused;
    }
    println!("one at a time: {}", milliseconds(&times));
    println!("200 side by side: {}; {} released, {refused} refused", milliseconds(&storm_times), storm_times.len());
    // The order counts, not the clock: the polite host waits for at most one request of the storm, whose own requests wait
    // for each other.
    assert!(median(&times) < median(&storm_times), "the polite one waits for the storm");
    assert!(refused > 0 && !storm_times.is_empty());
    let metrics = daemon.metrics().await;
    let dropped = |reason| metrics.count("claviger_queue_dropped_total", &[("reason", reason)]);
    assert!(dropped("full") > 0);
    assert_eq!(metrics.count("claviger_queue_dropped_total", &[]), refused, "another number of refusals");
    assert_eq!((metrics.count("claviger_releases_running", &[]), metrics.count("claviger_queue_waiting", &[])), (0, 0));
    assert!(daemon.stop().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_asks_too_fast_is_told_so_and_no_other() {
    const BURST: usize = 5;
    const ASKED: usize = 20;
    let (lab, daemon) = lab_with(|release| (release.host_rate, release.host_burst) = (1, BURST as u32));
    daemon.until_ready_is(200).await;
    let hasty = Asker::new(&lab, &daemon, HOST).await;
    let other = Asker::new(&lab, &daemon, "other").await;
    let batcher = Asker::new(&lab, &daemon, "batcher").await;

    let first = Instant::now();
    let begun = first;
    // The number of the burst, plus the tokens that return meanwhile.
    let within_rate = |released: usize| {
        let most = BURST + begun.elapsed().as_secs() as usize + 1;
        assert!((BURST..=most).contains(&released), "{released} released");
    };
    let mut released = 0;
    for turn in 0..ASKED {
        let reply = hasty.ask(turn).await;
        if hasty.is_released(&reply) {
            released += 1;
        } else {
            assert_eq!((reply.status.as_u16(), &reply.headers["retry-after"]), (429, &"1".parse().unwrap()));
        }
    }
    within_rate(released);
    let mut too_many = ASKED - released;
    for turn in 0..BURST {
        assert!(other.is_released(&other.ask(turn).await), "another host's {turn} is refused");
    }

    // Each item of a batch counts, and the items above the rate are refused individually.
    let begun = Instant::now();
    let request = BatchRequest {
        health_certificate: batcher.health.clone(),
        algorithms: ALGORITHMS,
        ingress_protectors: vec![lab.protector(); ASKED],
    };
    let reply = batcher.clients[0].post(BATCH, XML, request.to_xml()).await.unwrap();
    assert_eq!(reply.status, 200);
    let items = parse_results(&reply.body).unwrap();
    assert_eq!(items.len(), ASKED);
    let released = items.iter().take_while(|item| item.is_ok()).count();
    let most = BURST + begun.elapsed().as_secs() as usize + 1;
    assert!((BURST..=most).contains(&released), "{released} of the batch");
    for refusal in items.iter().filter_map(|item| item.as_ref().err()) {
        assert_eq!(refusal.code, Code::TooManyRequests);
        too_many += 1;
    }

    let metrics = daemon.metrics().await;
    let too_many = too_many as u64;
    assert_eq!(metrics.count("claviger_queue_dropped_total", &[("reason", "rate")]), too_many);
    let outcome = [("outcome", Code::TooManyRequests.as_str())];
    assert_eq!(metrics.count("claviger_releases_total", &outcome), too_many);
    assert!(daemon.stop().success());
    let told = lab.audit().iter().filter(|line| line["outcome"] == Code::TooManyRequests.as_str()).count();
    assert_eq!(told as u64, too_many, "the trail tells of another number");
    // The trail takes one line per second for them, not one for each.
    let lines = lab.trail().iter().filter(|line| line["event"] == "refusals").count() as u64;
    assert!(lines <= 2 * (first.elapsed().as_secs() + 2), "{lines} lines");
}

/// Measures the capacity for `time` with callers that wait for their answers; returns releases per second.
async fn capacity(asker: &Arc<Asker>, time: Duration) -> f64 {
    let begun = Instant::now();
    let mut callers = JoinSet::new();
    for at in 0..32 {
        let asker = asker.clone();
        callers.spawn(async move {
            let mut released = 0;
            while begun.elapsed() < time {
                if asker.ask(at).await.status == 200 {
                    released += 1;
                }
            }
            released
        });
    }
    let released: usize = callers.join_all().await.iter().sum();
    released as f64 / begun.elapsed().as_secs_f64()
}

#[tokio::test(flavor = "multi_thread")]
async fn overload_does_not_lessen_what_gets_done() {
    const TIMES: f64 = 5.0;
    const SECONDS: f64 = 4.0;
    let deadline = Duration::from_millis(500);
    let lab = Lab::make(Options::default());
    lab.configure(|config| {
        config.release.deadline_ms = deadline.as_millis() as u64;
        // The token is the bottleneck, not the processors, which refusals and this test also need.
        config.hsm[0].sessions = 1;
    });
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    let asker = Arc::new(Asker::new(&lab, &daemon, HOST).await);
    let _ = capacity(&asker, Duration::from_millis(500)).await;
    let alone = capacity(&asker, Duration::from_secs(2)).await;
    let before = daemon.metrics().await;

    // Open loop: each request is sent when it is due, whatever happened to the others.
    let begun = Instant::now();
    let mut requests = JoinSet::new();
    let offered = (alone * TIMES * SECONDS) as usize;
    for number in 0..offered {
        let due = begun + Duration::from_secs_f64(number as f64 / (alone * TIMES));
        if due > Instant::now() {
            tokio::time::sleep_until(due.into()).await;
        }
        let asker = asker.clone();
        requests.spawn(async move {
            let begun = Instant::now();
            let reply = asker.ask(number).await;
            (begun.elapsed(), reply)
        });
    }
    let offered_in = begun.elapsed().as_secs_f64();
    let answers = requests.join_all().await;
    let took = begun.elapsed().as_secs_f64();
    let after = daemon.metrics().await;
    let again = capacity(&asker, Duration::from_secs(1)).await;
    let capacity = f64::midpoint(alone, again);

    let checking = asker.clone();
    let (released, refused): (Vec<_>, Vec<_>) = tokio::task::spawn_blocking(move || {
        let judged = answers.iter().map(|(time, reply)| (time.as_secs_f64() * 1e3, checking.is_released(reply)));
        judged.partition(|(_, released)| *released)
    })
    .await
    .unwrap();
    let times = |answers: &[(f64, bool)]| answers.iter().map(|(time, _)| *time).collect::<Vec<_>>();
    let goodput = released.len() as f64 / took;
    println!(
        "capacity {alone:.0} a second before, {again:.0} after; offered {:.0} a second for {offered_in:.1} s",
        offered as f64 / offered_in
    );
    println!("goodput {goodput:.0} a second: {:.3} of the capacity", goodput / capacity);
    println!("released {} in {}", released.len(), milliseconds(&times(&released)));
    println!("refused {} in {}", refused.len(), milliseconds(&times(&refused)));
    for reason in ["full", "deadline", "late", "rate", "left"] {
        let count =
            |metrics: &claviger_tests::Metrics| metrics.count("claviger_queue_dropped_total", &[("reason", reason)]);
        println!("dropped {reason}: {}", count(&after) - count(&before));
    }
    assert_eq!(released.len() + refused.len(), offered);
    // In an unoptimised program on a busy machine, refusals alone take a large part of the processor time. But some
    // releases must always succeed.
    assert!(goodput > capacity / 50.0, "{goodput} of {capacity} a second");
    // Admitted releases end in time; the slack is for the network path on a busy machine.
    let slack = Duration::from_secs(10);
    let worst = times(&released).into_iter().fold(0.0, f64::max);
    assert!(worst < (deadline + slack).as_secs_f64() * 1e3, "answered after {worst} ms");
    assert!(daemon.stop().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_went_away_is_not_waited_for() {
    let (lab, daemon) = lab_with(|release| release.concurrency = 1);
    daemon.until_ready_is(200).await;
    let asker = Asker::new(&lab, &daemon, HOST).await;
    let stream = TcpStream::connect(daemon.address()).await.unwrap();
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut requests = JoinSet::new();
    for _ in 0..200 {
        let mut sender = sender.clone();
        let request = Request::post(format!("http://test{ROLL}"))
            .header("content-type", XML)
            .body(Full::new(asker.body.clone()))
            .unwrap();
        requests.spawn(async move { sender.send_request(request).await.map(drop) });
    }
    let begun = Instant::now();
    while daemon.metrics().await.count("claviger_queue_waiting", &[]) < 20 {
        assert!(begun.elapsed() < PATIENCE, "nobody waits");
    }
    connection.abort();
    let _ = connection.await;
    drop(requests);
    loop {
        let metrics = daemon.metrics().await;
        let left = metrics.count("claviger_queue_dropped_total", &[("reason", "left")]);
        if left > 0 && metrics.count("claviger_queue_waiting", &[]) == 0 {
            println!("{left} left");
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "they are waited for");
    }
    assert!(asker.is_released(&asker.ask(0).await), "its place was lost");
    assert!(daemon.stop().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_give_up_lose_their_place() {
    const CALLERS: usize = 40;
    const PATIENT_FOR: Duration = Duration::from_millis(600);
    const TIME: Duration = Duration::from_secs(6);
    let lab = Lab::make(Options::default());
    let faulty = lab.behind_faulty();
    lab.configure(|config| (config.release.concurrency, config.release.host_rate) = (1, 0));
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    let asker = Arc::new(Asker::new(&lab, &daemon, HOST).await);
    // Some ten releases a second are to be had, and every caller gives up long before the daemon's deadline.
    faulty.set("hsm-a", &["call=C_Decrypt delay_ms=100"]);
    let begun = Instant::now();
    let url = Arc::new(daemon.url.clone());
    let mut asking = JoinSet::new();
    for _ in 0..CALLERS {
        let (asker, url) = (Arc::clone(&asker), Arc::clone(&url));
        asking.spawn(async move {
            let mut released = 0;
            while begun.elapsed() < TIME {
                // A connection for each attempt, which is closed with it.
                let client = Client::new(&url).unwrap().with_timeout(PATIENT_FOR);
                match client.post(ROLL, XML, asker.body.clone()).await {
                    Ok(reply) if asker.is_released(&reply) => released += 1,
                    Ok(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                    Err(_) => {}
                }
            }
            released
        });
    }
    let released: usize = asking.join_all().await.into_iter().sum();
    let left = daemon.metrics().await.sum("claviger_queue_dropped_total", &[("reason", "left")]);
    println!("{released} releases in {TIME:?}, {left:?} left the queue");
    // Each caller gives up again and again. Without a look at the connections, none of them would have left the queue.
    assert!(left >= Some(CALLERS as f64), "{left:?} left the queue");
    faulty.clear("hsm-a");
    assert!(daemon.stop().success());
}
