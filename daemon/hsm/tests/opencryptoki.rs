//! Runs the token suite with opencryptoki's soft token. SoftHSM2 provides the spare token.

#![allow(clippy::unwrap_used, missing_docs)]

mod suite;

use std::fs::{self, File};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use suite::{SO_PIN, SOFTHSM, USER_PIN, member};

const MODULE: &str = "/usr/lib/x86_64-linux-gnu/pkcs11/libopencryptoki.so";
const DAEMON: &str = "/usr/sbin/pkcsslotd";
const TOKEN_FILES: &str = "/var/lib/opencryptoki/swtok";
const TOKEN_OBJECTS: &str = "/var/lib/opencryptoki/swtok/TOK_OBJ";
const PID_FILE: &str = "/var/run/pkcsslotd.pid";
/// Slot of the soft token in Debian's /etc/opencryptoki/opencryptoki.conf.
const SLOT: &str = "3";
const LABEL: &str = "claviger-hsm";
/// SO PIN of a soft token in its initial state.
const FACTORY_SO_PIN: &str = "87654321";

#[test]
fn opencryptoki() {
    suite::expect_installed(MODULE, "opencryptoki");
    suite::expect_installed(DAEMON, "opencryptoki");
    // A machine has only one such token.
    let turn = File::create(std::env::temp_dir().join("claviger-opencryptoki.lock")).unwrap();
    turn.lock().unwrap();
    let daemon = SlotDaemon::start();
    prepare_token(&daemon);
    let _tokens = suite::softhsm_tokens(&["stand-in"]);
    suite::run(member("soft", MODULE, LABEL), member("stand-in", SOFTHSM, "stand-in"));
}

/// The daemon pkcsslotd. It is stopped at the end, unless it ran before.
struct SlotDaemon {
    ours: bool,
}

impl SlotDaemon {
    fn start() -> SlotDaemon {
        if running().is_some() {
            return SlotDaemon { ours: false };
        }
        // From here on it is stopped again, even if a later step fails.
        let daemon = SlotDaemon { ours: true };
        start();
        daemon
    }
}

impl Drop for SlotDaemon {
    fn drop(&mut self) {
        if self.ours {
            stop();
        }
    }
}

fn start() {
    let started = Command::new(DAEMON).status().unwrap();
    assert!(started.success(), "pkcsslotd does not start: {started}");
    let patience = Instant::now() + Duration::from_secs(10);
    while running().is_none() || !pkcsconf(&["-t", "-c", SLOT], "").contains("Label:") {
        assert!(Instant::now() < patience, "pkcsslotd does not come up");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn stop() {
    let Some(pid) = running() else { return };
    let _ = Command::new("kill").arg(pid.to_string()).status();
    let patience = Instant::now() + Duration::from_secs(10);
    while running().is_some() && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Returns the daemon's process id, if it runs; its file may outlive it.
fn running() -> Option<u32> {
    let pid: u32 = fs::read_to_string(PID_FILE).ok()?.trim().parse().ok()?;
    // The file is empty for a process that has ended and is not reaped, as in containers without an init.
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
    command.contains("pkcsslotd").then_some(pid)
}

/// Initialises the token, unless an earlier run did.
fn prepare_token(daemon: &SlotDaemon) {
    let info = pkcsconf(&["-t", "-c", SLOT], "");
    let ours = info.lines().any(|line| line.trim() == format!("Label: {LABEL}"));
    if info.contains("USER_PIN_INITIALIZED") {
        assert!(
            ours,
            "slot {SLOT} holds somebody's token, which this test does not touch. To let it have the slot, \
             stop pkcsslotd and empty {TOKEN_FILES}\n{info}"
        );
        return;
    }
    if info.contains("TOKEN_INITIALIZED") {
        // The token is half set up. opencryptoki 3.8 cannot initialise such a token again: C_Login fails from then on.
        assert!(daemon.ours, "stop pkcsslotd and empty {TOKEN_FILES}");
        stop();
        for dir in [TOKEN_FILES, TOKEN_OBJECTS] {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() {
                    fs::remove_file(path).unwrap();
                }
            }
        }
        // This file is the daemon's copy of the token's data.
        let _ = fs::remove_file("/dev/shm/var.lib.opencryptoki.swtok");
        start();
    }
    let label = format!("{LABEL}\n");
    pkcsconf(&["-I", "-c", SLOT, "-S", FACTORY_SO_PIN], &label);
    pkcsconf(&["-P", "-c", SLOT, "-S", FACTORY_SO_PIN, "-n", SO_PIN], "");
    pkcsconf(&["-u", "-c", SLOT, "-S", SO_PIN, "-n", USER_PIN], "");
    let info = pkcsconf(&["-t", "-c", SLOT], "");
    assert!(info.contains("USER_PIN_INITIALIZED") && info.contains(LABEL), "the soft token cannot be set up\n{info}");
}

fn pkcsconf(arguments: &[&str], input: &str) -> String {
    let mut child = Command::new("pkcsconf")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    [output.stdout, output.stderr].iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect()
}
