//! Modules that do not come up, or die: they are initialised anew, and their members come back.

use claviger_tests::{FaultyMembers, Instances};

use super::{MEMBERS, Setup, Stage, USUAL, seconds, until};

/// One instance does not come up with the daemon.
async fn one_from_the_start(name: &str, fault: &str) {
    let stage = Stage::open_with(USUAL, |faulty| faulty.set_module("hsm-a", &[fault])).await;
    assert!(stage.daemon.until_ready_is(200).await.body.starts_with(b"ready: hsm-"));
    let load = stage.load();
    seconds(3.0).await;
    assert_eq!(stage.served("hsm-a").await, 0);
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

/// No instance does.
async fn all_from_the_start(name: &str, setup: Setup, fault: &str) {
    let break_all = |faulty: &FaultyMembers| MEMBERS.iter().for_each(|member| faulty.set_module(member, &[fault]));
    let stage = Stage::open_with(setup, break_all).await;
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
    all_from_the_start("C_Initialize fails everywhere", USUAL, "initialize rv=CKR_DEVICE_ERROR").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shared_module_is_not_initialised_at_first() {
    let setup = Setup { instances: Instances::Shared, ..USUAL };
    all_from_the_start("C_Initialize of all fails", setup, "initialize rv=CKR_DEVICE_ERROR").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shared_module_has_no_slots_at_first() {
    all_from_the_start("no slots for all", Setup { instances: Instances::Shared, ..USUAL }, "no_slots").await;
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
    assert!(stage.count("claviger_hsm_modules_renewed_total", "hsm-b", &[]).await > 0);
    stage.end("one module dies", load).await.assert_all_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shared_module_dies() {
    let stage = Stage::open(Setup { instances: Instances::Shared, ..USUAL }).await;
    let load = stage.load();
    seconds(1.0).await;
    stage.faulty.set_module("hsm-a", &["dead"]);
    stage.daemon.until_ready_is(503).await;
    seconds(1.0).await;
    stage.faulty.clear_module("hsm-a");
    let mut back = Vec::new();
    for member in MEMBERS {
        back.push(stage.until_serves(member).await);
    }
    println!("the shared module dies: all are back after {:.0?}", back.iter().sum::<std::time::Duration>());
    let before = load.take();
    println!("the shared module dies: {}", before.line());
    assert_eq!(before.wrong().len(), 0, "{}", before.line());
    seconds(1.0).await;
    stage.end("the shared module is back", load).await.assert_all_right();
}

/// The PIN is tried once. Again would lock the token.
async fn pin(how: &str) {
    let fault = format!("pin={how}");
    let stage = Stage::open_with(USUAL, |faulty| faulty.set("hsm-a", &[&fault])).await;
    let load = stage.load();
    seconds(3.0).await;
    let tried = stage.faulty.stats("hsm-a").calls("C_Login");
    assert_eq!(tried, 1, "pin={how}");
    // Nor when one is lost in the middle of it.
    stage.faulty.set("hsm-b", &[&fault, "stale=login"]);
    until("hsm-b is out", async || stage.daemon.process.output().matches("REFUSES THE PIN").count() == 2).await;
    seconds(2.0).await;
    let served = stage.served("hsm-b").await;
    seconds(0.5).await;
    assert_eq!(stage.served("hsm-b").await, served);
    let stats = stage.faulty.stats("hsm-b");
    assert_eq!((stats.calls("C_Login"), stats.faults("rv")), (2, 1), "pin={how}");
    assert_eq!(stage.daemon.process.output().matches("REFUSES THE PIN").count(), 2);
    // Nor when the configuration is reloaded and has the same one.
    stage.daemon.process.hang_up();
    seconds(1.0).await;
    assert_eq!(stage.faulty.stats("hsm-a").calls("C_Login"), tried, "pin={how}");
    // The token was unlocked, and an administrator says so: both may try it, once.
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
