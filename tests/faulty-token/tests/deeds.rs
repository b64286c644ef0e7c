//! Tests of the deeds. Each deed is done by a separate process, which runs this program again.

#![allow(clippy::unwrap_used)]

mod world;

use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use world::{World, worlds};

/// Variable with the deed for the process that does it.
const DEED: &str = "CLAVIGER_TEST_DEED";
/// Exit status of a process that survived and has checked the effects.
const UNHARMED: i32 = 42;
const GIGABYTE: u64 = 1 << 30;

/// End of a process.
#[derive(PartialEq, Eq, Debug)]
enum End {
    Signal(i32),
    Status(i32),
}

/// Not a test of its own: does nothing unless `DEED` is set.
#[test]
#[expect(clippy::disallowed_methods, reason = "the deed may have left this process in no state to end in order")]
fn process_of_a_deed() {
    let Some(deed) = std::env::var_os(DEED) else { return };
    let deed = deed.to_str().unwrap();
    let (_alone, world, _) = worlds();
    let one = world.open("one");
    let descriptor = fs::read_link("/proc/self/fd/3").ok();
    let memory = status("VmRSS");
    world.set("one", &[&format!("call=C_Sign deed={deed}")]);
    if deed == "deadlock" {
        std::thread::scope(|scope| {
            let hanging = scope.spawn(|| world.open("one").sign());
            world.until_counted("one", "deed", 1);
            // Other tokens are not affected.
            assert!(world.open("one").well());
            std::thread::sleep(Duration::from_millis(100));
            assert!(!hanging.is_finished());
            done_once(world);
            std::process::exit(UNHARMED);
        });
    }
    let signed = one.sign();
    assert!(signed.is_ok() && one.well(), "{signed:?}");
    done_once(world);
    match deed {
        "close" => assert!(descriptor.is_none() || fs::read_link("/proc/self/fd/3").ok() != descriptor),
        "handlers" => {
            let bit = |mask: &str, signal: u32| status_of(mask, 16) >> (signal - 1) & 1;
            // SIGINT, SIGTERM and SIGCHLD; SIGSEGV.
            assert!([2, 15, 17].iter().all(|signal| bit("SigIgn", *signal) == 1));
            assert_eq!(bit("SigCgt", 11), 1);
        }
        // In KiB.
        "leak" => assert!(status("VmRSS") >= memory + GIGABYTE / 1024 * 9 / 10),
        _ => {}
    }
    std::process::exit(UNHARMED);
}

/// Checks that the control file is gone and the counts are on disk.
fn done_once(world: &World) {
    assert!(!world.control().join("one").exists() && world.control().join("one.done").exists());
    assert_eq!(world.count("one", "deed"), 1);
}

fn status(name: &str) -> u64 {
    status_of(name, 10)
}

/// Returns a number of `/proc/self/status`.
fn status_of(name: &str, radix: u32) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    u64::from_str_radix(value.split_whitespace().next().unwrap(), radix).unwrap()
}

/// Starts a process that does a deed. Its files are in `folder`.
fn start(deed: &str, folder: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "process_of_a_deed", "--nocapture"]).env(DEED, deed).env("TMPDIR", folder);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Runs a process that does a deed; returns how it ended and how much it printed.
fn perform(deed: &str) -> (End, u64) {
    let folder = tempfile::tempdir().unwrap();
    let mut child = start(deed, folder.path());
    let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let other = std::thread::spawn(move || drain(&mut stderr));
    let printed = drain(&mut stdout) + other.join().unwrap();
    let status = child.wait().unwrap();
    if let Some(signal) = status.signal() {
        on_record(folder.path());
        return (End::Signal(signal), printed);
    }
    let code = status.code().unwrap();
    if code == 0 {
        on_record(folder.path());
    }
    (End::Status(code), printed)
}

fn drain(output: &mut impl Read) -> u64 {
    std::io::copy(output, &mut std::io::sink()).unwrap()
}

/// Checks that the counts of the process are on disk after its end.
fn on_record(folder: &Path) {
    let stats: Vec<PathBuf> = files(folder).into_iter().filter(|file| named(file, "one.", ".stats")).collect();
    let [stats] = &stats[..] else { panic!("{stats:?}") };
    let text = fs::read_to_string(stats).unwrap();
    assert!(text.contains("\"deed\": 1") && text.contains("\"C_Sign\": 1"), "{text}");
}

fn named(file: &Path, beginning: &str, end: &str) -> bool {
    let name = file.file_name().unwrap().to_str().unwrap();
    name.starts_with(beginning) && name.ends_with(end)
}

/// Returns all files below a directory.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn some_end_the_process() {
    assert_eq!(perform("abort").0, End::Signal(6));
    assert_eq!(perform("exit").0, End::Status(0));
    assert_eq!(perform("segv").0, End::Signal(11));
    assert_eq!(perform("heap").0, End::Signal(6));
}

#[test]
fn some_are_survived() {
    for deed in ["handlers", "close", "leak", "deadlock"] {
        assert_eq!(perform(deed).0, End::Status(UNHARMED), "{deed}");
    }
}

#[test]
fn a_gigabyte_is_printed() {
    let (end, printed) = perform("print");
    assert_eq!(end, End::Status(UNHARMED));
    assert!(printed >= GIGABYTE, "{printed}");
}
