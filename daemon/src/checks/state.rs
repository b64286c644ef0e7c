//! Checks of the state: registered keys and the validity of certificates.

use claviger_hsm::KnownAnswerTest;
use claviger_protocol::certificate::Certificate;

use super::finding::Finding;
use crate::attest::endorsement::vendor_roots;
use crate::config::{AttestMode, Config};
use crate::registry::keys::{EXPIRES_SOON, Key};
use crate::store::{self, Kind, State, StateError, View};

/// A key that every member must have, and an operation that tests it.
pub(crate) struct Registered {
    /// Name for people.
    pub(crate) name: String,
    pub(crate) known: KnownAnswerTest,
}

/// Checks the state. The daemon may be running; nothing is written.
pub(crate) fn examine(config: &Config, now: i64) -> (Vec<Finding>, Vec<Registered>) {
    let path = config.server.state_db();
    if config.etcd.is_some() {
        return in_etcd(config, now);
    }
    if !path.exists() {
        let what = format!("there is no state {} yet", path.display());
        let todo = "register keys and hosts once the daemon runs; check server.state if that was done";
        return (vec![Finding::warning("state", what, todo)], Vec::new());
    }
    let viewed = State::view(&config.server.state).and_then(|view| {
        let measured = attestation(config, &view.state)?;
        Ok((read(&view.state, now)?, measured, view.state.hosts()?.len(), view.older))
    });
    match viewed {
        Ok(((mut findings, registered), measured, hosts, older)) => {
            findings.extend(measured);
            findings.push(Finding::ok("state", format!("{} is read, hosts: {hosts}", path.display())));
            if let Some(older) = older {
                let what = format!("{} was made by an older version (schema {older})", path.display());
                let todo = "the daemon will bring it up to date when it starts; a copy of before lets you go back";
                findings.push(Finding::warning("state", what, todo));
            }
            (findings, registered)
        }
        Err(StateError::TooNew { found, known, .. }) => {
            let what = format!("{} was made by a newer version (schema {found}, known are {known})", path.display());
            let todo = "the daemon does not start with it: run the version that made it, or a newer one";
            (vec![Finding::error("state", what, todo)], Vec::new())
        }
        Err(error) => {
            let what = format!("the state cannot be read: {error}");
            let todo =
                "the daemon does not start with it: bring state.db back from a backup, or see to who may read it";
            (vec![Finding::error("state", what, todo)], Vec::new())
        }
    }
}

/// Checks the state in etcd.
fn in_etcd(config: &Config, now: i64) -> (Vec<Finding>, Vec<Registered>) {
    let viewed = State::view_of(config).and_then(|View { state, .. }| {
        let measured = attestation(config, &state)?;
        Ok((read(&state, now)?, measured, state.hosts()?.len()))
    });
    let (mut findings, registered) = match viewed {
        Ok(((mut findings, registered), measured, hosts)) => {
            findings.extend(measured);
            findings.push(Finding::ok("state", format!("the state in etcd is read, hosts: {hosts}")));
            (findings, registered)
        }
        Err(error) => {
            let what = format!("the state in etcd cannot be read: {error}");
            let todo = "a daemon cannot start without etcd; one that is running serves for etcd.max_staleness_ms";
            (vec![Finding::error("state", what, todo)], Vec::new())
        }
    };
    let path = config.server.state_db();
    if path.exists() {
        let what = format!("{} is not used, because [etcd] is set", path.display());
        let todo =
            "claviger migrate --to-etcd moves what is in it to etcd, if etcd is empty; otherwise move the file away";
        findings.push(Finding::warning("state", what, todo));
    }
    (findings, registered)
}

/// Checks the requirements of attestation by TPM.
///
/// # Errors
/// The state cannot be read.
fn attestation(config: &Config, state: &State) -> Result<Vec<Finding>, StateError> {
    let mut findings = Vec::new();
    if config.attest.mode == AttestMode::Tpm && !state.baselines_without_logs()?.iter().any(|one| one.enabled) {
        let what = "the service attests TPMs, and no baseline is enabled: every host is refused";
        let todo = "take one from a reference host: claviger baselines capture NAME --host HOST";
        findings.push(Finding::warning("attest", what.to_owned(), todo));
    }
    if let Some(folder) = &config.attest.vendor_roots {
        match vendor_roots(folder) {
            Ok(roots) if roots.is_empty() => {
                let what = format!("attest.vendor_roots {} holds no certificates", folder.display());
                findings.push(Finding::warning("attest", what, "put the root certificates of TPM makers into it"));
            }
            Ok(_) => {}
            Err(error) => {
                let todo = "hosts cannot be registered by their TPM's certificate until it can be read";
                findings.push(Finding::error("attest", error.to_string(), todo));
            }
        }
    }
    Ok(findings)
}

/// Checks the certificates, and returns the keys of enabled ones.
///
/// # Errors
/// The state cannot be read.
pub(crate) fn read(state: &State, now: i64) -> Result<(Vec<Finding>, Vec<Registered>), StateError> {
    let (mut findings, mut registered) = (Vec::new(), Vec::new());
    let certificates = state.certificates()?;
    for entry in &certificates {
        let name = format!("the {} certificate {}", entry.kind, short(&entry.thumbprint));
        match judge(&name, entry.kind, &entry.der, &entry.key_id, now) {
            Ok((found, key)) => {
                findings.extend(found);
                registered.extend(key.filter(|_| entry.enabled));
            }
            Err(finding) => findings.push(finding),
        }
        findings.extend(different_key(&name, entry));
    }
    for kind in [Kind::Signing, Kind::Encryption] {
        if !certificates.iter().any(|entry| entry.kind == kind && entry.is_primary) {
            let what = format!("there is no primary {kind} certificate: tenants get no metadata");
            findings.push(Finding::error("certificate", what, "add one, or make another one primary"));
        }
    }
    for signer in state.signers()?.iter().filter(|signer| signer.current) {
        let name = format!("the attestation signer {}", short(&signer.thumbprint));
        match judge(&name, Kind::Signing, &signer.der, &signer.key_id, now) {
            // A running daemon replaces the signer in time.
            Ok((_, key)) => registered.extend(key),
            Err(finding) => findings.push(finding),
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok("certificate", format!("all {} are good", certificates.len())));
    }
    Ok((findings, registered))
}

fn judge(
    name: &str,
    kind: Kind,
    der: &[u8],
    key_id: &[u8],
    now: i64,
) -> Result<(Vec<Finding>, Option<Registered>), Finding> {
    let broken = |error: String| {
        let what = format!("{name} is broken: {error}");
        Finding::error("certificate", what, "remove it and add it anew from the file it came from; its key is not used")
    };
    let certificate = Certificate::parse(der).map_err(|error| broken(error.to_string()))?;
    let todo = "make a new certificate for the same key and make it primary; releases are not kept from going on";
    // Releases ignore the validity of these certificates, but hosts and tenants may check it.
    let validity = (certificate.not_before(), certificate.not_after());
    let findings = expiry("certificate", name, validity, now, todo, Finding::warning).into_iter().collect();
    let key = Key::new(certificate, key_id);
    let known = key.known_answer(kind).ok_or_else(|| broken("nothing can be encrypted to its key".to_owned()))?;
    let name = format!("the key {} of {name}", key.id.id);
    Ok((findings, Some(Registered { name, known })))
}

/// The state records the key of each certificate. It must be the key in the certificate.
fn different_key(name: &str, entry: &store::Certificate) -> Option<Finding> {
    let certificate = Certificate::parse(&entry.der).ok()?;
    (certificate.key().spki_der() != entry.spki).then(|| {
        let what = format!("{name} is registered with another key than its own");
        Finding::error("certificate", what, "remove it and add it anew")
    })
}

/// `expired` is the severity after the certificate has expired.
pub(crate) fn expiry(
    check: &'static str,
    name: &str,
    (not_before, not_after): (i64, i64),
    now: i64,
    todo: &'static str,
    expired: fn(&str, String, &'static str) -> Finding,
) -> Option<Finding> {
    let days = |seconds: i64| seconds / (24 * 3600);
    if not_before > now {
        let what = format!("{name} is not valid before {} seconds from now: is the clock right?", not_before - now);
        return Some(Finding::warning("clock", what, "set the clock (timedatectl), or wait"));
    }
    if not_after < now {
        let what = format!("{name} expired {} days ago", days(now - not_after));
        return Some(expired(check, what, todo));
    }
    (not_after - now < EXPIRES_SOON).then(|| {
        let what = format!("{name} expires in {} days", days(not_after - now));
        Finding::warning(check, what, todo)
    })
}

fn short(thumbprint: &str) -> &str {
    thumbprint.get(..16).unwrap_or(thumbprint)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::checks::Level;
    use rusqlite::Connection;

    #[test]
    fn a_file_of_another_version_is_said_to_be_one_and_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.server.state = folder.path().to_owned();
        drop(State::open(folder.path()).unwrap());
        let file = config.server.state_db();
        let of_version = |config: &Config, sql: &str, level: Level, expected: &str| {
            Connection::open(&file).unwrap().execute_batch(sql).unwrap();
            let before = std::fs::read(&file).unwrap();
            let (findings, _) = examine(config, 1);
            let said = |f: &Finding| {
                f.level == level && format!("{} {}", f.what, f.todo.as_deref().unwrap_or("")).contains(expected)
            };
            assert!(findings.iter().any(said), "{expected}: {findings:?}");
            assert!(std::fs::read(&file).unwrap() == before, "{expected}");
        };
        of_version(&config, "", Level::Ok, "is read, hosts: 0");
        config.attest.mode = AttestMode::Tpm;
        config.attest.vendor_roots = Some(folder.path().join("no-such-folder"));
        let (findings, _) = examine(&config, 1);
        for (level, expected) in [(Level::Warning, "every host is refused"), (Level::Error, "no-such-folder")] {
            let said = |f: &Finding| f.level == level && f.what.contains(expected);
            assert!(findings.iter().any(said), "{expected}: {findings:?}");
        }
        config.attest = crate::config::Attest::default();
        // Convert the state to schema version 2.
        let older = "ALTER TABLE hosts DROP COLUMN kind; DROP TABLE baselines; DROP TABLE removed_baselines; DROP TABLE revoked_signers; DROP TABLE limits; ALTER TABLE certificates ADD COLUMN labels TEXT NOT NULL DEFAULT '';
                     PRAGMA user_version = 2";
        of_version(&config, older, Level::Warning, "the daemon will bring it up to date when it starts");
        of_version(&config, "PRAGMA user_version = 99", Level::Error, "made by a newer version");
    }
}
