//! Measures the cost of the daemon beyond its tokens.
//!
//! [`ceiling`] compares the daemon with the raw token in alternating rounds of one run: [`raw`] is a bare PKCS#11 loop,
//! [`service`] is the daemon under a closed loop of callers. The criterion benches in `benches/` measure the parts of a
//! release. `docs/bench.md` explains the figures.
#![forbid(unsafe_code)]
// A measurement with an error is useless, so it panics at once.
#![allow(clippy::unwrap_used)]

pub mod ceiling;
pub mod cpu;
pub mod histogram;
pub mod idle;
pub mod instructions;
pub mod machine;
pub mod owners;
pub mod parts;
pub mod public_op;
pub mod raw;
pub mod report;
pub mod scaling;
pub mod service;
pub mod stock;
pub mod storm;
pub mod targets;
