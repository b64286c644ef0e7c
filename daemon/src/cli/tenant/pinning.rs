//! Trust of a tenant: metadata documents, the thumbprints that pin them, and the folder of imported guardians.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use claviger_client::files::{self, Existing};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::metadata::Metadata;
use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};

use crate::sys::failure::Failure;

/// Largest accepted metadata document, in bytes; a usual one has about ten thousand.
pub(super) const MAX_METADATA: usize = 1024 * 1024;

/// SHA-256 of a certificate.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Thumbprint(Vec<u8>);

impl FromStr for Thumbprint {
    type Err = String;

    /// Parses hexadecimal in either case, with or without colons.
    fn from_str(text: &str) -> Result<Self, String> {
        let digits: String = text.chars().filter(|c| *c != ':').collect();
        match HEXLOWER_PERMISSIVE.decode(digits.as_bytes()) {
            Ok(octets) if octets.len() == 32 => Ok(Self(octets)),
            Ok(octets) if octets.len() == 20 => {
                Err("this is a SHA-1 thumbprint; SHA-256 is needed, 64 digits".to_owned())
            }
            _ => Err("a SHA-256 thumbprint has 64 hexadecimal digits".to_owned()),
        }
    }
}

/// How a metadata document is trusted.
#[derive(Clone, Debug, clap::Args)]
pub struct Trust {
    /// SHA-256 thumbprint of the guardian's signing certificate; get it from the guardian's operator over a separate
    /// channel
    #[arg(long, value_name = "THUMBPRINT", conflicts_with = "trust_unpinned")]
    pub pin: Option<Thumbprint>,
    /// Trust the document without a pin: an attacker who changes it on its way gets the keys of the virtual machines
    #[arg(long)]
    pub trust_unpinned: bool,
}

impl Trust {
    /// Checks that the signing certificate is the pinned one. It vouches for the encryption certificate: parsing has
    /// verified the document's signatures.
    pub(super) fn judge(&self, metadata: &Metadata) -> Result<(), Failure> {
        let found = thumbprint(&signing_certificate(metadata)?);
        match &self.pin {
            Some(pin) if HEXLOWER.encode(&pin.0) == found => Ok(()),
            Some(pin) => Err(format!(
                "the guardian's signing certificate is not the pinned one: its thumbprint is {found}, pinned is {}; \
                 do not use this document unless its operator confirms the change",
                HEXLOWER.encode(&pin.0)
            )
            .into()),
            None if self.trust_unpinned => Ok(()),
            None => Err(format!(
                "the document is not believed yet: ask the guardian's operator, by another way than it came, whether \
                 the thumbprint of its signing certificate is\n  {found}\nand then say: --pin {found}"
            )
            .into()),
        }
    }
}

/// A certificate's thumbprint in the printed form.
pub(super) fn thumbprint(certificate: &Certificate) -> String {
    HEXLOWER.encode(&certificate.thumbprint())
}

/// The certificate whose thumbprint pins a guardian.
pub(super) fn signing_certificate(metadata: &Metadata) -> Result<Certificate, Failure> {
    Ok(Certificate::parse(&metadata.guardian.signing_certificate)?)
}

/// Reads a metadata document and verifies its signatures.
pub(super) fn read_metadata(path: &Path) -> Result<(Vec<u8>, Metadata), Failure> {
    let octets = files::read(path, MAX_METADATA)?.to_vec();
    let metadata = Metadata::parse(&octets).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok((octets, metadata))
}

/// The folder of imported guardians.
#[derive(Clone, Debug, clap::Args)]
pub struct Guardians {
    /// Folder of the imported guardians
    #[arg(long, value_name = "DIR", default_value = "guardians")]
    pub guardians: PathBuf,
}

impl Guardians {
    fn file(&self, name: &str) -> Result<PathBuf, Failure> {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(fits) {
            return Err("a guardian's name has 1 to 64 letters, digits, '.', '-' or '_', and no '.' at first".into());
        }
        Ok(self.guardians.join(format!("{name}.xml")))
    }

    /// Fails if the name is already used or not allowed.
    pub(super) fn must_be_free(&self, name: &str) -> Result<(), Failure> {
        Ok(files::must_be_new(&self.file(name)?)?)
    }

    /// Stores a guardian's document, byte for byte.
    pub(super) fn keep(&self, name: &str, document: &[u8]) -> Result<PathBuf, Failure> {
        let file = self.file(name)?;
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.guardians);
        made.map_err(|error| format!("{}: {error}", self.guardians.display()))?;
        files::write(&file, document, Existing::Keep)?;
        Ok(file)
    }

    /// Loads an imported guardian and verifies its signatures again.
    pub(super) fn load(&self, name: &str) -> Result<Metadata, Failure> {
        let file = self.file(name)?;
        if !file.exists() {
            return Err(format!(
                "no guardian {name} in {}; import it: claviger guardian import {name} METADATA.xml --pin THUMBPRINT",
                self.guardians.display()
            )
            .into());
        }
        Ok(read_metadata(&file)?.1)
    }

    /// The names of the imported guardians, sorted.
    pub(super) fn names(&self) -> Result<Vec<String>, Failure> {
        let failed = |error| format!("{}: {error}; claviger guardian import makes it", self.guardians.display());
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.guardians).map_err(failed)? {
            let file = entry.map_err(failed)?.file_name();
            let name = file.to_str().and_then(|file| file.strip_suffix(".xml")).filter(|name| self.file(name).is_ok());
            names.extend(name.map(str::to_owned));
        }
        names.sort_unstable();
        Ok(names)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn thumbprints_are_read_as_tools_print_them() {
        let plain = "0a".repeat(32);
        let colons = vec!["0A"; 32].join(":");
        assert_eq!(plain.parse::<Thumbprint>().unwrap(), colons.parse::<Thumbprint>().unwrap());
        assert!("0a".repeat(20).parse::<Thumbprint>().unwrap_err().contains("SHA-1"));
        for bad in [String::new(), "0a".repeat(31), "0g".repeat(32), "é".repeat(32)] {
            assert!(bad.parse::<Thumbprint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_stay_in_their_folder() {
        let store = Guardians { guardians: PathBuf::from("folder") };
        assert_eq!(store.file("hgs-1.example").unwrap(), Path::new("folder/hgs-1.example.xml"));
        for bad in ["", ".", "..", "../x", "a/b", ".hidden", "a b", "é", &"x".repeat(65)] {
            assert!(store.file(bad).is_err(), "{bad:?}");
        }
    }
}
