//! What each fuzz target does with one input, and what an input may cost.
//!
//! A target fails when the code under test panics, when what it read does not survive being written and read again, and
//! when an input takes more processor time or memory than its [`Allowance`].
#![forbid(unsafe_code)]

pub mod cost;
mod mutate;
pub mod targets;

pub use cost::Allowance;
pub use mutate::mutate;

#[doc(hidden)]
pub use libfuzzer_sys;

#[global_allocator]
static ALLOCATOR: peak_alloc::PeakAlloc = peak_alloc::PeakAlloc;

/// Makes a fuzz target of the function of that name in [`targets`].
#[macro_export]
macro_rules! target {
    ($name:ident) => {
        use $crate::libfuzzer_sys;
        $crate::libfuzzer_sys::fuzz_target!(|input: &[u8]| {
            $crate::cost::within($crate::targets::$name::ALLOWANCE, input, $crate::targets::$name::run);
        });
        $crate::libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
            $crate::mutate(data, size, max_size, seed, $crate::libfuzzer_sys::fuzzer_mutate)
        });
    };
}
