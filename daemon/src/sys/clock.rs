//! The time of day, as all crates read it.

pub use claviger_process::clock::{since_1970, unix, unix_now};
