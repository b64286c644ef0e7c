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
    /// Show the signer that issues health certificates, previous signers that are still trusted, and revoked signers
    #[command(after_help = "Example: claviger signers list\n\
        TRUSTED UNTIL is when the last health certificate of a replaced signer expires.")]
    List {
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Create a new signer now; certificates from the previous signer stay valid until they expire
    #[command(after_help = "Example: claviger signers rotate\n\
        The daemon does this by itself, 30 days before a signer ends.")]
    Rotate {
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Reject all health certificates of a signer, effective immediately
    #[command(after_help = "Example: claviger signers revoke 3f9ab2c1\n\
        When it is the one that issues, a new one is made first. Hosts attest again by themselves at their next release.\n\
        It cannot be undone: an import does not bring a revoked signer back, either.")]
    Revoke {
        /// Thumbprint of the signer's certificate, or at least its first 8 digits
        thumbprint: String,
        /// Revoke it even if no new signer can be created: then no host can attest until one is
        #[arg(long)]
        force: bool,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
}

/// Runs `claviger signers …`.
///
/// # Errors
/// The problem and its remedy.
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
