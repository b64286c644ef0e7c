//! Tests that a withdrawal by an administrator takes effect while an HSM works: nothing that was granted before is
//! released.

use std::path::Path;

use claviger_protocol::batch::{BatchRequest, parse_results};
use claviger_protocol::error::{Code, Refusal};
use claviger_tests::{ALGORITHMS, Administrator, Daemon, FaultyMembers, HOST, Lab, Options, ROLL, roll_request, said};
use serde_json::Value;

const BATCH: &str = "/KeyProtection/service/v2.0/RollTransportKeys";
const XML: &str = "application/xml";

/// A lab with one slow token and long time limits.
fn slow() -> (Lab, FaultyMembers, Daemon) {
    let lab = Lab::make(Options::default());
    let faulty = lab.behind_faulty();
    lab.configure(|config| (config.release.watchdog_ms, config.release.concurrency) = (60_000, 1));
    let daemon = lab.serve();
    (lab, faulty, daemon)
}

/// Counts the lines of the trail with these values, from line `from` on.
fn lines(lab: &Lab, from: usize, event: &str, outcome: &str) -> usize {
    let of = |line: &&Value| line["event"] == event && line["outcome"] == outcome;
    lab.audit()[from..].iter().filter(of).count()
}

/// Makes a second key of this kind primary; returns the thumbprint of the first one.
fn replaced(administrator: &Administrator<'_>, kind: &str) -> String {
    let keys = administrator.json(&["keys", "list"]);
    let first = keys.as_array().unwrap().iter().find(|key| key["kind"] == kind && key["primary"] == true).unwrap();
    let first = first["thumbprint"].as_str().unwrap().to_owned();
    let made = administrator.json(&["keys", "generate", "--kind", kind, "--bits", "2048"]);
    let file = administrator.0.file(&format!("{kind}.pem"));
    let text = Path::to_str(&file).unwrap();
    let id = made["hsm_key"].as_str().unwrap();
    let signed = administrator.run(&["keys", "self-sign", "--hsm-key", id, "--subject", "lab", "--out", text]);
    assert!(signed.status.success(), "{}", said(&signed));
    let added = administrator.json(&["keys", "add", "--kind", kind, "--certificate", text]);
    administrator.json(&["keys", "set-primary", added["thumbprint"].as_str().unwrap()]);
    first
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_withdrawn_while_a_release_is_at_the_hsm_does_not_leave() {
    let (lab, faulty, daemon) = slow();
    daemon.until_ready_is(200).await;
    let administrator = Administrator(&lab);
    let [encryption, signing] = ["encryption", "signing"].map(|kind| replaced(&administrator, kind));
    let health = lab.host(daemon.client()).attest().await.unwrap();
    let body = roll_request(&health, &lab.protector());

    let cases: [(&[&str], &[&str], Code); 5] = [
        (&["keys", "disable", &encryption], &["keys", "enable", &encryption], Code::InvalidWrapping),
        (&["keys", "disable", &signing], &["keys", "enable", &signing], Code::InvalidWrapping),
        (
            &["keys", "limit", &encryption, "--label", "x"],
            &["keys", "limit", &encryption, "--none"],
            Code::InvalidWrapping,
        ),
        (&["hosts", "disable", HOST], &["hosts", "enable", HOST], Code::HealthCertificate),
        (&["hosts", "remove", HOST], &["hosts", "list"], Code::HealthCertificate),
    ];
    for (withdraw, restore, code) in cases {
        let from = lab.audit().len();
        // One call that hangs is enough: a release needs both operations.
        faulty.set("hsm-a", &["call=C_Decrypt hang"]);
        let (client, body) = (daemon.client(), body.clone());
        let asked = tokio::spawn(async move { client.post(ROLL, XML, body).await.unwrap() });
        faulty.until("hsm-a", "a release at the token", |stats| stats.hanging() == 1);
        administrator.json(withdraw);
        faulty.clear("hsm-a");
        let reply = asked.await.unwrap();
        assert_ne!(reply.status, 200, "keys left after {withdraw:?}");
        assert_eq!(Refusal::parse(&reply.body).unwrap().code, code, "{withdraw:?}");
        assert_eq!(lines(&lab, from, "release", "success"), 0, "{withdraw:?}");
        assert_eq!(lines(&lab, from, "release", code.as_str()), 1, "{withdraw:?}");
        administrator.json(restore);
    }
    assert!(daemon.stop().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_item_of_a_batch_leaves_after_its_host_was_removed() {
    const ITEMS: usize = 8;
    let (lab, faulty, daemon) = slow();
    daemon.until_ready_is(200).await;
    let administrator = Administrator(&lab);
    let health_certificate = lab.host(daemon.client()).attest().await.unwrap();
    let ingress_protectors = vec![lab.protector(); ITEMS];
    let request = BatchRequest { health_certificate, algorithms: ALGORITHMS, ingress_protectors };

    let from = lab.audit().len();
    // Some items are done, one is at the token, and the rest waits.
    faulty.set("hsm-a", &["call=C_Decrypt hang every=4"]);
    let client = daemon.client();
    let asked = tokio::spawn(async move { client.post(BATCH, XML, request.to_xml()).await.unwrap() });
    faulty.until("hsm-a", "an item at the token", |stats| stats.hanging() == 1);
    administrator.json(&["hosts", "remove", HOST]);
    faulty.clear("hsm-a");
    let reply = asked.await.unwrap();
    assert_eq!(reply.status, 200);
    let items = parse_results(&reply.body).unwrap();
    assert_eq!(items.len(), ITEMS);
    for (at, item) in items.iter().enumerate() {
        let code = item.as_ref().err().map(|refusal| refusal.code);
        assert_eq!(code, Some(Code::HealthCertificate), "item {}", at + 1);
    }
    assert_eq!(lines(&lab, from, "release", "success"), 0);
    assert_eq!(lines(&lab, from, "release", Code::HealthCertificate.as_str()), ITEMS, "one line for each item");
    assert!(daemon.stop().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_health_certificate_leaves_after_its_host_was_removed() {
    let (lab, faulty, daemon) = slow();
    daemon.until_ready_is(200).await;
    let administrator = Administrator(&lab);
    let host = lab.host(daemon.client());
    host.attest().await.unwrap();

    let from = lab.audit().len();
    // Another identity key: no cached certificate fits it.
    let identity = tokio::task::spawn_blocking(|| claviger_protocol::rsa_key::RsaPrivateKey::generate(2048).unwrap());
    let identity = std::sync::Arc::new(identity.await.unwrap());
    let host = claviger_client::host::Host::new(daemon.client(), lab.key("host/hostkey.pem"), identity);
    faulty.set("hsm-a", &["call=C_Sign hang"]);
    let asked = tokio::spawn(async move { host.attest().await });
    faulty.until("hsm-a", "an attestation at the token", |stats| stats.hanging() == 1);
    administrator.json(&["hosts", "remove", HOST]);
    faulty.clear("hsm-a");
    let error = asked.await.unwrap().expect_err("a certificate for a host that was removed").to_string();
    assert!(error.contains("UnauthorizedErrorReply"), "{error}");
    assert_eq!(lines(&lab, from, "attest", "success"), 0);
    assert_eq!(lines(&lab, from, "attest", "UnauthorizedErrorReply"), 1);
    assert!(daemon.stop().success());
}
