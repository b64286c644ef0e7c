//! Tests of modules that do not come up or die: a fresh worker initialises them, and their members come back. All members
//! use the same library, and a fault in one worker does not affect the others.

use super::{MEMBERS, Stage, USUAL, seconds, until};

/// One member does not come up with the daemon.
async fn one_from_the_start(name: &str, fault: &str) {
    let stage = Stage::open_with(USUAL, |faulty| faulty.set_module("hsm-a", &[fault])).await;
    assert!(stage.daemon.until_ready_is(200).await.body.starts_with(b"ready: hsm-"));
    let load = stage.load();
    seconds(3.0).await;
    assert_eq!(stage.served("hsm-a").await, 0);
    let initialised = |member| stage.faulty.module_stats(member).calls("C_Initialize");
    assert!(initialised("hsm-a") > 1, "it is tried by fresh workers");
    assert_eq!((initialised("hsm-b"), initialised("hsm-c")), (1, 1), "the others are left alone");
    stage.faulty.clear_module("hsm-a");
    let there = stage.until_serves("hsm-a").await;
    println!("{name}: there after {there:.0?}");
    seconds(0.5).await;
    stage.end(name, load).await.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_module_is_not_initialised_at_first() {
    one_from_the_start("C_Initialize fails", "initialize rv=CKR_DEVICE_ERROR").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_module_has_no_slots_at_first() {
    one_from_the_start("no slots", "no_slots").await;
}

/// No member comes up.
async fn all_from_the_start(name: &str, fault: &str) {
    let stage = Stage::open_with(USUAL, |faulty| faulty.set_all_modules(&[fault])).await;
    stage.daemon.until_ready_is(503).await;
    assert_eq!(stage.daemon.probe("/live").await.status, 200);
    let load = stage.load();
    seconds(2.0).await;
    let report = load.stop().await;
    assert_eq!((report.right(), report.wrong().len()), (0, 0), "{}", report.line());
    println!("{name}: refusals {}", report.line());
    stage.faulty.clear_all();
    let begun = std::time::Instant::now();
    stage.daemon.until_ready_is(200).await;
    println!("{name}: ready after {:.0?}", begun.elapsed());
    let load = stage.load();
    for member in MEMBERS {
        stage.until_serves(member).await;
    }
    stage.end(name, load).await.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_module_is_initialised_at_first() {
    all_from_the_start("C_Initialize fails everywhere", "initialize rv=CKR_DEVICE_ERROR").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_module_has_slots_at_first() {
    all_from_the_start("no slots anywhere", "no_slots").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_module_dies() {
    let stage = Stage::open(USUAL).await;
    let load = stage.load();
    seconds(1.0).await;
    stage.faulty.set_module("hsm-b", &["dead"]);
    stage.until_closed("hsm-b", 1).await;
    seconds(2.0).await;
    stage.faulty.clear_module("hsm-b");
    let back = stage.until_serves("hsm-b").await;
    println!("one module dies: back after {back:.0?}");
    assert!(stage.renewals("hsm-b").await > 0);
    for other in ["hsm-a", "hsm-c"] {
        assert_eq!(stage.closings(other).await, 0, "{other} is a member of the same library");
    }
    stage.end("one module dies", load).await.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn all_modules_die() {
    let stage = Stage::open(USUAL).await;
    let load = stage.load();
    seconds(1.0).await;
    stage.faulty.set_all_modules(&["dead"]);
    stage.daemon.until_ready_is(503).await;
    seconds(1.0).await;
    stage.faulty.clear_all();
    let mut back = Vec::new();
    for member in MEMBERS {
        back.push(stage.until_serves(member).await);
    }
    println!("all modules die: all are back after {:.0?}", back.iter().sum::<std::time::Duration>());
    let before = load.take();
    println!("all modules die: {}", before.line());
    assert_eq!(before.wrong().len(), 0, "{}", before.line());
    seconds(1.0).await;
    stage.end("all modules are back", load).await.assert_all_right();
}

/// All workers together try a wrong PIN once. A second try could lock the token.
async fn pin(how: &str) {
    let fault = format!("pin={how}");
    let stage = Stage::open_with(USUAL, |faulty| faulty.set("hsm-a", &[&fault])).await;
    let load = stage.load();
    seconds(3.0).await;
    let tried = stage.faulty.stats("hsm-a").calls("C_Login");
    assert_eq!(tried, 1, "pin={how}");
    // Only one try when a token loses its login under load.
    let before = stage.faulty.stats("hsm-b").calls("C_Login");
    stage.faulty.set("hsm-b", &[&fault, "stale=login"]);
    until("hsm-b is out", async || stage.daemon.process.output().matches("REFUSES THE PIN").count() == 2).await;
    seconds(2.0).await;
    let served = stage.served("hsm-b").await;
    seconds(0.5).await;
    assert_eq!(stage.served("hsm-b").await, served);
    let stats = stage.faulty.stats("hsm-b");
    assert_eq!((stats.calls("C_Login"), stats.faults("rv")), (before + 1, 1), "pin={how}");
    // No further try when the worker is killed or has already ended, which does not change the token's answer.
    stage.kill_worker("hsm-b");
    seconds(2.0).await;
    assert_eq!(stage.faulty.stats("hsm-b").calls("C_Login"), before + 1, "pin={how}");
    assert_eq!(stage.daemon.process.output().matches("REFUSES THE PIN").count(), 2);
    // No further try when the configuration is reloaded with the same PIN.
    stage.daemon.process.hang_up();
    seconds(1.0).await;
    assert_eq!(stage.faulty.stats("hsm-a").calls("C_Login"), tried, "pin={how}");
    // The token was unlocked, and an administrator says so: both members may try the PIN once.
    for member in ["hsm-a", "hsm-b"] {
        stage.faulty.clear(member);
        let config = stage.lab.config_file();
        let probed = claviger_tests::run(["hsm", "probe", member, "--config", config.to_str().unwrap()]);
        assert!(probed.status.success(), "{}", claviger_tests::said(&probed));
    }
    stage.until_serves("hsm-a").await;
    stage.until_serves("hsm-b").await;
    stage.end(&format!("pin={how}"), load).await.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_is_incorrect() {
    pin("incorrect").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_is_locked() {
    pin("locked").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_has_expired() {
    pin("expired").await;
}
