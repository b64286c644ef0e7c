//! `claviger hosts …`: the registered hosts.

use std::path::PathBuf;

use claviger_client::files;
use claviger_protocol::attestation::tpm::endorsement_key_of;
use claviger_protocol::rsa_key::RsaPublicKey;
use data_encoding::BASE64;
use serde::Deserialize;

use super::baselines::say_checked;
use super::table::{table, text};
use super::target::{Target, ask, labels, print};
use crate::admin::{Checked, Command};
use crate::store::Labels;
use crate::sys::failure::Failure;
use crate::sys::print::say;

/// `claviger hosts …`
#[derive(Debug, clap::Subcommand)]
pub enum Hosts {
    /// Register a host by its public key, or by the endorsement key of its TPM
    #[command(
        group = clap::ArgGroup::new("key").required(true).args(["public_key", "ek_certificate", "ek_public"]),
        after_help = "Example: claviger hosts add node-17 --public-key node-17.pub.pem --config /etc/claviger/claviger.toml\n\
            In TPM mode: claviger hosts add node-18 --ek-certificate node-18.ek.pem --config /etc/claviger/claviger.toml"
    )]
    Add {
        /// Name of the host: 1 to 64 letters, digits, '.', '-' or '_'
        name: String,
        /// RSA public key of the host: SubjectPublicKeyInfo, PKCS#1 or X.509 certificate (PEM or DER), .p7b, or
        /// BCRYPT_RSAPUBLIC_BLOB
        #[arg(long, value_name = "FILE")]
        public_key: Option<PathBuf>,
        /// Certificate of the host's endorsement key, with the chain to a root in attest.vendor_roots (PEM, DER, .p7b)
        #[arg(long, value_name = "FILE")]
        ek_certificate: Option<PathBuf>,
        /// Endorsement key of the host's TPM without a certificate (PEM or DER)
        #[arg(long, value_name = "FILE", requires = "trust_ek")]
        ek_public: Option<PathBuf>,
        /// Confirm that the key of --ek-public is in a real TPM of this host
        #[arg(long, requires = "ek_public")]
        trust_ek: bool,
        /// A label, to which releases of keys can be restricted: a word, or KEY=VALUE; may be repeated
        #[arg(long = "label", value_name = "LABEL")]
        labels: Vec<String>,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Show the result of each policy for a host's last TPM evidence, and the differences from each baseline
    #[command(after_help = "Example: claviger hosts check node-18 --config /etc/claviger/claviger.toml")]
    Check {
        /// Name of the host
        name: String,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Show the registered hosts
    #[command(after_help = "Example: claviger hosts list --config /etc/claviger/claviger.toml")]
    List {
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Remove a host and reject its requests, effective immediately
    #[command(after_help = "Example: claviger hosts remove node-17 --config /etc/claviger/claviger.toml")]
    Remove {
        /// Name of the host
        name: String,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Add labels to a host
    #[command(after_help = "Example: claviger hosts label node-17 tenant=acme --config /etc/claviger/claviger.toml\n\
        A label is a word or KEY=VALUE, compared as a whole and with regard to case.")]
    Label {
        /// Name of the host
        name: String,
        /// The labels
        #[arg(required = true, value_name = "LABEL")]
        labels: Vec<String>,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Remove labels from a host
    #[command(after_help = "Example: claviger hosts unlabel node-17 tenant=acme --config /etc/claviger/claviger.toml")]
    Unlabel {
        /// Name of the host
        name: String,
        /// The labels
        #[arg(required = true, value_name = "LABEL")]
        labels: Vec<String>,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Reject attestations and releases of a host, effective immediately, and keep it registered
    #[command(after_help = "Example: claviger hosts disable node-17 --config /etc/claviger/claviger.toml")]
    Disable {
        /// Name of the host
        name: String,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Accept attestations and releases of a disabled host again
    #[command(after_help = "Example: claviger hosts enable node-17 --config /etc/claviger/claviger.toml")]
    Enable {
        /// Name of the host
        name: String,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
}

/// Runs `claviger hosts …`.
///
/// # Errors
/// The problem and its remedy.
pub async fn hosts(command: Hosts) -> Result<(), Failure> {
    match command {
        Hosts::Add { name, public_key, ek_certificate, ek_public, trust_ek: _, labels: given, target } => {
            let labels = labels(given)?;
            // Read the file here, so that the error names it; the daemon checks the key again.
            let key = |path: &PathBuf| {
                let file = files::read(path, files::MAX_PEM)?;
                RsaPublicKey::from_file(&file).map_err(files::content(path))
            };
            let command = match (&public_key, &ek_certificate, &ek_public) {
                (Some(path), ..) => Command::AddHost { name, public_key: BASE64.encode(key(path)?.spki_der()), labels },
                (_, Some(path), _) => {
                    let certificates = files::read_certificates(path)?;
                    let certificates = certificates.iter().map(|entry| BASE64.encode(&entry.der)).collect();
                    Command::AddTpmHost { name, certificates, public_key: None, labels }
                }
                (.., Some(path)) => {
                    let key = key(path)?;
                    endorsement_key_of(key.spki_der()).map_err(|e| format!("{}: {e}", path.display()))?;
                    let public_key = Some(BASE64.encode(key.spki_der()));
                    Command::AddTpmHost { name, certificates: Vec::new(), public_key, labels }
                }
                (None, None, None) => return Err("say which key the host has: --public-key FILE".into()),
            };
            let reply = ask(&target, &command).await?;
            print(&target, &reply, || say!("added host {} with key {}", text(&reply, "name"), text(&reply, "key")));
        }
        Hosts::Check { name, target } => {
            let reply = ask(&target, &Command::CheckHost { name }).await?;
            let checked = Checked::deserialize(&reply)?;
            print(&target, &reply, || say_checked(&checked, &target));
        }
        Hosts::List { target } => {
            let reply = ask(&target, &Command::ListHosts).await?;
            print(&target, &reply, || {
                let columns = [
                    ("NAME", "name"),
                    ("ENABLED", "enabled"),
                    ("ADDED", "added"),
                    ("LAST ATTESTATION", "last_attestation"),
                    ("LAST RELEASE", "last_release"),
                    ("LABELS", "labels"),
                    ("BY", "kind"),
                    ("KEY (SHA-256)", "key"),
                ];
                table(&reply, &columns);
            });
        }
        Hosts::Remove { name, target } => {
            let reply = ask(&target, &Command::RemoveHost { name }).await?;
            print(&target, &reply, || say!("removed host {}", text(&reply, "name")));
        }
        Hosts::Label { name, labels: given, target } => {
            let add = labels(given)?;
            label(&target, Command::LabelHost { name, add, remove: Labels::default() }).await?;
        }
        Hosts::Unlabel { name, labels: given, target } => {
            let remove = labels(given)?;
            label(&target, Command::LabelHost { name, add: Labels::default(), remove }).await?;
        }
        Hosts::Disable { name, target } => {
            let reply = ask(&target, &Command::EnableHost { name, enabled: false }).await?;
            print(&target, &reply, || say!("host {} is disabled", text(&reply, "name")));
        }
        Hosts::Enable { name, target } => {
            let reply = ask(&target, &Command::EnableHost { name, enabled: true }).await?;
            print(&target, &reply, || say!("host {} is enabled", text(&reply, "name")));
        }
    }
    Ok(())
}

async fn label(target: &Target, command: Command) -> Result<(), Failure> {
    let reply = ask(target, &command).await?;
    print(target, &reply, || say!("host {} has the labels {}", text(&reply, "name"), text(&reply, "labels")));
    Ok(())
}
