//! What must survive a restart: registered hosts, baselines, key-protection certificates and attestation signers.
//!
//! One SQLite file. Several daemons of one machine may have it open: an old one that has not quite ended and its successor, or
//! two that share a state folder and have a folder of sockets each (what is locked is the socket, not the state). So every
//! write is an IMMEDIATE transaction of its own, and [`State::changed`] tells a daemon when to load its snapshot again.
//! Over a network the file cannot be shared; services on different machines are brought together by export and import.
//! Nothing here is on the path of a release: callers keep a snapshot in memory. All calls block on the file, so async callers use `spawn_blocking`; they bring the lock
//! that makes it one at a time, so that a change and the reading that follows it can be one step.
//!
//! Times are seconds since 1970 (UTC) and come from the caller.

mod baselines;
mod certificates;
mod hosts;
mod import;
mod labels;
mod schema;
mod signers;
pub mod usage_counts;
mod view;

use std::fs::{DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use data_encoding::HEXLOWER;
use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, Transaction, TransactionBehavior};

pub use baselines::{Baseline, MAX_BASELINES, check_baseline_name};
pub use certificates::{Certificate, Kind, NewCertificate};
pub use hosts::{Host, HostKind, check_host_name};
pub use import::{Import, Merged};
pub use labels::Labels;
use schema::{MIGRATIONS, migrate};
pub use signers::{NewSigner, RevokedSigner, Signer};
pub use view::View;

/// How long a call waits for another daemon that is writing.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest public key or certificate that is stored, in octets of DER.
const DER_LIMIT: usize = 64 * 1024;

/// Why the state could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// What was given cannot be stored; the text says what would be right.
    #[error("{0}")]
    Invalid(String),
    /// What was given contradicts what is stored; the text says with what.
    #[error("{0}")]
    Conflict(String),
    /// What was named is not there.
    #[error("{0}")]
    NotFound(String),
    /// What was given was revoked here.
    #[error("{0}")]
    Revoked(String),
    /// The file was written by a newer version of this program.
    #[error("{} has schema version {found}, and this program knows only up to {known}; run the version that wrote it, or a newer one", path.display())]
    TooNew {
        /// The database file.
        path: PathBuf,
        /// Its schema version.
        found: i64,
        /// The newest schema version that this program knows.
        known: i64,
    },
    /// The folder or file cannot be made or opened.
    #[error("{} cannot be made or opened: {source}; check that the daemon's user owns the state folder", path.display())]
    File {
        /// The folder or file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// Another file stands in the place of the one that is open, or none: what is written to the open one is lost.
    #[error("{} is not the file that this daemon opened: it was removed or replaced; start the daemon again", path.display())]
    Replaced {
        /// The database file.
        path: PathBuf,
    },
    /// SQLite refused a call: disk full, file damaged, or locked by another process for more than 5 seconds.
    #[error("the state in {} cannot be used: {source}; check the disk, and that no other program holds the file", path.display())]
    Database {
        /// The database file.
        path: PathBuf,
        /// What SQLite says.
        source: rusqlite::Error,
    },
}

/// The open state file: one connection, used by one caller at a time.
#[derive(Debug)]
pub struct State {
    path: PathBuf,
    connection: Connection,
    /// SQLite's count of others' writes, which leaves out those of this connection, as the last snapshot saw it.
    seen: i64,
    /// Whether this connection wrote since the last snapshot.
    wrote: bool,
    /// Device and inode of the open file; `None` where nothing is written.
    identity: Option<(u64, u64)>,
}

impl State {
    /// Opens `state.db` in `folder`. A folder that is missing is made with mode 0700, the file with 0600.
    ///
    /// # Errors
    /// [`StateError::TooNew`], [`StateError::File`] or [`StateError::Database`].
    pub fn open(folder: &Path) -> Result<Self, StateError> {
        let file = |path: &Path, source| StateError::File { path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|error| file(folder, error))?;
        let path = folder.join("state.db");
        // SQLite would make it with the umask's mode, and gives its journal files the mode of this one.
        let made = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        let metadata = made.and_then(|made| made.metadata()).map_err(|error| file(&path, error))?;
        let identity = Some((metadata.dev(), metadata.ino()));
        let database = |source| StateError::Database { path: path.clone(), source };
        let mut connection = Connection::open(&path).map_err(database)?;
        configure(&connection).map_err(database)?;
        migrate(&mut connection, &path, MIGRATIONS)?;
        let seen = data_version(&connection).map_err(database)?;
        Ok(Self { path, connection, seen, wrote: false, identity })
    }

    /// Whether anybody, this value included, wrote since the last [`State::snapshot`] (or since the file was opened).
    /// Remains so until a snapshot succeeds.
    ///
    /// # Errors
    /// [`StateError::Replaced`], [`StateError::Database`].
    pub fn changed(&self) -> Result<bool, StateError> {
        self.must_be_in_place()?;
        Ok(self.wrote || self.version()? != self.seen)
    }

    /// Reads with `read`; when that succeeds, what was written up to its begin is no change any more.
    ///
    /// # Errors
    /// Those of `read`; [`StateError::Database`].
    pub fn snapshot<T, E: From<StateError>>(&mut self, read: impl FnOnce(&Self) -> Result<T, E>) -> Result<T, E> {
        // Others may write while this one reads: that is to be seen as a change afterwards.
        let version = self.version();
        let value = read(self)?;
        (self.seen, self.wrote) = (version?, false);
        Ok(value)
    }

    /// SQLite goes on with a file that has no name any more, and a host that was removed there would be back after a restart.
    fn must_be_in_place(&self) -> Result<(), StateError> {
        let Some(identity) = self.identity else { return Ok(()) };
        let there = self.path.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
        if there.is_ok_and(|there| there == identity) {
            return Ok(());
        }
        Err(StateError::Replaced { path: self.path.clone() })
    }

    fn version(&self) -> Result<i64, StateError> {
        data_version(&self.connection).map_err(|error| self.database(error))
    }

    fn database(&self, source: rusqlite::Error) -> StateError {
        StateError::Database { path: self.path.clone(), source }
    }

    fn read<T>(
        &self,
        sql: &str,
        parameters: impl rusqlite::Params,
        row: fn(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, StateError> {
        let rows = self
            .connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.query_map(parameters, row)?.collect());
        rows.map_err(|error| self.database(error))
    }

    /// Runs `change` in a transaction that holds the write lock from its start, so what it read stays true.
    fn write<T>(&mut self, change: impl FnOnce(&Transaction<'_>) -> Result<T, WriteError>) -> Result<T, StateError> {
        self.transact(true, |transaction| Ok((change(transaction)?, true)))
    }

    /// The same for a `change` that says whether to keep what it did; when it only tries it is not to `apply` anything.
    fn transact<T>(
        &mut self,
        apply: bool,
        change: impl FnOnce(&Transaction<'_>) -> Result<(T, bool), WriteError>,
    ) -> Result<T, StateError> {
        self.must_be_in_place()?;
        let done = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(WriteError::from)
            .and_then(|transaction| {
                let (value, keep) = change(&transaction)?;
                // Dropped, it undoes what was only tried.
                if apply && keep {
                    transaction.commit()?;
                }
                Ok(value)
            });
        // When SQLite fails nobody knows how far it came; a refusal changed nothing.
        self.wrote |= apply && !matches!(done, Err(WriteError::State(_)));
        done.map_err(|error| match error {
            WriteError::State(error) => error,
            WriteError::Sqlite(error) => self.database(error),
        })
    }
}

/// What can go wrong inside a transaction, where the file's path is not at hand.
enum WriteError {
    State(StateError),
    Sqlite(rusqlite::Error),
}

impl From<StateError> for WriteError {
    fn from(error: StateError) -> Self {
        Self::State(error)
    }
}

impl From<rusqlite::Error> for WriteError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

fn configure(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // Changing the journal mode needs the file alone, and SQLite does not wait for that by its busy timeout.
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

fn one<T: rusqlite::types::FromSql>(
    transaction: &Transaction<'_>,
    sql: &str,
    parameters: impl rusqlite::Params,
) -> rusqlite::Result<Option<T>> {
    transaction.query_row(sql, parameters, |row| row.get(0)).optional()
}

fn no_host(name: &str) -> StateError {
    StateError::NotFound(format!("no host {name:?} is registered"))
}

/// Labels of the column at `index`.
fn read_labels(row: &Row<'_>, index: usize) -> rusqlite::Result<Labels> {
    row.get::<_, String>(index)?.parse().map_err(|error: StateError| {
        rusqlite::Error::FromSqlConversionFailure(index, rusqlite::types::Type::Text, Box::new(error))
    })
}

fn check_der(what: &str, der: &[u8]) -> Result<(), StateError> {
    if (1..=DER_LIMIT).contains(&der.len()) {
        return Ok(());
    }
    Err(StateError::Invalid(format!("{what} has 1 to {DER_LIMIT} octets of DER, not {}", der.len())))
}

fn check_key_id(key_id: &[u8]) -> Result<(), StateError> {
    if (1..=255).contains(&key_id.len()) {
        return Ok(());
    }
    Err(StateError::Invalid(format!("a key's CKA_ID has 1 to 255 octets, not {}", key_id.len())))
}

fn sha256_hex(bytes: &[u8]) -> String {
    HEXLOWER.encode(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    pub(super) fn open() -> (tempfile::TempDir, State) {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(&folder.path().join("a/state")).unwrap();
        (folder, state)
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    pub(super) fn message<T: std::fmt::Debug>(result: Result<T, StateError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn what_it_makes_is_private_and_survives() {
        let (folder, mut state) = open();
        let at = folder.path().join("a/state");
        let added = state.add_host("Host-1.example", b"spki", &Labels::default(), 7).unwrap();
        assert_eq!(mode(&at), 0o700);
        for file in ["state.db", "state.db-wal", "state.db-shm"] {
            assert_eq!(mode(&at.join(file)), 0o600, "{file}");
        }
        drop(state);
        let state = State::open(&at).unwrap();
        assert_eq!(state.hosts().unwrap(), std::slice::from_ref(&added));
        assert_eq!(added.spki_sha256, sha256_hex(b"spki"));
        assert_eq!((added.enabled, added.added), (true, 7));
        let pragma = |name: &str| -> String {
            let sql = format!("SELECT CAST(v AS TEXT) FROM (SELECT {name} AS v FROM pragma_{name})");
            state.connection.query_row(&sql, [], |row| row.get(0)).unwrap()
        };
        assert_eq!((pragma("journal_mode"), pragma("synchronous")), ("wal".to_owned(), "2".to_owned()));
        assert_eq!(pragma("foreign_keys"), "1");
    }

    #[test]
    fn a_change_by_anybody_is_noticed_until_it_was_read() {
        let (folder, mut ours) = open();
        let mut theirs = State::open(&folder.path().join("a/state")).unwrap();
        let read = |state: &State| state.hosts().map(|hosts| hosts.len());
        assert!(!ours.changed().unwrap());
        theirs.add_host("a", b"a", &Labels::default(), 1).unwrap();
        assert_eq!((ours.changed().unwrap(), ours.changed().unwrap()), (true, true));
        // A reading that fails has seen nothing.
        assert!(ours.snapshot(|_| Err::<(), _>(StateError::Invalid("on purpose".to_owned()))).is_err());
        assert!(ours.changed().unwrap());
        assert_eq!((ours.snapshot(read).unwrap(), ours.changed().unwrap()), (1, false));
        ours.add_host("b", b"b", &Labels::default(), 1).unwrap();
        assert_eq!((ours.changed().unwrap(), ours.snapshot(read).unwrap(), ours.changed().unwrap()), (true, 2, false));
        assert!(theirs.changed().unwrap());
        assert!(ours.add_host("b", b"c", &Labels::default(), 1).is_err());
        assert!(!ours.changed().unwrap(), "a refusal is no change");
        // What is written while it reads is a change after it.
        let counted = ours.snapshot(|state| {
            theirs.add_host("c", b"c", &Labels::default(), 1)?;
            read(state)
        });
        assert_eq!((counted.unwrap(), ours.changed().unwrap()), (3, true));
    }

    #[test]
    fn a_file_that_was_removed_or_replaced_takes_no_change() {
        let (folder, mut state) = open();
        let at = folder.path().join("a/state");
        state.add_host("a", b"a", &Labels::default(), 1).unwrap();
        let (file, aside) = (at.join("state.db"), at.join("aside"));
        std::fs::rename(&file, &aside).unwrap();
        assert!(message(state.remove_host("a")).contains("was removed or replaced"));
        assert!(message(state.changed()).contains("was removed or replaced"));
        std::fs::copy(&aside, &file).unwrap();
        assert!(message(state.remove_host("a")).contains("was removed or replaced"));
        // The same file in its place again.
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
        let (folder, mut state) = open();
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
    fn a_folder_that_cannot_be_made_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        let text = message(State::open(&folder.path().join("file/state")));
        assert!(text.contains("file/state cannot be made or opened"), "{text}");
    }
}
