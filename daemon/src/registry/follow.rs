//! The current registry: snapshots of the state, replaced when the state changes.
//!
//! Hosts, baselines, keys and signers are kept as immutable snapshots, each behind an `ArcSwap`. A change is first
//! written to the state. Then the snapshots are replaced, so the change takes effect with the next request. Changes
//! by other processes are found by [`Registry::follow`], with every kind of store. [`Currency`] says whether a state that
//! other nodes share is known well enough to release anything.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Guard};
use claviger_process::lock::lock;
use claviger_protocol::certificate::Certificate;

use super::baselines::Baselines;
use super::currency::Currency;
use super::decisions::Decisions;
use super::error::{ChangeError, FollowError, Unreadable};
use super::hosts::Hosts;
use super::keys::Keys;
use super::signers::Signers;
use super::snapshot::Snapshot;
use crate::config::Config;
use crate::store::{Contents, State, StateError};

/// Called with the new keys after each change of them, while the state is locked.
type OnKeys = Box<dyn Fn(&Arc<Keys>) + Send + Sync>;

/// The state and its current snapshots.
pub struct Registry {
    keys: ArcSwap<Keys>,
    hosts: ArcSwap<Hosts>,
    baselines: ArcSwap<Baselines>,
    signers: ArcSwap<Signers>,
    on_keys: OnKeys,
    /// Why the last check of the state failed, if it did.
    trouble: Mutex<Option<String>>,
    /// Thumbprints of the certificates that could not be read at the last reload.
    unreadable: Mutex<BTreeSet<String>>,
    decisions: Decisions,
    state: Mutex<State>,
    /// A second handle to a state in etcd: following does not wait for a change that this node makes.
    followed: Option<Mutex<State>>,
    shared: Option<Shared>,
}

/// How well a state in etcd is known.
#[derive(Debug)]
struct Shared {
    opened: Instant,
    /// The last confirmation that the snapshots are the newest, in milliseconds after `opened`.
    confirmed: AtomicU64,
    /// How long snapshots may be used without a confirmation.
    limit: Duration,
}

impl Shared {
    fn confirm(&self, at: Instant) {
        let after = at.saturating_duration_since(self.opened).as_millis();
        self.confirmed.fetch_max(u64::try_from(after).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn currency(&self, now: Instant) -> Currency {
        let confirmed = self.opened + Duration::from_millis(self.confirmed.load(Ordering::Relaxed));
        Currency::of(confirmed, self.limit, now)
    }
}

impl Registry {
    /// Takes the first snapshots of `state`. `on_keys` is called with the keys whenever they have changed, in the order of the
    /// changes. `limit`: how long snapshots of a state in etcd may be used without a confirmation. Blocks on the store.
    ///
    /// # Errors
    /// [`FollowError::State`], [`FollowError::Hosts`]. Certificates that cannot be read are logged and left out.
    pub fn open(
        state: State,
        limit: Duration,
        on_keys: impl Fn(&Arc<Keys>) + Send + Sync + 'static,
    ) -> Result<Self, FollowError> {
        let shared = state.confirmed().map(|opened| Shared { opened, confirmed: AtomicU64::new(0), limit });
        let registry = Self {
            keys: ArcSwap::default(),
            hosts: ArcSwap::default(),
            baselines: ArcSwap::default(),
            signers: ArcSwap::default(),
            on_keys: Box::new(on_keys),
            trouble: Mutex::default(),
            unreadable: Mutex::default(),
            decisions: Decisions::default(),
            followed: state.another().map(Mutex::new),
            shared,
            state: Mutex::new(state),
        };
        match registry.with_followed(|state| registry.reload(state)) {
            Err(error @ FollowError::Unreadable(_)) => {
                tracing::error!(%error, "a part of the state cannot be used; claviger doctor says what to do");
            }
            other => other?,
        }
        Ok(registry)
    }

    /// The key-protection certificates.
    #[must_use]
    pub fn keys(&self) -> Guard<Arc<Keys>> {
        self.keys.load()
    }

    /// The registered hosts.
    #[must_use]
    pub fn hosts(&self) -> Guard<Arc<Hosts>> {
        self.hosts.load()
    }

    /// The enabled baselines.
    #[must_use]
    pub fn baselines(&self) -> Guard<Arc<Baselines>> {
        self.baselines.load()
    }

    /// The attestation signers.
    #[must_use]
    pub fn signers(&self) -> Guard<Arc<Signers>> {
        self.signers.load()
    }

    /// The current snapshots, together with these settings.
    #[must_use]
    pub fn snapshot(&self, config: Arc<Config>) -> Snapshot {
        Snapshot {
            config,
            keys: self.keys.load_full(),
            hosts: self.hosts.load_full(),
            baselines: self.baselines.load_full(),
            signers: self.signers.load_full(),
        }
    }

    /// The order of decisions and changes.
    #[must_use]
    pub(crate) fn decisions(&self) -> &Decisions {
        &self.decisions
    }

    /// Takes new snapshots if the state has changed since the last complete ones. It does not matter which process
    /// changed the state. Blocks on the store.
    ///
    /// # Errors
    /// See [`FollowError`]. Snapshots whose records cannot be read remain unchanged, and the next call tries again.
    pub fn follow(&self) -> Result<(), FollowError> {
        self.with_followed(|state| {
            // Asked first: the contents that are looked at afterwards are at least as new.
            let confirmed = state.confirmed();
            let followed = if state.changed()? { self.reload(state) } else { Ok(()) };
            self.decisions.settle();
            // Certificates that cannot be read keep nobody from being removed.
            if let (Some(shared), Some(confirmed), Ok(()) | Err(FollowError::Unreadable(_))) =
                (&self.shared, confirmed, &followed)
            {
                shared.confirm(confirmed);
            }
            followed
        })
    }

    /// How current the snapshots are.
    #[must_use]
    pub fn currency(&self) -> Currency {
        self.shared.as_ref().map_or(Currency::Local, |shared| shared.currency(Instant::now()))
    }

    /// Why a state in etcd is not confirmed now, for people: the connection is lost, or records cannot be read. `None` for
    /// a local state.
    #[must_use]
    pub fn why_unconfirmed(&self) -> Option<String> {
        let condition = lock(self.followed.as_ref()?).condition()?;
        condition.link.err().or_else(|| lock(&self.trouble).clone())
    }

    /// Notifies when [`Registry::follow`] has something to do, if the store supports that.
    #[must_use]
    pub fn changes(&self) -> Option<tokio::sync::watch::Receiver<()>> {
        self.with_followed(|state| state.changes())
    }

    fn with_followed<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut lock(self.followed.as_ref().unwrap_or(&self.state)))
    }

    /// Records the result of a check of the state. Logs the first failure, and the first success after failures.
    pub fn looked<E: fmt::Display>(&self, result: &Result<(), E>) {
        let trouble = result.as_ref().err().map(ToString::to_string);
        let was_failing = std::mem::replace(&mut *lock(&self.trouble), trouble).is_some();
        match result {
            Err(error) if !was_failing => {
                tracing::error!(%error, "the state, or a part of it, cannot be read; trying again every second (this is logged once)");
            }
            Ok(()) if was_failing => tracing::info!("the state is read again"),
            _ => {}
        }
    }

    /// Returns `true` if the last check of the state failed. Then changes by other processes may be missing.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        lock(&self.trouble).is_some()
    }

    /// Runs `work` on the state. Blocks on the store, so it must not be called in a thread that serves requests.
    pub fn with_state<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        // A panic inside a transaction has rolled it back; the connection is intact.
        work(&mut lock(&self.state))
    }

    /// Changes the state on a thread that may block, and takes new snapshots.
    ///
    /// # Errors
    /// The errors of `work`, or an error which says that the change is not in effect yet.
    pub async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&mut State) -> Result<T, StateError> + Send + 'static,
    ) -> Result<T, ChangeError> {
        let registry = Arc::clone(self);
        tokio::task::spawn_blocking(move || registry.change_now(work)).await?
    }

    fn change_now<T>(&self, work: impl FnOnce(&mut State) -> Result<T, StateError>) -> Result<T, ChangeError> {
        // Load the changes of other processes first, so that their errors are not attributed to this change.
        let _ = self.follow();
        let known = self.unreadable().clone();
        let result = self.with_state(work);
        // Also after a failure: `work` may have made a part of its change.
        let followed = self.follow();
        let value = match result {
            Ok(value) => value,
            Err(error @ StateError::NotSeen) => return Err(ChangeError::NoEffectYet(error)),
            Err(error) => return Err(error.into()),
        };
        match followed {
            Ok(()) => Ok(value),
            Err(FollowError::Hosts(error) | FollowError::State(error)) => Err(ChangeError::NoEffectYet(error)),
            Err(FollowError::Unreadable(mut unreadable)) => {
                unreadable.retain(|of| !known.contains(&of.thumbprint));
                if unreadable.is_empty() { Ok(value) } else { Err(ChangeError::Unreadable(unreadable)) }
            }
        }
    }

    fn reload(&self, state: &mut State) -> Result<(), FollowError> {
        state.snapshot(|contents| {
            // Hosts and baselines come first, even if other records cannot be read. A host must not be served
            // after it was removed or its baseline was disabled.
            let hosts = contents.hosts().map(|hosts| self.hosts.store(Arc::new(Hosts::new(hosts))));
            let baselines = contents.baselines();
            let baselines = baselines.map(|all| self.baselines.store(Arc::new(Baselines::new(all))));
            let signers = self.reload_signers(contents);
            let keys = self.reload_keys(contents);
            hosts.and(baselines).map_err(FollowError::Hosts)?;
            let unreadable: Vec<_> = signers?.into_iter().chain(keys?).collect();
            *self.unreadable() = unreadable.iter().map(|of| of.thumbprint.clone()).collect();
            if unreadable.is_empty() { Ok(()) } else { Err(FollowError::Unreadable(unreadable)) }
        })
    }

    /// Returns the certificates that cannot be parsed.
    fn reload_signers(&self, contents: &Contents) -> Result<Vec<Unreadable>, StateError> {
        let (signers, unreadable) = Signers::new(&contents.signers()?);
        self.signers.store(Arc::new(signers));
        Ok(unreadable)
    }

    /// Returns the certificates that cannot be read. Each of them excludes only its own key. Unchanged keys remain
    /// the same value, so the signed metadata document remains valid.
    fn reload_keys(&self, contents: &Contents) -> Result<Vec<Unreadable>, StateError> {
        let mut certificates = contents.certificates()?;
        // The current keys were made of certificates that can be read. With hundreds of them, parsing costs more than
        // all else of a change.
        if self.keys.load().are_of(&certificates) {
            return Ok(Vec::new());
        }
        let mut unreadable = Vec::new();
        certificates.retain(|entry| match Certificate::parse(&entry.der) {
            Err(error) if entry.enabled => {
                unreadable.push(Unreadable { thumbprint: entry.thumbprint.clone(), error });
                false
            }
            _ => true,
        });
        if !self.keys.load().are_of(&certificates) {
            let keys = Arc::new(Keys::new(certificates));
            self.keys.store(Arc::clone(&keys));
            (self.on_keys)(&keys);
        }
        Ok(unreadable)
    }

    fn unreadable(&self) -> MutexGuard<'_, BTreeSet<String>> {
        lock(&self.unreadable)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::service::testing::certificate;
    use crate::store::{EtcdServer, Kind, Labels, NewCertificate, NewSigner};
    use claviger_protocol::tpm::pcr::PcrValues;
    use rusqlite::Connection;
    use std::path::Path;
    use std::sync::atomic::AtomicUsize;

    fn registry(folder: &Path) -> Arc<Registry> {
        Arc::new(Registry::open(State::open(folder).unwrap(), Duration::ZERO, |_| {}).unwrap())
    }

    fn sql(folder: &Path, sql: &str) {
        Connection::open(folder.join("state.db")).unwrap().execute_batch(sql).unwrap();
    }

    #[tokio::test]
    async fn a_host_that_was_removed_is_gone_whatever_else_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let (registry, sql) = (registry(folder.path()), |text| sql(folder.path(), text));
        let named = |name: &str| registry.hosts().is_registered(name);
        registry.change(|state| state.add_host("a", b"a", &Labels::default(), 1)).await.unwrap();
        registry.change(|state| state.add_host("b", b"b", &Labels::default(), 1)).await.unwrap();
        let first = Arc::clone(&registry.keys());

        // A certificate that cannot be read affects nothing else.
        sql("INSERT INTO certificates (thumbprint, kind, der, key_id, spki, added)
             VALUES ('x', 'signing', x'00', x'00', x'00', 1)");
        registry.change(|state| state.remove_host("a")).await.unwrap();
        assert!(!named("a"));
        assert!(matches!(registry.follow(), Err(FollowError::Unreadable(_))), "reported each time until it is mended");
        assert!(matches!(registry.follow(), Err(FollowError::Unreadable(_))), "reported each time until it is mended");
        assert!(Arc::ptr_eq(&first, &registry.keys()));

        // The hosts cannot be read: the change is stored, and repeating the command does not lose it.
        sql("ALTER TABLE hosts RENAME COLUMN added TO mislaid");
        let error = registry.change(|state| state.forget_signers_before(1)).await.unwrap_err();
        assert!(matches!(error, ChangeError::NoEffectYet(_)), "{error}");
        sql("ALTER TABLE hosts RENAME COLUMN mislaid TO added; DELETE FROM hosts WHERE name = 'b'");
        assert!(named("b"));
        let error = registry.change(|state| state.remove_host("b")).await.unwrap_err();
        assert!(error.to_string().contains("no host \"b\" is registered"), "{error}");
        assert!(!named("b"), "the change that was made before takes effect");
        sql("DELETE FROM certificates");
        registry.follow().unwrap();
    }

    #[tokio::test]
    async fn a_signer_that_cannot_be_read_keeps_no_other_from_being_revoked() {
        let folder = tempfile::tempdir().unwrap();
        let registry = registry(folder.path());
        let [one, two] = [(); 2].map(|()| certificate());
        let (first, second) = (Certificate::parse(&one).unwrap(), Certificate::parse(&two).unwrap());
        let add = |der: Vec<u8>, id: &'static [u8]| {
            let seen = registry.signers().current_thumbprint().map(str::to_owned);
            registry.change(move |state| {
                let new = NewSigner { der: &der, key_id: id, not_before: 1, not_after: 2 };
                state.add_signer(&new, seen.as_deref(), 1)
            })
        };
        let added = add(one, b"one").await.unwrap();
        // A change with a certificate that cannot be parsed is not a success.
        let error = add(b"broken".to_vec(), b"two").await.unwrap_err();
        assert!(matches!(error, ChangeError::Unreadable(_)), "{error}");
        assert!(registry.signers().trust(&first.thumbprint()));
        // A new signer replaces the unreadable one. A change that does not concern the unreadable one succeeds.
        add(two, b"three").await.unwrap();
        assert!(registry.signers().current().is_some());
        registry.change(move |state| state.revoke_signer(&added.thumbprint, true, 9)).await.unwrap();
        let signers = registry.signers();
        assert!([first, second].iter().all(|of| !signers.trust(&of.thumbprint())), "they have one key");
    }

    #[tokio::test]
    async fn keys_are_replaced_only_when_their_certificates_change() {
        let folder = tempfile::tempdir().unwrap();
        let told = Arc::new(AtomicUsize::new(0));
        let counting = Arc::clone(&told);
        let on_keys = move |_: &Arc<Keys>| _ = counting.fetch_add(1, Ordering::Relaxed);
        let registry = Arc::new(Registry::open(State::open(folder.path()).unwrap(), Duration::ZERO, on_keys).unwrap());
        let add = |state: &mut State| {
            let der = certificate();
            let new = NewCertificate { kind: Kind::Signing, der: &der, key_id: b"id", spki: b"spki", primary: false };
            state.add_certificate(&new, 1)
        };
        let before = Arc::clone(&registry.keys());
        let added = registry.change(add).await.unwrap();
        let keys = Arc::clone(&registry.keys());
        assert!(!Arc::ptr_eq(&before, &keys));
        registry.change(|state| state.add_host("a", b"a", &Labels::default(), 1)).await.unwrap();
        assert!(Arc::ptr_eq(&keys, &registry.keys()));
        assert_eq!(told.load(Ordering::Relaxed), 1);
        assert!(!registry.with_state(|state| state.changed()).unwrap(), "a change was followed at once");
        let thumbprint = added.thumbprint;
        registry.change(move |state| state.enable_certificate(Kind::Signing, &thumbprint, false)).await.unwrap();
        assert!(!Arc::ptr_eq(&keys, &registry.keys()));
        assert_eq!(told.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn a_change_that_is_made_and_not_seen_yet_is_no_success() {
        let folder = tempfile::tempdir().unwrap();
        let registry = registry(folder.path());
        let error = registry.change(|_| Err::<(), _>(StateError::NotSeen)).await.unwrap_err();
        assert!(matches!(error, ChangeError::NoEffectYet(_)), "{error}");
    }

    #[tokio::test]
    async fn a_certificate_by_a_node_that_is_cut_off_does_not_fit_a_later_baseline_of_its_name() {
        const T: i64 = 1_800_000_000;
        let server = EtcdServer::start();
        let node = || {
            let state = State::etcd(server.settings("/claviger/")).unwrap();
            Arc::new(Registry::open(state, Duration::from_secs(300), |_| {}).unwrap())
        };
        let values = |kernel: u8| {
            let mut values = PcrValues::default();
            [0, 4, 7].into_iter().for_each(|pcr| assert!(values.set(pcr, [kernel; 32])));
            values
        };
        let (vulnerable, mended) = (values(1), values(2));
        let a = node();
        let of = vulnerable.clone();
        a.change(move |state| state.add_baseline("web", &of, None, T - 1_000)).await.unwrap();
        // From here on, this node takes no new snapshot: it is cut off.
        let b = node();
        let add = |name: &'static str, now: i64| {
            let values = mended.clone();
            a.change(move |state| state.add_baseline(name, &values, None, now))
        };
        a.change(|state| state.remove_baseline("web", T + 10)).await.unwrap();
        let refused = add("web", T + 20).await.unwrap_err().to_string();
        assert!(refused.contains("choose another name, or wait until"), "{refused}");
        add("web-2", T + 20).await.unwrap();
        // It issues certificates that name the removed baseline until its state is too old. Its clock may be ahead.
        let last = T + 10 + 300 + 300;
        for issued in [T + 60, last] {
            assert!(b.baselines().allow("web", issued), "where it was issued");
            assert!(!a.baselines().allow("web", issued), "where it is presented");
        }
        assert!(a.baselines().allow("web-2", T + 60));
        // The name is free when the last certificate has ended: notBefore is five minutes earlier.
        let ended = last - 300 + 8 * 3_600;
        assert!(add("web", ended).await.is_err());
        let free = a.with_state(|state| state.reserved_until("web", &mended, ended)).unwrap().unwrap();
        add("web", free).await.unwrap();
        assert!(a.baselines().allow("web", free));
        assert!(!a.baselines().allow("web", T + 60) && !a.baselines().allow("web", last));
        // Nothing is gained by a removed baseline that comes back with the same values.
        a.change(move |state| state.remove_baseline("web", free + 10)).await.unwrap();
        add("web", free + 20).await.unwrap();
        assert!(!a.baselines().allow("web", last) && a.baselines().allow("web", free + 20));
    }

    #[test]
    fn a_registry_is_stale_from_a_failed_look_to_the_next_good_one() {
        let folder = tempfile::tempdir().unwrap();
        let registry = registry(folder.path());
        assert!(!registry.is_stale());
        registry.looked(&Err("no disk"));
        assert!(registry.is_stale());
        registry.looked(&registry.follow());
        assert!(!registry.is_stale());
    }
}
