//! Threads under a limit (`TasksMax=`, a container's pids limit, `ulimit -u`).
//!
//! tokio panics if it cannot start its first threads, and a blocking task waits for ever if no blocking thread can be
//! started. So a program checks first that it can start the threads that it needs.

use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

/// The environment variable of tokio for the number of worker threads.
const WORKERS_VARIABLE: &str = "TOKIO_WORKER_THREADS";
/// Time for which an idle blocking thread is kept. It is long, so that a thread from the start of the program stays.
const KEEP_BLOCKING: Duration = Duration::from_secs(3600);

/// The system does not allow this process the threads that it needs.
#[derive(Debug, thiserror::Error)]
#[error(
    "the system allows this process {had} more threads, and it needs {needed} ({source}): raise the limit (TasksMax= of systemd, \
     the pids limit of a container, ulimit -u)"
)]
pub struct TooFewThreads {
    needed: usize,
    had: usize,
    source: io::Error,
}

/// The message for a required thread that could not be started.
#[must_use]
pub fn no_thread(error: &io::Error) -> String {
    TooFewThreads { needed: 1, had: 0, source: io::Error::new(error.kind(), error.to_string()) }.to_string()
}

/// Checks that `needed` more threads can run at the same time. Starts them and ends them again.
///
/// # Errors
/// [`TooFewThreads`].
pub fn ensure(needed: usize) -> Result<(), TooFewThreads> {
    // Each thread waits until its sender is dropped.
    let mut threads = Vec::with_capacity(needed);
    let mut result = Ok(());
    for had in 0..needed {
        let (sender, receiver) = mpsc::channel::<()>();
        let wait = move || _ = receiver.recv();
        match thread::Builder::new().name("trial".to_owned()).spawn(wait) {
            Ok(thread) => threads.push((sender, thread)),
            Err(source) => {
                result = Err(TooFewThreads { needed, had, source });
                break;
            }
        }
    }
    for (sender, thread) in threads {
        drop(sender);
        let _ = thread.join();
    }
    result
}

/// The processors for which a runtime has worker threads, unless `TOKIO_WORKER_THREADS` says another number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processors {
    /// All.
    All,
    /// Half of them, at least one: other processes of the program need the rest.
    Half,
}

impl Processors {
    /// The number of worker threads.
    fn workers(self) -> usize {
        let wished = std::env::var(WORKERS_VARIABLE).ok().and_then(|text| text.parse().ok());
        wished.filter(|wished| *wished > 0).unwrap_or_else(|| {
            let all = thread::available_parallelism().map_or(1, usize::from);
            match self {
                Self::All => all,
                Self::Half => (all / 2).max(1),
            }
        })
    }
}

/// Checks that [`runtime`] will get its threads. Programs call this before any step that takes time.
///
/// # Errors
/// [`TooFewThreads`].
pub fn ensure_runtime(processors: Processors, others: usize) -> Result<(), TooFewThreads> {
    ensure(processors.workers() + 1 + others)
}

/// Builds a runtime with a worker thread for each of these processors. `others` is the number of other threads that the
/// program needs.
///
/// # Errors
/// [`TooFewThreads`], or the error of the operating system.
pub fn runtime(processors: Processors, others: usize) -> io::Result<Runtime> {
    build(processors.workers(), others)
}

/// Builds a runtime with one worker thread, for a command that mostly waits for replies.
///
/// # Errors
/// [`TooFewThreads`], or the error of the operating system.
pub fn small_runtime() -> io::Result<Runtime> {
    build(1, 0)
}

/// Builds a runtime on the calling thread alone, for a command that asks one question over a Unix socket.
///
/// # Errors
/// The error of the operating system.
pub fn single_thread() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

fn build(workers: usize, others: usize) -> io::Result<Runtime> {
    // One more thread for blocking tasks.
    ensure(workers + 1 + others).map_err(io::Error::other)?;
    let runtime =
        Builder::new_multi_thread().worker_threads(workers).enable_all().thread_keep_alive(KEEP_BLOCKING).build()?;
    // This starts a blocking thread now. If no more threads can be started later, blocking tasks run on this thread one
    // after the other.
    drop(runtime.spawn_blocking(|| ()));
    Ok(runtime)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_can_be_had_are_had_and_given_back() {
        ensure(0).unwrap();
        ensure(20).unwrap();
        let left = std::fs::read_dir("/proc/self/task").unwrap().filter_map(|task| {
            std::fs::read_to_string(task.unwrap().path().join("comm")).ok().filter(|name| name.trim() == "trial")
        });
        assert_eq!(left.count(), 0);
        assert_eq!(runtime(Processors::Half, 1).unwrap().block_on(async { 7 }), 7);
        assert_eq!(small_runtime().unwrap().block_on(async { 7 }), 7);
    }
}
