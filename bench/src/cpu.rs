//! Processor time of other processes.
//!
//! The daemon tells that of its workers, too (`claviger_hsm_worker_cpu_seconds_total`), as of a quarter of a second ago at
//! worst. That is too old for what a round spends outside of PKCS#11.

use std::path::PathBuf;

/// A moment of the processor in `/proc/PID/stat`: USER_HZ, 100 on every Linux that this runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// Processor time of a process so far, its threads that ended included, in seconds, to 20 ms (proc_pid_stat(5)).
///
/// # Panics
/// When it does not run.
#[must_use]
pub fn seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The second field is the program's name in brackets, whatever that is; utime and stime are fields 14 and 15.
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<f64>().unwrap()).sum::<f64>() / TICKS_PER_SECOND
}

/// The processes that a process started and that still run.
///
/// # Panics
/// When it does not run.
#[must_use]
pub fn children(pid: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let files: Vec<PathBuf> = threads.map(|thread| thread.unwrap().path().join("children")).collect();
    // A thread may end meanwhile.
    let texts = files.iter().map(|file| std::fs::read_to_string(file).unwrap_or_default());
    texts.flat_map(|text| text.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()).collect()
}
