//! `claviger migrate`: moves the state between the state folder and etcd, while no daemon uses it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::place;
use crate::config::Config;
use crate::nodes::record;
use crate::run::preflight;
use crate::store::{Records, State, StateError};
use crate::sys::failure::Failure;
use crate::sys::ownership;
use crate::sys::print::say;

/// Appended to the name of a state file whose records are in etcd now, so that no daemon uses it by mistake.
const MOVED: &str = "moved-to-etcd";

/// The state in the state folder, with what SQLite keeps beside it.
const STATE_FILES: [&str; 3] = ["state.db", "state.db-wal", "state.db-shm"];

/// `claviger migrate`
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("direction").required(true))]
pub struct Migrate {
    /// Copy state.db of the state folder to etcd, then rename it
    #[arg(long, group = "direction")]
    to_etcd: bool,
    /// Copy the state in etcd to state.db in the state folder; etcd keeps it
    #[arg(long, group = "direction")]
    to_sqlite: bool,
    /// Only show what would be copied
    #[arg(long)]
    dry_run: bool,
    /// The configuration file [default: $CLAVIGER_CONFIG, or /etc/claviger/claviger.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON for programs
    #[arg(long)]
    json: bool,
}

/// Runs `claviger migrate`. Blocks on files and on etcd.
///
/// # Errors
/// The problem and its remedy.
pub fn migrate(command: &Migrate) -> Result<(), Failure> {
    let config = Config::load(&place::configuration(command.config.clone()))?;
    if config.etcd.is_none() {
        return Err("the configuration has no [etcd]; add it, also for a migration from etcd".into());
    }
    if let Some(problem) = preflight::another(&config) {
        return Err(
            format!("{}; stop the daemon first, because what it changes now would be lost", problem.what).into()
        );
    }
    let folder = &config.server.state;
    let copied = match (command.to_etcd, command.dry_run) {
        (true, dry_run) => to_etcd(&config, folder, dry_run)?,
        (false, dry_run) => to_sqlite(&config, folder, dry_run)?,
    };
    if command.json {
        say!("{:#}", json!({"records": copied, "applied": !command.dry_run}));
        return Ok(());
    }
    let Records { hosts, baselines, removed_baselines, certificates, limits, signers, revoked_signers } = copied;
    let what = if command.dry_run { "would be copied" } else { "are copied" };
    say!("{what}: {hosts} hosts, {baselines} baselines, {certificates} certificates, {limits} limits of keys,");
    say!(
        "{signers} attestation signers, {revoked_signers} revoked ones, {removed_baselines} names of removed baselines"
    );
    match (command.dry_run, command.to_etcd) {
        (true, _) => say!("nothing is changed; run it without --dry-run"),
        (false, true) => {
            say!(
                "{} has the ending {MOVED} now; counts, evidence and the audit trail stay",
                config.server.state_db().display()
            );
            say!("next: start the daemons with this [etcd]");
        }
        (false, false) => say!("next: take [etcd] out of the configuration, and start one daemon"),
    }
    Ok(())
}

fn to_etcd(config: &Config, folder: &Path, dry_run: bool) -> Result<Records, Failure> {
    let file = config.server.state_db();
    if !file.exists() {
        return Err(format!("there is no state {}", file.display()).into());
    }
    if dry_run {
        let (from, to) = (State::view(folder)?.state, State::view_of(config)?.state);
        must_be_empty(&to, "etcd")?;
        return Ok(from.contents()?.records()?);
    }
    let from = State::open(folder)?;
    let mut to = State::of(config)?;
    must_be_empty(&to, "etcd")?;
    let copied = to.copy_from(&from)?;
    // SQLite writes everything to the one file when the last connection is closed.
    drop(from);
    let moved = file.with_extension(format!("db.{MOVED}"));
    std::fs::rename(&file, &moved).map_err(|error| {
        format!("the state is in etcd, but {} cannot be renamed: {error}; move it away", file.display())
    })?;
    Ok(copied)
}

fn to_sqlite(config: &Config, folder: &Path, dry_run: bool) -> Result<Records, Failure> {
    let from = State::view_of(config)?.state;
    let running = running(&from)?;
    if !running.is_empty() {
        let nodes = running.join(", ");
        return Err(format!("these nodes run and may change the state in etcd: {nodes}; stop them first").into());
    }
    if config.server.state_db().exists() {
        must_be_empty(&State::view(folder)?.state, "state.db")?;
    }
    if dry_run {
        return Ok(from.contents()?.records()?);
    }
    let owner = owner(folder)?;
    let copied = State::open(folder)?.copy_from(&from)?;
    if let Some((user, group)) = owner {
        // What root makes there, the daemon could not open.
        for name in STATE_FILES.map(|name| folder.join(name)).iter().filter(|name| name.exists()) {
            ownership::give(name, user, group).map_err(|error| format!("{}: {error}", name.display()))?;
        }
    }
    Ok(copied)
}

/// The owner of the state folder, if this is root, who makes files for the daemon's user.
fn owner(folder: &Path) -> Result<Option<(u32, u32)>, Failure> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    match folder.metadata() {
        Ok(found) => Ok(Some((found.uid(), found.gid()))),
        Err(error) => Err(format!("{}: {error}; make the folder for the daemon's user first", folder.display()).into()),
    }
}

fn must_be_empty(to: &State, place: &str) -> Result<(), Failure> {
    if to.contents()?.records()?.are_none() {
        return Ok(());
    }
    Err(format!("{place} has records already, and nothing is copied over them; claviger import merges an export")
        .into())
}

/// The names of the nodes that run.
fn running(state: &State) -> Result<Vec<String>, Failure> {
    let nodes = record::list_of(state).map_err(|error| StateError::Unavailable { reason: error.to_string() })?;
    Ok(nodes.into_iter().filter(|node| node.running).map(|node| node.record.name).collect())
}
