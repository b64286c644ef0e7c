//! The files that commands read and write: read within bounds, secret ones only where nobody else may, and written for
//! their owner alone, whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

/// Largest PEM file that is read, in octets.
const MAX_PEM: usize = 64 * 1024;
/// What is set aside for a file that does not say how long it is, such as a pipe: no secret is longer.
const UNKNOWN_LENGTH: usize = 64 * 1024;

/// Why a file is not read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system does not do it.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// It is longer than what it should be can be.
    #[error("{}: larger than {limit} octets; is it the right file?", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// How many octets there may be.
        limit: usize,
    },
    /// It is a secret, and no secret any more.
    #[error("{file}: it is secret, and others may read or change it; run: chmod 600 {file}", file = .0.display())]
    Exposed(PathBuf),
    /// It is no text.
    #[error("{}: not a text", .0.display())]
    NotText(PathBuf),
    /// There is another one, which is not written over.
    #[error("{} is there already and is not written over; move it away or choose another name", .0.display())]
    InTheWay(PathBuf),
}

impl FileError {
    /// What the operating system says of `path`.
    pub fn of(path: &Path) -> impl Fn(io::Error) -> Self {
        |source| Self::Io { path: path.to_owned(), source }
    }

    /// Whether there is no such file.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == ErrorKind::NotFound)
    }
}

/// Reads a file of `limit` octets at most. They are wiped when they are dropped.
///
/// # Errors
/// [`FileError::Io`], [`FileError::TooLong`].
pub fn read(path: &Path, limit: usize) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let file = File::open(path).map_err(FileError::of(path))?;
    read_open(path, file, limit)
}

/// The same for a secret: a private key, a password. One that its group or others may read or change is refused.
///
/// # Errors
/// [`FileError::Exposed`], and those of [`read`].
pub fn read_secret(path: &Path, limit: usize) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let file = File::open(path).map_err(FileError::of(path))?;
    let metadata = file.metadata().map_err(FileError::of(path))?;
    // A pipe's mode says nothing of who reads what comes down it.
    if metadata.is_file() && metadata.mode() & 0o077 != 0 {
        return Err(FileError::Exposed(path.to_owned()));
    }
    read_open(path, file, limit)
}

/// Reads a PEM file.
///
/// # Errors
/// [`FileError::NotText`], and those of [`read`].
pub fn read_pem(path: &Path) -> Result<Zeroizing<String>, FileError> {
    text(path, &read(path, MAX_PEM)?)
}

/// Reads a PEM file with a private key.
///
/// # Errors
/// [`FileError::NotText`], and those of [`read_secret`].
pub fn read_secret_pem(path: &Path) -> Result<Zeroizing<String>, FileError> {
    text(path, &read_secret(path, MAX_PEM)?)
}

fn text(path: &Path, octets: &[u8]) -> Result<Zeroizing<String>, FileError> {
    let text = std::str::from_utf8(octets).map_err(|_| FileError::NotText(path.to_owned()))?;
    Ok(Zeroizing::new(text.to_owned()))
}

fn read_open(path: &Path, file: File, limit: usize) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let metadata = file.metadata().map_err(FileError::of(path))?;
    let length = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
    let expected = if metadata.is_file() { length } else { UNKNOWN_LENGTH };
    // The capacity is enough from the start: growing would leave copies of a secret behind.
    let mut octets = Zeroizing::new(Vec::with_capacity(expected.min(limit) + 64));
    file.take(limit as u64 + 1).read_to_end(&mut octets).map_err(FileError::of(path))?;
    if octets.len() > limit {
        return Err(FileError::TooLong { path: path.to_owned(), limit });
    }
    Ok(octets)
}

/// What becomes of a file that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It stays, and nothing is written.
    Keep,
    /// It is the old one or the new one at every moment, whole.
    Replace,
}

/// Writes a file that only its owner may read, with all its octets or not at all. After this call it is there also if the
/// power fails.
///
/// # Errors
/// [`FileError::InTheWay`], [`FileError::Io`]. What was there is still there, unless only the folder could not be forced to
/// the disk.
pub fn write(path: &Path, octets: &[u8], existing: Existing) -> Result<(), FileError> {
    let failed = |error: io::Error| match (existing, error.kind()) {
        (Existing::Keep, ErrorKind::AlreadyExists) => FileError::InTheWay(path.to_owned()),
        _ => FileError::of(path)(error),
    };
    let name = path.file_name().ok_or_else(|| failed(io::Error::new(ErrorKind::InvalidInput, "it names no file")))?;
    if existing == Existing::Keep {
        must_be_new(path)?;
    }
    let mut tag = [0; 8];
    SystemRandom::new().fill(&mut tag).map_err(|_| failed(io::Error::other("no randomness")))?;
    let mut draft = OsString::from(".");
    draft.push(name);
    draft.push(format!(".{}.new", HEXLOWER.encode(&tag)));
    let draft = Draft(path.with_file_name(draft));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft.0).map_err(failed)?;
    file.write_all(octets).and_then(|()| file.sync_all()).map_err(failed)?;
    match existing {
        Existing::Replace => fs::rename(&draft.0, path),
        // A link, because renaming would replace a file that came up meanwhile.
        Existing::Keep => fs::hard_link(&draft.0, path),
    }
    .map_err(failed)?;
    File::open(folder(path)).and_then(|folder| folder.sync_all()).map_err(failed)
}

/// Removes the file's first name, whatever happens; after a renaming there is none.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Complains early of a file that is there: before anything is computed or written.
///
/// # Errors
/// [`FileError::InTheWay`].
pub fn must_be_new(path: &Path) -> Result<(), FileError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Err(FileError::InTheWay(path.to_owned())),
        Err(_) => Ok(()),
    }
}

/// Writes two new files, or none: a protector without its key, or a key without its protector, helps nobody.
///
/// # Errors
/// Those of [`write()`].
pub fn write_both(first: (&Path, &[u8]), second: (&Path, &[u8])) -> Result<(), FileError> {
    write(first.0, first.1, Existing::Keep)?;
    write(second.0, second.1, Existing::Keep).inspect_err(|_| {
        let _ = fs::remove_file(first.0);
    })
}

/// The folder that a file is in.
#[must_use]
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether both paths lead to one file, or would.
#[must_use]
pub fn same_file(one: &Path, other: &Path) -> bool {
    let file = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    let place = |path: &Path| Some((folder(path).canonicalize().ok()?, path.file_name()?.to_owned()));
    match (file(one), file(other)) {
        (Some(one), Some(other)) => one == other,
        _ => place(one).is_some_and(|one| Some(one) == place(other)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod testing {
    //! What tests want to know of files.

    use super::*;

    pub(crate) fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    /// The names in a folder, in order.
    pub(crate) fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::testing::{mode, names};
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn files_are_new_private_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
        write(&one, b"1", Existing::Keep).unwrap();
        assert_eq!(mode(&one), 0o600);
        for refused in [write(&one, b"2", Existing::Keep), must_be_new(&one), write_both((&two, b"2"), (&one, b"2"))] {
            let message = refused.unwrap_err().to_string();
            assert!(message.contains("one is there already"), "{message}");
        }
        assert_eq!(fs::read(&one).unwrap(), b"1");
        // Not even a link to nowhere is followed, and nothing is left behind.
        std::os::unix::fs::symlink("nowhere", &two).unwrap();
        assert!(write(&two, b"2", Existing::Keep).is_err());
        fs::remove_file(&two).unwrap();
        assert_eq!(names(folder.path()), ["one"]);
        assert!(write(Path::new("/"), b"", Existing::Keep).is_err());
    }

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let temporary = tempfile::tempdir().unwrap();
        let file = temporary.path().join("file");
        fs::write(&file, "old").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        let reader = File::open(&file).unwrap();
        write(&file, b"new", Existing::Replace).unwrap();
        assert_eq!((fs::read(&file).unwrap(), mode(&file)), (b"new".to_vec(), 0o600));
        // Who had it open still has the old one: it was never written to.
        assert_eq!(io::read_to_string(reader).unwrap(), "old");
        assert_eq!(names(temporary.path()), ["file"]);
        // What cannot be replaced stays, and nothing is left beside it.
        let folder = temporary.path().join("folder");
        fs::create_dir(&folder).unwrap();
        let message = write(&folder, b"new", Existing::Replace).unwrap_err().to_string();
        assert!(message.starts_with(&folder.display().to_string()), "{message}");
        assert_eq!(names(temporary.path()), ["file", "folder"]);
        assert!(write(Path::new("/nowhere/file"), b"new", Existing::Replace).is_err());
    }

    #[test]
    fn reading_has_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, [7; 100]).unwrap();
        assert_eq!(read(&file, 100).unwrap().len(), 100);
        assert!(read(&file, 99).unwrap_err().to_string().contains("larger than 99 octets"));
        // No length is announced there.
        assert!(read(Path::new("/dev/zero"), 1000).is_err());
        let missing = read(&folder.path().join("none"), 1).unwrap_err();
        assert!(missing.is_missing() && missing.to_string().contains("none: No such file"), "{missing}");
    }

    #[test]
    fn a_secret_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "secret").unwrap();
        for open in [0o640, 0o604, 0o620, 0o602] {
            fs::set_permissions(&file, fs::Permissions::from_mode(open)).unwrap();
            let said = read_secret(&file, 100).unwrap_err().to_string();
            assert!(said.contains("others may read") && said.ends_with(&format!("chmod 600 {}", file.display())));
            assert!(read_secret_pem(&file).is_err() && read_pem(&file).is_ok());
        }
        for own in [0o600, 0o400] {
            fs::set_permissions(&file, fs::Permissions::from_mode(own)).unwrap();
            assert_eq!(*read_secret_pem(&file).unwrap(), "secret");
        }
        assert!(read_secret(&file, 5).unwrap_err().to_string().contains("larger than 5 octets"));
        assert!(read_secret(Path::new("/dev/null"), 5).unwrap().is_empty(), "no file that could be anybody's");
    }

    #[test]
    fn one_file_is_known_by_any_name() {
        let temporary = tempfile::tempdir().unwrap();
        let [one, link, other] = ["one", "link", "other"].map(|name| temporary.path().join(name));
        assert!(same_file(&one, &temporary.path().join("./one")) && !same_file(&one, &other));
        fs::write(&one, "").unwrap();
        std::os::unix::fs::symlink(&one, &link).unwrap();
        assert!(same_file(&one, &link) && same_file(&one, &one) && !same_file(&one, &other));
    }
}
