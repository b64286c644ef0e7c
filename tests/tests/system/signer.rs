//! Tests of the attestation signer: it survives the loss of members that have its key, leaves no unused keys behind, and
//! signs in time or not at all.

use claviger_protocol::payload::ApiVersion;
use claviger_tests::{Lab, METADATA, Options, block, run, until, until_attested};
use rusqlite::Connection;
use serde_json::Value;

/// Runs SQL statements on the state of a lab.
fn sql(lab: &Lab, sql: &str) {
    let state = Connection::open(lab.file("state/state.db")).unwrap();
    state.busy_timeout(claviger_tests::PATIENCE).unwrap();
    state.execute_batch(sql).unwrap();
}

#[test]
fn the_member_that_remains_gets_a_key() {
    let lab = Lab::make(Options { hsms: 2, vms: 1, ..Options::default() });
    let faulty = lab.behind_faulty();
    sql(&lab, "DELETE FROM attestation_signers");
    const ABSENT: &[&str] = &["absent rv=CKR_DEVICE_REMOVED"];
    faulty.set("hsm-b", ABSENT);
    let daemon = lab.serve();
    let host = lab.host(daemon.client());
    let health = until_attested(&host);
    faulty.clear("hsm-b");
    until("hsm-b comes up", || {
        let listed = run(["hsm", "list", "--json", "--config", lab.config_file().to_str().unwrap()]);
        let members: Value = serde_json::from_slice(&listed.stdout).unwrap();
        (members[1]["state"] == "up").then_some(())
    });
    faulty.set("hsm-a", ABSENT);
    let newer = until_attested(&host);
    // The previous signer is still trusted.
    for health in [health, newer] {
        block(host.roll(ApiVersion::V2, &health, &lab.protector())).unwrap();
    }
    assert!(daemon.stop().success());
}

#[test]
fn a_signer_that_cannot_be_stored_leaves_one_key() {
    let lab = Lab::make(Options::default());
    let faulty = lab.behind_faulty();
    sql(
        &lab,
        "DELETE FROM attestation_signers;
         CREATE TRIGGER full BEFORE INSERT ON attestation_signers BEGIN SELECT RAISE(ABORT, 'on purpose'); END;",
    );
    let daemon = lab.serve();
    // One signature is the known-answer test; the others are tries.
    faulty.until("hsm-a", "three tries", |stats| stats.calls("C_Sign") >= 4);
    sql(&lab, "DROP TRIGGER full");
    until_attested(&lab.host(daemon.client()));
    assert!(daemon.stop().success());
    assert_eq!(faulty.stats("hsm-a").calls("C_GenerateKeyPair"), 1);
}

/// Returns the number of certificates that issue health certificates.
fn signers(lab: &Lab) -> i64 {
    let state = Connection::open(lab.file("state/state.db")).unwrap();
    state.query_row("SELECT count(*) FROM attestation_signers", [], |row| row.get(0)).unwrap()
}

#[test]
fn a_signer_that_was_replaced_is_trusted_as_long_as_what_it_issued_lasts() {
    const NOW: &str = "CAST(strftime('%s', 'now') AS INTEGER)";
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let health = until_attested(&lab.host(daemon.client()));
    assert!(daemon.stop().success());
    // Replaced almost eight hours ago: its last health certificate is valid for some more minutes.
    sql(&lab, &format!("UPDATE attestation_signers SET current = 0, replaced = {NOW} - 8 * 3600 + 600"));
    let daemon = lab.serve();
    let host = lab.host(daemon.client());
    let newer = until_attested(&host);
    for health in [&health, &newer] {
        block(host.roll(ApiVersion::V2, health, &lab.protector())).unwrap();
    }
    assert_eq!(signers(&lab), 2);
    assert!(daemon.stop().success());
    // Replaced more than eight hours ago: none of its health certificates can still be valid.
    sql(&lab, &format!("UPDATE attestation_signers SET replaced = {NOW} - 8 * 3600 - 600 WHERE NOT current"));
    let daemon = lab.serve();
    until("the signer is forgotten", || (signers(&lab) == 1).then_some(()));
    let host = lab.host(daemon.client());
    let refused = block(host.roll(ApiVersion::V2, &health, &lab.protector())).err().unwrap().to_string();
    assert!(refused.contains("403 HealthCertificateException"), "{refused}");
    block(host.roll(ApiVersion::V2, &newer, &lab.protector())).unwrap();
    assert!(daemon.stop().success());
}

/// The metadata document has ten seconds of its own; an attestation that begins later has less time and ends earlier.
#[tokio::test(flavor = "multi_thread")]
async fn an_attestation_keeps_the_deadline() {
    let lab = Lab::make(Options::default());
    let faulty = lab.behind_faulty();
    lab.configure(|config| (config.release.deadline_ms, config.release.watchdog_ms) = (1000, 60_000));
    let daemon = lab.serve();
    daemon.until_ready_is(200).await;
    faulty.set("hsm-a", &["call=C_Sign hang"]);
    let client = daemon.client();
    let metadata = tokio::spawn(async move { client.get(METADATA).await.unwrap().status });
    faulty.until("hsm-a", "the metadata at the token", |stats| stats.hanging() >= 1);
    let refused = lab.host(daemon.client()).attest().await.unwrap_err().to_string();
    assert!(refused.contains("503 UnavailableErrorReply"), "{refused}");
    assert!(!metadata.is_finished(), "both took the same time");
    faulty.clear("hsm-a");
    assert_eq!(metadata.await.unwrap(), 200);
    assert!(daemon.stop().success());
}
