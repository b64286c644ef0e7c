//! Tests of calls that hang: other members serve their callers, their workers are killed, and fresh workers come up by
//! themselves.

use super::{Setup, Stage, USUAL, seconds, until};

const SETUP: Setup = Setup { watchdog_ms: 500, ..USUAL };
/// Tolerance for threads that the runtime starts and ends for blocking work. No thread of the daemon hangs.
const MORE_THREADS: u64 = 8;

async fn hang(name: &str, fault: &str, time: f64) {
    let stage = Stage::open(SETUP).await;
    let load = stage.load();
    seconds(1.0).await;
    let before = stage.daemon.process.status("Threads");
    stage.faulty.set("hsm-b", &[fault]);
    stage.until_closed("hsm-b", 1).await;
    let mut most = 0;
    for _ in 0..(time * 10.0) as u64 {
        seconds(0.1).await;
        most = most.max(stage.daemon.process.status("Threads"));
    }
    let stats = stage.faulty.stats("hsm-b");
    let (hung, hanging, processes) = (stats.faults("hang"), stats.hanging(), stats.processes());
    println!("{name}: {before} threads before, at most {most} meanwhile");
    println!("{name}: {hung} calls of {processes} processes hung, {hanging} hang");
    assert!(hung > 0, "nothing hangs");
    assert!(processes > 1, "the worker is still the first one");
    // Killed workers are gone: the worker under test has at most its sessions and a login.
    assert!(hanging <= SETUP.sessions as u64 + 1, "{hanging} calls hang");
    assert!(most <= before + MORE_THREADS, "{most} threads, of {before}");
    stage.faulty.clear("hsm-b");
    let back = stage.until_serves("hsm-b").await;
    until("nothing hangs", async || stage.faulty.stats("hsm-b").hanging() == 0).await;
    assert!(stage.renewals("hsm-b").await > 0);
    println!("{name}: back after {back:.0?}, {} calls were stuck", {
        stage.count("claviger_hsm_stuck_calls_total", "hsm-b", &[]).await
    });
    stage.end(name, load).await.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn decryptions_hang() {
    hang("C_Decrypt hangs", "call=C_Decrypt hang", 4.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn signatures_hang() {
    hang("C_Sign hangs", "call=C_Sign hang", 12.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_hangs() {
    hang("all calls hang", "call=* hang", 6.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_and_new_sessions_hang() {
    // Open sessions continue; the hang affects new sessions.
    let stage = Stage::open(SETUP).await;
    let load = stage.load();
    seconds(1.0).await;
    stage.faulty.set("hsm-b", &["call=C_OpenSession,C_Login hang", "stale=sessions"]);
    seconds(4.0).await;
    stage.faulty.clear("hsm-b");
    let back = stage.until_serves("hsm-b").await;
    println!("C_OpenSession and C_Login hang: back after {back:.0?}");
    stage.end("C_OpenSession and C_Login hang", load).await.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn short_hangs_are_no_hangs() {
    let stage = Stage::open(Setup { watchdog_ms: 5_000, ..USUAL }).await;
    let load = stage.load();
    for turn in 0..20 {
        let member = if turn % 2 == 0 { "hsm-a" } else { "hsm-c" };
        stage.faulty.set(member, &["call=C_Decrypt,C_Sign hang"]);
        seconds(0.05).await;
        stage.faulty.clear(member);
        seconds(0.15).await;
    }
    println!("hangs of 50 ms: {} calls", stage.faulty.stats("hsm-a").faults("hang"));
    for member in ["hsm-a", "hsm-c"] {
        assert_eq!(stage.faulty.stats(member).processes(), 1, "the worker of {member} was killed");
    }
    assert_eq!(stage.closings("hsm-a").await + stage.closings("hsm-c").await, 0);
    stage.end("hangs of 50 ms", load).await.assert_all_right();
}

/// A member that hangs when the daemon starts delays no request for long.
#[tokio::test(flavor = "multi_thread")]
async fn one_hangs_from_the_start() {
    let stage = Stage::open_with(SETUP, |faulty| faulty.set("hsm-a", &["call=* hang"])).await;
    let load = stage.load();
    seconds(2.0).await;
    stage.faulty.clear("hsm-a");
    let back = stage.until_serves("hsm-a").await;
    println!("hangs from the start: there after {back:.0?}");
    stage.end("hangs from the start", load).await.assert_all_right();
}
