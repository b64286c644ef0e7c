//! The last evidence of each host: what it proved to have booted, so that an administrator can see what changed before
//! accepting it, and take a baseline from a host that was just updated.
//!
//! It is kept in memory and written once a second, in a file of its own beside the state, never on the path of an
//! attestation. There is one record for each host, with a log of bounded size; nothing in it is secret, and nothing depends
//! on it. A file that is damaged is moved aside and begun anew.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use claviger_protocol::tpm::context::MAX_LOG;
use claviger_protocol::tpm::pcr::{PcrSet, PcrValues};
use rusqlite::{Connection, OptionalExtension, params};

use crate::throttle::Throttle;
use crate::usage::{UsageError, is_damage, move_aside};

/// Most bytes of logs that wait to be written. More are dropped: the host's next evidence is kept again.
const MOST_PENDING: usize = 64 * 1024 * 1024;

/// What a host proved.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Evidence {
    /// When, seconds since 1970.
    pub at: i64,
    /// SHA-256 of the endorsement key that it proved it with, lower-case hexadecimal.
    pub endorsement_key: String,
    /// The quoted PCR values.
    pub values: PcrValues,
    /// The event log, which replays to them.
    pub log: Vec<u8>,
    /// Times that the TPM was restarted since its reset.
    pub restart_count: u32,
}

/// The last evidence of each host.
#[derive(Debug)]
pub struct EvidenceStore {
    pending: Mutex<HashMap<String, Evidence>>,
    file: Mutex<Connection>,
    /// Whether the last writing failed.
    failing: AtomicBool,
}

impl EvidenceStore {
    /// Opens `evidence.db` in `folder`, which is there; begins it anew where it is damaged. Blocks on the file.
    ///
    /// # Errors
    /// See [`UsageError`].
    pub fn open(folder: &Path, now: i64) -> Result<Self, UsageError> {
        let path = folder.join("evidence.db");
        let opened = match connect(&path) {
            Err(source) if is_damage(&source) => {
                let aside =
                    move_aside(&path, now).map_err(|source| UsageError::Damaged { path: path.clone(), source })?;
                tracing::warn!(
                    file = %path.display(), moved_to = %aside.display(), error = %source,
                    "the last evidence of hosts was damaged and begins anew; each host's next attestation brings its own"
                );
                connect(&path)
            }
            other => other,
        };
        let file = opened.map_err(|source| UsageError::Database { path, source })?;
        Ok(Self { pending: Mutex::default(), file: Mutex::new(file), failing: AtomicBool::new(false) })
    }

    /// Keeps the evidence of a host, in place of what it had.
    pub fn keep(&self, host: &str, evidence: Evidence) {
        static DROPPED: Throttle = Throttle::new();
        let mut pending = self.pending();
        let bytes: usize = pending.values().map(|evidence| evidence.log.len()).sum();
        if bytes + evidence.log.len() > MOST_PENDING {
            if let Some(unsaid) = DROPPED.due(Instant::now()) {
                tracing::warn!(host, unsaid, "the evidence of a host is not kept: too much waits to be written");
            }
            return;
        }
        pending.insert(host.to_ascii_lowercase(), evidence);
    }

    /// Writes what is kept in memory. Blocks on the file; what cannot be written is kept for the next time.
    pub fn flush(&self) {
        let pending = std::mem::take(&mut *self.pending());
        if pending.is_empty() {
            return;
        }
        let written = write(&mut self.file(), &pending);
        let failed = self.failing.swap(written.is_err(), Ordering::Relaxed);
        if let Err(error) = written {
            if !failed {
                tracing::warn!(%error, "the last evidence of hosts cannot be written; trying again (this is logged once)");
            }
            let mut newer = self.pending();
            for (host, evidence) in pending {
                newer.entry(host).or_insert(evidence);
            }
        }
    }

    /// The last evidence of a host. Blocks on the file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of(&self, host: &str) -> rusqlite::Result<Option<Evidence>> {
        self.flush();
        let file = self.file();
        let sql = "SELECT at, endorsement_key, selection, pcrs, log, restart_count FROM evidence WHERE host = ?1";
        let mut statement = file.prepare_cached(sql)?;
        let row = statement.query_row([host], |row| {
            let selection: [u8; 10] = row.get(2)?;
            let values = PcrSet::from_selection(&selection).ok();
            let pcrs: Vec<u8> = row.get(3)?;
            Ok(Evidence {
                at: row.get(0)?,
                endorsement_key: row.get(1)?,
                values: values.and_then(|set| PcrValues::read(set, &pcrs)).unwrap_or_default(),
                log: row.get(4)?,
                restart_count: row.get(5)?,
            })
        });
        row.optional()
    }

    /// Forgets a host that was removed. Blocks on the file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn forget(&self, host: &str) -> rusqlite::Result<()> {
        self.pending().remove(&host.to_ascii_lowercase());
        self.file().execute("DELETE FROM evidence WHERE host = ?1", [host]).map(drop)
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<String, Evidence>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self) -> MutexGuard<'_, Connection> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for EvidenceStore {
    fn drop(&mut self) {
        self.flush();
    }
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    // SQLite would make it with the umask's mode. What is wrong with the file, it says itself.
    let _ = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    let file = Connection::open(path)?;
    file.busy_timeout(Duration::from_secs(1))?;
    file.execute_batch(
        "PRAGMA synchronous = NORMAL;
         CREATE TABLE IF NOT EXISTS evidence (
             host TEXT NOT NULL COLLATE NOCASE PRIMARY KEY, at INTEGER NOT NULL, endorsement_key TEXT NOT NULL,
             selection BLOB NOT NULL, pcrs BLOB NOT NULL, log BLOB NOT NULL, restart_count INTEGER NOT NULL
         ) STRICT;",
    )?;
    Ok(file)
}

fn write(file: &mut Connection, pending: &HashMap<String, Evidence>) -> rusqlite::Result<()> {
    let transaction = file.transaction()?;
    for (host, evidence) in pending {
        // A Context's log is no longer than this; the file is not to grow beyond it whatever calls this.
        let log = evidence.log.get(..MAX_LOG).unwrap_or(&evidence.log);
        transaction.execute(
            "INSERT OR REPLACE INTO evidence (host, at, endorsement_key, selection, pcrs, log, restart_count)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            params![
                host,
                evidence.at,
                evidence.endorsement_key,
                evidence.values.set_of().to_selection(),
                evidence.values.to_bytes(),
                log,
                evidence.restart_count
            ],
        )?;
    }
    transaction.commit()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn evidence(at: i64) -> Evidence {
        let mut values = PcrValues::default();
        values.set(4, [at as u8; 32]);
        Evidence { at, endorsement_key: "ek".to_owned(), values, log: vec![1; 100], restart_count: 3 }
    }

    #[test]
    fn the_last_evidence_of_each_host_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let store = EvidenceStore::open(folder.path(), 1).unwrap();
        store.keep("Node-1", evidence(1));
        store.keep("node-1", evidence(2));
        assert_eq!(store.of("NODE-1").unwrap(), Some(evidence(2)));
        store.keep("node-1", evidence(3));
        drop(store);
        let store = EvidenceStore::open(folder.path(), 1).unwrap();
        assert_eq!(store.of("node-1").unwrap(), Some(evidence(3)));
        assert_eq!(store.of("node-2").unwrap(), None);
        store.keep("node-1", evidence(4));
        store.forget("Node-1").unwrap();
        assert_eq!(store.of("node-1").unwrap(), None);
    }

    #[test]
    fn what_waits_is_bounded_and_damage_is_moved_aside() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("evidence.db"), "no database at all, but long enough to be taken for one")
            .unwrap();
        let store = EvidenceStore::open(folder.path(), 7).unwrap();
        assert!(folder.path().join("evidence.db.damaged-7").exists());
        for host in 0..2 * MOST_PENDING / MAX_LOG {
            store.keep(&host.to_string(), Evidence { log: vec![0; MAX_LOG], ..evidence(1) });
        }
        assert!(store.pending().len() <= MOST_PENDING / MAX_LOG);
        store.pending().clear();
    }
}
