//! What all requests share: the HSM cluster, the registered hosts and keys, the audit trail.
//!
//! Hosts, keys and signers are read from the state once and kept as immutable snapshots behind an `ArcSwap` each. A
//! change writes the state first and then swaps the snapshot, so that it takes effect with the next request.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use claviger_hsm::{Cluster, standstill};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::wrapping_set::KnownSets;
use tokio::sync::Notify;

use crate::admission::Admission;
use crate::admission::bodies::Bodies;
use crate::config::Config;
use crate::observe::audit::{self, Audit, Class, Entry};
use crate::observe::history::History;
use crate::observe::metrics;
use crate::registry::baselines::Baselines;
use crate::registry::health_cache::HealthCache;
use crate::registry::hosts::Hosts;
use crate::registry::issued::RecentlyIssued;
use crate::registry::keys::Keys;
use crate::registry::signers::{Signers, Unreadable};
use crate::registry::tpm_sessions::Sessions;
use crate::request::Attempt;
use crate::stock::{Basis, Stock};
use crate::store::evidence::EvidenceStore;
use crate::store::usage_counts::{Usage, UsageError};
use crate::store::{Contents, State, StateError};
use crate::sys::clock::unix_now;

/// Parties of protectors that are remembered, at least: a tenant has one of its own, and guardians with others. Some 25 MiB
/// for as many.
const KNOWN_PARTIES: usize = 4096;

/// Everything a request needs.
pub struct Service {
    /// The settings that are in force.
    pub config: ArcSwap<Config>,
    /// The HSMs.
    pub cluster: Cluster,
    /// Which releases are let in.
    pub admission: Admission,
    /// Where every decision is recorded.
    pub audit: Audit,
    /// Health certificates that were found right before.
    pub health: HealthCache,
    /// Health certificates that were issued a moment ago.
    pub issued: RecentlyIssued,
    /// Memory for the bodies of requests.
    pub bodies: Arc<Bodies>,
    /// Wrapping sets and certificates of protectors that were read and found right before.
    pub sets: KnownSets,
    /// Egress protectors that were made while sessions were idle.
    pub stock: Stock,
    /// The key-protection certificates.
    pub keys: ArcSwap<Keys>,
    /// The registered hosts.
    pub hosts: ArcSwap<Hosts>,
    /// The enabled baselines.
    pub baselines: ArcSwap<Baselines>,
    /// The attestation signers.
    pub signers: ArcSwap<Signers>,
    /// Attestations by TPM between their two steps.
    pub tpm: Sessions,
    /// What hosts proved last by their TPMs.
    pub evidence: EvidenceStore,
    /// How much keys are used, and when hosts were last served.
    pub usage: Usage,
    /// The last hour, for the status page.
    pub history: History,
    /// Whether the state could not be read when it was last looked at.
    pub state_stale: AtomicBool,
    /// Wakes who looks after the attestation signer: a signature found its key nowhere.
    pub signer_missing: Notify,
    /// Thumbprints of the certificates that could not be read when the state was last taken in.
    unreadable: Mutex<BTreeSet<String>>,
    state: Mutex<State>,
}

/// The settings and the registry as one request sees them from its start to its end, whatever changes meanwhile.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The settings.
    pub config: Arc<Config>,
    /// The key-protection certificates.
    pub keys: Arc<Keys>,
    /// The registered hosts.
    pub hosts: Arc<Hosts>,
    /// The enabled baselines.
    pub baselines: Arc<Baselines>,
    /// The attestation signers.
    pub signers: Arc<Signers>,
}

impl Snapshot {
    /// Whether the sender of `attempt` may act as the host of this name: always, unless the client certificates of TLS are
    /// bound to hosts. Then only with a certificate of that name.
    #[must_use]
    pub fn may_act_as(&self, host: &str, attempt: &Attempt) -> bool {
        let bound = self.config.server.tls.as_ref().is_some_and(|tls| tls.client_is_host);
        !bound || attempt.client.as_ref().is_some_and(|client| client.is_for(host))
    }
}

/// Why a service cannot be started, or its snapshots are not fresh.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The state cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The registered hosts or the baselines cannot be read: hosts that were removed, or whose baseline was disabled, may go
    /// on being served.
    #[error("the registered hosts or the baselines cannot be read: {0}")]
    Hosts(StateError),
    /// How much keys are used cannot be remembered.
    #[error(transparent)]
    Usage(#[from] UsageError),
    /// The audit trail cannot be opened.
    #[error(transparent)]
    Audit(#[from] crate::observe::audit::AuditError),
    /// The system gives no random bytes.
    #[error("the system has no randomness")]
    Randomness,
    /// Certificates of the state that cannot be read. Everything else in it has been taken in.
    #[error("the state holds certificates that cannot be read: {}", list(.0))]
    Unreadable(Vec<Unreadable>),
}

fn list(unreadable: &[Unreadable]) -> String {
    unreadable.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Why a change is not made, or has no effect yet.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// It was not made.
    #[error(transparent)]
    State(#[from] StateError),
    /// It was made.
    #[error("the change is stored but has no effect yet, and the daemon tries every second to take it in: {0}")]
    NoEffectYet(StateError),
    /// It was made, and brought certificates that cannot be read.
    #[error("the change is stored, but what it brought cannot be read and has no effect: {}", list(.0))]
    Unreadable(Vec<Unreadable>),
    /// It may have been made.
    #[error("the change failed: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl Service {
    /// Opens the state and the audit trail of `config`, and takes the snapshots. Blocks on files.
    ///
    /// # Errors
    /// See [`ServiceError`].
    pub fn open(config: Config, cluster: Cluster) -> Result<Self, ServiceError> {
        let folder: &Path = &config.server.state;
        let state = State::open(folder)?;
        let audit = Audit::open(&config.server.audit_file(), &config.audit, &config.server.node())?;
        let usage = Usage::open(folder, unix_now())?;
        let evidence = EvidenceStore::open(folder, unix_now())?;
        let tpm = Sessions::new().map_err(|_| ServiceError::Randomness)?;
        let sessions = config.hsm.iter().map(|hsm| hsm.sessions).sum();
        let service = Self {
            cluster,
            admission: Admission::new(&config, sessions),
            audit,
            health: HealthCache::default(),
            issued: RecentlyIssued::default(),
            bodies: Bodies::new(&config.server),
            sets: KnownSets::new(KNOWN_PARTIES),
            stock: Stock::default(),
            keys: ArcSwap::default(),
            hosts: ArcSwap::default(),
            baselines: ArcSwap::default(),
            signers: ArcSwap::default(),
            tpm,
            evidence,
            history: History::default(),
            state_stale: AtomicBool::new(false),
            signer_missing: Notify::new(),
            usage,
            unreadable: Mutex::default(),
            state: Mutex::new(state),
            config: ArcSwap::from_pointee(config),
        };
        service.rebase_stock();
        match service.reload() {
            Err(error @ ServiceError::Unreadable(_)) => {
                tracing::error!(%error, "not all of the state can be used; claviger doctor says what to do");
            }
            other => other?,
        }
        Ok(service)
    }

    /// Takes fresh snapshots if anybody changed the state since the last ones were complete. Blocks on files.
    ///
    /// # Errors
    /// See [`ServiceError`]; what cannot be read stays as it was, and the next call tries again.
    pub fn follow(&self) -> Result<(), ServiceError> {
        if self.with_state(|state| state.changed())? { self.reload() } else { Ok(()) }
    }

    fn reload(&self) -> Result<(), ServiceError> {
        self.with_state(|state| {
            state.snapshot(|contents| {
                // First, and whatever is wrong with the rest: a host that was removed is to get nothing more.
                let hosts = contents.hosts().map(|hosts| self.hosts.store(Arc::new(Hosts::new(hosts))));
                // As important: what hosts with a baseline that was disabled are refused by.
                let baselines = contents.baselines();
                let baselines = baselines.map(|all| self.baselines.store(Arc::new(Baselines::new(all))));
                let signers = self.reload_signers(contents);
                let keys = self.reload_keys(contents);
                hosts.and(baselines).map_err(ServiceError::Hosts)?;
                let unreadable: Vec<_> = signers?.into_iter().chain(keys?).collect();
                *self.unreadable() = unreadable.iter().map(|of| of.thumbprint.clone()).collect();
                if unreadable.is_empty() { Ok(()) } else { Err(ServiceError::Unreadable(unreadable)) }
            })
        })
    }

    /// Returns the certificates that cannot be read.
    fn reload_signers(&self, contents: &Contents) -> Result<Vec<Unreadable>, ServiceError> {
        let (signers, unreadable) = Signers::new(&contents.signers()?);
        self.signers.store(Arc::new(signers));
        Ok(unreadable)
    }

    /// Keys that have not changed stay the same value, and with them the metadata document that was signed. A certificate that
    /// cannot be read costs its own key only; those are returned.
    fn reload_keys(&self, contents: &Contents) -> Result<Vec<Unreadable>, ServiceError> {
        let mut certificates = contents.certificates()?;
        let mut unreadable = Vec::new();
        certificates.retain(|entry| match Certificate::parse(&entry.der) {
            Err(error) if entry.enabled => {
                unreadable.push(Unreadable { thumbprint: entry.thumbprint.clone(), error });
                false
            }
            _ => true,
        });
        if !self.keys.load().are_of(&certificates) {
            let keys = Keys::new(certificates);
            self.cluster.set_known_answers(keys.known_answers());
            keys.decryption_keys().for_each(|held| metrics::preregister_key(held.certificate.clone()));
            self.keys.store(Arc::new(keys));
            self.rebase_stock();
        }
        Ok(unreadable)
    }

    /// Throws away what was made ahead for other keys or settings than those that are in force now.
    pub fn rebase_stock(&self) {
        self.stock.rebase(Basis::new(&self.keys.load_full(), &self.config.load()));
    }

    fn unreadable(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.unreadable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works with the state. Blocks on files: not for a thread that serves requests.
    pub fn with_state<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        // A panic in the middle of a transaction rolled it back; the connection is sound.
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The same on a thread that may block, followed by fresh snapshots.
    ///
    /// # Errors
    /// What `work` gives, or that its change has no effect yet.
    pub async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&mut State) -> Result<T, StateError> + Send + 'static,
    ) -> Result<T, ChangeError> {
        let service = Arc::clone(self);
        let changed = tokio::task::spawn_blocking(move || {
            // What others wrote is not this change's.
            let _ = service.follow();
            let known = service.unreadable().clone();
            let result = service.with_state(work);
            // Also when it failed: what was asked for may have been done before, without an effect so far.
            let followed = service.follow();
            let value = result?;
            match followed {
                Ok(()) => Ok(value),
                Err(ServiceError::Hosts(error) | ServiceError::State(error)) => Err(ChangeError::NoEffectYet(error)),
                Err(ServiceError::Unreadable(mut unreadable)) => {
                    // What could not be read before is not this change's.
                    unreadable.retain(|of| !known.contains(&of.thumbprint));
                    if unreadable.is_empty() { Ok(value) } else { Err(ChangeError::Unreadable(unreadable)) }
                }
                // Neither is opened again by a look at the state.
                Err(error @ (ServiceError::Usage(_) | ServiceError::Audit(_) | ServiceError::Randomness)) => {
                    tracing::error!(%error, "the state cannot be read as a whole");
                    Ok(value)
                }
            }
        });
        changed.await?
    }

    /// What is in force now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            config: self.config.load_full(),
            keys: self.keys.load_full(),
            hosts: self.hosts.load_full(),
            baselines: self.baselines.load_full(),
            signers: self.signers.load_full(),
        }
    }

    /// Records an administrator's change; `false` when that could not be done, and then it must not be made.
    pub async fn record(&self, entry: &Entry) -> bool {
        self.audit.record(entry, Class::Administration, standstill::now() + audit::PATIENCE).await.is_ok()
    }
}

#[cfg(any(test, feature = "testing"))]
#[allow(clippy::unwrap_used)]
pub(crate) mod testing {
    //! A service for unit tests and benches.

    use super::*;
    #[cfg(test)]
    use std::sync::OnceLock;
    use std::time::Duration;

    use crate::config::Hsm;
    use claviger_hsm::{CallTimeouts, MemberConfig, Pin, TokenRef, WorkerProgram};
    #[cfg(test)]
    use claviger_protocol::rsa_key::RsaPrivateKey;
    #[cfg(test)]
    use serde_json::Value;

    /// The key of all unit tests: making one takes a while.
    #[cfg(test)]
    pub(crate) fn key() -> &'static RsaPrivateKey {
        static KEY: OnceLock<RsaPrivateKey> = OnceLock::new();
        KEY.get_or_init(|| RsaPrivateKey::generate(2048).unwrap())
    }

    /// A certificate of that key (DER); no two are the same.
    #[cfg(test)]
    pub(crate) fn certificate() -> Vec<u8> {
        let template = claviger_protocol::health::signer_template(key().public(), 1, 2).unwrap();
        template.to_be_signed().unwrap().sign_with(key()).unwrap()
    }

    /// A service with a folder of its own, and the default settings.
    #[cfg(test)]
    pub(crate) fn service() -> (tempfile::TempDir, Arc<Service>) {
        let folder = tempfile::tempdir().unwrap();
        let service = service_in(folder.path(), |_| {});
        (folder, service)
    }

    /// A service whose only member, `gone`, is never started: no HSM works for it.
    pub(crate) fn service_in(folder: &Path, configure: impl FnOnce(&mut Config)) -> Arc<Service> {
        let mut config = Config::default();
        config.server.state = folder.join("state");
        configure(&mut config);
        let module = crate::lab::softhsm().unwrap();
        let member = MemberConfig {
            name: "gone".to_owned(),
            module: module.clone(),
            token: TokenRef::Label("gone".to_owned()),
            pin: Pin::new("1234".to_owned()),
            env: config.env.clone(),
            priority: 0,
            weight: 1,
            sessions: 1,
            queue: 1,
        };
        config.hsm.push(Hsm {
            name: member.name.clone(),
            module,
            token: Some("gone".to_owned()),
            serial: None,
            pin_file: None,
            pin_env: None,
            priority: 0,
            weight: 1,
            sessions: 1,
            env: member.env.clone(),
        });
        let timeouts = CallTimeouts { watchdog: Duration::from_secs(1) };
        let cluster =
            Cluster::new(vec![member], timeouts, WorkerProgram::this_executable(), Arc::new(|_, _| {})).unwrap();
        Arc::new(Service::open(config, cluster).unwrap())
    }

    /// The lines of its audit trail, without those that it says of itself.
    #[cfg(test)]
    pub(crate) fn trail(service: &Service) -> Vec<Value> {
        let text = std::fs::read_to_string(service.config.load().server.audit_file()).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines
            .filter(|line| ![audit::TRAIL_EVENT, audit::checkpoint::EVENT].map(Value::from).contains(&line["event"]))
            .collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::testing::{certificate, service};
    use super::*;
    use crate::store::{Kind, Labels, NewCertificate, NewSigner};
    use rusqlite::Connection;

    fn sql(service: &Service, sql: &str) {
        Connection::open(service.config.load().server.state_db()).unwrap().execute_batch(sql).unwrap();
    }

    #[tokio::test]
    async fn a_host_that_was_removed_is_gone_whatever_else_is_wrong() {
        let (_folder, service) = service();
        let named = |service: &Service, name: &str| service.hosts.load().is_registered(name);
        service.change(|state| state.add_host("a", b"a", &Labels::default(), 1)).await.unwrap();
        service.change(|state| state.add_host("b", b"b", &Labels::default(), 1)).await.unwrap();
        let first = service.keys.load_full();

        // A certificate that cannot be read is in nobody's way.
        sql(
            &service,
            "INSERT INTO certificates (thumbprint, kind, der, key_id, spki, added)
             VALUES ('x', 'signing', x'00', x'00', x'00', 1)",
        );
        service.change(|state| state.remove_host("a")).await.unwrap();
        assert!(!named(&service, "a"));
        assert!(matches!(service.follow(), Err(ServiceError::Unreadable(_))), "said each time until it is mended");
        assert!(matches!(service.follow(), Err(ServiceError::Unreadable(_))), "said each time until it is mended");
        assert!(Arc::ptr_eq(&first, &service.keys.load_full()));

        // Hosts that cannot be read: the change is made, and whoever asks again does not lose it.
        sql(&service, "ALTER TABLE hosts RENAME COLUMN added TO mislaid");
        let error = service.change(|state| state.forget_signers_before(1)).await.unwrap_err();
        assert!(matches!(error, ChangeError::NoEffectYet(_)), "{error}");
        sql(&service, "ALTER TABLE hosts RENAME COLUMN mislaid TO added; DELETE FROM hosts WHERE name = 'b'");
        assert!(named(&service, "b"));
        let error = service.change(|state| state.remove_host("b")).await.unwrap_err();
        assert!(error.to_string().contains("no host \"b\" is registered"), "{error}");
        assert!(!named(&service, "b"), "what was asked for before has its effect");
        sql(&service, "DELETE FROM certificates");
        service.follow().unwrap();
    }

    #[tokio::test]
    async fn a_signer_that_cannot_be_read_keeps_no_other_from_being_revoked() {
        let (_folder, service) = service();
        let [one, two] = [(); 2].map(|()| certificate());
        let (first, second) = (Certificate::parse(&one).unwrap(), Certificate::parse(&two).unwrap());
        let add = |der: Vec<u8>, id: &'static [u8]| {
            let seen = service.signers.load().current_thumbprint().map(str::to_owned);
            service.change(move |state| {
                let new = NewSigner { der: &der, key_id: id, not_before: 1, not_after: 2 };
                state.add_signer(&new, seen.as_deref(), 1)
            })
        };
        let added = add(one, b"one").await.unwrap();
        // A change that brings what cannot be read is no success.
        let error = add(b"broken".to_vec(), b"two").await.unwrap_err();
        assert!(matches!(error, ChangeError::Unreadable(_)), "{error}");
        assert!(service.signers.load().trust(&first.thumbprint()));
        // A new signer replaces the unreadable one. A change that does not concern the unreadable one succeeds.
        add(two, b"three").await.unwrap();
        assert!(service.signers.load().current().is_some());
        let revoke = |service: &Arc<Service>, thumbprint: String| {
            let service = Arc::clone(service);
            async move { service.change(move |state| state.revoke_signer(&thumbprint, true, 9)).await }
        };
        revoke(&service, added.thumbprint).await.unwrap();
        let signers = service.signers.load();
        assert!([first, second].iter().all(|of| !signers.trust(&of.thumbprint())), "they have one key");
    }

    #[tokio::test]
    async fn certificates_that_have_not_changed_are_not_read_anew() {
        let (_folder, service) = service();
        let add = |state: &mut State| {
            let der = certificate();
            let new = NewCertificate { kind: Kind::Signing, der: &der, key_id: b"id", spki: b"spki", primary: false };
            state.add_certificate(&new, 1)
        };
        let before = service.keys.load_full();
        let added = service.change(add).await.unwrap();
        let keys = service.keys.load_full();
        assert!(!Arc::ptr_eq(&before, &keys));
        service.change(|state| state.add_host("a", b"a", &Labels::default(), 1)).await.unwrap();
        assert!(Arc::ptr_eq(&keys, &service.keys.load_full()));
        assert!(!service.with_state(|state| state.changed()).unwrap(), "a change was followed at once");
        let thumbprint = added.thumbprint;
        service.change(move |state| state.enable_certificate(Kind::Signing, &thumbprint, false)).await.unwrap();
        assert!(!Arc::ptr_eq(&keys, &service.keys.load_full()));
    }
}
