//! Checks of files and folders: TLS, sockets, the audit trail.

use std::collections::BTreeSet;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::finding::Finding;
use super::state::expiry;
use crate::config::Config;
use crate::sys::ownership::{self, Untrusted};
use crate::tls::{Doubt, tls_config};

/// Free disk space in bytes below which the doctor warns, and below which it reports an error.
const LITTLE_SPACE: u64 = 1024 * 1024 * 1024;
const NO_SPACE: u64 = 64 * 1024 * 1024;
/// Longest last line of the trail that is searched for.
const LINE: u64 = 64 * 1024;
/// Clock difference in seconds above which the doctor warns.
const SKEW: i64 = 300;

/// Checks the files that decide which code runs in the daemon: the configuration and the modules that it names.
pub(crate) fn code(file: &Path, config: &Config) -> Vec<Finding> {
    let modules: BTreeSet<&Path> = config.hsm.iter().map(|hsm| hsm.module.as_path()).collect();
    let named = std::iter::once(("configuration", file)).chain(modules.into_iter().map(|module| ("module", module)));
    let open = |(check, path): (&'static str, &Path)| match ownership::check_closed(path) {
        Err(error @ Untrusted::Writable { .. }) => {
            let todo = "anybody can have the daemon run other code: change the mode, and check what was changed";
            Some(Finding::error(check, format!("{}: {error}", path.display()), todo))
        }
        // Another check reports a missing file.
        _ => None,
    };
    named.filter_map(open).collect()
}

/// Checks the TLS certificate if it can be used. If it cannot, the checks before the start report that.
pub(crate) fn tls(config: &Config, now: i64) -> Vec<Finding> {
    let Some(tls) = &config.server.tls else { return Vec::new() };
    let Ok(served) = tls_config(tls) else { return Vec::new() };
    let name = format!("the TLS certificate {}", tls.certificate.display());
    let error = |doubt: &Doubt| Finding::error("tls", format!("{name}: {}", doubt.what), doubt.todo);
    let mut findings: Vec<Finding> = served.doubts.iter().map(error).collect();
    let todo = "put a new one in its place and send SIGHUP";
    findings.extend(expiry("tls", &name, (served.not_before, served.not_after), now, todo, Finding::error));
    if findings.is_empty() {
        findings.push(Finding::ok("tls", "certificate and key belong together, and hosts can accept them"));
    }
    findings
}

pub(crate) fn folder(config: &Config) -> Vec<Finding> {
    let path = &config.server.state;
    match path.metadata() {
        // The checks before the start report this.
        Ok(metadata) if !metadata.is_dir() => Vec::new(),
        Ok(metadata) if metadata.mode() & 0o022 != 0 => {
            let mode = metadata.mode() & 0o777;
            let what = format!("the state folder {} can be changed by others (mode {mode:04o})", path.display());
            vec![Finding::error("folder", what, format!("chmod 0750 {}", path.display()))]
        }
        Ok(_) => vec![Finding::ok("folder", format!("{} belongs to the daemon alone", path.display()))],
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let what = format!("there is no state folder {} yet", path.display());
            vec![Finding::warning("folder", what, "the daemon makes it when it starts; check server.state if it did")]
        }
        Err(error) => {
            let what = format!("the state folder {} cannot be looked at: {error}", path.display());
            vec![Finding::error("folder", what, "run the doctor as root or as the daemon's user")]
        }
    }
}

/// Checks the sockets; also returns whether a daemon runs.
pub(crate) fn sockets(config: &Config) -> (Vec<Finding>, bool) {
    let (admin, review) = (config.server.admin_socket(), config.server.review_socket());
    let mut findings = Vec::new();
    let running = socket(&admin, config.server.admin_group.is_some(), &mut findings);
    let reviewed = socket(&review, config.server.review_group.is_some(), &mut findings);
    if running && !reviewed {
        let what = format!("the daemon runs, and nobody answers at {}", review.display());
        findings.push(Finding::warning("socket", what, "somebody has removed it: start the daemon again"));
    }
    if findings.is_empty() {
        let what = if running { "the daemon runs and answers" } else { "no daemon runs: the HSMs are asked directly" };
        findings.push(Finding::ok("socket", what));
    }
    (findings, running)
}

/// Whether a daemon answers at this socket.
fn socket(path: &Path, for_group: bool, findings: &mut Vec<Finding>) -> bool {
    let name = path.display();
    let metadata = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return false,
        Err(error) => {
            let what = format!("{name} cannot be looked at: {error}");
            findings.push(Finding::error("socket", what, "run the doctor as root or as the daemon's user"));
            return false;
        }
    };
    // The checks before the start report this.
    if !metadata.file_type().is_socket() {
        return false;
    }
    let mode = metadata.mode() & 0o777;
    if mode & if for_group { 0o007 } else { 0o077 } != 0 {
        let what = format!("{name} is open to more than its users (mode {mode:04o})");
        findings.push(Finding::error(
            "socket",
            what,
            format!("chmod {} {name}", if for_group { "0660" } else { "0600" }),
        ));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            let what = format!("{name} is stale: the daemon that made it has ended without an orderly stop");
            let todo = "see in the log why it ended, and start it again; it replaces the socket by itself";
            findings.push(Finding::warning("socket", what, todo));
            false
        }
        Err(error) => {
            let what = format!("nobody can be asked at {name}: {error}");
            findings.push(Finding::error("socket", what, "run the doctor as root or as the daemon's user"));
            false
        }
    }
}

pub(crate) fn audit(config: &Config, now: i64) -> Vec<Finding> {
    let path = config.server.audit_file();
    let name = path.display();
    let mut findings = Vec::new();
    // Open it like the daemon does, but do not create it: the doctor's user would become its owner.
    match OpenOptions::new().append(true).read(true).open(&path) {
        Ok(mut file) => match file.metadata().and_then(|metadata| Ok((last_line(&mut file, &metadata)?, metadata))) {
            Ok((line, metadata)) => {
                findings.extend(trail(&path, &line, &metadata, now));
                findings.extend(super::trail::chain(config, &path, &metadata));
            }
            Err(error) => {
                let what = format!("the audit trail {name} cannot be read: {error}");
                findings.push(Finding::error("audit", what, "check the disk"));
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_err() => {
            findings.push(Finding::ok("audit", format!("there is no audit trail {name} yet")));
        }
        Err(error) => findings.push(Finding::error(
            "audit",
            format!("the audit trail {name} cannot be written: {error}"),
            "nothing is released until it can: check owner, mode and the disk",
        )),
    }
    findings.extend(space(config));
    findings
}

fn trail(path: &Path, line: &[u8], metadata: &Metadata, now: i64) -> Vec<Finding> {
    let name = path.display();
    if metadata.mode() & 0o022 != 0 {
        let what = format!("the audit trail {name} can be changed by others (mode {:04o})", metadata.mode() & 0o777);
        return vec![Finding::error("audit", what, format!("chmod 0640 {name}"))];
    }
    if line.is_empty() {
        return vec![Finding::ok("audit", format!("{name} can be written"))];
    }
    let record = line.strip_suffix(b"\n").and_then(|line| serde_json::from_slice::<Value>(line).ok());
    let Some(record) = record else {
        let what =
            format!("the last line of {name} is not whole: the daemon, or the machine, ended while it was written");
        return vec![Finding::warning(
            "audit",
            what,
            "nothing is lost of what was answered; the next record begins anew",
        )];
    };
    let mut findings = vec![Finding::ok("audit", format!("{name} can be written, its last line is whole"))];
    let time = record["time"].as_str().and_then(|time| OffsetDateTime::parse(time, &Rfc3339).ok());
    if let Some(ahead) = time.map(|time| time.unix_timestamp() - now).filter(|ahead| *ahead > SKEW) {
        let what = format!("the last record of the audit trail is {ahead} seconds in the future");
        findings.push(Finding::warning("clock", what, "set the clock (timedatectl), and see that it stays right"));
    } else {
        findings.push(Finding::ok("clock", "not behind the audit trail"));
    }
    findings
}

/// The last line with its line break; empty for an empty file.
fn last_line(file: &mut File, metadata: &Metadata) -> io::Result<Vec<u8>> {
    if !metadata.is_file() {
        return Ok(Vec::new());
    }
    file.seek(SeekFrom::Start(metadata.len().saturating_sub(LINE)))?;
    let mut end = Vec::new();
    file.take(LINE).read_to_end(&mut end)?;
    let body = end.strip_suffix(b"\n").unwrap_or(&end);
    let start = body.iter().rposition(|octet| *octet == b'\n').map_or(0, |at| at + 1);
    Ok(end.split_off(start))
}

fn space(config: &Config) -> Option<Finding> {
    let folder = &config.server.state;
    let disk = rustix::fs::statvfs(folder).ok()?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let what = format!("{} MiB are free on the disk of {}", free / 1024 / 1024, folder.display());
    let todo = "make room, or move old audit logs away: without room nothing is released";
    Some(match free {
        ..NO_SPACE => Finding::error("audit", what, todo),
        NO_SPACE..LITTLE_SPACE => Finding::warning("audit", what, todo),
        _ => Finding::ok("audit", what),
    })
}
