//! Records the newest generation of each vault that this host has seen, so that an old copy is not used by mistake.
//!
//! `DIR/ID.generation` contains the generation as a decimal number, a space, the vault's fingerprint in hexadecimal, and a
//! line break. It is written after the vault itself. So after an interruption, the vault may be newer than the record, but
//! never older.

use std::cmp::Ordering;
use std::fmt;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use data_encoding::HEXLOWER;

use crate::durable::{self, Disk, RealDisk};
use crate::files::{self, Existing, FileError};

use super::format::Vault;

/// Longest record, in bytes.
const MAX_RECORD: usize = 128;

/// Why a vault is refused.
#[derive(Debug, thiserror::Error)]
pub enum SeenError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file does not contain a generation number.
    #[error("{} does not hold a generation; delete it if this host has only the present vault of this machine", .0.display())]
    Content(PathBuf),
    /// The vault is an old copy.
    #[error(
        "the vault is an old copy: it is generation {found}, and this host has seen generation {seen}. Use the present one; if it \
         was restored from a backup on purpose, use --accept-older"
    )]
    Older {
        /// The generation of the vault.
        found: u64,
        /// The newest generation that this host has seen.
        seen: u64,
    },
    /// The vault has the generation that this host has seen, and is another one.
    #[error(
        "the vault is not the generation {0} that this host has seen: two copies of an older vault were both opened, here and \
         elsewhere. Both have the secrets of that time. Decide which one goes on; if it is this one, use --accept-older"
    )]
    Fork(u64),
}

/// The newest vault that this host has seen.
struct Record {
    generation: u64,
    fingerprint: [u8; 32],
}

impl Record {
    fn of(vault: &Vault) -> Self {
        Self { generation: vault.generation, fingerprint: vault.fingerprint() }
    }

    fn parse(text: &str) -> Option<Self> {
        let (generation, fingerprint) = text.strip_suffix('\n')?.split_once(' ')?;
        let fingerprint = HEXLOWER.decode(fingerprint.as_bytes()).ok()?.try_into().ok()?;
        Some(Self { generation: generation.parse().ok()?, fingerprint })
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}", self.generation, HEXLOWER.encode(&self.fingerprint))
    }
}

/// The folder with the recorded generations.
#[derive(Clone, Debug)]
pub struct Seen(PathBuf);

impl Seen {
    /// Uses the folder `dir`, which may not exist yet.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// Checks that this host has not seen a newer vault with the same id, or another one of the same generation.
    ///
    /// # Errors
    /// [`SeenError`].
    pub fn check(&self, vault: &Vault) -> Result<(), SeenError> {
        let Some(seen) = self.record(vault)? else { return Ok(()) };
        match vault.generation.cmp(&seen.generation) {
            Ordering::Less => Err(SeenError::Older { found: vault.generation, seen: seen.generation }),
            Ordering::Equal if seen.fingerprint != vault.fingerprint() => Err(SeenError::Fork(vault.generation)),
            Ordering::Equal | Ordering::Greater => Ok(()),
        }
    }

    /// The newest generation of the vault that this host has seen; 0: none.
    ///
    /// # Errors
    /// [`SeenError`].
    pub fn newest(&self, vault: &Vault) -> Result<u64, SeenError> {
        Ok(self.record(vault)?.map_or(0, |record| record.generation))
    }

    fn record(&self, vault: &Vault) -> Result<Option<Record>, SeenError> {
        let path = self.file(vault);
        match files::read_text(&path, MAX_RECORD) {
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error.into()),
            Ok(text) => Record::parse(&text).map(Some).ok_or(SeenError::Content(path)),
        }
    }

    /// Records the vault's generation, unless a newer one is recorded.
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
        let (path, record) = (self.file(vault), Record::of(vault));
        let written = durable::write(disk, &path, record.to_string().as_bytes(), Existing::Replace);
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
        let old = Vault::create("web-1", &file, &key, &Secrets::default()).unwrap();
        let new = old.successor(&file, &key, &Secrets::default()).unwrap();
        seen.check(&old).unwrap();
        seen.keep(&new).unwrap();
        seen.check(&new).unwrap();
        assert!(matches!(seen.check(&old), Err(SeenError::Older { found: 1, seen: 2 })));
        // A vault of another machine.
        seen.check(&Vault::create("web-1", &file, &key, &Secrets::default()).unwrap()).unwrap();
        // Two copies of one vault were opened: here and elsewhere.
        let fork = old.successor(&file, &key, &Secrets::default()).unwrap();
        assert!(matches!(seen.check(&fork), Err(SeenError::Fork(2))));
        seen.check(&fork.successor(&file, &key, &Secrets::default()).unwrap()).unwrap();
        // A newer record of another command stays.
        seen.keep(&old).unwrap();
        assert_eq!(seen.newest(&new).unwrap(), 2);
        std::fs::write(seen.file(&new), "many\n").unwrap();
        assert!(matches!(seen.check(&new), Err(SeenError::Content(_))));
    }
}
