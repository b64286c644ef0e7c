//! Tests of the PKCS#11 calls of a release, recorded by OpenSC's spy module between daemon and module.

#![allow(clippy::print_stdout)]

use std::path::PathBuf;
use std::sync::Arc;

use claviger_protocol::payload::ApiVersion;
use claviger_tests::{Lab, Options};
use tokio::task::JoinSet;

const RELEASES: usize = 50;

fn spy() -> PathBuf {
    let places =
        ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib"];
    let names = places.iter().flat_map(|p| [format!("{p}/pkcs11-spy.so"), format!("{p}/pkcs11/pkcs11-spy.so")]);
    let found = names.map(PathBuf::from).find(|path| path.exists());
    found.expect("pkcs11-spy.so is missing: apt-get install opensc-pkcs11")
}

/// One call in the spy's log. Lines of different threads are mixed, except for the first line of each call.
struct Call<'a> {
    function: &'a str,
    lines: Vec<&'a str>,
}

impl Call<'_> {
    fn succeeded(&self) -> bool {
        self.lines.iter().any(|line| line.starts_with("Returned:") && line.ends_with(" CKR_OK"))
    }
}

fn calls(log: &str) -> Vec<Call<'_>> {
    let mut calls = Vec::new();
    for line in log.lines() {
        let begins = line.split_once(": ").filter(|(number, name)| {
            number.bytes().all(|b| b.is_ascii_digit()) && !number.is_empty() && name.starts_with("C_")
        });
        match (begins, calls.last_mut()) {
            (Some((_, function)), _) => calls.push(Call { function: function.trim(), lines: Vec::new() }),
            (None, Some(Call { lines, .. })) => lines.push(line),
            (None, None) => {}
        }
    }
    calls
}

/// Returns the log of a daemon that served some releases with this number of sessions and then stopped.
async fn served(sessions: usize) -> String {
    let lab = Lab::make(Options::default());
    let log = lab.file("spy.log");
    lab.configure(|config| {
        let hsm = &mut config.hsm[0];
        config.env.insert("PKCS11SPY".to_owned(), hsm.module.display().to_string());
        config.env.insert("PKCS11SPY_OUTPUT".to_owned(), log.display().to_string());
        hsm.module = spy();
        hsm.sessions = sessions;
    });
    let daemon = lab.serve();
    let host = Arc::new(lab.host(daemon.client()));
    let health = host.attest().await.unwrap();
    let mut releasing = JoinSet::new();
    for _ in 0..RELEASES {
        let (host, health, protector) = (host.clone(), health.clone(), lab.protector());
        releasing.spawn(async move { host.roll(ApiVersion::V2, &health, &protector).await.unwrap() });
    }
    assert_eq!(releasing.join_all().await.len(), RELEASES);
    assert_eq!(daemon.metrics().await.count("claviger_releases_total", &[("outcome", "success")]), RELEASES as u64);
    drop(host);
    assert!(daemon.stop().success());
    std::fs::read_to_string(log).unwrap()
}

fn count(calls: &[Call<'_>], function: &str) -> usize {
    calls.iter().filter(|call| call.function == function).count()
}

/// Checks the properties that hold for any number of sessions.
fn judge(log: &str, sessions: usize) {
    let calls = calls(log);
    let opened = count(&calls, "C_OpenSession");
    println!("{sessions} sessions at most, {opened} opened, {} calls", calls.len());
    assert_eq!(count(&calls, "C_Initialize"), 1);
    assert_eq!(count(&calls, "C_Finalize"), 1);
    assert_eq!(count(&calls, "C_Login"), 1);
    // One session holds the login and does nothing else.
    assert!((2..=sessions + 1).contains(&opened), "{opened} sessions opened");
    assert_eq!(count(&calls, "C_FindObjectsInit"), opened - 1);
    assert_eq!(count(&calls, "C_Sign"), count(&calls, "C_SignInit"));
    // One signature for each release, one for the health certificate, one for the known-answer test, and one for the audit
    // trail when the daemon stops.
    assert_eq!(count(&calls, "C_Sign"), RELEASES + 3);
    assert!(count(&calls, "C_Decrypt") >= RELEASES);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_logs_in_once_looks_keys_up_once_and_probes_nothing() {
    judge(&served(4).await, 4);
    // With one session the calls are sequential, and each line of the log belongs to the call above it.
    let log = served(1).await;
    judge(&log, 1);
    let calls = calls(&log);
    // A call for the length would show a null output.
    let null = |call: &&Call<'_>| {
        let output = call.lines.iter().any(|l| l.starts_with("[out] p") && l.to_ascii_uppercase().contains("NULL"));
        matches!(call.function, "C_Decrypt" | "C_Sign") && output
    };
    assert_eq!(calls.iter().filter(null).count(), 0);
    let began = calls.iter().filter(|call| call.function == "C_DecryptInit" && call.succeeded()).count();
    assert_eq!(count(&calls, "C_Decrypt"), began);
    let first = calls.iter().position(|call| call.function == "C_SignInit").unwrap();
    let operations = &calls[first..];
    assert_eq!(operations.iter().filter(|call| call.function == "C_DecryptInit").count(), RELEASES);
    assert!(
        operations
            .iter()
            .filter(|call| call.function.contains("crypt") || call.function.contains("Sign"))
            .all(Call::succeeded)
    );
    // Between the first operation, the known-answer test's signature, and the last one, for the audit trail, the log
    // contains only operations of two calls each.
    let stop = operations.iter().position(|call| call.function == "C_CloseSession").unwrap_or(operations.len());
    assert_eq!(stop, 2 * (2 * RELEASES + 3));
}
