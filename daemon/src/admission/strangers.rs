//! Expensive work for unknown senders. Anyone can make the service parse a mebibyte of JSON or verify with an 8192-bit
//! key, which takes milliseconds. Such work does not block the runtime's threads, and uses at most half of the
//! processors. [`Admission::strangers_turn`](super::Admission::strangers_turn) is where its senders take turns.

use std::thread::available_parallelism;

use tokio::runtime::{Handle, RuntimeFlavor};

/// How much of such work is done at the same time.
pub(super) fn concurrency() -> usize {
    (available_parallelism().map_or(1, usize::from) / 2).max(1)
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
