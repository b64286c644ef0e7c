//! A laboratory on disk: soft tokens with the same keys, a registered host, a tenant with virtual machines.
//!
//! ```text
//! DIR/claviger.toml     serves the lab: claviger serve --config DIR/claviger.toml
//! DIR/softhsm2.conf     tokens/   pins/
//! DIR/state/            the daemon's: state.db, audit.jsonl, admin.sock
//! DIR/host/             hostkey.pem (private), hostkey.pub.pem, identitykey.pem (private)
//! DIR/tenant/           owner-{signing,encryption}.{key,crt}.pem, vm-0001.protector.xml …
//! ```

pub mod demo;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use claviger_client::files::{self, Existing, FileError};
use claviger_hsm::{Cluster, KeyId, KeyUsage as HsmKeyUsage, NewKey, Pin, init_token, set_env};
use claviger_protocol::certificate::build::{BuildError, DistinguishedName, Template, random_serial};
use claviger_protocol::certificate::{Certificate, CertificateError, KeyUsage};
use claviger_protocol::metadata::Metadata;
use claviger_protocol::owner::{Owner, OwnerError};
use claviger_protocol::rsa_key::{KeyError, RsaPrivateKey, SignError};
use data_encoding::HEXLOWER;
use ring::rand::{SecureRandom, SystemRandom};

use crate::admin::{self, AdminError};
use crate::config::{Config, ConfigError, Hsm, PinSource, TokenName};
use crate::registry::keys::SERVER_AUTHENTICATION;
use crate::signing::private_parts;
use crate::store::usage_counts::{Usage, UsageError};
use crate::store::{Kind, Labels, NewCertificate, State, StateError};
use crate::sys::clock::unix_now;
use crate::sys::ownership::{self, Untrusted};

/// Name of the registered host.
pub const HOST_NAME: &str = "demo-host";
/// Environment variable with the path of the module, if it is not in a usual place.
pub const MODULE_VARIABLE: &str = "CLAVIGER_SOFTHSM2";
const MODULES: [&str; 5] = [
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
];
/// Marks a folder as a lab from the start, so that an unfinished lab can be created again.
const MARK: &str = ".claviger-lab";
/// Bits of all keys except the guardian's.
const BITS: u32 = 2048;
/// Sessions of each token. A soft token computes on this machine's processors, so more sessions would only queue.
const SESSIONS: usize = 4;
const TEN_YEARS: i64 = 10 * 365 * 24 * 3600;

/// Why a lab cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// SoftHSM2 is not installed.
    #[error(
        "SoftHSM2 was not found; install it (Debian: apt-get install softhsm2), or name its module in {MODULE_VARIABLE}"
    )]
    NoSoftHsm,
    /// The folder contains other files.
    #[error("{} is not empty and holds no lab; choose another --dir", .0.display())]
    NotALab(PathBuf),
    /// Another user could change what is loaded from the folder.
    #[error("{0}; choose a --dir that only this user can write to")]
    Untrusted(#[from] Untrusted),
    /// The folder's path is too long for the sockets in it.
    #[error("{0}; choose a --dir with a shorter path")]
    Socket(#[from] AdminError),
    /// A file of the lab cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The configuration of an existing lab is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The configuration cannot be written.
    #[error("the configuration cannot be written: {0}")]
    Toml(#[from] toml::ser::Error),
    /// A soft token failed.
    #[error("the soft tokens: {0}")]
    Hsm(#[from] claviger_hsm::Failure),
    /// The state failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The usage counts failed.
    #[error(transparent)]
    Usage(#[from] UsageError),
    /// A key file of the lab is invalid, or a key cannot be generated.
    #[error("{what}: {source}")]
    Key {
        /// The key.
        what: String,
        /// The problem.
        source: KeyError,
    },
    /// A certificate of the lab is invalid.
    #[error("{what}: {source}")]
    Certificate {
        /// The certificate.
        what: String,
        /// The problem.
        source: CertificateError,
    },
    /// A certificate cannot be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A certificate cannot be signed.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// An operation of the tenant failed.
    #[error("the tenant: {0}")]
    Owner(#[from] OwnerError),
}

/// A lab in a folder.
pub struct Lab {
    dir: PathBuf,
    /// The daemon's configuration.
    pub config: Config,
    /// Whether the tokens do not have keys yet.
    fresh: bool,
    /// Bits of the guardian's keys.
    bits: u32,
}

/// Settings for the soft tokens of a new lab.
#[derive(Clone, Copy, Debug)]
pub struct Tokens {
    /// Number of tokens.
    pub hsms: usize,
    /// Bits of the guardian's RSA keys.
    pub bits: u32,
}

/// The registered host's keys.
pub struct HostKeys {
    /// The key with which the host is registered.
    pub host: RsaPrivateKey,
    /// The identity key, which health certificates certify.
    pub identity: Arc<RsaPrivateKey>,
}

impl Lab {
    /// Creates the folder and its tokens, or opens an existing lab. Sets the environment for SoftHSM2, so call it while
    /// the process has a single thread.
    ///
    /// # Errors
    /// See [`LabError`].
    pub fn prepare(dir: &Path, listen: SocketAddr, metrics: SocketAddr, tokens: Tokens) -> Result<Self, LabError> {
        ownership::check_parents(dir)?;
        make_folder(dir)?;
        let dir = dir.canonicalize().map_err(FileError::of(dir))?;
        // The configuration names a library that this process loads.
        ownership::check(&dir)?;
        ownership::check_entries(&dir)?;
        let mut lab = Self { config: Config::default(), fresh: true, bits: tokens.bits, dir };
        if lab.config_file().exists() {
            ownership::check(&lab.config_file())?;
            lab.config = Config::load(&lab.config_file())?;
            lab.fresh = false;
        } else {
            // Check this before creating the tokens, which takes a while.
            admin::check_length(&lab.dir.join("state/review.sock"))?;
            lab.clear()?;
            // In the demonstration, one host sends the requests of a whole data centre.
            lab.config.release.host_rate = 0;
        }
        lab.config.server.listen = listen;
        lab.config.server.metrics = metrics;
        if lab.fresh {
            lab.make_tokens(tokens.hsms)?;
        } else {
            lab.write_config()?;
        }
        Ok(lab)
    }

    /// Path of the configuration file.
    #[must_use]
    pub fn config_file(&self) -> PathBuf {
        self.dir.join("claviger.toml")
    }

    /// The lab's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether this call created the lab.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// Removes the files of an interrupted run. Fails if the folder is not a lab.
    fn clear(&self) -> Result<(), LabError> {
        let mark = self.dir.join(MARK);
        let error = FileError::of(&self.dir);
        let empty = fs::read_dir(&self.dir).map_err(error)?.next().is_none();
        if !empty && !mark.exists() {
            return Err(LabError::NotALab(self.dir.clone()));
        }
        for part in ["tokens", "pins", "state", "host", "tenant"] {
            let path = self.dir.join(part);
            if path.exists() {
                fs::remove_dir_all(&path).map_err(FileError::of(&path))?;
            }
            make_folder(&path)?;
        }
        write(&mark, b"")
    }

    fn make_tokens(&mut self, hsms: usize) -> Result<(), LabError> {
        (self.config.env, self.config.hsm) = soft_tokens(&self.dir, hsms)?;
        self.config.server.state = self.dir.join("state");
        Ok(())
    }

    /// Creates the keys on the tokens, and the certificates and the host in the state, if the lab is new.
    ///
    /// # Errors
    /// See [`LabError`].
    pub async fn fill(&self, cluster: &Cluster) -> Result<(), LabError> {
        if !self.fresh {
            return Ok(());
        }
        cluster.start().await?;
        let mut state = State::open(&self.config.server.state)?;
        // Open the counts before there are keys, so that every use of the keys is counted.
        Usage::open(&self.config.server.state, unix_now())?;
        for (kind, name, usage) in [
            (Kind::Signing, "Claviger demo guardian signing", HsmKeyUsage::Sign),
            (Kind::Encryption, "Claviger demo guardian encryption", HsmKeyUsage::Decrypt),
        ] {
            let key = new_key(name, self.bits)?;
            let certificate = self_signed(name, &key)?;
            let id = KeyId(key.public().spki_sha256()[..20].to_vec());
            for hsm in &self.config.hsm {
                let spec = NewKey { id: id.clone(), label: name.to_owned(), bits: self.bits, usage };
                cluster.import_rsa(&hsm.name, spec, private_parts(&key)).await?;
            }
            let spki = key.public().spki_der();
            let new = NewCertificate { kind, der: certificate.der(), key_id: &id.0, spki, primary: true };
            state.add_certificate(&new, unix_now())?;
        }
        let (host, identity) = (new_key("the host's key", BITS)?, new_key("the host's identity key", BITS)?);
        write(&self.dir.join("host/hostkey.pem"), host.to_pkcs8_pem().as_bytes())?;
        write(&self.dir.join("host/hostkey.pub.pem"), host.public().to_pem().as_bytes())?;
        write(&self.dir.join("host/identitykey.pem"), identity.to_pkcs8_pem().as_bytes())?;
        state.add_host(HOST_NAME, host.public().spki_der(), &Labels::default(), unix_now())?;
        for role in OWNER_ROLES {
            let name = format!("Claviger demo tenant {role}");
            let key = new_key(&name, BITS)?;
            let file = |end: &str| self.dir.join(format!("tenant/owner-{role}.{end}.pem"));
            write(&file("crt"), self_signed(&name, &key)?.to_pem().as_bytes())?;
            write(&file("key"), key.to_pkcs8_pem().as_bytes())?;
        }
        // Write the configuration last: a folder with a configuration is a complete lab.
        self.write_config()
    }

    fn write_config(&self) -> Result<(), LabError> {
        let path = self.config_file();
        let settings = self.config.to_toml()?;
        let text = format!("# A laboratory. Serve it with: claviger serve --config {}\n\n{settings}", path.display());
        write(&path, text.as_bytes())
    }

    /// The registered host's private keys.
    ///
    /// # Errors
    /// A file is missing or invalid.
    pub fn host_keys(&self) -> Result<HostKeys, LabError> {
        let identity = Arc::new(read_key(&self.dir.join("host/identitykey.pem"))?);
        Ok(HostKeys { host: read_key(&self.dir.join("host/hostkey.pem"))?, identity })
    }

    /// The owner, from the tenant's files.
    ///
    /// # Errors
    /// A file is missing or invalid.
    pub fn owner(&self) -> Result<Owner, LabError> {
        let [signing, encryption] = OWNER_ROLES.map(|role| {
            let file = |end: &str| self.dir.join(format!("tenant/owner-{role}.{end}.pem"));
            Ok::<_, LabError>((read_key(&file("key"))?, read_certificate(&file("crt"))?))
        });
        let ((signing_key, signing_certificate), (encryption_key, encryption_certificate)) = (signing?, encryption?);
        Ok(Owner { signing_key, signing_certificate, encryption_key, encryption_certificate })
    }

    /// The protectors of the tenant's first `vms` machines. Missing protectors are created for the guardian in
    /// `metadata`.
    ///
    /// # Errors
    /// See [`LabError`].
    pub fn protectors(
        &self,
        vms: usize,
        owner: &Owner,
        metadata: &Metadata,
    ) -> Result<Vec<(String, Vec<u8>)>, LabError> {
        let guardians = std::slice::from_ref(metadata);
        let mut protectors = Vec::with_capacity(vms);
        for at in 1..=vms {
            let name = format!("vm-{at:04}");
            let path = self.dir.join(format!("tenant/{name}.protector.xml"));
            if !path.exists() {
                write(&path, &owner.create(guardians)?.0)?;
            }
            let file = fs::read(&path).map_err(FileError::of(&path))?;
            protectors.push((name, file));
        }
        Ok(protectors)
    }
}

/// The purposes of a tenant's two key pairs.
pub(crate) const OWNER_ROLES: [&str; 2] = ["signing", "encryption"];

/// Creates soft tokens with their PIN files in a folder. Returns the environment of their module, which is then set, and
/// the members of a cluster of them. Call it while the process has a single thread.
///
/// # Errors
/// SoftHSM2 is missing or fails, or a file cannot be written.
pub fn soft_tokens(dir: &Path, hsms: usize) -> Result<(BTreeMap<String, String>, Vec<Hsm>), LabError> {
    let module = softhsm()?;
    let (softhsm2_conf, tokens, pins) = (dir.join("softhsm2.conf"), dir.join("tokens"), dir.join("pins"));
    make_folder(&tokens)?;
    make_folder(&pins)?;
    let text = format!("directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n", tokens.display());
    write(&softhsm2_conf, text.as_bytes())?;
    let env = BTreeMap::from([("SOFTHSM2_CONF".to_owned(), softhsm2_conf.to_string_lossy().into_owned())]);
    set_env(&env);
    let mut members = Vec::with_capacity(hsms);
    for at in 0..hsms {
        let name = member_name(at);
        let pin = random_pin()?;
        let pin_file = pins.join(format!("{name}.pin"));
        write(&pin_file, pin.as_bytes())?;
        let label = format!("claviger-{}", name.trim_start_matches("hsm-"));
        init_token(&module, &label, &Pin::new(random_pin()?), &Pin::new(pin))?;
        let member = Hsm::new(name, module.clone(), TokenName::Label(label), PinSource::File(pin_file));
        members.push(Hsm { sessions: SESSIONS, ..member });
    }
    Ok((env, members))
}

/// Path of SoftHSM2's module.
pub(crate) fn softhsm() -> Result<PathBuf, LabError> {
    let module = std::env::var_os(MODULE_VARIABLE).map(PathBuf::from);
    let mut modules = module.into_iter().chain(MODULES.into_iter().map(PathBuf::from));
    modules.find(|path| path.exists()).ok_or(LabError::NoSoftHsm)
}

/// `hsm-a` … `hsm-z`, `hsm-27` …
pub(crate) fn member_name(at: usize) -> String {
    match u8::try_from(at) {
        Ok(at @ 0..26) => format!("hsm-{}", char::from(b'a' + at)),
        _ => format!("hsm-{}", at + 1),
    }
}

/// A random PIN for a token.
fn random_pin() -> Result<String, LabError> {
    let mut octets = [0; 12];
    SystemRandom::new().fill(&mut octets).map_err(|_| BuildError::Random)?;
    Ok(HEXLOWER.encode(&octets))
}

fn new_key(what: &str, bits: u32) -> Result<RsaPrivateKey, LabError> {
    RsaPrivateKey::generate(bits).map_err(|source| LabError::Key { what: what.to_owned(), source })
}

/// A self-signed certificate for a guardian's or an owner's key.
///
/// # Errors
/// The system has no randomness, or the key cannot sign.
pub fn self_signed(common_name: &str, key: &RsaPrivateKey) -> Result<Certificate, LabError> {
    let now = unix_now();
    let template = Template {
        subject: DistinguishedName::new(common_name),
        issuer_der: None,
        key: key.public().clone(),
        serial: random_serial()?,
        not_before: now - 300,
        not_after: now + TEN_YEARS,
        key_usage: KeyUsage::DIGITAL_SIGNATURE | KeyUsage::DATA_ENCIPHERMENT,
        extended_key_usages: vec![SERVER_AUTHENTICATION],
        ca: None,
        subject_key_id: None,
        authority_key_id: None,
        dns_names: Vec::new(),
    };
    let der = template.to_be_signed()?.sign_with(key)?;
    Certificate::parse(&der).map_err(|source| LabError::Certificate { what: common_name.to_owned(), source })
}

fn read_key(path: &Path) -> Result<RsaPrivateKey, LabError> {
    Ok(files::read_rsa_private_key(path)?)
}

fn read_certificate(path: &Path) -> Result<Certificate, LabError> {
    Ok(files::read_certificate(path)?)
}

fn make_folder(path: &Path) -> Result<(), LabError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    Ok(made.map_err(FileError::of(path))?)
}

/// Writes a file that only its owner can read, because most files of a lab are secret.
fn write(path: &Path, octets: &[u8]) -> Result<(), LabError> {
    Ok(files::write(path, octets, Existing::Replace)?)
}
