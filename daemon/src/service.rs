//! What all requests share: settings, the HSM cluster, the registry, and the audit trail.

pub(crate) mod reloads;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use claviger_hsm::Cluster;
use claviger_protocol::wrapping_set::KnownSets;
use tokio::sync::Notify;

use self::reloads::Reloads;
use crate::admission::Admission;
use crate::admission::bodies::Bodies;
use crate::config::{Config, Etcd};
use crate::observe::audit::{Audit, AuditError};
use crate::observe::history::History;
use crate::observe::metrics;
use crate::registry::error::FollowError;
use crate::registry::follow::Registry;
use crate::registry::health_cache::HealthCache;
use crate::registry::issued::RecentlyIssued;
use crate::registry::keys::Keys;
use crate::registry::snapshot::Snapshot;
use crate::registry::tpm_sessions::Sessions;
use crate::stock::{Basis, Stock};
use crate::store::evidence::EvidenceStore;
use crate::store::usage_counts::{Usage, UsageError};
use crate::store::{Board, State, StateError};
use crate::sys::clock::unix_now;

/// Minimum number of protector parties that are remembered. Each tenant has one owner, and its guardians are further
/// parties. This number takes about 25 MiB.
const KNOWN_PARTIES: usize = 4096;

/// The context of all requests.
pub struct Service {
    /// The settings in force.
    pub config: Arc<ArcSwap<Config>>,
    /// The HSMs.
    pub cluster: Cluster,
    /// Decides which releases may start.
    pub admission: Admission,
    /// Records every decision.
    pub audit: Audit,
    /// Verified health certificates.
    pub health: HealthCache,
    /// Health certificates of the last seconds.
    pub issued: RecentlyIssued,
    /// Memory for the bodies of requests.
    pub bodies: Arc<Bodies>,
    /// Verified wrapping sets and certificates of protectors.
    pub sets: KnownSets,
    /// Egress protectors that were made in advance.
    pub stock: Arc<Stock>,
    /// Hosts, baselines, keys and signers.
    pub registry: Arc<Registry>,
    /// What the nodes tell each other, if the state is in etcd.
    pub board: Option<Board>,
    /// Data of attestations by TPM between their two steps.
    pub tpm: Sessions,
    /// The last evidence of each host in TPM mode.
    pub evidence: EvidenceStore,
    /// Usage counts of keys, and when hosts were last served.
    pub usage: Usage,
    /// The last hour, for the status page.
    pub history: History,
    /// Requests to read the configuration again.
    pub reloads: Reloads,
    /// Wakes the rotation of the attestation signer: no HSM has the key of the current one.
    pub signer_missing: Notify,
}

/// Why a service cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The state cannot be opened.
    #[error(transparent)]
    State(#[from] StateError),
    /// The state cannot be read.
    #[error(transparent)]
    Registry(#[from] FollowError),
    /// The usage counts cannot be stored.
    #[error(transparent)]
    Usage(#[from] UsageError),
    /// The audit trail cannot be opened.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The system has no randomness.
    #[error("the system has no randomness")]
    Randomness,
}

impl Service {
    /// Opens the state and the audit trail of `config`, and takes the first snapshots. Blocks on files.
    ///
    /// # Errors
    /// See [`ServiceError`].
    pub fn open(config: Config, cluster: Cluster) -> Result<Self, ServiceError> {
        let folder = config.server.state.clone();
        let state = State::of(&config)?;
        let board = state.board();
        let limit = config.etcd.as_ref().map_or(Duration::MAX, Etcd::max_staleness);
        let audit = Audit::open(&config.server.audit_file(), &config.audit, &config.server.node())?;
        let usage = Usage::open(&folder, unix_now())?;
        let evidence = EvidenceStore::open(&folder, unix_now())?;
        let tpm = Sessions::new().map_err(|_| ServiceError::Randomness)?;
        let sessions = config.hsm.iter().map(|hsm| hsm.sessions).sum();
        let admission = Admission::new(&config, sessions);
        let bodies = Bodies::new(&config.server);
        let (config, stock) = (Arc::new(ArcSwap::from_pointee(config)), Arc::new(Stock::default()));
        let on_keys = {
            let (cluster, config, stock) = (cluster.clone(), Arc::clone(&config), Arc::clone(&stock));
            move |keys: &Arc<Keys>| {
                cluster.set_known_answers(keys.known_answers());
                keys.decryption_keys().for_each(|held| metrics::preregister_key(held.certificate.clone()));
                stock.rebase(|| Basis::new(keys, &config.load()));
            }
        };
        let service = Self {
            config,
            cluster,
            admission,
            audit,
            health: HealthCache::default(),
            issued: RecentlyIssued::default(),
            bodies,
            sets: KnownSets::new(KNOWN_PARTIES),
            stock,
            registry: Arc::new(Registry::open(state, limit, on_keys)?),
            board,
            tpm,
            evidence,
            usage,
            history: History::default(),
            reloads: Reloads::default(),
            signer_missing: Notify::new(),
        };
        service.rebase_stock();
        Ok(service)
    }

    /// The current settings and registry.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.registry.snapshot(self.config.load_full())
    }

    /// Drops stock items that were made for keys or settings that are no longer in use.
    pub fn rebase_stock(&self) {
        self.stock.rebase(|| Basis::new(&self.registry.keys(), &self.config.load()));
    }
}

#[cfg(any(test, feature = "testing"))]
#[allow(clippy::unwrap_used)]
pub(crate) mod testing;
