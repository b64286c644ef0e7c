//! Tests of the audit trail: it cannot be flooded, its loss is noticed, and changes to it are detected.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger_client::host::Host;
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_tests::{
    ATTEST, Administrator, Daemon, HOST, Lab, Options, ROLL, block, claviger, open_release, roll_request, run, said,
    tool, until,
};
use data_encoding::BASE64;
use serde_json::Value;

const XML: &str = "application/xml";

/// Returns the JSON report and the status of `claviger audit verify` for files.
fn verify(arguments: &[&str], files: &[&Path]) -> (Value, i32) {
    let output =
        Command::new(claviger()).args(["audit", "verify", "--json"]).args(arguments).args(files).output().unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", said(&output)));
    (report, output.status.code().unwrap())
}

/// Sends a release as the lab's own host; returns the status.
fn release(lab: &Lab, daemon: &Daemon, health: &[u8]) -> u16 {
    let client = daemon.client();
    let reply = block(client.post(ROLL, XML, roll_request(health, &lab.protector()))).unwrap();
    if reply.status == 200 {
        open_release(&reply.body, &lab.identity()).unwrap();
    }
    reply.status.as_u16()
}

/// Returns the certificate of the lab's signing key, from the state.
fn signing_certificate(lab: &Lab) -> PathBuf {
    let state = rusqlite::Connection::open(lab.file("state/state.db")).unwrap();
    let der: Vec<u8> =
        state.query_row("SELECT der FROM certificates WHERE kind = 'signing'", [], |row| row.get(0)).unwrap();
    let path = lab.file("signing.der");
    fs::write(&path, der).unwrap();
    path
}

fn openssl(arguments: &[&str]) -> Output {
    tool("openssl", Command::new("openssl").args(arguments))
}

#[test]
fn nobody_fills_the_trail() {
    const ANYBODY: usize = 400;
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let client = daemon.client();
    let before = lab.trail().len();
    let begun = Instant::now();
    // A registered host's public key is no secret: any request that contains it is refused in the host's name.
    let stranger = Host::new(daemon.client(), RsaPrivateKey::generate(2048).unwrap(), lab.identity());
    block(async {
        for at in 0..ANYBODY {
            let (path, media_type, body) = match at % 4 {
                0 => (ROLL, XML, "<x/>".to_owned()),
                1 => (ATTEST, "application/json", "{}".to_owned()),
                2 => ("/Attestation/v1.0/attest", "application/json", "{}".to_owned()),
                _ => (ROLL, XML, String::from_utf8(roll_request(b"no certificate", &lab.protector())).unwrap()),
            };
            assert!(client.post(path, media_type, body).await.unwrap().status.is_client_error());
        }
        stranger.attest().await.unwrap_err();
    });
    let seconds = begun.elapsed().as_secs();
    let metrics = block(daemon.metrics());
    assert_eq!(metrics.count("claviger_audit_counted_refusals_total", &[]), ANYBODY as u64 + 1);
    assert!(daemon.stop().success());
    let trail = lab.trail();
    let lines: Vec<_> = trail[before..].iter().filter(|line| line["event"] == "refusals").collect();
    let counted: u64 = lines.iter().map(|line| line["count"].as_u64().unwrap()).sum();
    assert_eq!(counted, ANYBODY as u64 + 1);
    assert!(lines.len() as u64 <= seconds + 3, "{} lines in {seconds} s", lines.len());
    for line in &lines {
        assert_eq!(line["addresses"].as_object().unwrap().keys().collect::<Vec<_>>(), ["127.0.0.1"], "{line}");
        assert!(line.to_string().len() < 1500, "{line}");
    }
    let of = |outcome: &str| lab.audit()[..].iter().filter(|line| line["outcome"] == outcome).count();
    assert!(of("InvalidRequestException") >= ANYBODY / 4 && of("HealthCertificateException") >= ANYBODY / 4);
}

#[test]
fn a_line_says_who_got_what() {
    let lab = Lab::make(Options::default());
    lab.configure(|config| config.server.node = Some("hgs-7".to_owned()));
    let daemon = lab.serve();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    let reply = block(daemon.client().post(ROLL, XML, roll_request(&health, &lab.protector()))).unwrap();
    let (_, egress) = open_release(&reply.body, &lab.identity()).unwrap();
    // Another identity key of the same host.
    let metrics = block(daemon.metrics());
    assert_eq!(metrics.count("claviger_host_identity_changes_total", &[]), 0);
    let identity = Arc::new(RsaPrivateKey::generate(2048).unwrap());
    block(Host::new(daemon.client(), lab.key("host/hostkey.pem"), identity.clone()).attest()).unwrap();
    assert_eq!(block(daemon.metrics()).count("claviger_host_identity_changes_total", &[]), 1);
    daemon.process.line(|line| (line.contains("identity key has changed") && line.contains(HOST)).then_some(()));
    assert!(daemon.stop().success());

    let trail = lab.audit();
    let [.., attested, released, again] = trail.as_slice() else { panic!() };
    let certificate = claviger_protocol::certificate::Certificate::parse(&health).unwrap();
    let hex = |bytes: &[u8]| data_encoding::HEXLOWER.encode(bytes);
    let sha256 = |bytes: &[u8]| hex(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref());
    let own = hex(&lab.identity().public().spki_sha256());
    for line in [attested, released] {
        assert_eq!(
            (&line["node"], &line["address"], &line["host"]),
            (&"hgs-7".into(), &"127.0.0.1".into(), &HOST.into())
        );
        assert_eq!(
            (&line["identity_key"], &line["health_serial"]),
            (&own.clone().into(), &hex(certificate.serial()).into())
        );
    }
    assert_eq!((&released["api"], &released["egress"]), (&"v2.0".into(), &sha256(&egress).into()));
    let state = rusqlite::Connection::open(lab.file("state/state.db")).unwrap();
    let sql = "SELECT thumbprint FROM certificates WHERE kind = 'encryption'";
    let guardian: String = state.query_row(sql, [], |row| row.get(0)).unwrap();
    assert_eq!(released["guardian_key"], guardian);
    assert_eq!(again["identity_key"], hex(&identity.public().spki_sha256()));
}

#[test]
fn the_chain_survives_a_kill_and_its_signature_is_anybodys_to_check() {
    let lab = Lab::make(Options::default());
    lab.configure(|config| config.audit.checkpoint_seconds = 1);
    let trail = lab.file("state/audit.jsonl");
    let certificate = signing_certificate(&lab);
    let certificate = ["--certificate", certificate.to_str().unwrap()];
    let mut daemon = lab.serve();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    // Killed twice during releases.
    for _ in 0..2 {
        let url = daemon.url.clone();
        let ask = || {
            let client = claviger_client::http::Client::new(&url).unwrap();
            let reply = block(client.post(ROLL, XML, roll_request(&health, &lab.protector()))).ok()?;
            assert_eq!(reply.status, 200);
            Some(reply.headers["x-request-id"].to_str().unwrap().to_owned())
        };
        let answered: Vec<String> = std::thread::scope(|scope| {
            let clients: Vec<_> = (0..3).map(|_| scope.spawn(|| std::iter::from_fn(ask).collect::<Vec<_>>())).collect();
            let before = lab.trail().len();
            let count = || fs::read_to_string(&trail).unwrap().lines().count();
            until("releases", || (count() > before + 50).then_some(()));
            rustix::process::kill_process(daemon.process.pid(), rustix::process::Signal::KILL).unwrap();
            clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
        });
        // Every answered release is in the trail.
        assert!(!daemon.process.wait().success() && !answered.is_empty());
        let text = fs::read_to_string(&trail).unwrap();
        for id in answered {
            assert!(text.contains(&format!("\"request\":\"{id}\"")), "{id} was answered, and is not on record");
        }
        let (report, _) = verify(&certificate, &[&trail]);
        assert_eq!(report["fault"], Value::Null, "{report}");
        daemon = lab.serve();
    }
    // The next daemon signs the lines that the last one left unsigned, and its own.
    assert_eq!(release(&lab, &daemon, &health), 200);
    until("a checkpoint", || {
        let (report, status) = verify(&certificate, &[&trail]);
        assert_eq!(report["fault"], Value::Null, "{report}");
        (status == 0 && report["unsigned"] == 0).then_some(())
    });
    assert!(daemon.stop().success());

    // Verification with openssl, as the documentation describes.
    let checkpoint = lab.trail().into_iter().rfind(|line| line["event"] == "checkpoint").unwrap();
    let text = |field: &str| checkpoint[field].as_str().unwrap().to_owned();
    let signed = format!("{}\n{}\n{}\n{}\n", text("node"), checkpoint["line"], text("hash"), text("time"));
    let files = ["message", "signature", "key.pem"].map(|name| lab.file(name));
    let [message, signature, key] = files.each_ref().map(|path| path.to_str().unwrap());
    fs::write(message, format!("claviger audit checkpoint 1\n{signed}")).unwrap();
    fs::write(signature, BASE64.decode(text("signature").as_bytes()).unwrap()).unwrap();
    let made = openssl(&["x509", "-in", certificate[1], "-pubkey", "-noout", "-out", key]);
    assert!(made.status.success(), "{}", said(&made));
    let checked = openssl(&["dgst", "-sha256", "-verify", key, "-signature", signature, message]);
    assert!(said(&checked).contains("Verified OK"), "{}", said(&checked));
    // The hash is that of the line; `n` numbers the lines of this single file.
    let lines = fs::read_to_string(&trail).unwrap();
    let line = lines.lines().find(|line| line.starts_with(&format!("{{\"n\":{},", checkpoint["line"]))).unwrap();
    fs::write(message, line).unwrap();
    let hashed = openssl(&["dgst", "-sha256", "-r", message]);
    assert!(said(&hashed).starts_with(&text("hash")), "{}", said(&hashed));
    // With another trusted certificate nothing is proved.
    let other = lab.file("tenant/owner-signing.crt.pem");
    assert_eq!(verify(&["--certificate", other.to_str().unwrap()], &[&trail]).1, 3);
    assert_eq!(verify(&[], &[&trail]).1, 0);
    let own = Administrator(&lab).run(&["audit", "verify"]);
    assert!(own.status.success() && said(&own).contains("signed up to line"), "{}", said(&own));
}

#[test]
fn logrotate_keeps_one_chain_over_all_files() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    let trail = lab.file("state/audit.jsonl");
    // The package's own file, adapted to this trail and user.
    let package = concat!(env!("CARGO_MANIFEST_DIR"), "/../daemon/packaging/logrotate.d/claviger");
    let pid = daemon.process.pid().as_raw_nonzero();
    let (kept, signalled) = (lab.file("logrotate.conf"), format!("kill -HUP {pid}"));
    let text = fs::read_to_string(package).unwrap();
    let systemctl = text.lines().find(|line| line.contains("systemctl")).unwrap().trim();
    let text = text.replace("/var/lib/claviger/audit.jsonl", trail.to_str().unwrap()).replace(systemctl, &signalled);
    let text: Vec<&str> = text.lines().filter(|line| !line.trim().starts_with("su ")).collect();
    fs::write(&kept, text.join("\n").replace("create 0640 claviger claviger", "create 0640") + "\n").unwrap();
    for _ in 0..3 {
        assert_eq!(release(&lab, &daemon, &health), 200);
        // File names have a resolution of one second.
        std::thread::sleep(Duration::from_millis(1100));
        let status = lab.file("logrotate.state");
        let rotated = tool("logrotate", Command::new("logrotate").arg("-f").arg("-s").arg(&status).arg(&kept));
        assert!(rotated.status.success(), "{}", said(&rotated));
        assert_eq!(release(&lab, &daemon, &health), 200);
    }
    assert!(daemon.stop().success());
    let names = fs::read_dir(lab.file("state")).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<PathBuf> =
        names.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("audit.jsonl")).collect();
    assert_eq!(files.len(), 4, "{files:?}");
    assert!(files.iter().any(|path| path.extension().is_some_and(|end| end == "gz")), "{files:?}");
    // In any order, compressed or not, and from standard input.
    let paths: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let certificate = signing_certificate(&lab);
    let (report, status) = verify(&["--certificate", certificate.to_str().unwrap()], &paths);
    assert_eq!((status, &report["first"], &report["fault"]), (0, &1.into(), &Value::Null), "{report}");
    let mut piped = Command::new(claviger())
        .args(["audit", "verify", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    piped.stdin.take().unwrap().write_all(&fs::read(&trail).unwrap()).unwrap();
    assert!(piped.wait_with_output().unwrap().status.success());
    let all = Administrator(&lab).run(&["audit", "verify"]);
    assert!(all.status.success(), "{}", said(&all));
    // A missing file in the middle is detected.
    let mut names = paths.clone();
    names.sort();
    names.remove(2);
    let (report, status) = verify(&[], &names);
    assert!(status == 1 && report["fault"]["what"].as_str().unwrap().contains("missing"), "{names:?}: {report}");
}

#[test]
fn what_is_changed_is_found_by_the_command_and_by_the_doctor() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    for _ in 0..3 {
        assert_eq!(release(&lab, &daemon, &health), 200);
    }
    let trail = lab.file("state/audit.jsonl");
    let doctor = || said(&Administrator(&lab).run(&["doctor"]));
    until("a whole trail", || doctor().contains("are one chain").then_some(()));
    // Removed while the daemon runs: the daemon notices it without a new record.
    let kept = fs::read(&trail).unwrap();
    fs::remove_file(&trail).unwrap();
    let told = doctor();
    assert!(told.contains("ERROR    audit") && told.contains("the daemon has written line"), "{told}");
    let status = Administrator(&lab).json(&["audit", "status"]);
    assert!(status["line"].as_u64().unwrap() > 3 && status["hash"].as_str().unwrap().len() == 64, "{status}");
    // The next release is recorded, in a new file under the same name.
    assert_eq!(release(&lab, &daemon, &health), 200);
    assert!(fs::read_to_string(&trail).unwrap().contains("\"event\":\"release\""));
    assert_eq!(block(daemon.metrics()).count("claviger_audit_file_changes_total", &[("how", "deleted")]), 1);
    daemon.process.line(|line| line.contains("the audit trail's file was deleted").then_some(()));
    assert!(daemon.stop().success());
    let rest = fs::read(&trail).unwrap();
    fs::write(&trail, [&kept[..], &rest].concat()).unwrap();
    let (report, status) = verify(&[], &[&trail]);
    assert_eq!((status, &report["fault"]), (0, &Value::Null), "one chain: {report}");

    let text = fs::read_to_string(&trail).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let at = lines.iter().position(|line| line.contains("\"event\":\"release\"")).unwrap();
    let edited = lines[at].replace("\"outcome\":\"success\"", "\"outcome\":\"failed\"");
    assert_ne!(edited, lines[at]);
    let mut cases: Vec<(&str, Vec<&str>)> =
        vec![("edit", lines.clone()), ("delete", lines.clone()), ("insert", lines.clone())];
    cases[0].1[at] = &edited;
    cases[1].1.remove(at);
    cases[2].1.insert(at, lines[at - 1]);
    let mut swapped = lines.clone();
    swapped.swap(at, at + 1);
    cases.push(("reorder", swapped));
    for (kind, lines) in cases {
        fs::write(&trail, lines.join("\n") + "\n").unwrap();
        let (report, status) = verify(&[], &[&trail]);
        let line = report["fault"]["line"].as_u64().unwrap_or_default() as usize;
        assert!(status == 1 && (at..=at + 2).contains(&line), "{kind}: {report}");
        let told = doctor();
        assert!(told.contains("ERROR    audit") && told.contains("not one chain"), "{kind}: {told}");
    }
    // Truncated before a signed line: the next daemon reports it, and the trail keeps the gap.
    fs::write(&trail, lines[..at].join("\n") + "\n").unwrap();
    assert_eq!(verify(&[], &[&trail]).1, 0, "the end of a file proves nothing of what came after it");
    let daemon = lab.serve();
    daemon.process.line(|line| line.contains("ends before a line that was written").then_some(()));
    assert_eq!(release(&lab, &daemon, &health), 200);
    assert!(daemon.stop().success());
    let (report, status) = verify(&[], &[&trail]);
    assert!(status == 1 && report["fault"]["what"].as_str().unwrap().contains("missing"), "{report}");
    // An unreadable file is not a fault of the trail.
    let output = run(["audit", "verify", lab.file("nothing").to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
}

/// A pipe that nobody reads simulates a disk that does not answer: the write blocks.
#[test]
fn nothing_leaves_while_the_disk_hangs_and_everybody_is_told_in_time() {
    let lab = Lab::make(Options::default());
    lab.configure(|config| config.release.deadline_ms = 2_000);
    let daemon = lab.serve();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    assert!(daemon.stop().success());
    let (trail, pipe) = (lab.file("state/audit.jsonl"), lab.file("pipe"));
    fs::rename(&trail, lab.file("state/audit.old")).unwrap();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    symlink(&pipe, &trail).unwrap();
    let mut reader = fs::OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    let mut daemon = lab.serve();
    block(daemon.until_ready_is(200));
    // The pipe holds 64 KiB; some releases are recorded before it is full.
    let mut released = 0;
    let begun = until("a release that is refused", || {
        let begun = Instant::now();
        let status = release(&lab, &daemon, &health);
        released += u32::from(status == 200);
        (status == 503).then_some(begun)
    });
    assert!(released > 0);
    assert!(begun.elapsed() >= Duration::from_millis(1_500), "refused before the deadline");
    // No request waits for ever, including those of administrators.
    let metrics = block(daemon.metrics());
    let before = metrics.count("claviger_releases_total", &[("outcome", "success")]);
    let refused = Administrator(&lab).run(&["hosts", "disable", HOST]);
    assert!(!refused.status.success() && said(&refused).contains("audit trail"), "{}", said(&refused));
    assert_eq!(release(&lab, &daemon, &health), 503);
    let metrics = block(daemon.metrics());
    assert_eq!(metrics.count("claviger_releases_total", &[("outcome", "success")]), before);
    assert!(metrics.sum("claviger_audit_writing_seconds", &[]).unwrap() > 1.0);
    // The disk answers again, and service continues.
    let reading = std::thread::spawn(move || {
        let mut part = [0; 65_536];
        while reader.read(&mut part).is_ok_and(|length| !String::from_utf8_lossy(&part[..length]).contains("the-end")) {
        }
        reader
    });
    until("a release again", || (release(&lab, &daemon, &health) == 200).then_some(()));
    fs::OpenOptions::new().write(true).open(&pipe).unwrap().write_all(b"the-end\n").unwrap();
    let reader = reading.join().unwrap();
    // A stop does not wait for a disk that hangs permanently.
    until("the pipe is full again", || (release(&lab, &daemon, &health) == 503).then_some(()));
    daemon.process.terminate();
    assert!(daemon.process.wait().success());
    drop(reader);
}

/// A small disk, which only root can create. It is removed when this is dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf, mib: u32) -> Option<Self> {
        fs::create_dir(&at).unwrap();
        let size = format!("size={mib}m,mode=0700");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&at).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then_some(Self(at))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn on_a_full_disk_keys_are_released_and_hosts_can_be_shut_out() {
    let lab = Lab::make(Options::default());
    let Some(disk) = Disk::mount(lab.file("small"), 48) else { return };
    let copied = Command::new("cp").arg("-a").arg(lab.file("state/.")).arg(&disk.0).status().unwrap();
    assert!(copied.success());
    lab.configure(|config| {
        config.server.state = lab.file("small");
        config.audit.reserve_mib = 8;
    });
    let daemon = lab.serve();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    assert_eq!(release(&lab, &daemon, &health), 200);
    let filler = lab.file("small/filler");
    let mut file = fs::File::create(&filler).unwrap();
    while file.write(&[1; 4096]).is_ok_and(|written| written > 0) {}
    // Refusals, grants, and changes by administrators.
    for _ in 0..30 {
        assert_eq!(release(&lab, &daemon, &health), 200);
    }
    let missing = block(daemon.metrics()).sum("claviger_audit_reserve_missing_bytes", &[]).unwrap();
    assert!(missing > 0.0, "the disk was not full");
    assert_eq!(block(daemon.probe("/ready")).status, 200);
    let reply = block(daemon.client().post(ROLL, XML, "<x/>")).unwrap();
    assert_eq!(reply.status, 400);
    let junk = block(daemon.client().post(ROLL, XML, roll_request(&health, b"<x/>"))).unwrap();
    assert_eq!(junk.status, 400);
    let disabled = Administrator(&lab).run(&["hosts", "disable", HOST]);
    assert!(disabled.status.success(), "{}", said(&disabled));
    assert_eq!(release(&lab, &daemon, &health), 403);
    // There is room again: the reserve is refilled, and the counted events are recorded.
    drop(file);
    fs::remove_file(filler).unwrap();
    assert!(Administrator(&lab).run(&["hosts", "enable", HOST]).status.success());
    until("the reserve is whole again", || {
        assert_eq!(release(&lab, &daemon, &health), 200);
        let missing = block(daemon.metrics()).sum("claviger_audit_reserve_missing_bytes", &[]).unwrap();
        (missing == 0.0).then_some(())
    });
    assert!(daemon.stop().success());
    let trail = lab.file("small/audit.jsonl");
    let (report, _) = verify(&[], &[&trail]);
    assert_eq!(report["fault"], Value::Null, "{report}");
    let text = fs::read_to_string(&trail).unwrap();
    for outcome in ["InvalidRequestException", "InvalidProtectorException", "HealthCertificateException"] {
        assert!(text.contains(outcome), "{outcome} is not told of");
    }
}

#[test]
fn a_limit_on_the_size_of_files_is_a_full_disk() {
    let lab = Lab::make(Options::default());
    let mut daemon = lab.serve();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    assert_eq!(release(&lab, &daemon, &health), 200);
    let limit = |bytes: &str| {
        let pid = daemon.process.pid().as_raw_nonzero().to_string();
        let set = tool("util-linux", Command::new("prlimit").args(["--pid", &pid, &format!("--fsize={bytes}:")]));
        assert!(set.status.success(), "{}", said(&set));
    };
    let trail = lab.file("state/audit.jsonl");
    // In the middle of the next line.
    limit(&(fs::metadata(&trail).unwrap().len() + 100).to_string());
    for _ in 0..3 {
        assert_eq!(release(&lab, &daemon, &health), 503);
    }
    assert!(daemon.process.output().contains("audit trail cannot be written"));
    limit("unlimited");
    // The daemon recovers without a request.
    block(daemon.until_ready_is(200));
    assert_eq!(release(&lab, &daemon, &health), 200);
    daemon.process.terminate();
    assert!(daemon.process.wait().success());
    let (report, status) = verify(&[], &[&trail]);
    assert_eq!((status, &report["fault"], &report["torn"]), (0, &Value::Null, &1.into()), "{report}");
}

/// The same kind of fault in the state file: SQLite would continue to write to a file that has no name any more.
#[test]
fn a_state_file_that_was_replaced_takes_no_change() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let file = lab.file("state/state.db");
    let copy = lab.file("state/copy.db");
    fs::copy(&file, &copy).unwrap();
    fs::rename(&copy, &file).unwrap();
    let refused = Administrator(&lab).run(&["hosts", "disable", HOST]);
    assert!(!refused.status.success() && said(&refused).contains("removed or replaced"), "{}", said(&refused));
    until("the metric says so", || {
        (block(daemon.metrics()).sum("claviger_state_stale", &[]) == Some(1.0)).then_some(())
    });
    assert!(daemon.stop().success());
    let daemon = lab.serve();
    assert!(Administrator(&lab).run(&["hosts", "disable", HOST]).status.success());
    assert!(daemon.stop().success());
}
