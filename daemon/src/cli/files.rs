//! The files of the tenant's commands: read within bounds, written whole or not at all, and never over another one.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::Failure;

/// Largest metadata document that is read, in octets; an honest one has some ten thousand.
pub(super) const MAX_METADATA: usize = 1024 * 1024;
/// Largest PEM file that is read, in octets.
const MAX_PEM: usize = 64 * 1024;

/// Reads a file of `limit` octets at most. Its octets are wiped when they are dropped: they may be secret.
pub(super) fn read(path: &Path, limit: usize) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let failed = |error| format!("{}: {error}", path.display());
    let file = File::open(path).map_err(failed)?;
    let length = usize::try_from(file.metadata().map_err(failed)?.len()).unwrap_or(usize::MAX);
    // The capacity is enough from the start: growing would leave copies of a secret behind.
    let mut octets = Zeroizing::new(Vec::with_capacity(length.min(limit) + 64));
    file.take(limit as u64 + 1).read_to_end(&mut octets).map_err(failed)?;
    if octets.len() > limit {
        return Err(format!("{}: larger than {limit} octets; is it the right file?", path.display()).into());
    }
    Ok(octets)
}

/// Reads a PEM file; one with a private key only if nobody else may.
pub(super) fn read_pem(path: &Path, private: bool) -> Result<Zeroizing<String>, Failure> {
    if private {
        let mode = fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?.permissions().mode();
        if mode & 0o077 != 0 {
            let path = path.display();
            return Err(format!("{path}: others may read this private key; run: chmod 600 {path}").into());
        }
    }
    let octets = read(path, MAX_PEM)?;
    let text = std::str::from_utf8(&octets).map_err(|_| format!("{}: not a PEM file", path.display()))?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// Complains early of a file that is there: before anything is computed or written.
pub(super) fn must_be_new(path: &Path) -> Result<(), Failure> {
    match fs::symlink_metadata(path) {
        Ok(_) => Err(in_the_way(path)),
        Err(_) => Ok(()),
    }
}

fn in_the_way(path: &Path) -> Failure {
    format!("{} is there already and is not written over; move it away or choose another name", path.display()).into()
}

/// Writes a new file, readable by its owner only, that is there with all its octets or not at all.
pub(super) fn write_new(path: &Path, octets: &[u8]) -> Result<(), Failure> {
    let failed = |error: std::io::Error| -> Failure {
        match error.kind() {
            std::io::ErrorKind::AlreadyExists => in_the_way(path),
            _ => format!("{}: {error}", path.display()).into(),
        }
    };
    let (Some(name), Some(folder)) = (path.file_name(), path.parent()) else {
        return Err(format!("{}: this names no file", path.display()).into());
    };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    must_be_new(path)?;
    let draft = Draft(folder.join(format!(".{}.{}.new", name.to_string_lossy(), std::process::id())));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft.0).map_err(failed)?;
    file.write_all(octets).and_then(|()| file.sync_all()).map_err(failed)?;
    // A link, because renaming would replace a file that came up meanwhile.
    fs::hard_link(&draft.0, path).map_err(failed)?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
}

/// Removes the file's first name, whatever happens.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Writes two new files, or none: a protector without its key, or a key without its protector, helps nobody.
pub(super) fn write_both(first: (&Path, &[u8]), second: (&Path, &[u8])) -> Result<(), Failure> {
    write_new(first.0, first.1)?;
    write_new(second.0, second.1).inspect_err(|_| {
        let _ = fs::remove_file(first.0);
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn files_are_new_private_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
        write_new(&one, b"1").unwrap();
        assert_eq!(fs::metadata(&one).unwrap().permissions().mode() & 0o777, 0o600);
        for refused in [write_new(&one, b"2"), must_be_new(&one), write_both((&two, b"2"), (&one, b"2"))] {
            let message = refused.unwrap_err().to_string();
            assert!(message.contains("one is there already"), "{message}");
        }
        assert_eq!(fs::read(&one).unwrap(), b"1");
        // Not even a link to nowhere is followed, and nothing is left behind.
        std::os::unix::fs::symlink("nowhere", &two).unwrap();
        assert!(write_new(&two, b"2").is_err());
        fs::remove_file(&two).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write_new(Path::new("/"), b"").is_err());
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
        assert!(read(&folder.path().join("none"), 1).unwrap_err().to_string().contains("none: No such file"));

        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(read_pem(&file, true).unwrap_err().to_string().contains("chmod 600"));
        assert!(read_pem(&file, false).is_ok());
    }
}
