//! Tests of a stop under load: the daemon answers all requests that it accepted. Also tests its connection limits.

#![allow(clippy::print_stdout)]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_tests::raw::{Connection, Silence, get, post, post_head};
use claviger_tests::{
    Daemon, Lab, METADATA, Options, ROLL, block, claviger, open_release, roll_request, run, said, until,
};

const CLIENTS: usize = 8;

/// Outcome of one client's requests.
#[derive(Default, Debug)]
struct Told {
    /// Ids of requests with a complete and right answer.
    answered: BTreeSet<String>,
    /// Answers that are complete but wrong.
    wrong: Vec<String>,
    /// Incomplete answers, or no answer on a connection that stayed open.
    torn: Vec<String>,
    /// Number of connections that ended without a byte of an answer.
    closed: usize,
}

/// Sends releases one after the other until no server listens any more.
fn client(address: SocketAddr, request: &[u8], key: &[u8], identity: &RsaPrivateKey, answers: &AtomicUsize) -> Told {
    let mut told = Told::default();
    while let Ok(mut connection) = Connection::open(address) {
        loop {
            match connection.exchange(request) {
                Ok(answer) if answer.status == 200 => {
                    match open_release(&answer.body, identity) {
                        Ok((keys, _)) if keys.ingress[..] == *key => {
                            told.answered.insert(answer.header("x-request-id").unwrap().to_owned());
                        }
                        Ok(_) => told.wrong.push("another key".to_owned()),
                        Err(error) => told.wrong.push(error),
                    }
                    answers.fetch_add(1, Ordering::Relaxed);
                    if answer.closes() {
                        break;
                    }
                }
                Ok(answer) => {
                    told.wrong.push(format!("{} {}", answer.status, answer.text()));
                    break;
                }
                Err(Silence::Closed) => {
                    told.closed += 1;
                    break;
                }
                Err(silence) => {
                    told.torn.push(format!("{silence:?}"));
                    break;
                }
            }
        }
    }
    told
}

#[test]
fn every_request_that_was_taken_is_answered() {
    let lab = Lab::make(Options { hsms: 2, vms: 1, ..Options::default() });
    lab.configure(|config| {
        config.server.body_timeout_ms = 120_000;
        config.server.drain_timeout_ms = 60_000;
    });
    let mut daemon = lab.serve();
    let health = block(lab.host(daemon.client()).attest()).unwrap();
    let request = Arc::new(post(ROLL, "application/xml", &roll_request(&health, &lab.protector())));
    let key = Arc::new(lab.owner().open(&lab.protector()).unwrap().to_vec());
    let lines_before = lab.audit().len();
    let (identity, answers, address) = (lab.identity(), Arc::new(AtomicUsize::new(0)), daemon.address());

    // A client that is sending its request when the stop comes.
    let mut slow = Connection::open(address).unwrap();
    slow.send(&request[..request.len() / 2]).unwrap();

    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (request, key, identity, answers) = (request.clone(), key.clone(), identity.clone(), answers.clone());
            std::thread::spawn(move || client(address, &request, &key, &identity, &answers))
        })
        .collect();
    until("a hundred releases", || (answers.load(Ordering::Relaxed) > 100).then_some(()));
    daemon.process.terminate();
    let told: Vec<Told> = clients.into_iter().map(|client| client.join().unwrap()).collect();

    // All other connections are closed; this one gets its time. Meanwhile a load balancer is told to send nobody here.
    let ready = block(daemon.until_ready_is(503));
    assert!(String::from_utf8_lossy(&ready.body).contains("is stopping"), "{ready:?}");
    std::thread::sleep(Duration::from_secs(1));
    slow.send(&request[request.len() / 2..]).unwrap();
    let answer = slow.answer().unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(answer.closes());
    let (keys, _) = open_release(&answer.body, &identity).unwrap();
    assert_eq!(keys.ingress[..], key[..]);

    let status = daemon.process.wait();
    assert!(status.success(), "{status}: {}", daemon.process.output());
    let closed: usize = told.iter().map(|told| told.closed).sum();
    let mut answered: BTreeSet<String> = told.iter().flat_map(|told| told.answered.clone()).collect();
    answered.insert(answer.header("x-request-id").unwrap().to_owned());
    println!("{} answered, {closed} connections closed without an answer", answered.len());
    for told in &told {
        assert!(told.wrong.is_empty() && told.torn.is_empty(), "{told:?}");
    }
    // The decided requests are the answered ones: no accepted request was dropped.
    let decided: BTreeSet<String> = lab.audit()[lines_before..]
        .iter()
        .map(|line| {
            assert_eq!((&line["event"], &line["outcome"]), (&"release".into(), &"success".into()), "{line}");
            line["request"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(decided, answered);
}

#[test]
fn a_body_that_never_comes_does_not_keep_the_daemon() {
    let lab = Lab::make(Options::default());
    lab.configure(|config| config.server.drain_timeout_ms = 1500);
    let mut daemon = lab.serve();
    let mut silent = Connection::open(daemon.address()).unwrap();
    silent.send(&post_head(ROLL, "application/xml", 1000)).unwrap();
    let _idle = Connection::open(daemon.address()).unwrap();
    daemon.process.terminate();
    let status = daemon.process.wait();
    assert!(status.success(), "{status}: {}", daemon.process.output());
}

#[test]
fn an_administrator_is_answered_before_the_end() {
    let lab = Lab::make(Options::default());
    let faulty = lab.behind_faulty();
    lab.configure(|config| config.release.watchdog_ms = 60_000);
    let mut daemon = lab.serve();
    block(daemon.until_ready_is(200));
    faulty.set("hsm-a", &["call=C_Decrypt hang"]);
    let config = lab.config_file();
    let probe = std::thread::spawn(move || run(["hsm", "probe", "hsm-a", "--config", config.to_str().unwrap()]));
    faulty.until("hsm-a", "a probe at the token", |stats| stats.hanging() == 1);
    daemon.process.terminate();
    // Nothing else delays the daemon's end now.
    std::thread::sleep(Duration::from_millis(1500));
    faulty.clear("hsm-a");
    let probed = probe.join().unwrap();
    assert!(probed.status.success() && said(&probed).contains("decrypts and signs"), "{}", said(&probed));
    let status = daemon.process.wait();
    assert!(status.success(), "{status}: {}", daemon.process.output());
}

#[test]
fn open_files_are_raised_and_connections_are_no_more_than_they_allow() {
    let lab = Lab::make(Options::default());
    let serve = |hard: usize| {
        let script = format!("ulimit -Sn 100; ulimit -Hn {hard}; exec \"$0\" serve --config \"$1\"");
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg(claviger()).arg(lab.config_file());
        let daemon = Daemon::start(&mut command);
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.process.pid())).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        let found: Vec<usize> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        assert_eq!(found, [hard, hard], "{line}");
        daemon
    };
    // The configured number of connections at once, which exceeds the initial soft limit.
    lab.configure(|config| config.server.max_connections = 200);
    let daemon = serve(600);
    let mut connections: Vec<Connection> = (0..200).map(|_| Connection::open(daemon.address()).unwrap()).collect();
    for connection in &mut connections {
        assert_eq!(connection.exchange(&get("/Attestation/getinfo")).unwrap().status, 200);
    }
    drop(connections);
    assert!(!daemon.process.output().contains("open files"), "{}", daemon.process.output());
    assert!(daemon.stop().success());

    let daemon = serve(300);
    daemon.process.line(|line| line.contains("the limit on open files is too small").then_some(()));
    // Sequential requests still work.
    for _ in 0..3 {
        assert_eq!(Connection::open(daemon.address()).unwrap().exchange(&get(METADATA)).unwrap().status, 200);
    }
    assert!(daemon.stop().success());
}
