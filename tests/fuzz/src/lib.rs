//! The fuzz targets, and the limits of the cost of one input.
//!
//! A target fails if the code under test panics, if a parsed value changes when it is written and parsed again, or if an
//! input takes more processor time or memory than its [`Allowance`].
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

/// Defines a fuzz target from the function of that name in [`targets`].
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
