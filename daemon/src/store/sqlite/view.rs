//! A read-only view of the state file. It writes nothing, whatever version wrote the file and whatever process has it
//! open.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::backup::Backup;
use rusqlite::{Connection, OpenFlags};

use super::super::error::StateError;
use super::schema::{MIGRATIONS, migrate};
use super::{BUSY_TIMEOUT, Known, Sqlite};

impl Sqlite {
    /// Opens `state.db` in `folder`, which must exist, read-only. Also returns the schema version of the file if it is
    /// older than this program's; the view is migrated in memory only.
    ///
    /// # Errors
    /// [`StateError::TooNew`] or [`StateError::Database`].
    pub(in crate::store) fn view(folder: &Path) -> Result<(Self, Option<i64>), StateError> {
        let path = folder.join("state.db");
        let database = |source| StateError::Database { path: path.clone(), source };
        let (mut connection, found) = read_only(&path).map_err(database)?;
        let known = i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX);
        if !(0..=known).contains(&found) {
            return Err(StateError::TooNew { path, found, known });
        }
        let older = (found < known).then_some(found);
        if older.is_some() {
            connection = copy(&connection).map_err(database)?;
            migrate(&mut connection, &path, MIGRATIONS)?;
        }
        Ok((Self { path, connection, known: Known::default(), identity: None }, older))
    }
}

fn read_only(path: &Path) -> rusqlite::Result<(Connection, i64)> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(uri(path), flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.execute_batch("PRAGMA trusted_schema = OFF")?;
    let version = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    Ok((connection, version))
}

/// Even a reader would create SQLite's shared files and could not remove them again. Only writers should create them.
fn uri(path: &Path) -> PathBuf {
    let beside = |end: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        std::fs::metadata(name).map_or(0, |metadata| metadata.len())
    };
    let how = match (beside("-shm"), beside("-wal")) {
        // No process has it open, and all data is in the file itself.
        (0, 0) => "immutable=1",
        // Data in the write-ahead log can be read only with its index, which must be created again.
        (0, _) => "mode=ro",
        _ => "readonly_shm=1",
    };
    let mut octets = if path.is_absolute() { b"file://".to_vec() } else { b"file:".to_vec() };
    for octet in path.as_os_str().as_bytes() {
        match octet {
            b'?' | b'#' | b'%' => octets.extend(format!("%{octet:02x}").into_bytes()),
            _ => octets.push(*octet),
        }
    }
    octets.extend(format!("?{how}").into_bytes());
    std::ffi::OsString::from_vec(octets).into()
}

fn copy(from: &Connection) -> rusqlite::Result<Connection> {
    let mut to = Connection::open_in_memory()?;
    Backup::new(from, &mut to)?.run_to_completion(1000, Duration::from_millis(10), None)?;
    Ok(to)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::{Labels, State};

    /// All files of a folder, byte by byte.
    fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> =
            entries.map(|path| (path.display().to_string(), std::fs::read(&path).unwrap())).collect();
        files.sort();
        files
    }

    #[test]
    fn looking_writes_nothing_and_sees_what_a_writer_has_just_written() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("a?b#c%d");
        let mut writer = State::open(&folder).unwrap();
        writer.add_host("a", b"a", &Labels::default(), 1).unwrap();
        // The index of the write-ahead log is shared by the process: even a reader writes to it.
        let without_index =
            || files(&folder).into_iter().filter(|(name, _)| !name.ends_with("-shm")).collect::<Vec<_>>();
        let before = without_index();
        assert_eq!((before.len(), files(&folder).len()), (2, 3), "the database, its log, and the log's index");
        let view = State::view(&folder).unwrap();
        assert_eq!((view.state.hosts().unwrap().len(), view.older), (1, None));
        drop(view);
        assert!(without_index() == before);
        drop(writer);
        let before = files(&folder);
        assert_eq!(before.len(), 1);
        let mut view = State::view(&folder).unwrap();
        assert_eq!(view.state.hosts().unwrap().len(), 1);
        assert!(view.state.add_host("b", b"b", &Labels::default(), 1).is_err());
        drop(view);
        assert!(files(&folder) == before);
    }

    #[test]
    fn an_older_file_is_read_and_stays_as_it_is() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("state.db");
        let mut old = Connection::open(&path).unwrap();
        old.execute_batch("PRAGMA journal_mode = WAL").unwrap();
        migrate(&mut old, &path, &MIGRATIONS[..1]).unwrap();
        old.execute_batch("INSERT INTO hosts (name, spki, spki_sha256, added) VALUES ('a', x'01', 'x', 1)").unwrap();
        drop(old);
        let before = files(temporary.path());
        let view = State::view(temporary.path()).unwrap();
        assert_eq!((view.state.hosts().unwrap().len(), view.older), (1, Some(1)));
        assert!(view.state.certificates().unwrap().is_empty());
        drop(view);
        assert!(files(temporary.path()) == before);
    }
}
