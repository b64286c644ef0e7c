//! Replaces files atomically: after a power failure at any point, the file is either the old one or the new one.
//!
//! ```text
//! create draft ─▶ write ─▶ fsync draft ─▶ rename (or link) to the name ─▶ fsync folder
//! ```
//! All steps use [`Disk`], so that a test can stop after each step on a disk that loses unsynced data.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use ring::rand::{SecureRandom, SystemRandom};

/// The system calls that replace a file.
pub(crate) trait Disk {
    /// A file that is open for writing.
    type File;
    /// Creates a file with mode 0600, which must not exist.
    fn create(&self, path: &Path) -> io::Result<Self::File>;
    /// Appends all bytes to the file.
    fn write(&self, file: &mut Self::File, bytes: &[u8]) -> io::Result<()>;
    /// Syncs the content to the disk.
    fn sync(&self, file: &Self::File) -> io::Result<()>;
    /// Renames a file; an existing target is replaced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Gives the file an additional name, which must not exist.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Syncs the names in a folder to the disk.
    fn sync_folder(&self, folder: &Path) -> io::Result<()>;
    /// Removes a name.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// What happens to an existing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It stays, and nothing is written.
    Keep,
    /// It is replaced atomically.
    Replace,
}

pub(crate) struct RealDisk;

impl Disk for RealDisk {
    type File = File;

    fn create(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
    }

    fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        File::open(folder)?.sync_all()
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }
}

/// Writes the file completely or not at all. With [`Existing::Keep`], the error for an existing file is
/// [`ErrorKind::AlreadyExists`].
pub(crate) fn write(disk: &impl Disk, path: &Path, bytes: &[u8], existing: Existing) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "it names no file"))?;
    let mut tag = [0; 8];
    SystemRandom::new().fill(&mut tag).map_err(|_| io::Error::other("the system has no randomness"))?;
    let mut draft = OsString::from(".");
    draft.push(name);
    draft.push(format!(".{}.new", HEXLOWER.encode(&tag)));
    let draft = Draft { disk, path: path.with_file_name(draft) };
    let mut file = disk.create(&draft.path)?;
    disk.write(&mut file, bytes)?;
    disk.sync(&file)?;
    match existing {
        Existing::Replace => disk.rename(&draft.path, path),
        // Link instead of rename, because renaming would replace a file that was created in the meantime.
        Existing::Keep => disk.link(&draft.path, path),
    }?;
    disk.sync_folder(folder(path))
}

/// The folder of a file.
#[must_use]
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Removes the temporary name on drop; after a rename it no longer exists.
struct Draft<'a, D: Disk> {
    disk: &'a D,
    path: PathBuf,
}

impl<D: Disk> Drop for Draft<'_, D> {
    fn drop(&mut self) {
        let _ = self.disk.remove(&self.path);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod testing {
    //! A disk in memory that stops after some steps and loses all unsynced data.

    use super::*;
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    /// The content of a file: in memory, and after a power failure.
    #[derive(Clone, Default)]
    struct Content {
        written: Vec<u8>,
        synced: Vec<u8>,
    }

    /// Names refer to contents. `pending` are the changes of names since the folder was last synced, in order.
    #[derive(Clone, Default)]
    pub(crate) struct State {
        contents: Vec<Content>,
        names: BTreeMap<PathBuf, usize>,
        on_disk: BTreeMap<PathBuf, usize>,
        pending: Vec<(PathBuf, Option<usize>)>,
        /// Number of completed steps.
        pub(crate) steps: usize,
    }

    /// The disk. After `stop_after` steps every call fails, as if the process had been killed.
    pub(crate) struct ModelDisk {
        pub(crate) state: RefCell<State>,
        pub(crate) stop_after: usize,
    }

    impl ModelDisk {
        /// A disk with one synced file.
        pub(crate) fn with(path: &Path, bytes: &[u8], stop_after: usize) -> Self {
            let content = Content { written: bytes.to_vec(), synced: bytes.to_vec() };
            let names = BTreeMap::from([(path.to_owned(), 0)]);
            let state = State { contents: vec![content], on_disk: names.clone(), names, ..State::default() };
            Self { state: RefCell::new(state), stop_after }
        }

        fn step<T>(&self, change: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
            let state = &mut *self.state.borrow_mut();
            if state.steps == self.stop_after {
                return Err(io::Error::other("killed"));
            }
            state.steps += 1;
            change(state)
        }

        /// The content of the name if only the process ends: the kernel keeps all changes.
        pub(crate) fn after_kill(&self, path: &Path) -> Option<Vec<u8>> {
            let state = self.state.borrow();
            Some(state.contents[*state.names.get(path)?].written.clone())
        }

        /// All possible contents of the name after a power failure. A file system may write names in order and content
        /// at any time, so any number of the pending name changes may be present, and any length of unsynced content.
        pub(crate) fn after_power_failure(&self, path: &Path) -> Vec<Option<Vec<u8>>> {
            let state = self.state.borrow();
            let mut outcomes = Vec::new();
            for written in 0..=state.pending.len() {
                let mut names = state.on_disk.clone();
                for (name, target) in &state.pending[..written] {
                    match target {
                        Some(target) => _ = names.insert(name.clone(), *target),
                        None => _ = names.remove(name),
                    }
                }
                let Some(content) = names.get(path).map(|at| &state.contents[*at]) else {
                    outcomes.push(None);
                    continue;
                };
                outcomes.push(Some(content.synced.clone()));
                if content.written != content.synced {
                    let lengths = [0, 1, content.written.len() / 2, content.written.len()];
                    outcomes.extend(lengths.map(|length| Some(content.written[..length].to_vec())));
                    outcomes.push(Some(vec![0; content.written.len()]));
                }
            }
            outcomes
        }
    }

    impl Disk for ModelDisk {
        type File = usize;

        fn create(&self, path: &Path) -> io::Result<usize> {
            self.step(|state| {
                assert!(!state.names.contains_key(path));
                state.contents.push(Content::default());
                let at = state.contents.len() - 1;
                state.names.insert(path.to_owned(), at);
                state.pending.push((path.to_owned(), Some(at)));
                Ok(at)
            })
        }

        fn write(&self, file: &mut usize, bytes: &[u8]) -> io::Result<()> {
            // A write may stop halfway, so each half is a step.
            let (one, other) = bytes.split_at(bytes.len() / 2);
            [one, other].into_iter().try_for_each(|part| {
                self.step(|state| {
                    state.contents[*file].written.extend_from_slice(part);
                    Ok(())
                })
            })
        }

        fn sync(&self, file: &usize) -> io::Result<()> {
            self.step(|state| {
                let content = &mut state.contents[*file];
                content.synced = content.written.clone();
                Ok(())
            })
        }

        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.step(|state| {
                let at = state.names.remove(from).ok_or(ErrorKind::NotFound)?;
                state.names.insert(to.to_owned(), at);
                // The step also made a change on the disk. The temporary name does not matter.
                state.pending.push((to.to_owned(), Some(at)));
                Ok(())
            })
        }

        fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.step(|state| {
                if state.names.contains_key(to) {
                    return Err(ErrorKind::AlreadyExists.into());
                }
                let at = *state.names.get(from).ok_or(ErrorKind::NotFound)?;
                state.names.insert(to.to_owned(), at);
                state.pending.push((to.to_owned(), Some(at)));
                Ok(())
            })
        }

        fn sync_folder(&self, _: &Path) -> io::Result<()> {
            self.step(|state| {
                state.on_disk = state.names.clone();
                state.pending.clear();
                Ok(())
            })
        }

        fn remove(&self, path: &Path) -> io::Result<()> {
            self.step(|state| {
                state.names.remove(path).ok_or(ErrorKind::NotFound)?;
                state.pending.push((path.to_owned(), None));
                Ok(())
            })
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::testing::ModelDisk;
    use super::*;

    const NAME: &str = "folder/file";

    /// The possible contents after a write that stopped after `stop_after` steps, and whether the write had finished.
    fn stopped(disk: &ModelDisk, existing: Existing) -> (Vec<Option<Vec<u8>>>, bool) {
        let path = Path::new(NAME);
        let done = write(disk, path, b"the new one", existing).is_ok();
        let mut left = disk.after_power_failure(path);
        left.push(disk.after_kill(path));
        (left, done)
    }

    #[test]
    fn a_file_that_is_replaced_is_the_old_or_the_new_one_after_every_step() {
        let (old, new) = (Some(b"old".to_vec()), Some(b"the new one".to_vec()));
        let (mut seen, mut finished) = (Vec::new(), 0);
        for stop_after in 0.. {
            let disk = ModelDisk::with(Path::new(NAME), b"old", stop_after);
            let (left, done) = stopped(&disk, Existing::Replace);
            assert!(left.iter().all(|content| [&old, &new].contains(&content)), "after {stop_after} steps: {left:?}");
            if done {
                assert!(left.iter().all(|content| *content == new), "finished after {stop_after} steps: {left:?}");
                finished += 1;
            }
            seen.extend(left);
            if disk.state.borrow().steps < stop_after {
                // All steps were done.
                break;
            }
        }
        assert!(seen.contains(&old) && seen.contains(&new) && finished > 0);
    }

    #[test]
    fn a_new_file_is_whole_or_not_there_after_every_step() {
        let new = Some(b"the new one".to_vec());
        for stop_after in 0..12 {
            let disk = ModelDisk::with(Path::new("folder/other"), b"other", stop_after);
            let (left, done) = stopped(&disk, Existing::Keep);
            assert!(left.iter().all(|content| [&None, &new].contains(&content)), "after {stop_after} steps: {left:?}");
            assert!(!done || left.iter().all(|content| *content == new));
        }
    }

    /// The model detects a wrong order of the steps.
    #[test]
    fn a_writer_that_does_not_force_the_content_first_is_found_out() {
        let disk = ModelDisk::with(Path::new(NAME), b"old", usize::MAX);
        let mut file = disk.create(Path::new("folder/draft")).unwrap();
        disk.write(&mut file, b"the new one").unwrap();
        disk.rename(Path::new("folder/draft"), Path::new(NAME)).unwrap();
        disk.sync_folder(Path::new("folder")).unwrap();
        assert!(disk.after_power_failure(Path::new(NAME)).contains(&Some(Vec::new())));
    }
}
