//! What all requests share: the HSM cluster, the registered hosts and keys, the audit trail.
//!
//! Hosts, keys and signers are read from the state once and kept as immutable snapshots behind an `ArcSwap` each. A
//! change writes the state first and then swaps the snapshot, so that it takes effect with the next request.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use claviger_hsm::{Check, Cluster, Done, Event, Hash, HsmError, KeyId, Observer, SignScheme};
use claviger_protocol::algorithm::SignatureAlgorithm;
use claviger_protocol::rsa_key::RsaPublicKey;
use claviger_protocol::verify::KnownSignatures;
use ring::digest;
use tokio::sync::Semaphore;

use crate::admission::Admission;
use crate::attest::health_cache::HealthCache;
use crate::attest::signer::Signers;
use crate::audit::{Audit, Entry};
use crate::config::Config;
use crate::keys::Keys;
use crate::metrics;
use crate::state::{Host, State, StateError};

/// How long the daemon's own work (metadata, attestation signers) may take at the HSMs.
const OWN_DEADLINE: Duration = Duration::from_secs(10);

/// Memory for the bodies of requests: ten thousand releases of the usual size, or 32 of the largest batches.
const BODY_KIBIBYTES: usize = 512 * 1024;

/// Signatures over certificates that are remembered, at least: a tenant has some six of them. Some 3 MiB at most.
const KNOWN_SIGNATURES: usize = 16_384;

/// Everything a request needs.
pub struct Service {
    /// The settings the daemon was started with.
    pub config: Config,
    /// The HSMs.
    pub cluster: Cluster,
    /// Which releases are let in.
    pub admission: Admission,
    /// Where every decision is recorded.
    pub audit: Audit,
    /// Health certificates that were found right before.
    pub health: HealthCache,
    /// Room for the bodies of requests, in KiB, of all that are being worked on.
    pub body_kibibytes: Semaphore,
    /// Signatures over certificates that were found right before.
    pub signatures: KnownSignatures,
    /// The key-protection certificates.
    pub keys: ArcSwap<Keys>,
    /// The registered hosts.
    pub hosts: ArcSwap<Hosts>,
    /// The attestation signers.
    pub signers: ArcSwap<Signers>,
    state: Mutex<State>,
}

/// The registered hosts, by name and by key.
#[derive(Debug, Default)]
pub struct Hosts {
    by_name: HashMap<String, Arc<Host>>,
    by_spki: HashMap<Vec<u8>, Arc<Host>>,
}

impl Hosts {
    fn new(hosts: Vec<Host>) -> Self {
        let mut all = Self::default();
        for host in hosts.into_iter().map(Arc::new) {
            all.by_name.insert(host.name.clone(), host.clone());
            all.by_spki.insert(host.spki.clone(), host);
        }
        all
    }

    /// The host whose key has this SubjectPublicKeyInfo, if it is enabled.
    #[must_use]
    pub fn by_key(&self, spki: &[u8]) -> Option<&Arc<Host>> {
        self.by_spki.get(spki).filter(|host| host.enabled)
    }

    /// The host of this name, if it is enabled and its key is still the one with this hash.
    #[must_use]
    pub fn by_name_and_key(&self, name: &str, spki_sha256: &str) -> Option<&Arc<Host>> {
        self.by_name.get(name).filter(|host| host.enabled && host.spki_sha256 == spki_sha256)
    }
}

/// Why a service cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The state cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The audit trail cannot be opened.
    #[error(transparent)]
    Audit(#[from] crate::audit::AuditError),
    /// Something in the state cannot be used.
    #[error("the state holds a certificate that cannot be read: {0}")]
    Certificate(#[from] claviger_protocol::certificate::CertificateError),
}

impl Service {
    /// Opens the state and the audit trail of `config`, and takes the snapshots. Blocks on files.
    ///
    /// # Errors
    /// See [`ServiceError`].
    pub fn open(config: Config, cluster: Cluster) -> Result<Self, ServiceError> {
        let folder: &Path = &config.server.state;
        let state = State::open(folder)?;
        let audit = Audit::open(&config.server.audit_file(), config.audit.sync)?;
        let sessions = config.hsm.iter().map(|hsm| hsm.sessions).sum();
        let service = Self {
            cluster,
            admission: Admission::new(&config.release, sessions),
            audit,
            health: HealthCache::default(),
            body_kibibytes: Semaphore::new(BODY_KIBIBYTES),
            signatures: KnownSignatures::new(KNOWN_SIGNATURES),
            keys: ArcSwap::default(),
            hosts: ArcSwap::default(),
            signers: ArcSwap::default(),
            state: Mutex::new(state),
            config,
        };
        service.reload()?;
        Ok(service)
    }

    /// Takes fresh snapshots of everything in the state. Blocks on files.
    ///
    /// # Errors
    /// See [`ServiceError`]; the snapshots stay as they were.
    pub fn reload(&self) -> Result<(), ServiceError> {
        self.with_state(|state| {
            let keys = Keys::new(&state.certificates()?)?;
            let signers = Signers::new(&state.signers()?)?;
            let hosts = Hosts::new(state.hosts()?);
            self.cluster.know(keys.known_good());
            self.keys.store(Arc::new(keys));
            self.signers.store(Arc::new(signers));
            self.hosts.store(Arc::new(hosts));
            Ok(())
        })
    }

    /// Works with the state. Blocks on files: not for a thread that serves requests.
    pub fn with_state<T>(&self, work: impl FnOnce(&State) -> T) -> T {
        // A panic in the middle of a transaction rolled it back; the connection is sound.
        work(&self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The same on a thread that may block, followed by fresh snapshots.
    ///
    /// # Errors
    /// What `work` gives, or that the state cannot be read again.
    pub async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&State) -> Result<T, StateError> + Send + 'static,
    ) -> Result<T, String> {
        let service = Arc::clone(self);
        let changed = tokio::task::spawn_blocking(move || {
            let result = service.with_state(work).map_err(|e| e.to_string())?;
            service.reload().map_err(|e| e.to_string())?;
            Ok(result)
        });
        changed.await.map_err(|e| format!("the change failed: {e}"))?
    }

    /// Signs `message` with RSASSA-PKCS1-v1_5 and SHA-256 in an HSM, for the daemon's own documents. `public` is the key's
    /// other half: no signature that it does not verify leaves.
    ///
    /// # Errors
    /// What the cluster says.
    pub async fn sign(&self, key: &KeyId, public: &RsaPublicKey, message: &[u8]) -> Result<Done<Vec<u8>>, HsmError> {
        let digest = digest::digest(&digest::SHA256, message);
        let deadline = Instant::now() + OWN_DEADLINE;
        let right = Some(signed_by(public, message));
        self.cluster.sign(key, SignScheme::Pkcs1(Hash::Sha256), digest.as_ref(), deadline, right).await
    }

    /// Writes an audit line; `false` when it could not be written, and then nothing of what it tells may happen.
    pub async fn record(&self, entry: &Entry) -> bool {
        self.audit.record(entry).await.is_ok()
    }
}

/// Whether a signature of `message` is one: RSASSA-PKCS1-v1_5 with SHA-256, by the key whose other half is `public`.
#[must_use]
pub fn signed_by(public: &RsaPublicKey, message: &[u8]) -> Check {
    let (public, message) = (public.clone(), message.to_vec());
    Arc::new(move |signature| public.verify(SignatureAlgorithm::DEFAULT, &message, signature).is_ok())
}

/// Counts what happens at the tokens.
#[must_use]
pub fn observer() -> Observer {
    Arc::new(|member, event| match event {
        Event::Login => metrics::hsm_login(member.to_owned()),
        Event::KeySearch => metrics::hsm_key_search(member.to_owned()),
        Event::Call { op, rv, .. } => metrics::hsm_call(member.to_owned(), op, rv.to_owned()),
        Event::Closed => metrics::hsm_closed(member.to_owned()),
        Event::Retry => metrics::hsm_retry(member.to_owned()),
        Event::Stuck => metrics::hsm_stuck_call(member.to_owned()),
        Event::ModuleRenewed => metrics::hsm_module_renewed(member.to_owned()),
        // The number of sessions is read from the cluster when somebody asks for the metrics.
        Event::SessionOpened | Event::SessionClosed => {}
    })
}

/// Seconds since 1970.
#[must_use]
pub fn unix_now() -> i64 {
    unix(SystemTime::now())
}

/// A time as seconds since 1970; 0 for what was before.
#[must_use]
pub fn unix(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
}

/// A request's id: 16 hexadecimal digits, as in the log, the audit trail and the answer's header.
#[must_use]
pub fn request_id() -> String {
    use ring::rand::{SecureRandom, SystemRandom};
    let mut octets = [0; 8];
    // Without randomness nothing else works either; an id of zeros does no harm.
    let _ = SystemRandom::new().fill(&mut octets);
    data_encoding::HEXLOWER.encode(&octets)
}
