//! The worker process: its start, its end, its output and its cost.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tracing::warn;

use crate::error::WorkerFault;
use crate::link::{self, nanos};
use crate::standstill;

/// Maximum number of bytes of a printed line that are logged.
const LONGEST_LINE: u64 = 1_000;
/// Maximum number of printed lines that are logged in a second; further lines are only counted.
const LINES_A_SECOND: u32 = 5;
/// Time limit for the end of a killed process. In an uninterruptible system call, a process ends when the device allows it.
const REAP: Duration = Duration::from_secs(1);
/// Time limit for reading the last output of a process from the pipe.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// The program that runs as worker: `claviger hsm-worker`.
#[derive(Clone, Debug)]
pub struct WorkerProgram {
    /// Path of the executable.
    pub path: PathBuf,
    /// Arguments of the program.
    pub arguments: Vec<OsString>,
    /// Environment variables of the daemon that the worker does not inherit: those that hold PINs.
    pub hidden: Vec<String>,
}

impl WorkerProgram {
    /// Returns the executable of this process, even if its file was replaced since, with the argument `hsm-worker`.
    #[must_use]
    pub fn this_executable() -> Self {
        WorkerProgram {
            path: PathBuf::from("/proc/self/exe"),
            arguments: vec!["hsm-worker".into()],
            hidden: Vec::new(),
        }
    }
}

/// Differences between a worker's environment and the daemon's.
#[derive(Clone, Copy)]
pub(crate) struct Environment<'a> {
    /// Variables of the daemon that the worker does not inherit.
    pub(crate) hidden: &'a BTreeSet<String>,
    /// Variables of the worker's member.
    pub(crate) set: &'a BTreeMap<String, String>,
}

/// A running worker. It is killed when this is dropped.
pub(crate) struct Process {
    child: Child,
    /// The worker's process group until it is killed. Programs that the library starts belong to it.
    group: Option<Pid>,
    output: JoinHandle<()>,
}

impl Process {
    /// Starts a worker for `member`; returns it and the daemon's end of its socket. The worker's end is the child's
    /// standard input, the only descriptor that can be handed over without code between fork and exec. The worker moves it
    /// to another number.
    pub(crate) fn start(
        member: &str,
        program: &WorkerProgram,
        environment: Environment<'_>,
    ) -> io::Result<(Process, OwnedFd)> {
        let (ours, theirs) = link::pair()?;
        let (printed, print) = io::pipe()?;
        let mut command = Command::new(&program.path);
        environment.hidden.iter().for_each(|variable| {
            command.env_remove(variable);
        });
        let child = command
            .args(&program.arguments)
            .envs(environment.set)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(print.try_clone()?))
            .stderr(Stdio::from(print))
            // An interrupt from the terminal must reach the daemon only, which tells its workers when to end.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let printed = pipe::Receiver::from_owned_fd(printed.into())?;
        let output = tokio::spawn(relay(member.to_owned(), printed));
        let group = child.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
        Ok((Process { child, group, output }, ours))
    }

    /// Returns the process id; `None` if the process has ended and was waited for.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits for the process to end, and returns how it ended. May be cancelled and called again.
    pub(crate) async fn ended(&mut self) -> WorkerFault {
        self.reaped().await.map_or(WorkerFault::Gone, fault_of)
    }

    async fn reaped(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        // Called at once: while a process of the group lives, no other group can get its number; an empty group is not
        // found.
        self.kill_group();
        Ok(status)
    }

    /// Waits for the process to end, for at most `patience`; returns how it ended.
    pub(crate) async fn wait(&mut self, patience: Duration) -> Option<WorkerFault> {
        match standstill::timeout(patience, self.reaped()).await {
            Ok(Ok(status)) => {
                if !self.output.is_finished() {
                    let _ = standstill::timeout(LAST_WORDS, &mut self.output).await;
                }
                Some(fault_of(status))
            }
            _ => None,
        }
    }

    /// Kills the process; returns how it ended, unless it did not end in time.
    pub(crate) async fn kill(mut self) -> Option<WorkerFault> {
        self.kill_group();
        self.wait(REAP).await
    }

    /// Kills the worker together with the programs that the library started: they may hold a token or a lock file.
    fn kill_group(&mut self) {
        if let Some(group) = self.group.take() {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_group();
        // Descendants of the worker may keep the pipe open for ever.
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

/// Logs the worker's output, which is the output of the vendor's library. Reads all of it, even beyond the limits of the
/// log, so that the library does not block while it prints.
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

/// Cost of all workers of the member so far, as reported by them.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    /// Processor time of workers that have ended, in nanoseconds.
    ended: AtomicU64,
    /// Processor time of the running worker, in nanoseconds.
    running: AtomicU64,
    /// Resident memory of the running worker, in bytes.
    resident: AtomicU64,
}

impl Usage {
    /// Records a cost report of the running worker.
    pub(crate) fn reported(&self, processor: Duration, resident: u64) {
        self.running.fetch_max(nanos(processor), Ordering::Relaxed);
        self.resident.store(resident, Ordering::Relaxed);
    }

    /// Returns the processor time of all workers so far.
    pub(crate) fn processor(&self) -> Duration {
        let ended = self.ended.load(Ordering::Relaxed);
        Duration::from_nanos(ended.saturating_add(self.running.load(Ordering::Relaxed)))
    }

    /// Returns the resident memory in bytes; 0 without a worker.
    pub(crate) fn resident(&self) -> u64 {
        self.resident.load(Ordering::Relaxed)
    }

    /// Records the end of the running worker.
    pub(crate) fn ended(&self) {
        self.ended.fetch_add(self.running.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        self.resident.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_never_goes_back() {
        let usage = Usage::default();
        let ms = Duration::from_millis;
        usage.reported(ms(5), 4096);
        usage.reported(ms(4), 8192);
        assert_eq!((usage.processor(), usage.resident()), (ms(5), 8192));
        usage.ended();
        usage.ended();
        assert_eq!((usage.processor(), usage.resident()), (ms(5), 0));
        usage.reported(ms(1), 4096);
        assert_eq!(usage.processor(), ms(6));
    }
}
