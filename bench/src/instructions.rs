//! How many instructions a release takes.
//!
//! Times on a shared machine vary by half; counts of instructions do not vary by a per mille. `bench/instructions` runs each part
//! of a release, and whole ones, under valgrind (by gungraun), with inputs that are always the same. [`counts`] reads what was
//! counted, and [`baseline`] judges it by what was accepted the last time, `bench/instructions/baseline.json`.

pub mod baseline;
pub mod counts;
