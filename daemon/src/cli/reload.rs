//! `claviger reload`: has the running daemon read its configuration again.

use super::target::{Target, ask, print};
use crate::admin::Command;
use crate::sys::failure::Failure;
use crate::sys::print::say;

/// `claviger reload`
#[derive(Debug, clap::Args)]
pub struct Reload {
    /// The daemon to contact.
    #[command(flatten)]
    target: Target,
}

/// Runs `claviger reload`.
///
/// # Errors
/// Why the daemon goes on with its old configuration.
pub async fn reload(command: Reload) -> Result<(), Failure> {
    let target = command.target;
    let reply = ask(&target, &Command::Reload).await?;
    print(&target, &reply, || {
        say!("configuration reloaded");
        for setting in reply["needs_restart"].as_array().into_iter().flatten() {
            say!("needs a restart: {}", setting.as_str().unwrap_or_default());
        }
    });
    Ok(())
}
