//! What a token forgets is made anew in place: callers notice nothing, and no member is closed for it.

use claviger_tests::Instances;

use super::{MEMBERS, Setup, Stage, USUAL, seconds};

const KINDS: [&str; 4] = ["stale=sessions", "stale=one-session", "stale=login", "stale=objects"];

async fn go_stale(instances: Instances, members: &[&str], name: &str) {
    let stage = Stage::open(Setup { instances, ..USUAL }).await;
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
        assert_eq!(stage.closings(member).await, 0, "{member} was closed");
        let retries = stage.count("claviger_hsm_retries_total", member, &[]).await;
        assert_eq!(retries, 0, "what {member} was asked was tried elsewhere");
    }
    stage.end(name, load).await.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_member_goes_stale() {
    go_stale(Instances::Own, &["hsm-b"], "one goes stale").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_members_go_stale_at_once() {
    go_stale(Instances::Own, &MEMBERS, "all go stale").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_members_of_a_shared_instance_go_stale_at_once() {
    go_stale(Instances::Shared, &MEMBERS, "all go stale, shared instance").await;
}
