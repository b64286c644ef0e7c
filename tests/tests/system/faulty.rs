//! Tests of the daemon with tokens that misbehave: each fault affects the right member.

use std::fs;
use std::path::Path;
use std::process::Command;

use claviger::config::PinSource;
use claviger_faulty_token::{CONTROL_VARIABLE, MODULE_VARIABLE};
use claviger_protocol::payload::ApiVersion;
use claviger_tests::{Administrator, Daemon, Lab, Options, claviger, until};

async fn release(daemon: &Daemon, lab: &Lab, times: usize) {
    let host = lab.host(daemon.client());
    let health = host.attest().await.unwrap();
    for _ in 0..times {
        host.roll(ApiVersion::V2, &health, &lab.protector()).await.unwrap();
    }
}

/// `[env]` and the member's own `env` configure each worker, even if all members use the same library.
#[tokio::test(flavor = "multi_thread")]
async fn faults_reach_their_member() {
    let lab = Lab::make(Options { hsms: 2, vms: 1, ..Options::default() });
    let faulty = lab.behind_faulty();
    let config = lab.config();
    assert_eq!(config.hsm[0].module, config.hsm[1].module);
    assert_ne!(config.hsm[0].env, config.hsm[1].env);
    faulty.set("hsm-a", &["call=C_Decrypt rv=CKR_DEVICE_ERROR"]);
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    release(&daemon, &lab, 10).await;
    let ill = faulty.until("hsm-a", "a decryption on hsm-a", |stats| stats.faults("rv") > 0);
    assert_eq!(ill.faults("rv"), ill.calls("C_Decrypt"));
    let well = faulty.until("hsm-b", "ten decryptions on hsm-b", |stats| stats.calls("C_Decrypt") >= 10);
    assert_eq!(well.faults("rv"), 0);
    assert_eq!((well.calls("C_Login"), well.hanging(), well.processes()), (1, 0, 1));
    faulty.clear_all();
    until("hsm-a comes up", || {
        let members = Administrator(&lab).json(&["hsm", "list"]);
        (members[0]["state"] == "up").then_some(())
    });
    release(&daemon, &lab, 10).await;
    assert!(faulty.stats("hsm-a").processes() > 1, "hsm-a came up with the worker that failed");
    assert!(daemon.stop().success());
    for member in ["hsm-a", "hsm-b"] {
        // Every process logged in at most once and was finalised, unless it was killed for its faults.
        let (token, module) = (faulty.stats(member), faulty.module_stats(member));
        assert_eq!((token.sessions(), module.in_progress()), (0, 0), "{member}");
        assert_eq!(module.calls("C_Initialize"), module.processes(), "{member}");
        assert!(token.calls("C_Login") <= module.processes(), "{member}");
        assert!((1..=module.processes()).contains(&module.calls("C_Finalize")), "{member}");
    }
    assert_eq!(faulty.module_stats("hsm-b").calls("C_Finalize"), 1);
}

/// A worker's environment is the daemon's, overridden by `[env]` and then by the member's own, and without any PIN.
#[tokio::test(flavor = "multi_thread")]
async fn a_workers_environment_is_the_daemons_and_the_configurations() {
    const PIN: &str = "CLAVIGER_TEST_PIN";
    let lab = Lab::make(Options::default());
    let faulty = lab.behind_faulty();
    let (mut real, mut pin) = (None, None);
    lab.configure(|config| {
        let hsm = &mut config.hsm[0];
        real = hsm.env.remove(MODULE_VARIABLE);
        pin = hsm.pin.file().map(Path::to_owned);
        hsm.pin = PinSource::Env(PIN.to_owned());
        assert!(hsm.env.contains_key(CONTROL_VARIABLE) && config.env.contains_key("SOFTHSM2_CONF"));
        config.env.insert(CONTROL_VARIABLE.to_owned(), "/nowhere".to_owned());
    });
    let mut command = Command::new(claviger());
    command.arg("serve").arg("--config").arg(lab.config_file()).env(MODULE_VARIABLE, real.unwrap());
    command.env("SOFTHSM2_CONF", "/nowhere").env(CONTROL_VARIABLE, "/nowhere");
    let daemon = Daemon::start(command.env(PIN, fs::read_to_string(pin.unwrap()).unwrap().trim()));
    daemon.until_ready_is(200).await;
    release(&daemon, &lab, 1).await;
    faulty.until("hsm-a", "a decryption", |stats| stats.calls("C_Decrypt") > 0);
    // Only root can read its memory.
    let worker = Administrator(&lab).worker("hsm-a").unwrap();
    if let Ok(environment) = fs::read_to_string(format!("/proc/{}/environ", worker.as_raw_nonzero())) {
        assert!(environment.contains(MODULE_VARIABLE) && !environment.contains(PIN), "{environment}");
    }
    assert!(daemon.stop().success());
}
