//! Reads passwords from the terminal without echo, or from a file. Never from the command line, which other users can
//! read.

use std::path::Path;

use claviger_client::files;
use zeroize::Zeroizing;

use crate::sys::failure::Failure;

/// Longest password, in bytes.
const LONGEST: usize = 1024;

/// Reads a password from `file`, without its line break, or asks for it. With `twice`, a new password is asked for
/// twice.
pub(super) fn password(
    prompt: &str,
    option: &str,
    file: Option<&Path>,
    twice: bool,
) -> Result<Zeroizing<String>, Failure> {
    let Some(file) = file else { return asked(prompt, option, twice) };
    Ok(files::read_secret_line(file, LONGEST, "password")?)
}

fn asked(prompt: &str, option: &str, twice: bool) -> Result<Zeroizing<String>, Failure> {
    let ask = |prompt: &str| {
        let answer = rpassword::prompt_password(prompt);
        answer
            .map(Zeroizing::new)
            .map_err(|error| format!("there is no terminal to ask at ({error}); use {option} FILE"))
    };
    let first = ask(&format!("{prompt}: "))?;
    if twice && ask(&format!("{prompt}, again: "))? != first {
        return Err("the two are not the same".into());
    }
    Ok(first)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_password_in_a_file_is_the_owners_and_ends_before_the_line_break() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("password");
        for (octets, expected) in [("a b\n", "a b"), ("a\r\n", "a"), ("\u{feff}a\r\n", "a"), ("", "")] {
            fs::write(&file, octets).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
            assert_eq!(*password("", "", Some(&file), true).unwrap(), expected);
        }
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(password("", "", Some(&file), false).unwrap_err().to_string().contains("chmod 600"));
    }
}
