//! Tests of the daemon as a system service: messages to systemd, sockets, the log.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::Command;

use claviger::config::LogFormat;
use claviger_tests::{Daemon, Lab, Options, PATIENCE, Process, claviger, run, said};
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;

/// Returns the next message to systemd's stand-in, except those for the watchdog.
fn told(socket: &UnixDatagram) -> String {
    let mut octets = [0; 4096];
    loop {
        let read = socket.recv(&mut octets).expect("systemd is told nothing");
        let text = String::from_utf8(octets[..read].to_vec()).unwrap();
        if text.trim() != "WATCHDOG=1" {
            return text;
        }
    }
}

#[test]
fn systemd_is_told_how_the_daemon_is() {
    let lab = Lab::make(Options::default());
    let path = lab.file("notify.sock");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = Command::new(claviger());
    command.arg("serve").arg("--config").arg(lab.config_file());
    let mut daemon = Daemon::start(command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "200000"));
    assert_eq!(told(&socket), "READY=1\n");

    let mut octets = [0; 64];
    for _ in 0..3 {
        let read = socket.recv(&mut octets).unwrap();
        assert_eq!(&octets[..read], b"WATCHDOG=1\n");
    }

    let before = clock_gettime(ClockId::Monotonic).tv_sec;
    daemon.process.hang_up();
    let reloading = told(&socket);
    let (first, time) = reloading.trim().split_once('\n').unwrap();
    let time: i64 = time.strip_prefix("MONOTONIC_USEC=").unwrap().parse().unwrap();
    assert!(first == "RELOADING=1" && time / 1_000_000 >= before, "{reloading}");
    assert_eq!(told(&socket), "READY=1\n");

    daemon.process.terminate();
    assert_eq!(told(&socket), "STOPPING=1\n");
    assert!(daemon.process.wait().success());
}

#[test]
fn who_reviews_can_change_nothing() {
    let lab = Lab::make(Options::default());
    let sockets = lab.file("sockets");
    std::fs::create_dir(&sockets).unwrap();
    lab.configure(|config| {
        config.server.sockets = Some(sockets.clone());
        // Any group; it need not have a name.
        config.server.review_group = Some("4711".to_owned());
    });
    let daemon = lab.serve();
    let [admin, review] = ["admin.sock", "review.sock"].map(|name| sockets.join(name));
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&admin), mode(&review)), (0o600, 0o660));
    assert_eq!(std::os::unix::fs::MetadataExt::gid(&std::fs::metadata(&review).unwrap()), 4711);

    let at = |socket: &Path, arguments: &[&str]| {
        run(arguments.iter().copied().chain(["--socket", socket.to_str().unwrap()]))
    };
    for list in [["hosts", "list"], ["keys", "list"], ["hsm", "list"]] {
        let reviewed = at(&review, &list);
        assert!(reviewed.status.success(), "{}", said(&reviewed));
        assert_eq!(said(&reviewed).lines().count(), said(&at(&admin, &list)).lines().count());
    }
    for change in [&["hosts", "remove", "demo-host"][..], &["hsm", "drain", "hsm-a"], &["hsm", "probe", "hsm-a"]] {
        let refused = at(&review, change);
        assert!(!refused.status.success() && said(&refused).contains("use admin.sock"), "{}", said(&refused));
    }
    // Requests on this socket are short; on the administrators' socket they may contain an import.
    let answered = |socket: &Path, octets: usize| {
        let mut stream = UnixStream::connect(socket).unwrap();
        let request = format!("{{\"command\":\"hosts.list\",\"x\":\"{}\"}}", "x".repeat(octets));
        // Writes as much as the other side accepts.
        let _ = stream.write_all(request.as_bytes()).and_then(|()| stream.write_all(b"\n"));
        let mut line = String::new();
        let _ = BufReader::new(stream).read_line(&mut line);
        line
    };
    assert!(answered(&review, 64 * 1024).contains("a request has at most 65536 octets"));
    for (socket, octets) in [(&review, 63 * 1024), (&admin, 64 * 1024)] {
        let line = answered(socket, octets);
        assert!(line.contains("demo-host"), "{line}");
    }
    assert!(at(&review, &["hosts", "list"]).status.success());
    assert!(at(&admin, &["hosts", "remove", "demo-host"]).status.success());
    assert!(daemon.stop().success());
    assert!(!admin.exists() && !review.exists());
    // The trail names the user.
    let trail = lab.audit();
    let removed = trail.iter().find(|line| line["event"] == "hosts.remove").unwrap();
    assert!(removed["by"]["uid"].is_u64(), "{removed}");
}

#[test]
fn the_log_is_for_people_or_for_machines() {
    let lab = Lab::make(Options::default());
    let lines = |arguments: &[&str]| {
        let mut command = Command::new(claviger());
        command.arg("serve").arg("--config").arg(lab.config_file()).args(arguments).env("RUST_LOG", "info");
        let mut process = Process::start(&mut command);
        process.line(|line| (line.starts_with("listening on ") || line.contains("\"listening\"")).then_some(()));
        process.terminate();
        assert!(process.wait().success());
        let output = process.output();
        let log = output.lines().filter(|line| line.contains("no new connections are accepted"));
        log.map(str::to_owned).collect::<Vec<_>>()
    };
    let json = |line: &str| serde_json::from_str::<Value>(line).ok();
    assert_eq!(json(&lines(&[])[0]), None);
    assert_eq!(json(&lines(&["--log", "json"])[0]).unwrap()["level"], "INFO");
    lab.configure(|config| config.log.format = LogFormat::Json);
    assert!(json(&lines(&[])[0]).unwrap()["message"].as_str().unwrap().starts_with("no new"));
    assert_eq!(json(&lines(&["--log", "text"])[0]), None);
}
