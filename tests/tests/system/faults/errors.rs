//! Tests of members that fail at once: the others serve, and a member is used again as soon as it works.

use std::time::Instant;

use claviger_tests::openloop::Answer;

use super::{MEMBERS, RETURN, Setup, Stage, USUAL, seconds, until};

/// Runs the faults one after the other, on one member after the other.
async fn one_after_the_other(name: &str, faults: &[&[&str]]) {
    let stage = Stage::open(USUAL).await;
    let load = stage.load();
    seconds(0.5).await;
    for (fault, member) in faults.iter().zip(MEMBERS.iter().cycle()) {
        let kind = if fault[0].starts_with("absent") { "absent" } else { "rv" };
        let before = stage.faulty.stats(member).faults(kind);
        stage.faulty.set(member, fault);
        stage.until_faults(member, kind, before + 1).await;
        seconds(1.5).await;
        stage.faulty.clear(member);
        let back = stage.until_serves(member).await;
        println!("{name} {fault:?}: {member} is back after {back:.0?}, {} closings", stage.closings(member).await);
    }
    stage.end(name, load).await.assert_all_right();
}

/// A member whose calls all fail goes down. It then gets only probes, from one fresh worker after the other.
#[tokio::test(flavor = "multi_thread")]
async fn what_fails_is_closed_and_probed() {
    let stage = Stage::open(USUAL).await;
    let load = stage.load();
    seconds(0.5).await;
    stage.faulty.set("hsm-a", &["call=* rv=CKR_DEVICE_ERROR"]);
    stage.until_closed("hsm-a", 1).await;
    let (served, before) = (stage.served("hsm-a").await, stage.faulty.stats("hsm-a"));
    stage.until_faults("hsm-a", "rv", before.faults("rv") + 3).await;
    let processes = before.processes();
    until("a probe by a fresh worker", async || stage.faulty.stats("hsm-a").processes() > processes).await;
    assert_eq!(stage.served("hsm-a").await, served);
    stage.faulty.clear("hsm-a");
    let back = stage.until_serves("hsm-a").await;
    println!("closed and probed: back after {back:.0?}");
    assert_eq!(stage.closings("hsm-b").await + stage.closings("hsm-c").await, 0);
    stage.end("closed and probed", load).await.assert_all_right();
}

const FAULTS: [&[&str]; 6] = [
    &["call=* rv=CKR_DEVICE_ERROR"],
    &["call=* rv=CKR_DEVICE_REMOVED"],
    &["call=* rv=CKR_GENERAL_ERROR"],
    &["absent"],
    &["absent rv=CKR_DEVICE_REMOVED"],
    &["call=* rv=CKR_TOKEN_NOT_PRESENT"],
];

#[tokio::test(flavor = "multi_thread")]
async fn errors_of_one_member() {
    one_after_the_other("errors", &FAULTS).await;
}

/// Some calls always fail and others never do: the successes must not hide the failures.
#[tokio::test(flavor = "multi_thread")]
async fn one_operation_fails() {
    let faults: [&[&str]; 3] = [
        &["call=C_Sign rv=CKR_DEVICE_ERROR"],
        &["call=C_Decrypt rv=CKR_GENERAL_ERROR"],
        &["call=C_DecryptInit rv=CKR_FUNCTION_FAILED"],
    ];
    let stage = Stage::open(USUAL).await;
    let load = stage.load();
    for (fault, member) in faults.iter().zip(MEMBERS) {
        stage.faulty.set(member, fault);
        stage.until_faults(member, "rv", 2).await;
        stage.faulty.clear(member);
        let back = stage.until_serves(member).await;
        println!("{fault:?}: {} closings, back after {back:.0?}", stage.closings(member).await);
    }
    stage.end("one operation fails", load).await.assert_all_right();
}

/// The keys or mechanisms of one token do not permit what the others do: the member must not attract the traffic because it
/// fails fast.
#[tokio::test(flavor = "multi_thread")]
async fn one_member_cannot_use_its_keys() {
    let faults: [&[&str]; 2] = [
        &["call=C_DecryptInit,C_SignInit rv=CKR_KEY_FUNCTION_NOT_PERMITTED"],
        &["call=C_DecryptInit,C_SignInit rv=CKR_MECHANISM_INVALID"],
    ];
    let stage = Stage::open(USUAL).await;
    let load = stage.load();
    for (fault, member) in faults.iter().zip(MEMBERS) {
        stage.faulty.set(member, fault);
        stage.until_closed(member, 1).await;
        seconds(2.0).await;
        stage.faulty.clear(member);
        stage.until_serves(member).await;
    }
    stage.end("one cannot use its keys", load).await.assert_all_right();
}

/// The number of failures stays below the limit that takes a member down: each is retried on another member.
async fn now_and_then(name: &str, fault: &str) {
    let stage = Stage::open(USUAL).await;
    let load = stage.load();
    for member in MEMBERS {
        stage.faulty.set(member, &[fault]);
    }
    seconds(3.0).await;
    for member in MEMBERS {
        stage.until_faults(member, "rv", 2).await;
    }
    stage.faulty.clear_all();
    for member in MEMBERS {
        stage.until_serves(member).await;
    }
    stage.end(name, load).await.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn now_and_then_an_error() {
    let fault = "call=C_Decrypt,C_Sign rv=CKR_DEVICE_ERROR every=15";
    now_and_then("every 15th call fails everywhere", fault).await;
}

/// The error that some tokens return for a bad ciphertext, and others when they are overloaded.
#[tokio::test(flavor = "multi_thread")]
async fn now_and_then_an_error_that_may_be_the_callers() {
    let fault = "call=C_Decrypt rv=CKR_FUNCTION_FAILED every=8";
    now_and_then("every 8th C_Decrypt fails everywhere", fault).await;
}

async fn all_gone(setup: Setup, name: &str, fault: &str) {
    let stage = Stage::open(setup).await;
    let load = stage.load();
    seconds(1.0).await;
    let begun = Instant::now();
    MEMBERS.iter().for_each(|member| stage.faulty.set(member, &[fault]));
    stage.daemon.until_ready_is(503).await;
    assert_eq!(stage.daemon.probe("/live").await.status, 200);
    // Until then a release waits for a member that has just gone down.
    seconds(RETURN.as_secs_f64()).await;
    let gone = Instant::now();
    seconds(3.0).await;
    let cleared = Instant::now();
    stage.faulty.clear_all();
    for member in MEMBERS {
        stage.until_serves(member).await;
    }
    let back = Instant::now();
    stage.daemon.until_ready_is(200).await;
    seconds(1.0).await;
    let report = stage.end(name, load).await;
    assert_eq!(report.wrong(), [&Answer::Right; 0]);
    let (before, rest) = report.split(gone);
    let first = before.samples.iter().find(|sample| sample.end < begun && sample.answer != Answer::Right);
    assert_eq!(first.map(|sample| &sample.answer), None);
    let (meanwhile, rest) = rest.split(cleared);
    let (coming, after) = rest.split(back);
    assert!(meanwhile.samples.iter().all(|sample| sample.answer == Answer::Refused { retry_after: true }));
    assert!(meanwhile.quantile(1.0).as_secs() < 1, "refusals take {:?}", meanwhile.quantile(1.0));
    println!("{name}: refusals {}", meanwhile.line());
    println!("{name}: all are back after {:.0?}: {}", back - cleared, coming.line());
    after.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn all_members_are_absent() {
    all_gone(USUAL, "all absent", "absent").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_members_fail() {
    all_gone(USUAL, "all fail", "call=* rv=CKR_DEVICE_ERROR").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_members_hang() {
    all_gone(Setup { watchdog_ms: 500, ..USUAL }, "all hang", "call=* hang").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_of_three_are_broken_in_different_ways() {
    let stage = Stage::open(Setup { watchdog_ms: 500, ..USUAL }).await;
    let load = stage.load();
    seconds(1.0).await;
    stage.faulty.set("hsm-a", &["call=C_Decrypt,C_Sign hang"]);
    stage.faulty.set("hsm-c", &["call=* rv=CKR_DEVICE_ERROR"]);
    stage.until_closed("hsm-a", 1).await;
    stage.until_closed("hsm-c", 1).await;
    seconds(3.0).await;
    stage.faulty.clear_all();
    until("hsm-a hangs no more", async || stage.faulty.stats("hsm-a").hanging() == 0).await;
    for member in ["hsm-a", "hsm-c"] {
        stage.until_serves(member).await;
        assert!(stage.renewals(member).await > 0, "{member} has its first worker");
    }
    stage.end("one hangs, one fails", load).await.assert_all_right();
}
