//! Processor time.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// What the calling thread has had of the processors so far (CLOCK_THREAD_CPUTIME_ID, clock_gettime(2)).
pub(crate) fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // Neither part is ever negative.
    Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
}
