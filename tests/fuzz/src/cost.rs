//! Bounds on what one input may cost.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::ALLOCATOR;

/// Processor time that any input may take. Fuzzing is slow code on a busy machine, so this is generous: what grows with
/// the square of the input still exceeds it, since the mutator repeats parts of inputs up to the largest size.
const TIME: Duration = Duration::from_secs(2);
/// Times that a slow input is tried before it counts as slow. Processor time is not exact on a shared machine.
const TRIES: u32 = 3;

/// How much memory reading an input may take at any moment, beside the input itself.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// Bytes for any input.
    pub base: usize,
    /// Bytes for each byte of the input.
    pub per_byte: usize,
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
        if taken <= TIME {
            return;
        }
        taken = taken.min(processor_time(target, input));
    }
    assert!(taken <= TIME, "{} bytes of input took {taken:?} of processor time", input.len());
}

fn processor_time(target: fn(&[u8]), input: &[u8]) -> Duration {
    let now = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default();
    let begun = now();
    target(input);
    now().saturating_sub(begun)
}
