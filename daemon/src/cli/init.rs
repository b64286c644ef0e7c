//! `claviger init`: from a fresh installation to a service with keys. Each run does what is still missing, checks it with
//! the doctor, and says what is next.

mod answers;
mod files;
mod keys;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use claviger_process::threads;

use self::answers::{Certificates, Tokens};
use super::{doctor, place};
use crate::checks::{Finding, Level};
use crate::config::Config;
use crate::sys::failure::Failure;
use crate::sys::print::say;

/// `claviger init`
#[derive(Debug, clap::Args)]
pub struct Init {
    /// The configuration file to write [default: $CLAVIGER_CONFIG, or /etc/claviger/claviger.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The vendor's PKCS#11 library
    #[arg(long, value_name = "FILE", conflicts_with = "soft_tokens")]
    module: Option<PathBuf>,
    /// Label of a token of the library; may be repeated: all tokens are to hold the same keys
    #[arg(long = "token", value_name = "LABEL", conflicts_with = "soft_tokens")]
    tokens: Vec<String>,
    /// File with the user PIN of a token, in the order of --token; a single file is for all; default: prompt
    #[arg(long = "pin-file", value_name = "FILE", conflicts_with = "soft_tokens")]
    pin_files: Vec<PathBuf>,
    /// Environment variable that the library needs; may be repeated
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = answers::variable)]
    env: Vec<(String, String)>,
    /// Make this number of soft tokens (SoftHSM2) in the state folder instead; for laboratories
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    soft_tokens: Option<u16>,
    /// Folder of the state and the audit trail
    #[arg(long, value_name = "DIR", default_value = "/var/lib/claviger")]
    state: PathBuf,
    /// Folder of the admin sockets [default: /run/claviger for the default state folder, else the state folder]
    #[arg(long, value_name = "DIR")]
    sockets: Option<PathBuf>,
    /// Address and port of the service [default: 0.0.0.0:443 with --tls-certificate, else 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Address and port of /metrics, /live and /ready
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9464")]
    metrics: SocketAddr,
    /// Certificate for TLS with its chain, PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// Private key of that certificate, PEM
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
    /// User of the daemon, whose group may read configuration and PINs [default: claviger, if this is root and that user
    /// exists]
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// How the guardian's keys are certified; default: prompt
    #[arg(long, value_name = "HOW")]
    certificates: Option<Certificates>,
    /// Name in the certificates: a common name, or CN=…,O=…,C=…; the purpose of each is added
    #[arg(long, value_name = "NAME", default_value = "Claviger")]
    subject: String,
    /// Bits of the guardian's keys
    #[arg(long, value_name = "BITS", default_value_t = 3072, value_parser = super::rsa_bits)]
    bits: u32,
}

/// Runs `claviger init`. Call it while the process has a single thread, because a library for soft tokens is loaded.
///
/// # Errors
/// The problem and its remedy.
pub fn run(command: Init) -> Result<ExitCode, Failure> {
    let file = std::path::absolute(place::configuration(command.config.clone()))?;
    let owner = files::Owner::of(command.user.as_deref())?;
    if file.exists() {
        if !command.tokens.is_empty() || command.soft_tokens.is_some() {
            return Err(format!(
                "{} exists already and is not changed; edit it, or run claviger init without --token, --soft-tokens and \
                 --module to go on",
                file.display()
            )
            .into());
        }
        say!("kept      {}", file.display());
    } else {
        let tokens = Tokens::ask(command.soft_tokens, command.module, command.tokens, command.pin_files, command.env)?;
        let settings = files::Settings {
            state: command.state,
            sockets: command.sockets,
            listen: command.listen,
            metrics: command.metrics,
            tls: command.tls_certificate.zip(command.tls_key),
        };
        files::write(&file, settings, tokens, &owner)?;
    }
    // The command that continues, with the answer that is still to be used.
    let how = command.certificates.map(|how| format!(" --certificates {}", how.as_str())).unwrap_or_default();
    let again = files::with_config("claviger init", &file) + &how;
    let config = Config::load(&file)?;
    let checked = check(&file, false)?;
    if checked == Level::Error {
        say!("next      remedy the errors, then run again: {}", again);
        return Ok(ExitCode::FAILURE);
    }
    let steps = keys::Steps {
        file: &file,
        again: &again,
        how: command.certificates,
        subject: &command.subject,
        bits: command.bits,
        socket: config.server.admin_socket(),
    };
    if !steps.runs() {
        say!("next      start the service: {}", files::start_command(&file));
        say!("          then run again, to make the keys: {}", again);
        return Ok(ExitCode::SUCCESS);
    }
    if !threads::single_thread()?.block_on(steps.make())? {
        return Ok(ExitCode::SUCCESS);
    }
    if check(&file, true)? == Level::Error {
        say!("next      remedy the errors, then run again: {}", again);
        return Ok(ExitCode::FAILURE);
    }
    say!("ready     keys are released to registered hosts: http://{}/ready says so", config.server.metrics);
    say!("next      register a host: {}", files::with_config("claviger hosts add NAME --public-key FILE", &file));
    Ok(ExitCode::SUCCESS)
}

/// Runs the doctor and shows what is not well. Before there are keys, their absence is no news.
fn check(file: &Path, has_keys: bool) -> Result<Level, Failure> {
    let mut findings = doctor::examine_as_daemon(file);
    if !has_keys {
        let is_expected = |finding: &Finding| match finding.check.as_str() {
            "state" => finding.level == Level::Warning,
            "certificate" => finding.what.starts_with("there is no primary"),
            _ => false,
        };
        findings.retain(|finding| !is_expected(finding));
    }
    let mut worst = Level::Ok;
    let mut count = [0; 3];
    for finding in &findings {
        count[finding.level as usize] += 1;
        if finding.level == Level::Ok {
            continue;
        }
        worst = worst.max(finding.level);
        let level = if finding.level == Level::Error { "ERROR" } else { "warning" };
        say!("{level:8}  {}: {}", finding.check, finding.what);
        if let Some(todo) = &finding.todo {
            say!("{:8}  → {todo}", "");
        }
    }
    say!("doctor    {} ok, {} warnings, {} errors", count[0], count[1], count[2]);
    Ok(worst)
}
