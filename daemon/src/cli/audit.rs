//! `claviger audit …`: verifies the audit trail and shows its position.

use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use claviger_client::files;
use claviger_protocol::certificate::Certificate;
use serde_json::json;
use time::OffsetDateTime;

use super::place;
use super::table::text;
use super::target::{Target, ask, print};
use crate::admin::Command;
use crate::config::Config;
use crate::observe::audit::cef;
use crate::observe::audit::verify::{Report, Verifier, first_number, open};
use crate::store::{Kind, State};
use crate::sys::failure::Failure;
use crate::sys::print::say;

/// `claviger audit …`
#[derive(Debug, clap::Subcommand)]
pub enum Audit {
    /// Verify that the files of the trail form one chain, and up to which line it is signed
    #[command(after_help = "Example: claviger audit verify --certificate signing.pem audit.jsonl audit.jsonl-*\n\
        Exit status: 0 nothing is wrong, 1 something is, 2 wrong usage or a file that cannot be read,\n\
        3 nothing is wrong, and no signature of a given certificate proves it.\n\
        Several nodes: claviger audit verify --certificate signing.pem hgs-1 hgs-2 hgs-3\n\
        Needs no daemon. Files are read in the order of their lines, gzip is read, - is the standard input.")]
    Verify(Verify),
    /// Print the lines of the trail for a SIEM, as JSON or in the Common Event Format
    #[command(after_help = "Example: claviger audit export --format cef --since 24h\n\
        Needs no daemon. Files are read in the order of their lines, gzip is read, - is the standard input. The chain is not\n\
        checked: claviger audit verify does that.")]
    Export(Export),
    /// Show the position of a running daemon's audit trail
    #[command(after_help = "Example: claviger audit status")]
    Status {
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
}

/// `claviger audit verify`
#[derive(Debug, clap::Args)]
pub struct Verify {
    /// Files of one trail, or folders with the trail of one node each; default: the files of the configured daemon
    #[arg(value_name = "FILE|DIR")]
    files: Vec<PathBuf>,
    /// A signing certificate of the service, PEM or DER; may be repeated
    #[arg(long = "certificate", value_name = "FILE")]
    certificates: Vec<PathBuf>,
    /// Configuration of the daemon that wrote the trail; its state provides the certificates [default, without files:
    /// $CLAVIGER_CONFIG, or /etc/claviger/claviger.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON for programs
    #[arg(long)]
    json: bool,
}

/// `claviger audit export`
#[derive(Debug, clap::Args)]
pub struct Export {
    /// Files of one trail; default: the files of the configured daemon
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// json: the lines as they are; cef: Common Event Format
    #[arg(long, value_name = "FORMAT", default_value = "json")]
    format: ExportFormat,
    /// Only lines from this time on: a time like 2026-11-28 or 2026-11-28T20:00:00Z, or 90m, 24h, 7d ago
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<String>,
    /// Configuration of the daemon that wrote the trail [default: $CLAVIGER_CONFIG, or /etc/claviger/claviger.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// The formats of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ExportFormat {
    /// The lines as they are.
    Json,
    /// Common Event Format.
    Cef,
}

/// Runs `claviger audit …`.
///
/// # Errors
/// The problem and its remedy.
pub async fn run(command: Audit) -> Result<ExitCode, Failure> {
    match command {
        Audit::Verify(command) => Ok(match verify(&command) {
            Ok(status) => status,
            Err(error) => {
                crate::sys::print::note(&format!("claviger: {error}"));
                ExitCode::from(2)
            }
        }),
        Audit::Export(command) => export(&command).map(|()| ExitCode::SUCCESS),
        Audit::Status { target } => {
            let reply = ask(&target, &Command::AuditStatus).await?;
            print(&target, &reply, || {
                say!("{}", text(&reply, "file"));
                say!("last line: {} ({})", reply["line"], text(&reply, "hash"));
                match reply["checkpoint"].as_u64() {
                    Some(line) => say!("signed up to line {line}, {} records after it are not", reply["unsigned"]),
                    None => say!("not signed since the daemon started, {} records are not", reply["unsigned"]),
                }
                if reply["reserve_missing"].as_u64().is_some_and(|missing| missing > 0) {
                    say!("the disk is full: {} bytes of the reserve are used", reply["reserve_missing"]);
                }
            });
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Prints the lines from the given time on.
fn export(command: &Export) -> Result<(), Failure> {
    let files = if command.files.is_empty() {
        let file = place::configuration(command.config.clone());
        all_of(&Config::load(&file)?.server.audit_file())?
    } else {
        command.files.clone()
    };
    for file in in_order(files)? {
        let failed = |error: std::io::Error| format!("{}: {error}", file.display());
        let reader: Box<dyn BufRead> =
            if file.as_os_str() == STDIN { Box::new(std::io::stdin().lock()) } else { open(&file).map_err(failed)? };
        for line in reader.lines() {
            let line = line.map_err(failed)?;
            // A daemon may be writing the last line.
            let Ok(event) = serde_json::from_str::<serde_json::Value>(&line) else { continue };
            let time = event["time"].as_str().unwrap_or_default();
            // The times of the trail are in UTC and of one form, so they compare as text.
            if command.since.as_deref().is_some_and(|since| time < since) {
                continue;
            }
            match command.format {
                ExportFormat::Json => say!("{line}"),
                ExportFormat::Cef => say!("{}", cef::event(&event)),
            }
        }
    }
    Ok(())
}

/// Reads a time, or how long ago it is, as the beginning of a time in the trail.
fn since(text: &str) -> Result<String, String> {
    let wrong = || "write it like 2026-11-28, 2026-11-28T20:00:00Z, 90m, 24h or 7d".to_owned();
    let ago = |unit: char, seconds: u64| {
        let count = text.strip_suffix(unit)?.parse::<u64>().ok()?;
        Some(Duration::from_secs(count.checked_mul(seconds)?))
    };
    if let Some(ago) = ago('m', 60).or_else(|| ago('h', 3600)).or_else(|| ago('d', 86_400)) {
        let then = SystemTime::now().checked_sub(ago).ok_or_else(wrong)?;
        let format = time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]");
        return OffsetDateTime::from(then).format(&format).map_err(|_| wrong());
    }
    let plain = text.trim_end_matches('Z');
    let form = |c: char| c.is_ascii_digit() || matches!(c, '-' | ':' | 'T' | '.');
    let is_date = plain.len() >= 10 && plain.as_bytes()[4] == b'-' && plain.as_bytes()[7] == b'-';
    if is_date && plain.chars().all(form) { Ok(plain.to_owned()) } else { Err(wrong()) }
}

fn verify(command: &Verify) -> Result<ExitCode, Failure> {
    let named = command.config.clone();
    let file = if command.files.is_empty() { Some(place::configuration(named)) } else { named };
    let config = file.as_deref().map(Config::load).transpose()?;
    let given = command.certificates.iter().map(|path| files::read_certificate(path));
    let mut trusted = given.collect::<Result<Vec<_>, _>>()?;
    if let Some(config) = &config {
        trusted.extend(signing(config)?);
    }
    let are_given = !trusted.is_empty();
    if command.files.iter().any(|path| path.is_dir()) {
        return verify_nodes(command, &trusted);
    }
    let files = match (&command.files, &config) {
        (files, Some(config)) if files.is_empty() => all_of(&config.server.audit_file())?,
        (files, _) => files.clone(),
    };
    let report = read(&in_order(files)?, trusted)?;
    if command.json {
        say!("{:#}", json!(report));
    } else {
        tell(&report, are_given);
    }
    Ok(ExitCode::from(status(&report, are_given)))
}

/// The exit status for a trail.
fn status(report: &Report, are_given: bool) -> u8 {
    match (&report.fault, &report.signed) {
        (Some(_), _) => 1,
        (None, Some(_)) => 0,
        (None, None) if !are_given => 0,
        (None, None) => 3,
    }
}

/// Verifies the trails of several nodes, each in a folder. The exit status is that of the worst.
fn verify_nodes(command: &Verify, trusted: &[Certificate]) -> Result<ExitCode, Failure> {
    if let Some(file) = command.files.iter().find(|path| !path.is_dir()) {
        let file = file.display();
        return Err(format!("{file} is no folder, and others are; give files of one trail, or folders").into());
    }
    let are_given = !trusted.is_empty();
    let mut reports = Vec::with_capacity(command.files.len());
    for folder in &command.files {
        let files = in_order(all_of(&folder.join(TRAIL))?)?;
        reports.push((folder, read(&files, trusted.to_vec())?));
    }
    for (at, (folder, report)) in reports.iter().enumerate() {
        let same = |other: &&(&PathBuf, Report)| other.1.nodes.iter().any(|node| report.nodes.contains(node));
        if let Some((other, _)) = reports[..at].iter().find(same) {
            let (one, two, node) = (other.display(), folder.display(), report.nodes.join(", "));
            return Err(format!("{one} and {two} both have the trail of {node}; give each node once").into());
        }
    }
    if command.json {
        let named = |(folder, report): &(&PathBuf, Report)| json!({"folder": folder, "report": report});
        say!("{:#}", reports.iter().map(named).collect::<serde_json::Value>());
    } else {
        for (folder, report) in &reports {
            say!("{}:", folder.display());
            tell(report, are_given);
        }
    }
    let statuses: Vec<_> = reports.iter().map(|(_, report)| status(report, are_given)).collect();
    // A fault is worse than a missing proof.
    Ok(ExitCode::from([1, 3].into_iter().find(|status| statuses.contains(status)).unwrap_or(0)))
}

/// The signing certificates in the state, including disabled ones, because they made earlier signatures.
fn signing(config: &Config) -> Result<Vec<Certificate>, Failure> {
    let view = State::view_of(config)?;
    let signing = view.state.certificates()?.into_iter().filter(|entry| entry.kind == Kind::Signing);
    Ok(signing.filter_map(|entry| Certificate::parse(&entry.der).ok()).collect())
}

/// The trail and its rotated files.
fn all_of(trail: &Path) -> Result<Vec<PathBuf>, Failure> {
    let name = trail.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let folder = files::folder(trail);
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name().to_string_lossy().starts_with(&name) {
            found.push(entry.path());
        }
    }
    if found.is_empty() { Err(format!("{}: there is no trail", trail.display()).into()) } else { Ok(found) }
}

const STDIN: &str = "-";
/// Name of the trail in a state folder.
const TRAIL: &str = "audit.jsonl";

/// Sorts files by their first lines. Files without line numbers are older than the chain; they come first, in the given
/// order.
fn in_order(files: Vec<PathBuf>) -> Result<Vec<PathBuf>, Failure> {
    if files.iter().any(|file| file.as_os_str() == STDIN) {
        return Ok(files);
    }
    let mut numbered = Vec::with_capacity(files.len());
    for file in files {
        let failed = |error| format!("{}: {error}", file.display());
        let number = open(&file).and_then(first_number).map_err(failed)?;
        // An empty file was just created by a rotation, so it comes last.
        let is_empty = number.is_none() && file.metadata().is_ok_and(|metadata| metadata.len() == 0);
        numbered.push((if is_empty { u64::MAX } else { number.unwrap_or(0) }, file));
    }
    numbered.sort_by_key(|(number, _)| *number);
    Ok(numbered.into_iter().map(|(_, file)| file).collect())
}

fn read(files: &[PathBuf], trusted: Vec<Certificate>) -> Result<Report, Failure> {
    let mut verifier = Verifier::new(trusted);
    for file in files {
        let name = file.display().to_string();
        let failed = |error| format!("{name}: {error}");
        if file.as_os_str() == STDIN {
            verifier.read("standard input", std::io::stdin().lock()).map_err(failed)?;
        } else {
            verifier.read(&name, open(file).map_err(failed)?).map_err(failed)?;
        }
    }
    Ok(verifier.finish())
}

fn tell(report: &Report, are_given: bool) {
    if let Some(fault) = &report.fault {
        say!("WRONG  {}, line {}: {}", fault.file, fault.line, fault.what);
    }
    let until = if report.fault.is_some() { ", up to there" } else { "" };
    match (report.first, report.last) {
        (Some(first), Some(last)) => {
            let nodes = report.nodes.join(", ");
            say!("lines {first} to {last} of {nodes} are one chain{until}");
            if first > 1 {
                say!("lines 1 to {} are not in these files", first - 1);
            }
        }
        _ => say!("there is no line of a chain{until}"),
    }
    if report.unchained > 0 {
        say!("{} lines before the chain are of a version that had none: nothing is proven of them", report.unchained);
    }
    if report.torn > 0 {
        say!("{} times a crash or a full disk left a line unfinished, which the trail tells of", report.torn);
    }
    match &report.signed {
        Some(signed) => {
            let (line, time, signer) = (signed.line, &signed.time, &signed.signer);
            say!("signed up to line {line} at {time} by the certificate {signer}");
            if !signed.trusted {
                say!("whose certificate that is was not checked: give yours with --certificate");
            }
            say!("{} records after it are not signed", report.unsigned);
        }
        None if are_given && !report.checkpoints.is_empty() => {
            for (signer, count) in &report.checkpoints {
                say!("{count} checkpoints are by the certificate {signer}, which was not given");
            }
            say!("nothing is proven by a signature");
        }
        None => say!("nothing is signed"),
    }
    if report.ends_torn {
        say!("the last line is not whole: a daemon is writing it, or ended while it did");
    }
    if let Some(hash) = &report.last_hash {
        say!("hash of the last line: {hash}");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_a_date_or_how_long_ago_it_is() {
        assert_eq!(since("2026-11-28").unwrap(), "2026-11-28");
        assert_eq!(since("2026-11-28T20:00:00Z").unwrap(), "2026-11-28T20:00:00");
        let (hour, week) = (since("1h").unwrap(), since("7d").unwrap());
        assert!(week < hour && hour.len() == "2026-11-28T20:00:00".len(), "{week} {hour}");
        for wrong in ["yesterday", "1y", "2026", "26-11-28xx", "h"] {
            assert!(since(wrong).is_err(), "{wrong}");
        }
    }
}
