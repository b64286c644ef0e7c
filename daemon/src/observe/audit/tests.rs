//! The whole trail on real files, including disks that are full, hang or lose data.

#![allow(clippy::unwrap_used)]

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::process::Command;

use claviger_protocol::algorithm::SignatureAlgorithm;
use serde_json::Value;

use super::verify::{Report, Verifier};
use super::*;
use crate::request::Attempt;
use crate::service::testing::{certificate, key};

fn entry(request: &str) -> Entry {
    let mut entry = Attempt::new(request.to_owned()).entry("release", "success");
    entry.time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_007);
    entry.host = Some("host\nwith \"break\"".to_owned());
    entry.ms = 1.25;
    entry
}

fn later() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn open(path: &Path) -> Audit {
    open_with(path, |_| ())
}

fn open_with(path: &Path, set: impl FnOnce(&mut config::Audit)) -> Audit {
    let mut config = config::Audit { reserve_mib: 0, ..config::Audit::default() };
    set(&mut config);
    Audit::open(path, &config, "node").unwrap()
}

async fn record(audit: &Audit, request: &str) -> Result<(), AuditError> {
    audit.record(&entry(request), Class::Grant, later()).await
}

async fn records(audit: &Audit, requests: &[&str]) {
    for request in requests {
        record(audit, request).await.unwrap();
    }
}

/// The request ids of the records, without the trail's own lines.
fn requests(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.ends_with('\n') || text.is_empty());
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let records = lines.filter(|line| line["event"] == "release");
    records.map(|line| line["request"].as_str().unwrap().to_owned()).collect()
}

fn verify(files: &[&Path]) -> Report {
    verify_with(files, Vec::new())
}

fn verify_with(files: &[&Path], trusted: Vec<Certificate>) -> Report {
    let mut verifier = Verifier::new(trusted);
    for file in files {
        verifier.read(&file.display().to_string(), verify::open(file).unwrap()).unwrap();
    }
    verifier.finish()
}

/// Expects a complete chain up to this line.
fn whole(files: &[&Path], last: u64) -> Report {
    let report = verify(files);
    assert_eq!((&report.fault, report.first, report.last), (&None, Some(1), Some(last)), "{report:?}");
    report
}

fn signer() -> Certificate {
    Certificate::parse(&certificate()).unwrap()
}

/// Signs a checkpoint like an HSM.
async fn sign(audit: &Audit, certificate: &Certificate) {
    let draft = audit.due_checkpoint(Instant::now(), true).unwrap();
    let signature = key().sign(SignatureAlgorithm::DEFAULT, &draft.message()).unwrap();
    audit.checkpoint(&draft, certificate, &signature).await.unwrap();
}

#[tokio::test]
async fn a_record_is_one_line_of_json_that_is_there_on_return() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    for sync in [false, true] {
        let audit = open_with(&path, |config| config.sync = sync);
        record(&audit, "r").await.unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let (links, rest) = text.lines().last().unwrap().split_at(r#"{"n":2,"prev":"","#.len() + 64);
        assert!(links.starts_with(if sync { r#"{"n":3,"prev":""# } else { r#"{"n":2,"prev":""# }), "{links}");
        assert_eq!(
            rest,
            r#""node":"node","time":"2023-11-14T22:13:20.007Z","request":"r","event":"release","host":"host\nwith \"break\"","outcome":"success","ms":1.25}"#
        );
    }
    assert_eq!(requests(&path).len(), 2);
    whole(&[&path], 3);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640 & !umask(&folder));
}

/// The umask of this process, observed on a created file.
fn umask(folder: &tempfile::TempDir) -> u32 {
    let path = folder.path().join("umask");
    OpenOptions::new().create(true).write(true).truncate(true).mode(0o777).open(&path).unwrap();
    0o777 & !std::fs::metadata(&path).unwrap().permissions().mode()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_records_are_all_there_and_one_chain() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audit = Arc::new(open(&path));
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..2_000 {
        let audit = audit.clone();
        tasks.spawn(async move { record(&audit, &number.to_string()).await.unwrap() });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    let mut found: Vec<usize> = requests(&path).iter().map(|request| request.parse().unwrap()).collect();
    found.sort_unstable();
    assert_eq!(found, (0..2_000).collect::<Vec<_>>());
    whole(&[&path], 2_001);
    assert_eq!(audit.head().records, 2_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_daemons_of_one_folder_write_one_chain() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audits = [Arc::new(open(&path)), Arc::new(open(&path))];
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..400 {
        let audit = audits[number % 2].clone();
        tasks.spawn(async move { record(&audit, &number.to_string()).await.unwrap() });
    }
    tasks.join_all().await;
    assert_eq!(requests(&path).len(), 400);
    let text = std::fs::read_to_string(&path).unwrap();
    whole(&[&path], text.lines().count() as u64);
}

#[tokio::test]
async fn what_waits_is_written_when_the_trail_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audit = open(&path);
    let mut answers = Vec::new();
    for number in 0..100 {
        let body = serde_json::to_vec(&entry(&number.to_string())).unwrap();
        let class = if number % 2 == 0 { Class::Grant } else { Class::Administration };
        let sent = audit.send(|reply| Job::Line(Line { body, class, covers: None, reply }));
        // An administrator's change is written even if its caller no longer waits.
        answers.extend(sent.ok().filter(|_| class == Class::Grant));
    }
    drop(audit);
    assert_eq!(requests(&path).len(), 100);
    whole(&[&path], 101);
}

#[tokio::test]
async fn what_is_counted_is_told_once_also_when_the_daemon_stops_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let audit = open(&path);
    audit.count(&entry("counted"));
    // Sent to the writer, and cancelled before the result.
    let mut writing = Box::pin(audit.write_summary());
    let _ = std::future::poll_fn(|context| std::task::Poll::Ready(writing.as_mut().poll(context))).await;
    drop(writing);
    audit.write_summary().await;
    drop(audit);
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.matches("\"event\":\"refusals\"").count(), 1, "{text}");
    whole(&[&path], 2);
}

#[tokio::test]
async fn a_full_disk_fails_the_record_and_heals() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    std::os::unix::fs::symlink("/dev/full", &path).unwrap();
    let audit = open(&path);
    for _ in 0..2 {
        let error = record(&audit, "lost").await.unwrap_err();
        assert!(matches!(&error, AuditError::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull));
        assert!(error.to_string().contains("audit.jsonl cannot be written"), "{error}");
    }
    assert!(audit.refuses().unwrap().contains("cannot be written"));
    std::fs::remove_file(&path).unwrap();
    record(&audit, "healed").await.unwrap();
    assert_eq!(audit.refuses(), None);
    assert_eq!(requests(&path), ["healed"]);
    // A missing folder is treated like a full disk.
    audit.reopen().await.unwrap();
    std::fs::rename(folder.path(), folder.path().with_extension("away")).unwrap();
    assert!(audit.reopen().await.is_err());
    assert!(record(&audit, "lost").await.is_err());
    std::fs::rename(folder.path().with_extension("away"), folder.path()).unwrap();
    record(&audit, "again").await.unwrap();
    assert_eq!(requests(&path), ["healed", "again"]);
    whole(&[&path], 3);
}

/// A small disk, which only root can create.
struct Disk(tempfile::TempDir);

impl Disk {
    fn mount(mib: u32) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={mib}m");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder.path()).stderr(std::process::Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then(|| Self(folder))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Fills the disk completely.
    fn fill(&self) {
        let mut filler = std::fs::File::create(self.file("filler")).unwrap();
        while io::Write::write(&mut filler, &[1; 4096]).is_ok_and(|written| written > 0) {}
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn on_a_full_disk_refusals_stop_first_and_grants_go_on() {
    // Only root can create one.
    let Some(disk) = Disk::mount(16) else { return };
    let path = disk.file("audit.jsonl");
    let audit = open_with(&path, |config| config.reserve_mib = 2);
    record(&audit, "first").await.unwrap();
    assert_eq!(std::fs::metadata(disk.file("audit.reserve")).unwrap().blocks() * 512, 2 << 20);
    disk.fill();
    // Until the page that the trail already has is full.
    let refusal = entry("refusal");
    let mut refused = 0;
    while audit.record(&refusal, Class::Refusal, later()).await.is_ok() {
        refused += 1;
        assert!(refused < 100, "the disk is not full");
    }
    // This record found the disk full, and may not use the reserve.
    let error = audit.record(&refusal, Class::Refusal, later()).await.unwrap_err();
    assert!(matches!(error, AuditError::Reserved), "{error}");
    assert!(audit.decided(&refusal, Decision::Refused, later()).await, "refused all the same");
    for number in 0..1_000 {
        let class = if number % 2 == 0 { Class::Grant } else { Class::Administration };
        audit.record(&entry(&number.to_string()), class, later()).await.unwrap();
    }
    let missing = audit.head().reserve_missing;
    assert!((1..=2 << 20).contains(&missing), "{missing}");
    // There is room for an administrator's change.
    let free = rustix::fs::statvfs(disk.0.path()).unwrap().f_bavail * 4096;
    assert!(free > 0, "no room for the state");
    audit.write_summary().await;
    // The reserve is used up, and then nothing is granted.
    let long = Entry { change: Some("x".repeat(100_000)), ..entry("long") };
    let mut granted = 0;
    while audit.record(&long, Class::Grant, later()).await.is_ok() {
        granted += 1;
        assert!(granted < 100, "the reserve has no end");
    }
    assert!(!audit.decided(&long, Decision::Granted, later()).await);
    // There is room again: normal operation, and the counted refusals are summarised.
    std::fs::remove_file(disk.file("filler")).unwrap();
    record(&audit, "again").await.unwrap();
    let begun = Instant::now();
    while audit.head().reserve_missing > 0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "the reserve is not made again");
        tokio::time::sleep(Duration::from_millis(200)).await;
        record(&audit, "again").await.unwrap();
    }
    audit.record(&refusal, Class::Refusal, later()).await.unwrap();
    audit.write_summary().await;
    let text = std::fs::read_to_string(&path).unwrap();
    let summary: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!((&summary["event"], &summary["count"]), (&"refusals".into(), &1.into()), "{summary}");
    let report = verify(&[&path]);
    assert_eq!(report.fault, None, "{report:?}");
    assert!(report.torn > 0, "the disk was full in the middle of a line: {report:?}");
    drop(audit);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_hangs_is_waited_for_until_the_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    // Open for reading, so that its content could be read; but it is not.
    let mut reader = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let audit = open(&path);
    let begun = Instant::now();
    let mut written = 0;
    let soon = || Instant::now() + Duration::from_millis(300);
    while audit.decided(&entry("r"), Decision::Granted, soon()).await {
        written += 1;
        assert!(written < 10_000, "a pipe that nobody reads does not end");
    }
    assert!(begun.elapsed() < Duration::from_secs(30));
    let (_, since) = audit.backlog();
    assert!(since >= Duration::from_millis(200), "{since:?}");
    // No record waits beyond its deadline, and a refusal is written as a summary.
    let error = audit.record(&entry("late"), Class::Grant, soon()).await.unwrap_err();
    assert!(matches!(error, AuditError::Late), "{error}");
    assert!(audit.decided(&entry("refused"), Decision::Refused, soon()).await);
    // The disk answers again: abandoned records are not written, and the next record is.
    let reading = std::thread::spawn(move || {
        let (mut seen, mut part) = (Vec::new(), [0; 65536]);
        while !String::from_utf8_lossy(&seen).contains("\"request\":\"next\"") {
            let length = io::Read::read(&mut reader, &mut part).unwrap();
            seen.extend_from_slice(&part[..length]);
        }
        String::from_utf8(seen).unwrap()
    });
    record(&audit, "next").await.unwrap();
    let seen = reading.join().unwrap();
    assert!(!seen.contains("\"late\"") && !seen.contains("\"refused\""), "{seen}");
    let mut verifier = Verifier::new(Vec::new());
    verifier.read("pipe", seen.as_bytes()).unwrap();
    assert_eq!(verifier.finish().fault, None);
}

#[tokio::test]
async fn what_a_crash_left_of_a_line_is_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    std::fs::write(&path, "{\"request\":\"who").unwrap();
    let audit = open(&path);
    record(&audit, "next").await.unwrap();
    drop(audit);
    assert_eq!(requests(&path), ["next"]);
    assert!(std::fs::read_to_string(&path).unwrap().starts_with("{\"request\":\"who\n{\"n\":1"));
    // In the middle of the chain.
    let text = std::fs::read(&path).unwrap();
    let torn = [&text[..], b"{\"n\":3,\"prev\":\"ab"].concat();
    std::fs::write(&path, &torn).unwrap();
    let report = whole(&[&path], 2);
    assert!(report.ends_torn && report.torn == 0, "{report:?}");
    let audit = open(&path);
    records(&audit, &["after", "that"]).await;
    drop(audit);
    let report = whole(&[&path], 5);
    assert!(!report.ends_torn && report.torn == 1, "{report:?}");
    // Nothing else may be there instead.
    let text = std::fs::read_to_string(&path).unwrap();
    for changed in [text.replace("\"prev\":\"ab\n", "\"prev\":\"ac\n"), text.replace("{\"n\":3,\"prev\":\"ab\n", "")] {
        assert_ne!(changed, text);
        std::fs::write(&path, &changed).unwrap();
        assert!(verify(&[&path]).fault.is_some(), "{changed}");
    }
}

#[tokio::test]
async fn rotation_continues_in_a_new_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let old = folder.path().join("audit.jsonl.1");
    let audit = open(&path);
    record(&audit, "1").await.unwrap();
    std::fs::rename(&path, &old).unwrap();
    record(&audit, "2").await.unwrap();
    audit.reopen().await.unwrap();
    record(&audit, "3").await.unwrap();
    assert_eq!((requests(&old), requests(&path)), (vec!["1".to_owned(), "2".to_owned()], vec!["3".to_owned()]));
    whole(&[&old, &path], 5);
    let first: Value = serde_json::from_str(std::fs::read_to_string(&path).unwrap().lines().next().unwrap()).unwrap();
    assert_eq!((&first["outcome"], &first["previous_file"]), (&"file-begins".into(), &"audit.jsonl.1".into()));
    // While no daemon runs: detected by the renamed file, and without it by the saved position.
    drop(audit);
    let second = folder.path().join("audit.jsonl.2");
    std::fs::rename(&path, &second).unwrap();
    let audit = open(&path);
    record(&audit, "4").await.unwrap();
    audit.keep_head().await;
    drop(audit);
    whole(&[&old, &second, &path], 7);
    let kept = std::fs::read(&path).unwrap();
    for file in [&old, &second, &path] {
        std::fs::remove_file(file).unwrap();
    }
    let audit = open(&path);
    record(&audit, "5").await.unwrap();
    let third = folder.path().join("third");
    std::fs::write(&third, kept).unwrap();
    let report = verify(&[&third, &path]);
    assert_eq!((&report.fault, report.first, report.last), (&None, Some(6), Some(9)), "{report:?}");
    // Another file is out of order, or missing.
    assert!(verify(&[&path, &third]).fault.is_some());
}

#[tokio::test]
async fn a_file_that_is_not_the_trail_any_more_is_not_written_to() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let path = state.join("audit.jsonl");
    let audit = open(&path);
    records(&audit, &["1"]).await;
    // The file is deleted.
    std::fs::remove_file(&path).unwrap();
    records(&audit, &["2"]).await;
    assert_eq!(requests(&path), ["2"]);
    let report = verify(&[&path]);
    assert_eq!((&report.fault, report.first), (&None, Some(3)), "the chain goes on: {report:?}");
    // The file is replaced, as by a rotation whose signal never arrives.
    let old = state.join("audit.jsonl-x");
    std::fs::rename(&path, &old).unwrap();
    std::fs::write(&path, "").unwrap();
    records(&audit, &["3"]).await;
    assert_eq!((requests(&old), requests(&path)), (vec!["2".to_owned()], vec!["3".to_owned()]));
    // The file is moved to another folder, where no one would look for it.
    let elsewhere = folder.path().join("elsewhere");
    std::fs::rename(&path, &elsewhere).unwrap();
    records(&audit, &["4"]).await;
    assert_eq!((requests(&elsewhere), requests(&path)), (vec!["3".to_owned()], vec!["4".to_owned()]));
    // The file is renamed like a rotation does, but no new file appears.
    let rotated = state.join("audit.jsonl-y");
    std::fs::rename(&path, &rotated).unwrap();
    let begun = Instant::now();
    while !path.exists() {
        assert!(begun.elapsed() < Duration::from_secs(30), "it is written to for ever");
        records(&audit, &["5"]).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The folder is replaced, and deleted.
    let away = folder.path().join("away");
    std::fs::rename(&state, &away).unwrap();
    std::fs::create_dir(&state).unwrap();
    records(&audit, &["6"]).await;
    assert_eq!(requests(&path), ["6"]);
    let in_away = |name: &str| away.join(name);
    let files = [in_away("audit.jsonl-x"), elsewhere, in_away("audit.jsonl-y"), in_away("audit.jsonl"), path.clone()];
    let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let report = verify(&files);
    assert_eq!((&report.fault, report.first), (&None, Some(3)), "one chain through all of them: {report:?}");
    std::fs::remove_dir_all(&state).unwrap();
    assert!(record(&audit, "lost").await.is_err());
    std::fs::create_dir(&state).unwrap();
    records(&audit, &["7"]).await;
    assert_eq!(requests(&path), ["7"]);
}

#[tokio::test]
async fn every_kind_of_tampering_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let certificate = signer();
    let audit = open(&path);
    records(&audit, &["1", "2", "3", "4"]).await;
    sign(&audit, &certificate).await;
    records(&audit, &["5", "6"]).await;
    let head = audit.head().link;
    drop(audit);
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let report = verify_with(&[&path], vec![certificate.clone()]);
    assert_eq!((&report.fault, report.last, report.unsigned), (&None, Some(8), 2), "{report:?}");
    assert_eq!(report.last_hash, Some(head.hex()));
    let signed = report.signed.unwrap();
    assert!(signed.line == 5 && signed.trusted, "{signed:?}");

    let fault = |lines: &[String]| {
        std::fs::write(&path, lines.join("\n") + "\n").unwrap();
        verify_with(&[&path], vec![certificate.clone()]).fault.map(|fault| (fault.line, fault.what))
    };
    let all: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
    assert_eq!(fault(&all), None);
    type Tampering = fn(&mut Vec<String>);
    let cases: [(&str, u64, &str, Tampering); 9] = [
        ("edit", 4, "does not follow", |l| l[2] = l[2].replace("success", "refused")),
        ("delete", 3, "missing", |l| drop(l.remove(2))),
        ("insert", 4, "inserted", |l| l.insert(3, l[1].clone())),
        ("reorder", 3, "missing", |l| l.swap(2, 3)),
        ("foreign", 4, "no number", |l| l.insert(3, r#"{"request":"x","event":"release"}"#.to_owned())),
        ("garbage", 4, "is no record", |l| l.insert(3, "what is this".to_owned())),
        ("blank", 4, "is no record", |l| l.insert(3, String::new())),
        ("last", 8, "is no record", |l| l[7].truncate(40)),
        ("checkpoint", 6, "signature is wrong", |l| {
            let at = l[5].find("signature\":\"").unwrap() + 20;
            let other = if l[5].as_bytes()[at] == b'A' { "B" } else { "A" };
            l[5].replace_range(at..=at, other);
            // The rest of the chain is recomputed after the change.
            remake(l, 6);
        }),
    ];
    for (kind, line, what, tamper) in cases {
        let mut changed = all.clone();
        tamper(&mut changed);
        let (at, said) = fault(&changed).unwrap_or_else(|| panic!("{kind} is not found"));
        assert!(at == line && said.contains(what), "{kind}: line {at}: {said}");
    }
    // The whole chain was recomputed: the checkpoint signs another line.
    let mut forged = all.clone();
    forged[2] = forged[2].replace("success", "refused");
    remake(&mut forged, 3);
    let (at, said) = fault(&forged).unwrap();
    assert!(at == 6 && said.contains("signs another line 5"), "{at}: {said}");
    // With another signer, the chain is complete, but it proves nothing to a reader who knows the certificate.
    let report = {
        std::fs::write(&path, &text).unwrap();
        verify_with(&[&path], vec![signer()])
    };
    assert_eq!((&report.fault, &report.signed, report.unsigned), (&None, &None, 7), "{report:?}");
    // Truncated at its end: the saved position shows it, here and at the daemon's start.
    std::fs::write(&path, all[..4].join("\n") + "\n").unwrap();
    assert_eq!(whole(&[&path], 4).signed, None);
    let audit = open(&path);
    records(&audit, &["7"]).await;
    drop(audit);
    let fault = verify(&[&path]).fault.unwrap();
    assert!(fault.line == 5 && fault.what.contains("missing"), "{fault:?}");
}

#[tokio::test]
async fn no_byte_that_is_signed_can_be_changed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let certificate = signer();
    let audit = open(&path);
    records(&audit, &["1", "2"]).await;
    // Truncated inside a line that a crash left.
    drop(audit);
    let text = std::fs::read(&path).unwrap();
    std::fs::write(&path, [&text[..], b"{\"n\":4,\"pr"].concat()).unwrap();
    let audit = open(&path);
    records(&audit, &["3", "4"]).await;
    sign(&audit, &certificate).await;
    drop(audit);
    let text = std::fs::read(&path).unwrap();
    let checkpoint = text.windows(12).rposition(|part| part == b"\"checkpoint\"").unwrap();
    let covered = text[..checkpoint].iter().rposition(|byte| *byte == b'\n').unwrap();
    let verify = |bytes: &[u8]| {
        let mut verifier = Verifier::new(vec![certificate.clone()]);
        verifier.read("trail", bytes).unwrap();
        verifier.finish()
    };
    let report = verify(&text);
    assert_eq!((&report.fault, report.unsigned, report.torn), (&None, 0, 1), "{report:?}");
    for at in 0..=covered {
        for other in [text[at] ^ 1, b'\n', b' '] {
            let mut changed = text.clone();
            changed[at] = other;
            let is_same = changed == text;
            assert_eq!(verify(&changed).fault.is_none(), is_same, "byte {at} as {other}");
        }
        let mut shorter = text.clone();
        shorter.remove(at);
        assert!(verify(&shorter).fault.is_some(), "without byte {at}");
    }
    // A truncation at any position gives a verdict.
    for at in 0..text.len() {
        let _ = verify(&text[at..]);
    }
}

/// Recomputes the chain from line `from` (counted from 0), as an attacker with the files could.
fn remake(lines: &mut [String], from: usize) {
    for at in from..lines.len() {
        let prev = data_encoding::HEXLOWER.encode(&chain::hash(lines[at - 1].as_bytes()));
        let start = lines[at].find("\"prev\":\"").unwrap() + 8;
        lines[at].replace_range(start..start + 64, &prev);
    }
}

#[tokio::test]
async fn a_trail_of_a_version_without_a_chain_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let old = "{\"request\":\"a\",\"event\":\"release\"}\n{\"request\":\"b\",\"event\":\"release\"}\n";
    std::fs::write(&path, old).unwrap();
    let audit = open(&path);
    records(&audit, &["c", "d"]).await;
    drop(audit);
    assert_eq!(requests(&path), ["a", "b", "c", "d"]);
    let report = whole(&[&path], 2);
    assert_eq!(report.unchained, 2);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"b\"", "\"x\"")).unwrap();
    assert!(verify(&[&path]).fault.unwrap().what.contains("does not begin"));
}

#[tokio::test]
async fn checkpoints_cover_what_there_is_and_none_follows_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.jsonl");
    let certificate = signer();
    let audit = open_with(&path, |config| config.checkpoint_lines = 3);
    let is_due = |audit: &Audit| audit.due_checkpoint(Instant::now(), false).is_some();
    assert!(audit.due_checkpoint(Instant::now(), true).is_none(), "there is nothing");
    records(&audit, &["1", "2"]).await;
    assert!(!is_due(&audit));
    records(&audit, &["3"]).await;
    assert!(is_due(&audit));
    // Other records are written while the checkpoint is being signed.
    let draft = audit.due_checkpoint(Instant::now(), false).unwrap();
    records(&audit, &["4"]).await;
    let signature = key().sign(SignatureAlgorithm::DEFAULT, &draft.message()).unwrap();
    audit.checkpoint(&draft, &certificate, &signature).await.unwrap();
    assert_eq!((audit.head().unsigned(), audit.head().checkpoint), (1, Some(4)));
    sign(&audit, &certificate).await;
    assert!(audit.due_checkpoint(Instant::now() + Duration::from_secs(1000), true).is_none());
    let report = verify_with(&[&path], vec![certificate.clone()]);
    assert_eq!((&report.fault, report.unsigned, report.checkpoints.values().sum::<u64>()), (&None, 0, 2), "{report:?}");
    // A killed process leaves unsigned lines, which the next process has signed.
    drop(audit);
    assert!(!is_due(&open(&path)));
    records(&open(&path), &["5"]).await;
    let audit = open_with(&path, |config| config.checkpoint_seconds = 1);
    assert!(audit.due_checkpoint(Instant::now() + Duration::from_secs(2), false).is_some());
    let never = open_with(&path, |config| config.checkpoint_seconds = 0);
    assert!(never.due_checkpoint(Instant::now() + Duration::from_secs(9999), true).is_none());
}
