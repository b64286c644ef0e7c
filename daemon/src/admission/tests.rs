#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::task::{JoinSet, yield_now};

use super::*;
use crate::attempt::Caller;

fn admission(change: impl FnOnce(&mut Release)) -> Admission {
    let mut release = Release { concurrency: 1, deadline_ms: 60_000, host_rate: 0, ..Release::default() };
    change(&mut release);
    Admission::new(&release, 1)
}

fn attempt() -> Attempt {
    Attempt::new("0".repeat(16))
}

/// Lets other tasks go on until so many wait.
async fn until_waiting(admission: &Admission, waiting: usize) {
    while admission.load().waiting != waiting {
        yield_now().await;
    }
}

#[test]
fn concurrency_follows_the_sessions() {
    let concurrency = |set, sessions| {
        let release = Release { concurrency: set, ..Release::default() };
        let admission = Admission::new(&release, sessions);
        let mut queue = admission.room.lock();
        let deadline = Instant::now() + Duration::from_secs(60);
        let arrive = |queue: &mut Queue<Waiter>| queue.arrive("a", deadline, oneshot::channel().0, Instant::now());
        while matches!(arrive(&mut queue), Arrival::Runs) {}
        queue.running()
    };
    assert_eq!([(0, 1), (0, 8), (0, 20), (3, 20)].map(|(set, sessions)| concurrency(set, sessions)), [16, 16, 40, 3]);
}

#[tokio::test]
async fn more_sessions_let_more_run_at_once() {
    let admission = Arc::new(admission(|_| {}));
    let _first = admission.admit("a", &attempt()).await.unwrap();
    let of = admission.clone();
    let second = tokio::spawn(async move { of.admit("b", &attempt()).await });
    until_waiting(&admission, 1).await;
    admission.resize(&Release { concurrency: 0, ..Release::default() }, 20);
    let _second = second.await.unwrap().unwrap();
    assert_eq!(admission.load(), Load { running: 2, waiting: 0 });
}

#[tokio::test]
async fn a_permit_goes_to_the_next_one() {
    let admission = Arc::new(admission(|_| {}));
    let first = admission.admit("a", &attempt()).await.unwrap();
    let of = admission.clone();
    let second = tokio::spawn(async move { of.admit("b", &attempt()).await });
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
    let permit = admission.admit("a", &attempt()).await.unwrap();
    // Its future is dropped.
    let of = admission.clone();
    let waiting = tokio::spawn(async move { of.admit("a", &attempt()).await.map(drop) });
    until_waiting(&admission, 1).await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    assert_eq!(admission.load().waiting, 0);
    // Its caller is gone.
    let (caller, present) = Caller::new();
    let of = admission.clone();
    let waiting = tokio::spawn(async move { of.admit("a", &attempt().asked_by(caller)).await.map(drop) });
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
    let permit = admission.admit("a", &attempt()).await.unwrap();
    let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(attempt_in(&admission))).collect();
    for future in &mut waiting {
        assert!(std::future::poll_fn(|cx| std::task::Poll::Ready(future.as_mut().poll(cx).is_pending())).await);
    }
    // The first one has the permit in its hands when it is dropped.
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
    admission.admit("a", &attempt()).await
}

#[tokio::test]
async fn refusals_say_why_and_when_to_come_again() {
    let limited = admission(|release| (release.host_rate, release.host_burst) = (1, 2));
    for _ in 0..2 {
        limited.within_rate("a").unwrap();
    }
    let refusal = limited.within_rate("a").unwrap_err();
    assert_eq!((refusal.code, refusal.retry_after), (Code::TooManyRequests, Some(1)));
    assert_eq!(limited.outlook("a", &attempt()).unwrap_err().code, Code::TooManyRequests);
    for _ in 0..2 {
        limited.outlook("b", &attempt()).unwrap();
        limited.within_rate("b").unwrap();
    }

    let full = Arc::new(admission(|release| (release.queue, release.deadline_ms) = (1, 300)));
    let permit = full.admit("a", &attempt()).await.unwrap();
    let begun = Instant::now();
    let of = full.clone();
    let waiting = tokio::spawn(async move { of.admit("a", &attempt()).await.map(drop) });
    until_waiting(&full, 1).await;
    assert_eq!(full.outlook("a", &attempt()).unwrap_err().code, Code::ServiceUnavailable);
    let refusal = full.admit("a", &attempt()).await.err().unwrap();
    assert_eq!((refusal.code, refusal.retry_after), (Code::ServiceUnavailable, Some(1)));
    // The other one waits in vain, but not for ever.
    let refusal = waiting.await.unwrap().unwrap_err();
    assert_eq!((refusal.code, refusal.retry_after), (Code::ServiceUnavailable, Some(1)));
    assert!(begun.elapsed() >= Duration::from_millis(200));
    assert_eq!(full.load(), Load { running: 1, waiting: 0 });
    drop(permit);
}

/// Counts those that run, which may end in the middle.
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
                let Ok(_permit) = admission.admit(&host, &attempt).await else { return };
                let _running = Running::new(&running);
                for _ in 0..number % 5 {
                    yield_now().await;
                }
            };
            if number % 3 == 0 {
                // Goes away at any moment while it waits.
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
    let admission = Admission::new(&release, 1);
    let asks = |times: usize| (0..times).filter(|_| admission.within_rate("a").is_ok()).count();
    assert_eq!(asks(3), 2);
    // What has nothing to do with the rate leaves the buckets as they are.
    release.deadline_ms = 1_234;
    admission.change(&release);
    assert_eq!((asks(1), admission.limits.load().deadline), (0, Duration::from_millis(1_234)));
    release.host_burst = 5;
    admission.change(&release);
    assert_eq!(asks(6), 5);
    release.host_rate = 0;
    admission.change(&release);
    assert_eq!(asks(100), 100);
}
