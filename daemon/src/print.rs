//! Printing for people. A reader that went away (`claviger hosts list | head`) is no reason to panic.

use std::io::Write;

/// Writes a line to the standard output.
pub fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// Writes a line to the standard error: what is not part of an answer.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// `println!` that does not panic.
macro_rules! say {
    ($($arguments:tt)*) => { $crate::print::line(&format!($($arguments)*)) };
}
pub(crate) use say;
