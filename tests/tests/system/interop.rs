//! Interoperability test: a client in another language, written from the protocol page alone, against a lab.

#![allow(clippy::print_stdout)]

use std::process::Command;

use claviger_tests::{Lab, Options, claviger};

const PYTHON: &str = "/usr/bin/python3";
const SUITE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/interop/suite.py");

#[test]
fn an_independent_client_is_served_as_the_page_says() {
    let packages = Command::new(PYTHON).args(["-c", "import cryptography, jsonschema, lxml"]).output();
    assert!(
        packages.is_ok_and(|output| output.status.success()),
        "{PYTHON} or its packages are missing: apt-get install python3-cryptography python3-jsonschema python3-lxml"
    );
    let (daemon, lab) = Lab::start(Options { hsms: 2, vms: 1, ..Options::default() });
    let mut command = Command::new(PYTHON);
    command
        .arg("-B")
        .arg(SUITE)
        .args(["--url", &daemon.url, "--metrics", &daemon.metrics_url, "--lab"])
        .arg(lab.path())
        .arg("--claviger")
        .arg(claviger());
    let output = command.output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let told: Vec<&str> = text.lines().filter(|line| !line.starts_with("ok ")).collect();
    assert!(output.status.success(), "{}", told[told.len().saturating_sub(60)..].join("\n"));
    println!("{}", told.last().unwrap());
}
