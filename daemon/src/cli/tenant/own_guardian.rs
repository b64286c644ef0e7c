//! A tenant's own guardian on disk: a folder with two key pairs and their certificates, as PEM for OpenSSL.
//!
//! ```text
//! DIR/owner-signing.key.pem      owner-signing.crt.pem
//! DIR/owner-encryption.key.pem   owner-encryption.crt.pem
//! ```

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use claviger_client::files::{self, Existing};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::owner::Owner;
use claviger_protocol::rsa_key::RsaPrivateKey;

use crate::lab::{OWNER_ROLES, self_signed};
use crate::sys::failure::Failure;

/// Creates the folder, which must not exist, and a guardian in it.
pub(super) fn make(dir: &Path, name: &str, bits: u32) -> Result<Owner, Failure> {
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            format!("{} is there already and is not written over; choose another folder", dir.display())
        }
        std::io::ErrorKind::NotFound => {
            format!("{}: {error}; make the folder that it is to be in first", dir.display())
        }
        _ => format!("{}: {error}", dir.display()),
    };
    fs::DirBuilder::new().mode(0o700).create(dir).map_err(failed)?;
    let made = fill(dir, name, bits);
    if made.is_err() {
        // The folder is new, so everything in it was written by this call.
        let _ = fs::remove_dir_all(dir);
    }
    made
}

fn fill(dir: &Path, name: &str, bits: u32) -> Result<Owner, Failure> {
    for role in OWNER_ROLES {
        let key = RsaPrivateKey::generate(bits)?;
        let certificate = self_signed(&format!("{name} {role}"), &key)?;
        files::write(&file(dir, role, "key"), key.to_pkcs8_pem().as_bytes(), Existing::Keep)?;
        files::write(&file(dir, role, "crt"), certificate.to_pem().as_bytes(), Existing::Keep)?;
    }
    load(dir)
}

/// Reads a tenant's own guardian.
pub(in crate::cli) fn load(dir: &Path) -> Result<Owner, Failure> {
    if !dir.is_dir() {
        return Err(
            format!("{} is no folder of an own guardian; make one: claviger guardian new DIR", dir.display()).into()
        );
    }
    let [signing, encryption] = OWNER_ROLES.map(|role| load_pair(dir, role));
    let ((signing_key, signing_certificate), (encryption_key, encryption_certificate)) = (signing?, encryption?);
    Ok(Owner { signing_key, signing_certificate, encryption_key, encryption_certificate })
}

fn load_pair(dir: &Path, role: &str) -> Result<(RsaPrivateKey, Certificate), Failure> {
    let (key_file, certificate_file) = (file(dir, role, "key"), file(dir, role, "crt"));
    let key = files::read_rsa_private_key(&key_file)?;
    let certificate = files::read_certificate(&certificate_file)?;
    if certificate.key() != key.public() {
        return Err(format!("{} is not the certificate of {}", certificate_file.display(), key_file.display()).into());
    }
    Ok((key, certificate))
}

fn file(dir: &Path, role: &str, end: &str) -> PathBuf {
    dir.join(format!("owner-{role}.{end}.pem"))
}
