//! Tests of the calls that cross the PKCS#11 interface, recorded by OpenSC's spy module in front of SoftHSM2.

#![allow(clippy::unwrap_used, missing_docs)]

mod suite;

use std::sync::Arc;

use claviger_hsm::{Hash, KeyUsage, SignScheme};
use suite::{SHA1, SHA256, SOFTHSM, member, soon};

const SPY: &str = "/usr/lib/x86_64-linux-gnu/pkcs11-spy.so";

#[test]
fn no_length_probes() {
    suite::expect_installed(SPY, "opensc-pkcs11");
    let tokens = suite::softhsm_tokens(&["spied"]);
    let log = tokens.path().join("spy.log");
    let mut spied = member("spied", SPY, "spied");
    spied.sessions = 2;
    spied.env.insert("PKCS11SPY".to_owned(), SOFTHSM.to_owned());
    spied.env.insert("PKCS11SPY_OUTPUT".to_owned(), log.display().to_string());
    let cluster = suite::load(vec![spied], Arc::new(|_, _| {})).unwrap();
    let operations = 20;
    suite::runtime().block_on(async {
        cluster.start().await.unwrap();
        let key = suite::software_key();
        let id = suite::new_id();
        cluster
            .import_rsa("spied", suite::new_key(&id, KeyUsage::Both), suite::software_rsa::parts(&key))
            .await
            .unwrap();
        let id = suite::named(&id, &key.to_public_key());
        for _ in 0..operations {
            for oaep in [SHA1, SHA256] {
                let ciphertext = suite::encrypt(&key.to_public_key(), oaep, b"spied");
                let done = cluster.decrypt(&id, oaep, &ciphertext, soon(), None).await;
                assert_eq!(*done.unwrap().value, b"spied");
            }
            for scheme in [SignScheme::Pkcs1(Hash::Sha256), SignScheme::Pss(Hash::Sha256)] {
                cluster.sign(&id, scheme, &[7; 32], soon(), None).await.unwrap();
            }
        }
        cluster.close().await;
    });

    let log = std::fs::read_to_string(log).unwrap();
    let calls = calls(&log);
    let of = |name: &str| calls.iter().filter(|call| call.name == name).collect::<Vec<_>>();
    let succeeded = |name: &str| of(name).iter().filter(|call| call.ok()).count();
    assert!(of("C_Decrypt").len() >= 2 * operations);
    assert_eq!(of("C_Decrypt").len(), succeeded("C_DecryptInit"));
    assert_eq!(of("C_Sign").len(), 2 * operations);
    assert_eq!(of("C_Sign").len(), of("C_SignInit").len());
    for call in [of("C_Decrypt"), of("C_Sign")].concat() {
        let probes = call.text.lines().any(|line| line.starts_with("[out]") && line.contains("NULL"));
        assert!(!probes, "{}", call.text);
    }
    assert_eq!(of("C_Login").len(), 1);
    assert_eq!(of("C_Initialize").len(), 1);
    assert_eq!(of("C_Finalize").len(), 1);
    // Every opened session was closed.
    assert_eq!(of("C_OpenSession").len(), of("C_CloseSession").len());
}

struct Call<'a> {
    name: &'a str,
    text: String,
}

impl Call<'_> {
    fn ok(&self) -> bool {
        self.text.contains("CKR_OK")
    }
}

/// Returns the calls of the log. A call is a line such as `12: C_Decrypt` and the lines after it.
fn calls(log: &str) -> Vec<Call<'_>> {
    let mut calls: Vec<Call<'_>> = Vec::new();
    for line in log.lines() {
        let name = line
            .split_once(": ")
            .filter(|(number, name)| {
                !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) && name.starts_with("C_")
            })
            .map(|(_, name)| name.trim());
        match (name, calls.last_mut()) {
            (Some(name), _) => calls.push(Call { name, text: String::new() }),
            (None, Some(call)) => {
                call.text.push_str(line);
                call.text.push('\n');
            }
            (None, None) => {}
        }
    }
    calls
}
