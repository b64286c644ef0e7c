//! Bounds on what one input may cost.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::ALLOCATOR;

/// Times that a slow input is tried before it counts as slow. Processor time is not exact on a shared machine.
const TRIES: u32 = 3;

/// What reading an input may cost.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// Memory at any moment, in bytes, for any input.
    pub base: usize,
    /// Memory at any moment, in bytes, for each byte of the input.
    pub per_byte: usize,
    /// Processor time. Fuzzing runs slow code on a busy machine, so this is generous: what grows with the square of the
    /// input still exceeds it, since the mutator repeats parts of inputs up to the largest size.
    pub time: Duration,
}

/// Runs `target` on `input`.
///
/// # Panics
/// It took more time than any input may take, or more memory than its allowance.
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
