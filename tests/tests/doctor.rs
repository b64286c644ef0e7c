//! The doctor: silent when all is well, and right about what was broken on purpose.

#![allow(clippy::unwrap_used)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use claviger::state::{Kind, NewCertificate, State};
use claviger_protocol::health::signer_template;
use claviger_tests::{Lab, METADATA, Options, block, run, said, tool};
use rusqlite::Connection;
use serde_json::Value;

/// The exit status, and the findings.
fn doctor(lab: &Lab) -> (i32, Vec<Value>) {
    let output = run(["doctor", "--json", "--config", lab.config_file().to_str().unwrap()]);
    let findings = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(&output)));
    (output.status.code().unwrap(), findings)
}

fn well(lab: &Lab) {
    let (status, findings) = doctor(lab);
    assert!(status == 0 && findings.iter().all(|finding| finding["level"] == "ok"), "{findings:#?}");
    let keys = findings.iter().filter(|finding| finding["check"] == "key").count();
    assert_eq!(keys, lab.config().hsm.len(), "{findings:#?}");
}

/// Something of `check` is this bad, is said with these words, and there is something to do about it.
fn ill(lab: &Lab, check: &str, level: &str, words: &[&str]) {
    let (status, findings) = doctor(lab);
    let found = findings.iter().any(|finding| {
        let what = finding["what"].as_str().unwrap();
        let said =
            finding["check"] == check && finding["level"] == level && words.iter().all(|word| what.contains(word));
        said && !finding["todo"].as_str().unwrap().is_empty()
    });
    assert!(found, "nothing of {check}, {level}, {words:?} in {findings:#?}");
    let worst = if findings.iter().any(|finding| finding["level"] == "error") { 2 } else { 1 };
    assert_eq!(status, worst, "{findings:#?}");
}

fn sql(lab: &Lab, text: &str) {
    Connection::open(lab.file("state/state.db")).unwrap().execute_batch(text).unwrap();
}

/// With a file that has other content; then it is as before.
fn with(path: &Path, content: &str, look: impl FnOnce()) {
    let (before, mode) = (fs::read(path).unwrap(), fs::metadata(path).unwrap().permissions());
    fs::write(path, content).unwrap();
    look();
    fs::write(path, before).unwrap();
    fs::set_permissions(path, mode).unwrap();
}

#[test]
fn what_is_broken_is_named() {
    let lab = Lab::make(Options { hsms: 2, ..Options::default() });
    let config = fs::read_to_string(lab.config_file()).unwrap();
    let pin = lab.file("pins/hsm-b.pin");
    well(&lab);

    // Configuration and files.
    with(&lab.config_file(), &format!("unknown = 1\n{config}"), || ill(&lab, "configuration", "error", &["unknown"]));
    with(&pin, "wrong\n", || ill(&lab, "login", "error", &["hsm-b", "PIN"]));
    fs::set_permissions(&pin, Permissions::from_mode(0o644)).unwrap();
    ill(&lab, "pin", "error", &["hsm-b.pin", "0644"]);
    fs::set_permissions(&pin, Permissions::from_mode(0o600)).unwrap();
    with(&lab.config_file(), &config.replace("claviger-b", "away"), || ill(&lab, "token", "error", &["hsm-b", "away"]));
    lab.configure(|config| config.hsm[1].module = "/nowhere/module.so".into());
    ill(&lab, "module", "error", &["hsm-b", "/nowhere/module.so"]);
    fs::write(lab.config_file(), &config).unwrap();

    // Sockets.
    drop(UnixListener::bind(lab.socket()).unwrap());
    fs::set_permissions(lab.socket(), Permissions::from_mode(0o666)).unwrap();
    ill(&lab, "socket", "warning", &["admin.sock", "stale"]);
    ill(&lab, "socket", "error", &["admin.sock", "0666"]);
    fs::remove_file(lab.socket()).unwrap();

    // The audit trail.
    let trail = lab.file("state/audit.jsonl");
    let kept = lab.file("state/audit.kept");
    fs::rename(&trail, &kept).unwrap();
    fs::create_dir(&trail).unwrap();
    ill(&lab, "audit", "error", &["audit.jsonl", "cannot be written"]);
    fs::remove_dir(&trail).unwrap();
    fs::rename(&kept, &trail).unwrap();
    let lines = fs::read_to_string(&trail).unwrap();
    with(&trail, &lines[..lines.len() - 5], || ill(&lab, "audit", "warning", &["not whole"]));
    let ahead = format!("{lines}{{\"time\":\"2999-01-01T00:00:00.000Z\"}}\n");
    with(&trail, &ahead, || ill(&lab, "clock", "warning", &["in the future"]));

    // The state.
    let state = lab.file("state/state.db");
    with(&state, "no database, whatever it is called, and long enough to look like one", || {
        ill(&lab, "state", "error", &["state.db"]);
    });
    sql(&lab, "UPDATE certificates SET key_id = x'00ff' WHERE kind = 'encryption'");
    for member in ["hsm-a", "hsm-b"] {
        ill(&lab, "key", "error", &[member, "does not have", "00ff", "encryption certificate"]);
    }
    sql(&lab, "UPDATE certificates SET key_id = (SELECT key_id FROM certificates WHERE kind = 'signing')");
    ill(&lab, "key", "error", &["hsm-a", "encryption certificate"]);
    well_again(&lab, &state, |lab| {
        sql(lab, "UPDATE certificates SET is_primary = 0 WHERE kind = 'signing'");
        ill(lab, "certificate", "error", &["no primary signing certificate"]);
    });
}

/// Breaks a copy of the state as it was when the lab was made.
fn well_again(lab: &Lab, state: &Path, breaking: impl FnOnce(&Lab)) {
    let before = fs::read(state).unwrap();
    breaking(lab);
    fs::write(state, before).unwrap();
}

#[test]
fn keys_and_certificates_are_looked_at_one_by_one() {
    let lab = Lab::make(Options { hsms: 2, ..Options::default() });

    // An expired certificate, of a key that is nobody's.
    let key = lab.key("tenant/owner-signing.key.pem");
    let der = signer_template(key.public(), 1, 2).unwrap().to_be_signed().unwrap().sign_with(&key).unwrap();
    let mut state = State::open(&lab.file("state")).unwrap();
    let new = NewCertificate {
        kind: Kind::Signing,
        der: &der,
        key_id: b"nowhere",
        spki: key.public().spki_der(),
        primary: false,
    };
    let added = state.add_certificate(&new, 1).unwrap();
    ill(&lab, "certificate", "warning", &["signing certificate", &added.thumbprint[..16], "expired"]);
    ill(&lab, "key", "error", &["hsm-a", "does not have", &added.thumbprint[..16]]);
    state.remove_certificate(Kind::Signing, &added.thumbprint).unwrap();
    drop(state);
    well(&lab);

    // A key that one member has lost: also while the daemon runs.
    let id: String = Connection::open(lab.file("state/state.db"))
        .unwrap()
        .query_row("SELECT lower(hex(key_id)) FROM certificates WHERE kind = 'encryption'", [], |row| row.get(0))
        .unwrap();
    let pin = fs::read_to_string(lab.file("pins/hsm-b.pin")).unwrap();
    let mut command = Command::new("pkcs11-tool");
    command.env("SOFTHSM2_CONF", lab.file("softhsm2.conf")).arg("--module").arg(&lab.config().hsm[0].module);
    command.args([
        "--token-label",
        "claviger-b",
        "--login",
        "--pin",
        pin.trim(),
        "--delete-object",
        "--type",
        "privkey",
    ]);
    let deleted = tool("opensc", command.args(["--id", &id]));
    assert!(deleted.status.success(), "{}", said(&deleted));
    let lost = ["hsm-b", "does not have", id.as_str()];
    ill(&lab, "key", "error", &lost);
}

#[test]
fn a_daemon_that_runs_is_asked() {
    let lab = Lab::make(Options { hsms: 2, ..Options::default() });
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    let logins = async || daemon.metrics().await.sum("claviger_hsm_logins_total", &[]);
    let before = block(logins());
    well(&lab);
    well(&lab);
    assert_eq!(block(logins()), before, "nobody logs in anew");
    let text = said(&run(["doctor", "--config", lab.config_file().to_str().unwrap()]));
    assert!(text.contains("the daemon runs and answers") && text.contains(" 0 warnings, 0 errors"), "{text}");
    assert!(daemon.stop().success());

    // A wrong PIN: the daemon has tried it, and the doctor does not.
    fs::write(lab.file("pins/hsm-b.pin"), "wrong\n").unwrap();
    let daemon = lab.serve();
    ill(&lab, "login", "error", &["hsm-b", "PIN"]);
    assert!(daemon.stop().success());
}

#[test]
fn a_broken_certificate_costs_its_own_key_only() {
    let lab = Lab::make(Options::default());
    sql(&lab, "UPDATE certificates SET der = x'3000' WHERE kind = 'signing'");
    let daemon = lab.serve();
    // As the protocol has it, and the doctor says which.
    let answer = block(daemon.client().get(METADATA)).unwrap();
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(answer.status == 500 && text.contains("Primary Signing Certificate not found"), "{text}");
    let host = lab.host(daemon.client());
    let health = block(host.attest()).unwrap();
    let refused = block(host.roll(claviger_protocol::payload::ApiVersion::V2, &health, &lab.protector()));
    let refused = refused.err().unwrap().to_string();
    assert!(refused.contains("400 InvalidWrappingException"), "{refused}");
    ill(&lab, "certificate", "error", &["signing certificate", "broken"]);
    assert!(daemon.stop().success());
    ill(&lab, "certificate", "error", &["signing certificate", "broken"]);
}

/// The doctor and `claviger serve` find the same, with the same words.
#[test]
fn what_keeps_the_daemon_from_starting_is_named_by_both() {
    let lab = Lab::make(Options::default());
    let good = fs::read_to_string(lab.config_file()).unwrap();
    let both = |check: &str, words: &[&str]| {
        ill(&lab, check, "error", words);
        let refused = run(["serve", "--config", lab.config_file().to_str().unwrap()]);
        let text = said(&refused);
        assert_eq!(refused.status.code(), Some(1), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{words:?} in {text}");
        fs::write(lab.config_file(), &good).unwrap();
    };

    let long = lab.file(&"d".repeat(90));
    fs::rename(lab.file("state"), &long).unwrap();
    lab.configure(|config| config.server.state.clone_from(&long));
    both("socket", &["review.sock", "too long", "107"]);
    // A shorter folder for the sockets is the remedy.
    let sockets = lab.file("s");
    lab.configure(|config| {
        config.server.state.clone_from(&long);
        config.server.sockets = Some(sockets.clone());
    });
    let remedied = fs::read_to_string(lab.config_file()).unwrap();
    both("socket", &["/s does not exist"]);
    fs::create_dir(&sockets).unwrap();
    fs::write(lab.config_file(), remedied).unwrap();
    assert!(lab.serve().stop().success());
    fs::write(lab.config_file(), &good).unwrap();
    fs::rename(&long, lab.file("state")).unwrap();

    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = other.local_addr().unwrap();
    lab.configure(|config| config.server.listen = taken);
    both("port", &["server.listen", &taken.to_string(), "in use"]);
    lab.configure(|config| config.server.admin_group = Some("no-such-group".to_owned()));
    both("socket", &["server.admin_group", "no-such-group"]);
    well(&lab);
}
