//! Checks of the audit trail: the chain and signatures at its end, and the daemon's own position.

use std::fs::{File, Metadata};
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::Path;

use super::finding::Finding;
use crate::config::Config;
use crate::observe::audit;
use crate::observe::audit::verify::{Report, Verifier};
use crate::store::{Kind, State};
use claviger_protocol::certificate::Certificate;

/// Bytes that are read from the end of the trail, which may have many gigabytes. `claviger audit verify` reads all of
/// it.
const WINDOW: u64 = 64 * 1024 * 1024;
/// Checkpoint intervals without a signature after which the doctor warns.
const MANY_UNSIGNED: u64 = 2;

/// Checks the chain of a readable trail.
pub(super) fn chain(config: &Config, path: &Path, metadata: &Metadata) -> Vec<Finding> {
    let name = path.display();
    if !metadata.is_file() {
        return Vec::new();
    }
    let report = match verify(config, path, metadata.len()) {
        Ok(report) => report,
        Err(error) => {
            let what = format!("the audit trail {name} cannot be read: {error}");
            return vec![Finding::error("audit", what, "check the disk")];
        }
    };
    if let Some(fault) = &report.fault {
        let what = format!("the audit trail {name} is not one chain any more: {}", fault.what);
        let todo = "somebody changed it, or lines were lost with the machine's power: keep the file, and compare it with \
                    `claviger audit verify` and with copies of it";
        return vec![Finding::error("audit", what, todo)];
    }
    let Some(last) = report.last else { return Vec::new() };
    let first = report.first.unwrap_or(last);
    let mut findings = vec![Finding::ok("audit", format!("lines {first} to {last} of {name} are one chain"))];
    let every = config.audit.checkpoint_lines.saturating_mul(MANY_UNSIGNED);
    if config.audit.checkpoints().is_some() && report.unsigned > every {
        let what = format!("{} records of {name} are not signed", report.unsigned);
        let todo = "the log says why: the primary signing key has to be there and an HSM has to serve";
        findings.push(Finding::warning("audit", what, todo));
    }
    findings
}

fn verify(config: &Config, path: &Path, length: u64) -> std::io::Result<Report> {
    let mut reader = BufReader::with_capacity(256 * 1024, File::open(path)?);
    if let Some(start) = length.checked_sub(WINDOW).filter(|start| *start > 0) {
        reader.seek(SeekFrom::Start(start))?;
        reader.skip_until(b'\n')?;
    }
    // Signatures by other certificates are no problem here: a certificate may have been removed.
    let mut verifier = Verifier::new(trusted(config));
    verifier.read(&path.display().to_string(), reader)?;
    Ok(verifier.finish())
}

fn trusted(config: &Config) -> Vec<Certificate> {
    let certificates = State::view_of(config).and_then(|view| view.state.certificates()).unwrap_or_default();
    let signing = certificates.iter().filter(|entry| entry.kind == Kind::Signing);
    signing.filter_map(|entry| Certificate::parse(&entry.der).ok()).collect()
}

/// Checks inside the daemon that its last record is in the file at the configured path.
pub(super) fn of_daemon(path: &Path, written: u64) -> Option<Finding> {
    let name = path.display();
    let there = audit::last_line(path).unwrap_or(0);
    (there < written).then(|| {
        let what = format!("the daemon has written line {written} of the audit trail, and {name} ends with line {there}");
        let todo = "somebody removed, replaced or cut it: look for the old file; the next record goes on with the number after";
        Finding::error("audit", what, todo)
    })
}
