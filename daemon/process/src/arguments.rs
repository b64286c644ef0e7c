//! Parses the command line.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use clap::error::{ContextKind, ContextValue};

use crate::output;

/// Parses the command line. If the text of `--help` or `--version` could not be written, the status is not 0. (clap's
/// own `parse` exits with 0 then.)
///
/// # Errors
/// The exit status of the process. The text has already been printed.
pub fn parse<A: Parser>() -> Result<A, ExitCode> {
    parse_with(|_| None)
}

/// As [`parse`]. `tip` may add a tip to the error of a command that does not exist.
///
/// # Errors
/// As [`parse`].
pub fn parse_with<A: Parser>(tip: impl Fn(&str) -> Option<String>) -> Result<A, ExitCode> {
    A::try_parse().map_err(|mut error| {
        if let Some(ContextValue::String(wrong)) = error.get(ContextKind::InvalidSubcommand)
            && let Some(tip) = tip(wrong)
        {
            error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
        }
        let text = error.render();
        let styled = |terminal: bool| if terminal { text.ansi().to_string() } else { text.to_string() };
        let status = ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        if error.use_stderr() {
            output::note(styled(std::io::stderr().is_terminal()).trim_end());
            return status;
        }
        output::bytes(styled(std::io::stdout().is_terminal()).as_bytes());
        output::exit_status(A::command().get_name(), status, 1)
    })
}
