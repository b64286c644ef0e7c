//! Processor time of threads.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Returns the processor time of the calling thread so far (CLOCK_THREAD_CPUTIME_ID, clock_gettime(2)).
pub(crate) fn thread_time() -> Duration {
    // The time is never negative, the only value that a `Duration` cannot hold.
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap_or_default()
}
