//! Exchanges of attestation, validated by the published schemas of the wire protocol.

use std::cell::RefCell;
use std::io::Write;
use std::process::{Command, Stdio};

use claviger_client::http::Reply;
use data_encoding::BASE64;
use serde_json::json;

const PYTHON: &str = "/usr/bin/python3";
const VALIDATOR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/interop/wire.py");

thread_local! {
    /// The exchanges of this test that were not validated yet, one in each line.
    static EXCHANGES: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Notes a POST request and its reply.
pub fn note(path: &str, request: &[u8], reply: &Reply) {
    let header = |name: &str| reply.headers.get(name).and_then(|value| value.to_str().ok());
    let line = json!({
        "method": "POST",
        "path": path,
        "status": reply.status.as_u16(),
        "type": header("content-type").unwrap_or_default(),
        "retry_after": header("retry-after"),
        "request": BASE64.encode(request),
        "reply": BASE64.encode(&reply.body),
    });
    EXCHANGES.with_borrow_mut(|exchanges| *exchanges += &format!("{line}\n"));
}

/// Validates what this test noted, and expects these kinds of messages among it.
///
/// # Panics
/// If a message does not agree with its schema, or if a kind is missing.
pub fn validate(kinds: &[&str]) {
    let exchanges = EXCHANGES.take();
    let mut command = Command::new(PYTHON);
    command.arg("-B").arg(VALIDATOR).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut validator = command.spawn().unwrap_or_else(|error| panic!("{PYTHON}: {error}"));
    validator.stdin.take().unwrap().write_all(exchanges.as_bytes()).unwrap();
    let output = validator.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", crate::said(&output));
    let seen = String::from_utf8(output.stdout).unwrap();
    for kind in kinds {
        assert!(seen.lines().any(|line| line.split_once(' ').is_some_and(|(of, _)| of == *kind)), "no {kind}:\n{seen}");
    }
}
