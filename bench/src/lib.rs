//! What the daemon costs beyond its tokens.
//!
//! [`ceiling`] holds the daemon against the raw token in one run, in alternating rounds: [`raw`] is a bare PKCS#11 loop,
//! [`service`] is the daemon under a closed loop of callers. The criterion benches in `benches/` time what a release is made
//! of. `docs/bench.md` says how to read the figures.
#![forbid(unsafe_code)]
// A measurement that something went wrong in is none: it ends there and then.
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
