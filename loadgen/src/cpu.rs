//! What processes have had of the processors.

use std::path::Path;

/// Clock ticks of `/proc` in a second: the same on every Linux.
const TICKS: f64 = 100.0;

/// What a process has had of the processors so far, in seconds; this one without an id. `None` where the system does not
/// tell.
#[must_use]
pub fn seconds(process: Option<i32>) -> Option<f64> {
    let process = process.map_or_else(|| "self".to_owned(), |id| id.to_string());
    let stat = std::fs::read_to_string(Path::new("/proc").join(process).join("stat")).ok()?;
    // The name of the program, in brackets, may hold anything; what follows does not.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks = |at: usize| fields.split_whitespace().nth(at).and_then(|field| field.parse::<f64>().ok());
    // utime and stime, proc_pid_stat(5).
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
