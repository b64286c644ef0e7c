//! Asks before a command that keeps machines from starting.

use std::io::{IsTerminal, Write};

use crate::sys::failure::Failure;

/// Whether somebody can be asked: there is a terminal.
pub(super) fn can_ask() -> bool {
    std::io::stdin().is_terminal()
}

/// Asks at a terminal whether to go on. Without a terminal nobody can be asked, and a script means what it says.
///
/// # Errors
/// The answer is no.
pub(super) fn at_terminal(what: &str, yes: bool) -> Result<(), Failure> {
    if yes || !can_ask() {
        return Ok(());
    }
    if agreed(&format!("This will {what}. Go on?"))? { Ok(()) } else { Err("nothing was changed".into()) }
}

/// Asks a question. Only y and yes are agreement.
///
/// # Errors
/// Terminal errors.
pub(super) fn agreed(question: &str) -> Result<bool, Failure> {
    let mut out = std::io::stderr();
    write!(out, "{question} [y/N] ")?;
    out.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
