//! Tests of how the daemon behaves as a service: log for the journal and for programs, reload that answers, exit statuses,
//! probes for load balancers, copies of the audit trail, and exports for a SIEM.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};

use claviger_client::http::Client;
use claviger_tests::{Administrator, HOST, Lab, Options, PATIENCE, block, claviger, run, said, sandbox, until};
use serde_json::Value;

fn serve(lab: &Lab) -> Command {
    let mut command = Command::new(claviger());
    command.args(["serve", "--config"]).arg(lab.config_file()).stdin(Stdio::null());
    command
}

/// Runs the daemon until the file has this text, and stops it.
fn until_logged(lab: &Lab, mut command: Command, text: &str) -> String {
    let mut child = command.spawn().unwrap();
    let log = until("the daemon serves", || {
        Some(std::fs::read_to_string(lab.file("log")).unwrap()).filter(|log| log.contains(text))
    });
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    log
}

#[test]
fn lines_for_the_journal_have_priorities_and_json_is_json_only() {
    let lab = Lab::make(Options::default());
    let log = || File::create(lab.file("log")).unwrap();
    let file = log();
    let of = file.metadata().unwrap();
    let mut command = serve(&lab);
    command.env("JOURNAL_STREAM", format!("{}:{}", of.dev(), of.ino())).stdout(Stdio::null()).stderr(file);
    let text = until_logged(&lab, command, "member is up");
    assert!(text.lines().all(|line| line.starts_with("<6>") || line.starts_with("<4>")), "{text}");

    let (file, mut command) = (log(), serve(&lab));
    command.args(["--log", "json"]).stdout(file.try_clone().unwrap()).stderr(file);
    let text = until_logged(&lab, command, "\"listening\"");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let listening = lines.iter().find(|line| line["message"] == "listening").unwrap();
    assert!(listening["url"].as_str().unwrap().starts_with("http://127.0.0.1:"), "{listening}");

    // A failed start, too. Its status lets a service manager try again, unlike that of an invalid file.
    lab.configure(|config| config.server.admin_group = Some("no-such-group".to_owned()));
    let failed = serve(&lab).args(["--log", "json"]).output().unwrap();
    assert_eq!(failed.status.code(), Some(1), "{}", said(&failed));
    let last: Value = serde_json::from_str(said(&failed).lines().last().unwrap()).unwrap();
    assert!(last["error"].as_str().unwrap().contains("no-such-group"), "{last}");
    std::fs::write(lab.config_file(), "[server]\nlisten = 1\n").unwrap();
    assert_eq!(serve(&lab).output().unwrap().status.code(), Some(78));
}

#[test]
fn a_reload_answers_and_load_balancers_may_ask() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let administrator = Administrator(&lab);
    let probe = |url: &str, path: &str| {
        let client = Client::new(url).unwrap().with_timeout(PATIENCE);
        let reply = block(client.get(path)).unwrap();
        (reply.status.as_u16(), String::from_utf8_lossy(&reply.body).into_owned())
    };
    assert_eq!(probe(&daemon.url, "/ready").0, 404, "only if it is configured");
    let good = std::fs::read_to_string(lab.config_file()).unwrap();
    lab.configure(|config| {
        config.release.queue = 99;
        config.server.probes = true;
    });
    let reloaded = administrator.run(&["reload"]);
    assert!(
        reloaded.status.success() && said(&reloaded).contains("needs a restart: server.probes"),
        "{}",
        said(&reloaded)
    );
    std::fs::write(lab.config_file(), good.replace("queue = 4096", "queue = 0")).unwrap();
    let socket = lab.socket();
    let refused = run(["reload", "--socket", socket.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("release.queue: 0 is out of bounds"), "{}", said(&refused));
    let outcomes: Vec<_> = lab.trail().into_iter().filter(|line| line["event"] == "reload").collect();
    let outcomes: Vec<_> = outcomes.iter().map(|line| line["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["requested", "success", "requested", "failed"]);
    assert!(daemon.stop().success());

    std::fs::write(lab.config_file(), good).unwrap();
    lab.configure(|config| config.server.probes = true);
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    assert_eq!(probe(&daemon.url, "/ready"), (200, "yes\n".to_owned()));
    assert_eq!(probe(&daemon.url, "/live"), (200, "yes\n".to_owned()));
    let (status, information) = probe(&daemon.url, "/Attestation/getinfo");
    assert!(status == 200 && information.contains("Attest"), "{information}");
    administrator.json(&["hsm", "drain", "hsm-a", "--force"]);
    until("it is not ready", || (probe(&daemon.url, "/ready") == (503, "no\n".to_owned())).then_some(()));
}

#[test]
fn what_a_reviewer_may_not_do_is_on_record_and_lines_are_copied_and_exported() {
    let lab = Lab::make(Options::default());
    let reader = UnixDatagram::bind(lab.file("syslog")).unwrap();
    reader.set_read_timeout(Some(PATIENCE)).unwrap();
    lab.configure(|config| config.audit.syslog = Some(lab.file("syslog")));
    let daemon = lab.serve();
    let review = lab.file("state/review.sock");
    let refused = run(["hosts", "remove", HOST, "--socket", review.to_str().unwrap()]);
    assert!(said(&refused).contains("only answers what changes nothing"), "{}", said(&refused));
    let line = lab.trail().into_iter().find(|line| line["event"] == "admin.refused").unwrap();
    assert_eq!((&line["change"], &line["outcome"]), (&"hosts.remove at review.sock".into(), &"refused".into()));
    assert!(line["by"]["uid"].is_u64());
    Administrator(&lab).json(&["hosts", "disable", HOST]);

    // The copies are the lines.
    let trail = std::fs::read_to_string(lab.file("state/audit.jsonl")).unwrap();
    let lines: Vec<&str> =
        trail.lines().filter(|line| line.contains("admin.refused") || line.contains("hosts.disable")).collect();
    let mut copies = Vec::new();
    while copies.len() < lines.len() {
        let mut message = [0; 65536];
        let length = reader.recv(&mut message).unwrap();
        let message = String::from_utf8(message[..length].to_vec()).unwrap();
        let copy = message.strip_prefix("<85>claviger-audit: ").unwrap().to_owned();
        if copy.contains("admin.refused") || copy.contains("hosts.disable") {
            copies.push(copy);
        }
    }
    assert_eq!(copies, lines);
    assert!(daemon.stop().success());

    let config = lab.config_file();
    let export = |more: &[&str]| {
        let exported = run([&["audit", "export", "--config", config.to_str().unwrap()], more].concat());
        assert!(exported.status.success(), "{}", said(&exported));
        said(&exported)
    };
    assert_eq!(export(&[]), std::fs::read_to_string(lab.file("state/audit.jsonl")).unwrap());
    assert_eq!(export(&["--since", "2100-01-01"]), "");
    let cef = export(&["--format", "cef", "--since", "1h"]);
    assert_eq!(cef.lines().count(), export(&[]).lines().count());
    let refused = cef.lines().find(|line| line.contains("|admin.refused|")).unwrap();
    assert!(refused.starts_with("CEF:0|Claviger|claviger|"), "{refused}");
    assert!(
        refused.contains("|admin.refused refused|7|rt=") && refused.contains("cs3=hosts.remove at review.sock"),
        "{refused}"
    );
}

/// In a sandbox, where there are other users.
const USERS: &str = r#"
export PATH=/tmp/claviger-bin:$PATH
systemd-sysusers "$PWD"/daemon/packaging/sysusers.d/claviger.conf
systemd-tmpfiles --create "$PWD"/daemon/packaging/tmpfiles.d/claviger.conf
install -D -m 0644 daemon/packaging/systemd/claviger.service /usr/lib/systemd/system/claviger.service
install -m 0755 /tmp/claviger-bin/claviger /usr/bin/claviger
useradd --groups claviger-admin alice
useradd bob
claviger init --soft-tokens 1 --certificates lab --bits 2048
systemctl enable --now claviger
claviger init --certificates lab --bits 2048
refused() { if "$@"; then exit 7; fi; }
as() { user=$1; shift; setpriv --reuid "$user" --regid "$user" --init-groups "$@"; }
refused as alice cat /etc/claviger/claviger.toml
as alice claviger keys list
as alice claviger reload
refused as bob claviger keys list
systemctl reload claviger
echo 'nonsense = 1' >>/etc/claviger/claviger.toml
refused systemctl reload claviger
"#;

#[test]
fn administrators_need_their_group_and_nothing_else() {
    if !sandbox::is_possible() {
        return;
    }
    let ran = sandbox::run(&format!("set -x\n{USERS}"));
    let said = said(&ran);
    assert!(ran.status.success(), "{said}");
    for expected in ["configuration reloaded", "as claviger or as a member of the group claviger-admin", "nonsense"] {
        assert!(said.contains(expected), "no {expected:?} in\n{said}");
    }
}
