//! Runs the token suite with SoftHSM2, and tests that need a token of their own.

#![allow(clippy::unwrap_used, missing_docs)]

mod suite;

use std::sync::Arc;

use claviger_hsm::{Hash, HsmError, SignScheme, TokenRef};
use cryptoki::object::Attribute;
use suite::{Counts, SHA1, SOFTHSM, count, load, member, pin, soon};

// One test, since environment and library belong to the whole process.
#[test]
fn softhsm() {
    let _tokens = suite::softhsm_tokens(&["one", "two", "twin", "twin"]);
    suite::run(member("a", SOFTHSM, "one"), member("b", SOFTHSM, "two"));
    a_wrong_pin_is_tried_once();
    a_token_that_is_not_there();
    tokens_of_one_label();
    keys_that_want_a_login_each_time();
    what_cannot_be_loaded();
}

fn a_wrong_pin_is_tried_once() {
    let counts = Arc::new(Counts::default());
    let mut wrong = member("wrong", SOFTHSM, "one");
    wrong.pin = pin("654321");
    let cluster = load(vec![wrong], counts.observer()).unwrap();
    suite::runtime().block_on(async {
        let error = cluster.start().await.unwrap_err();
        assert!(error.to_string().contains("CKR_PIN_INCORRECT"), "{error}");
        for _ in 0..3 {
            assert!(cluster.random(8, soon()).await.is_err());
            assert!(cluster.keys_on("wrong", false).await.is_err());
            tokio::time::sleep(std::time::Duration::from_millis(600)).await;
        }
        assert_eq!(count(&counts.logins), 1);
        assert!(!suite::is_up(&cluster.members()[0]));
        cluster.close().await;
    });
}

fn a_token_that_is_not_there() {
    let counts = Arc::new(Counts::default());
    let members = vec![member("here", SOFTHSM, "one"), member("gone", SOFTHSM, "no such")];
    let cluster = load(members, counts.observer()).unwrap();
    suite::runtime().block_on(async {
        cluster.start().await.unwrap();
        let up: Vec<bool> = cluster.members().iter().map(suite::is_up).collect();
        assert_eq!(up, [true, false]);
        for _ in 0..10 {
            cluster.random(8, soon()).await.unwrap();
        }
        let error = cluster.keys_on("gone", false).await.unwrap_err();
        assert_eq!(error.error, HsmError::NoSuchToken);
        cluster.close().await;
    });
}

/// If several tokens have the configured label, the PIN is tried on none of them.
fn tokens_of_one_label() {
    let counts = Arc::new(Counts::default());
    let cluster = load(vec![member("twin", SOFTHSM, "twin")], counts.observer()).unwrap();
    let serials = suite::runtime().block_on(async {
        let error = cluster.start().await.unwrap_err();
        assert_eq!(error.error, HsmError::SeveralTokens);
        let (_, serials) = error.detail.split_once("serials ").unwrap_or_else(|| panic!("{error}"));
        let serials: Vec<_> = serials.split(", ").map(str::to_owned).collect();
        let remedy = cluster.members()[0].last_error.clone().unwrap().remedy.unwrap();
        assert!(remedy.contains("`serial`"), "{remedy}");
        cluster.close().await;
        serials
    });
    assert_eq!((serials.len(), count(&counts.logins)), (2, 0));
    for serial in serials {
        let mut by_serial = member("twin", SOFTHSM, "");
        by_serial.token = TokenRef::Serial(serial);
        let cluster = load(vec![by_serial], counts.observer()).unwrap();
        suite::runtime().block_on(async {
            cluster.start().await.unwrap();
            cluster.close().await;
        });
    }
    assert_eq!(count(&counts.logins), 2);
}

/// Keys with `CKA_ALWAYS_AUTHENTICATE` get a login between the start of each operation and its data.
fn keys_that_want_a_login_each_time() {
    let (key, id) = (suite::software_key(), suite::new_id());
    let named = suite::named(&id, &key.to_public_key());
    let counts = Arc::new(Counts::default());
    let cluster = load(vec![member("careful", SOFTHSM, "two")], counts.observer()).unwrap();
    suite::runtime().block_on(async {
        cluster.start().await.unwrap();
        let mut template = suite::others_key(Some(&id), &key);
        template.push(Attribute::AlwaysAuthenticate(true));
        suite::side_session(&member("careful", SOFTHSM, "two")).create_object(&template).unwrap();
        let listed = cluster.keys_on("careful", true).await.unwrap();
        assert!(listed.iter().any(|key| key.is(&named) && key.always_authenticate), "{listed:?}");
        for _ in 0..3 {
            let ciphertext = suite::encrypt(&key.to_public_key(), SHA1, b"careful");
            let done = cluster.decrypt(&named, SHA1, &ciphertext, soon(), None).await.unwrap();
            assert_eq!((done.value.as_slice(), done.retries), (&b"careful"[..], 0));
            cluster.sign(&named, SignScheme::Pkcs1(Hash::Sha256), &[7; 32], soon(), None).await.unwrap();
        }
        // If the token refuses the PIN at such a login, the PIN is tried only once.
        cluster.set_pin("careful", pin("654321")).await.unwrap();
        let ciphertext = suite::encrypt(&key.to_public_key(), SHA1, b"careful");
        assert!(cluster.decrypt(&named, SHA1, &ciphertext, soon(), None).await.is_err());
        assert_eq!(cluster.members()[0].state.name(), "pin_refused");
        cluster.close().await;
    });
    // A login with the right PIN resets the token's count of wrong PINs.
    let cluster = load(vec![member("careful", SOFTHSM, "two")], counts.observer()).unwrap();
    suite::runtime().block_on(async {
        cluster.start().await.unwrap();
        let flags = suite::module(SOFTHSM.as_ref());
        let low = flags.get_slots_with_token().unwrap().into_iter().any(|slot| {
            let info = flags.get_token_info(slot).unwrap();
            info.label() == "two" && info.user_pin_count_low()
        });
        assert!(!low);
        cluster.close().await;
    });
}

fn what_cannot_be_loaded() {
    let counts = Arc::new(Counts::default());
    let nowhere = load(vec![member("nowhere", "/nonexistent/module.so", "one")], counts.observer()).unwrap();
    suite::runtime().block_on(async {
        let error = nowhere.start().await.unwrap_err();
        assert!(error.error == HsmError::Module && error.detail.contains("/nonexistent/module.so"), "{error}");
        nowhere.close().await;
    });
    let load = |members| load(members, counts.observer()).err().unwrap();
    assert_eq!(load(vec![]), HsmError::NoMembers);
    let one = member("one", SOFTHSM, "one");
    assert_eq!(load(vec![one.clone(), one]), HsmError::UnfitName);
}
