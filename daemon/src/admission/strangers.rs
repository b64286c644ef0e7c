//! Expensive work for unknown senders. Anyone can make the service parse a mebibyte of JSON or verify with an 8192-bit
//! key, which takes milliseconds. Such work does not block the runtime's threads, and uses at most half of the
//! processors.

use std::sync::LazyLock;
use std::thread::available_parallelism;

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Semaphore;

static TURNS: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new((available_parallelism().map_or(1, usize::from) / 2).max(1)));

/// Waits for a turn, then runs `work` without blocking other requests on this runtime thread.
pub(crate) async fn aside<T>(work: impl FnOnce() -> T) -> T {
    // The semaphore is never closed, so there is no error.
    let _turn = TURNS.acquire().await;
    in_place(work)
}

/// Input with more bytes than this keeps a thread busy for long. The protector of an owner and three guardians has
/// about 13,000 bytes.
pub(crate) const LARGE: usize = 16 * 1024;

/// Runs work whose duration depends on an input of `bytes` bytes. For large input, it does not block other requests on
/// this runtime thread. For usual protectors, moving the other tasks would take longer than the work itself.
pub(crate) fn apart_if_large<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    if bytes > LARGE { in_place(work) } else { work() }
}

/// Runs `work` at once. On a multi-threaded runtime, it does not block other requests on this thread.
#[expect(clippy::disallowed_methods, reason = "the one place where it is bounded")]
pub(crate) fn in_place<T>(work: impl FnOnce() -> T) -> T {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::CurrentThread => work(),
        _ => tokio::task::block_in_place(work),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;
    use tokio::task::JoinSet;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn strangers_have_half_of_the_processors_at_most() {
        static WORKING: AtomicUsize = AtomicUsize::new(0);
        static MOST: AtomicUsize = AtomicUsize::new(0);
        let mut all = JoinSet::new();
        for number in 0..32 {
            all.spawn(aside(move || {
                MOST.fetch_max(WORKING.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(5));
                WORKING.fetch_sub(1, Ordering::SeqCst);
                number
            }));
        }
        let done: usize = all.join_all().await.into_iter().sum();
        assert_eq!(done, (0..32).sum::<usize>());
        let half = (available_parallelism().map_or(1, usize::from) / 2).max(1);
        assert!((1..=half).contains(&MOST.load(Ordering::SeqCst)), "{MOST:?}");
    }
}
