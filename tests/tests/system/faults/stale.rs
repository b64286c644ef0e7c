//! Tests of state that a token loses: the worker renews it in place, callers see no error, and no member goes down.

use claviger_tests::openloop::Answer;

use super::{MEMBERS, Setup, Stage, USUAL, seconds};

const KINDS: [&str; 4] = ["stale=sessions", "stale=one-session", "stale=login", "stale=objects"];

async fn go_stale(members: &[&str], name: &str) {
    let stage = Stage::open(USUAL).await;
    let load = stage.load();
    seconds(0.5).await;
    for kind in KINDS {
        for member in members {
            stage.faulty.set(member, &[kind]);
        }
        for member in members {
            stage.until_serves(member).await;
            stage.faulty.clear(member);
        }
        seconds(0.7).await;
    }
    for member in members {
        let stats = stage.faulty.stats(member);
        println!("{name}: {member}: {} things went stale, {} logins", stats.faults("stale"), stats.calls("C_Login"));
        assert!(stats.faults("stale") >= KINDS.len() as u64);
    }
    for member in MEMBERS {
        assert_eq!(stage.faulty.stats(member).processes(), 1, "{member} got a fresh worker");
        assert_eq!(stage.closings(member).await, 0, "{member} was closed");
        let retries = stage.count("claviger_hsm_retries_total", member, &[]).await;
        assert_eq!(retries, 0, "what {member} was asked was tried elsewhere");
    }
    stage.end(name, load).await.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_member_goes_stale() {
    go_stale(&["hsm-b"], "one goes stale").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_members_go_stale_at_once() {
    go_stale(&MEMBERS, "all go stale").await;
}

/// The token answers slowly while all sessions are renewed: their searches for keys run at the same time, so no call takes
/// longer than the watchdog allows.
#[tokio::test(flavor = "multi_thread")]
async fn all_sessions_of_a_slow_token_go_stale_at_once() {
    let stage = Stage::open(Setup { members: 1, sessions: 8, ..USUAL }).await;
    let load = stage.load();
    seconds(0.5).await;
    let before = stage.faulty.stats("hsm-a").calls("C_GetAttributeValue");
    stage.faulty.set("hsm-a", &["stale=sessions", "call=C_GetAttributeValue delay_ms=250"]);
    stage.until_faults("hsm-a", "stale", 1).await;
    seconds(7.0).await;
    let back = stage.until_serves("hsm-a").await;
    let calls = stage.faulty.stats("hsm-a").calls("C_GetAttributeValue") - before;
    println!("all sessions of a slow token: {calls} slow calls, serves after {back:.0?}");
    stage.faulty.clear("hsm-a");
    seconds(0.5).await;
    assert_eq!(stage.faulty.stats("hsm-a").processes(), 1, "a fresh worker");
    assert_eq!(stage.closings("hsm-a").await, 0);
    // Releases may be refused meanwhile, since they would wait for long.
    let report = stage.end("all sessions of a slow token", load).await;
    assert_eq!(report.wrong(), [&Answer::Right; 0]);
}
