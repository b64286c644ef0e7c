//! Processor time of other processes.
//!
//! The daemon also reports the processor time of its workers (`claviger_hsm_worker_cpu_seconds_total`), but up to a
//! quarter of a second late. This is too old for the cost of a round outside of PKCS#11.

use std::path::PathBuf;
use std::time::Duration;

use claviger_tests::process::processor_time;
use rustix::process::Pid;

/// Processor time of a process so far.
///
/// # Panics
/// The process does not run.
#[must_use]
pub fn of_process(pid: u32) -> Duration {
    processor_time(Pid::from_raw(pid.cast_signed()).unwrap())
}

/// The running child processes of a process.
///
/// # Panics
/// The process does not run.
#[must_use]
pub fn children(pid: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let files: Vec<PathBuf> = threads.map(|thread| thread.unwrap().path().join("children")).collect();
    // A thread may end in the meantime.
    let texts = files.iter().map(|file| std::fs::read_to_string(file).unwrap_or_default());
    texts.flat_map(|text| text.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()).collect()
}
