//! The command line: what is asked of a running daemon, and how the answers look. [`guardian`] and [`protector`] are the
//! tenant's commands, which ask nobody and work on files.

mod files;
pub mod guardian;
mod own_guardian;
pub mod protector;
mod tree;
pub mod trust;

pub mod host;

use std::path::{Path, PathBuf};

use claviger_protocol::rsa_key::RsaPublicKey;
use data_encoding::BASE64;
use serde_json::Value;

use crate::admin;
use crate::commands::Command;
use crate::config::Config;
use crate::print::say;

/// Where the running daemon is.
#[derive(Clone, Debug, clap::Args)]
pub struct Target {
    /// The configuration file of the running daemon
    #[arg(long, value_name = "FILE", required_unless_present = "socket")]
    pub config: Option<PathBuf>,
    /// The daemon's admin socket, instead of --config
    #[arg(long, value_name = "PATH", conflicts_with = "config")]
    pub socket: Option<PathBuf>,
    /// Print JSON for machines
    #[arg(long)]
    pub json: bool,
}

/// `claviger hosts …`
#[derive(Debug, clap::Subcommand)]
pub enum Hosts {
    /// Register a host by its public key
    #[command(
        after_help = "Example: claviger hosts add node-17 --public-key node-17.pub.pem --config /etc/claviger/claviger.toml"
    )]
    Add {
        /// Name of the host: 1 to 64 letters, digits, '.', '-' or '_'
        name: String,
        /// Its RSA public key: SubjectPublicKeyInfo or X.509 certificate (DER or PEM), or BCRYPT_RSAPUBLIC_BLOB
        #[arg(long, value_name = "FILE")]
        public_key: PathBuf,
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
    /// Show the registered hosts
    #[command(after_help = "Example: claviger hosts list --config /etc/claviger/claviger.toml")]
    List {
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
    /// Remove a host; it gets no keys from this moment
    #[command(after_help = "Example: claviger hosts remove node-17 --config /etc/claviger/claviger.toml")]
    Remove {
        /// Name of the host
        name: String,
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
}

/// `claviger keys …`
#[derive(Debug, clap::Subcommand)]
pub enum Keys {
    /// Show the key-protection certificates
    #[command(after_help = "Example: claviger keys list --config /etc/claviger/claviger.toml")]
    List {
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
}

/// `claviger hsm …`
#[derive(Debug, clap::Subcommand)]
pub enum Hsm {
    /// Show the members of the cluster: state, latency, sessions, last error
    #[command(after_help = "Example: claviger hsm list --config /etc/claviger/claviger.toml\n\
        SESSIONS are busy/open/wanted, and +N that hang. docs/cluster.md explains the states.")]
    List {
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
    /// Let a member finish what it has, and give it nothing new
    #[command(after_help = "Example: claviger hsm drain hsm-a --config /etc/claviger/claviger.toml\n\
        It is drained when `claviger hsm list` says so. It stays drained until it is resumed or the daemon restarts.")]
    Drain {
        /// The member's name
        name: String,
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
    /// Take a drained member back into service
    #[command(after_help = "Example: claviger hsm resume hsm-a --config /etc/claviger/claviger.toml")]
    Resume {
        /// The member's name
        name: String,
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
    /// Have a member decrypt and sign something whose right result is known, whatever its state
    #[command(after_help = "Example: claviger hsm probe hsm-a --config /etc/claviger/claviger.toml")]
    Probe {
        /// The member's name
        name: String,
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
}

/// Why a command failed.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs `claviger hosts …`.
///
/// # Errors
/// What is wrong, and what to do.
pub async fn hosts(command: Hosts) -> Result<(), Failure> {
    match command {
        Hosts::Add { name, public_key, target } => {
            let file = std::fs::read(&public_key).map_err(|e| format!("{}: {e}", public_key.display()))?;
            // Judged here as well, so that the complaint names the file.
            RsaPublicKey::from_file(&file).map_err(|e| format!("{}: {e}", public_key.display()))?;
            let reply = ask(&target, &Command::AddHost { name, public_key: BASE64.encode(&file) }).await?;
            print(&target, &reply, || say!("added host {} with key {}", text(&reply, "name"), text(&reply, "key")));
        }
        Hosts::List { target } => {
            let reply = ask(&target, &Command::ListHosts).await?;
            print(&target, &reply, || {
                table(
                    &reply,
                    &[("NAME", "name"), ("ENABLED", "enabled"), ("ADDED", "added"), ("KEY (SHA-256)", "key")],
                );
            });
        }
        Hosts::Remove { name, target } => {
            let reply = ask(&target, &Command::RemoveHost { name }).await?;
            print(&target, &reply, || say!("removed host {}", text(&reply, "name")));
        }
    }
    Ok(())
}

/// Runs `claviger keys …`.
///
/// # Errors
/// What is wrong, and what to do.
pub async fn keys(command: Keys) -> Result<(), Failure> {
    let Keys::List { target } = command;
    let reply = ask(&target, &Command::ListKeys).await?;
    print(&target, &reply, || {
        let columns = [
            ("KIND", "kind"),
            ("PRIMARY", "primary"),
            ("ENABLED", "enabled"),
            ("BITS", "bits"),
            ("EXPIRES", "not_after"),
            ("SUBJECT", "subject"),
            ("THUMBPRINT (SHA-256)", "thumbprint"),
        ];
        table(&reply, &columns);
    });
    Ok(())
}

/// Runs `claviger hsm …`.
///
/// # Errors
/// What is wrong, and what to do.
pub async fn hsm(command: Hsm) -> Result<(), Failure> {
    match command {
        Hsm::List { target } => {
            let reply = ask(&target, &Command::ListHsms).await?;
            print(&target, &reply, || {
                let rows = reply.as_array().map(Vec::as_slice).unwrap_or_default();
                let columns = [
                    ("NAME", "name"),
                    ("STATE", "state"),
                    ("SINCE", "since"),
                    ("TIER", "priority"),
                    ("WEIGHT", "weight"),
                    ("LATENCY", "latency"),
                    ("IN FLIGHT", "in_flight"),
                    ("SESSIONS", "sessions"),
                    ("CLOSED", "closings"),
                    ("LAST ERROR", "last_error"),
                ];
                table(&rows.iter().map(for_people).collect(), &columns);
            });
        }
        Hsm::Drain { name, target } => {
            let reply = ask(&target, &Command::DrainHsm { name }).await?;
            print(&target, &reply, || {
                say!("{} is {}, {} calls in flight", text(&reply, "name"), text(&reply, "state"), reply["in_flight"]);
            });
        }
        Hsm::Resume { name, target } => {
            let reply = ask(&target, &Command::ResumeHsm { name }).await?;
            print(&target, &reply, || say!("{} is {}", text(&reply, "name"), text(&reply, "state")));
        }
        Hsm::Probe { name, target } => {
            let reply = ask(&target, &Command::ProbeHsm { name }).await?;
            print(&target, &reply, || {
                let milliseconds = reply["seconds"].as_f64().unwrap_or_default() * 1e3;
                say!("{} decrypts and signs: {milliseconds:.1} ms", text(&reply, "name"));
            });
        }
    }
    Ok(())
}

/// A member as a row of a table.
fn for_people(member: &Value) -> Value {
    let mut row = member.clone();
    let sessions = &member["sessions"];
    let stuck = sessions["stuck"].as_u64().unwrap_or_default();
    let stuck = if stuck > 0 { format!(" +{stuck}") } else { String::new() };
    row["sessions"] = format!("{}/{}/{}{stuck}", sessions["busy"], sessions["open"], sessions["wanted"]).into();
    row["latency"] = format!("{:.1} ms", member["latency_seconds"].as_f64().unwrap_or_default() * 1e3).into();
    if let (Value::String(error), Some(at)) = (&member["last_error"], member["last_error_at"].as_i64()) {
        row["last_error"] = format!("{} {error}", date(at)).into();
    }
    row
}

async fn ask(target: &Target, command: &Command) -> Result<Value, Failure> {
    let socket = match (&target.socket, &target.config) {
        (Some(socket), _) => socket.clone(),
        (None, Some(config)) => Config::load(config)?.server.admin_socket(),
        (None, None) => return Err("say which daemon: --config FILE or --socket PATH".into()),
    };
    Ok(admin::call(Path::new(&socket), &serde_json::to_value(command)?).await?)
}

fn print(target: &Target, reply: &Value, for_people: impl FnOnce()) {
    if target.json { say!("{reply:#}") } else { for_people() }
}

/// A field as text: times as dates, booleans as words.
fn text(row: &Value, field: &str) -> String {
    match (field, &row[field]) {
        ("added" | "not_after" | "since", Value::Number(seconds)) => date(seconds.as_i64().unwrap_or_default()),
        (_, Value::String(text)) => text.clone(),
        (_, Value::Bool(yes)) => if *yes { "yes" } else { "no" }.to_owned(),
        (_, Value::Null) => "-".to_owned(),
        (_, other) => other.to_string(),
    }
}

fn date(seconds: i64) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]Z");
    let at = time::OffsetDateTime::from_unix_timestamp(seconds).ok();
    at.and_then(|at| at.format(format).ok()).unwrap_or_else(|| seconds.to_string())
}

/// Prints rows in columns as wide as their longest text.
fn table(rows: &Value, columns: &[(&str, &str)]) {
    let rows = rows.as_array().map(Vec::as_slice).unwrap_or_default();
    let mut lines = vec![columns.iter().map(|(title, _)| (*title).to_owned()).collect::<Vec<_>>()];
    lines.extend(rows.iter().map(|row| columns.iter().map(|(_, field)| text(row, field)).collect()));
    let widths: Vec<usize> =
        (0..columns.len()).map(|at| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0)).collect();
    for line in lines {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        say!("{}", cells.join("  ").trim_end());
    }
}
