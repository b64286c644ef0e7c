//! `claviger keys …`: the key-protection certificates and their keys.

use std::path::{Path, PathBuf};

use claviger_client::files::{self, Existing};
use claviger_protocol::certificate::Certificate;
use data_encoding::BASE64;
use serde_json::Value;
use zeroize::Zeroizing;

use super::table::{table, text};
use super::target::{Target, ask, labels, print, warn};
use super::{confirm, pfx, progress, secret};
use crate::admin::{Command, Secret};
use crate::registry::keys::EXPIRES_SOON;
use crate::store::{Kind, Labels};
use crate::sys::clock::unix_now;
use crate::sys::failure::Failure;
use crate::sys::print::{note, say};

/// Largest certificate or PFX file, in bytes: the space in an administrator's request.
const LARGEST: usize = 256 * 1024;

/// The kinds of certificates on the command line.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum GivenKind {
    /// Signs protectors and the metadata document
    Signing,
    /// Decrypts the transport keys of protectors
    Encryption,
}

impl From<GivenKind> for Kind {
    fn from(kind: GivenKind) -> Self {
        match kind {
            GivenKind::Signing => Self::Signing,
            GivenKind::Encryption => Self::Encryption,
        }
    }
}

/// Selects one of the service's certificates.
#[derive(Clone, Debug, clap::Args)]
pub struct Chosen {
    /// SHA-256 thumbprint of the certificate, as claviger keys list shows it, or at least its first 8 digits
    #[arg(value_name = "THUMBPRINT")]
    certificate: String,
    /// Kind of the certificate, if the service has it for both kinds
    #[arg(long)]
    kind: Option<GivenKind>,
    /// The daemon to contact.
    #[command(flatten)]
    target: Target,
}

/// `claviger keys …`
#[derive(Debug, clap::Subcommand)]
pub enum Keys {
    /// Show the key-protection certificates
    #[command(after_help = "Example: claviger keys list\n\
        RELEASES are those of the last 30 days that used the certificate's key.\n\
        claviger keys list --hsm shows the private keys on the tokens instead, also those that nothing needs.")]
    List {
        /// Show the private keys on the tokens, and what needs each of them
        #[arg(long)]
        hsm: bool,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Generate an RSA key pair inside an HSM; the private key never leaves it
    #[command(after_help = "Example: claviger keys generate --kind signing\n\
        A service needs two keys, one of each kind. Where there are several members, the vendor has to replicate the key:\n\
        the daemon waits until all members show it, and says so if they do not. --member makes it on that one only.\n\
        What was made is named by its id (CKA_ID) until it has a certificate.")]
    Generate {
        /// Purpose of the key's certificates
        #[arg(long)]
        kind: GivenKind,
        /// Bits of the key: 2048, 3072 or 4096
        #[arg(long, value_name = "N", default_value_t = 3072)]
        bits: u32,
        /// The key's name on the token (CKA_LABEL)
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// Generate the key on this member, even if the other members never get it
        #[arg(long, value_name = "NAME")]
        member: Option<String>,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Write a certificate request (PKCS#10) for a key; the HSM signs it with the key
    #[command(
        after_help = "Example: claviger keys csr --hsm-key 5f1c… --subject 'CN=HGS signing,O=Acme' --out signing.csr\n\
        It asks for the key usages digitalSignature and dataEncipherment and the extended key usage serverAuth."
    )]
    Csr {
        /// Id of the key, as claviger keys generate printed it
        #[arg(long, value_name = "ID")]
        hsm_key: String,
        /// Common name in the request, or a whole name: CN=…,OU=…,O=…,L=…,ST=…,C=…
        #[arg(long, value_name = "NAME")]
        subject: String,
        /// A DNS name for the subjectAltName of the request; may be repeated
        #[arg(long = "dns", value_name = "NAME")]
        dns_names: Vec<String>,
        /// File to write; default: standard output
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Write a self-signed certificate of a key; for laboratories
    #[command(
        after_help = "Example: claviger keys self-sign --hsm-key 5f1c… --subject 'lab signing' --out signing.pem\n\
        Nobody but the key itself vouches for it: tenants can only pin its thumbprint."
    )]
    SelfSign {
        /// Id of the key, as claviger keys generate printed it
        #[arg(long, value_name = "ID")]
        hsm_key: String,
        /// Common name of the certificate, or a whole name: CN=…,OU=…,O=…,L=…,ST=…,C=…
        #[arg(long, value_name = "NAME")]
        subject: String,
        /// Validity in days
        #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        days: u32,
        /// File to write; default: standard output
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Add a certificate whose key is in the HSMs, or a PFX file with its key
    #[command(after_help = "Example: claviger keys add --kind signing --certificate signing.pem\n\
        The key has to be on every member. A PFX's key is brought onto all of them and cannot be taken out again; the file's\n\
        password is asked for. Without --primary the certificate serves the protectors that name it, and no new ones do.")]
    Add {
        /// Purpose of the certificate
        #[arg(long)]
        kind: GivenKind,
        /// The certificate: PEM, DER or .p7b
        #[arg(long, value_name = "FILE", required_unless_present = "pfx")]
        certificate: Option<PathBuf>,
        /// Id of the certificate's key in the HSMs; default: search for the key
        #[arg(long, value_name = "ID", conflicts_with = "pfx")]
        hsm_key: Option<String>,
        /// A PKCS#12 file with the certificate and its private key
        #[arg(long, value_name = "FILE", conflicts_with = "certificate")]
        pfx: Option<PathBuf>,
        /// File with the password of the PFX; default: prompt
        #[arg(long, value_name = "FILE", requires = "pfx")]
        password_file: Option<PathBuf>,
        /// Make it the primary certificate of its kind immediately
        #[arg(long)]
        primary: bool,
        /// Assume that members which do not answer now have the key
        #[arg(long)]
        trust_absent: bool,
        /// Restrict the key to hosts with this label from its first moment on; may be repeated
        #[arg(long = "label", value_name = "LABEL")]
        labels: Vec<String>,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Use a certificate for new protectors; the previous one still serves existing protectors
    #[command(after_help = "Example: claviger keys set-primary 5f1c2d3e")]
    SetPrimary(Chosen),
    /// Select the signing certificate that signs the metadata document
    #[command(after_help = "Example: claviger keys set-communications 5f1c2d3e")]
    SetCommunications {
        /// SHA-256 thumbprint, or at least its first 8 digits
        #[arg(value_name = "THUMBPRINT", required_unless_present = "default")]
        certificate: Option<String>,
        /// Use whichever signing certificate is primary
        #[arg(long, conflicts_with = "certificate")]
        default: bool,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Serve protectors with this certificate again
    #[command(after_help = "Example: claviger keys enable 5f1c2d3e")]
    Enable(Chosen),
    /// Stop serving protectors with this certificate, effective immediately
    #[command(after_help = "Example: claviger keys disable 5f1c2d3e\n\
        At a terminal it asks first, because machines whose protectors name the certificate do not start any more.")]
    Disable {
        /// The certificate.
        #[command(flatten)]
        chosen: Chosen,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Remove a certificate; its key stays in the HSMs
    #[command(after_help = "Example: claviger keys remove 5f1c2d3e\n\
        One whose key releases used in the last 30 days goes only with --force.")]
    Remove {
        /// The certificate.
        #[command(flatten)]
        chosen: Chosen,
        /// Remove it even if releases used its key recently
        #[arg(long)]
        force: bool,
    },
    /// Destroy a key on the tokens that no certificate and no attestation signer needs
    #[command(after_help = "Example: claviger keys destroy 5f1c2d3e…\n\
        claviger keys list --hsm shows the keys and what needs them. It cannot be undone.")]
    Destroy {
        /// Id of the key (CKA_ID), as claviger keys list --hsm shows it
        #[arg(value_name = "ID")]
        hsm_key: String,
        /// Destroy it on this member only
        #[arg(long, value_name = "NAME")]
        member: Option<String>,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Restrict the releases of a certificate's key to hosts with certain labels
    #[command(after_help = "Example: claviger keys limit 5f1c2d3e --label tenant=acme\n\
        A host needs all of the labels. The limit belongs to the key, and holds for all certificates of it.")]
    Limit {
        /// The certificate.
        #[command(flatten)]
        chosen: Chosen,
        /// A label that hosts must have; may be repeated
        #[arg(long = "label", value_name = "LABEL", required_unless_present = "none")]
        labels: Vec<String>,
        /// Remove the restriction
        #[arg(long, conflicts_with = "labels")]
        none: bool,
    },
}

/// Runs `claviger keys …`.
///
/// # Errors
/// The problem and its remedy.
pub async fn keys(command: Keys) -> Result<(), Failure> {
    match command {
        Keys::List { hsm: true, target } => list_on_tokens(&target).await,
        Keys::List { hsm: false, target } => list(&target).await,
        Keys::Generate { kind, bits, name, member, target } => {
            let command = Command::GenerateKey { kind: kind.into(), bits, name, member };
            let reply = progress::during("the HSM searches for primes", ask(&target, &command)).await?;
            print(&target, &reply, || {
                say!("made the {} key {} on {}", text(&reply, "kind"), text(&reply, "hsm_key"), text(&reply, "member"));
            });
            if reply["lacking"].as_array().is_some_and(|lacking| !lacking.is_empty()) {
                note(&format!(
                    "warning: {} do not have it; no certificate of it is accepted until the vendor's tools have replicated it",
                    text(&reply, "lacking")
                ));
            }
            Ok(())
        }
        Keys::Csr { hsm_key, subject, dns_names, out, target } => {
            let reply = ask(&target, &Command::RequestCertificate { hsm_key, subject, dns_names }).await?;
            write(&target, &reply, out.as_deref())
        }
        Keys::SelfSign { hsm_key, subject, days, out, target } => {
            let reply = ask(&target, &Command::SelfSign { hsm_key, subject, days }).await?;
            note("warning: this certificate is self-signed: nobody vouches for it, it is for laboratories");
            write(&target, &reply, out.as_deref())
        }
        Keys::Add { kind, certificate, hsm_key, pfx, password_file, primary, trust_absent, labels: given, target } => {
            let labels = if given.is_empty() { None } else { Some(labels(given)?) };
            let (certificate, private_key) = match (certificate, pfx) {
                (Some(file), _) => (files::read_certificate(&file)?, None),
                (None, Some(file)) => {
                    let (certificate, key) = read_pfx(&file, password_file.as_deref())?;
                    (certificate, Some(key))
                }
                (None, None) => return Err("say which certificate: --certificate FILE or --pfx FILE".into()),
            };
            let command = Command::AddKey {
                kind: kind.into(),
                certificate: BASE64.encode(certificate.der()),
                hsm_key,
                private_key,
                primary,
                trust_absent,
                labels,
            };
            done(&target, &command, "added").await
        }
        Keys::SetPrimary(Chosen { certificate, kind, target }) => {
            let command = Command::SetPrimary { certificate, kind: kind.map(Into::into) };
            done(&target, &command, "primary now:").await
        }
        Keys::SetCommunications { certificate, default: _, target } => {
            let reply = ask(&target, &Command::SetCommunications { certificate }).await?;
            print(&target, &reply, || match reply["thumbprint"].as_str() {
                Some(thumbprint) => say!("the metadata is signed by {thumbprint}"),
                None => say!("the metadata is signed by the primary signing certificate"),
            });
            Ok(())
        }
        Keys::Enable(Chosen { certificate, kind, target }) => {
            let command = Command::EnableKey { certificate, kind: kind.map(Into::into), enabled: true };
            done(&target, &command, "enabled").await
        }
        Keys::Disable { chosen: Chosen { certificate, kind, target }, yes } => {
            confirm::at_terminal(&format!("disable {certificate}: machines that need it get no keys any more"), yes)?;
            let command = Command::EnableKey { certificate, kind: kind.map(Into::into), enabled: false };
            done(&target, &command, "disabled").await
        }
        Keys::Remove { chosen: Chosen { certificate, kind, target }, force } => {
            let command = Command::RemoveKey { certificate, kind: kind.map(Into::into), force };
            done(&target, &command, "removed").await
        }
        Keys::Destroy { hsm_key, member, yes, target } => {
            confirm::at_terminal(&format!("destroy the key {hsm_key} for ever"), yes)?;
            let reply = ask(&target, &Command::DestroyKey { hsm_key, member }).await?;
            print(&target, &reply, || {
                say!("destroyed the key {} on {}", text(&reply, "hsm_key"), text(&reply, "members"))
            });
            Ok(())
        }
        Keys::Limit { chosen: Chosen { certificate, kind, target }, labels: given, none } => {
            let labels = if none { Labels::default() } else { labels(given)? };
            let kind = kind.map(Into::into);
            let reply = ask(&target, &Command::LimitKey { certificate, kind, labels }).await?;
            print(&target, &reply, || {
                let hosts = if reply["labels"].as_array().is_none_or(Vec::is_empty) {
                    "every host".to_owned()
                } else {
                    format!("hosts with {}", text(&reply, "labels"))
                };
                say!("what {} opens is released to {hosts}", text(&reply, "thumbprint"));
            });
            Ok(())
        }
    }
}

async fn list_on_tokens(target: &Target) -> Result<(), Failure> {
    let reply = ask(target, &Command::ListTokenKeys).await?;
    warn(&reply);
    print(target, &reply["keys"], || {
        let columns = [
            ("HSM KEY (CKA_ID)", "hsm_key"),
            ("NAME", "name"),
            ("BITS", "bits"),
            ("USAGE", "usage"),
            ("ON", "members"),
            ("NEEDED BY", "needed_by"),
        ];
        table(&reply["keys"], &columns);
    });
    Ok(())
}

async fn list(target: &Target) -> Result<(), Failure> {
    let reply = ask(target, &Command::ListKeys).await?;
    print(target, &reply, || {
        let columns = [
            ("KIND", "kind"),
            ("PRIMARY", "primary"),
            ("ENABLED", "enabled"),
            ("METADATA", "communications"),
            ("BITS", "bits"),
            ("EXPIRES", "not_after"),
            ("RELEASES", "releases"),
            ("ONLY HOSTS WITH", "labels"),
            ("SUBJECT", "subject"),
            ("THUMBPRINT (SHA-256)", "thumbprint"),
        ];
        table(&reply, &columns);
    });
    let rows = || reply.as_array().into_iter().flatten();
    if let Some(row) = rows().find(|row| row["counted_since"].is_i64()) {
        let since = text(row, "counted_since");
        note(&format!("warning: releases of older keys are counted since {since} only; what was before is not known"));
    }
    for row in rows() {
        let ends = row["not_after"].as_i64().unwrap_or(i64::MAX);
        let what = match ends.saturating_sub(unix_now()) {
            ..0 => "has expired; it serves all the same",
            0..EXPIRES_SOON => "expires soon",
            EXPIRES_SOON.. => continue,
        };
        note(&format!("warning: the {} certificate {} {what}", text(row, "kind"), text(row, "thumbprint")));
    }
    Ok(())
}

/// Sends a command and prints which certificate it changed.
async fn done(target: &Target, command: &Command, what: &str) -> Result<(), Failure> {
    let reply = ask(target, command).await?;
    warn(&reply);
    print(target, &reply, || {
        say!("{what} {} certificate {}", text(&reply, "kind"), text(&reply, "thumbprint"));
    });
    Ok(())
}

/// Writes the PEM of a reply to the chosen output.
fn write(target: &Target, reply: &Value, out: Option<&Path>) -> Result<(), Failure> {
    let pem = text(reply, "pem");
    match out {
        Some(file) => {
            files::write(file, pem.as_bytes(), Existing::Keep)?;
            print(target, reply, || say!("{}", file.display()));
        }
        None => print(target, reply, || say!("{}", pem.trim_end())),
    }
    Ok(())
}

fn read_pfx(file: &Path, password_file: Option<&Path>) -> Result<(Certificate, Secret), Failure> {
    let octets = files::read(file, LARGEST)?;
    let prompt = format!("Password of {}", file.display());
    let password = secret::password(&prompt, "--password-file", password_file, false)?;
    let (key, certificate) = pfx::open(&octets, &password).map_err(|e| format!("{}: {e}", file.display()))?;
    Ok((certificate, Secret::new(Zeroizing::new(BASE64.encode(key.to_pkcs8_der())))))
}
