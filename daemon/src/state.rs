//! What must survive a restart: registered hosts, key-protection certificates and attestation signers.
//!
//! One SQLite file, which several daemons of one machine may share: every write is an IMMEDIATE transaction of its own,
//! and [`State::changed`] tells a daemon when to load its snapshot again. Nothing here is on the path of a release:
//! callers keep a snapshot in memory. All calls block on the file, so async callers use `spawn_blocking`; they bring the lock
//! that makes it one at a time, so that a change and the reading that follows it can be one step.
//!
//! Times are seconds since 1970 (UTC) and come from the caller.

use std::fs::{DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use data_encoding::HEXLOWER;
use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, Transaction, TransactionBehavior, params};

/// How long a call waits for another daemon that is writing.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest public key or certificate that is stored, in octets of DER.
const DER_LIMIT: usize = 64 * 1024;

/// Each step brings the schema from the version of its index to the next one. Steps are never changed, only added.
const MIGRATIONS: &[&str] = &["
    CREATE TABLE hosts (
        name TEXT NOT NULL UNIQUE COLLATE NOCASE,
        spki BLOB NOT NULL UNIQUE,
        spki_sha256 TEXT NOT NULL,
        enabled INTEGER NOT NULL DEFAULT 1,
        added INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE certificates (
        thumbprint TEXT NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('signing', 'encryption')),
        der BLOB NOT NULL,
        key_id BLOB NOT NULL,
        spki BLOB NOT NULL,
        is_primary INTEGER NOT NULL DEFAULT 0,
        enabled INTEGER NOT NULL DEFAULT 1,
        added INTEGER NOT NULL,
        UNIQUE (kind, thumbprint),
        CHECK (enabled OR NOT is_primary)
    ) STRICT;
    CREATE UNIQUE INDEX one_primary ON certificates (kind) WHERE is_primary;
    CREATE TABLE attestation_signers (
        thumbprint TEXT NOT NULL UNIQUE,
        der BLOB NOT NULL,
        key_id BLOB NOT NULL,
        not_before INTEGER NOT NULL,
        not_after INTEGER NOT NULL,
        current INTEGER NOT NULL,
        replaced INTEGER,
        CHECK (current = (replaced IS NULL))
    ) STRICT;
    CREATE UNIQUE INDEX one_current ON attestation_signers (current) WHERE current;
"];

/// A host that may attest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its name, unique without regard to case, as it was given.
    pub name: String,
    /// Its public key: DER SubjectPublicKeyInfo, unique.
    pub spki: Vec<u8>,
    /// SHA-256 of [`Host::spki`], 64 lower-case hexadecimal digits.
    pub spki_sha256: String,
    /// Whether it may attest and be given keys.
    pub enabled: bool,
    /// When it was added, seconds since 1970.
    pub added: i64,
}

/// What a key-protection certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// It signs protectors.
    Signing,
    /// Transport keys are encrypted to it.
    Encryption,
}

impl Kind {
    /// `signing` or `encryption`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Signing => "signing",
            Self::Encryption => "encryption",
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Kind {
    type Err = StateError;

    fn from_str(text: &str) -> Result<Self, StateError> {
        match text {
            "signing" => Ok(Self::Signing),
            "encryption" => Ok(Self::Encryption),
            _ => Err(StateError::Invalid(format!(
                "{text:?} is no kind of certificate; use \"signing\" or \"encryption\""
            ))),
        }
    }
}

/// A key-protection certificate whose private key is in the HSMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// SHA-256 of [`Certificate::der`], 64 lower-case hexadecimal digits; names the certificate in commands.
    pub thumbprint: String,
    /// What it is for.
    pub kind: Kind,
    /// The certificate, DER.
    pub der: Vec<u8>,
    /// CKA_ID of its private key on every member.
    pub key_id: Vec<u8>,
    /// Its public key, DER SubjectPublicKeyInfo.
    pub spki: Vec<u8>,
    /// Whether new protectors use it; at most one of a kind is primary, and it is enabled.
    pub is_primary: bool,
    /// Whether protectors that name it are still served.
    pub enabled: bool,
    /// When it was added, seconds since 1970.
    pub added: i64,
}

/// A key-protection certificate that is to be added, enabled.
#[derive(Clone, Copy, Debug)]
pub struct NewCertificate<'a> {
    /// What it is for.
    pub kind: Kind,
    /// The certificate, DER.
    pub der: &'a [u8],
    /// CKA_ID of its private key on every member.
    pub key_id: &'a [u8],
    /// Its public key, DER SubjectPublicKeyInfo.
    pub spki: &'a [u8],
    /// Whether it becomes the primary one of its kind, in place of the one that is.
    pub primary: bool,
}

/// A certificate that issues health certificates, or did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signer {
    /// SHA-256 of [`Signer::der`], 64 lower-case hexadecimal digits.
    pub thumbprint: String,
    /// The certificate, DER.
    pub der: Vec<u8>,
    /// CKA_ID of its private key on every member.
    pub key_id: Vec<u8>,
    /// Start of its validity, seconds since 1970.
    pub not_before: i64,
    /// End of its validity, seconds since 1970.
    pub not_after: i64,
    /// Whether it issues now; exactly one does once there is any.
    pub current: bool,
    /// When another one took its place, seconds since 1970; `None` for the current one.
    pub replaced: Option<i64>,
}

/// A certificate that is to issue health certificates from now on.
#[derive(Clone, Copy, Debug)]
pub struct NewSigner<'a> {
    /// The certificate, DER.
    pub der: &'a [u8],
    /// CKA_ID of its private key on every member.
    pub key_id: &'a [u8],
    /// Start of its validity, seconds since 1970.
    pub not_before: i64,
    /// End of its validity, seconds since 1970.
    pub not_after: i64,
}

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
        OpenOptions::new().create(true).append(true).mode(0o600).open(&path).map_err(|error| file(&path, error))?;
        let database = |source| StateError::Database { path: path.clone(), source };
        let mut connection = Connection::open(&path).map_err(database)?;
        configure(&connection).map_err(database)?;
        migrate(&mut connection, &path, MIGRATIONS)?;
        let seen = data_version(&connection).map_err(database)?;
        Ok(Self { path, connection, seen, wrote: false })
    }

    /// Whether anybody, this value included, wrote since the last [`State::snapshot`] (or since the file was opened).
    /// Remains so until a snapshot succeeds.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn changed(&self) -> Result<bool, StateError> {
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

    /// All hosts, by name.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn hosts(&self) -> Result<Vec<Host>, StateError> {
        self.read("SELECT name, spki, spki_sha256, enabled, added FROM hosts ORDER BY name", [], host)
    }

    /// The host of a name, without regard to case.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn host_by_name(&self, name: &str) -> Result<Option<Host>, StateError> {
        let sql = "SELECT name, spki, spki_sha256, enabled, added FROM hosts WHERE name = ?1";
        Ok(self.read(sql, [name], host)?.pop())
    }

    /// The host of a public key (DER SubjectPublicKeyInfo).
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn host_by_spki(&self, spki: &[u8]) -> Result<Option<Host>, StateError> {
        let sql = "SELECT name, spki, spki_sha256, enabled, added FROM hosts WHERE spki = ?1";
        Ok(self.read(sql, [spki], host)?.pop())
    }

    /// Registers a host, enabled, by its public key (DER SubjectPublicKeyInfo, which the caller has parsed).
    ///
    /// # Errors
    /// [`StateError::Invalid`] for a name that is none, [`StateError::Conflict`] for a name or a key that is registered.
    pub fn add_host(&mut self, name: &str, spki: &[u8], now: i64) -> Result<Host, StateError> {
        check_host_name(name)?;
        check_der("a host's public key", spki)?;
        let host = Host {
            name: name.to_owned(),
            spki: spki.to_owned(),
            spki_sha256: sha256_hex(spki),
            enabled: true,
            added: now,
        };
        self.write(|transaction| {
            if let Some(other) = one::<String>(transaction, "SELECT name FROM hosts WHERE name = ?1", [name])? {
                return Err(StateError::Conflict(format!(
                    "a host {other:?} is registered already; remove it first, or choose another name"
                ))
                .into());
            }
            if let Some(other) = one::<String>(transaction, "SELECT name FROM hosts WHERE spki = ?1", [spki])? {
                return Err(StateError::Conflict(format!(
                    "this key is registered already, as host {other:?}; a host has a key of its own"
                ))
                .into());
            }
            transaction.execute(
                "INSERT INTO hosts (name, spki, spki_sha256, enabled, added) VALUES (?1, ?2, ?3, 1, ?4)",
                params![host.name, host.spki, host.spki_sha256, host.added],
            )?;
            Ok(())
        })?;
        Ok(host)
    }

    /// Removes a host and returns what it was.
    ///
    /// # Errors
    /// [`StateError::NotFound`].
    pub fn remove_host(&mut self, name: &str) -> Result<Host, StateError> {
        self.write(|transaction| {
            let sql = "DELETE FROM hosts WHERE name = ?1 RETURNING name, spki, spki_sha256, enabled, added";
            let removed = transaction.query_row(sql, [name], host).optional()?;
            removed.ok_or_else(|| no_host(name).into())
        })
    }

    /// Enables or disables a host.
    ///
    /// # Errors
    /// [`StateError::NotFound`].
    pub fn enable_host(&mut self, name: &str, enabled: bool) -> Result<(), StateError> {
        self.write(|transaction| {
            match transaction.execute("UPDATE hosts SET enabled = ?2 WHERE name = ?1", params![name, enabled])? {
                0 => Err(no_host(name).into()),
                _ => Ok(()),
            }
        })
    }

    /// All key-protection certificates: by kind, the primary one first, then the newest first.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn certificates(&self) -> Result<Vec<Certificate>, StateError> {
        self.read(
            "SELECT thumbprint, kind, der, key_id, spki, is_primary, enabled, added FROM certificates
             ORDER BY kind, is_primary DESC, added DESC, rowid DESC",
            [],
            certificate,
        )
    }

    /// Adds a key-protection certificate, enabled.
    ///
    /// # Errors
    /// [`StateError::Invalid`] for an empty field, [`StateError::Conflict`] when it is there for this kind already.
    pub fn add_certificate(&mut self, new: &NewCertificate<'_>, now: i64) -> Result<Certificate, StateError> {
        check_der("a certificate", new.der)?;
        check_der("a certificate's public key", new.spki)?;
        check_key_id(new.key_id)?;
        let added = Certificate {
            thumbprint: sha256_hex(new.der),
            kind: new.kind,
            der: new.der.to_owned(),
            key_id: new.key_id.to_owned(),
            spki: new.spki.to_owned(),
            is_primary: new.primary,
            enabled: true,
            added: now,
        };
        let kind = new.kind.as_str();
        self.write(|transaction| {
            let sql = "SELECT 1 FROM certificates WHERE kind = ?1 AND thumbprint = ?2";
            if one::<i64>(transaction, sql, [kind, &added.thumbprint])?.is_some() {
                return Err(StateError::Conflict(format!(
                    "the {kind} certificate {} is there already",
                    added.thumbprint
                ))
                .into());
            }
            if new.primary {
                transaction.execute("UPDATE certificates SET is_primary = 0 WHERE kind = ?1", [kind])?;
            }
            transaction.execute(
                "INSERT INTO certificates (thumbprint, kind, der, key_id, spki, is_primary, enabled, added)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, 1, ?7)",
                params![added.thumbprint, kind, added.der, added.key_id, added.spki, added.is_primary, added.added],
            )?;
            Ok(())
        })?;
        Ok(added)
    }

    /// Makes a certificate the primary one of its kind; the one that was stays enabled.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Conflict`] when it is disabled.
    pub fn set_primary(&mut self, kind: Kind, thumbprint: &str) -> Result<(), StateError> {
        self.write(|transaction| {
            let (_, enabled) = primary_and_enabled(transaction, kind, thumbprint)?;
            if !enabled {
                return Err(StateError::Conflict(format!(
                    "the {kind} certificate {thumbprint} is disabled; enable it before it becomes primary"
                ))
                .into());
            }
            // Two steps, because the index that keeps primaries single is checked row by row.
            transaction.execute("UPDATE certificates SET is_primary = 0 WHERE kind = ?1", [kind.as_str()])?;
            transaction.execute(
                "UPDATE certificates SET is_primary = 1 WHERE kind = ?1 AND thumbprint = ?2",
                [kind.as_str(), thumbprint],
            )?;
            Ok(())
        })
    }

    /// Enables or disables a certificate. The primary one cannot be disabled.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Conflict`] for the primary one.
    pub fn enable_certificate(&mut self, kind: Kind, thumbprint: &str, enabled: bool) -> Result<(), StateError> {
        self.write(|transaction| {
            let (primary, _) = primary_and_enabled(transaction, kind, thumbprint)?;
            if primary && !enabled {
                return Err(is_primary(kind, thumbprint).into());
            }
            transaction.execute(
                "UPDATE certificates SET enabled = ?3 WHERE kind = ?1 AND thumbprint = ?2",
                params![kind.as_str(), thumbprint, enabled],
            )?;
            Ok(())
        })
    }

    /// Removes a certificate (its key stays in the HSMs). The primary one cannot be removed.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; [`StateError::Conflict`] for the primary one.
    pub fn remove_certificate(&mut self, kind: Kind, thumbprint: &str) -> Result<(), StateError> {
        self.write(|transaction| {
            let (primary, _) = primary_and_enabled(transaction, kind, thumbprint)?;
            if primary {
                return Err(is_primary(kind, thumbprint).into());
            }
            transaction
                .execute("DELETE FROM certificates WHERE kind = ?1 AND thumbprint = ?2", [kind.as_str(), thumbprint])?;
            Ok(())
        })
    }

    /// All attestation signers, the current one first, then the latest replaced first.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn signers(&self) -> Result<Vec<Signer>, StateError> {
        self.read(
            "SELECT thumbprint, der, key_id, not_before, not_after, current, replaced FROM attestation_signers
             ORDER BY current DESC, replaced DESC, rowid DESC",
            [],
            signer,
        )
    }

    /// Adds an attestation signer, which becomes the current one; the one that was, is replaced as of `now`.
    ///
    /// # Errors
    /// [`StateError::Invalid`] for an empty field or validity, [`StateError::Conflict`] when it is there already.
    pub fn add_signer(&mut self, new: &NewSigner<'_>, now: i64) -> Result<Signer, StateError> {
        check_der("an attestation signer's certificate", new.der)?;
        check_key_id(new.key_id)?;
        if new.not_before >= new.not_after {
            return Err(StateError::Invalid("an attestation signer's validity ends before it starts".to_owned()));
        }
        let added = Signer {
            thumbprint: sha256_hex(new.der),
            der: new.der.to_owned(),
            key_id: new.key_id.to_owned(),
            not_before: new.not_before,
            not_after: new.not_after,
            current: true,
            replaced: None,
        };
        self.write(|transaction| {
            let sql = "SELECT 1 FROM attestation_signers WHERE thumbprint = ?1";
            if one::<i64>(transaction, sql, [&added.thumbprint])?.is_some() {
                return Err(StateError::Conflict(format!(
                    "the attestation signer {} is there already",
                    added.thumbprint
                ))
                .into());
            }
            transaction.execute("UPDATE attestation_signers SET current = 0, replaced = ?1 WHERE current", [now])?;
            transaction.execute(
                "INSERT INTO attestation_signers (thumbprint, der, key_id, not_before, not_after, current, replaced)
                 VALUES (?1, ?2, ?3, ?4, ?5, 1, NULL)",
                params![added.thumbprint, added.der, added.key_id, added.not_before, added.not_after],
            )?;
            Ok(())
        })?;
        Ok(added)
    }

    /// Forgets the signers that were replaced before `time`, and returns how many those were.
    ///
    /// Health certificates of a replaced signer are good until they expire: `time` is to be at least their longest
    /// validity ago, unless they are to be refused at once.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn forget_signers_before(&mut self, time: i64) -> Result<usize, StateError> {
        self.write(|transaction| {
            Ok(transaction.execute("DELETE FROM attestation_signers WHERE NOT current AND replaced < ?1", [time])?)
        })
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
        let done = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(WriteError::from)
            .and_then(|transaction| {
                let value = change(&transaction)?;
                transaction.commit()?;
                Ok(value)
            });
        // When SQLite fails nobody knows how far it came; a refusal changed nothing.
        self.wrote |= !matches!(done, Err(WriteError::State(_)));
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

fn migrate(connection: &mut Connection, path: &Path, migrations: &[&str]) -> Result<(), StateError> {
    let database = |source| StateError::Database { path: path.to_owned(), source };
    // The version is read inside the transaction: two daemons may start on a new file at the same time.
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(database)?;
    let found: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(database)?;
    let known = i64::try_from(migrations.len()).unwrap_or(i64::MAX);
    if !(0..=known).contains(&found) {
        return Err(StateError::TooNew { path: path.to_owned(), found, known });
    }
    if found == known {
        // Nothing is written: the other daemons would take it for a change.
        return Ok(());
    }
    for (version, step) in (0..).zip(migrations) {
        if version >= found {
            transaction.execute_batch(step).map_err(database)?;
        }
    }
    transaction.pragma_update(None, "user_version", known).map_err(database)?;
    transaction.commit().map_err(database)
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

fn host(row: &Row<'_>) -> rusqlite::Result<Host> {
    Ok(Host {
        name: row.get(0)?,
        spki: row.get(1)?,
        spki_sha256: row.get(2)?,
        enabled: row.get(3)?,
        added: row.get(4)?,
    })
}

fn certificate(row: &Row<'_>) -> rusqlite::Result<Certificate> {
    let kind: String = row.get(1)?;
    Ok(Certificate {
        thumbprint: row.get(0)?,
        kind: kind.parse().map_err(|error: StateError| {
            rusqlite::Error::FromSqlConversionFailure(1, rusqlite::types::Type::Text, Box::new(error))
        })?,
        der: row.get(2)?,
        key_id: row.get(3)?,
        spki: row.get(4)?,
        is_primary: row.get(5)?,
        enabled: row.get(6)?,
        added: row.get(7)?,
    })
}

fn signer(row: &Row<'_>) -> rusqlite::Result<Signer> {
    Ok(Signer {
        thumbprint: row.get(0)?,
        der: row.get(1)?,
        key_id: row.get(2)?,
        not_before: row.get(3)?,
        not_after: row.get(4)?,
        current: row.get(5)?,
        replaced: row.get(6)?,
    })
}

fn primary_and_enabled(
    transaction: &Transaction<'_>,
    kind: Kind,
    thumbprint: &str,
) -> Result<(bool, bool), WriteError> {
    let sql = "SELECT is_primary, enabled FROM certificates WHERE kind = ?1 AND thumbprint = ?2";
    let found =
        transaction.query_row(sql, [kind.as_str(), thumbprint], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
    found.ok_or_else(|| StateError::NotFound(format!("there is no {kind} certificate {thumbprint}")).into())
}

fn is_primary(kind: Kind, thumbprint: &str) -> StateError {
    StateError::Conflict(format!("{thumbprint} is the primary {kind} certificate; make another one primary first"))
}

fn no_host(name: &str) -> StateError {
    StateError::NotFound(format!("no host {name:?} is registered"))
}

/// Whether this can name a host.
///
/// # Errors
/// [`StateError::Invalid`].
pub fn check_host_name(name: &str) -> Result<(), StateError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if (1..=64).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    // As much of it as is needed to recognise it: names come from outside and may be of any length.
    let shown: String = name.chars().take(64).collect();
    Err(StateError::Invalid(format!("{shown:?} cannot name a host; use 1 to 64 letters, digits, '.', '-' or '_'")))
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

    fn open() -> (tempfile::TempDir, State) {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(&folder.path().join("a/state")).unwrap();
        (folder, state)
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn message<T: std::fmt::Debug>(result: Result<T, StateError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn what_it_makes_is_private_and_survives() {
        let (folder, mut state) = open();
        let at = folder.path().join("a/state");
        let added = state.add_host("Host-1.example", b"spki", 7).unwrap();
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
    fn hosts_are_unique_by_name_and_key() {
        let (_folder, mut state) = open();
        state.add_host("Alpha", b"key-a", 1).unwrap();
        let beta = state.add_host("beta", b"key-b", 2).unwrap();
        assert!(message(state.add_host("ALPHA", b"key-c", 3)).contains("a host \"Alpha\" is registered already"));
        assert!(message(state.add_host("gamma", b"key-b", 3)).contains("registered already, as host \"beta\""));
        for name in ["", "a b", "ä", "a/b", &"x".repeat(65)] {
            assert!(message(state.add_host(name, b"key-d", 3)).contains("1 to 64 letters"), "{name}");
        }
        assert!(message(state.add_host("delta", b"", 3)).contains("octets of DER"));
        assert_eq!(state.host_by_name("BETA").unwrap(), Some(beta.clone()));
        assert_eq!(state.host_by_spki(b"key-b").unwrap(), Some(beta));
        assert_eq!(state.host_by_spki(b"key-z").unwrap(), None);
        state.enable_host("Beta", false).unwrap();
        assert!(!state.host_by_name("beta").unwrap().unwrap().enabled);
        assert_eq!(state.remove_host("alpha").unwrap().name, "Alpha");
        assert!(message(state.remove_host("alpha")).contains("no host \"alpha\" is registered"));
        assert!(message(state.enable_host("alpha", true)).contains("no host"));
        state.add_host("alpha", b"key-a", 4).unwrap();
        assert_eq!(state.hosts().unwrap().iter().map(|host| &*host.name).collect::<Vec<_>>(), ["alpha", "beta"]);
    }

    #[test]
    fn a_kind_has_at_most_one_primary_certificate() {
        let (_folder, mut state) = open();
        let new = |kind, der, primary| NewCertificate { kind, der, key_id: b"id", spki: b"spki", primary };
        let one = state.add_certificate(&new(Kind::Signing, b"one", true), 1).unwrap();
        let two = state.add_certificate(&new(Kind::Signing, b"two", true), 2).unwrap();
        let three = state.add_certificate(&new(Kind::Encryption, b"one", true), 3).unwrap();
        assert!(message(state.add_certificate(&new(Kind::Signing, b"two", false), 4)).contains("is there already"));
        let primaries = |state: &State| {
            let certificates = state.certificates().unwrap();
            certificates.into_iter().filter(|c| c.is_primary).map(|c| (c.kind, c.thumbprint)).collect::<Vec<_>>()
        };
        assert_eq!(
            primaries(&state),
            [(Kind::Encryption, three.thumbprint.clone()), (Kind::Signing, two.thumbprint.clone())]
        );
        assert!(message(state.enable_certificate(Kind::Signing, &two.thumbprint, false)).contains("is the primary"));
        assert!(message(state.remove_certificate(Kind::Signing, &two.thumbprint)).contains("is the primary"));
        state.enable_certificate(Kind::Signing, &one.thumbprint, false).unwrap();
        assert!(message(state.set_primary(Kind::Signing, &one.thumbprint)).contains("is disabled"));
        assert_eq!(primaries(&state).len(), 2, "a refusal changes nothing");
        state.enable_certificate(Kind::Signing, &one.thumbprint, true).unwrap();
        state.set_primary(Kind::Signing, &one.thumbprint).unwrap();
        assert_eq!(primaries(&state)[1], (Kind::Signing, one.thumbprint.clone()));
        state.remove_certificate(Kind::Signing, &two.thumbprint).unwrap();
        assert!(message(state.set_primary(Kind::Signing, &two.thumbprint)).contains("there is no signing certificate"));
        let expected = [three, Certificate { is_primary: true, ..one }];
        assert_eq!(state.certificates().unwrap(), expected);
    }

    #[test]
    fn a_new_signer_replaces_the_current_one() {
        let (_folder, mut state) = open();
        let new = |der| NewSigner { der, key_id: b"id", not_before: 10, not_after: 20 };
        let one = state.add_signer(&new(b"one"), 11).unwrap();
        let two = state.add_signer(&new(b"two"), 12).unwrap();
        let three = state.add_signer(&new(b"three"), 13).unwrap();
        assert!(message(state.add_signer(&new(b"one"), 14)).contains("is there already"));
        let replaced = |signer: &Signer, at| Signer { current: false, replaced: Some(at), ..signer.clone() };
        assert_eq!(state.signers().unwrap(), [three.clone(), replaced(&two, 13), replaced(&one, 12)]);
        assert_eq!(state.forget_signers_before(13).unwrap(), 1);
        assert_eq!(state.signers().unwrap(), [three.clone(), replaced(&two, 13)]);
        assert_eq!(state.forget_signers_before(i64::MAX).unwrap(), 1, "the current one stays");
        assert_eq!(state.signers().unwrap(), [three]);
        assert!(message(state.add_signer(&NewSigner { not_after: 10, ..new(b"four") }, 15)).contains("validity"));
    }

    #[test]
    fn a_change_by_anybody_is_noticed_until_it_was_read() {
        let (folder, mut ours) = open();
        let mut theirs = State::open(&folder.path().join("a/state")).unwrap();
        let read = |state: &State| state.hosts().map(|hosts| hosts.len());
        assert!(!ours.changed().unwrap());
        theirs.add_host("a", b"a", 1).unwrap();
        assert_eq!((ours.changed().unwrap(), ours.changed().unwrap()), (true, true));
        // A reading that fails has seen nothing.
        assert!(ours.snapshot(|_| Err::<(), _>(StateError::Invalid("on purpose".to_owned()))).is_err());
        assert!(ours.changed().unwrap());
        assert_eq!((ours.snapshot(read).unwrap(), ours.changed().unwrap()), (1, false));
        ours.add_host("b", b"b", 1).unwrap();
        assert_eq!((ours.changed().unwrap(), ours.snapshot(read).unwrap(), ours.changed().unwrap()), (true, 2, false));
        assert!(theirs.changed().unwrap());
        assert!(ours.add_host("b", b"c", 1).is_err());
        assert!(!ours.changed().unwrap(), "a refusal is no change");
        // What is written while it reads is a change after it.
        let counted = ours.snapshot(|state| {
            theirs.add_host("c", b"c", 1)?;
            read(state)
        });
        assert_eq!((counted.unwrap(), ours.changed().unwrap()), (3, true));
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
                        state.add_host(&name, name.as_bytes(), 1).unwrap();
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
        state.add_host("kept", b"kept", 1).unwrap();
        let mut steps = MIGRATIONS.to_vec();
        steps.push("ALTER TABLE hosts ADD COLUMN note TEXT");
        for _ in 0..2 {
            migrate(&mut Connection::open(&path).unwrap(), &path, &steps).unwrap();
        }
        assert_eq!(state.hosts().unwrap().len(), 1);
        drop(state);
        let text = message(State::open(&folder.path().join("a/state")));
        assert!(text.contains("has schema version 2, and this program knows only up to 1"), "{text}");
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        let text = message(State::open(&folder.path().join("file/state")));
        assert!(text.contains("file/state cannot be made or opened"), "{text}");
    }
}
