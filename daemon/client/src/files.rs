//! Reads the files that administrators provide, and writes the files that commands make. Every read has a size limit. A
//! secret is read only if other users cannot read it. Text, certificates and keys all go through one parser,
//! [`claviger_protocol::input`]. A written file is readable only by its owner, and it is either complete or absent.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use claviger_protocol::certificate::Certificate;
use claviger_protocol::input::{self, InputError};
use claviger_protocol::pem::{self, TextError};
use claviger_protocol::rsa_key::RsaPrivateKey;
use zeroize::Zeroizing;

use crate::durable::{self, RealDisk};

pub use crate::durable::{Existing, folder};

/// Largest file of certificates or keys that is read, in bytes: what all authorities of a Linux distribution need, four times.
pub const MAX_PEM: usize = 1024 * 1024;
/// Buffer size for a file of unknown length, such as a pipe. No secret is longer.
const UNKNOWN_LENGTH: usize = 64 * 1024;

/// Reasons why a file was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system reports an error.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The file is longer than its limit.
    #[error("{}: larger than {limit} bytes; is it the right file?", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The limit, in bytes.
        limit: usize,
    },
    /// The file is secret, and other users can read or change it.
    #[error("{file}: it is secret, and others may read or change it (mode {mode:04o}); run: chmod {safe} {file}", file = path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// The permission bits of the file.
        mode: u32,
        /// The mode to set. A file that root shares with a group stays readable for the group.
        safe: &'static str,
    },
    /// The file is not UTF-8 text.
    #[error("{}: {source}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// The encoding or fault that was found.
        source: TextError,
    },
    /// The file does not hold the expected certificate or key.
    #[error("{}: {source}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// The content that was found, or the fault in it.
        source: InputError,
    },
    /// The file should hold one line, and holds several.
    #[error("{}: it has several lines, and one is expected; put only the {what} there", path.display())]
    Lines {
        /// The file.
        path: PathBuf,
        /// What the line should contain.
        what: &'static str,
    },
    /// A file with this name exists, and it must not be overwritten.
    #[error("{} is there already and is not written over; move it away or choose another name", .0.display())]
    InTheWay(PathBuf),
}

impl FileError {
    /// Wraps an error of the operating system about `path`.
    pub fn of(path: &Path) -> impl Fn(io::Error) -> Self {
        |source| Self::Io { path: path.to_owned(), source }
    }

    /// `true` if the file does not exist.
    #[must_use]
    pub(crate) fn is_missing(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == ErrorKind::NotFound)
    }
}

/// Reads a file of at most `limit` bytes. The bytes are zeroised on drop.
///
/// # Errors
/// [`FileError::Io`], [`FileError::TooLong`].
pub fn read(path: &Path, limit: usize) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let file = File::open(path).map_err(FileError::of(path))?;
    read_open(path, file, limit)
}

/// Reads a secret of at most `limit` bytes: a private key, a PIN or a password. One policy, `is_exposed`, applies to
/// all secrets.
///
/// # Errors
/// [`FileError::Exposed`], and those of [`read`].
pub fn read_secret(path: &Path, limit: usize) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let file = File::open(path).map_err(FileError::of(path))?;
    let metadata = file.metadata().map_err(FileError::of(path))?;
    if is_exposed(&metadata) {
        let (path, mode) = (path.to_owned(), metadata.mode() & 0o777);
        // A group of its own shows that root means to share it.
        let is_shared = metadata.uid() == 0 && metadata.gid() != 0 && mode & 0o040 != 0;
        let safe = if is_shared { "640" } else { "600" };
        return Err(FileError::Exposed { path, mode, safe });
    }
    read_open(path, file, limit)
}

/// Returns `true` if other users can read or change a secret in this file. Only its owner may. A file of root may also
/// be readable by its group, because root gives secrets to services of other users in this way (for example systemd's
/// credentials and Debian's `ssl-cert`).
#[must_use]
pub(crate) fn is_exposed(metadata: &fs::Metadata) -> bool {
    let allowed = if metadata.uid() == 0 { 0o740 } else { 0o700 };
    // The mode of a pipe does not limit who reads the data in it.
    metadata.is_file() && metadata.mode() & 0o777 & !allowed != 0
}

/// Reads UTF-8 text, without a leading byte-order mark.
///
/// # Errors
/// [`FileError::Text`], and those of [`read`].
pub fn read_text(path: &Path, limit: usize) -> Result<Zeroizing<String>, FileError> {
    text(path, &read(path, limit)?)
}

/// Reads a secret that is UTF-8 text.
///
/// # Errors
/// [`FileError::Text`], and those of [`read_secret`].
pub fn read_secret_text(path: &Path, limit: usize) -> Result<Zeroizing<String>, FileError> {
    text(path, &read_secret(path, limit)?)
}

/// Reads a secret of one line, such as a password, without its line break. `what` names the secret in messages.
///
/// # Errors
/// [`FileError::Text`], [`FileError::Lines`], and those of [`read_secret`].
pub fn read_secret_line(path: &Path, limit: usize, what: &'static str) -> Result<Zeroizing<String>, FileError> {
    let text = read_secret_text(path, limit)?;
    match one_line(&text) {
        Some(line) => Ok(Zeroizing::new(line.to_owned())),
        None => Err(FileError::Lines { path: path.to_owned(), what }),
    }
}

/// Returns a text of one line without its line break, or `None` if it has several lines.
#[must_use]
pub fn one_line(text: &str) -> Option<&str> {
    let line = text.strip_suffix('\n').unwrap_or(text);
    let line = line.strip_suffix('\r').unwrap_or(line);
    (!line.contains(['\n', '\r'])).then_some(line)
}

/// Reads all certificates of a file. One unusable certificate makes the whole file an error.
///
/// # Errors
/// [`FileError::Content`], and those of [`read`].
pub fn read_certificates(path: &Path) -> Result<Vec<input::Entry>, FileError> {
    input::certificates(&read(path, MAX_PEM)?).map_err(content(path))
}

/// Reads the only certificate of a file.
///
/// # Errors
/// [`FileError::Content`], and those of [`read`].
pub fn read_certificate(path: &Path) -> Result<Certificate, FileError> {
    input::certificate(&read(path, MAX_PEM)?).map_err(content(path))
}

/// Reads the only private key of a file. The key may have any algorithm.
///
/// # Errors
/// [`FileError::Content`], and those of [`read_secret`].
pub(crate) fn read_private_key(path: &Path) -> Result<input::PrivateKey, FileError> {
    input::private_key(&read_secret(path, MAX_PEM)?).map_err(content(path))
}

/// Reads the only RSA private key of a file.
///
/// # Errors
/// [`FileError::Content`], and those of [`read_secret`].
pub fn read_rsa_private_key(path: &Path) -> Result<RsaPrivateKey, FileError> {
    input::rsa_private_key(&read_secret(path, MAX_PEM)?).map_err(content(path))
}

/// Wraps an error about the content of `path`.
pub fn content(path: &Path) -> impl Fn(InputError) -> FileError {
    |source| FileError::Content { path: path.to_owned(), source }
}

fn text(path: &Path, bytes: &[u8]) -> Result<Zeroizing<String>, FileError> {
    let text = pem::text(bytes).map_err(|source| FileError::Text { path: path.to_owned(), source })?;
    Ok(Zeroizing::new(text.to_owned()))
}

fn read_open(path: &Path, file: File, limit: usize) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let metadata = file.metadata().map_err(FileError::of(path))?;
    let length = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
    let expected = if metadata.is_file() { length } else { UNKNOWN_LENGTH };
    // The capacity is sufficient from the start: a buffer that grows would leave copies of a secret in memory.
    let mut octets = Zeroizing::new(Vec::with_capacity(expected.min(limit) + 64));
    file.take(limit as u64 + 1).read_to_end(&mut octets).map_err(FileError::of(path))?;
    if octets.len() > limit {
        return Err(FileError::TooLong { path: path.to_owned(), limit });
    }
    Ok(octets)
}

/// Writes a file that only its owner may read, with all its bytes or not at all. After this call it is there also if the
/// power fails.
///
/// # Errors
/// [`FileError::InTheWay`], [`FileError::Io`]. On an error the old file is still there, except if the only failure was
/// to sync the folder to the disk.
pub fn write(path: &Path, octets: &[u8], existing: Existing) -> Result<(), FileError> {
    let failed = |error: io::Error| match (existing, error.kind()) {
        (Existing::Keep, ErrorKind::AlreadyExists) => FileError::InTheWay(path.to_owned()),
        _ => FileError::of(path)(error),
    };
    if existing == Existing::Keep {
        must_be_new(path)?;
    }
    durable::write(&RealDisk, path, octets, existing).map_err(failed)
}

/// Fails if the file exists. Commands call this first, before they compute or write anything.
///
/// # Errors
/// [`FileError::InTheWay`].
pub fn must_be_new(path: &Path) -> Result<(), FileError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Err(FileError::InTheWay(path.to_owned())),
        Err(_) => Ok(()),
    }
}

/// Writes two new files, or neither: a protector without its key is useless, and so is a key without its protector.
///
/// # Errors
/// Those of [`write()`].
pub fn write_both(first: (&Path, &[u8]), second: (&Path, &[u8])) -> Result<(), FileError> {
    write(first.0, first.1, Existing::Keep)?;
    write(second.0, second.1, Existing::Keep).inspect_err(|_| {
        let _ = fs::remove_file(first.0);
    })
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
    //! Helpers for tests that use files.

    use super::*;

    pub(crate) fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    /// Returns the sorted names in a folder.
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
        // A dangling symbolic link is not followed, and no temporary file is left.
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
        // An open handle still shows the old file: the replacement does not write into it.
        assert_eq!(io::read_to_string(reader).unwrap(), "old");
        assert_eq!(names(temporary.path()), ["file"]);
        // If the target cannot be replaced, it stays, and no temporary file is left.
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
        assert!(read(&file, 99).unwrap_err().to_string().contains("larger than 99 bytes"));
        // This device reports no length.
        assert!(read(Path::new("/dev/zero"), 1000).is_err());
        let missing = read(&folder.path().join("none"), 1).unwrap_err();
        assert!(missing.is_missing() && missing.to_string().contains("none: No such file"), "{missing}");
    }

    #[test]
    fn a_secret_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "secret").unwrap();
        for open in [0o604, 0o620, 0o602, 0o644, 0o660] {
            fs::set_permissions(&file, fs::Permissions::from_mode(open)).unwrap();
            let said = read_secret(&file, 100).unwrap_err().to_string();
            assert!(said.contains(&format!("others may read or change it (mode {open:04o})")), "{said}");
            assert!(said.ends_with(&format!("chmod 600 {}", file.display())), "{said}");
            assert!(read_secret_line(&file, 100, "secret").is_err() && read_text(&file, 100).is_ok());
            for refused in [read_private_key(&file).err(), read_rsa_private_key(&file).err()] {
                assert!(matches!(refused, Some(FileError::Exposed { .. })));
            }
        }
        for own in [0o600, 0o400] {
            fs::set_permissions(&file, fs::Permissions::from_mode(own)).unwrap();
            assert_eq!(*read_secret_line(&file, 100, "secret").unwrap(), "secret");
        }
        // Only for files of root may the group read the secret.
        fs::set_permissions(&file, fs::Permissions::from_mode(0o440)).unwrap();
        let owner = fs::metadata(&file).unwrap().uid();
        assert_eq!(read_secret(&file, 100).is_ok(), owner == 0);
        if owner == 0 {
            std::os::unix::fs::chown(&file, Some(65_534), None).unwrap();
            assert!(matches!(read_secret(&file, 100), Err(FileError::Exposed { mode: 0o440, .. })));
            std::os::unix::fs::chown(&file, Some(0), None).unwrap();
        }
        assert!(read_secret(&file, 5).unwrap_err().to_string().contains("larger than 5 bytes"));
        assert!(read_secret(Path::new("/dev/null"), 5).unwrap().is_empty(), "no file that could be anybody's");
    }

    #[test]
    fn texts_are_read_as_windows_writes_them_or_their_encoding_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let line = |bytes: &[u8]| {
            fs::write(&file, bytes).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
            read_secret_line(&file, 100, "password").map(|line| line.to_string()).map_err(|error| error.to_string())
        };
        for bytes in [&b"a b"[..], b"a b\n", b"a b\r\n", b"\xef\xbb\xbfa b", b"\xef\xbb\xbfa b\r\n"] {
            assert_eq!(line(bytes).unwrap(), "a b");
        }
        assert_eq!(line(b"").unwrap(), "");
        let utf16: Vec<u8> = "\u{feff}secret\r\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
        for (bytes, words) in [
            (&utf16[..], "UTF-16"),
            (b"Gr\xfc\xdfe", "not text in UTF-8"),
            (b"secret\0\0", "NUL bytes"),
            (b"one\ntwo\n", "several lines, and one is expected; put only the password there"),
            (b"one\n\n", "several lines"),
        ] {
            let said = line(bytes).unwrap_err();
            assert!(said.starts_with(&file.display().to_string()) && said.contains(words), "{said}");
            assert!(!said.contains("secret") && !said.contains("one\n"), "{said}");
        }
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
