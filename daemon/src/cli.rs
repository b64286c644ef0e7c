//! The command line: what is asked of a running daemon, and how the answers look. [`tenant`] has the
//! tenant's commands, which ask nobody and work on files.

pub mod audit;
mod baselines;
pub mod doctor;
pub mod host;
mod hosts;
mod hsm;
mod keys;
pub mod pfx;
mod secret;
mod signers;
pub mod tenant;
pub mod transfer;

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::admin;
use crate::admin::Command;
use crate::config::Config;
use crate::registry::keys::RSA_BITS;
use crate::store::{Labels, StateError};
pub use crate::sys::failure::Failure;
use crate::sys::print::{note, say};

pub use baselines::{Baselines, baselines};
pub use hosts::{Hosts, hosts};
pub use hsm::{Hsm, hsm};
pub use keys::{Keys, keys};
pub use signers::{Signers, signers};

/// The length of an RSA key, from the command line.
///
/// # Errors
/// Those that there are.
pub fn rsa_bits(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(bits) if RSA_BITS.contains(&bits) => Ok(bits),
        _ => Err("2048, 3072 or 4096".to_owned()),
    }
}

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

async fn ask(target: &Target, command: &Command) -> Result<Value, Failure> {
    let socket = match (&target.socket, &target.config) {
        (Some(socket), _) => socket.clone(),
        (None, Some(config)) => Config::load(config)?.server.admin_socket(),
        (None, None) => return Err("say which daemon: --config FILE or --socket PATH".into()),
    };
    Ok(admin::call(Path::new(&socket), command).await?)
}

/// The labels of a command line.
fn labels(given: Vec<String>) -> Result<Labels, StateError> {
    given.try_into()
}

/// Says what an administrator should know, beside the answer itself.
fn warn(reply: &Value) {
    for warning in reply["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        note(&format!("warning: {warning}"));
    }
}

fn print(target: &Target, reply: &Value, for_people: impl FnOnce()) {
    if target.json { say!("{reply:#}") } else { for_people() }
}

/// A field as text: times as dates, booleans as words.
fn text(row: &Value, field: &str) -> String {
    match (field, &row[field]) {
        (
            "added" | "not_after" | "replaced" | "trusted_until" | "revoked" | "since" | "counted_since"
            | "last_attestation" | "last_release",
            Value::Number(seconds),
        ) => date(seconds.as_i64().unwrap_or_default()),
        (_, Value::String(text)) => text.clone(),
        (_, Value::Bool(yes)) => if *yes { "yes" } else { "no" }.to_owned(),
        (_, Value::Array(several)) if several.is_empty() => "-".to_owned(),
        (_, Value::Array(several)) => several.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
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
    // What others made, such as a certificate's subject, must not move the cursor.
    let cell = |row, field| tenant::render::plain(&text(row, field)).replace('\n', " ");
    lines.extend(rows.iter().map(|row| columns.iter().map(|(_, field)| cell(row, field)).collect()));
    let widths: Vec<usize> =
        (0..columns.len()).map(|at| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0)).collect();
    for line in lines {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        say!("{}", cells.join("  ").trim_end());
    }
}
