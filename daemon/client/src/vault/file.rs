//! A vault on the disk. One command at a time locks it, and a single rename replaces it by its successor.
//!
//! ```text
//! lock ─▶ read ─▶ (release of its protector) ─▶ open with the ingress key ─▶ seal with the egress key
//!      ─▶ write, fsync, rename, fsync folder ─▶ keep the generation ─▶ only now the secrets are anybody's
//! ```
//! After an interruption at any point, the file is the old vault or the new one, and each opens with the key of its own
//! protector.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::durable::{self, Disk, RealDisk};
use crate::files::{self, Existing, FileError};
use crate::host::Unwrapped;

use super::format::{MAX_VAULT, Vault, VaultError};
use super::secrets::{SecretError, Secrets};
use super::seen::{Seen, SeenError};

/// Pause between attempts to get the lock.
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Why a vault cannot be read or replaced.
#[derive(Debug, thiserror::Error)]
pub enum VaultFileError {
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is not a valid vault.
    #[error("{}: {source}", path.display())]
    Vault {
        /// Path of the vault.
        path: PathBuf,
        /// The problem.
        source: VaultError,
    },
    /// Another command has locked it.
    #[error("{}: another command works on this vault; try again when it is done", .0.display())]
    Busy(PathBuf),
    /// A secret is missing, or cannot be added.
    #[error("{}: {source}", path.display())]
    Secret {
        /// Path of the vault.
        path: PathBuf,
        /// The problem.
        source: SecretError,
    },
    /// The vault is an old copy, or its generation cannot be recorded.
    #[error("{}: {source}", path.display())]
    Seen {
        /// Path of the vault.
        path: PathBuf,
        /// The problem.
        source: SeenError,
    },
}

/// Reads a vault without locking it.
///
/// # Errors
/// [`VaultFileError`].
pub fn read(path: &Path) -> Result<Vault, VaultFileError> {
    let bytes = files::read(path, MAX_VAULT)?;
    Vault::parse(&bytes).map_err(wrong(path))
}

/// Writes a new vault. An existing file is not overwritten.
///
/// # Errors
/// [`VaultFileError`].
pub fn create(path: &Path, vault: &Vault) -> Result<(), VaultFileError> {
    Ok(files::write(path, &vault.to_bytes(), Existing::Keep)?)
}

fn wrong(path: &Path) -> impl Fn(VaultError) -> VaultFileError {
    |source| VaultFileError::Vault { path: path.to_owned(), source }
}

/// A vault that is locked while this value lives.
#[derive(Debug)]
pub struct LockedVault {
    path: PathBuf,
    vault: Vault,
    /// Holds the lock, which the kernel releases when the process ends.
    _lock: File,
}

impl LockedVault {
    /// Locks and reads the vault. Waits at most `patience` for another command. Blocks.
    ///
    /// # Errors
    /// [`VaultFileError`].
    pub fn lock(path: &Path, patience: Duration) -> Result<Self, VaultFileError> {
        let until = Instant::now() + patience;
        let failed = FileError::of(path);
        // The successor must replace the file itself, not a symbolic link to it.
        let path = &std::fs::canonicalize(path).map_err(&failed)?;
        loop {
            // Also open for writing: network file systems need that for an exclusive lock.
            let file = File::options().read(true).write(true).open(path).map_err(&failed)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // The previous holder of the lock may have replaced the file. Then lock the new one.
                Ok(()) if same(&file, path).map_err(&failed)? => {
                    return Ok(Self { path: path.to_owned(), vault: read(path)?, _lock: file });
                }
                Ok(()) => continue,
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(error) => return Err(failed(error.into()).into()),
            }
            if Instant::now() >= until {
                return Err(VaultFileError::Busy(path.to_owned()));
            }
            std::thread::sleep(LOCK_PAUSE);
        }
    }

    /// The vault.
    #[must_use]
    pub fn vault(&self) -> &Vault {
        &self.vault
    }

    /// Opens the vault with the ingress key, changes its secrets, replaces it by its successor (sealed with the egress
    /// key), and records the generation. Returns the secrets only after all of this is on the disk.
    ///
    /// # Errors
    /// [`VaultFileError`]. The vault on the disk is either the old one or its successor.
    pub fn exchange(
        self,
        released: &Unwrapped,
        seen: &Seen,
        change: impl FnOnce(&mut Secrets) -> Result<(), SecretError>,
    ) -> Result<(Vault, Secrets), VaultFileError> {
        let secrets = self.vault.open(&released.keys.ingress).map_err(wrong(&self.path))?;
        exchange(&RealDisk, &self.path, &self.vault, secrets, released, seen, change)
    }

    /// The same with another protector: `old` opens this vault. The successor is sealed with the egress key of `new`,
    /// the release of the protector that the owner has chosen.
    ///
    /// # Errors
    /// [`VaultFileError`]. The vault on the disk is either the old one or its successor.
    pub fn move_to(self, old: &Unwrapped, new: &Unwrapped, seen: &Seen) -> Result<Vault, VaultFileError> {
        let secrets = self.vault.open(&old.keys.ingress).map_err(wrong(&self.path))?;
        exchange(&RealDisk, &self.path, &self.vault, secrets, new, seen, |_| Ok(())).map(|(vault, _)| vault)
    }
}

fn exchange(
    disk: &impl Disk,
    path: &Path,
    vault: &Vault,
    mut secrets: Secrets,
    released: &Unwrapped,
    seen: &Seen,
    change: impl FnOnce(&mut Secrets) -> Result<(), SecretError>,
) -> Result<(Vault, Secrets), VaultFileError> {
    change(&mut secrets).map_err(|source| VaultFileError::Secret { path: path.to_owned(), source })?;
    let key = &released.keys.egress;
    let newest = seen.newest(vault).map_err(|source| VaultFileError::Seen { path: path.to_owned(), source })?;
    let next = vault.successor_beyond(newest, &released.egress_protector, key, &secrets).map_err(wrong(path))?;
    // If the successor could not be opened, the machine would be lost. The check takes only some microseconds.
    if next.open(key).map_err(wrong(path))? != secrets {
        return Err(wrong(path)(VaultError::Sealed));
    }
    durable::write(disk, path, &next.to_bytes(), Existing::Replace).map_err(FileError::of(path))?;
    seen.keep_on(disk, &next).map_err(|source| VaultFileError::Seen { path: path.to_owned(), source })?;
    Ok((next, secrets))
}

/// Whether the path leads to the open file.
fn same(file: &File, path: &Path) -> io::Result<bool> {
    let (one, other) = (file.metadata()?, std::fs::metadata(path)?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::durable::testing::ModelDisk;
    use crate::testing::protector;
    use claviger_protocol::payload::Payload;
    use claviger_protocol::protector::TransportKey;
    use zeroize::Zeroizing;

    fn secrets() -> Secrets {
        let mut secrets = Secrets::default();
        secrets.add("state-key", Zeroizing::new(vec![7; 64]), false).unwrap();
        secrets
    }

    fn released(ingress: &TransportKey) -> Unwrapped {
        let (egress_protector, egress) = protector();
        Unwrapped { keys: Payload { ingress: ingress.clone(), egress, max_offline_unwraps: 0 }, egress_protector }
    }

    #[test]
    fn after_every_step_there_is_the_old_vault_or_the_new_one_and_it_opens() {
        let (path, folder) = (Path::new("vm.vault"), tempfile::tempdir().unwrap());
        let (file, key) = protector();
        let old = Vault::create("vm", &file, &key, &secrets()).unwrap();
        let given = released(&key);
        let mut generations = Vec::new();
        for stop_after in 0.. {
            let disk = ModelDisk::with(path, &old.to_bytes(), stop_after);
            let seen = Seen::new(folder.path());
            let done = exchange(&disk, path, &old, secrets(), &given, &seen, |_| Ok(()));
            let mut left = disk.after_power_failure(path);
            left.push(disk.after_kill(path));
            for bytes in left {
                let vault = Vault::parse(&bytes.unwrap()).unwrap_or_else(|e| panic!("after {stop_after} steps: {e}"));
                let key = if vault.generation == 1 { &key } else { &given.keys.egress };
                assert_eq!(vault.open(key).unwrap(), secrets(), "after {stop_after} steps");
                assert!(done.is_err() || vault.generation == 2, "secrets were given out too early");
                // The recorded generation is never newer than the vault on the disk.
                let name = seen.file(&vault);
                let mut kept = disk.after_power_failure(&name);
                kept.push(disk.after_kill(&name));
                for record in kept.into_iter().flatten() {
                    assert!(record.starts_with(b"2 ") && vault.generation == 2, "after {stop_after} steps");
                }
                generations.push(vault.generation);
            }
            if disk.state.borrow().steps < stop_after {
                assert!(done.is_ok() && stop_after > 12, "{stop_after}");
                break;
            }
        }
        assert!(generations.contains(&1) && generations.contains(&2));
    }

    #[test]
    fn one_command_at_a_time_works_on_a_vault() {
        let folder = tempfile::tempdir().unwrap();
        let (path, seen) = (folder.path().join("vm.vault"), Seen::new(folder.path().join("seen")));
        let (file, key) = protector();
        create(&path, &Vault::create("vm", &file, &key, &secrets()).unwrap()).unwrap();
        assert!(create(&path, &Vault::create("vm", &file, &key, &secrets()).unwrap()).is_err(), "never written over");
        let locked = LockedVault::lock(&path, Duration::ZERO).unwrap();
        assert!(matches!(LockedVault::lock(&path, Duration::ZERO), Err(VaultFileError::Busy(_))));
        // The waiting command gets the successor.
        let waiting = {
            let path = path.clone();
            std::thread::spawn(move || LockedVault::lock(&path, Duration::from_secs(60)).unwrap().vault().generation)
        };
        let given = released(&key);
        let add = |secrets: &mut Secrets| secrets.add("disk", Zeroizing::new(vec![1]), false);
        let (next, now) = locked.exchange(&given, &seen, add).unwrap();
        assert_eq!((next.generation, now.get("disk").unwrap()), (2, &[1][..]));
        assert_eq!(waiting.join().unwrap(), 2);
        assert_eq!(read(&path).unwrap(), next);
        // A wrong key changes nothing.
        let locked = LockedVault::lock(&path, Duration::ZERO).unwrap();
        assert!(locked.exchange(&released(&key), &seen, |_| Ok(())).is_err());
        assert_eq!(read(&path).unwrap(), next);
        // Another protector replaces the first one.
        let (_, other) = protector();
        let (old, new) = (released(&given.keys.egress), released(&other));
        let moved = LockedVault::lock(&path, Duration::ZERO).unwrap().move_to(&old, &new, &seen).unwrap();
        assert_eq!((moved.generation, moved.open(&new.keys.egress).unwrap()), (3, now));
    }
}
