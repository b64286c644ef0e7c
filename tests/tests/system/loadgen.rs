//! Tests of the load generator: it reports the server's faults, and does not blame its own faults on the server.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use claviger_protocol::error::{Code, Refusal};
use claviger_tests::raw::{Answer, Connection, post};
use claviger_tests::{Daemon, Lab, Options, block, loadgen, said};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

/// Creates and serves a lab; returns when it is ready.
fn lab() -> (Lab, Daemon) {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    (lab, daemon)
}

/// A limit of lateness that no slow machine reaches, for tests of other things.
const PATIENT: [&str; 2] = ["--max-lag", "1m"];

fn command(lab: &Lab, url: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(loadgen());
    command.args(["run", "--url", url, "--vms", "8", "--json", "-", "--lab"]).arg(lab.path()).args(arguments);
    command
}

fn finished(output: &Output) -> (i32, Value) {
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(output)));
    (output.status.code().unwrap(), report)
}

fn run(lab: &Lab, url: &str, arguments: &[&str]) -> (i32, Value) {
    finished(&command(lab, url, arguments).output().unwrap())
}

fn number(report: &Value, pointer: &str) -> f64 {
    report.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {pointer} in {report:#}"))
}

/// Runs the commands that `prepare` prints for the administrator; returns their number.
fn administered(lab: &Lab, prepared: &Output) -> usize {
    assert!(prepared.status.success(), "{}", said(prepared));
    let commands = std::str::from_utf8(&prepared.stdout).unwrap();
    for command in commands.lines() {
        let words = command.strip_prefix("claviger ").unwrap_or_else(|| panic!("{command}"));
        let mut command = Command::new(claviger_tests::claviger());
        let done =
            command.args(words.split(' ')).arg("--config").arg(lab.path().join("claviger.toml")).output().unwrap();
        assert!(done.status.success(), "{}", said(&done));
    }
    commands.lines().count()
}

#[test]
fn hosts_attest_by_their_tpms_and_ask_for_keys() {
    let lab = Lab::make(Options::default());
    let folder = |name: &str| lab.path().join(name).display().to_string();
    lab.configure(|config| config.attest.mode = claviger::config::AttestMode::Tpm);
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    // Without an administrators' socket, an administrator registers the hosts and accepts their boot.
    let (tenant, cache, out) = (folder("tenant"), folder("cache"), folder("public"));
    let of_tenant = |arguments: &[&str]| {
        let mut command = Command::new(loadgen());
        command.args(arguments).args(["--url", &daemon.url, "--tenant", &tenant, "--cache", &cache, "--tpm"]);
        command.output().unwrap()
    };
    let prepared = of_tenant(&["prepare", "--hosts", "2", "--vms", "1", "--out", &out]);
    assert_eq!(administered(&lab, &prepared), 3);
    let (status, report) = finished(&of_tenant(&["attest", "--hosts", "2", "--json"]));
    assert_eq!((status, &report["granted"], &report["hsm_calls"]), (0, &json!(2), &Value::Null), "{report:#}");
    let storm = |more: &[&str]| {
        let mut command = Command::new(loadgen());
        command.args(["attest", "--url", &daemon.url, "--hosts", "5", "--json", "--lab"]).arg(lab.path()).args(more);
        finished(&command.output().unwrap())
    };
    let (status, report) = storm(&["--tpm", "--at-a-time", "2", "--metrics", &daemon.metrics_url]);
    assert_eq!(status, 0, "{report:#}");
    assert_eq!((&report["granted"], &report["refused"], &report["by_tpm"]), (&json!(5), &json!({}), &json!(true)));
    assert!(number(&report, "/hsm_calls") >= 5.0 && number(&report, "/latency_p50") > 0.0, "{report:#}");
    assert!(report["own_cost"].is_number() && report["about"]["daemon"].is_string(), "{report:#}");
    // Hosts of the other mode get a message that says what to do.
    let (status, report) = storm(&[]);
    assert_eq!((status, &report["granted"], &report["latency_p50"]), (1, &json!(0), &Value::Null), "{report:#}");
    let (error, count) = report["refused"].as_object().unwrap().iter().next().unwrap();
    assert!(error.contains("the service is in TPM mode: use --tpm") && *count == json!(5), "{error}");
    let (status, report) =
        run(&lab, &daemon.url, &[&PATIENT[..], &["--tpm", "--hosts", "2", "--profile", "1s@20"]].concat());
    assert_eq!((status, &report["errors"]), (0, &json!({})), "{report:#}");
    assert!(daemon.stop().success());
}

#[test]
fn a_run_is_told_whole() {
    let (lab, daemon) = lab();
    let file = |name: &str| lab.file(name).display().to_string();
    let (csv, hdr, html) = (file("run.csv"), file("run.hdr"), file("run.html"));
    let shape = ["--hosts", "2", "--roll", "--batch", "2", "--verify", "all", "--warmup", "500ms"];
    let files = ["--csv", &csv, "--hdr", &hdr, "--html", &html, "--metrics", &daemon.metrics_url];
    let thresholds = ["--threshold", "errors<=0%", "--threshold", "p99<1m", "--profile", "1s@20,1s@20..40"];
    let (status, report) = run(&lab, &daemon.url, &[&PATIENT[..], &shape, &files, &thresholds].concat());
    assert_eq!(status, 0, "{report:#}");
    assert_eq!(report["valid"], true);
    assert_eq!((number(&report, "/offered"), number(&report, "/achieved")), (50.0, 50.0));
    assert_eq!((number(&report, "/dropped"), &report["errors"]), (0.0, &json!({})));
    // Answers of the warm-up are checked too.
    assert_eq!((number(&report, "/verify/right"), number(&report, "/verify/wrong")), (60.0, 0.0));
    for times in ["latency_seconds", "service_seconds"] {
        let names = ["p50", "p90", "p99", "p99.9", "p99.99", "max"];
        let values = names.map(|name| number(&report, &format!("/{times}/{name}")));
        assert!(values[0] > 0.0 && values.is_sorted(), "{times}: {values:?}");
    }
    let seconds = report["timeline"].as_array().unwrap();
    let offered: u64 = seconds.iter().map(|second| second["offered"].as_u64().unwrap()).sum();
    assert_eq!(offered, 50);
    let lines = std::fs::read_to_string(&csv).unwrap();
    assert!(lines.starts_with("second,offered,achieved,dropped,errors,p50,"));
    assert_eq!(lines.lines().count(), seconds.len() + 1);
    let log = std::fs::read_to_string(&hdr).unwrap();
    assert!(log.lines().filter(|line| line.contains(",HIST")).count() >= 2, "{log}");
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("<svg") && !page.contains("<script"));
    assert!(!page.contains("NaN") && !page.contains(">inf"), "a number that is none");
    let about = &report["about"];
    assert!(about["daemon"].as_str().unwrap().starts_with("claviger "), "{about:#}");
    assert_eq!((about["hsms"][0]["state"].as_str(), &about["daemon_is_here"]), (Some("up"), &json!(true)), "{about:#}");
    assert!(about["command"].as_str().unwrap().starts_with("claviger-loadgen run --url "), "{about:#}");
    assert!(page.contains(">p99&lt;1m</text>"), "the objective is drawn");

    // Hosts and machines are kept, registered and reused; a closed loop, and the other interface.
    // The trail has two records for an administrator's change: before it is made, and after.
    let made = |line: &&serde_json::Value| line["event"] == "hosts.add" && line["outcome"] == "success";
    let registered = || lab.audit().iter().filter(made).count();
    assert_eq!(registered(), 2);
    let closed = ["--hosts", "2", "--closed", "2", "--duration", "1s", "--warmup", "0s", "--api", "v1.0"];
    let (status, report) = run(&lab, &daemon.url, &[&PATIENT[..], &closed].concat());
    assert_eq!((status, &report["mode"]), (0, &json!("closed")));
    assert!(number(&report, "/achieved") > 0.0);
    assert_eq!(registered(), 2);
}

#[test]
fn any_service_is_tested_with_the_keys_of_a_tenant_and_of_hosts() {
    let (lab, daemon) = lab();
    let folder = |name: &str| lab.path().join(name).display().to_string();
    let (tenant, host, cache, out) = (folder("tenant"), folder("host"), folder("cache"), folder("public"));
    let call = |arguments: &[&str]| {
        Command::new(loadgen())
            .args(arguments)
            .args(["--url", &daemon.url, "--tenant", &tenant, "--cache", &cache])
            .output()
    };
    let load = ["run", "--vms", "8", "--verify", "all", "--profile", "1s@10", "--warmup", "0s", "--json", "-"];
    let ran = |more: &[&str]| finished(&call(&[&load[..], &PATIENT, more].concat()).unwrap());
    let (status, report) = ran(&["--host", &host, "--arrivals", "random"]);
    assert_eq!((status, number(&report, "/verify/right")), (0, number(&report, "/offered")), "{report:#}");
    assert!((9.0..=10.0).contains(&number(&report, "/offered")), "{report:#}");
    assert_eq!((&report["about"]["hsms"], &report["about"]["daemon"]), (&json!([]), &Value::Null));

    // Unregistered hosts are refused, and the message says what to do.
    let output = call(&["prepare", "--hosts", "2", "--vms", "8", "--out", &out]).unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let refused = call(&[&load[..], &["--hosts", "2"]].concat()).unwrap();
    assert!(said(&refused).contains("is the host registered there (claviger-loadgen prepare)"), "{}", said(&refused));
    assert_eq!(administered(&lab, &output), 2);
    let (status, report) = ran(&["--hosts", "2"]);
    assert_eq!(
        (status, number(&report, "/verify/right"), number(&report, "/settings/hosts")),
        (0, 10.0, 2.0),
        "{report:#}"
    );
    let socket = lab.socket().display().to_string();
    let (status, report) = ran(&["--hosts", "3", "--socket", &socket]);
    assert_eq!((status, number(&report, "/settings/hosts")), (0, 3.0), "{report:#}");
    assert_eq!(report["about"]["hsms"][0]["state"], "up");
}

#[test]
fn a_run_ends_when_its_condition_fails() {
    let (lab, daemon) = lab();
    let busy = Refusal::new(Code::ServiceUnavailable, "not now").to_xml();
    let busy = proxy(daemon.address(), move |path, answer| {
        let refused = Answer { status: 503, headers: Vec::new(), body: busy.clone() };
        Some(if path.contains("RollTransportKey") { refused } else { answer })
    });
    let stopping = ["--profile", "10m@20", "--warmup", "0s", "--stop-on", "errors<5%"];
    let (status, report) = run(&lab, &busy, &[&PATIENT[..], &stopping].concat());
    assert_eq!((status, &report["interrupted"]), (99, &json!(false)), "{report:#}");
    let reason = report["stopped"].as_str().unwrap();
    assert!(reason.starts_with("errors<5% failed (100.0 %)"), "{reason}");
    assert!((4.0..500.0).contains(&number(&report, "/duration_seconds")), "{report:#}");
    assert_eq!(number(&report, "/timeline/0/codes/ServiceUnavailableException"), number(&report, "/timeline/0/errors"));

    // A comparison fails only if a result is worse by more than the noise.
    let steady = ["--profile", "6s@20", "--warmup", "0s"];
    let (_, good) = run(&lab, &daemon.url, &[&PATIENT[..], &steady].concat());
    let (page, good_file, bad_file) = (lab.file("compare.html"), lab.file("good.json"), lab.file("bad.json"));
    std::fs::write(&good_file, good.to_string()).unwrap();
    std::fs::write(&bad_file, report.to_string()).unwrap();
    let compared = |before: &Path, after: &Path| {
        let mut compare = Command::new(loadgen());
        compare.arg("compare").args([before, after]).args(["--fail-on", "worse", "--json", "--html"]).arg(&page);
        finished(&compare.output().unwrap())
    };
    let verdict = |differences: &Value, measure: &str| {
        let all = differences.as_array().unwrap().iter();
        all.filter(|difference| difference["measure"] == measure).map(|difference| difference["verdict"].clone()).next()
    };
    let (status, differences) = compared(&good_file, &bad_file);
    assert_eq!((status, verdict(&differences, "failed")), (99, Some(json!("worse"))), "{differences:#}");
    assert_eq!(
        verdict(&differences, "latency p99"),
        Some(json!("worse")),
        "what is not known is worse: {differences:#}"
    );
    assert_eq!(compared(&good_file, &good_file).0, 0);
    assert_eq!(compared(&bad_file, &good_file).0, 0, "better is not worse");
    assert!(std::fs::read_to_string(&page).unwrap().contains("<svg"));
}

#[test]
fn capacity_says_how_sure_it_is_and_promises_no_more_than_was_seen() {
    let (lab, daemon) = lab();
    let page = lab.file("capacity.html");
    let mut capacity = Command::new(loadgen());
    capacity.args(["capacity", "--url", &daemon.url, "--vms", "8", "--step", "1s", "--warmup", "0s", "--json", "-"]);
    capacity.args(["--metrics", &daemon.metrics_url]);
    capacity.args(PATIENT).args(["--slo", "p99<10s,errors<50%", "--html"]).arg(&page).arg("--lab").arg(lab.path());
    let (status, answer) = finished(&capacity.output().unwrap());
    assert_eq!(status, 0, "{answer:#}");
    let all = &answer["capacities"][0];
    assert!(number(all, "/sustainable") <= number(all, "/ceiling"), "{all:#}");
    let valid = answer["steps"].as_array().unwrap().iter().filter(|step| step["valid"] == true).count();
    assert_eq!(answer["law"].is_null(), valid < 6, "{answer:#}");
    assert!(number(&answer, "/sure/held") <= number(&answer, "/sure/tried"), "{answer:#}");
    assert!(answer["about"]["daemon"].as_str().unwrap().starts_with("claviger "), "{answer:#}");
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("<svg") && page.contains(">p99&lt;10s</text>") && !page.contains("NaN"), "{page}");
}

#[test]
fn tls_is_spoken_to_who_is_trusted() {
    let lab = Lab::make(Options::default());
    let file = |name: &str| lab.file(name).display().to_string();
    let openssl = |arguments: &str| {
        let made = claviger_tests::tool("openssl", Command::new("openssl").args(arguments.split(' ')));
        assert!(made.status.success(), "{}", said(&made));
    };
    let (ca, ca_key, leaf, key) = (file("ca.pem"), file("ca.key"), file("leaf.pem"), file("leaf.key"));
    let new = "req -x509 -newkey rsa:2048 -nodes -days 2";
    openssl(&format!("{new} -subj /CN=ca -addext basicConstraints=critical,CA:TRUE -out {ca} -keyout {ca_key}"));
    let signed =
        format!("-CA {ca} -CAkey {ca_key} -addext basicConstraints=CA:FALSE -addext subjectAltName=IP:127.0.0.1");
    openssl(&format!("{new} -subj /CN=leaf {signed} -out {leaf} -keyout {key}"));
    lab.configure(|config| {
        config.server.tls = Some(claviger::config::Tls::new(leaf, key));
    });
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    let short = ["--profile", "1s@10", "--warmup", "0s", "--verify", "all"];
    let (status, report) = run(&lab, &daemon.url, &[&PATIENT[..], &short, &["--ca", &ca]].concat());
    assert_eq!((status, number(&report, "/verify/right")), (0, 10.0), "{report:#}");
    let output = command(&lab, &daemon.url, &short).output().unwrap();
    assert!(said(&output).contains("use --ca FILE"), "{}", said(&output));
}

#[test]
fn a_server_that_stands_still_is_not_forgotten() {
    let (lab, daemon) = lab();
    let running = command(&lab, &daemon.url, &[&PATIENT[..], &["--profile", "5s@40", "--warmup", "0s"]].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Machines are created before the clock starts; the audit trail shows the first release.
    claviger_tests::until("releases", || {
        (lab.audit().iter().filter(|line| line["event"] == "release").count() > 20).then_some(())
    });
    kill_process(daemon.process.pid(), Signal::STOP).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    kill_process(daemon.process.pid(), Signal::CONT).unwrap();
    let (_, report) = finished(&running.wait_with_output().unwrap());
    assert_eq!(number(&report, "/offered"), 200.0, "the schedule waits for nobody");
    assert!(number(&report, "/latency_seconds/p99") > 1.5, "{report:#}");
    // The server stands still for two of five seconds: requests due in that time wait up to two seconds each.
    assert!(number(&report, "/latency_seconds/p90") > 1.0, "{report:#}");
    let still = report["timeline"].as_array().unwrap().iter().filter(|second| second["achieved"] == 0).count();
    assert!(still >= 1, "a whole second without a release: {report:#}");
}

#[test]
fn a_generator_that_is_slow_itself_says_so() {
    let (lab, daemon) = lab();
    let slow = ["--profile", "2s@40", "--warmup", "0s", "--handicap", "50ms"];
    let (status, report) = run(&lab, &daemon.url, &slow);
    assert_eq!((status, &report["valid"]), (98, &json!(false)), "{report:#}");
    let reason = report["invalid_because"][0].as_str().unwrap();
    assert!(reason.contains("the load generator fell behind"), "{reason}");
    assert!(number(&report, "/generator/lag_seconds/p99") > 0.05);
}

#[test]
fn thresholds_decide_the_status_and_errors_have_their_codes() {
    let (lab, daemon) = lab();
    let short = ["--profile", "1s@20", "--warmup", "0s", "--threshold", "p99<0.001ms", "--threshold", "errors<50%"];
    let (status, report) = run(&lab, &daemon.url, &[&PATIENT[..], &short].concat());
    assert_eq!(status, 99, "{report:#}");
    let passed: Vec<_> = report["thresholds"].as_array().unwrap().iter().map(|t| t["passed"].clone()).collect();
    assert_eq!(passed, [json!(false), json!(true)]);

    let before = lab.audit().len();
    let running = command(&lab, &daemon.url, &[&PATIENT[..], &["--profile", "3s@20", "--warmup", "0s"]].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    claviger_tests::until("releases", || (lab.audit().len() > before + 10).then_some(()));
    let remove = json!({"command": "hosts.remove", "name": claviger_tests::HOST});
    block(claviger::admin::call(&lab.socket(), &remove)).unwrap();
    let (status, report) = finished(&running.wait_with_output().unwrap());
    let refused = number(&report, "/errors/HealthCertificateException");
    assert!(refused > 0.0 && number(&report, "/achieved") > 0.0, "{report:#}");
    assert_eq!((status, number(&report, "/achieved") + refused), (0, 60.0));
    drop(daemon);
    let output = command(&lab, "http://127.0.0.1:1", &["--profile", "1s@1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("no connection to 127.0.0.1:1") && said(&output).contains("does it run there?"));
}

#[test]
fn a_wrong_reply_is_found() {
    let (lab, daemon) = lab();
    let previous = Mutex::new((0, None::<Vec<u8>>));
    // Every fifth release gets the previous answer: it can be decrypted, but belongs to another machine.
    let proxy = proxy(daemon.address(), move |path, mut answer| {
        if path.contains("RollTransportKey") && answer.status == 200 {
            let mut previous = previous.lock().unwrap();
            previous.0 += 1;
            let own = answer.body.clone();
            if let (0, Some(body)) = (previous.0 % 5, &previous.1) {
                answer.body.clone_from(body);
            }
            previous.1 = Some(own);
        }
        Some(answer)
    });
    let checked = ["--profile", "2s@20", "--warmup", "0s", "--verify", "all"];
    let (status, report) = run(&lab, &proxy, &[&PATIENT[..], &checked].concat());
    assert_eq!(status, 97, "{report:#}");
    assert_eq!((number(&report, "/verify/wrong"), number(&report, "/verify/right")), (8.0, 32.0), "{report:#}");
    assert_eq!((number(&report, "/errors/WrongReply"), number(&report, "/achieved")), (8.0, 32.0));
    assert_eq!(report["verify"]["first_wrong"], "the ingress key is not this machine's");
}

#[test]
fn a_storm_asks_again_and_silence_is_dropped_and_timed_out() {
    let (lab, daemon) = lab();
    let turned_away = Mutex::new(5);
    let busy = Refusal::new(Code::ServiceUnavailable, "not now").to_xml();
    let busy_server = proxy(daemon.address(), move |path, answer| {
        let mut left = turned_away.lock().unwrap();
        if !path.contains("RollTransportKey") || *left == 0 {
            return Some(answer);
        }
        *left -= 1;
        let headers = vec![("retry-after".to_owned(), "1".to_owned())];
        Some(Answer { status: 503, headers, body: busy.clone() })
    });
    let (status, report) = run(&lab, &busy_server, &[&PATIENT[..], &["--profile", "storm:20/1s"]].concat());
    assert_eq!((status, number(&report, "/achieved")), (0, 20.0), "{report:#}");
    assert_eq!(number(&report, "/retries/ServiceUnavailableException"), 5.0);
    assert_eq!(report["errors"], json!({}));
    assert!(number(&report, "/latency_seconds/max") > 1.0, "the wait counts: {report:#}");

    let silent_server = proxy(daemon.address(), |path, answer| (!path.contains("RollTransportKey")).then_some(answer));
    let few = ["--profile", "1s@20", "--warmup", "0s", "--in-flight", "2", "--timeout", "400ms"];
    let judged = ["--threshold", "p50<1h"];
    let (status, report) = run(&lab, &silent_server, &[&PATIENT[..], &few, &judged].concat());
    assert_eq!(status, 99, "what is not known holds no bound: {report:#}");
    let (dropped, late) = (number(&report, "/dropped"), number(&report, "/errors/Timeout"));
    assert!(dropped > 0.0 && late > 0.0, "{report:#}");
    assert_eq!((dropped + late, number(&report, "/achieved")), (20.0, 0.0));
}

/// Runs the generator with soft and hard limits of open files.
fn limited(lab: &Lab, url: &str, files: &str, arguments: &[&str]) -> (i32, Value) {
    let unlimited = command(lab, url, arguments);
    let mut command = Command::new("prlimit");
    command.arg(format!("--nofile={files}")).arg(unlimited.get_program()).args(unlimited.get_args());
    finished(&command.output().unwrap())
}

#[test]
fn a_lack_of_files_is_the_generators_own_fault() {
    let (lab, daemon) = lab();
    // Each caller needs its own connection, and a connection needs a file.
    let many = [&PATIENT[..], &["--closed", "64", "--duration", "1s", "--warmup", "0s"]].concat();
    for url in [daemon.url.clone(), daemon.url.replace("127.0.0.1", "localhost")] {
        let (status, report) = limited(&lab, &url, "40:40", &many);
        assert_eq!((status, &report["valid"]), (98, &json!(false)), "{report:#}");
        let reasons = report["invalid_because"].as_array().unwrap();
        let named = |reason: &&Value| reason.as_str().unwrap().contains("no more open files (its limit is 40)");
        assert_eq!(reasons.iter().filter(named).count(), 1, "{report:#}");
        let lacked = number(&report, "/lacked/OutOfFiles");
        assert!(lacked > 0.0 && number(&report, "/dropped") >= lacked, "{report:#}");
        assert_eq!(report["errors"], json!({}), "the server is not to blame: {report:#}");
        assert!(number(&report, "/achieved") > 0.0, "the files that there were served: {report:#}");
    }
    // The generator raises the soft limit as far as the hard limit allows.
    let (_, report) = limited(&lab, &daemon.url, "40:4096", &many);
    assert_eq!((&report["lacked"], &report["errors"]), (&json!({}), &json!({})), "{report:#}");
}

#[test]
fn an_interrupted_run_reports_what_was_measured() {
    let (lab, daemon) = lab();
    let releases = || lab.audit().iter().filter(|line| line["event"] == "release").count();
    let interrupted = |mut command: Command| {
        let before = releases();
        let running = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        claviger_tests::until("releases", || (releases() > before + 10).then_some(()));
        // A few more requests, so that there is a time to report.
        std::thread::sleep(Duration::from_millis(500));
        kill_process(rustix::process::Pid::from_child(&running), Signal::INT).unwrap();
        let output = running.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{}", said(&output));
        output
    };
    let loads: [&[&str]; 2] = [&["--profile", "10m@40"], &["--closed", "2", "--duration", "10m"]];
    for load in loads {
        let arguments = [&PATIENT[..], &["--warmup", "0s"], load].concat();
        let output = interrupted(command(&lab, &daemon.url, &arguments));
        let (_, report) = finished(&output);
        assert_eq!((&report["interrupted"], &report["errors"]), (&json!(true), &json!({})), "{report:#}");
        let (seconds, achieved) = (number(&report, "/duration_seconds"), number(&report, "/achieved"));
        assert!(seconds > 0.1 && seconds < 500.0 && achieved >= 1.0, "{report:#}");
        assert!(said(&output).contains("INTERRUPTED after "), "{}", said(&output));
    }
    let warming_up = [&PATIENT[..], &["--warmup", "10m", "--profile", "1s@40"]].concat();
    let output = interrupted(command(&lab, &daemon.url, &warming_up));
    assert!(said(&output).contains("interrupted before anything was measured"), "{}", said(&output));
    let mut capacity = Command::new(loadgen());
    capacity.args(["capacity", "--url", &daemon.url, "--step", "10m", "--vms", "8", "--lab"]).arg(lab.path());
    let output = interrupted(capacity);
    assert!(said(&output).contains("INTERRUPTED: "), "{}", said(&output));
}

/// Starts a proxy that may change or drop answers; returns its URL.
fn proxy(behind: SocketAddr, change: impl Fn(&str, Answer) -> Option<Answer> + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let change = Arc::new(change);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let change = change.clone();
            std::thread::spawn(move || serve(stream, behind, &*change));
        }
    });
    url
}

/// Serves one connection until the client closes it.
fn serve(mut stream: TcpStream, behind: SocketAddr, change: &(dyn Fn(&str, Answer) -> Option<Answer> + Sync)) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            match reader.read_line(&mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) if line == "\r\n" => break,
                Ok(_) => head.push(line.trim_end().to_owned()),
            }
        }
        let field = |name: &str| {
            let fields = head.iter().filter_map(|line| line.split_once(": "));
            fields.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned()).next()
        };
        let mut body = vec![0; field("content-length").map_or(0, |length| length.parse().unwrap())];
        reader.read_exact(&mut body).unwrap();
        let mut words = head[0].split(' ');
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let request = match method {
            "GET" => claviger_tests::raw::get(path),
            _ => post(path, &field("content-type").unwrap(), &body),
        };
        let answer = Connection::open(behind).unwrap().exchange(&request).unwrap();
        let Some(answer) = change(path, answer) else { continue };
        let mut reply = format!("HTTP/1.1 {} x\r\nContent-Length: {}\r\n", answer.status, answer.body.len());
        for (name, value) in answer.headers.iter().filter(|(name, _)| name != "content-length") {
            reply.push_str(&format!("{name}: {value}\r\n"));
        }
        let reply = [reply.as_bytes(), b"\r\n", &answer.body].concat();
        if stream.write_all(&reply).is_err() {
            return;
        }
    }
}

#[test]
fn without_a_lab_it_says_how_to_make_one() {
    let output = Command::new(loadgen())
        .args(["run", "--url", "http://127.0.0.1:1", "--profile", "1s@1", "--lab"])
        .arg(Path::new("/nowhere"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("claviger demo --dir /nowhere"), "{}", said(&output));
}

#[test]
fn what_does_not_go_together_is_an_error_of_the_command_line() {
    for (arguments, named) in [
        (&["attest", "--tenant", "t", "--host", "h", "--tpm"][..], ["--tpm", "--host"]),
        (&["run", "--profile", "1s@1", "--tenant", "t", "--host", "h", "--tpm"], ["--tpm", "--host"]),
        (&["run", "--profile", "1s@1", "--tenant", "t", "--host", "h", "--hosts", "2"], ["--hosts", "--host"]),
        (&["prepare", "--out", "o", "--tenant", "t", "--host", "h", "--tpm"], ["--tpm", "--host"]),
        (&["capacity", "--lab", "l", "--socket", "s"], ["--lab", "--socket"]),
        (&["attest", "--tpm"], ["--lab", "--tenant"]),
    ] {
        let output = Command::new(loadgen()).args(arguments).args(["--url", "http://127.0.0.1:1"]).output().unwrap();
        let said = said(&output);
        assert!(
            output.status.code() == Some(2) && named.iter().all(|name| said.contains(name)),
            "{arguments:?}: {said}"
        );
    }
}
