//! `claviger signers …`: the attestation signers.

use serde_json::Value;

use super::table::{table, text};
use super::target::{Target, ask, print, warn};
use crate::admin::Command;
use crate::sys::failure::Failure;
use crate::sys::print::say;

/// `claviger signers …`
#[derive(Debug, clap::Subcommand)]
pub enum Signers {
    /// Show the signer that issues health certificates, those before it that are still trusted, and those revoked
    #[command(after_help = "Example: claviger signers list --config /etc/claviger/claviger.toml\n\
        TRUSTED UNTIL is when the last health certificate of a replaced signer expires.")]
    List {
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
    /// Make a new signer now; health certificates of the one before stay good until they expire
    #[command(after_help = "Example: claviger signers rotate --config /etc/claviger/claviger.toml\n\
        The daemon does this by itself, 30 days before a signer ends.")]
    Rotate {
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
    /// Refuse, from this moment, every health certificate that a signer issued
    #[command(after_help = "Example: claviger signers revoke 3f9ab2c1 --config /etc/claviger/claviger.toml\n\
        When it is the one that issues, a new one is made first. Hosts attest again by themselves at their next release.\n\
        It cannot be undone: an import does not bring a revoked signer back, either.")]
    Revoke {
        /// Thumbprint of the signer's certificate, or at least its first 8 digits
        thumbprint: String,
        /// Also when no new signer can be made: no host can attest until one is
        #[arg(long)]
        force: bool,
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
}

/// Runs `claviger signers …`.
///
/// # Errors
/// What is wrong, and what to do.
pub async fn signers(command: Signers) -> Result<(), Failure> {
    match command {
        Signers::List { target } => {
            let reply = ask(&target, &Command::ListSigners).await?;
            print(&target, &reply, || {
                let columns = [
                    ("STATE", "state"),
                    ("NOT AFTER", "not_after"),
                    ("REPLACED", "replaced"),
                    ("TRUSTED UNTIL", "trusted_until"),
                    ("REVOKED", "revoked"),
                    ("HSM KEY", "hsm_key"),
                    ("THUMBPRINT", "thumbprint"),
                ];
                table(&reply, &columns);
            });
        }
        Signers::Rotate { target } => {
            let reply = ask(&target, &Command::RotateSigner).await?;
            print(&target, &reply, || {
                say!("the attestation signer {} issues health certificates from now on", text(&reply, "current"));
                if let Value::String(replaced) = &reply["replaced"] {
                    say!("those of {replaced} stay good until they expire, eight hours at most");
                }
            });
        }
        Signers::Revoke { thumbprint, force, target } => {
            let reply = ask(&target, &Command::RevokeSigner { certificate: thumbprint, force }).await?;
            warn(&reply);
            print(&target, &reply, || {
                for revoked in reply["revoked"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                    say!("revoked: health certificates of the attestation signer {revoked} are refused");
                }
                match (&reply["current"], reply["made"].as_bool()) {
                    (Value::String(current), Some(true)) => say!("a new one, {current}, issues from now on"),
                    (Value::String(current), _) => say!("{current} issues, as before"),
                    _ => say!("none issues now; the daemon makes one as soon as an HSM can"),
                }
            });
        }
    }
    Ok(())
}
