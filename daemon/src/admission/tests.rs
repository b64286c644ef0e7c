#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::oneshot;
use tokio::task::{JoinSet, yield_now};

use super::fair_queue::{Arrival, Queue};
use super::turns::Waiter;
use claviger_protocol::error::Code;

use super::*;
use crate::config::{Attest, Release, Server};
use crate::request::Caller;

/// What the callers of these tests ask for.
const ASKED: &[u8] = b"a request";

fn config(release: Release) -> Config {
    Config { release, ..Config::default() }
}

fn admission(change: impl FnOnce(&mut Release)) -> Admission {
    let mut release = Release { concurrency: 1, host_rate: 0, ..Release::default() };
    change(&mut release);
    Admission::new(&config(release), 1)
}

/// A host without a known address.
fn at(host: &str) -> HostAt {
    HostAt::new(host, &attempt())
}

/// The host at an address.
fn from(host: &str, address: &str) -> (HostAt, Attempt) {
    let attempt = attempt().sent_from(Some(address.parse().unwrap()));
    (HostAt::new(host, &attempt), attempt)
}

fn attempt() -> Attempt {
    attempt_within(Duration::from_secs(60))
}

fn attempt_within(time: Duration) -> Attempt {
    let mut attempt = Attempt::new("0".repeat(16));
    attempt.answer_within(time);
    attempt
}

/// Lets other tasks run until this many requests wait.
async fn until_waiting(admission: &Admission, waiting: usize) {
    while admission.load().waiting != waiting {
        yield_now().await;
    }
}

#[test]
fn concurrency_follows_the_sessions() {
    let concurrency = |set, sessions| {
        let release = Release { concurrency: set, ..Release::default() };
        let admission = Admission::new(&config(release), sessions);
        let mut queue = admission.releases.0.lock();
        let deadline = Instant::now() + Duration::from_secs(60);
        let arrive = |queue: &mut Queue<Waiter>| queue.arrive(&at("a"), deadline, oneshot::channel().0, Instant::now());
        while matches!(arrive(&mut queue), Arrival::Runs) {}
        queue.running()
    };
    assert_eq!([(0, 1), (0, 8), (0, 20), (3, 20)].map(|(set, sessions)| concurrency(set, sessions)), [16, 16, 40, 3]);
}

#[tokio::test]
async fn more_sessions_let_more_run_at_once() {
    let admission = Arc::new(admission(|_| {}));
    let _first = admission.admit(&at("a"), &attempt(), ASKED).await.unwrap();
    let of = admission.clone();
    let second = tokio::spawn(async move { of.admit(&at("b"), &attempt(), ASKED).await });
    until_waiting(&admission, 1).await;
    admission.resize(&config(Release { concurrency: 0, ..Release::default() }), 20);
    let _second = second.await.unwrap().unwrap();
    assert_eq!(admission.load(), Load { running: 2, waiting: 0 });
}

#[tokio::test]
async fn a_permit_goes_to_the_next_one() {
    let admission = Arc::new(admission(|_| {}));
    let first = admission.admit(&at("a"), &attempt(), ASKED).await.unwrap();
    let of = admission.clone();
    let second = tokio::spawn(async move { of.admit(&at("b"), &attempt(), ASKED).await });
    until_waiting(&admission, 1).await;
    assert_eq!(admission.load(), Load { running: 1, waiting: 1 });
    drop(first);
    let second = second.await.unwrap().unwrap();
    assert_eq!(admission.load(), Load { running: 1, waiting: 0 });
    drop(second);
    assert_eq!(admission.load(), Load { running: 0, waiting: 0 });
}

#[tokio::test]
async fn who_goes_away_leaves_its_place() {
    let admission = Arc::new(admission(|_| {}));
    let permit = admission.admit(&at("a"), &attempt(), ASKED).await.unwrap();
    // Its future is dropped.
    let of = admission.clone();
    let waiting = tokio::spawn(async move { of.admit(&at("a"), &attempt(), ASKED).await.map(drop) });
    until_waiting(&admission, 1).await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    assert_eq!(admission.load().waiting, 0);
    // Its client has disconnected.
    let (caller, present) = Caller::new();
    let of = admission.clone();
    let waiting = tokio::spawn(async move { of.admit(&at("a"), &attempt().asked_by(caller), ASKED).await.map(drop) });
    until_waiting(&admission, 1).await;
    drop(present);
    assert_eq!(waiting.await.unwrap().unwrap_err().code, Code::ServiceUnavailable);
    assert_eq!(admission.load(), Load { running: 1, waiting: 0 });
    drop(permit);
    assert_eq!(admission.load(), Load { running: 0, waiting: 0 });
}

#[tokio::test]
async fn a_permit_for_somebody_who_just_went_away_is_not_lost() {
    let admission = Arc::new(admission(|_| {}));
    let permit = admission.admit(&at("a"), &attempt(), ASKED).await.unwrap();
    let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(attempt_in(&admission))).collect();
    for future in &mut waiting {
        assert!(std::future::poll_fn(|cx| std::task::Poll::Ready(future.as_mut().poll(cx).is_pending())).await);
    }
    // The first one has received the permit when it is dropped.
    drop(permit);
    assert_eq!(admission.load(), Load { running: 1, waiting: 2 });
    drop(waiting.remove(0));
    assert_eq!(admission.load(), Load { running: 1, waiting: 1 });
    let permit = waiting.remove(0).await.unwrap();
    drop(waiting);
    assert_eq!(admission.load(), Load { running: 1, waiting: 0 });
    drop(permit);
    assert_eq!(admission.load(), Load { running: 0, waiting: 0 });
}

async fn attempt_in(admission: &Admission) -> Result<Permit, Refusal> {
    admission.admit(&at("a"), &attempt(), ASKED).await
}

#[tokio::test]
async fn refusals_say_why_and_when_to_come_again() {
    let limited = admission(|release| (release.host_rate, release.host_burst) = (1, 2));
    for _ in 0..2 {
        limited.within_rate(&at("a")).unwrap();
    }
    let refusal = limited.within_rate(&at("a")).unwrap_err();
    assert_eq!((refusal.code, refusal.retry_after), (Code::TooManyRequests, Some(1)));
    assert_eq!(limited.outlook(&at("a"), &attempt(), ASKED).unwrap_err().code, Code::TooManyRequests);
    for _ in 0..2 {
        limited.outlook(&at("b"), &attempt(), ASKED).unwrap();
        limited.within_rate(&at("b")).unwrap();
    }

    let full = Arc::new(admission(|release| release.queue = 1));
    let permit = full.admit(&at("a"), &attempt(), ASKED).await.unwrap();
    let begun = Instant::now();
    let of = full.clone();
    let short = attempt_within(Duration::from_millis(300));
    let waiting = tokio::spawn(async move { of.admit(&at("a"), &short, ASKED).await.map(drop) });
    until_waiting(&full, 1).await;
    assert_eq!(full.outlook(&at("a"), &attempt(), ASKED).unwrap_err().code, Code::ServiceUnavailable);
    let refusal = full.admit(&at("a"), &attempt(), ASKED).await.err().unwrap();
    assert_eq!((refusal.code, refusal.retry_after), (Code::ServiceUnavailable, Some(1)));
    // The other one is refused at its deadline.
    let refusal = waiting.await.unwrap().unwrap_err();
    assert_eq!((refusal.code, refusal.retry_after), (Code::ServiceUnavailable, Some(1)));
    assert!(begun.elapsed() >= Duration::from_millis(200));
    assert_eq!(full.load(), Load { running: 1, waiting: 0 });
    drop(permit);
}

/// Counts running requests, which may be cancelled at any time.
struct Running<'a>(&'a AtomicUsize);

impl<'a> Running<'a> {
    fn new(running: &'a AtomicUsize) -> Self {
        assert!(running.fetch_add(1, Ordering::SeqCst) < 4, "more than may run");
        Self(running)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_at_once_come_and_go_and_no_place_is_lost() {
    let admission = Arc::new(admission(|release| (release.concurrency, release.queue) = (4, 64)));
    let running = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for number in 0..2000_usize {
        let (admission, running) = (admission.clone(), running.clone());
        tasks.spawn(async move {
            let host = format!("host-{}", number % 7);
            let attempt = attempt();
            let work = async {
                let Ok(_permit) = admission.admit(&at(&host), &attempt, ASKED).await else { return };
                let _running = Running::new(&running);
                for _ in 0..number % 5 {
                    yield_now().await;
                }
            };
            if number % 3 == 0 {
                // The client may disconnect at any time while the request waits.
                tokio::select! {
                    biased;
                    () = work => {}
                    () = async { for _ in 0..number % 11 { yield_now().await; } } => {}
                }
            } else {
                work.await;
            }
        });
        if number % 16 == 0 {
            yield_now().await;
        }
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(admission.load(), Load { running: 0, waiting: 0 });
}

#[test]
fn limits_change_while_hosts_ask() {
    let mut release = Release { host_rate: 1, host_burst: 2, ..Release::default() };
    let admission = Admission::new(&config(release.clone()), 1);
    let asks = |times: usize| (0..times).filter(|_| admission.within_rate(&at("a")).is_ok()).count();
    assert_eq!(asks(3), 2);
    // Changes of other settings do not affect the buckets.
    release.queue = 17;
    admission.change(&config(release.clone()));
    assert_eq!((asks(1), admission.limits().waiting), (0, 17));
    release.host_burst = 5;
    admission.change(&config(release.clone()));
    assert_eq!(asks(6), 5);
    release.host_rate = 0;
    admission.change(&config(release.clone()));
    assert_eq!(asks(100), 100);
}

#[test]
fn a_host_pays_for_nothing_that_is_sent_from_elsewhere() {
    let admission = admission(|release| (release.host_rate, release.host_burst) = (1, 10));
    let (host, _) = from("a", "192.0.2.1");
    for thief in ["192.0.2.2", "2001:db8::1"] {
        let (thief, _) = from("a", thief);
        let granted = (0..1000).filter(|_| admission.within_rate(&thief).is_ok()).count();
        assert!((10..=12).contains(&granted), "{granted}");
        admission.charge_decryptions(&thief, 1_000_000);
    }
    let granted = (0..1000).filter(|_| admission.within_rate(&host).is_ok()).count();
    assert!((10..=12).contains(&granted), "{granted}");
    // All addresses of one /64 count as one sender.
    let (neighbour, _) = from("a", "2001:db8::2");
    assert!(admission.within_rate(&neighbour).is_err());
}

#[test]
fn what_fails_before_a_decryption_is_paid_from_a_bucket_of_its_own() {
    let admission = admission(|release| {
        (release.host_rate, release.host_burst, release.refused_rate, release.refused_burst) = (1, 10, 1, 100);
    });
    let fails = |times: usize| {
        (0..times)
            .filter(|_| {
                let let_in = admission.within_rate(&at("a")).is_ok();
                if let_in {
                    admission.failed_early(&at("a"), 10_000, Work::default());
                }
                let_in
            })
            .count()
    };
    assert_eq!(fails(100), 100);
    // The tokens for releases are all left; only now failures are charged to them.
    let granted = fails(1000);
    assert!((10..=13).contains(&granted), "{granted}");
    assert!(admission.within_rate(&at("a")).is_err());
}

#[test]
fn a_protector_is_charged_by_its_bytes_and_its_keys() {
    let mut work = Work::default();
    assert_eq!(tokens(13_000, work), 1);
    assert_eq!(tokens(512 * 1024, work), 9);
    // Four parties with 4096-bit keys and known certificates: the guardian signature and four encryptions.
    let key =
        |bits: usize| claviger_protocol::rsa_key::RsaPublicKey::from_components(&vec![0xff; bits / 8], &[1, 0, 1]);
    (0..5).for_each(|_| work.add(&key(4096).unwrap()));
    assert_eq!(tokens(13_000, work), 1);
    (0..52).for_each(|_| work.add(&key(7168).unwrap()));
    assert_eq!(tokens(200_000, work), 24);
    // The cost is charged in full, even if the bucket holds fewer tokens.
    let admission = admission(|release| (release.host_rate, release.host_burst) = (1, 20));
    admission.within_rate(&at("a")).unwrap();
    admission.charge(&at("a"), 200_000, work);
    let refusal = admission.within_rate(&at("a")).unwrap_err();
    assert_eq!((refusal.code, refusal.retry_after), (Code::TooManyRequests, Some(5)));
}

#[test]
fn strangers_are_limited_by_their_address_and_attesting_hosts_by_theirs() {
    let admission = Admission::new(
        &Config {
            server: Server { stranger_rate: 1, stranger_burst: 10, ..Server::default() },
            attest: Attest { host_rate: 1, host_burst: 2, ..Attest::default() },
            ..Config::default()
        },
        40,
    );
    assert_eq!(admission.attestations.limits().running, 5);
    let (host, stranger) = from("a", "192.0.2.1");
    let (elsewhere, other) = from("a", "192.0.2.2");
    for _ in 0..10 {
        admission.stranger_may_ask(&stranger).unwrap();
        admission.charge_stranger(&stranger, 100, Work::default());
    }
    let declined = admission.stranger_may_attest(&stranger).unwrap_err();
    assert_eq!(declined, Declined { reason: Dropped::Address, retry_after: 1 });
    admission.stranger_may_ask(&other).unwrap();
    // Without an address, no bucket can be charged.
    admission.charge_stranger(&attempt(), usize::MAX, Work::default());
    admission.stranger_may_ask(&attempt()).unwrap();

    for _ in 0..2 {
        admission.attestation_within_rate(&host).unwrap();
    }
    assert_eq!(admission.attestation_within_rate(&host).unwrap_err().reason, Dropped::Rate);
    admission.attestation_within_rate(&elsewhere).unwrap();
    // Releases have a separate rate.
    admission.within_rate(&host).unwrap();
}

#[tokio::test]
async fn attestations_wait_for_their_share_and_keep_no_release_waiting() {
    let admission = Arc::new(admission(|release| release.concurrency = 1));
    let first = admission.attestation_turn(&at("a"), &attempt(), ASKED).await.unwrap();
    let of = admission.clone();
    let second = tokio::spawn(async move { of.attestation_turn(&at("b"), &attempt(), ASKED).await });
    while admission.attestations.load().waiting != 1 {
        yield_now().await;
    }
    let _release = admission.admit(&at("c"), &attempt(), ASKED).await.unwrap();
    assert!(!second.is_finished());
    drop(first);
    let _second = second.await.unwrap().unwrap();
}

#[test]
fn releases_are_looked_at_early_while_some_are_refused() {
    let admission = admission(|release| (release.host_rate, release.host_burst) = (1, 1));
    assert!(!admission.is_pressed());
    admission.within_rate(&at("a")).unwrap();
    assert!(!admission.is_pressed());
    admission.within_rate(&at("a")).unwrap_err();
    assert!(admission.is_pressed());
}

#[test]
fn first_steps_have_a_bucket_of_their_own() {
    let attest = Attest { host_rate: 1, host_burst: 2, ..Attest::default() };
    let config = Config { attest, ..Config::default() };
    let admission = Admission::new(&config, 40);
    let (host, elsewhere) = (from("a", "192.0.2.1").0, from("a", "192.0.2.2").0);
    assert_eq!([(); 3].map(|()| admission.may_begin(&host)), [true, true, false]);
    // Unchanged settings do not refill the burst.
    admission.change(&config);
    assert!(!admission.may_begin(&host));
    assert!(admission.may_begin(&elsewhere));
    admission.attestation_within_rate(&host).unwrap();
}

#[tokio::test]
async fn strangers_take_turns_by_address_and_none_waits_for_longer_than_it_may() {
    let admission = Arc::new(admission(|release| release.queue = 100));
    assert_eq!(admission.strangers.limits().running, strangers::concurrency());
    admission.strangers.set_concurrency(1);
    let first = admission.strangers_turn(&attempt(), ASKED).await.unwrap();
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut all = JoinSet::new();
    let mut arrive = |address: &'static str| {
        let (admission, order) = (admission.clone(), order.clone());
        let (_, attempt) = from("", address);
        all.spawn(async move {
            let turn = admission.strangers_turn(&attempt, ASKED).await;
            let _turn = turn.map_err(|declined| declined.reason)?;
            order.lock().unwrap().push(address);
            Ok::<_, Dropped>(())
        });
    };
    // One address sends more than the queue takes.
    (0..150).for_each(|_| arrive("192.0.2.1"));
    while admission.strangers.load().waiting != 100 {
        yield_now().await;
    }
    arrive("192.0.2.2");
    for _ in 0..10 {
        yield_now().await;
    }
    // Nor does anybody wait for longer than a request may.
    let late = admission.strangers_turn(&attempt_within(Duration::from_millis(1)), ASKED).await;
    assert_eq!(late.err().unwrap().reason, Dropped::Deadline);
    drop(first);
    let refused: Vec<_> = all.join_all().await.into_iter().filter_map(Result::err).collect();
    let order = order.lock().unwrap();
    assert!(order[..2].contains(&"192.0.2.2"), "another address was served after many of the first");
    assert_eq!(refused.len() + order.len(), 151);
    assert!(refused.len() >= 51 && refused.iter().all(|reason| *reason == Dropped::Full), "{refused:?}");
}
