//! Processor time.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// What the calling thread has had of the processors so far (CLOCK_THREAD_CPUTIME_ID, clock_gettime(2)).
pub(crate) fn thread_time() -> Duration {
    // Never negative, which is all that a duration cannot be.
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap_or_default()
}
