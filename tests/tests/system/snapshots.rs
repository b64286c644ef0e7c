//! Texts that users read, compared with accepted copies: help, errors, metrics. After an intended change,
//! `UPDATE_EXPECT=1 cargo test --workspace --test system snapshots::` accepts the new texts, and `git diff` shows them.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use claviger_client::http::Client;
use claviger_protocol::attestation::parse_error_reply;
use claviger_tests::{ATTEST, Lab, METADATA, Options, ROLL, block, claviger, loadgen, said};
use expect_test::expect_file;

/// Runs a program in an empty folder, without a terminal and without settings from the environment.
fn run(program: &Path, arguments: &[&str], folder: &Path) -> (bool, String) {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(folder).env("COLUMNS", "100");
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CLAVIGER_") || name.ends_with("_LOG")) {
            command.env_remove(name);
        }
    }
    let output = command.output().unwrap();
    (output.status.success(), said(&output))
}

/// The names in the section "Commands:" of a help.
fn commands(help: &str) -> Vec<String> {
    let section = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let named = section.take_while(|line| !line.is_empty()).filter(|line| line.starts_with("  "));
    let names = named.filter(|line| !line.starts_with("   ")).filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

/// The help of a command and of all commands below it.
fn help(program: &Path, path: &[String], text: &mut String) {
    let mut arguments: Vec<&str> = path.iter().map(String::as_str).collect();
    arguments.push("--help");
    let (success, page) = run(program, &arguments, &std::env::temp_dir());
    assert!(success, "{arguments:?}: {page}");
    let name = program.file_name().unwrap().to_str().unwrap();
    *text += &format!("## {}\n\n{}\n\n", [&[name.to_owned()], path].concat().join(" "), page.trim_end());
    for command in commands(&page) {
        help(program, &[path, &[command]].concat(), text);
    }
}

fn whole_help(program: &Path) -> String {
    let mut text = String::new();
    help(program, &[], &mut text);
    text
}

#[test]
fn every_help_is_as_accepted() {
    let daemon = whole_help(claviger());
    for command in ["claviger serve", "claviger host unwrap", "claviger keys generate"] {
        assert!(daemon.contains(&format!("## {command}\n")), "{command} was not found");
    }
    expect_file!["snapshots/help.txt"].assert_eq(&daemon);
    expect_file!["snapshots/loadgen-help.txt"].assert_eq(&whole_help(loadgen()));
}

/// Names, types and help of the metrics. Which series a metric has depends on what has happened.
fn families(metrics: &str) -> String {
    let told: BTreeSet<_> = metrics.lines().filter_map(|line| line.strip_prefix("# ")).collect();
    told.into_iter().fold(String::new(), |text, line| text + line + "\n")
}

/// Replaces what differs from run to run.
fn masked(text: &str, lab: &Lab) -> String {
    text.replace(&lab.path().display().to_string(), "FOLDER")
}

#[test]
fn metrics_and_errors_are_as_accepted() {
    let (daemon, lab) = Lab::start(Options::default());
    let host = lab.host(daemon.client());
    let health = claviger_tests::until_attested(&host);
    block(host.roll(claviger_protocol::payload::ApiVersion::V2, &health, &lab.protector())).unwrap();
    let metrics = block(Client::new(&daemon.metrics_url).unwrap().get("/metrics")).unwrap();
    expect_file!["snapshots/metrics.txt"].assert_eq(&families(std::str::from_utf8(&metrics.body).unwrap()));

    let mut errors = String::new();
    // Over the wire. A message may name nothing of what it found in a secret.
    let client = daemon.client();
    let garbage = "<Envelope/>";
    for (path, media_type, body) in [
        (ROLL, "application/xml", garbage),
        (ROLL, "application/json", "{}"),
        (ATTEST, "application/json", "{}"),
        (ATTEST, "application/json", "[}"),
        (METADATA, "application/xml", garbage),
        ("/nothing", "application/xml", garbage),
    ] {
        let reply = block(client.post(path, media_type, body)).unwrap();
        let text = match parse_error_reply(&reply.body) {
            Ok(error) => format!("{}: {}", error.name, error.message.unwrap_or_default()),
            Err(_) => String::from_utf8(reply.body.to_vec()).unwrap(),
        };
        errors += &format!("POST {path} {media_type} {body}\n{} {}\n\n", reply.status.as_u16(), text.trim_end());
    }
    // On the command line.
    let config = lab.config_file().display().to_string();
    for arguments in [
        &["hosts", "remove", "nobody", "--config", &config][..],
        &["hosts", "add", "new", "--public-key", "missing.pem", "--config", &config],
        &["keys", "disable", "0123", "--config", &config],
        &["hsm", "drain", "hsm-z", "--config", &config],
        &["hosts", "list", "--config", "missing.toml"],
        &["hosts", "list", "--socket", "missing.sock"],
        &["serve", "--config", "missing.toml"],
        &["host", "attest", "--url", "ftp://hgs.example", "--dir", "missing"],
        &["guardian", "import", "missing.xml"],
        &["audit", "verify", "missing.log"],
    ] {
        let (success, text) = run(claviger(), arguments, lab.path());
        assert!(!success, "{arguments:?}: {text}");
        let shown = masked(&arguments.join(" "), &lab);
        errors += &format!("$ claviger {shown}\n{}\n\n", masked(text.trim_end(), &lab));
    }
    expect_file!["snapshots/errors.txt"].assert_eq(&errors);
    assert!(daemon.stop().success());
}
