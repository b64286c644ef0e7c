//! The state in one SQLite file.
//!
//! Several daemons on one machine may open it: an old one that has not ended yet and its successor, or two that share a
//! state folder with different sockets (the socket is locked, not the state). So every change is decided inside an
//! IMMEDIATE transaction, on the contents of the file at that time. The contents are cached in memory until SQLite
//! reports a write by another connection.

mod rows;
mod schema;
mod view;

use std::cell::RefCell;
use std::fs::{DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, OptionalExtension, TransactionBehavior, params};
use tokio::sync::watch;

use super::backend::{Condition, Decision, Store};
use super::baselines::RESERVATION_ON_ONE_MACHINE;
use super::contents::Contents;
use super::error::StateError;
use schema::{MIGRATIONS, migrate};

/// How long a call waits for another daemon that is writing.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The open file: one connection, used by one caller at a time.
#[derive(Debug)]
pub(super) struct Sqlite {
    path: PathBuf,
    connection: Connection,
    known: Known,
    /// Device and inode of the open file; `None` for a read-only view.
    identity: Option<(u64, u64)>,
}

/// The contents as last read or written, and SQLite's counter of other connections' writes at that time.
#[derive(Debug, Default)]
struct Known(RefCell<Option<(i64, Arc<Contents>)>>);

/// Creates the state folder with mode 0700 if it is missing.
///
/// # Errors
/// [`StateError::File`].
pub(super) fn make_folder(folder: &Path) -> Result<(), StateError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|source| StateError::File { path: folder.to_owned(), source })
}

impl Sqlite {
    /// Opens `state.db` in `folder`. A missing folder is created with mode 0700, a missing file with 0600.
    ///
    /// # Errors
    /// [`StateError::TooNew`], [`StateError::File`] or [`StateError::Database`].
    pub(super) fn open(folder: &Path) -> Result<Self, StateError> {
        let file = |path: &Path, source| StateError::File { path: path.to_owned(), source };
        make_folder(folder)?;
        let path = folder.join("state.db");
        // SQLite would create it with the umask's mode. Its journal files get the mode of this file.
        let made = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        let metadata = made.and_then(|made| made.metadata()).map_err(|error| file(&path, error))?;
        let identity = Some((metadata.dev(), metadata.ino()));
        let database = |source| StateError::Database { path: path.clone(), source };
        let mut connection = Connection::open(&path).map_err(database)?;
        configure(&connection).map_err(database)?;
        migrate(&mut connection, &path, MIGRATIONS)?;
        Ok(Self { path, connection, known: Known::default(), identity })
    }

    /// SQLite would continue with a deleted file. Then a host that was removed there would be back after a restart.
    fn must_be_in_place(&self) -> Result<(), StateError> {
        let Some(identity) = self.identity else { return Ok(()) };
        let there = self.path.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
        if there.is_ok_and(|there| there == identity) {
            return Ok(());
        }
        Err(StateError::Replaced { path: self.path.clone() })
    }

    fn database(&self, source: rusqlite::Error) -> StateError {
        StateError::Database { path: self.path.clone(), source }
    }
}

impl Known {
    /// The contents of the file. They are read only if another connection has written since the last time.
    fn current(&self, connection: &Connection, path: &Path) -> rusqlite::Result<Arc<Contents>> {
        // Read the counter first: after a write in between, the contents are newer than their counter and are just read
        // again.
        let version = data_version(connection)?;
        if let Some((at, contents)) = &*self.0.borrow()
            && *at == version
            && contents.is_whole()
        {
            return Ok(Arc::clone(contents));
        }
        let contents = Arc::new(rows::read(connection, path)?);
        *self.0.borrow_mut() = Some((version, Arc::clone(&contents)));
        Ok(contents)
    }
}

impl Store for Sqlite {
    fn contents(&self) -> Result<Arc<Contents>, StateError> {
        self.must_be_in_place()?;
        self.known.current(&self.connection, &self.path).map_err(|error| self.database(error))
    }

    fn change(&mut self, decide: Decision<'_>) -> Result<(), StateError> {
        self.must_be_in_place()?;
        let Self { path, connection, known, .. } = self;
        let database = |source| StateError::Database { path: path.clone(), source };
        // This transaction holds the write lock from its start, so the basis of the decision stays valid.
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(database)?;
        let before = known.current(&transaction, path).map_err(database)?;
        let mut after = Contents::clone(&before);
        decide(&mut after)?;
        let delta = after.delta_since(&before);
        if delta.is_empty() {
            return Ok(());
        }
        // After a failure of SQLite, it is unknown what was written, so the contents are read again.
        let version = known.0.take().map(|(version, _)| version);
        rows::write(&transaction, &delta).map_err(database)?;
        transaction.commit().map_err(database)?;
        after.settle(&delta);
        known.0.replace(version.map(|version| (version, Arc::new(after))));
        Ok(())
    }

    fn baseline_log(&self, name: &str, added: i64) -> Result<Option<Vec<u8>>, StateError> {
        let found = self
            .connection
            .prepare_cached("SELECT log FROM baselines WHERE name = ?1 AND added = ?2")
            .and_then(|mut statement| statement.query_row(params![name, added], |row| row.get(0)).optional());
        Ok(found.map_err(|error| self.database(error))?.flatten())
    }

    fn reservation(&self) -> i64 {
        RESERVATION_ON_ONE_MACHINE
    }

    fn confirmed(&self) -> Option<Instant> {
        None
    }

    fn another(&self) -> Option<Box<dyn Store>> {
        None
    }

    fn condition(&self) -> Option<Condition> {
        None
    }

    fn changes(&self) -> Option<watch::Receiver<()>> {
        None
    }
}

fn configure(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // Changing the journal mode needs exclusive access, for which SQLite's busy timeout does not wait.
    let deadline = Instant::now() + BUSY_TIMEOUT;
    loop {
        match connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get::<_, String>(0)) {
            Ok(_) => break,
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error),
        }
    }
    connection.execute_batch("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA trusted_schema = OFF;")
}

fn data_version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("PRAGMA data_version", [], |row| row.get(0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::records::sha256_hex;
    use super::super::tests::message;
    use super::super::{Certificate, Labels, State};
    use super::*;
    use claviger_protocol::tpm::pcr::PcrValues;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn what_it_makes_is_private_and_survives() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("a/state");
        let mut state = State::open(&at).unwrap();
        let added = state.add_host("Host-1.example", b"spki", &Labels::default(), 7).unwrap();
        assert_eq!(mode(&at), 0o700);
        for file in ["state.db", "state.db-wal", "state.db-shm"] {
            assert_eq!(mode(&at.join(file)), 0o600, "{file}");
        }
        drop(state);
        assert_eq!(State::open(&at).unwrap().hosts().unwrap(), std::slice::from_ref(&added));
        assert_eq!(added.spki_sha256, sha256_hex(b"spki"));
        assert_eq!((added.enabled, added.added), (true, 7));
        let store = Sqlite::open(&at).unwrap();
        let pragma = |name: &str| -> String {
            let sql = format!("SELECT CAST(v AS TEXT) FROM (SELECT {name} AS v FROM pragma_{name})");
            store.connection.query_row(&sql, [], |row| row.get(0)).unwrap()
        };
        assert_eq!((pragma("journal_mode"), pragma("synchronous")), ("wal".to_owned(), "2".to_owned()));
        assert_eq!(pragma("foreign_keys"), "1");
    }

    #[test]
    fn a_file_that_was_removed_or_replaced_takes_no_change() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("a/state");
        let mut state = State::open(&at).unwrap();
        state.add_host("a", b"a", &Labels::default(), 1).unwrap();
        let (file, aside) = (at.join("state.db"), at.join("aside"));
        std::fs::rename(&file, &aside).unwrap();
        assert!(message(state.remove_host("a")).contains("was removed or replaced"));
        assert!(message(state.changed()).contains("was removed or replaced"));
        std::fs::copy(&aside, &file).unwrap();
        assert!(message(state.remove_host("a")).contains("was removed or replaced"));
        // The same file is in its place again.
        std::fs::rename(&aside, &file).unwrap();
        state.remove_host("a").unwrap();
        assert!(state.changed().unwrap());
    }

    #[test]
    fn daemons_that_start_and_write_at_the_same_time_all_succeed() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for daemon in 0..4 {
                let folder = folder.path();
                scope.spawn(move || {
                    let mut state = State::open(folder).unwrap();
                    for number in 0..5 {
                        let name = format!("host-{daemon}-{number}");
                        state.add_host(&name, name.as_bytes(), &Labels::default(), 1).unwrap();
                    }
                });
            }
        });
        assert_eq!(State::open(folder.path()).unwrap().hosts().unwrap().len(), 20);
    }

    #[test]
    fn migrations_run_once_and_a_newer_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut state = State::open(&folder.path().join("a/state")).unwrap();
        let path = folder.path().join("a/state/state.db");
        state.add_host("kept", b"kept", &Labels::default(), 1).unwrap();
        let mut steps = MIGRATIONS.to_vec();
        steps.push("ALTER TABLE hosts ADD COLUMN note TEXT");
        for _ in 0..2 {
            migrate(&mut Connection::open(&path).unwrap(), &path, &steps).unwrap();
        }
        assert_eq!(state.hosts().unwrap().len(), 1);
        drop(state);
        let text = message(State::open(&folder.path().join("a/state")));
        let known = MIGRATIONS.len();
        let expected = format!("has schema version {}, and this program knows only up to {known}", known + 1);
        assert!(text.contains(&expected), "{text}");
    }

    #[test]
    fn a_file_of_the_first_version_keeps_what_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.db");
        let mut old = Connection::open(&path).unwrap();
        migrate(&mut old, &path, &MIGRATIONS[..1]).unwrap();
        old.execute_batch(
            "INSERT INTO hosts (name, spki, spki_sha256, added) VALUES ('a', x'01', 'x', 1);
             INSERT INTO certificates (thumbprint, kind, der, key_id, spki, is_primary, added)
             VALUES ('t', 'signing', x'01', x'02', x'03', 1, 1);",
        )
        .unwrap();
        drop(old);
        let state = State::open(folder.path()).unwrap();
        let (hosts, certificates) = (state.hosts().unwrap(), state.certificates().unwrap());
        assert_eq!((hosts.len(), certificates.len()), (1, 1));
        assert!(hosts[0].enabled && hosts[0].labels.is_empty());
        assert!(certificates[0].is_primary && !certificates[0].is_communications && certificates[0].labels.is_empty());
    }

    #[test]
    fn limits_of_the_second_version_become_those_of_their_keys() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.db");
        let mut old = Connection::open(&path).unwrap();
        migrate(&mut old, &path, &MIGRATIONS[..2]).unwrap();
        old.execute_batch(
            "INSERT INTO certificates (thumbprint, kind, der, key_id, spki, added, labels)
             VALUES ('s', 'encryption', x'01', x'02', x'03', 1, 'a b'), ('t', 'encryption', x'04', x'02', x'03', 1, 'a b'),
                    ('u', 'signing', x'05', x'06', x'07', 1, '');",
        )
        .unwrap();
        drop(old);
        let labels = |c: Certificate| (c.thumbprint, c.labels.to_string());
        let found: Vec<_> =
            State::open(folder.path()).unwrap().certificates().unwrap().into_iter().map(labels).collect();
        let expected = [("t", "a b"), ("s", "a b"), ("u", "")].map(|(t, l)| (t.to_owned(), l.to_owned()));
        assert_eq!(found, expected);
    }

    #[test]
    fn baselines_of_the_fifth_version_stay_and_reserve_their_names_from_then_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.db");
        let mut old = Connection::open(&path).unwrap();
        migrate(&mut old, &path, &MIGRATIONS[..5]).unwrap();
        let mut values = PcrValues::default();
        [0, 4, 7].into_iter().for_each(|pcr| assert!(values.set(pcr, [1; 32])));
        let pcrs = super::super::baselines::values_to_text(&values);
        old.execute("INSERT INTO baselines (name, pcrs, log, added) VALUES ('a', ?1, x'07', 1)", [pcrs]).unwrap();
        drop(old);
        let mut state = State::open(folder.path()).unwrap();
        assert_eq!(state.baselines().unwrap()[0].log.as_deref(), Some(&[7][..]));
        state.remove_baseline("a", 100).unwrap();
        values.set(9, [1; 32]);
        assert_eq!(state.reserved_until("a", &values, 100).unwrap(), Some(100 + RESERVATION_ON_ONE_MACHINE));
        let by_hand = Connection::open(&path).unwrap();
        let found: (i64, String) = by_hand
            .query_row("SELECT user_version, name FROM pragma_user_version, removed_baselines", [], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .unwrap();
        assert_eq!(found, (6, "a".to_owned()));
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        let text = message(State::open(&folder.path().join("file/state")));
        assert!(text.contains("file/state cannot be made or opened"), "{text}");
    }

    #[test]
    fn a_stored_baseline_that_lacks_values_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut state = State::open(folder.path()).unwrap();
        let mut values = PcrValues::default();
        [0, 4, 7].into_iter().for_each(|pcr| assert!(values.set(pcr, [1; 32])));
        state.add_baseline("a", &values, None, 7).unwrap();
        state.add_host("a", b"a", &Labels::default(), 1).unwrap();
        for pcrs in ["", "0=0101010101010101010101010101010101010101010101010101010101010101"] {
            let by_hand = Connection::open(folder.path().join("state.db")).unwrap();
            by_hand.execute("UPDATE baselines SET pcrs = ?1", [pcrs]).unwrap();
            assert!(message(state.baselines()).contains("is missing"), "{pcrs:?}");
            assert!(state.baselines_without_logs().is_err() && state.baseline_by_name("a").is_err());
            assert!(
                message(state.add_baseline("b", &values, None, 7)).contains("the baselines in"),
                "nothing is decided"
            );
            // The other tables can still be read and changed.
            assert_eq!(state.hosts().unwrap().len(), 1);
            state.enable_host("a", false).unwrap();
        }
    }

    #[test]
    fn a_log_stays_with_its_baseline_when_that_is_disabled() {
        let folder = tempfile::tempdir().unwrap();
        let mut state = State::open(folder.path()).unwrap();
        let mut values = PcrValues::default();
        [0, 4, 7].into_iter().for_each(|pcr| assert!(values.set(pcr, [1; 32])));
        state.add_baseline("a", &values, Some(b"log"), 7).unwrap();
        state.enable_baseline("a", false).unwrap();
        drop(state);
        let mut state = State::open(folder.path()).unwrap();
        state.enable_baseline("A", true).unwrap();
        assert_eq!(state.baseline_log("a", 7).unwrap().as_deref(), Some(&b"log"[..]));
        assert_eq!(state.remove_baseline("a", 8).unwrap().log.as_deref(), Some(&b"log"[..]));
        assert_eq!(state.baseline_log("a", 7).unwrap(), None);
    }
}
