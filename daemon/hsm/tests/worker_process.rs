//! Tests of the worker as a process: its inheritance and its end. The process runs `examples/worker.rs`.

#![allow(clippy::unwrap_used)]

#[path = "suite/program.rs"]
mod program;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use claviger_hsm::{CallTimeouts, Cluster, MemberConfig, MemberState, Pin, TokenRef, WorkerProgram};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use rustix::process::{Pid, Signal, kill_process};

const SOFTHSM: &str = "/usr/lib/softhsm/libsofthsm2.so";
const USER_PIN: &str = "123456";
/// Variable that makes this program the parent of a worker.
const PARENT: &str = "CLAVIGER_TEST_WORKERS_PARENT";

/// Starts a worker; returns it and the daemon's end of its socket.
fn start(configure: impl FnOnce(&mut Command)) -> (Child, OwnedFd) {
    let (daemon, worker) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let mut command = Command::new(program::worker());
    command.stdin(Stdio::from(worker)).stderr(Stdio::piped());
    configure(&mut command);
    (command.spawn().unwrap(), daemon)
}

/// Returns the exit status and the output of the process.
fn end(mut child: Child) -> (Option<i32>, String) {
    let patience = Instant::now() + Duration::from_secs(30);
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < patience, "the worker does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (child.wait().unwrap().code(), said)
}

/// Returns the frame of a start, built by hand: call 1, the first kind of request, module, token by label, PIN, sessions,
/// no final try, number of the PIN.
fn start_frame(label: &str, sessions: u8) -> Vec<u8> {
    let text = |text: &str| [&[text.len() as u8], text.as_bytes()].concat();
    [&[1, 0, 0, 0, 0][..], &text(SOFTHSM), &[0], &text(label), &text(USER_PIN), &[sessions, 0, 0]].concat()
}

/// Reads reports until the reply to this call arrives. A reply is the first kind of report.
fn await_reply(daemon: &OwnedFd, id: u8) -> Vec<u8> {
    let mut buffer = [0; 65536];
    loop {
        let (len, _) = recv(daemon, &mut buffer, RecvFlags::empty()).unwrap();
        assert_ne!(len, 0, "the worker ended");
        if buffer.starts_with(&[0, id]) {
            return buffer[..len].to_vec();
        }
    }
}

/// A directory of tokens; the process environment points to it.
static TOKENS: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    assert!(Path::new(SOFTHSM).exists(), "{SOFTHSM} is missing. Install it: apt-get install libsofthsm2");
    let dir = tempfile::tempdir().unwrap();
    let conf = dir.path().join("softhsm2.conf");
    fs::write(&conf, format!("directories.tokendir = {}\nobjectstore.backend = file\n", dir.path().display())).unwrap();
    claviger_hsm::set_env(&BTreeMap::from([("SOFTHSM2_CONF".to_owned(), conf.display().to_string())]));
    for label in ["process", "restarts"] {
        claviger_hsm::init_token(SOFTHSM.as_ref(), label, &pin("76543210"), &pin(USER_PIN)).unwrap();
    }
    dir
});

fn pin(pin: &str) -> Pin {
    Pin::new(pin.to_owned())
}

/// Creates a cluster of one SoftHSM2 token.
fn cluster(path: &Path) -> Cluster {
    let member = MemberConfig {
        name: "m".to_owned(),
        module: PathBuf::from(SOFTHSM),
        token: TokenRef::Label("restarts".to_owned()),
        pin: pin(USER_PIN),
        env: BTreeMap::new(),
        priority: 0,
        weight: 1,
        sessions: 4,
        queue: 64,
    };
    let timeouts = CallTimeouts { watchdog: Duration::from_secs(10) };
    let program = WorkerProgram { path: path.to_owned(), arguments: Vec::new(), hidden: Vec::new() };
    Cluster::new(vec![member], timeouts, program, Arc::new(|_, _| {})).unwrap()
}

/// Returns the open descriptors, the threads, and the memory of this process in KiB.
fn held() -> (usize, usize, u64) {
    let count = |folder: &str| fs::read_dir(folder).unwrap().count();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let resident = resident.trim().trim_end_matches(" kB").parse().unwrap();
    (count("/proc/self/fd"), count("/proc/self/task"), resident)
}

async fn until_up(cluster: &Cluster, but: Option<u32>) -> u32 {
    let patience = Instant::now() + Duration::from_secs(30);
    loop {
        let status = cluster.members().remove(0);
        match status.worker.filter(|worker| Some(*worker) != but && status.state == MemberState::Up) {
            Some(worker) => return worker,
            None => tokio::time::sleep(Duration::from_millis(1)).await,
        }
        assert!(Instant::now() < patience, "{status:?}");
    }
}

/// Set `CLAVIGER_RESTARTS=10000` to change the number of restarts.
#[test]
#[allow(clippy::print_stderr)]
fn restarts_leak_nothing() {
    LazyLock::force(&TOKENS);
    let restarts = std::env::var("CLAVIGER_RESTARTS").map_or(100, |count| count.parse().unwrap());
    // The test has its own runtime, so that all threads of the runtime exist before the first count.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let cluster = cluster(program::worker());
        cluster.start().await.unwrap();
        let mut worker = until_up(&cluster, None).await;
        let mut before = None;
        for restart in 0..restarts {
            kill_process(Pid::from_raw(worker.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
            // A waiting caller brings forward the next attempt.
            while cluster.members()[0].worker == Some(worker) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            // The call fails if a fresh worker takes longer than callers wait for one.
            let _ = cluster.random(8, Instant::now() + Duration::from_secs(10)).await;
            worker = until_up(&cluster, Some(worker)).await;
            // The first restarts fill caches and start threads.
            if restart == restarts / 10 {
                before = Some(held());
            }
        }
        let (before, after) = (before.unwrap(), held());
        eprintln!("{restarts} restarts; descriptors, threads, KiB before: {before:?}, after: {after:?}");
        // Other tests of this program run at the same time, and each has a few descriptors. A leak of one descriptor per
        // restart would add many more.
        assert!(after.0 <= before.0 + 32, "descriptors: {before:?}, {after:?}");
        assert!(after.1 <= before.1 + 8, "threads: {before:?}, {after:?}");
        assert!(after.2 <= before.2 + 16 * 1024, "memory: {before:?}, {after:?}");
        assert_eq!(cluster.members()[0].closings, restarts);
        cluster.close().await;
    });
}

/// A program that the library starts ends with its worker, however the worker ends.
#[tokio::test]
async fn what_a_worker_has_started_ends_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let (program, started) = (folder.path().join("worker"), folder.path().join("pid"));
    let script = format!("#!/bin/sh\nsleep 1000 & echo $! >{0}.new; mv {0}.new {0}\n", started.display());
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let cluster = cluster(&program);
    assert!(cluster.start().await.is_err());
    let pid: i32 = fs::read_to_string(&started).unwrap().trim().parse().unwrap();
    let patience = Instant::now() + Duration::from_secs(30);
    let stat = PathBuf::from(format!("/proc/{pid}/stat"));
    while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(Instant::now() < patience, "it goes on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    cluster.close().await;
}

/// If a reload reads a PIN from an environment variable, workers started before have inherited it and are replaced.
#[tokio::test]
async fn a_variable_that_is_hidden_later_is_hidden_from_running_workers() {
    LazyLock::force(&TOKENS);
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("worker");
    let environment = |worker: u32| fs::read_to_string(folder.path().join(format!("env.{worker}"))).unwrap();
    fs::write(
        &script,
        format!("#!/bin/sh\nenv >{}/env.$$; exec {}\n", folder.path().display(), program::worker().display()),
    )
    .unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let cluster = cluster(&script);
    cluster.start().await.unwrap();
    let first = until_up(&cluster, None).await;
    // Cargo sets this variable.
    let variable = "CARGO_MANIFEST_DIR";
    assert!(environment(first).contains(variable));
    cluster.hide(vec!["CLAVIGER_TEST_NO_SUCH_VARIABLE".to_owned()]).await;
    assert_eq!(until_up(&cluster, None).await, first, "it has nothing to hide");
    cluster.hide(vec![variable.to_owned()]).await;
    let second = until_up(&cluster, Some(first)).await;
    assert!(!environment(second).contains(variable) && environment(second).contains("PATH"));
    cluster.hide(vec![variable.to_owned()]).await;
    assert_eq!(until_up(&cluster, None).await, second, "hidden already");
    cluster.close().await;
}

#[tokio::test]
async fn a_worker_that_is_missing_or_cannot_be_executed_is_said_and_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("worker");
    let said = async |words: &str| {
        let cluster = cluster(&program);
        let failure = cluster.start().await.unwrap_err().to_string();
        assert!(failure.contains(words) && failure.contains(program.to_str().unwrap()), "{failure}");
        cluster
    };
    said("No such file or directory").await.close().await;
    fs::write(&program, "no program").unwrap();
    let cluster = said("Permission denied").await;
    // The file exists by now.
    fs::remove_file(&program).unwrap();
    std::os::unix::fs::symlink(program::worker(), &program).unwrap();
    LazyLock::force(&TOKENS);
    until_up(&cluster, None).await;
    cluster.close().await;
}

#[test]
fn started_by_hand_it_says_what_it_is_for() {
    let child = Command::new(program::worker()).stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let (status, said) = end(child);
    assert_eq!(status, Some(2));
    assert!(said.starts_with("claviger hsm-worker is started by the daemon"), "{said}");
}

#[test]
fn garbage_in_place_of_a_start_ends_it() {
    let (child, daemon) = start(|_| ());
    send(&daemon, b"\x01\0\0\0\xffgarbage", SendFlags::NOSIGNAL).unwrap();
    let (status, said) = end(child);
    assert_eq!(status, Some(2));
    assert!(said.contains("the first frame does not say what to serve"), "{said}");
}

#[test]
fn a_socket_that_closes_before_the_start_ends_it() {
    let (child, daemon) = start(|_| ());
    drop(daemon);
    assert_eq!(end(child), (Some(0), String::new()));
}

#[test]
#[allow(clippy::print_stderr)]
fn serving_it_has_only_its_socket_outlives_signals_and_ends_with_the_socket() {
    if !rustix::process::geteuid().is_root() {
        // Only root may list the descriptors of a process that is not dumpable.
        eprintln!("SKIPPED: run as root to see what a worker has open");
        return;
    }
    let tokens = &*TOKENS;
    // A descriptor that stays open across exec, as vendors' libraries leave them.
    let inherited = File::create(tokens.path().join("inherited")).unwrap();
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty()).unwrap();
    let (child, daemon) = start(|_| ());
    drop(inherited);
    send(&daemon, &start_frame("process", 3), SendFlags::NOSIGNAL).unwrap();
    await_reply(&daemon, 1);

    let proc = PathBuf::from(format!("/proc/{}", child.id()));
    let link = |number: &str| fs::read_link(proc.join("fd").join(number)).unwrap().display().to_string();
    assert_eq!(link("0"), "/dev/null");
    assert!(link("3").starts_with("socket:"));
    let open = fs::read_dir(proc.join("fd")).unwrap().map(|entry| entry.unwrap().file_name());
    let links: Vec<_> = open.map(|number| link(number.to_str().unwrap())).collect();
    assert!(!links.iter().any(|link| link.contains("inherited")), "{links:?}");
    assert_eq!(links.iter().filter(|link| link.starts_with("socket:")).count(), 1, "{links:?}");
    let limits = fs::read_to_string(proc.join("limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"]);
    // All users can read the arguments; root can read the environment.
    for file in ["cmdline", "environ"] {
        let text = fs::read(proc.join(file)).unwrap();
        assert!(!text.windows(USER_PIN.len()).any(|part| part == USER_PIN.as_bytes()), "{file}");
    }

    let pid = Pid::from_child(&child);
    for (id, signal) in [(2, Signal::TERM), (3, Signal::INT)] {
        kill_process(pid, signal).unwrap();
        // `Ping` is the sixth kind of request.
        send(&daemon, &[id, 0, 0, 0, 5], SendFlags::NOSIGNAL).unwrap();
        await_reply(&daemon, id);
    }
    drop(daemon);
    assert_eq!(end(child), (Some(0), String::new()));
}

/// Bit of CAP_NET_BIND_SERVICE, capabilities(7).
const BIND: u64 = 1 << 10;

#[test]
#[allow(clippy::print_stderr)]
fn ambient_capabilities_are_dropped() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: run as root to give a worker capabilities");
        return;
    }
    // The worker inherits where they are.
    LazyLock::force(&TOKENS);
    let (daemon, worker) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let child = Command::new("setpriv")
        .args(["--inh-caps", "+net_bind_service", "--ambient-caps", "+net_bind_service"])
        .arg(program::worker())
        .stdin(Stdio::from(worker))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    send(&daemon, &start_frame("process", 1), SendFlags::NOSIGNAL).unwrap();
    await_reply(&daemon, 1);
    let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    for task in tasks {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            let line = status.lines().find_map(|line| line.strip_prefix(set)?.strip_prefix(":")).unwrap();
            assert_eq!(u64::from_str_radix(line.trim(), 16).unwrap() & BIND, 0, "{set}: {line}");
        }
    }
    drop(daemon);
    assert_eq!(end(child), (Some(0), String::new()));
}

#[test]
fn it_ends_when_its_parent_is_killed() {
    let mut parent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_parent_of_a_worker", "--nocapture"])
        .env(PARENT, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(parent.stdout.take().unwrap()).lines().map(Result::unwrap);
    let pid = lines.find_map(|line| line.split("worker ").nth(1).map(str::to_owned)).unwrap();
    parent.kill().unwrap();
    parent.wait().unwrap();
    // The process is gone, or is dead and not yet reaped by the process that inherits orphans.
    let stat = PathBuf::from(format!("/proc/{pid}/stat"));
    let patience = Instant::now() + Duration::from_secs(30);
    while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(Instant::now() < patience, "the worker goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Not a test of its own: this is the parent that the test above kills.
#[test]
#[allow(clippy::print_stdout)]
fn the_parent_of_a_worker() {
    if std::env::var_os(PARENT).is_none() {
        return;
    }
    let (child, daemon) = start(|command| {
        command.stderr(Stdio::inherit());
    });
    println!("worker {}", child.id());
    // Waits until the process is killed.
    let _ = recv(&daemon, &mut [0; 16], RecvFlags::empty());
}
