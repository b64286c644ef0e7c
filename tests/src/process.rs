//! A child process that ends with its test.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use claviger_process::lock::lock;
use nix::time::clock_getcpuclockid;
use rustix::process::{Pid, Signal, kill_process};

use crate::wait::PATIENCE;

/// Time that a dropped process gets for an orderly end.
const ORDERLY: Duration = Duration::from_secs(5);

/// Returns true if the process exists and has not ended. A process that has ended may still wait to be reaped.
#[must_use]
pub fn lives(pid: Pid) -> bool {
    // Format of proc(5): the number, the name in parentheses, the state.
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Processor time of a process so far, including ended threads (clock_getcpuclockid(3)): exact, also within milliseconds.
///
/// # Panics
/// There is no such process.
#[must_use]
pub fn processor_time(pid: Pid) -> Duration {
    let clock = clock_getcpuclockid(nix::unistd::Pid::from_raw(pid.as_raw_nonzero().get())).unwrap();
    clock.now().unwrap().into()
}

/// Processor time of the running threads of a process that have this name, with a resolution of 20 ms for each.
///
/// # Panics
/// There is no such process.
#[must_use]
pub fn processor_time_of_threads(pid: Pid, name: &str) -> Duration {
    let threads = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())).unwrap();
    // proc(5): ticks in user mode and in the kernel are the 14th and the 15th field.
    let ticks = |stat: &str| -> u64 {
        let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ').skip(11).take(2);
        fields.filter_map(|field| field.parse::<u64>().ok()).sum()
    };
    let sum: u64 = threads
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok())
        .filter(|stat| stat.contains(&format!("({name})")))
        .map(|stat| ticks(&stat))
        .sum();
    Duration::from_millis(sum * 1000 / rustix::param::clock_ticks_per_second())
}

/// A running program, its output so far, and its end: it is stopped when this is dropped.
pub struct Process {
    child: Child,
    output: Arc<Lines>,
}

#[derive(Default)]
struct Lines {
    seen: Mutex<Seen>,
    changed: Condvar,
}

#[derive(Default)]
struct Seen {
    lines: Vec<String>,
    closed: usize,
}

impl Process {
    /// Starts a program and reads both of its outputs.
    ///
    /// # Panics
    /// If the program cannot be started.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let output = Arc::new(Lines::default());
        follow(child.stdout.take().unwrap(), &output);
        follow(child.stderr.take().unwrap(), &output);
        Self { child, output }
    }

    /// Waits for an output line for which `wanted` returns a value, and returns that value.
    ///
    /// # Panics
    /// If the program ends without such a line or [`PATIENCE`] is over. The message contains the whole output.
    pub fn line<T>(&self, wanted: impl Fn(&str) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        let mut seen = lock(&self.output.seen);
        loop {
            if let Some(value) = seen.lines.iter().find_map(|line| wanted(line)) {
                return value;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(seen.closed < 2 && !left.is_zero(), "not said by the program:\n{}", seen.lines.join("\n"));
            seen = self.output.changed.wait_timeout(seen, left).unwrap().0;
        }
    }

    /// Returns the whole output so far.
    #[must_use]
    pub fn output(&self) -> String {
        lock(&self.output.seen).lines.join("\n")
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        let _ = kill_process(self.pid(), Signal::TERM);
    }

    /// Sends SIGHUP.
    pub fn hang_up(&self) {
        let _ = kill_process(self.pid(), Signal::HUP);
    }

    /// Stops the process (SIGSTOP).
    pub fn freeze(&self) {
        let _ = kill_process(self.pid(), Signal::STOP);
    }

    /// Continues the process after [`freeze`](Self::freeze) (SIGCONT).
    pub fn thaw(&self) {
        let _ = kill_process(self.pid(), Signal::CONT);
    }

    /// Kills the process (SIGKILL) and waits for its end.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for the process to end.
    ///
    /// # Panics
    /// If it runs longer than [`PATIENCE`].
    pub fn wait(&mut self) -> ExitStatus {
        match self.wait_for(PATIENCE) {
            Some(status) => status,
            None => panic!("the program does not end:\n{}", self.output()),
        }
    }

    fn wait_for(&mut self, time: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    }

    /// Returns a number of `/proc/PID/status`, such as `Threads`, or `VmRSS` in KiB.
    ///
    /// # Panics
    /// If the file has no such number or the process has ended.
    #[must_use]
    pub fn status(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid().as_raw_nonzero())).unwrap();
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.and_then(|value| value.split_whitespace().next()?.parse().ok()).unwrap_or_else(|| panic!("no {name}"))
    }

    /// Returns the process id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The id of a child that was waited for may belong to another process.
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        self.terminate();
        if self.wait_for(ORDERLY).is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            // The test runner shows this output, because the test has failed.
            #[allow(clippy::print_stderr)]
            {
                eprintln!("--- the program said:\n{}\n---", self.output());
            }
        }
    }
}

fn follow(pipe: impl Read + Send + 'static, output: &Arc<Lines>) {
    let output = output.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n') {
            let Ok(line) = line else { break };
            let line = String::from_utf8_lossy(&line).into_owned();
            lock(&output.seen).lines.push(line);
            output.changed.notify_all();
        }
        lock(&output.seen).closed += 1;
        output.changed.notify_all();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_has_ended_does_not_live() {
        let mut ended = Command::new("true").spawn().unwrap();
        crate::wait::until("it has ended", || (!lives(Pid::from_child(&ended))).then_some(()));
        assert!(ended.wait().unwrap().success());
        assert!(lives(rustix::process::getpid()));
    }
}
