//! The worker process: its start, its end, what it prints, what it costs.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tracing::warn;

use crate::error::WorkerFault;
use crate::link;
use crate::standstill;

/// Bytes of a printed line that reach the log.
const LONGEST_LINE: u64 = 1_000;
/// Printed lines that reach the log in a second; the others are counted.
const LINES_A_SECOND: u32 = 5;
/// How long a killed process may take to go. One in an uninterruptible system call takes as long as its device does.
const REAP: Duration = Duration::from_secs(1);
/// How long what a process printed last may take to come through the pipe.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// The program that is run for each member: `claviger hsm-worker`.
#[derive(Clone, Debug)]
pub struct WorkerProgram {
    /// The executable.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

impl WorkerProgram {
    /// The executable of this very process, also when its file has been replaced since, with the argument `hsm-worker`.
    #[must_use]
    pub fn this_executable() -> Self {
        WorkerProgram { path: PathBuf::from("/proc/self/exe"), arguments: vec!["hsm-worker".into()] }
    }
}

/// A running worker. It is killed when this is dropped.
pub(crate) struct Process {
    child: Child,
    output: JoinHandle<()>,
}

impl Process {
    /// Starts a worker for `member`; the daemon's end of its socket. The socket is the child's standard input, because that is
    /// the one descriptor that can be handed over without code between fork and exec; the worker moves it.
    pub(crate) fn start(
        member: &str,
        program: &WorkerProgram,
        env: &BTreeMap<String, String>,
    ) -> io::Result<(Process, OwnedFd)> {
        let (ours, theirs) = link::pair()?;
        let (printed, print) = io::pipe()?;
        let child = Command::new(&program.path)
            .args(&program.arguments)
            .envs(env)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(print.try_clone()?))
            .stderr(Stdio::from(print))
            // An interrupt from the terminal is for the daemon, which tells its workers when to end.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let printed = pipe::Receiver::from_owned_fd(printed.into())?;
        let output = tokio::spawn(relay(member.to_owned(), printed));
        Ok((Process { child, output }, ours))
    }

    /// `None` when it has ended and was waited for.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits for its end, for so long; how it ended.
    pub(crate) async fn wait(&mut self, patience: Duration) -> Option<WorkerFault> {
        match standstill::timeout(patience, self.child.wait()).await {
            Ok(Ok(status)) => {
                if !self.output.is_finished() {
                    let _ = standstill::timeout(LAST_WORDS, &mut self.output).await;
                }
                Some(fault_of(status))
            }
            _ => None,
        }
    }

    /// Ends it at once; how it ended, if it went.
    pub(crate) async fn kill(mut self) -> Option<WorkerFault> {
        let _ = self.child.start_kill();
        self.wait(REAP).await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Descendants of the worker may hold the pipe open for ever.
        self.output.abort();
    }
}

fn fault_of(status: ExitStatus) -> WorkerFault {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => WorkerFault::Exited(code),
        (None, Some(signal)) => WorkerFault::Signal(signal),
        (None, None) => WorkerFault::Gone,
    }
}

/// Logs what a worker prints, which is what the vendor's library prints. Reads on however much that is, so that the library
/// does not block in its print.
async fn relay(member: String, printed: pipe::Receiver) {
    let mut printed = BufReader::with_capacity(64 * 1024, printed);
    let (mut second, mut said, mut unsaid) = (standstill::now(), 0, 0_u64);
    let mut line = Vec::new();
    loop {
        line.clear();
        let Ok(len) = (&mut printed).take(LONGEST_LINE).read_until(b'\n', &mut line).await else { return };
        if len == 0 {
            return;
        }
        if standstill::since(second) >= Duration::from_secs(1) {
            (second, said) = (standstill::now(), 0);
        }
        if said == LINES_A_SECOND {
            unsaid += 1;
            continue;
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim();
        if !text.is_empty() {
            said += 1;
            warn!(member, unsaid = std::mem::take(&mut unsaid), line = text, "the module prints");
        }
    }
}

/// What the member's workers have cost, of all its life.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    /// Processor time of workers that have ended, in nanoseconds, as far as it was seen.
    ended: AtomicU64,
    /// Of the one that runs, when it was last looked at.
    running: AtomicU64,
}

/// What a running process costs.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Cost {
    /// User and system time.
    pub(crate) processor: Duration,
    /// Bytes in memory.
    pub(crate) resident: u64,
}

impl Usage {
    /// Looks at the process that runs; processor time of all workers so far, and memory of this one.
    pub(crate) fn look(&self, pid: Option<u32>) -> Cost {
        let cost = pid.and_then(cost_of).unwrap_or_default();
        let running = u64::try_from(cost.processor.as_nanos()).unwrap_or(0);
        let running = self.running.fetch_max(running, Ordering::Relaxed).max(running);
        let all = self.ended.load(Ordering::Relaxed) + running;
        Cost { processor: Duration::from_nanos(all), resident: cost.resident }
    }

    /// The process has ended.
    pub(crate) fn ended(&self) {
        self.ended.fetch_add(self.running.swap(0, Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// From `/proc/PID/stat` (proc(5)): fields 14 and 15 are ticks of processor time, field 24 pages in memory.
fn cost_of(pid: u32) -> Option<Cost> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in parentheses, which may hold blanks.
    let (_, rest) = stat.rsplit_once(") ")?;
    let field = |number: usize| rest.split(' ').nth(number - 3)?.parse::<u64>().ok();
    let ticks = field(14)? + field(15)?;
    let tick = Duration::from_secs(1) / u32::try_from(rustix::param::clock_ticks_per_second()).ok()?.max(1);
    let page = rustix::param::page_size() as u64;
    Some(Cost { processor: tick * u32::try_from(ticks).unwrap_or(u32::MAX), resident: field(24)? * page })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_cost_of_this_process_is_found() {
        let cost = cost_of(std::process::id()).unwrap();
        assert!(cost.resident > 100_000, "{cost:?}");
        assert!(cost_of(u32::MAX).is_none());
    }

    #[test]
    fn processor_time_never_goes_back() {
        let usage = Usage::default();
        usage.running.store(5_000_000, Ordering::Relaxed);
        assert_eq!(usage.look(None).processor, Duration::from_millis(5));
        usage.ended();
        usage.ended();
        assert_eq!(usage.look(None), Cost { processor: Duration::from_millis(5), resident: 0 });
    }
}
