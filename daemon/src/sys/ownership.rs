//! Checks that only this user can change a folder or file. Files there may name a library to load, and no other user
//! may choose that library.
//!
//! A path is only as safe as every folder above it: a user who can write to one of them can replace the file. In a
//! folder with the sticky bit, such as `/tmp`, other users cannot replace our files.
//!
//! [`give`] is for root, who makes files for the daemon's user.

use std::fs::{self, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, Gid, Mode, OFlags, Uid, chownat, fchown, openat};
use rustix::io::Errno;

const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;
const STICKY: u32 = 0o1000;

/// Gives a user a file, or a folder with everything in it. No symbolic link is followed: that user may already be able to
/// write there.
///
/// # Errors
/// The operating system's error. Only root may give files away.
pub(crate) fn give(path: &Path, user: u32, group: u32) -> io::Result<()> {
    give_at(CWD, path.as_os_str().as_encoded_bytes(), (Uid::from_raw(user), Gid::from_raw(group)))
}

fn give_at(folder: impl AsFd, name: &[u8], owner: (Uid, Gid)) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = match openat(&folder, name, flags, Mode::empty()) {
        Ok(opened) => opened,
        // No folder.
        Err(Errno::NOTDIR | Errno::LOOP) => {
            chownat(&folder, name, Some(owner.0), Some(owner.1), AtFlags::SYMLINK_NOFOLLOW)?;
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    for entry in Dir::read_from(&opened)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            give_at(&opened, name, owner)?;
        }
    }
    Ok(fchown(&opened, Some(owner.0), Some(owner.1))?)
}

/// Why a path is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum Untrusted {
    /// It belongs to another user.
    #[error("{} belongs to the user with id {owner}, and not to this user (id {own}) or root", path.display())]
    Owner {
        /// The file or folder.
        path: PathBuf,
        /// User id of its owner.
        owner: u32,
        /// User id of this process.
        own: u32,
    },
    /// Other users may change it.
    #[error("{} can be changed by others (mode {mode:04o}); run: chmod go-w {}", path.display(), path.display())]
    Writable {
        /// The file or folder.
        path: PathBuf,
        mode: u32,
    },
    /// It cannot be examined.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
}

/// Checks a folder or file, and every folder above it. The path must not contain symbolic links: see
/// [`fs::canonicalize`].
///
/// # Errors
/// [`Untrusted`].
pub(crate) fn check(path: &Path) -> Result<(), Untrusted> {
    check_as(path, own())
}

/// Checks the existing folders above a path that does not exist yet.
///
/// # Errors
/// [`Untrusted`].
pub(crate) fn check_parents(path: &Path) -> Result<(), Untrusted> {
    let absolute = std::path::absolute(path).map_err(|source| Untrusted::Io { path: path.to_owned(), source })?;
    let existing = absolute.ancestors().skip(1).find_map(|folder| fs::canonicalize(folder).ok());
    existing.map_or(Ok(()), |folder| folder.ancestors().try_for_each(|folder| way(folder, own())))
}

/// Checks that everything in a folder belongs to this user or root, because other users may have had access to it
/// before.
///
/// # Errors
/// [`Untrusted`].
pub(crate) fn check_entries(folder: &Path) -> Result<(), Untrusted> {
    let failed = |source| Untrusted::Io { path: folder.to_owned(), source };
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        owned(&path, &metadata(&path)?, own())?;
    }
    Ok(())
}

/// Checks only that not every user can change a file or replace it in one of the folders above it. The owner and the
/// group with write access are the administrator's choice.
///
/// # Errors
/// [`Untrusted`].
pub(crate) fn check_closed(path: &Path) -> Result<(), Untrusted> {
    let path = fs::canonicalize(path).map_err(|source| Untrusted::Io { path: path.to_owned(), source })?;
    for (at, part) in path.ancestors().enumerate() {
        let found = metadata(part)?;
        // In a folder with the sticky bit, users cannot replace files of others.
        let kept = at > 0 && found.mode() & STICKY != 0;
        if found.mode() & OTHERS_WRITE != 0 && !kept {
            return Err(writable(part, &found));
        }
    }
    Ok(())
}

fn own() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn check_as(path: &Path, own: u32) -> Result<(), Untrusted> {
    let found = metadata(path)?;
    owned(path, &found, own)?;
    if found.mode() & (GROUP_WRITES | OTHERS_WRITE) != 0 {
        return Err(writable(path, &found));
    }
    path.ancestors().skip(1).try_for_each(|folder| way(folder, own))
}

/// Checks a folder above the path.
fn way(folder: &Path, own: u32) -> Result<(), Untrusted> {
    let found = metadata(folder)?;
    owned(folder, &found, own)?;
    if found.mode() & STICKY != 0 {
        return Ok(());
    }
    // Many systems give each user a private group with the same number, and a umask that allows the group to write.
    let private_group = found.gid() == 0 || found.gid() == found.uid();
    let group = found.mode() & GROUP_WRITES != 0 && !private_group;
    if group || found.mode() & OTHERS_WRITE != 0 { Err(writable(folder, &found)) } else { Ok(()) }
}

fn owned(path: &Path, found: &Metadata, own: u32) -> Result<(), Untrusted> {
    match found.uid() {
        owner if owner != own && owner != 0 => Err(Untrusted::Owner { path: path.to_owned(), owner, own }),
        _ => Ok(()),
    }
}

fn writable(path: &Path, found: &Metadata) -> Untrusted {
    Untrusted::Writable { path: path.to_owned(), mode: found.mode() & 0o7777 }
}

/// Metadata of the path itself; symbolic links are not followed.
fn metadata(path: &Path) -> Result<Metadata, Untrusted> {
    fs::symlink_metadata(path).map_err(|source| Untrusted::Io { path: path.to_owned(), source })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_is_given_is_the_folder_and_not_what_links_in_it_name() {
        let temporary = tempfile::tempdir().unwrap();
        let base = temporary.path();
        let (folder, outside) = (base.join("folder"), base.join("outside"));
        fs::create_dir_all(folder.join("inner")).unwrap();
        fs::create_dir(&outside).unwrap();
        for file in [folder.join("inner/file"), outside.join("file")] {
            fs::write(file, "").unwrap();
        }
        std::os::unix::fs::symlink(&outside, folder.join("link")).unwrap();
        let own = rustix::process::geteuid();
        // Others than root can only give to themselves.
        let user = if own.is_root() { 4711 } else { own.as_raw() };
        give(&folder, user, rustix::process::getegid().as_raw()).unwrap();
        let owner = |path: &Path| fs::symlink_metadata(path).unwrap().uid();
        for name in ["", "inner", "inner/file", "link"] {
            assert_eq!(owner(&folder.join(name)), user, "{name}");
        }
        assert_eq!((owner(&outside), owner(&outside.join("file"))), (own.as_raw(), own.as_raw()));
        assert_eq!(give(&base.join("none"), user, 0).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_others_may_write_is_refused_with_the_way_to_it() {
        let temporary = tempfile::tempdir().unwrap();
        let base = temporary.path().canonicalize().unwrap();
        let (outer, inner) = (base.join("outer"), base.join("outer/inner"));
        fs::create_dir_all(&inner).unwrap();
        chmod(&outer, 0o755);
        chmod(&inner, 0o755);
        check(&inner).unwrap();
        for open in [0o775, 0o757, 0o1777] {
            chmod(&inner, open);
            let text = check(&inner).unwrap_err().to_string();
            assert!(text.contains("inner can be changed by others") && text.contains("chmod go-w"), "{text}");
        }
        chmod(&inner, 0o770);
        check_closed(&inner).unwrap();
        chmod(&inner, 0o702);
        assert!(check_closed(&inner).is_err());
        chmod(&inner, 0o700);
        chmod(&outer, 0o757);
        assert!(check_closed(&inner).is_err());
        assert!(matches!(check(&inner), Err(Untrusted::Writable { path, .. }) if path == outer));
        assert!(matches!(check_parents(&inner.join("a/b")), Err(Untrusted::Writable { path, .. }) if path == outer));
        // Other users cannot rename our files in this folder.
        chmod(&outer, 0o1777);
        check(&inner).unwrap();
        check_parents(&outer.join("new/newer")).unwrap();
        check_entries(&base).unwrap();
    }

    #[test]
    fn what_belongs_to_another_user_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().canonicalize().unwrap();
        let owner = fs::metadata(&folder).unwrap().uid();
        check_as(&folder, owner).unwrap();
        // All users trust root. If this test runs as root, the folder belongs to root.
        let stranger = check_as(&folder, owner + 1);
        assert!(matches!(stranger, Err(Untrusted::Owner { .. })) || owner == 0, "{stranger:?}");
    }
}
