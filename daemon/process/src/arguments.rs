//! The command line.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;

use crate::output;

/// Parses the command line. Unlike clap's own `parse`, it does not end with status 0 when the text of `--help` or `--version`
/// could not be written.
///
/// # Errors
/// The status to exit with: the text has been printed.
pub fn parse<A: Parser>() -> Result<A, ExitCode> {
    A::try_parse().map_err(|error| {
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
