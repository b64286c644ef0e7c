//! Temporary certificate authorities, created with OpenSSL.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::tool::{said, tool};

/// A certificate authority and the directory of its files.
pub struct Authority {
    folder: PathBuf,
    name: String,
}

/// Files of a certificate and its key.
pub type Pair = (PathBuf, PathBuf);

impl Authority {
    /// Creates an authority with its own certificate and key.
    ///
    /// # Panics
    /// If OpenSSL fails.
    #[must_use]
    pub fn new(folder: &Path, name: &str) -> Self {
        let authority = Self { folder: folder.to_owned(), name: name.to_owned() };
        let (key, certificate) = (authority.file("key"), authority.file("pem"));
        let subject = format!("/CN=throw-away {name}");
        let mut command = openssl(&["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", &subject]);
        done(command.arg("-keyout").arg(key).arg("-out").arg(certificate));
        authority
    }

    fn file(&self, end: &str) -> PathBuf {
        self.folder.join(format!("{}.{end}", self.name))
    }

    /// Returns the file of the authority's certificate.
    #[must_use]
    pub fn certificate_file(&self) -> PathBuf {
        self.file("pem")
    }

    /// Issues a certificate for a new key with this subject and, unless it is empty, this subjectAltName.
    ///
    /// # Panics
    /// If OpenSSL fails.
    #[must_use]
    pub fn issue(&self, file: &str, subject: &str, alternative: &str) -> Pair {
        let path = |end: &str| self.folder.join(format!("{file}.{end}"));
        let (key, certificate, extensions, request) = (path("key"), path("pem"), path("ext"), path("csr"));
        let alternative =
            if alternative.is_empty() { String::new() } else { format!("subjectAltName={alternative}\n") };
        std::fs::write(&extensions, format!("basicConstraints=CA:false\n{alternative}")).unwrap();
        let mut made = openssl(&["req", "-new", "-subj", subject, "-newkey", "rsa:2048", "-nodes"]);
        done(made.arg("-keyout").arg(&key).arg("-out").arg(&request));
        let mut issued = openssl(&["x509", "-req", "-CAcreateserial", "-days", "30"]);
        issued.arg("-CA").arg(self.file("pem")).arg("-CAkey").arg(self.file("key"));
        done(issued.arg("-in").arg(&request).arg("-out").arg(&certificate).arg("-extfile").arg(&extensions));
        (certificate, key)
    }
}

fn openssl(arguments: &[&str]) -> Command {
    let mut command = Command::new("openssl");
    command.args(arguments);
    command
}

fn done(command: &mut Command) {
    let output = tool("openssl", command);
    assert!(output.status.success(), "{command:?}: {}", said(&output));
}
