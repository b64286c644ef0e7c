//! Processor time of processes.

use std::path::Path;

/// Clock ticks a second in `/proc`. The value is the same on every Linux system.
const TICKS: f64 = 100.0;

/// Processor time that a process has used so far, in seconds. Without an id, the time of this process. `None` if the
/// system does not report it.
#[must_use]
pub fn seconds(process: Option<i32>) -> Option<f64> {
    let process = process.map_or_else(|| "self".to_owned(), |id| id.to_string());
    let stat = std::fs::read_to_string(Path::new("/proc").join(process).join("stat")).ok()?;
    // The program's name, in brackets, may contain any character. The fields after it do not contain a bracket.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks = |at: usize| fields.split_whitespace().nth(at).and_then(|field| field.parse::<f64>().ok());
    // The fields utime and stime of proc_pid_stat(5).
    Some((ticks(11)? + ticks(12)?) / TICKS)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_process_costs_something_and_no_process_nothing() {
        let begun = std::time::Instant::now();
        while begun.elapsed().as_millis() < 50 {}
        assert!(super::seconds(None).is_some_and(|seconds| seconds > 0.0));
        assert_eq!(super::seconds(Some(-1)), None);
    }
}
