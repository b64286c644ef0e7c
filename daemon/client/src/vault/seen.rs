//! The newest generation of each vault that this host has seen, so that an old copy of a vault does not pass for the present one.
//!
//! `DIR/ID.generation` holds the generation as a decimal number, and a line break. It is written after the vault itself: a vault is
//! at most newer than what is kept here, whatever is interrupted.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use data_encoding::HEXLOWER;

use crate::durable::{self, Disk, RealDisk};
use crate::files::{self, Existing, FileError};

use super::format::Vault;

/// Why a vault is not used.
#[derive(Debug, thiserror::Error)]
pub enum SeenError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file does not hold a generation.
    #[error("{} does not hold a number; delete it if this host has only the present vault of this machine", .0.display())]
    Content(PathBuf),
    /// The vault is an old copy.
    #[error(
        "the vault is an old copy: it is generation {found}, and this host has seen generation {seen}. Use the present one; if it \
         was restored from a backup on purpose, say --accept-older"
    )]
    Older {
        /// The vault's generation.
        found: u64,
        /// The newest one that was seen.
        seen: u64,
    },
}

/// The folder where the generations are kept.
#[derive(Clone, Debug)]
pub struct Seen(PathBuf);

impl Seen {
    /// The folder `dir`, which need not exist yet.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// Refuses a vault that is older than one of its id that this host has seen. A host that has seen none takes any.
    ///
    /// # Errors
    /// [`SeenError`].
    pub fn check(&self, vault: &Vault) -> Result<(), SeenError> {
        let seen = self.newest(vault)?;
        if vault.generation < seen { Err(SeenError::Older { found: vault.generation, seen }) } else { Ok(()) }
    }

    /// The newest generation of the vault that this host has seen; 0 if it has seen none.
    ///
    /// # Errors
    /// [`SeenError`].
    pub fn newest(&self, vault: &Vault) -> Result<u64, SeenError> {
        let path = self.file(vault);
        match files::read_text(&path, 32) {
            Err(error) if error.is_missing() => Ok(0),
            Err(error) => Err(error.into()),
            Ok(text) => text.trim_end().parse().map_err(|_| SeenError::Content(path)),
        }
    }

    /// Keeps the vault's generation, unless a newer one is kept already.
    ///
    /// # Errors
    /// [`SeenError`].
    pub fn keep(&self, vault: &Vault) -> Result<(), SeenError> {
        self.keep_on(&RealDisk, vault)
    }

    pub(super) fn keep_on(&self, disk: &impl Disk, vault: &Vault) -> Result<(), SeenError> {
        if self.newest(vault)? >= vault.generation {
            return Ok(());
        }
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.0);
        made.map_err(FileError::of(&self.0))?;
        let (path, number) = (self.file(vault), format!("{}\n", vault.generation));
        let written = durable::write(disk, &path, number.as_bytes(), Existing::Replace);
        Ok(written.map_err(FileError::of(&path))?)
    }

    pub(super) fn file(&self, vault: &Vault) -> PathBuf {
        self.0.join(format!("{}.generation", HEXLOWER.encode(&vault.id)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::protector;
    use crate::vault::secrets::Secrets;

    #[test]
    fn an_old_copy_is_refused_where_a_newer_one_was_seen() {
        let folder = tempfile::tempdir().unwrap();
        let seen = Seen::new(folder.path().join("vaults"));
        let (file, key) = protector();
        let old = Vault::create(&file, &key, &Secrets::default()).unwrap();
        let new = old.successor(&file, &key, &Secrets::default()).unwrap();
        seen.check(&old).unwrap();
        seen.keep(&new).unwrap();
        seen.check(&new).unwrap();
        assert!(matches!(seen.check(&old), Err(SeenError::Older { found: 1, seen: 2 })));
        // Another machine's.
        seen.check(&Vault::create(&file, &key, &Secrets::default()).unwrap()).unwrap();
        // What another command kept meanwhile stays.
        seen.keep(&old).unwrap();
        assert_eq!(seen.newest(&new).unwrap(), 2);
        std::fs::write(seen.file(&new), "many\n").unwrap();
        assert!(matches!(seen.check(&new), Err(SeenError::Content(_))));
    }
}
