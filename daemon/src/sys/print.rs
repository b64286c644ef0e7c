//! Printing for people, see [`claviger_process::output`]. Write errors are reported when the command ends.

pub use claviger_process::output::{line, note};

/// `println!` that does not panic.
macro_rules! say {
    ($($arguments:tt)*) => { $crate::sys::print::line(&format!($($arguments)*)) };
}
pub(crate) use say;
