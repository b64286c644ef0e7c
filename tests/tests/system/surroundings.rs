//! Tests of the programs' surroundings: a log that is not read, signals at any moment, output that cannot be written,
//! limits on files and threads. They do not stop releases, and they are reported.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use claviger_client::http::Client;
use claviger_protocol::payload::ApiVersion;
use claviger_tests::{
    Administrator, Lab, Metrics, Options, PATIENCE, Process, block, claviger, lives, loadgen, run, said, tool, until,
};
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};

/// Returns a full pipe: the next write to it blocks until its reader reads.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let flags = fcntl_getfl(&writer).unwrap();
    fcntl_setfl(&writer, flags | OFlags::NONBLOCK).unwrap();
    while writer.write(&[b'.'; 4096]).is_ok() {}
    while writer.write(b".").is_ok() {}
    fcntl_setfl(&writer, flags).unwrap();
    (reader, writer)
}

/// Waits for the child's end; fails the test if it does not end.
fn ended(child: &mut Child) -> Option<i32> {
    until("the program ends", || child.try_wait().unwrap()).code()
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// A child that ends with its test.
struct Guarded(Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(lab: &Lab) -> Command {
    let mut command = Command::new(claviger());
    command.arg("serve").arg("--config").arg(lab.config_file()).stdin(Stdio::null());
    command
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let lab = Lab::make(Options::default());
    let (mut reader, writer) = full_pipe();
    let mut command = serve(&lab);
    // At this level, each broken connection logs a line.
    command.env("RUST_LOG", "debug").stdout(Stdio::piped()).stderr(writer);
    let mut child = Guarded(command.spawn().unwrap());
    drop(command);
    let announced = read_until(child.0.stdout.as_mut().unwrap(), "metrics on ");
    let address = |name: &str| announced.lines().find_map(|line| line.strip_prefix(name)).unwrap().to_owned();
    let (url, metrics_url) = (address("listening on "), address("metrics on "));
    let get = |path: &str| block(Client::new(&metrics_url).unwrap().with_timeout(PATIENCE).get(path)).unwrap();
    until("it is ready", || (get("/ready").status == 200).then_some(()));

    let host = lab.host(Client::new(&url).unwrap().with_timeout(PATIENCE));
    let service = url.strip_prefix("http://").unwrap();
    let dropped = until("lines are dropped", || {
        for _ in 0..200 {
            let mut connection = TcpStream::connect(service).unwrap();
            connection.write_all(b"this is no request\r\n\r\n").unwrap();
            let _ = connection.read_to_end(&mut Vec::new());
        }
        let metrics = Metrics::parse(std::str::from_utf8(&get("/metrics").body).unwrap());
        Some(metrics.count("claviger_log_lines_dropped_total", &[])).filter(|dropped| *dropped > 0)
    });
    assert_eq!(get("/live").status, 200);
    let health = block(host.attest()).unwrap();
    block(host.roll(ApiVersion::V2, &health, &lab.protector())).unwrap();
    signal(&child.0, Signal::HUP);
    let listed = run(["hosts", "list", "--config", lab.config_file().to_str().unwrap()]);
    assert!(listed.status.success(), "{}", said(&listed));

    // The reader continues: it gets the oldest lines, and the number of lost lines.
    let text = Arc::new(Mutex::new(Vec::new()));
    let reading = std::thread::spawn({
        let text = text.clone();
        move || {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = reader.read(&mut bytes) {
                text.lock().unwrap().extend_from_slice(&bytes[..read]);
            }
        }
    });
    let has = |words: &str| String::from_utf8_lossy(&text.lock().unwrap()).contains(words);
    until("the missing lines are reported", || (has("log lines were dropped") && dropped > 0).then_some(()));
    signal(&child.0, Signal::TERM);
    assert_eq!(ended(&mut child.0), Some(0));
    reading.join().unwrap();
    assert!(has("all open requests have been answered"), "the last lines of an orderly stop are missing");
}

/// A stop works even if no program ever reads the log.
#[test]
fn a_log_that_nobody_reads_does_not_keep_the_process() {
    let lab = Lab::make(Options::default());
    let (_reader, writer) = full_pipe();
    let mut command = serve(&lab);
    let mut child = Guarded(command.stdout(Stdio::piped()).stderr(writer).spawn().unwrap());
    read_until(child.0.stdout.as_mut().unwrap(), "metrics on ");
    signal(&child.0, Signal::TERM);
    assert_eq!(ended(&mut child.0), Some(0));

    // An unread standard output does not prevent service either; the test queries the daemon's socket.
    let (_reader, writer) = full_pipe();
    let mut child = Guarded(serve(&lab).stdout(writer).stderr(Stdio::null()).spawn().unwrap());
    until("it answers", || {
        let listed = run(["hosts", "list", "--config", lab.config_file().to_str().unwrap()]);
        listed.status.success().then_some(())
    });
    signal(&child.0, Signal::TERM);
    assert_eq!(ended(&mut child.0), Some(0));

    // The reason for a failed start is written at the end, if the log is read.
    lab.configure(|config| config.server.admin_group = Some("no-such-group".to_owned()));
    let refused = serve(&lab).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("claviger: the daemon cannot start: server.admin_group"), "{}", said(&refused));
}

/// Reads a stream until a line with this beginning is complete.
fn read_until(stream: &mut impl Read, beginning: &str) -> String {
    let mut text = String::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte).unwrap();
        text.push(byte[0].into());
        if byte[0] == b'\n' && text.lines().last().is_some_and(|line| line.starts_with(beginning)) {
            return text;
        }
    }
}

/// A configuration file whose reading a test can delay.
struct Slow {
    lab: Lab,
    text: String,
}

impl Slow {
    fn new() -> Self {
        let lab = Lab::make(Options::default());
        let text = fs::read_to_string(lab.config_file()).unwrap();
        fs::remove_file(lab.config_file()).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, lab.config_file(), rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
        Self { lab, text }
    }

    /// Sets the log's format, so that each start reads the file only once.
    fn serve(&self, wrapper: &[&str]) -> Command {
        let program = serve(&self.lab);
        let mut words: Vec<&OsStr> = wrapper.iter().map(OsStr::new).collect();
        words.push(program.get_program());
        words.extend(program.get_args());
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).args(["--log", "text"]).env("RUST_LOG", "info");
        command
    }

    /// Returns when a daemon has begun to read its configuration; the read does not end before the returned file is closed.
    fn started(&self) -> File {
        let mut open = fs::OpenOptions::new();
        open.write(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed());
        // Fails until there is a reader.
        until("the configuration is opened", || open.open(self.lab.config_file()).ok())
    }
}

#[test]
fn a_signal_to_reload_during_the_start_is_remembered() {
    let slow = Slow::new();
    let process = Process::start(&mut slow.serve(&[]));
    let mut config = slow.started();
    process.hang_up();
    for other in [Signal::USR1, Signal::USR2] {
        kill_process(process.pid(), other).unwrap();
    }
    config.write_all(slow.text.as_bytes()).unwrap();
    drop(config);
    process.line(|line| line.starts_with("listening on ").then_some(()));
    // The reload reads the file once more.
    let mut config = slow.started();
    config.write_all(slow.text.as_bytes()).unwrap();
    drop(config);
    process.line(|line| line.contains("configuration reloaded").then_some(()));
    let mut process = process;
    process.terminate();
    assert!(process.wait().success());
}

#[test]
fn a_signal_to_stop_during_the_start_ends_it_at_once() {
    let slow = Slow::new();
    for stop in [Signal::TERM, Signal::INT] {
        let mut child = Guarded(slow.serve(&[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let _config = slow.started();
        signal(&child.0, stop);
        assert_eq!(ended(&mut child.0), Some(0), "{stop:?}");
    }
}

/// The kernel does not deliver signals without a handler to the first process of a container.
#[test]
fn a_signal_to_stop_ends_the_first_process_of_a_container() {
    let wrapper = ["unshare", "-pf", "--kill-child"];
    if !Command::new(wrapper[0]).args(&wrapper[1..]).arg("true").status().is_ok_and(|status| status.success()) {
        return;
    }
    let slow = Slow::new();
    let mut child = Guarded(slow.serve(&wrapper).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let _config = slow.started();
    let of = child.0.id();
    let children = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap();
    let first = Pid::from_raw(children.trim().parse().unwrap()).unwrap();
    kill_process(first, Signal::TERM).unwrap();
    assert_eq!(ended(&mut child.0), Some(0));
}

#[test]
fn a_signal_to_stop_ends_a_daemon_whose_module_hangs() {
    let lab = Lab::make(Options::default());
    let faulty = lab.behind_faulty();
    faulty.set("hsm-a", &["call=* hang"]);
    let mut process = Process::start(serve(&lab).env("RUST_LOG", "info"));
    until("it hangs", || (faulty.stats("hsm-a").faults("hang") > 0).then_some(()));
    process.terminate();
    assert!(process.wait().success(), "{}", process.output());
    for socket in ["admin.sock", "review.sock"] {
        assert!(!lab.file("state").join(socket).exists(), "{socket} is left behind");
    }
    until("the call that hangs ends with its process", || (faulty.stats("hsm-a").hanging() == 0).then_some(()));
}

/// Workers end even if a call hangs, and whatever ended the daemon.
#[test]
fn workers_end_with_a_daemon_that_is_killed() {
    let lab = Lab::make(Options { hsms: 2, ..Options::default() });
    let faulty = lab.behind_faulty();
    lab.configure(|config| config.release.watchdog_ms = 60_000);
    let mut daemon = lab.serve();
    until("both members are up", || {
        let members = Administrator(&lab).json(&["hsm", "list"]);
        members.as_array().unwrap().iter().all(|member| member["state"] == "up").then_some(())
    });
    let workers = ["hsm-a", "hsm-b"].map(|member| Administrator(&lab).worker(member).unwrap());
    assert!(workers.iter().all(|worker| lives(*worker)) && workers[0] != workers[1]);
    faulty.set("hsm-b", &["call=C_Decrypt,C_Sign hang"]);
    let config = lab.config_file();
    let probe = std::thread::spawn(move || run(["hsm", "probe", "hsm-b", "--config", config.to_str().unwrap()]));
    faulty.until("hsm-b", "a probe at the token", |stats| stats.hanging() == 1);
    kill_process(daemon.process.pid(), Signal::KILL).unwrap();
    assert_eq!(daemon.process.wait().code(), None);
    assert!(!probe.join().unwrap().status.success());
    until("the workers end", || (!workers.iter().any(|worker| lives(*worker))).then_some(()));
    // No remaining process prevents the next daemon from using its tokens.
    faulty.clear("hsm-b");
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    assert!(daemon.stop().success());
}

#[tokio::test]
async fn a_limit_on_file_sizes_is_a_full_disk() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let host = lab.host(daemon.client());
    let health = host.attest().await.unwrap();
    host.roll(ApiVersion::V2, &health, &lab.protector()).await.unwrap();
    let size = fs::metadata(lab.file("state/audit.jsonl")).unwrap().len();
    let limit = |current: Option<u64>| {
        prlimit(Some(daemon.process.pid()), Resource::Fsize, Rlimit { current, maximum: None }).unwrap();
    };
    limit(Some(size));
    let refused = host.roll(ApiVersion::V2, &health, &lab.protector()).await.err().unwrap().to_string();
    assert!(refused.contains("release refused with 5"), "{refused}");
    limit(None);
    host.roll(ApiVersion::V2, &health, &lab.protector()).await.unwrap();
    assert!(daemon.stop().success());

    // A command that writes a file.
    let out = lab.file("own");
    let mut command = Command::new("prlimit");
    command.arg("--fsize=10").arg(claviger()).args(["guardian", "new", "--bits", "2048"]).arg(&out);
    let refused = tool("util-linux", &mut command);
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    assert!(said(&refused).contains("File too large"), "{}", said(&refused));
}

/// Runs the command with the given standard output.
fn to(stdout: impl Into<Stdio>, program: &Path, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped()).output().unwrap()
}

#[test]
fn output_that_was_not_written_is_a_failure() {
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    block(daemon.until_ready_is(200));
    let config = lab.config_file();
    let config = config.to_str().unwrap();
    let protector = lab.file("tenant/vm-0001.protector.xml");
    let lab_folder = lab.path().to_str().unwrap();
    let plan = ["plan", "--hsm-rate", "1100", "--target", "300/s"];
    let load = [
        "run",
        "--url",
        &daemon.url,
        "--lab",
        lab_folder,
        "--profile",
        "200ms@20",
        "--vms",
        "2",
        "--warmup",
        "0s",
        "--max-lag",
        "60s",
        "--json",
        "-",
    ];
    for (program, arguments) in [
        (claviger(), &["hosts", "list", "--config", config][..]),
        (claviger(), &["hosts", "list", "--json", "--config", config]),
        (claviger(), &["keys", "list", "--config", config]),
        (claviger(), &["hsm", "list", "--config", config]),
        (claviger(), &["doctor", "--config", config]),
        (claviger(), &["doctor", "--json", "--config", config]),
        (claviger(), &["protector", "show", protector.to_str().unwrap()]),
        (claviger(), &["--help"]),
        (claviger(), &["keys", "csr", "--help"]),
        (claviger(), &["--version"]),
        (loadgen(), &plan),
        (loadgen(), &load),
        (loadgen(), &["--help"]),
        (loadgen(), &["--version"]),
    ] {
        let written = to(Stdio::piped(), program, arguments);
        assert!(written.status.success() && !written.stdout.is_empty(), "{arguments:?}: {}", said(&written));
        // A full disk, and a descriptor that is open for reading only.
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        for (stdout, why) in [(full, "No space left"), (File::open("/dev/null").unwrap(), "Bad file descriptor")] {
            let lost = to(stdout, program, arguments);
            let text = said(&lost);
            let code = lost.status.code().unwrap();
            assert!(matches!(code, 1 | 2), "{arguments:?}: {code} {text}");
            assert!(
                text.contains("the standard output could not be written") && text.contains(why),
                "{arguments:?}: {text}"
            );
            assert!(!text.contains("panicked"), "{text}");
        }
        // A reader that closed the pipe needs no more output.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let left = to(writer, program, arguments);
        assert!(left.status.success() && left.stderr.is_empty() || arguments == load, "{arguments:?}: {}", said(&left));
        assert_eq!(left.status.code(), Some(0), "{arguments:?}: {}", said(&left));
    }

    // Options that write the results to files.
    for option in ["--json", "--csv", "--hdr", "--html"] {
        let file = fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
        let mut arguments = load[..load.len() - 2].to_vec();
        arguments.extend([option, "/dev/full"]);
        let lost = to(file, loadgen(), &arguments);
        assert_eq!(lost.status.code(), Some(1), "{option}: {}", said(&lost));
        assert!(said(&lost).contains("/dev/full cannot be written: No space left"), "{option}: {}", said(&lost));
    }
    assert!(daemon.stop().success());
    // A daemon serves even without standard output.
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut child = Guarded(serve(&lab).stdout(full).stderr(Stdio::null()).spawn().unwrap());
    until("it answers", || run(["hosts", "list", "--config", config]).status.success().then_some(()));
    signal(&child.0, Signal::TERM);
    assert_eq!(ended(&mut child.0), Some(0));
}

/// A user without processes: a limit on the user's processes then limits the threads of the command.
const USER: &str = "54321";

/// Returns the command as that user with a limit on threads; `None` if this user may not set it.
fn limited(threads: u32, program: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", USER, "--clear-groups", "prlimit", &format!("--nproc={threads}:{threads}")]);
    command.arg(program).args(arguments).stdin(Stdio::null()).env("RUST_LOG", "warn");
    command
}

#[test]
fn too_few_threads_give_a_message() {
    // The limit does not apply to root, and only root can become another user.
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let lab = Lab::make(Options::default());
    let daemon = lab.serve();
    let config = lab.config_file();
    let config = config.to_str().unwrap();
    let socket = lab.socket();
    let (folder, host) = (lab.path().to_str().unwrap().to_owned(), lab.file("host"));
    let mine = |path: &Path| {
        let changed = Command::new("chown").args(["-R", USER]).arg(path).status().unwrap();
        assert!(changed.success());
    };
    // The other user may not have access to the directory of the built programs.
    let copied = |program: &Path| {
        let copy = lab.file(program.file_name().unwrap().to_str().unwrap());
        std::fs::copy(program, &copy).unwrap();
        copy
    };
    let (claviger, loadgen) = (copied(claviger()), copied(loadgen()));
    let (claviger, loadgen) = (claviger.as_path(), loadgen.as_path());
    mine(lab.path());
    let load = ["run", "--url", &daemon.url, "--lab", &folder, "--profile", "1s@10", "--warmup", "0s"];
    let attest = ["host", "attest", "--fresh", "--dir", host.to_str().unwrap(), "--url", &daemon.url];
    let list = ["hosts", "list", "--socket", socket.to_str().unwrap()];
    for threads in 1..=3 {
        for (program, arguments) in [(claviger, &attest[..]), (loadgen, &load), (claviger, &list)] {
            let output = limited(threads, program, arguments).output().unwrap();
            let text = said(&output);
            assert!(!text.contains("panicked"), "{threads} {arguments:?}: {text}");
            // Without a further thread, the command asks the daemon, which answers that this user may not use the socket.
            let expected = if arguments == list { "may use this socket" } else { "more threads, and it needs" };
            let refused = output.status.code() == Some(1) && text.contains(expected);
            assert!(refused || output.status.success(), "{threads} {arguments:?}: {text}");
        }
    }
    assert!(daemon.stop().success());

    mine(lab.path());
    let start = ["serve", "--config", config];
    for threads in 1..=3 {
        let output = limited(threads, claviger, &start).output().unwrap();
        let text = said(&output);
        assert_eq!(output.status.code(), Some(1), "{threads}: {text}");
        assert!(text.contains("more threads, and it needs") && text.contains("TasksMax="), "{threads}: {text}");
        assert!(!text.contains("panicked"), "{threads}: {text}");
    }
    // With more threads, the program reports the lack of threads or serves.
    let mut serves = 0;
    for threads in [5, 8, 11, 14, 40] {
        let mut process = Process::start(&mut limited(threads, claviger, &start));
        let listens = until("it listens or ends", || {
            let text = process.output();
            if text.contains("metrics on ") { Some(true) } else { text.contains("it needs").then_some(false) }
        });
        if listens {
            serves += 1;
            let address = |name: &str| process.line(|line| Some(line.strip_prefix(name)?.to_owned()));
            let (url, metrics_url) = (address("listening on "), address("metrics on "));
            let ready =
                || block(Client::new(&metrics_url).unwrap().with_timeout(PATIENCE).get("/ready")).unwrap().status;
            until("it is ready", || (ready() == 200).then_some(()));
            let host = lab.host(Client::new(&url).unwrap().with_timeout(PATIENCE));
            let health = block(host.attest()).unwrap();
            // A serving daemon needs no more threads later: waiting work uses existing threads.
            let mut limit = Command::new("setpriv");
            limit.args(["--reuid", USER, "--clear-groups", "prlimit", "--nproc=1:1", "--pid"]);
            let limited = tool("util-linux", limit.arg(process.pid().as_raw_nonzero().to_string()));
            assert!(limited.status.success(), "{}", said(&limited));
            for _ in 0..3 {
                block(host.roll(ApiVersion::V2, &health, &lab.protector())).unwrap();
                assert_eq!(ready(), 200);
                let listed = run(list);
                assert!(listed.status.success(), "{}", said(&listed));
            }
            process.terminate();
            assert!(process.wait().success(), "{threads}: {}", process.output());
        } else {
            assert_eq!(process.wait().code(), Some(1), "{threads}: {}", process.output());
        }
    }
    assert!(serves > 0);
}
