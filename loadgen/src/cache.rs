//! A cache on disk for data that is slow to make and that the next run can use again. A file holds JSON lines, and only
//! its owner may read it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A file of the cache is unusable.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}; the folder of the lab has to be writable, and `loadgen` in it may be deleted at any time")]
pub struct CacheError {
    path: String,
    source: std::io::Error,
}

fn at(path: &Path) -> impl Fn(std::io::Error) -> CacheError {
    move |source| CacheError { path: path.display().to_string(), source }
}

/// A lock on the cache folder. Other load generators wait until this value is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Makes the folder and locks it. Waits while another load generator holds the lock.
///
/// # Errors
/// The folder cannot be made or written to.
pub fn lock(folder: &Path) -> Result<Lock, CacheError> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(at(folder))?;
    let path = folder.join("lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = file.map_err(at(&path))?;
    file.lock().map_err(at(&path))?;
    Ok(Lock { _file: file })
}

/// Reads at most `most` items. An incomplete last line, which an interrupted run leaves, is removed from the file.
///
/// # Errors
/// The file exists and cannot be read.
pub fn read<T: DeserializeOwned>(path: &Path, most: usize) -> Result<Vec<T>, CacheError> {
    let mut items = Vec::new();
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(items),
        Err(error) => return Err(at(path)(error)),
    };
    let mut reader = BufReader::new(&file);
    let (mut line, mut whole) = (Vec::new(), 0);
    while items.len() < most {
        line.clear();
        let length = reader.read_until(b'\n', &mut line).map_err(at(path))?;
        if length == 0 {
            break;
        }
        let item = line.strip_suffix(b"\n").and_then(|line| serde_json::from_slice(line).ok());
        let Some(item) = item else {
            file.set_len(whole).map_err(at(path))?;
            break;
        };
        whole += length as u64;
        items.push(item);
    }
    Ok(items)
}

/// Appends items to the file, in one write.
///
/// # Errors
/// The file cannot be written.
pub fn append<T: Serialize>(path: &Path, items: &[T]) -> Result<(), CacheError> {
    let mut text = Vec::new();
    for item in items {
        serde_json::to_writer(&mut text, item).map_err(|error| at(path)(error.into()))?;
        text.push(b'\n');
    }
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(&text)).map_err(at(path))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_was_appended_is_read_and_a_torn_line_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("items");
        assert_eq!(read::<u32>(&path, 9).unwrap(), [0; 0]);
        append(&path, &[1_u32, 2]).unwrap();
        append(&path, &[3_u32]).unwrap();
        assert_eq!(read::<u32>(&path, 9).unwrap(), [1, 2, 3]);
        assert_eq!(read::<u32>(&path, 2).unwrap(), [1, 2]);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"45").unwrap();
        assert_eq!(read::<u32>(&path, 9).unwrap(), [1, 2, 3]);
        append(&path, &[4_u32]).unwrap();
        assert_eq!(read::<u32>(&path, 9).unwrap(), [1, 2, 3, 4]);
    }
}
