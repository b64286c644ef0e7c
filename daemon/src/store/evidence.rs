//! The last evidence of each host's boot. With it, an administrator can see what changed before accepting it, and
//! create a baseline from a host that was just updated.
//!
//! Evidence is collected in memory and written once a second to its own file next to the state, never during an
//! attestation. There is one record for each host, with a log of limited size. The records are not secret, and no
//! decision depends on them. If the file is damaged, it is moved away and an empty one is created.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use claviger_process::lock::lock;
use claviger_process::throttle::Throttle;
use claviger_protocol::tpm::context::MAX_LOG;
use claviger_protocol::tpm::pcr::{PcrSet, PcrValues};
use rusqlite::{Connection, OptionalExtension, params};

use super::usage_counts::{UsageError, is_damage, move_aside};

/// Maximum total size of logs that wait to be written, in bytes. Further evidence is dropped.
const MOST_PENDING: usize = 64 * 1024 * 1024;

/// The evidence of one attestation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Evidence {
    /// Time of the attestation, seconds since 1970.
    pub at: i64,
    /// SHA-256 of the TPM's endorsement key, lower-case hexadecimal.
    pub endorsement_key: String,
    /// The quoted PCR values.
    pub values: PcrValues,
    /// The event log. It replays to the values of PCRs 0, 2, 4 and 7. Events of other PCRs are unproven.
    pub log: Vec<u8>,
    /// Number of times that the TPM was restarted since its last reset.
    pub restart_count: u32,
}

/// The last evidence of each host.
#[derive(Debug)]
pub struct EvidenceStore {
    /// Lock order: `file`, then this. No I/O happens under this lock.
    pending: Mutex<Pending>,
    file: Mutex<Connection>,
    /// Whether the last write failed.
    failing: AtomicBool,
}

/// Evidence that waits to be written, by the host's name in lower case. Its logs have at most [`MOST_PENDING`] bytes.
#[derive(Debug, Default)]
struct Pending {
    by_host: HashMap<String, Evidence>,
    /// Total size of the logs.
    bytes: usize,
}

impl Pending {
    /// Stores the evidence of a host in place of an earlier one. Returns whether there was room; if not, the earlier
    /// one stays.
    fn keep(&mut self, host: String, evidence: Evidence) -> bool {
        let replaced = self.by_host.get(&host).map_or(0, |earlier| earlier.log.len());
        let bytes = self.bytes - replaced + evidence.log.len();
        if bytes > MOST_PENDING {
            return false;
        }
        self.bytes = bytes;
        self.by_host.insert(host, evidence);
        true
    }

    /// Takes back evidence that could not be written, if there is room and no later evidence of the host has arrived.
    /// Returns the number of hosts whose evidence was dropped.
    fn take_back(&mut self, unwritten: Self) -> usize {
        let mut dropped = 0;
        for (host, evidence) in unwritten.by_host {
            if !self.by_host.contains_key(&host) && !self.keep(host, evidence) {
                dropped += 1;
            }
        }
        dropped
    }

    fn forget(&mut self, host: &str) {
        if let Some(evidence) = self.by_host.remove(host) {
            self.bytes -= evidence.log.len();
        }
    }
}

impl EvidenceStore {
    /// Opens `evidence.db` in `folder`, which must exist. A damaged file is replaced by an empty one. Blocks on the
    /// file.
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
                    "the hosts' last evidence was damaged and has been moved aside; each host's next attestation brings new evidence"
                );
                connect(&path)
            }
            other => other,
        };
        let file = opened.map_err(|source| UsageError::Database { path, source })?;
        Ok(Self { pending: Mutex::default(), file: Mutex::new(file), failing: AtomicBool::new(false) })
    }

    /// Stores the evidence of a host in place of its earlier one.
    pub fn keep(&self, host: &str, evidence: Evidence) {
        static DROPPED: Throttle = Throttle::new();
        let is_kept = self.pending().keep(host.to_ascii_lowercase(), evidence);
        if !is_kept && let Some(unsaid) = DROPPED.due(Instant::now()) {
            tracing::warn!(host, unsaid, "a host's evidence is dropped because too much evidence waits to be written");
        }
    }

    /// Writes the pending evidence. Blocks on the file. Evidence that cannot be written stays pending, within the same
    /// limit.
    pub fn flush(&self) {
        // Lock the file first: a host can then be deleted only after its pending evidence is in the file.
        let mut file = self.file();
        let pending = std::mem::take(&mut *self.pending());
        if pending.by_host.is_empty() {
            return;
        }
        let written = write(&mut file, &pending.by_host);
        let failed = self.failing.swap(written.is_err(), Ordering::Relaxed);
        if let Err(error) = written {
            if !failed {
                tracing::warn!(%error, "the hosts' last evidence cannot be written; trying again (this is logged once)");
            }
            let dropped = self.pending().take_back(pending);
            if dropped > 0 {
                tracing::warn!(dropped, "hosts' evidence is dropped because too much evidence waits to be written");
            }
        }
    }

    /// Returns the last evidence of a host. Blocks on the file.
    ///
    /// # Errors
    /// The file cannot be read.
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

    /// Deletes the evidence of a host that was removed. Blocks on the file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn forget(&self, host: &str) -> rusqlite::Result<()> {
        let file = self.file();
        self.pending().forget(&host.to_ascii_lowercase());
        file.execute("DELETE FROM evidence WHERE host = ?1", [host]).map(drop)
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        lock(&self.pending)
    }

    fn file(&self) -> MutexGuard<'_, Connection> {
        lock(&self.file)
    }
}

impl Drop for EvidenceStore {
    fn drop(&mut self) {
        self.flush();
    }
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    // SQLite would create the file with the umask's mode. Ignore errors here: SQLite reports them when it opens the
    // file.
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
        // The protocol limits the log; limit the file as well, whatever the caller passes.
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
        assert_eq!(store.pending().by_host.len(), MOST_PENDING / MAX_LOG);
        // Evidence that replaces other evidence of the same size needs no more room.
        store.keep("0", Evidence { log: vec![2; MAX_LOG], ..evidence(2) });
        assert_eq!(store.pending().by_host["0"].at, 2);
        store.keep("0", Evidence { log: vec![2; MAX_LOG + 1], ..evidence(3) });
        assert_eq!(store.pending().by_host["0"].at, 2, "the earlier one stays");
        assert_eq!(store.pending().bytes, MOST_PENDING);
        *store.pending() = Pending::default();
    }

    #[test]
    fn what_could_not_be_written_is_taken_back_within_the_same_bound() {
        let large = |at| Evidence { log: vec![0; MAX_LOG], ..evidence(at) };
        let most = MOST_PENDING / MAX_LOG;
        let of = |hosts: std::ops::Range<usize>, at| {
            let mut pending = Pending::default();
            hosts.for_each(|host| assert!(pending.keep(host.to_string(), large(at))));
            pending
        };
        // Meanwhile one of these hosts and half as many other hosts have attested.
        let (unwritten, mut pending) = (of(0..most, 1), of(most - 1..most + most / 2, 2));
        assert_eq!(pending.take_back(unwritten), most / 2);
        assert_eq!((pending.by_host.len(), pending.bytes), (most, MOST_PENDING));
        assert_eq!(pending.by_host[&(most - 1).to_string()].at, 2, "the later evidence of a host");
        let hosts: Vec<_> = pending.by_host.keys().cloned().collect();
        hosts.iter().for_each(|host| pending.forget(host));
        assert_eq!(pending.bytes, 0);
    }

    #[test]
    fn a_failed_write_keeps_what_waits() {
        let folder = tempfile::tempdir().unwrap();
        let store = EvidenceStore::open(folder.path(), 1).unwrap();
        store.file().execute_batch("ALTER TABLE evidence RENAME TO mislaid").unwrap();
        store.keep("node-1", evidence(1));
        store.flush();
        assert_eq!(store.pending().by_host.len(), 1);
        assert_eq!(store.pending().bytes, 100);
        store.file().execute_batch("ALTER TABLE mislaid RENAME TO evidence").unwrap();
        assert_eq!(store.of("node-1").unwrap(), Some(evidence(1)));
        assert_eq!(store.pending().bytes, 0);
    }
}
