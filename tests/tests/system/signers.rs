//! Tests of administrators' work with attestation signers: list, rotate, revoke, and the immediate effect on hosts.

use claviger_client::host::{Host, HostError};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::payload::ApiVersion;
use claviger_tests::{Administrator, Daemon, HOST, Lab, Options, ROLL, block, roll_request, run, said, until_attested};
use serde_json::{Value, json};

fn signers(administrator: &Administrator<'_>) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let listed = administrator.json(&["signers", "list"]);
    listed.as_array().unwrap().iter().map(|s| (text(&s["state"]), text(&s["thumbprint"]))).collect()
}

fn states(administrator: &Administrator<'_>) -> Vec<String> {
    signers(administrator).into_iter().map(|(state, _)| state).collect()
}

fn current(administrator: &Administrator<'_>) -> String {
    let found = signers(administrator).into_iter().find(|(state, _)| state == "current");
    found.expect("a current signer").1
}

fn release(host: &Host, health: &[u8], lab: &Lab) -> Result<(), HostError> {
    block(host.roll(ApiVersion::V2, health, &lab.protector())).map(drop)
}

fn refused(host: &Host, health: &[u8], lab: &Lab) {
    let error = release(host, health, lab).expect_err("a release with what a revoked signer issued").to_string();
    assert!(error.contains("403 HealthCertificateException"), "{error}");
}

/// Serves a lab; returns the daemon, its host with a health certificate, and the signer that issued it.
fn begin(lab: &Lab) -> (Daemon, Host, Vec<u8>, String) {
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    let host = lab.host(daemon.client());
    let health = until_attested(&host);
    let signer = current(&Administrator(lab));
    (daemon, host, health, signer)
}

/// Returns the signers that the service publishes.
fn published(client: &claviger_client::http::Client) -> Vec<u8> {
    block(client.get("/attestation/v2.0/signingcertificates")).unwrap().body.to_vec()
}

fn contains(all: &[u8], part: &[u8]) -> bool {
    all.windows(part.len()).any(|window| window == part)
}

#[test]
fn a_revoked_signer_is_refused_at_once_and_hosts_find_their_way() {
    let lab = Lab::make(Options::default());
    let (daemon, host, first_health, first) = begin(&lab);
    let (administrator, client) = (Administrator(&lab), daemon.client());
    release(&host, &first_health, &lab).unwrap();

    // After a rotation both signers are valid.
    let rotated = administrator.json(&["signers", "rotate"]);
    let second = current(&administrator);
    assert_eq!(rotated, json!({"current": second, "replaced": first}));
    assert_ne!(first, second);
    let second_health = block(host.attest()).unwrap();
    for health in [&first_health, &second_health] {
        release(&host, health, &lab).unwrap();
    }
    let listed = administrator.json(&["signers", "list"]);
    let [now, before] = listed.as_array().unwrap().as_slice() else { panic!("{listed}") };
    assert_eq!((&now["trusted_until"], &now["replaced"]), (&Value::Null, &Value::Null));
    let lifetime = before["trusted_until"].as_i64().unwrap() - before["replaced"].as_i64().unwrap();
    assert_eq!(lifetime, claviger_protocol::health::LIFETIME_SECONDS);
    assert_ne!(now["hsm_key"], before["hsm_key"], "a new signer has a new key");

    // The previous signer is revoked. Its certificate is cached, because it was used a moment ago.
    let revoked = administrator.json(&["signers", "revoke", &first[..8]]);
    assert_eq!(revoked, json!({"revoked": [first], "current": second, "made": false, "warnings": []}));
    refused(&host, &first_health, &lab);
    release(&host, &second_health, &lab).unwrap();
    assert_eq!(states(&administrator), ["current", "revoked"]);
    assert!(administrator.fault(&["signers", "revoke", &first]).contains("is revoked already"));

    // If the issuing signer is revoked, a new one is created first, so that hosts can attest.
    let second_der = published(&client);
    let said_so = said(&administrator.run(&["signers", "revoke", &second]));
    let third = current(&administrator);
    assert!(said_so.contains(&format!("{second} are refused")) && said_so.contains(&third), "{said_so}");
    for health in [&first_health, &second_health] {
        refused(&host, health, &lab);
    }
    let third_health = block(host.attest()).unwrap();
    release(&host, &third_health, &lab).unwrap();
    assert_eq!(states(&administrator), ["current", "revoked", "revoked"]);
    let published = published(&client);
    assert_ne!(published, second_der);
    let of_third = Certificate::parse(&third_health).unwrap();
    assert!(contains(&published, of_third.issuer_der()), "the new one is published");
    let of_second = Certificate::parse(&second_health).unwrap();
    assert!(!contains(&published, of_second.issuer_der()), "a revoked one is not");

    // The same after a restart.
    assert!(daemon.stop().success());
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    let host = lab.host(daemon.client());
    refused(&host, &second_health, &lab);
    release(&host, &third_health, &lab).unwrap();
    for bad in ["123", "zzzzzzzz", "0123456789"] {
        let fault = administrator.fault(&["signers", "revoke", bad]);
        assert!(fault.contains("first 8 digits") || fault.contains("there is no attestation signer"), "{fault}");
    }
    assert!(daemon.stop().success());

    // Each change has two lines: one before it is made, and one with the outcome.
    let trail = lab.audit();
    let lines: Vec<_> = trail
        .iter()
        .filter(|line| line["event"].as_str().is_some_and(|event| event.starts_with("signers.")))
        .map(|line| [&line["event"], &line["outcome"], &line["certificate"]].map(|v| v.as_str().unwrap().to_owned()))
        .collect();
    let pair = |event: &str, certificate: &str| {
        ["requested", "success"].map(|outcome| [event, outcome, certificate].map(str::to_owned))
    };
    let expected = [
        pair("signers.rotate", &first),
        pair("signers.revoke", &first),
        pair("signers.rotate", &second),
        pair("signers.revoke", &second),
    ];
    assert_eq!(lines, expected.concat());
    assert!(trail.iter().any(|line| line["event"] == "release" && line["host"] == HOST));
}

#[test]
fn the_host_command_attests_again_by_itself() {
    let lab = Lab::make(Options::default());
    let (daemon, _, _, signer) = begin(&lab);
    let file = |name: &str| lab.file(name).display().to_string();
    let unwrap = |egress: &str| {
        let (folder, protector) = (file("host"), file("tenant/vm-0001.protector.xml"));
        let files = ["--protector", &protector, "--egress", &file(egress), "--key-file", &file("keys.bin")];
        let output = run(["host", "unwrap", "--dir", &folder, "--url", &daemon.url].into_iter().chain(files));
        assert!(output.status.success(), "{}", said(&output));
    };
    unwrap("one.xml");
    let kept = std::fs::read(lab.file("host/health.pem")).unwrap();
    Administrator(&lab).json(&["signers", "revoke", &signer]);
    std::fs::remove_file(lab.file("keys.bin")).unwrap();
    unwrap("two.xml");
    assert_ne!(std::fs::read(lab.file("host/health.pem")).unwrap(), kept, "a new health certificate");
    assert!(daemon.stop().success());
}

#[test]
fn an_import_does_not_bring_a_revoked_signer_back() {
    let lab = Lab::make(Options::default());
    let (daemon, host, health, thumbprint) = begin(&lab);
    let administrator = Administrator(&lab);
    let (export, passphrase) = (lab.file("export.age"), lab.file("passphrase"));
    std::fs::write(&passphrase, "correct horse battery staple").unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&passphrase, std::fs::Permissions::from_mode(0o600)).unwrap();
    let [export, passphrase] = [&export, &passphrase].map(|path| path.to_str().unwrap());
    administrator.json(&["export", export, "--passphrase-file", passphrase]);
    administrator.json(&["signers", "revoke", &thumbprint]);
    let second = current(&administrator);
    let imported = administrator.json(&["import", export, "--passphrase-file", passphrase, "--yes"]);
    let skipped = imported["skipped"].as_array().unwrap();
    let named = |text: &Value| text.as_str().unwrap().contains(&format!("{thumbprint} is revoked here"));
    assert_eq!((skipped.iter().filter(|text| named(text)).count(), &imported["changes"]), (1, &json!([])));
    assert_eq!(current(&administrator), second);
    refused(&host, &health, &lab);
    assert!(daemon.stop().success());
}

#[test]
fn without_a_new_signer_nothing_is_revoked_unless_forced() {
    let lab = Lab::make(Options::default());
    let faulty = lab.behind_faulty();
    let (daemon, host, health, thumbprint) = begin(&lab);
    let administrator = Administrator(&lab);
    faulty.set("hsm-a", &["call=C_GenerateKeyPair rv=CKR_DEVICE_MEMORY"]);
    let fault = administrator.fault(&["signers", "revoke", &thumbprint]);
    assert!(fault.contains("was not revoked") && fault.contains("--force"), "{fault}");
    assert_eq!(current(&administrator), thumbprint);
    release(&host, &health, &lab).unwrap();
    let forced = administrator.json(&["signers", "revoke", &thumbprint, "--force"]);
    assert_eq!((&forced["revoked"], &forced["current"]), (&json!([thumbprint]), &Value::Null));
    assert!(forced["warnings"][0].as_str().unwrap().contains("no host can attest"), "{forced}");
    refused(&host, &health, &lab);
    let error = block(host.attest()).unwrap_err().to_string();
    assert!(error.contains("503 UnavailableErrorReply"), "{error}");
    // The daemon creates a new signer as soon as it can.
    faulty.clear("hsm-a");
    let health = until_attested(&host);
    release(&host, &health, &lab).unwrap();
    assert!(daemon.stop().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_waits_for_an_hsm_does_not_leave_after_its_signer_was_revoked() {
    let lab = Lab::make(Options::default());
    let faulty = lab.behind_faulty();
    lab.configure(|config| (config.release.watchdog_ms, config.release.concurrency) = (60_000, 1));
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    let administrator = Administrator(&lab);
    let health = lab.host(daemon.client()).attest().await.unwrap();
    let issuer = current(&administrator);
    let body = roll_request(&health, &lab.protector());
    faulty.set("hsm-a", &["call=C_Decrypt hang"]);
    let client = daemon.client();
    let asked = tokio::spawn(async move { client.post(ROLL, "application/xml", body).await.unwrap() });
    faulty.until("hsm-a", "a release at the token", |stats| stats.hanging() == 1);
    administrator.json(&["signers", "revoke", &issuer]);
    faulty.clear("hsm-a");
    let reply = asked.await.unwrap();
    assert_eq!(reply.status, 403, "keys left");
    let released = |line: &Value| line["event"] == "release" && line["outcome"] == "success";
    assert!(!lab.audit().iter().skip_while(|line| line["event"] != "signers.revoke").any(released));
    assert!(daemon.stop().success());
}
