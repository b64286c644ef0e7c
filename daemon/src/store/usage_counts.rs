//! Counts the use of keys and records when hosts were last served, so that an administrator can check before removing a
//! key.
//!
//! Counts are collected in memory and written once a second, never during a release. They are in their own file next to
//! the state, because a count is not a change that others must load. A crash loses at most one second. A damaged file
//! is moved away and a new one started, because counts must not stop a daemon. The file also records when counting
//! began, so that missing counts are not mistaken for zero.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use claviger_hsm::KeyRef;
use claviger_process::lock::lock;
use rusqlite::{Connection, ErrorCode, TransactionBehavior, params};

const DAY: i64 = 24 * 3600;

/// Number of days that the reported counts cover.
pub(crate) const DAYS: i64 = 30;

/// Number of days for which counts are kept.
const KEPT_DAYS: i64 = 400;

/// When a host was last served, in seconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Time of its last health certificate.
    pub attestation: Option<i64>,
    /// Time of its last release.
    pub release: Option<i64>,
}

/// Why the counts cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// The file cannot be opened, and is not known to be damaged.
    #[error("{} cannot be opened: {source}; check that the daemon's user owns it, and that no other program holds it", path.display())]
    Database {
        /// The file.
        path: PathBuf,
        /// The error of SQLite.
        source: rusqlite::Error,
    },
    /// The file is damaged and cannot be moved away.
    #[error("{} is damaged and cannot be moved aside: {source}; move it away, it holds only counts", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

/// A wrapping set that is worth stocking. All of it is public.
#[derive(Clone, Debug, PartialEq)]
pub struct RememberedSet {
    /// The document from [`WrappingSet::to_document`](claviger_protocol::wrapping_set::WrappingSet::to_document).
    pub document: Vec<u8>,
    /// The demand for it.
    pub releases: f64,
}

/// The releases of the last [`DAYS`] days.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Releases {
    /// Key: the key's name in the file.
    by_key: HashMap<Vec<u8>, u64>,
    /// When counting began, if that is less than [`DAYS`] days ago.
    pub since: Option<i64>,
}

impl Releases {
    /// Number of releases that used a key.
    #[must_use]
    pub fn of(&self, key: &KeyRef) -> u64 {
        // Older files identify keys by CKA_ID only, so their counts may belong to any key with that id.
        let counted = |name: &[u8]| self.by_key.get(name).copied().unwrap_or_default();
        counted(&name_of(key)).saturating_add(counted(&key.id.0))
    }

    /// The counts by the keys' names in the file.
    pub(crate) fn by_key(&self) -> impl Iterator<Item = (&[u8], u64)> {
        self.by_key.iter().map(|(name, count)| (name.as_slice(), *count))
    }

    /// Adds the counts of another node, which are complete since `since`.
    pub(crate) fn add(&mut self, keys: impl IntoIterator<Item = (Vec<u8>, u64)>, since: Option<i64>) {
        for (name, count) in keys {
            let sum = self.by_key.entry(name).or_default();
            *sum = sum.saturating_add(count);
        }
        self.since = self.since.max(since);
    }

    /// Whether the counts are complete for a key that was added at `added`.
    #[must_use]
    pub fn are_all_since(&self, added: i64) -> bool {
        self.since.is_none_or(|since| since <= added)
    }
}

/// Counts that are not written yet.
#[derive(Debug, Default)]
struct Pending {
    keys: HashMap<KeyRef, u64>,
    hosts: HashMap<String, Seen>,
    identities: HashMap<String, String>,
}

/// The counts.
#[derive(Debug)]
pub struct Usage {
    pending: Mutex<Pending>,
    file: Mutex<Connection>,
    /// SHA-256 (hexadecimal) of the last certified identity key of each host, by name in lower case.
    identities: Mutex<HashMap<String, String>>,
    /// Whether the last write failed.
    failing: AtomicBool,
}

impl Usage {
    /// Opens `usage.db` in `folder`, which must exist. Replaces a damaged file. Blocks on the file.
    ///
    /// # Errors
    /// See [`UsageError`].
    pub fn open(folder: &Path, now: i64) -> Result<Self, UsageError> {
        let path = folder.join("usage.db");
        let opened = match connect(&path, now) {
            Err(source) if is_damage(&source) => {
                let aside =
                    move_aside(&path, now).map_err(|source| UsageError::Damaged { path: path.clone(), source })?;
                tracing::warn!(
                    file = %path.display(), moved_to = %aside.display(), error = %source,
                    "the usage counts of keys were damaged and start again at zero; earlier usage is unknown"
                );
                connect(&path, now)
            }
            other => other,
        };
        let failed = |source| UsageError::Database { path: path.clone(), source };
        let file = opened.map_err(failed)?;
        let identities = Mutex::new(identities(&file).map_err(failed)?);
        Ok(Self { pending: Mutex::default(), file: Mutex::new(file), identities, failing: AtomicBool::new(false) })
    }

    /// Counts a release to `host` that used these keys.
    pub fn released(&self, host: Option<&str>, keys: &[KeyRef], now: i64) {
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

    /// Records a health certificate of `host` over this identity key. Returns the previous identity key if it was
    /// another one.
    pub fn attested(&self, host: &str, identity_key: Option<&str>, now: i64) -> Option<String> {
        self.pending().note(host, |seen| seen.attestation = Some(now));
        let key = identity_key?;
        let mut known = lock(&self.identities);
        let before = match known.get_mut(&host.to_ascii_lowercase()) {
            Some(before) if before == key => return None,
            Some(before) => Some(std::mem::replace(before, key.to_owned())),
            None => known.insert(host.to_ascii_lowercase(), key.to_owned()),
        };
        self.pending().identities.insert(host.to_ascii_lowercase(), key.to_owned());
        before
    }

    /// Writes the counts. Blocks on the file. Counts that cannot be written are kept for the next time.
    pub fn flush(&self, now: i64) {
        let pending = std::mem::take(&mut *self.pending());
        if pending.keys.is_empty() && pending.hosts.is_empty() && pending.identities.is_empty() {
            return;
        }
        let written = write(&mut self.file(), &pending, now / DAY);
        let failed = self.failing.swap(written.is_err(), Ordering::Relaxed);
        if let Err(error) = written {
            if !failed {
                tracing::warn!(
                    %error,
                    "the usage counts of keys cannot be written; trying again; a restart replaces a damaged file (this is \
                     logged once)"
                );
            }
            self.pending().put_back(pending);
        }
    }

    /// Releases that used a key in the last [`DAYS`] days. Blocks on the file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn releases(&self, now: i64) -> rusqlite::Result<Releases> {
        self.flush(now);
        let file = self.file();
        let since: i64 = file.query_row("SELECT coalesce(max(at), 0) FROM begun", [], |row| row.get(0))?;
        let mut statement =
            file.prepare_cached("SELECT key_id, SUM(count) FROM releases WHERE day > ?1 GROUP BY key_id")?;
        let rows = statement.query_map([now / DAY - DAYS], |row| {
            Ok((row.get(0)?, u64::try_from(row.get::<_, i64>(1)?).unwrap_or_default()))
        })?;
        let by_key = rows.collect::<rusqlite::Result<_>>()?;
        Ok(Releases { by_key, since: Some(since).filter(|since| *since > now - DAYS * DAY) })
    }

    /// When hosts were last served, by name in lower case. Blocks on the file.
    ///
    /// # Errors
    /// The file cannot be read.
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

    /// The saved wrapping sets, by decreasing demand. Blocks on the file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn sets(&self) -> rusqlite::Result<Vec<RememberedSet>> {
        let file = self.file();
        let mut statement = file.prepare("SELECT document, releases FROM sets ORDER BY releases DESC")?;
        let rows = statement.query_map([], |row| Ok(RememberedSet { document: row.get(0)?, releases: row.get(1)? }))?;
        rows.collect()
    }

    /// Replaces the saved wrapping sets: the name of each, its demand, and its document. Blocks on the file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn remember_sets<D: FnOnce() -> Vec<u8>>(
        &self,
        sets: impl IntoIterator<Item = ([u8; 32], f64, D)>,
        now: i64,
    ) -> rusqlite::Result<()> {
        let mut file = self.file();
        let transaction = file.transaction()?;
        // A number that distinguishes this write, independent of the clock.
        let writing = transaction.query_row("SELECT coalesce(max(written), 0) + 1 FROM sets", [], |row| row.get(0))?;
        let writing = now.max(writing);
        for (identity, releases, document) in sets {
            let known = transaction
                .prepare_cached("UPDATE sets SET releases = ?2, written = ?3 WHERE identity = ?1")?
                .execute(params![identity, releases, writing])?;
            if known == 0 {
                transaction
                    .prepare_cached("INSERT INTO sets (identity, document, releases, written) VALUES (?1, ?2, ?3, ?4)")?
                    .execute(params![identity, document(), releases, writing])?;
            }
        }
        transaction.execute("DELETE FROM sets WHERE written < ?1", [writing])?;
        transaction.commit()
    }

    /// Deletes a removed host's record, because another host may get its name. Blocks on the file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn forget_host(&self, name: &str) -> rusqlite::Result<()> {
        let mut pending = self.pending();
        pending.hosts.retain(|pending, _| !pending.eq_ignore_ascii_case(name));
        pending.identities.retain(|pending, _| !pending.eq_ignore_ascii_case(name));
        drop(pending);
        lock(&self.identities).remove(&name.to_ascii_lowercase());
        let file = self.file();
        file.execute("DELETE FROM identities WHERE name = ?1", [name])?;
        file.execute("DELETE FROM hosts WHERE name = ?1", [name]).map(drop)
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        lock(&self.pending)
    }

    fn file(&self) -> MutexGuard<'_, Connection> {
        lock(&self.file)
    }
}

impl Drop for Usage {
    fn drop(&mut self) {
        self.flush(crate::sys::clock::unix_now());
    }
}

impl Pending {
    /// The name is copied only for a new entry.
    fn note(&mut self, host: &str, note: impl FnOnce(&mut Seen)) {
        match self.hosts.get_mut(host) {
            Some(seen) => note(seen),
            None => note(self.hosts.entry(host.to_owned()).or_default()),
        }
    }

    /// Newer counts take precedence.
    fn put_back(&mut self, older: Self) {
        for (key, count) in older.keys {
            *self.keys.entry(key).or_default() += count;
        }
        for (host, seen) in older.hosts {
            let newer = self.hosts.entry(host).or_default();
            newer.attestation = newer.attestation.or(seen.attestation);
            newer.release = newer.release.or(seen.release);
        }
        for (host, identity) in older.identities {
            self.identities.entry(host).or_insert(identity);
        }
    }
}

/// A key's name in the file: its `CKA_ID`, which is not unique, and a part that identifies its public key.
fn name_of(key: &KeyRef) -> Vec<u8> {
    [key.id.0.as_slice(), key.public.as_bytes()].concat()
}

/// Opens the file and checks that it is intact. Creates a missing file.
fn connect(path: &Path, now: i64) -> rusqlite::Result<Connection> {
    // SQLite would create it with the umask's mode. Ignore errors here: SQLite reports them.
    let _ = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    let mut file = Connection::open(path)?;
    file.busy_timeout(Duration::from_secs(1))?;
    // A power failure may lose some counts, but must not damage the file.
    file.execute_batch("PRAGMA synchronous = NORMAL")?;
    let found: String = file.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if found != "ok" {
        let damaged = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
        return Err(rusqlite::Error::SqliteFailure(damaged, Some(found)));
    }
    let transaction = file.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let is_new = !transaction.table_exists(None, "releases")?;
    transaction.execute_batch(
        "CREATE TABLE IF NOT EXISTS releases (
             key_id BLOB NOT NULL, day INTEGER NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (key_id, day)
         ) STRICT, WITHOUT ROWID;
         CREATE TABLE IF NOT EXISTS hosts (
             name TEXT NOT NULL COLLATE NOCASE PRIMARY KEY, attestation INTEGER, release INTEGER
         ) STRICT, WITHOUT ROWID;
         CREATE TABLE IF NOT EXISTS identities (
             name TEXT NOT NULL COLLATE NOCASE PRIMARY KEY, sha256 TEXT NOT NULL
         ) STRICT, WITHOUT ROWID;
         CREATE TABLE IF NOT EXISTS sets (
             identity BLOB NOT NULL PRIMARY KEY, document BLOB NOT NULL, releases REAL NOT NULL, written INTEGER NOT NULL
         ) STRICT;
         CREATE TABLE IF NOT EXISTS begun (at INTEGER NOT NULL) STRICT;",
    )?;
    // A file without this table is older, so it has counted for long enough.
    if is_new {
        transaction.execute("INSERT INTO begun (at) VALUES (?1)", [now])?;
    }
    transaction.commit()?;
    Ok(file)
}

/// The last certified identity keys of hosts.
fn identities(file: &Connection) -> rusqlite::Result<HashMap<String, String>> {
    let mut statement = file.prepare("SELECT name, sha256 FROM identities")?;
    let rows = statement.query_map([], |row| Ok((row.get::<_, String>(0)?.to_ascii_lowercase(), row.get(1)?)))?;
    rows.collect()
}

pub(crate) fn is_damage(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// Renames the file together with SQLite's auxiliary files: the new file must not use a journal of the old one.
pub(crate) fn move_aside(path: &Path, now: i64) -> io::Result<PathBuf> {
    let beside = |path: &Path, end: &str| {
        let mut name = OsString::from(path);
        name.push(end);
        PathBuf::from(name)
    };
    let aside = beside(path, &format!(".damaged-{now}"));
    for end in ["-journal", "-wal", "-shm"] {
        match std::fs::rename(beside(path, end), beside(&aside, end)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    std::fs::rename(path, &aside)?;
    Ok(aside)
}

fn write(file: &mut Connection, pending: &Pending, today: i64) -> rusqlite::Result<()> {
    let transaction = file.transaction()?;
    for (key, count) in &pending.keys {
        transaction
            .prepare_cached(
                "INSERT INTO releases (key_id, day, count) VALUES (?1, ?2, ?3)
                 ON CONFLICT DO UPDATE SET count = count + excluded.count",
            )?
            .execute(params![name_of(key), today, i64::try_from(*count).unwrap_or(i64::MAX)])?;
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
    for (host, identity) in &pending.identities {
        transaction
            .prepare_cached(
                "INSERT INTO identities (name, sha256) VALUES (?1, ?2) ON CONFLICT DO UPDATE SET sha256 = excluded.sha256",
            )?
            .execute([host, identity])?;
    }
    transaction.execute("DELETE FROM releases WHERE day < ?1", [today - KEPT_DAYS])?;
    transaction.commit()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use claviger_hsm::KeyId;

    fn key(id: u8, modulus: &[u8]) -> KeyRef {
        KeyRef::new(KeyId(vec![id]), modulus)
    }

    #[test]
    fn keys_of_one_id_are_counted_apart() {
        let folder = tempfile::tempdir().unwrap();
        let usage = Usage::open(folder.path(), 0).unwrap();
        let [one, other, never] = [b"n", b"m", b"o"].map(|modulus| key(1, modulus));
        usage.released(None, &[one.clone(), other.clone()], 1);
        usage.released(None, std::slice::from_ref(&one), 2);
        let found = usage.releases(3).unwrap();
        assert_eq!([&one, &other, &never].map(|key| found.of(key)), [2, 1, 0]);
        // Counted by a version that identified keys by their ids only.
        usage.file().execute("INSERT INTO releases (key_id, day, count) VALUES (x'01', 0, 5)", []).unwrap();
        let found = usage.releases(3).unwrap();
        assert_eq!([&one, &other, &never].map(|key| found.of(key)), [7, 6, 5]);
    }

    #[test]
    fn counts_survive_and_grow_old() {
        let folder = tempfile::tempdir().unwrap();
        let keys = [key(1, b"n"), key(2, b"n")];
        let now = 1000 * DAY;
        let usage = Usage::open(folder.path(), 0).unwrap();
        usage.released(Some("Node"), &keys, now);
        usage.released(Some("Node"), &keys[..1], now + 1);
        assert_eq!(usage.attested("other", Some("a"), now), None);
        usage.flush(now);
        usage.released(None, &keys[..1], now + DAY);
        let found = |by_key: &[(&KeyRef, u64)]| Releases {
            by_key: by_key.iter().map(|(key, count)| (name_of(key), *count)).collect(),
            since: None,
        };
        assert_eq!(usage.releases(now + DAY).unwrap(), found(&[(&keys[0], 3), (&keys[1], 1)]));
        drop(usage);
        let usage = Usage::open(folder.path(), now).unwrap();
        assert_eq!(usage.releases(now + DAYS * DAY).unwrap(), found(&[(&keys[0], 1)]));
        let hosts = usage.hosts(now).unwrap();
        assert_eq!(hosts["node"], Seen { attestation: None, release: Some(now + 1) });
        assert_eq!(hosts["other"], Seen { attestation: Some(now), release: None });
        assert_eq!(usage.attested("node", None, now + 5), None);
        assert_eq!(usage.hosts(now).unwrap()["node"], Seen { attestation: Some(now + 5), release: Some(now + 1) });
        usage.forget_host("NODE").unwrap();
        assert_eq!(usage.hosts(now).unwrap().len(), 1);
    }

    #[test]
    fn another_identity_key_is_noticed_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let usage = Usage::open(folder.path(), 0).unwrap();
        assert_eq!(usage.attested("Node", Some("a"), 1), None, "the first one is no change");
        assert_eq!(usage.attested("node", Some("a"), 2), None);
        assert_eq!(usage.attested("node", Some("b"), 3), Some("a".to_owned()));
        drop(usage);
        let usage = Usage::open(folder.path(), 0).unwrap();
        assert_eq!(usage.attested("NODE", Some("b"), 4), None);
        assert_eq!(usage.attested("node", Some("c"), 5), Some("b".to_owned()));
        usage.forget_host("node").unwrap();
        assert_eq!(usage.attested("node", Some("d"), 6), None, "another host got the name");
    }

    #[test]
    fn what_cannot_be_written_is_not_lost() {
        let folder = tempfile::tempdir().unwrap();
        let usage = Usage::open(folder.path(), 0).unwrap();
        let key = key(1, b"n");
        usage.file().execute_batch("ALTER TABLE releases RENAME TO away").unwrap();
        usage.released(Some("a"), std::slice::from_ref(&key), 1);
        usage.flush(2);
        usage.released(Some("a"), std::slice::from_ref(&key), 3);
        usage.file().execute_batch("ALTER TABLE away RENAME TO releases").unwrap();
        assert_eq!(usage.releases(4).unwrap().of(&key), 2);
        assert_eq!(usage.hosts(4).unwrap()["a"].release, Some(3));
    }

    #[test]
    fn a_damaged_file_is_moved_aside_and_counts_begin_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (path, key, now) = (folder.path().join("usage.db"), key(1, b"n"), 1000 * DAY + 7);
        let names = || {
            let entries = std::fs::read_dir(folder.path()).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        let usage = Usage::open(folder.path(), 0).unwrap();
        for number in 0..2000u32 {
            usage.released(None, &[KeyRef::new(KeyId(number.to_be_bytes().to_vec()), b"n")], now);
        }
        drop(usage);
        let whole = std::fs::read(&path).unwrap();
        let torn = [&whole[..whole.len() - 5000], &[0xff; 5000][..]].concat();
        for (at, damaged) in [(1, b"no database at all, but long enough".repeat(50)), (2, torn)] {
            let at = now + at;
            std::fs::write(&path, &damaged).unwrap();
            let usage = Usage::open(folder.path(), at).unwrap();
            let aside = format!("usage.db.damaged-{at}");
            assert_eq!(std::fs::read(folder.path().join(&aside)).unwrap(), damaged);
            usage.released(None, std::slice::from_ref(&key), at);
            let found = usage.releases(at + DAY).unwrap();
            assert_eq!((found.of(&key), found.since), (1, Some(at)));
            assert!(found.are_all_since(at) && !found.are_all_since(at - 1));
            drop(usage);
            // The new file works like any other and says since when it counts.
            let usage = Usage::open(folder.path(), at + DAY).unwrap();
            assert_eq!(usage.releases(at + DAY).unwrap().since, Some(at));
            assert_eq!(usage.releases(at + DAYS * DAY).unwrap().since, None);
        }
        assert_eq!(names().len(), 1 + 2, "{:?}", names());
        // A file that only cannot be opened is not moved.
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        let error = Usage::open(folder.path(), now).err().unwrap().to_string();
        assert!(error.contains("usage.db cannot be opened"), "{error}");
        assert!(path.is_dir());
    }
}
