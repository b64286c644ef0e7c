//! Threads under a limit (`TasksMax=`, a container's pids limit, `ulimit -u`).
//!
//! tokio panics when it gets no thread at its start, and a task for a thread that may block waits for ever when there is none.
//! So a program makes sure first that it gets the threads it cannot do without.

use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

/// tokio's own variable for the number of threads that run tasks.
const WORKERS_VARIABLE: &str = "TOKIO_WORKER_THREADS";
/// A thread that may block is kept this long without work. Long, so that one that was had at the start stays.
const KEEP_BLOCKING: Duration = Duration::from_secs(3600);

/// The system does not let this process have its threads.
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

/// What to say where a thread that a program cannot do without is refused.
#[must_use]
pub fn no_thread(error: &io::Error) -> String {
    TooFewThreads { needed: 1, had: 0, source: io::Error::new(error.kind(), error.to_string()) }.to_string()
}

/// Makes sure that so many more threads can be had at the same time, by having them for a moment.
///
/// # Errors
/// [`TooFewThreads`].
pub fn ensure(needed: usize) -> Result<(), TooFewThreads> {
    // Each thread waits until its sender is gone.
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

/// The number of threads that run tasks: one for each processor, or what `TOKIO_WORKER_THREADS` says.
fn workers() -> usize {
    let wished = std::env::var(WORKERS_VARIABLE).ok().and_then(|text| text.parse().ok()).filter(|wished| *wished > 0);
    wished.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from))
}

/// Makes sure that [`runtime`] will get its threads, before anything is done that takes time.
///
/// # Errors
/// [`TooFewThreads`].
pub fn ensure_runtime(others: usize) -> Result<(), TooFewThreads> {
    ensure(workers() + 1 + others)
}

/// A runtime with a thread for each processor. `others` is how many threads the program needs beside it.
///
/// # Errors
/// [`TooFewThreads`], or what the operating system says.
pub fn runtime(others: usize) -> io::Result<Runtime> {
    build(Builder::new_multi_thread().worker_threads(workers()), workers(), others)
}

/// A runtime for a command that waits for answers most of the time: one thread beside the caller's.
///
/// # Errors
/// [`TooFewThreads`], or what the operating system says.
pub fn small_runtime() -> io::Result<Runtime> {
    build(Builder::new_multi_thread().worker_threads(1), 1, 0)
}

/// A runtime without a thread of its own, for a command that asks one question over a Unix socket.
///
/// # Errors
/// What the operating system says.
pub fn single_thread() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

fn build(builder: &mut Builder, workers: usize, others: usize) -> io::Result<Runtime> {
    // And one that may block.
    ensure(workers + 1 + others).map_err(io::Error::other)?;
    let runtime = builder.enable_all().thread_keep_alive(KEEP_BLOCKING).build()?;
    // Made now, so that work which may block goes on later, one after the other, when no more threads can be had.
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
        assert_eq!(runtime(1).unwrap().block_on(async { 7 }), 7);
        assert_eq!(small_runtime().unwrap().block_on(async { 7 }), 7);
    }
}
