//! The files that a host keeps on disk: its keys and its health certificate.
//!
//! ```text
//! DIR/hostkey.pem       private: registered with the service       hostkey.pub.pem   its public half
//!                       (absent if the host attests with its TPM)
//! DIR/identitykey.pem   private: the service encrypts to this key
//! DIR/health.pem        certificate of the identity key, kept until shortly before it expires
//! ```

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;

use claviger_protocol::certificate::Certificate;
use claviger_protocol::rsa_key::{KeyError, RsaPrivateKey};
use data_encoding::HEXLOWER;

use crate::files::{self, Existing, FileError};

const HOST_KEY: &str = "hostkey.pem";
const HOST_KEY_PUBLIC: &str = "hostkey.pub.pem";
const IDENTITY_KEY: &str = "identitykey.pem";
const HEALTH: &str = "health.pem";

/// Magic numbers of file systems in memory.
const TMPFS: i64 = 0x0102_1994;
const RAMFS: i64 = 0x8584_58f6;

/// Length in bits of an identity key that lasts for one boot.
const IDENTITY_BITS: u32 = 3072;

/// Seconds before its end from which a certificate is no longer used: a release takes time, and clocks differ.
const MARGIN: i64 = 300;

/// Reasons why a file of the host is missing or unusable.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file cannot be read or written, or other users can read a private key.
    #[error(transparent)]
    File(#[from] FileError),
    /// The host has no keys yet.
    #[error("{} is not there; make this host's keys with: claviger host new-key --dir {}", .0.display(), files::folder(.0).display())]
    NoKey(PathBuf),
    /// The host has keys, and they are not overwritten.
    #[error("{} is there already; its public half is in {HOST_KEY_PUBLIC} beside it. To replace it, move it away first", .0.display())]
    KeyExists(PathBuf),
    /// The folder survives a reboot, but its keys must last for one boot only.
    #[error("{} is not on a tmpfs: the identity key of a host that attests by its TPM has to be gone after the boot which it proved; use a folder below /run", .0.display())]
    NotVolatile(PathBuf),
    /// A key cannot be made.
    #[error("{}: {source}", path.display())]
    Key {
        /// The file of the key.
        path: PathBuf,
        /// The error of the key generation.
        source: KeyError,
    },
}

/// The folder with the keys of a host.
#[derive(Clone, Debug)]
pub struct Folder(PathBuf);

/// The keys of a host.
pub struct Keys {
    /// The key that is registered with the service; `None` if the TPM's endorsement key is registered instead.
    pub host: Option<Arc<RsaPrivateKey>>,
    /// The key that health certificates certify.
    pub identity: Arc<RsaPrivateKey>,
}

impl Folder {
    /// Names the folder `dir`, which may not exist yet.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// Makes the keys of the host. Returns the host key and the path of its public half. An existing identity key is
    /// kept.
    ///
    /// # Errors
    /// [`StoreError`]: a host key exists, no key of `bits` can be made, or a file cannot be written.
    pub fn make_keys(&self, bits: u32) -> Result<(RsaPrivateKey, PathBuf), StoreError> {
        let path = self.0.join(HOST_KEY);
        if path.exists() {
            return Err(StoreError::KeyExists(path));
        }
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.0);
        made.map_err(FileError::of(&self.0))?;
        let key = |name: &str| {
            RsaPrivateKey::generate(bits).map_err(|source| StoreError::Key { path: self.0.join(name), source })
        };
        let identity = self.0.join(IDENTITY_KEY);
        if !identity.exists() {
            files::write(&identity, key(IDENTITY_KEY)?.to_pkcs8_pem().as_bytes(), Existing::Replace)?;
        }
        let host = key(HOST_KEY)?;
        let public = self.0.join(HOST_KEY_PUBLIC);
        files::write(&public, host.public().to_pem().as_bytes(), Existing::Replace)?;
        // The host key is written last: a folder with a host key is complete.
        files::write(&path, host.to_pkcs8_pem().as_bytes(), Existing::Replace)?;
        Ok((host, public))
    }

    /// Reads the keys of the host.
    ///
    /// # Errors
    /// [`StoreError`]: a file is missing, has other content, or can be read by other users.
    pub fn keys(&self) -> Result<Keys, StoreError> {
        Ok(Keys { host: Some(Arc::new(self.key(HOST_KEY)?)), identity: Arc::new(self.key(IDENTITY_KEY)?) })
    }

    /// Returns the keys of a host that attests with its TPM. This is an identity key only, which is made if it does not
    /// exist. The folder must be on a tmpfs, so that every boot has its own key.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) fn volatile_keys(&self) -> Result<Keys, StoreError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.0);
        made.map_err(FileError::of(&self.0))?;
        let file_system = rustix::fs::statfs(&self.0).map_err(|error| FileError::of(&self.0)(error.into()))?;
        if ![TMPFS, RAMFS].contains(&(file_system.f_type as i64)) {
            return Err(StoreError::NotVolatile(self.0.clone()));
        }
        let path = self.0.join(IDENTITY_KEY);
        if !path.exists() {
            let key = RsaPrivateKey::generate(IDENTITY_BITS);
            let key = key.map_err(|source| StoreError::Key { path: path.clone(), source })?;
            files::write(&path, key.to_pkcs8_pem().as_bytes(), Existing::Replace)?;
        }
        Ok(Keys { host: None, identity: Arc::new(self.key(IDENTITY_KEY)?) })
    }

    /// The path of the public half of the host key.
    #[must_use]
    pub fn public_key_file(&self) -> PathBuf {
        self.0.join(HOST_KEY_PUBLIC)
    }

    /// The path of the health certificate.
    #[must_use]
    pub fn health_file(&self) -> PathBuf {
        self.0.join(HEALTH)
    }

    fn key(&self, name: &str) -> Result<RsaPrivateKey, StoreError> {
        let path = self.0.join(name);
        match files::read_rsa_private_key(&path) {
            Err(error) if error.is_missing() => Err(StoreError::NoKey(path)),
            other => Ok(other?),
        }
    }

    /// Returns the stored health certificate, if it certifies these keys and is usable for a release at `now` (seconds
    /// since 1970).
    #[must_use]
    pub fn health(&self, keys: &Keys, now: i64) -> Option<Certificate> {
        let path = self.health_file();
        // An unreadable certificate is replaced by a new one. If the file itself is the problem, the write reports it.
        let certificate = files::read_certificate(&path).ok()?;
        let of_host = keys.host.as_ref().is_none_or(|host| {
            certificate.subject_serial_number() == Some(&HEXLOWER.encode(&host.public().spki_sha256()))
        });
        let ours = certificate.key() == keys.identity.public() && of_host;
        let in_time = certificate.not_before() <= now && now < certificate.not_after() - MARGIN;
        (ours && in_time).then_some(certificate)
    }

    /// Stores a health certificate.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub(crate) fn keep_health(&self, certificate: &Certificate) -> Result<(), StoreError> {
        Ok(files::write(&self.health_file(), certificate.to_pem().as_bytes(), Existing::Replace)?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use crate::files::testing::{mode, names};
    use claviger_protocol::health::{self, ResultType, signer_template};

    const NOW: i64 = 1_800_000_000;
    const END: i64 = NOW - 300 + 8 * 3600;

    #[test]
    fn keys_are_made_once_and_are_their_owners_alone() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = Folder::new(temporary.path().join("a/b"));
        assert!(folder.keys().err().unwrap().to_string().contains("claviger host new-key --dir "));
        let (host, public) = folder.make_keys(2048).unwrap();
        assert_eq!(names(&folder.0), [HOST_KEY, HOST_KEY_PUBLIC, IDENTITY_KEY]);
        assert_eq!((mode(&folder.0), mode(&folder.0.join(HOST_KEY))), (0o700, 0o600));
        assert_eq!(mode(&folder.0.join(IDENTITY_KEY)), 0o600);
        assert_eq!(fs::read_to_string(public).unwrap(), host.public().to_pem());
        let keys = folder.keys().unwrap();
        let public_of = |keys: &Keys| keys.host.as_ref().unwrap().public().clone();
        assert!(public_of(&keys) == *host.public() && keys.identity.public() != host.public());
        assert!(matches!(folder.make_keys(2048), Err(StoreError::KeyExists(_))));
        assert!(public_of(&folder.keys().unwrap()) == *host.public());
        let key = folder.0.join(HOST_KEY);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
        let said = folder.keys().err().unwrap().to_string();
        assert!(said.contains("others may read") && said.contains("chmod 600"), "{said}");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(folder.0.join(HOST_KEY), "no key").unwrap();
        assert!(matches!(folder.keys(), Err(StoreError::File(FileError::Content { .. }))));
    }

    #[test]
    fn the_keys_of_a_measured_host_are_gone_with_its_boot() {
        let temporary = tempfile::tempdir_in("/dev/shm").unwrap();
        let folder = Folder::new(temporary.path().join("host"));
        let keys = folder.volatile_keys().unwrap();
        assert!(keys.host.is_none());
        assert_eq!((names(&folder.0), mode(&folder.0.join(IDENTITY_KEY))), (vec![IDENTITY_KEY.to_owned()], 0o600));
        assert!(folder.volatile_keys().unwrap().identity.public() == keys.identity.public(), "made once");
        let on_disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        assert!(matches!(Folder::new(on_disk.path()).volatile_keys(), Err(StoreError::NotVolatile(_))));
    }

    #[test]
    fn a_certificate_is_kept_for_its_keys_until_shortly_before_its_end() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = Folder::new(temporary.path());
        folder.make_keys(2048).unwrap();
        let keys = folder.keys().unwrap();
        let signer = RsaPrivateKey::generate(2048).unwrap();
        let template = signer_template(signer.public(), NOW, NOW + 1).unwrap().to_be_signed().unwrap();
        let signer_certificate = Certificate::parse(&template.sign_with(&signer).unwrap()).unwrap();
        let (host, identity) = (keys.host.as_ref().unwrap().public(), keys.identity.public());
        let kind = ResultType::EncryptionCertificate;
        let issued = health::issue(&signer_certificate, "node", host, identity, kind, NOW).unwrap();
        let certificate = Certificate::parse(&issued.sign_with(&signer).unwrap()).unwrap();

        assert!(folder.health(&keys, NOW).is_none());
        folder.keep_health(&certificate).unwrap();
        assert_eq!(mode(&folder.health_file()), 0o600);
        let kept = |now| folder.health(&keys, now).map(|kept| kept.der().to_vec());
        let expected = Some(certificate.der().to_vec());
        assert_eq!(
            (kept(NOW), kept(NOW - 300), kept(END - MARGIN - 1)),
            (expected.clone(), expected.clone(), expected)
        );
        assert_eq!((kept(NOW - 301), kept(END - MARGIN), kept(i64::MAX)), (None, None, None));
        // With other keys the host has to attest again.
        let other = Arc::new(RsaPrivateKey::generate(2048).unwrap());
        let exchanged = Keys { host: keys.host.clone(), identity: other.clone() };
        assert!(folder.health(&exchanged, NOW).is_none());
        assert!(folder.health(&Keys { host: Some(other), identity: keys.identity.clone() }, NOW).is_none());
        // A host that attests with its TPM has no host key to compare.
        assert!(folder.health(&Keys { host: None, identity: keys.identity.clone() }, NOW).is_some());
        fs::write(folder.health_file(), b"\xff").unwrap();
        assert!(folder.health(&keys, NOW).is_none());
    }
}
