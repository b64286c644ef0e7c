//! Processor time of other processes.
//!
//! The daemon also reports the processor time of its workers (`claviger_hsm_worker_cpu_seconds_total`), but up to a
//! quarter of a second late. This is too old for the cost of a round outside of PKCS#11.

use std::path::PathBuf;

/// Clock ticks in `/proc/PID/stat`: USER_HZ, which is 100 on every supported Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// Processor time of a process so far, including ended threads, in seconds with a resolution of 20 ms
/// (proc_pid_stat(5)).
///
/// # Panics
/// The process does not run.
#[must_use]
pub fn seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The second field is the program's name in parentheses, with any characters; utime and stime are fields 14 and 15.
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<f64>().unwrap()).sum::<f64>() / TICKS_PER_SECOND
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
