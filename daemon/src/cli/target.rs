//! The daemon that a command contacts, and options and output that commands share.

use std::path::PathBuf;

use serde_json::Value;

use super::place;
use crate::admin::{self, Command};
use crate::registry::keys::RSA_BITS;
use crate::store::{Labels, StateError};
use crate::sys::failure::Failure;
use crate::sys::print::{note, say};

/// Parses the length of an RSA key.
///
/// # Errors
/// The text is not one of the supported lengths.
pub fn rsa_bits(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(bits) if RSA_BITS.contains(&bits) => Ok(bits),
        _ => Err("2048, 3072 or 4096".to_owned()),
    }
}

/// The daemon to contact.
#[derive(Clone, Debug, clap::Args)]
pub struct Target {
    /// The configuration file of the running daemon [default: $CLAVIGER_CONFIG, or /etc/claviger/claviger.toml]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The daemon's admin socket; comes before --config [default: $CLAVIGER_SOCKET, or /run/claviger/admin.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Print JSON for programs
    #[arg(long)]
    pub json: bool,
}

pub(super) async fn ask(target: &Target, command: &Command) -> Result<Value, Failure> {
    let socket = place::socket(target.socket.as_deref(), target.config.as_deref())?;
    Ok(admin::call(&socket, command).await?)
}

/// Parses the labels of a command line.
pub(super) fn labels(given: Vec<String>) -> Result<Labels, StateError> {
    given.try_into()
}

/// Prints the warnings in a reply.
pub(super) fn warn(reply: &Value) {
    for warning in reply["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        note(&format!("warning: {warning}"));
    }
}

pub(super) fn print(target: &Target, reply: &Value, for_people: impl FnOnce()) {
    if target.json { say!("{reply:#}") } else { for_people() }
}
