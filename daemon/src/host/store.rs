//! What a host keeps on disk: its keys, its health certificate, and files that are whole at every moment.
//!
//! ```text
//! DIR/hostkey.pem       private: what the host is registered with     hostkey.pub.pem   its public half
//! DIR/identitykey.pem   private: what the service encrypts to
//! DIR/health.pem        the certificate over the identity key, kept until shortly before it expires
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use claviger_protocol::certificate::Certificate;
use claviger_protocol::rsa_key::{KeyError, RsaPrivateKey};
use data_encoding::HEXLOWER;
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

const HOST_KEY: &str = "hostkey.pem";
const HOST_KEY_PUBLIC: &str = "hostkey.pub.pem";
const IDENTITY_KEY: &str = "identitykey.pem";
const HEALTH: &str = "health.pem";

/// Longest file that is read as a key or a certificate, in octets.
const FILE_LIMIT: u64 = 64 * 1024;
/// A certificate is not used in its last seconds: a release may take as long, and clocks differ.
const MARGIN: i64 = 300;

/// Why a file of the host is not there, or not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// The host has no keys yet.
    #[error("{} is not there; make this host's keys with: claviger host new-key --dir {}", .0.display(), folder(.0).display())]
    NoKey(PathBuf),
    /// The host has keys, which are not overwritten.
    #[error("{} is there already; its public half is in {HOST_KEY_PUBLIC} beside it. To replace it, move it away first", .0.display())]
    KeyExists(PathBuf),
    /// A key that cannot be used or made.
    #[error("{}: {source}", path.display())]
    Key {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        source: KeyError,
    },
}

/// The folder with a host's keys.
#[derive(Clone, Debug)]
pub struct Folder(PathBuf);

/// Both of a host's keys.
pub struct Keys {
    /// What it is registered with.
    pub host: Arc<RsaPrivateKey>,
    /// What its health certificates are made over.
    pub identity: Arc<RsaPrivateKey>,
}

impl Folder {
    /// The folder `dir`, which need not exist yet.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// Makes the host's keys; gives the host key and where its public half is. An identity key that is there is kept.
    ///
    /// # Errors
    /// [`StoreError`]: there is a host key already, no key of `bits` can be made, or a file cannot be written.
    pub fn make_keys(&self, bits: u32) -> Result<(RsaPrivateKey, PathBuf), StoreError> {
        let path = self.0.join(HOST_KEY);
        if path.exists() {
            return Err(StoreError::KeyExists(path));
        }
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.0);
        made.map_err(|source| StoreError::File { path: self.0.clone(), source })?;
        let key = |name: &str| {
            RsaPrivateKey::generate(bits).map_err(|source| StoreError::Key { path: self.0.join(name), source })
        };
        let identity = self.0.join(IDENTITY_KEY);
        if !identity.exists() {
            replace(&identity, key(IDENTITY_KEY)?.to_pkcs8_pem().as_bytes())?;
        }
        let host = key(HOST_KEY)?;
        let public = self.0.join(HOST_KEY_PUBLIC);
        replace(&public, host.public().to_pem().as_bytes())?;
        // Last: a folder with a host key is whole.
        replace(&path, host.to_pkcs8_pem().as_bytes())?;
        Ok((host, public))
    }

    /// The host's keys.
    ///
    /// # Errors
    /// [`StoreError`]: files that are missing or hold something else.
    pub fn keys(&self) -> Result<Keys, StoreError> {
        Ok(Keys { host: Arc::new(self.key(HOST_KEY)?), identity: Arc::new(self.key(IDENTITY_KEY)?) })
    }

    /// Where the host key's public half is.
    #[must_use]
    pub fn public_key_file(&self) -> PathBuf {
        self.0.join(HOST_KEY_PUBLIC)
    }

    /// Where the health certificate is kept.
    #[must_use]
    pub fn health_file(&self) -> PathBuf {
        self.0.join(HEALTH)
    }

    fn key(&self, name: &str) -> Result<RsaPrivateKey, StoreError> {
        let path = self.0.join(name);
        let text = match read_secret(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(StoreError::NoKey(path)),
            Err(source) => return Err(StoreError::File { path, source }),
            Ok(text) => text,
        };
        let key = std::str::from_utf8(&text).map_err(|_| KeyError::Format).and_then(RsaPrivateKey::from_pkcs8_pem);
        key.map_err(|source| StoreError::Key { path, source })
    }

    /// The health certificate that is kept, if it is over these keys and will do for a release at `now` (unix seconds).
    #[must_use]
    pub fn health(&self, keys: &Keys, now: i64) -> Option<Certificate> {
        let path = self.health_file();
        // What cannot be read is made anew; writing it will say what is wrong.
        let text = read_secret(&path).ok()?;
        let certificate = Certificate::from_pem(std::str::from_utf8(&text).ok()?).ok()?;
        let host_key = HEXLOWER.encode(&keys.host.public().spki_sha256());
        let ours =
            certificate.key() == keys.identity.public() && certificate.subject_serial_number() == Some(&host_key);
        let in_time = certificate.not_before() <= now && now < certificate.not_after() - MARGIN;
        (ours && in_time).then_some(certificate)
    }

    /// Keeps a health certificate.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn keep_health(&self, certificate: &Certificate) -> Result<(), StoreError> {
        replace(&self.health_file(), certificate.to_pem().as_bytes())
    }
}

/// Puts `octets` in the place of what `path` holds, readable by its owner alone. Whatever happens meanwhile, the file is
/// the old one or the new one, whole; after this call it is the new one, also if the power fails.
///
/// # Errors
/// [`StoreError::File`]; the file is the old one then, unless only the folder could not be forced to the disk.
pub fn replace(path: &Path, octets: &[u8]) -> Result<(), StoreError> {
    let failed = |source| StoreError::File { path: path.to_owned(), source };
    let name = path.file_name().ok_or_else(|| failed(io::Error::new(ErrorKind::InvalidInput, "it names no file")))?;
    let mut tag = [0; 8];
    SystemRandom::new().fill(&mut tag).map_err(|_| failed(io::Error::other("no randomness")))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.new", HEXLOWER.encode(&tag)));
    let temporary = path.with_file_name(temporary);
    let written = write_new(&temporary, octets).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.and_then(|()| File::open(folder(path))?.sync_all()).map_err(failed)
}

fn write_new(path: &Path, octets: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(octets)?;
    file.sync_all()
}

/// The folder that a file is in.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether both paths lead to one file, or would.
#[must_use]
pub fn same_file(one: &Path, other: &Path) -> bool {
    let file = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    let place = |path: &Path| Some((folder(path).canonicalize().ok()?, path.file_name()?.to_owned()));
    match (file(one), file(other)) {
        (Some(one), Some(other)) => one == other,
        _ => place(one).is_some_and(|one| Some(one) == place(other)),
    }
}

/// Reads a file that may be secret, and warns when others may read it, too.
fn read_secret(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.mode() & 0o066 != 0 {
        tracing::warn!(
            file = %path.display(), mode = format!("{:04o}", metadata.mode() & 0o7777),
            "others may read or change this file: chmod 0600 it"
        );
    }
    // The capacity is given at once: a buffer that grows leaves copies of the key behind.
    let mut octets = Zeroizing::new(Vec::with_capacity(FILE_LIMIT as usize));
    file.take(FILE_LIMIT).read_to_end(&mut octets)?;
    Ok(octets)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use claviger_protocol::health::{self, ResultType, signer_template};

    const NOW: i64 = 1_800_000_000;
    const END: i64 = NOW - 300 + 8 * 3600;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

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
        assert!(keys.host.public() == host.public() && keys.identity.public() != host.public());
        assert!(matches!(folder.make_keys(2048), Err(StoreError::KeyExists(_))));
        assert!(folder.keys().unwrap().host.public() == host.public());
        fs::write(folder.0.join(HOST_KEY), "no key").unwrap();
        assert!(matches!(folder.keys(), Err(StoreError::Key { .. })));
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
        let (host, identity) = (keys.host.public(), keys.identity.public());
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
        // Other keys: whoever made them has to attest.
        let other = Arc::new(RsaPrivateKey::generate(2048).unwrap());
        let exchanged = Keys { host: keys.host.clone(), identity: other.clone() };
        assert!(folder.health(&exchanged, NOW).is_none());
        assert!(folder.health(&Keys { host: other, identity: keys.identity.clone() }, NOW).is_none());
        fs::write(folder.health_file(), b"\xff").unwrap();
        assert!(folder.health(&keys, NOW).is_none());
    }

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let temporary = tempfile::tempdir().unwrap();
        let file = temporary.path().join("file");
        fs::write(&file, "old").unwrap();
        let reader = File::open(&file).unwrap();
        replace(&file, b"new").unwrap();
        assert_eq!((fs::read(&file).unwrap(), mode(&file)), (b"new".to_vec(), 0o600));
        // Who had it open still has the old one: it was never written to.
        assert_eq!(io::read_to_string(reader).unwrap(), "old");
        assert_eq!(names(temporary.path()), ["file"]);
        // What cannot be replaced stays, and nothing is left beside it.
        let folder = temporary.path().join("folder");
        fs::create_dir(&folder).unwrap();
        let message = replace(&folder, b"new").unwrap_err().to_string();
        assert!(message.starts_with(&folder.display().to_string()), "{message}");
        assert_eq!(names(temporary.path()), ["file", "folder"]);
        assert!(replace(Path::new("/nowhere/file"), b"new").is_err());
    }

    #[test]
    fn one_file_is_known_by_any_name() {
        let temporary = tempfile::tempdir().unwrap();
        let [one, link, other] = ["one", "link", "other"].map(|name| temporary.path().join(name));
        assert!(same_file(&one, &temporary.path().join("./one")) && !same_file(&one, &other));
        fs::write(&one, "").unwrap();
        std::os::unix::fs::symlink(&one, &link).unwrap();
        assert!(same_file(&one, &link) && same_file(&one, &one) && !same_file(&one, &other));
    }
}
