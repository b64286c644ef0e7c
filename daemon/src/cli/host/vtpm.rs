//! The virtual TPM of a machine: swtpm's state in a folder, encrypted with a key from the machine's vault.

use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::handover::inherited_pipe;
use crate::sys::failure::Failure;

/// The program that acts as the manufacturer of the TPM.
const SETUP: &str = "swtpm_setup";

/// A TPM state to create.
#[derive(Debug)]
pub(super) struct NewState {
    /// Its folder, which must not exist.
    pub(super) folder: PathBuf,
    /// Configuration of swtpm_setup, if not the default.
    pub(super) setup: Option<PathBuf>,
}

impl NewState {
    /// Fails if the folder exists, before anything is created.
    pub(super) fn check(&self) -> Result<(), Failure> {
        match fs::symlink_metadata(&self.folder) {
            Ok(_) => Err(format!(
                "{} is there already. If no vault belongs to it, as after an interrupted vm create, delete it; else choose another \
                 folder",
                self.folder.display()
            )
            .into()),
            Err(_) => Ok(()),
        }
    }

    /// Creates the state with endorsement keys and their certificates, encrypted with `key` (64 hexadecimal digits).
    /// The key is passed through a pipe. After a failure, the partial state is removed.
    pub(super) fn make(&self, key: &[u8]) -> Result<(), Failure> {
        let failed = |error: io::Error| format!("{}: {error}", self.folder.display());
        DirBuilder::new().mode(0o700).create(&self.folder).map_err(failed)?;
        self.run(key).inspect_err(|_| self.remove())
    }

    fn run(&self, key: &[u8]) -> Result<(), Failure> {
        let pipe = inherited_pipe(key)?;
        let mut command = Command::new(SETUP);
        command.args(["--tpm2", "--create-ek-cert", "--lock-nvram", "--pcr-banks", "sha256"]);
        command.args(["--cipher", "aes-256-cbc", "--keyfile-fd", &pipe.as_raw_fd().to_string()]);
        command.arg("--tpmstate").arg(location(&self.folder)?);
        if let Some(setup) = &self.setup {
            command.arg("--config").arg(setup);
        }
        let output = command.stdin(Stdio::null()).output().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                format!("{SETUP} is not installed; on Debian: apt-get install swtpm swtpm-tools")
            }
            _ => format!("{SETUP} cannot be started: {error}"),
        })?;
        drop(pipe);
        if output.status.success() {
            return Ok(());
        }
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let last: Vec<_> = said.lines().rev().take(3).collect();
        let last = last.into_iter().rev().collect::<Vec<_>>().join("; ");
        Err(format!("{SETUP} made no virtual TPM ({}): {last}", output.status).into())
    }

    /// Removes the folder that [`NewState::make`] created.
    pub(super) fn remove(&self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// swtpm requires an absolute path.
fn location(folder: &Path) -> Result<OsString, Failure> {
    let path = folder.canonicalize().map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut location = OsString::from("dir://");
    location.push(path);
    Ok(location)
}
