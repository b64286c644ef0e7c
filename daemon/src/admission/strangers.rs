//! Work for callers that have proved nothing yet: reading a mebibyte of JSON, or verifying with a key of 8192 bits that they
//! bring, takes milliseconds, and anybody may ask for it. It leaves the threads that serve, and takes half of the processors
//! at most.

use std::sync::LazyLock;
use std::thread::available_parallelism;

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Semaphore;

static TURNS: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new((available_parallelism().map_or(1, usize::from) / 2).max(1)));

/// Does `work` when it is its turn, without keeping a thread of the runtime from other requests.
pub(crate) async fn aside<T>(work: impl FnOnce() -> T) -> T {
    // Never closed, so an error cannot come.
    let _turn = TURNS.acquire().await;
    in_place(work)
}

/// Input of more bytes than this keeps a thread busy for long. The protector of an owner and three guardians has some 13,000.
pub(crate) const LARGE: usize = 16 * 1024;

/// Does what takes long when an input of so many bytes is large, without keeping a thread of the runtime from other requests.
/// A usual protector, of a few wrappings, takes less time than it takes to make way.
pub(crate) fn apart_if_large<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    if bytes > LARGE { in_place(work) } else { work() }
}

/// Does `work` at once, without keeping a thread of the runtime from other requests where it has others.
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
