//! `claviger hosts …`: the registered hosts.

use std::path::PathBuf;

use claviger_client::files;
use claviger_protocol::attestation::tpm::endorsement_key_of;
use claviger_protocol::rsa_key::RsaPublicKey;
use data_encoding::BASE64;
use serde::Deserialize;
use serde_json::Value;

use super::baselines::say_checked;
use super::confirm;
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
        after_help = "Example: claviger hosts add node-17 --public-key node-17.pub.pem\n\
            In TPM mode: claviger hosts add node-18 --ek-certificate node-18.ek.pem"
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
        /// Succeed and change nothing if the host is registered already with this key
        #[arg(long)]
        if_absent: bool,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Show the result of each policy for a host's last TPM evidence, and the differences from each baseline
    #[command(after_help = "Example: claviger hosts check node-18")]
    Check {
        /// Name of the host
        name: String,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Show the registered hosts
    #[command(after_help = "Example: claviger hosts list --label tenant=acme")]
    List {
        /// Only hosts with this label; may be repeated, and hosts need all of them
        #[arg(long = "label", value_name = "LABEL")]
        labels: Vec<String>,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Show everything that is known of hosts
    #[command(after_help = "Example: claviger hosts show node-17")]
    Show {
        /// Names of the hosts
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Remove hosts and reject their requests, effective immediately
    #[command(after_help = "Example: claviger hosts remove node-17\n\
        At a terminal it asks first, because machines on that host do not start any more.")]
    Remove {
        /// Names of the hosts
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Add labels to a host
    #[command(after_help = "Example: claviger hosts label node-17 tenant=acme\n\
        A label is a word or KEY=VALUE, compared as a whole and with regard to case.")]
    Label {
        /// Name of the host
        name: String,
        /// The labels
        #[arg(required = true, value_name = "LABEL")]
        labels: Vec<String>,
        /// A further host; may be repeated
        #[arg(long = "host", value_name = "NAME")]
        further: Vec<String>,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Remove labels from a host
    #[command(after_help = "Example: claviger hosts unlabel node-17 tenant=acme")]
    Unlabel {
        /// Name of the host
        name: String,
        /// The labels
        #[arg(required = true, value_name = "LABEL")]
        labels: Vec<String>,
        /// A further host; may be repeated
        #[arg(long = "host", value_name = "NAME")]
        further: Vec<String>,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Reject attestations and releases of hosts, effective immediately, and keep them registered
    #[command(after_help = "Example: claviger hosts disable node-17\n\
        At a terminal it asks first, because machines on that host do not start any more.")]
    Disable {
        /// Names of the hosts
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Accept attestations and releases of disabled hosts again
    #[command(after_help = "Example: claviger hosts enable node-17")]
    Enable {
        /// Names of the hosts
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
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
        Hosts::Add { name, public_key, ek_certificate, ek_public, trust_ek: _, labels: given, if_absent, target } => {
            let labels = labels(given)?;
            // Read the file here, so that the error names it; the daemon checks the key again.
            let key = |path: &PathBuf| {
                let file = files::read(path, files::MAX_PEM)?;
                RsaPublicKey::from_file(&file).map_err(files::content(path))
            };
            let command = match (&public_key, &ek_certificate, &ek_public) {
                (Some(path), ..) => {
                    Command::AddHost { name, public_key: BASE64.encode(key(path)?.spki_der()), labels, if_absent }
                }
                (_, Some(path), _) => {
                    let certificates = files::read_certificates(path)?;
                    let certificates = certificates.iter().map(|entry| BASE64.encode(&entry.der)).collect();
                    Command::AddTpmHost { name, certificates, public_key: None, labels, if_absent }
                }
                (.., Some(path)) => {
                    let key = key(path)?;
                    endorsement_key_of(key.spki_der()).map_err(|e| format!("{}: {e}", path.display()))?;
                    let public_key = Some(BASE64.encode(key.spki_der()));
                    Command::AddTpmHost { name, certificates: Vec::new(), public_key, labels, if_absent }
                }
                (None, None, None) => return Err("say which key the host has: --public-key FILE".into()),
            };
            let reply = ask(&target, &command).await?;
            let what = if reply["was_registered"] == true { "registered already:" } else { "added" };
            print(&target, &reply, || say!("{what} host {} with key {}", text(&reply, "name"), text(&reply, "key")));
        }
        Hosts::Check { name, target } => {
            let reply = ask(&target, &Command::CheckHost { name }).await?;
            let checked = Checked::deserialize(&reply)?;
            print(&target, &reply, || say_checked(&checked, &target));
        }
        Hosts::List { labels: given, target } => {
            let wanted = labels(given)?;
            let all = ask(&target, &Command::ListHosts).await?;
            let has_all = |host: &&Value| Labels::deserialize(&host["labels"]).is_ok_and(|has| has.have_all(&wanted));
            let reply: Value = all.as_array().into_iter().flatten().filter(has_all).cloned().collect();
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
        Hosts::Show { names, target } => show(&names, &target).await?,
        Hosts::Remove { names, yes, target } => {
            let what = format!("remove {}: machines there get no keys any more", names.join(", "));
            confirm::at_terminal(&what, yes)?;
            let command = |name| Command::RemoveHost { name };
            each(&target, names, command, |reply| say!("removed host {}", text(reply, "name"))).await?;
        }
        Hosts::Label { name, labels: given, further, target } => {
            let add = labels(given)?;
            let command = |name| Command::LabelHost { name, add: add.clone(), remove: Labels::default() };
            each(&target, with(name, further), command, say_labels).await?;
        }
        Hosts::Unlabel { name, labels: given, further, target } => {
            let remove = labels(given)?;
            let command = |name| Command::LabelHost { name, add: Labels::default(), remove: remove.clone() };
            each(&target, with(name, further), command, say_labels).await?;
        }
        Hosts::Disable { names, yes, target } => {
            let what = format!("disable {}: machines there get no keys until it is enabled again", names.join(", "));
            confirm::at_terminal(&what, yes)?;
            let command = |name| Command::EnableHost { name, enabled: false };
            each(&target, names, command, |reply| say!("host {} is disabled", text(reply, "name"))).await?;
        }
        Hosts::Enable { names, target } => {
            let command = |name| Command::EnableHost { name, enabled: true };
            each(&target, names, command, |reply| say!("host {} is enabled", text(reply, "name"))).await?;
        }
    }
    Ok(())
}

fn with(name: String, further: Vec<String>) -> Vec<String> {
    std::iter::once(name).chain(further).collect()
}

fn say_labels(reply: &Value) {
    say!("host {} has the labels {}", text(reply, "name"), text(reply, "labels"));
}

/// Sends one command for each host. A host that fails does not keep the others from being changed.
async fn each(
    target: &Target,
    names: Vec<String>,
    command: impl Fn(String) -> Command,
    for_people: impl Fn(&Value),
) -> Result<(), Failure> {
    let (several, all) = (names.len() > 1, names.len());
    let mut replies = Vec::with_capacity(all);
    let mut failed = Vec::new();
    for name in names {
        match ask(target, &command(name.clone())).await {
            Ok(reply) => {
                if !target.json {
                    for_people(&reply);
                }
                replies.push(reply);
            }
            Err(error) if several => failed.push(format!("{name}: {error}")),
            Err(error) => return Err(error),
        }
    }
    if target.json {
        let reply = if several { Value::Array(replies) } else { replies.pop().unwrap_or_default() };
        say!("{reply:#}");
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(format!("{} of {all} hosts failed: {}", failed.len(), failed.join("; ")).into())
}

async fn show(names: &[String], target: &Target) -> Result<(), Failure> {
    let all = ask(target, &Command::ListHosts).await?;
    let find = |name: &String| {
        let is_it = |host: &&Value| host["name"].as_str().is_some_and(|other| other.eq_ignore_ascii_case(name));
        all.as_array().and_then(|hosts| hosts.iter().find(is_it)).cloned()
    };
    let found: Vec<(&String, Option<Value>)> = names.iter().map(|name| (name, find(name))).collect();
    let missing: Vec<_> = found.iter().filter(|(_, host)| host.is_none()).map(|(name, _)| name.as_str()).collect();
    let reply: Value = found.iter().filter_map(|(_, host)| host.clone()).collect();
    print(target, &reply, || {
        for (at, host) in reply.as_array().into_iter().flatten().enumerate() {
            if at > 0 {
                say!("");
            }
            for (title, field) in [
                ("name", "name"),
                ("enabled", "enabled"),
                ("added", "added"),
                ("last attestation", "last_attestation"),
                ("last release", "last_release"),
                ("labels", "labels"),
                ("registered by", "kind"),
                ("key (SHA-256)", "key"),
            ] {
                say!("{title:16}  {}", text(host, field));
            }
        }
    });
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!("not registered: {}; `claviger hosts list` shows all", missing.join(", ")).into())
}
