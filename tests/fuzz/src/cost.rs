//! Limits of the cost of one input.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::ALLOCATOR;

/// Number of runs after which a slow input counts as slow. Processor time is not exact on a shared machine.
const TRIES: u32 = 3;

/// Maximum cost of reading an input.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// Memory in use at any moment, in bytes, for any input.
    pub base: usize,
    /// Additional memory in use at any moment, in bytes, for each byte of the input.
    pub per_byte: usize,
    /// Processor time. It is generous, because fuzzing runs slow code on a busy machine. Code whose time grows with the
    /// square of the input still exceeds it, since the mutator repeats parts of inputs up to the maximum size.
    pub time: Duration,
}

/// Runs `target` on `input` and checks the cost.
///
/// # Panics
/// If the input exceeds its allowance of time or memory.
pub fn within(allowance: Allowance, input: &[u8], target: fn(&[u8])) {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let mut taken = processor_time(target, input);
    let memory = ALLOCATOR.peak_usage().saturating_sub(before);
    let allowed = allowance.base + allowance.per_byte * input.len();
    assert!(memory <= allowed, "{} bytes of input took {memory} bytes of memory; {allowed} are allowed", input.len());
    for _ in 1..TRIES {
        if taken <= allowance.time {
            return;
        }
        taken = taken.min(processor_time(target, input));
    }
    assert!(taken <= allowance.time, "{} bytes of input took {taken:?} of processor time", input.len());
}

fn processor_time(target: fn(&[u8]), input: &[u8]) -> Duration {
    let now = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default();
    let begun = now();
    target(input);
    now().saturating_sub(begun)
}
