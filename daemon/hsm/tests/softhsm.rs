//! The token suite against SoftHSM2, and what only a token that nobody else needs can be used for.

#![allow(clippy::unwrap_used, missing_docs)]

mod suite;

use std::sync::Arc;

use claviger_hsm::HsmError;
use suite::{Counts, SOFTHSM, count, load, member, pin, soon};

// One test, since the environment and the library belong to the whole process.
#[test]
fn softhsm() {
    let _tokens = suite::softhsm_tokens(&["one", "two"]);
    suite::run(member("a", SOFTHSM, "one"), member("b", SOFTHSM, "two"));
    a_wrong_pin_is_tried_once();
    a_token_that_is_not_there();
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
            assert!(cluster.keys_on("wrong").await.is_err());
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
        let error = cluster.keys_on("gone").await.unwrap_err();
        assert!(matches!(error, HsmError::Token { .. }), "{error:?}");
        cluster.close().await;
    });
}

fn what_cannot_be_loaded() {
    let counts = Arc::new(Counts::default());
    let nowhere = member("nowhere", "/nonexistent/module.so", "one");
    let load = |members| load(members, counts.observer()).err().unwrap();
    assert!(matches!(load(vec![nowhere]), HsmError::Module { .. }));
    assert!(matches!(load(vec![]), HsmError::NoMember(_)));
    let one = member("one", SOFTHSM, "one");
    assert!(matches!(load(vec![one.clone(), one]), HsmError::NoMember(_)));
    // One file is one instance: it cannot have two environments at once.
    let mut other = member("other", SOFTHSM, "one");
    other.env.insert("SOFTHSM2_CONF".to_owned(), "/elsewhere".to_owned());
    let error = load(vec![member("one", SOFTHSM, "one"), other]);
    assert!(error.to_string().contains("another environment"), "{error}");
}
