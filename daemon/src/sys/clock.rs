//! The time of day, read in the same way in all crates.

pub use claviger_process::clock::{since_1970, unix, unix_now};
