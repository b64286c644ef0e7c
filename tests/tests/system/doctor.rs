//! Tests of `claviger doctor`: it reports nothing on a healthy lab, and names each deliberate fault.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use claviger::store::{Kind, NewCertificate, State};
use claviger_protocol::health::signer_template;
use claviger_tests::{Lab, METADATA, Options, block, run, said, tool, until};
use rusqlite::Connection;
use serde_json::Value;

/// Returns the exit status and the findings.
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

/// Checks that a finding of `check` has this level, contains these words, and has a remedy.
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

/// Runs `look` while a file has other content, and restores the file.
fn with(path: &Path, content: &str, look: impl FnOnce()) {
    let (before, mode) = (fs::read(path).unwrap(), fs::metadata(path).unwrap().permissions());
    fs::write(path, content).unwrap();
    look();
    fs::write(path, before).unwrap();
    fs::set_permissions(path, mode).unwrap();
}

fn pkcs11_tool(lab: &Lab, arguments: &[&str]) -> String {
    let mut command = Command::new("pkcs11-tool");
    command.env("SOFTHSM2_CONF", lab.file("softhsm2.conf")).arg("--module").arg(&lab.config().hsm[0].module);
    let output = tool("opensc", command.args(arguments));
    assert!(output.status.success(), "{}", said(&output));
    said(&output)
}

/// Logs in with the right PIN, as another program.
fn log_in(lab: &Lab, token: &str, pin: &Path) {
    let pin = fs::read_to_string(pin).unwrap();
    pkcs11_tool(lab, &["--token-label", token, "--login", "--pin", pin.trim(), "--list-objects"]);
}

fn listed(lab: &Lab) -> String {
    said(&run(["hsm", "list", "--config", lab.config_file().to_str().unwrap()]))
}

/// Neither the doctor nor the daemon logs in if a wrong PIN would lock the token.
#[test]
fn the_last_try_of_a_pin_is_left_alone() {
    let lab = Lab::make(Options { hsms: 2, ..Options::default() });
    let faulty = lab.behind_faulty();
    // Counts the logins of all processes.
    let logins = || faulty.stats("hsm-b").calls("C_Login");
    for (tries, flag) in [("final", "CKF_USER_PIN_FINAL_TRY"), ("locked", "CKF_USER_PIN_LOCKED")] {
        let before = logins();
        faulty.set("hsm-b", &[&format!("pin_tries={tries}")]);
        ill(&lab, "login", "error", &["hsm-b", "not tried", flag]);
        assert_eq!(logins(), before, "the doctor, {tries}");
        let looked = faulty.stats("hsm-b").processes();
        let daemon = lab.serve();
        block(daemon.until_ready_is(200));
        until("hsm list says so", || listed(&lab).contains(flag).then_some(()));
        ill(&lab, "hsm", "error", &["hsm-b", "not tried", flag]);
        faulty.until("hsm-b", "fresh workers looked at the token", |stats| stats.processes() > looked + 2);
        assert_eq!(logins(), before, "the daemon, {tries}");
        // The flag is cleared, as after a login with the vendor's tool: the member comes up by itself.
        faulty.clear("hsm-b");
        until("the member is up", || listed(&lab).lines().any(|line| line.starts_with("hsm-b  up")).then_some(()));
        assert!(daemon.stop().success());
    }
    // Only an administrator can allow the last try.
    faulty.set("hsm-b", &["pin_tries=final"]);
    let before = faulty.stats("hsm-b");
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    faulty.until("hsm-b", "a worker looked at the token", |stats| stats.processes() > before.processes());
    assert_eq!(logins(), before.calls("C_Login"));
    let probed = run(["hsm", "probe", "hsm-b", "--config", lab.config_file().to_str().unwrap()]);
    assert!(probed.status.success(), "{}", said(&probed));
    assert_eq!(logins(), before.calls("C_Login") + 1);
    assert!(daemon.stop().success());
}

#[test]
fn a_module_that_crashes_is_named_and_the_others_are_examined() {
    let lab = Lab::make(Options { hsms: 2, ..Options::default() });
    let faulty = lab.behind_faulty();
    for (deed, how) in [("abort", "signal: 6"), ("exit", "exit status: 0"), ("segv", "signal: 11")] {
        faulty.set_module("hsm-a", &[&format!("initialize deed={deed}")]);
        let (status, findings) = doctor(&lab);
        let found = |check: &str, level: &str, words: &[&str]| {
            findings.iter().any(|finding| {
                let what = finding["what"].as_str().unwrap();
                finding["check"] == check && finding["level"] == level && words.iter().all(|word| what.contains(word))
            })
        };
        assert!(found("module", "error", &["hsm-a", "ends the process", how]), "{deed}: {findings:#?}");
        assert!(found("key", "ok", &["hsm-b"]), "{deed}: {findings:#?}");
        assert_eq!(status, 2);
    }
    well(&lab);
}

#[test]
fn two_tokens_of_one_label_are_named() {
    let lab = Lab::make(Options { hsms: 2, ..Options::default() });
    let mut another = Command::new("softhsm2-util");
    another.env("SOFTHSM2_CONF", lab.file("softhsm2.conf")).args(["--init-token", "--free", "--label", "claviger-b"]);
    let made = tool("softhsm2", another.args(["--pin", "987654", "--so-pin", "11223344"]));
    assert!(made.status.success(), "{}", said(&made));
    ill(&lab, "token", "error", &["hsm-b", "several tokens of that label", "serials "]);
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    until("hsm list says so", || listed(&lab).contains("several tokens of that label").then_some(()));
    ill(&lab, "hsm", "error", &["hsm-b", "several tokens of that label", "serials "]);
    let list = listed(&lab);
    assert!(list.contains("hsm-b: name the token by `serial`"), "{list}");
    assert!(daemon.stop().success());
    // No token got the PIN of another one.
    let slots = pkcs11_tool(&lab, &["--list-token-slots"]);
    assert_eq!(slots.matches("claviger-b").count(), 2, "{slots}");
    assert!(!slots.contains("user PIN count low"), "{slots}");
}

/// Returns the directory of a token in SoftHSM's store.
fn token_folder(lab: &Lab, label: &str) -> PathBuf {
    let folders = fs::read_dir(lab.file("tokens")).unwrap().map(|entry| entry.unwrap().path());
    let of_label = |folder: &PathBuf| {
        let object = fs::read(folder.join("token.object")).unwrap();
        object.windows(label.len()).any(|bytes| bytes == label.as_bytes())
    };
    folders.into_iter().find(of_label).unwrap()
}

/// Most modules find a token that was created later only after a new initialisation. A fresh worker does that, while
/// another member serves with the same module.
#[test]
fn a_token_that_comes_later_comes_up_by_itself() {
    let lab = Lab::make(Options { hsms: 2, ..Options::default() });
    let (there, away) = (token_folder(&lab, "claviger-b"), lab.file("away"));
    fs::rename(&there, &away).unwrap();
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    let missing = "the token is not in any slot of the module";
    until("hsm list says what is missing", || listed(&lab).contains(missing).then_some(()));
    ill(&lab, "hsm", "error", &["hsm-b", missing, "claviger-b"]);
    let (_, findings) = doctor(&lab);
    let about_it = findings.iter().map(Value::to_string).filter(|finding| finding.contains("hsm-b"));
    assert!(about_it.chain([listed(&lab)]).all(|text| !text.contains("restart")), "{findings:#?}");
    fs::rename(away, there).unwrap();
    until("the member is up", || listed(&lab).lines().any(|line| line.starts_with("hsm-b  up")).then_some(()));
    well(&lab);
    let closings = block(daemon.metrics()).sum("claviger_hsm_closings_total", &[]);
    assert_eq!(closings, Some(0.0), "the other one was left alone");
    assert!(daemon.stop().success());
}

#[test]
fn what_is_broken_is_named() {
    let lab = Lab::make(Options { hsms: 2, ..Options::default() });
    let config = fs::read_to_string(lab.config_file()).unwrap();
    let pin = lab.file("pins/hsm-b.pin");
    well(&lab);

    // Faults of configuration and files.
    with(&lab.config_file(), &format!("unknown = 1\n{config}"), || ill(&lab, "configuration", "error", &["unknown"]));
    with(&pin, "wrong\n", || {
        ill(&lab, "login", "error", &["hsm-b", "PIN", "CKR_PIN_INCORRECT"]);
        // The token now reports the wrong PIN: it is not tried again, whatever the file contains.
        ill(&lab, "login", "warning", &["hsm-b", "not tried", "CKF_USER_PIN_COUNT_LOW"]);
    });
    ill(&lab, "login", "warning", &["hsm-b", "not tried"]);
    log_in(&lab, "claviger-b", &pin);
    well(&lab);
    fs::set_permissions(lab.config_file(), Permissions::from_mode(0o602)).unwrap();
    ill(&lab, "configuration", "error", &["claviger.toml", "can be changed by others"]);
    fs::set_permissions(lab.config_file(), Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(&pin, Permissions::from_mode(0o644)).unwrap();
    ill(&lab, "pin", "error", &["hsm-b.pin", "0644"]);
    fs::set_permissions(&pin, Permissions::from_mode(0o600)).unwrap();
    with(&lab.config_file(), &config.replace("claviger-b", "away"), || ill(&lab, "token", "error", &["hsm-b", "away"]));
    lab.configure(|config| config.hsm[1].module = "/nowhere/module.so".into());
    ill(&lab, "module", "error", &["hsm-b", "/nowhere/module.so"]);
    fs::write(lab.config_file(), &config).unwrap();

    // Faults of sockets.
    drop(UnixListener::bind(lab.socket()).unwrap());
    fs::set_permissions(lab.socket(), Permissions::from_mode(0o666)).unwrap();
    ill(&lab, "socket", "warning", &["admin.sock", "stale"]);
    ill(&lab, "socket", "error", &["admin.sock", "0666"]);
    fs::remove_file(lab.socket()).unwrap();

    // Faults of the audit trail.
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

    // Faults of the state.
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

/// Breaks a copy of the original state of the lab.
fn well_again(lab: &Lab, state: &Path, breaking: impl FnOnce(&Lab)) {
    let before = fs::read(state).unwrap();
    breaking(lab);
    fs::write(state, before).unwrap();
}

#[test]
fn keys_and_certificates_are_looked_at_one_by_one() {
    let lab = Lab::make(Options { hsms: 2, ..Options::default() });

    // An expired certificate, whose key no token has.
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

    // A key that one member has lost, also found while the daemon runs.
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

    // A wrong PIN: the daemon has tried it, and the doctor does not try it.
    fs::write(lab.file("pins/hsm-b.pin"), "wrong\n").unwrap();
    let daemon = lab.serve();
    until("the PIN is refused", || listed(&lab).contains("pin_refused").then_some(()));
    ill(&lab, "login", "error", &["hsm-b", "PIN"]);
    assert!(daemon.stop().success());
}

#[test]
fn a_broken_certificate_costs_its_own_key_only() {
    let lab = Lab::make(Options::default());
    sql(&lab, "UPDATE certificates SET der = x'3000' WHERE kind = 'signing'");
    let daemon = lab.serve();
    // The document follows the protocol, and the doctor names the certificate.
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

/// The doctor and `claviger serve` report the same faults with the same words.
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
    // The remedy is a shorter directory for the sockets.
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
