//! QEMU's program for disks, asked again where it cannot measure its own processor time.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Writes a program `qemu-img` into a folder, which any user may run. It stands in front of QEMU's.
///
/// # Panics
/// The file cannot be written.
#[must_use]
pub fn qemu_img(folder: &Path) -> PathBuf {
    let program = folder.join("qemu-img");
    fs::write(&program, include_str!("qemu-img")).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    program
}
