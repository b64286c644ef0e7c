//! Tests of members that are slow or accept few calls at once: work goes to the members that do it.

use super::{MEMBERS, Setup, Stage, USUAL, seconds, until};

/// Returns each member's share of the next decryptions.
async fn shares(stage: &Stage, decryptions: u64) -> [f64; 3] {
    let counts = || MEMBERS.map(|member| stage.faulty.stats(member).calls("C_Decrypt"));
    let before = counts();
    let wanted = before.iter().sum::<u64>() + decryptions;
    until("many decryptions", async || counts().iter().sum::<u64>() >= wanted).await;
    let after = counts();
    let calls = [0, 1, 2].map(|at| (after[at] - before[at]) as f64);
    calls.map(|calls_of_one| calls_of_one / calls.iter().sum::<f64>())
}

async fn slow(name: &str, stage: Stage, fault: &str, most: f64) {
    let load = stage.load();
    seconds(0.5).await;
    stage.faulty.set("hsm-b", &[fault]);
    let [a, b, c] = shares(&stage, 150).await;
    println!("{name}: shares {a:.2} {b:.2} {c:.2}");
    assert!(b < most, "the slow member has {b:.2} of the calls");
    stage.faulty.clear("hsm-b");
    stage.until_serves("hsm-b").await;
    let [a, b, c] = shares(&stage, 50).await;
    println!("{name}: shares afterwards {a:.2} {b:.2} {c:.2}");
    assert_eq!(stage.closings("hsm-b").await, 0);
    stage.end(name, load).await.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_member_is_slow() {
    let stage = Stage::open(USUAL).await;
    // An operation takes two or three calls.
    let delay = stage.usual.as_millis().clamp(4, 40) * 5;
    slow("always slow", stage, &format!("call=* delay_ms={delay}"), 0.2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_member_is_slow_now_and_then() {
    let stage = Stage::open(USUAL).await;
    slow("1 in 20 takes 300 ms", stage, "call=C_Decrypt,C_Sign delay_ms=300 every=20", 0.3).await;
}

/// The token reports its limit of sessions or only refuses more; in both cases the daemon uses what it gets and logs it
/// once.
async fn few_sessions(name: &str, faults: &[&str]) {
    let stage = Stage::open_with(Setup { sessions: 8, ..USUAL }, |faulty| faulty.set("hsm-a", faults)).await;
    // The load now needs more than two sessions.
    let slow = stage.slow(1.5);
    // The limit is always set: otherwise the worker opens as many sessions as it can.
    stage.faulty.set("hsm-a", &[faults, &[&slow]].concat());
    MEMBERS.iter().filter(|member| **member != "hsm-a").for_each(|member| stage.faulty.set(member, &[&slow]));
    let load = stage.load();
    let lines = || {
        let said = stage.daemon.process.output();
        said.lines().filter(|line| line.contains("fewer sessions")).map(str::to_owned).collect::<Vec<_>>()
    };
    until("the daemon says that it has few sessions", async || !lines().is_empty()).await;
    seconds(4.0).await;
    stage.until_serves("hsm-a").await;
    println!("{name}: {:?}", lines());
    assert_eq!(lines().len(), 1, "{:?}", lines());
    assert!(lines()[0].contains("hsm-a"));
    assert!(stage.faulty.stats("hsm-a").sessions() <= 2);
    assert_eq!(stage.closings("hsm-a").await, 0);
    stage.end(name, load).await.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_gives_fewer_sessions_than_asked_for() {
    few_sessions("two sessions of eight", &["max_sessions=2"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_says_how_few_sessions_it_gives() {
    few_sessions("two sessions of eight, as advertised", &["max_sessions=2", "advertise_sessions=2"]).await;
}

/// More concurrent calls than the token accepts: refused operations succeed on another member, or on the same one a moment
/// later.
async fn throttled(name: &str, fault: &str) {
    let stage = Stage::open(USUAL).await;
    let load = stage.load();
    let slow = stage.slow(2.0);
    MEMBERS.iter().for_each(|member| stage.faulty.set(member, &[&slow]));
    // With few sessions the daemon would never exceed the limit.
    until("many sessions are open", async || stage.faulty.stats("hsm-a").sessions() >= 4).await;
    stage.faulty.set("hsm-a", &[&slow, fault]);
    seconds(2.0).await;
    stage.until_faults("hsm-a", "throttle", 3).await;
    let stats = stage.faulty.stats("hsm-a");
    println!(
        "{name}: {} of {} calls refused, {} operations tried elsewhere, {} closings",
        stats.faults("throttle"),
        stats.calls("C_Decrypt") + stats.calls("C_Sign"),
        stage.count("claviger_hsm_retries_total", "hsm-a", &[]).await,
        stage.closings("hsm-a").await
    );
    stage.faulty.clear_all();
    let back = stage.until_serves("hsm-a").await;
    println!("{name}: back after {back:.0?}");
    stage.end(name, load).await.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_throttled() {
    throttled("throttled", "throttle=2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_throttled_token_says_that_an_operation_is_active() {
    throttled("throttled, CKR_OPERATION_ACTIVE", "throttle=2 rv=CKR_OPERATION_ACTIVE").await;
}
