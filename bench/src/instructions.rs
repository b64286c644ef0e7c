//! The number of instructions of a release.
//!
//! Times on a shared machine vary by half; instruction counts vary by less than a per mille. `bench/instructions` runs
//! each part of a release, and complete ones, under valgrind (with gungraun), with constant inputs. [`counts`] reads
//! the counts, and [`baseline`] compares them with the accepted ones in `bench/instructions/baseline.json`.

pub mod baseline;
pub mod counts;
