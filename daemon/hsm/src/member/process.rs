//! The worker process: its start, its end, what it prints, what it costs.

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
    /// Environment variables of the daemon that it does not inherit: those that hold PINs.
    pub hidden: Vec<String>,
}

impl WorkerProgram {
    /// The executable of this very process, also when its file has been replaced since, with the argument `hsm-worker`.
    #[must_use]
    pub fn this_executable() -> Self {
        WorkerProgram {
            path: PathBuf::from("/proc/self/exe"),
            arguments: vec!["hsm-worker".into()],
            hidden: Vec::new(),
        }
    }
}

/// How a worker's environment differs from the daemon's.
#[derive(Clone, Copy)]
pub(crate) struct Environment<'a> {
    /// Variables of the daemon that the worker does not inherit.
    pub(crate) hidden: &'a BTreeSet<String>,
    /// Variables of its member.
    pub(crate) set: &'a BTreeMap<String, String>,
}

/// A running worker. It is killed when this is dropped.
pub(crate) struct Process {
    child: Child,
    /// Its process group, until that was killed: what the library has started belongs to it.
    group: Option<Pid>,
    output: JoinHandle<()>,
}

impl Process {
    /// Starts a worker for `member`; the daemon's end of its socket. The socket is the child's standard input, because that is
    /// the one descriptor that can be handed over without code between fork and exec; the worker moves it.
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
            // An interrupt from the terminal is for the daemon, which tells its workers when to end.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let printed = pipe::Receiver::from_owned_fd(printed.into())?;
        let output = tokio::spawn(relay(member.to_owned(), printed));
        let group = child.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
        Ok((Process { child, group, output }, ours))
    }

    /// `None` when it has ended and was waited for.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits for its end; how it ended. May be given up and called again.
    pub(crate) async fn ended(&mut self) -> WorkerFault {
        self.reaped().await.map_or(WorkerFault::Gone, fault_of)
    }

    async fn reaped(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        // At once: while a process of the group lives its number belongs to nobody else, and an empty one is not found.
        self.kill_group();
        Ok(status)
    }

    /// Waits for its end, for so long; how it ended.
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

    /// Ends it at once; how it ended, if it went.
    pub(crate) async fn kill(mut self) -> Option<WorkerFault> {
        self.kill_group();
        self.wait(REAP).await
    }

    /// With what the library has started: that may hold a token, or a lock file.
    fn kill_group(&mut self) {
        if let Some(group) = self.group.take() {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_group();
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

/// What the member's workers have cost, of all its life, as far as they told.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    /// Processor time of workers that have ended, in nanoseconds.
    ended: AtomicU64,
    /// Of the one that runs.
    running: AtomicU64,
    /// Bytes that the one that runs has in memory.
    resident: AtomicU64,
}

impl Usage {
    /// The worker that runs says what it has cost so far.
    pub(crate) fn reported(&self, processor: Duration, resident: u64) {
        self.running.fetch_max(nanos(processor), Ordering::Relaxed);
        self.resident.store(resident, Ordering::Relaxed);
    }

    /// Processor time of all workers so far.
    pub(crate) fn processor(&self) -> Duration {
        let ended = self.ended.load(Ordering::Relaxed);
        Duration::from_nanos(ended.saturating_add(self.running.load(Ordering::Relaxed)))
    }

    /// Bytes in memory; 0 while there is no worker.
    pub(crate) fn resident(&self) -> u64 {
        self.resident.load(Ordering::Relaxed)
    }

    /// The process has ended.
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
