//! Where a member's PIN comes from, and how it is read.

use std::path::{Path, PathBuf};

use claviger_client::files::{self, FileError};
use claviger_protocol::pem::{self, TextError};
use zeroize::Zeroizing;

/// Largest PIN file, in bytes; a larger file cannot be a PIN.
const PIN_LIMIT: usize = 4096;

/// The place of a member's user PIN.
#[derive(Clone, Debug, PartialEq)]
pub enum PinSource {
    /// A file. It may end with one line break.
    File(PathBuf),
    /// An environment variable of the daemon.
    Env(String),
}

/// Why a member's PIN cannot be read. No variant contains any part of the PIN.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The PIN file cannot be read, or other users can read it.
    #[error("the PIN of HSM {hsm:?} cannot be read from {source}")]
    File {
        /// The member's name.
        hsm: String,
        /// The problem of its `pin_file`.
        source: FileError,
    },
    /// The environment variable is not set.
    #[error("the PIN of HSM {hsm:?} is to come from the environment variable {variable}, which is not set; set it")]
    Unset {
        /// The member's name.
        hsm: String,
        /// Its `pin_env`.
        variable: String,
    },
    /// The file or variable is empty.
    #[error("the PIN of HSM {hsm:?} in {place} is empty; put the user PIN there")]
    Empty {
        /// The member's name.
        hsm: String,
        /// The file or variable.
        place: String,
    },
    /// The content is not text.
    #[error("the PIN of HSM {hsm:?} in {place} is {}, and is not tried; {}", source.problem(), source.advice())]
    NotText {
        /// The member's name.
        hsm: String,
        /// The file or variable.
        place: String,
        /// The kind of content.
        source: TextError,
    },
    /// The content has several lines.
    #[error("the PIN of HSM {hsm:?} in {place} has several lines, and is not tried; put only the user PIN there")]
    Lines {
        /// The member's name.
        hsm: String,
        /// The file or variable.
        place: String,
    },
}

impl PinSource {
    /// The file, if it is one.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Env(_) => None,
        }
    }

    /// The environment variable, if it is one.
    #[must_use]
    pub fn variable(&self) -> Option<&str> {
        match self {
            Self::File(_) => None,
            Self::Env(variable) => Some(variable),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::File(path) => path.as_os_str().is_empty(),
            Self::Env(variable) => variable.is_empty(),
        }
    }

    /// Reads the PIN of the member `hsm`, without a byte-order mark and the line break at the end. Anything else that
    /// cannot be a part of a PIN is an error, because a token counts every wrong PIN. Blocks on the file.
    ///
    /// # Errors
    /// [`PinError`] if the PIN cannot be read, other users can read it, or it is not one line of text.
    pub fn read(&self, hsm: &str) -> Result<Zeroizing<String>, PinError> {
        let name = || hsm.to_owned();
        let (bytes, place) = match self {
            Self::File(path) => {
                let error = |source| PinError::File { hsm: name(), source };
                (files::read_secret(path, PIN_LIMIT).map_err(error)?, path.display().to_string())
            }
            Self::Env(variable) => {
                let value = std::env::var_os(variable)
                    .ok_or_else(|| PinError::Unset { hsm: name(), variable: variable.clone() })?;
                (Zeroizing::new(value.into_encoded_bytes()), format!("the environment variable {variable}"))
            }
        };
        pin_from(&bytes, hsm, &place)
    }
}

fn pin_from(bytes: &[u8], hsm: &str, place: &str) -> Result<Zeroizing<String>, PinError> {
    let (hsm, place) = (|| hsm.to_owned(), || place.to_owned());
    let text = pem::text(bytes).map_err(|source| PinError::NotText { hsm: hsm(), place: place(), source })?;
    let pin = files::one_line(text).ok_or_else(|| PinError::Lines { hsm: hsm(), place: place() })?;
    if pin.is_empty() {
        return Err(PinError::Empty { hsm: hsm(), place: place() });
    }
    if pin.starts_with(char::is_whitespace) || pin.ends_with(char::is_whitespace) {
        tracing::warn!(
            hsm = hsm(),
            place = place(),
            "the PIN begins or ends with white space, which counts as a part of the PIN"
        );
    }
    Ok(Zeroizing::new(pin.to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_pin_is_one_line_of_text_that_only_its_owner_reads() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pin");
        let source = PinSource::File(path.clone());
        let read = || source.read("hsm-a");
        let write = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        };
        for (content, expected) in [
            (&b"1234\n"[..], "1234"),
            (b"1234\r\n", "1234"),
            (b" 12 34 ", " 12 34 "),
            (b"\xef\xbb\xbf1234\r\n", "1234"),
        ] {
            write(content);
            assert_eq!(*read().unwrap(), expected);
        }
        write(b"\xef\xbb\xbf\n");
        assert!(matches!(read(), Err(PinError::Empty { .. })));
        write(&[0xff]);
        assert!(matches!(read(), Err(PinError::NotText { source: TextError::NotUtf8, .. })));
        // If the daemon tried them, each would count as a wrong PIN.
        write(b"\xff\xfe1\x002\x00");
        let said = read().unwrap_err().to_string();
        assert!(said.contains("UTF-16") && said.contains("is not tried"), "{said}");
        write(b"1234\n\n");
        assert!(matches!(read(), Err(PinError::Lines { .. })));
        write("9".repeat(5000).as_bytes());
        assert!(matches!(read(), Err(PinError::File { source: FileError::TooLong { .. }, .. })));
        write(b"1234");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let said = read().unwrap_err().to_string();
        assert!(said.contains("others may read") && said.contains("run: chmod 600"), "{said}");
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(read(), Err(PinError::File { .. })));
        let variable = |name: &str| PinSource::Env(name.to_owned()).read("hsm-a");
        assert!(matches!(variable("CLAVIGER_TEST_NO_SUCH_PIN"), Err(PinError::Unset { .. })));
        // Cargo sets this variable for every test.
        assert_eq!(*variable("CARGO_PKG_NAME").unwrap(), env!("CARGO_PKG_NAME"));
    }
}
