//! How much keys are used, and when hosts were last served: what an administrator asks before a key is removed.
//!
//! Counted in memory and written once a second, never on the path of a release. In a file of its own beside the state: a
//! count is no change that anybody has to take in. What a crash loses is one second.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use claviger_hsm::KeyId;
use rusqlite::{Connection, params};

const DAY: i64 = 24 * 3600;

/// How many days a count says something about.
pub const DAYS: i64 = 30;

/// How long counts are kept.
const KEPT_DAYS: i64 = 400;

/// When a host was last served, seconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Its last health certificate.
    pub attestation: Option<i64>,
    /// Its last release.
    pub release: Option<i64>,
}

/// What was counted and is not written yet.
#[derive(Debug, Default)]
struct Pending {
    keys: HashMap<KeyId, u64>,
    hosts: HashMap<String, Seen>,
}

/// The counts.
#[derive(Debug)]
pub struct Usage {
    pending: Mutex<Pending>,
    file: Mutex<Connection>,
    /// Whether the last writing failed.
    failing: AtomicBool,
}

impl Usage {
    /// Opens `usage.db` in `folder`, which is there. Blocks on the file.
    ///
    /// # Errors
    /// When it cannot be opened or is none.
    pub fn open(folder: &Path) -> rusqlite::Result<Self> {
        let path = folder.join("usage.db");
        // SQLite would make it with the umask's mode. What is wrong with the file, it says itself.
        let _ = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        let file = Connection::open(path)?;
        file.busy_timeout(Duration::from_secs(1))?;
        // The loss of power may take some counts; a file that is damaged nobody wants.
        file.execute_batch(
            "PRAGMA synchronous = NORMAL;
             CREATE TABLE IF NOT EXISTS releases (
                 key_id BLOB NOT NULL, day INTEGER NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (key_id, day)
             ) STRICT, WITHOUT ROWID;
             CREATE TABLE IF NOT EXISTS hosts (
                 name TEXT NOT NULL COLLATE NOCASE PRIMARY KEY, attestation INTEGER, release INTEGER
             ) STRICT, WITHOUT ROWID;",
        )?;
        Ok(Self { pending: Mutex::default(), file: Mutex::new(file), failing: AtomicBool::new(false) })
    }

    /// Counts a release to `host` that used these keys.
    pub fn released(&self, host: Option<&str>, keys: &[KeyId], now: i64) {
        let mut pending = self.pending();
        for key in keys {
            match pending.keys.get_mut(key) {
                Some(count) => *count += 1,
                None => drop(pending.keys.insert(key.clone(), 1)),
            }
        }
        if let Some(host) = host {
            pending.note(host, |seen| seen.release = Some(now));
        }
    }

    /// Notes that `host` got a health certificate.
    pub fn attested(&self, host: &str, now: i64) {
        self.pending().note(host, |seen| seen.attestation = Some(now));
    }

    /// Writes what was counted. Blocks on the file; what cannot be written is kept for the next time.
    pub fn flush(&self, now: i64) {
        let pending = std::mem::take(&mut *self.pending());
        if pending.keys.is_empty() && pending.hosts.is_empty() {
            return;
        }
        let written = write(&mut self.file(), &pending, now / DAY);
        let failed = self.failing.swap(written.is_err(), Ordering::Relaxed);
        if let Err(error) = written {
            if !failed {
                tracing::warn!(%error, "how much keys are used cannot be written; trying again (this is logged once)");
            }
            self.pending().put_back(pending);
        }
    }

    /// Releases that used a key in the last [`DAYS`] days. Blocks on the file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn releases(&self, now: i64) -> rusqlite::Result<HashMap<KeyId, u64>> {
        self.flush(now);
        let file = self.file();
        let mut statement =
            file.prepare_cached("SELECT key_id, SUM(count) FROM releases WHERE day > ?1 GROUP BY key_id")?;
        let rows = statement.query_map([now / DAY - DAYS], |row| {
            Ok((KeyId(row.get(0)?), u64::try_from(row.get::<_, i64>(1)?).unwrap_or_default()))
        })?;
        rows.collect()
    }

    /// When hosts were last served, by their names in lower case. Blocks on the file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn hosts(&self, now: i64) -> rusqlite::Result<HashMap<String, Seen>> {
        self.flush(now);
        let file = self.file();
        let mut statement = file.prepare_cached("SELECT name, attestation, release FROM hosts")?;
        let rows = statement.query_map([], |row| {
            let name: String = row.get(0)?;
            Ok((name.to_ascii_lowercase(), Seen { attestation: row.get(1)?, release: row.get(2)? }))
        })?;
        rows.collect()
    }

    /// Forgets a host that was removed: another one may get its name. Blocks on the file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn forget_host(&self, name: &str) -> rusqlite::Result<()> {
        self.pending().hosts.retain(|pending, _| !pending.eq_ignore_ascii_case(name));
        self.file().execute("DELETE FROM hosts WHERE name = ?1", [name]).map(drop)
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self) -> MutexGuard<'_, Connection> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Usage {
    fn drop(&mut self) {
        self.flush(crate::service::unix_now());
    }
}

impl Pending {
    /// A name is copied only when it is not there yet.
    fn note(&mut self, host: &str, note: impl FnOnce(&mut Seen)) {
        match self.hosts.get_mut(host) {
            Some(seen) => note(seen),
            None => note(self.hosts.entry(host.to_owned()).or_default()),
        }
    }

    /// What was counted since is newer.
    fn put_back(&mut self, older: Self) {
        for (key, count) in older.keys {
            *self.keys.entry(key).or_default() += count;
        }
        for (host, seen) in older.hosts {
            let newer = self.hosts.entry(host).or_default();
            newer.attestation = newer.attestation.or(seen.attestation);
            newer.release = newer.release.or(seen.release);
        }
    }
}

fn write(file: &mut Connection, pending: &Pending, today: i64) -> rusqlite::Result<()> {
    let transaction = file.transaction()?;
    for (key, count) in &pending.keys {
        transaction
            .prepare_cached(
                "INSERT INTO releases (key_id, day, count) VALUES (?1, ?2, ?3)
                 ON CONFLICT DO UPDATE SET count = count + excluded.count",
            )?
            .execute(params![key.0, today, i64::try_from(*count).unwrap_or(i64::MAX)])?;
    }
    for (host, seen) in &pending.hosts {
        transaction
            .prepare_cached(
                "INSERT INTO hosts (name, attestation, release) VALUES (?1, ?2, ?3)
                 ON CONFLICT DO UPDATE SET attestation = coalesce(excluded.attestation, attestation),
                                           release = coalesce(excluded.release, release)",
            )?
            .execute(params![host, seen.attestation, seen.release])?;
    }
    transaction.execute("DELETE FROM releases WHERE day < ?1", [today - KEPT_DAYS])?;
    transaction.commit()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn counts_survive_and_grow_old() {
        let folder = tempfile::tempdir().unwrap();
        let keys = [KeyId(vec![1]), KeyId(vec![2])];
        let now = 1000 * DAY;
        let usage = Usage::open(folder.path()).unwrap();
        usage.released(Some("Node"), &keys, now);
        usage.released(Some("Node"), &keys[..1], now + 1);
        usage.attested("other", now);
        usage.flush(now);
        usage.released(None, &keys[..1], now + DAY);
        assert_eq!(usage.releases(now + DAY).unwrap(), HashMap::from([(keys[0].clone(), 3), (keys[1].clone(), 1)]));
        drop(usage);
        let usage = Usage::open(folder.path()).unwrap();
        assert_eq!(usage.releases(now + DAYS * DAY).unwrap(), HashMap::from([(keys[0].clone(), 1)]));
        let hosts = usage.hosts(now).unwrap();
        assert_eq!(hosts["node"], Seen { attestation: None, release: Some(now + 1) });
        assert_eq!(hosts["other"], Seen { attestation: Some(now), release: None });
        usage.attested("node", now + 5);
        assert_eq!(usage.hosts(now).unwrap()["node"], Seen { attestation: Some(now + 5), release: Some(now + 1) });
        usage.forget_host("NODE").unwrap();
        assert_eq!(usage.hosts(now).unwrap().len(), 1);
    }

    #[test]
    fn what_cannot_be_written_is_not_lost() {
        let folder = tempfile::tempdir().unwrap();
        let usage = Usage::open(folder.path()).unwrap();
        let key = KeyId(vec![1]);
        usage.file().execute_batch("ALTER TABLE releases RENAME TO away").unwrap();
        usage.released(Some("a"), std::slice::from_ref(&key), 1);
        usage.flush(2);
        usage.released(Some("a"), std::slice::from_ref(&key), 3);
        usage.file().execute_batch("ALTER TABLE away RENAME TO releases").unwrap();
        assert_eq!(usage.releases(4).unwrap()[&key], 2);
        assert_eq!(usage.hosts(4).unwrap()["a"].release, Some(3));
    }
}
