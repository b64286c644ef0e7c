//! The state for the rest of the daemon: each call reads the newest contents or makes one change.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger_protocol::tpm::pcr::PcrValues;
use tokio::sync::watch;

use super::backend::{Condition, Store};
use super::contents::Contents;
use super::error::StateError;
use super::etcd::{Board, Etcd, EtcdSettings};
use super::import::{Import, Merged, conflict};
use super::labels::Labels;
use super::records::{Baseline, Certificate, Host, HostKind, Kind, NewCertificate, NewSigner, RevokedSigner, Signer};
use super::sqlite::{Sqlite, make_folder};
use crate::config::Config;

/// How long the start waits for etcd.
const START: Duration = Duration::from_secs(30);
/// How long a command that only reads waits for etcd.
const LOOK: Duration = Duration::from_secs(8);

/// The open state, used by one caller at a time. Errors of changes are documented at the methods of [`Contents`].
#[derive(Debug)]
pub struct State {
    store: Box<dyn Store>,
    board: Option<Board>,
    /// The contents at the last snapshot.
    seen: Arc<Contents>,
}

/// A read-only view of the state file.
#[derive(Debug)]
pub struct View {
    /// The contents. Changes fail or are lost.
    pub state: State,
    /// The schema version of the file if it is older than this program's; the view is migrated in memory only.
    pub older: Option<i64>,
}

impl State {
    /// Opens the state of a daemon: etcd if the configuration names it, otherwise `state.db` in the state folder. Waits
    /// for etcd up to 30 seconds. A missing state folder is created with mode 0700.
    ///
    /// # Errors
    /// [`StateError::Unavailable`]; those of [`State::open`].
    pub fn of(config: &Config) -> Result<Self, StateError> {
        let folder = &config.server.state;
        let Some(settings) = EtcdSettings::of(config) else { return Self::open(folder) };
        make_folder(folder)?;
        tracing::info!(
            endpoints = settings.endpoints.join(", "),
            "reading the state from etcd, for which the start waits {} seconds at most",
            START.as_secs()
        );
        Self::etcd(settings)
    }

    /// Opens the state of a daemon for reading. Waits for etcd up to 8 seconds.
    ///
    /// # Errors
    /// [`StateError::Unavailable`]; those of [`State::view`].
    pub fn view_of(config: &Config) -> Result<View, StateError> {
        match EtcdSettings::of(config) {
            None => Self::view(&config.server.state),
            Some(settings) => Ok(View { state: Self::in_etcd(Etcd::open(settings, LOOK)?)?, older: None }),
        }
    }

    /// Opens `state.db` in `folder`. A missing folder is created with mode 0700, a missing file with 0600.
    ///
    /// # Errors
    /// [`StateError::TooNew`], [`StateError::File`] or [`StateError::Database`].
    pub fn open(folder: &Path) -> Result<Self, StateError> {
        Self::with(Sqlite::open(folder)?)
    }

    /// Opens `state.db` in `folder`, which must exist, without writing.
    ///
    /// # Errors
    /// [`StateError::TooNew`] or [`StateError::Database`].
    pub fn view(folder: &Path) -> Result<View, StateError> {
        let (store, older) = Sqlite::view(folder)?;
        Ok(View { state: Self::with(store)?, older })
    }

    /// Connects to etcd. A thread follows etcd until this value is dropped.
    ///
    /// # Errors
    /// [`StateError::Unavailable`].
    pub fn etcd(settings: EtcdSettings) -> Result<Self, StateError> {
        Self::in_etcd(Etcd::open(settings, START)?)
    }

    /// The state of the connection to etcd; `None` for a local state.
    #[must_use]
    pub fn condition(&self) -> Option<Condition> {
        self.store.condition()
    }

    /// Notifies about new contents and about each confirmation that they are the newest, if the store supports that;
    /// otherwise poll [`State::changed`].
    #[must_use]
    pub fn changes(&self) -> Option<watch::Receiver<()>> {
        self.store.changes()
    }

    /// The latest time at which the contents are known to have been the newest ones; `None` for a local state, whose
    /// contents always are.
    #[must_use]
    pub fn confirmed(&self) -> Option<Instant> {
        self.store.confirmed()
    }

    /// Another handle to a state in etcd, which does not wait for a change that this one makes. `None`: the state is
    /// local.
    #[must_use]
    pub fn another(&self) -> Option<Self> {
        Some(Self { store: self.store.another()?, board: self.board.clone(), seen: Arc::clone(&self.seen) })
    }

    /// What the nodes of a state in etcd tell each other; `None` for a local state.
    #[must_use]
    pub fn board(&self) -> Option<Board> {
        self.board.clone()
    }

    fn in_etcd(store: Etcd) -> Result<Self, StateError> {
        let board = Some(store.board());
        Ok(Self { board, ..Self::with(store)? })
    }

    fn with(store: impl Store + 'static) -> Result<Self, StateError> {
        let seen = store.contents()?;
        Ok(Self { store: Box::new(store), board: None, seen })
    }

    /// The current contents.
    ///
    /// # Errors
    /// [`StateError::Replaced`], [`StateError::Database`]. An unreadable table reports its own error when it is used.
    pub fn contents(&self) -> Result<Arc<Contents>, StateError> {
        self.store.contents()
    }

    /// Makes a change atomically. `decide` may be called several times, each time with newer contents.
    ///
    /// # Errors
    /// Those of `decide`; [`StateError::Replaced`], [`StateError::Database`].
    pub fn change<T>(
        &mut self,
        mut decide: impl FnMut(&mut Contents) -> Result<T, StateError>,
    ) -> Result<T, StateError> {
        let mut value = None;
        self.store.change(&mut |contents| {
            value = Some(decide(contents)?);
            Ok(())
        })?;
        match value {
            Some(value) => Ok(value),
            None => unreachable!("a change that is made has been decided"),
        }
    }

    /// Whether the contents have changed, through this value or another one, since the last successful
    /// [`State::snapshot`] (or since the state was opened).
    ///
    /// # Errors
    /// [`StateError::Replaced`], [`StateError::Database`].
    pub fn changed(&self) -> Result<bool, StateError> {
        Ok(!Arc::ptr_eq(&self.seen, &self.contents()?))
    }

    /// Passes the contents to `read`. If that succeeds, they count as seen by [`State::changed`].
    ///
    /// # Errors
    /// Those of `read`; [`StateError::Replaced`], [`StateError::Database`].
    pub fn snapshot<T, E: From<StateError>>(&mut self, read: impl FnOnce(&Contents) -> Result<T, E>) -> Result<T, E> {
        let contents = self.contents()?;
        let value = read(&contents)?;
        self.seen = contents;
        Ok(value)
    }

    /// See [`Contents::hosts`].
    ///
    /// # Errors
    /// See [`State::contents`].
    pub fn hosts(&self) -> Result<Vec<Host>, StateError> {
        Ok(self.contents()?.hosts()?.map(|host| Host::clone(host)).collect())
    }

    /// See [`Contents::host_by_name`].
    ///
    /// # Errors
    /// See [`State::contents`].
    pub fn host_by_name(&self, name: &str) -> Result<Option<Host>, StateError> {
        Ok(self.contents()?.host_by_name(name)?.map(|host| Host::clone(host)))
    }

    /// See [`Contents::host_by_spki`].
    ///
    /// # Errors
    /// See [`State::contents`].
    pub fn host_by_spki(&self, spki: &[u8]) -> Result<Option<Host>, StateError> {
        Ok(self.contents()?.host_by_spki(spki)?.map(|host| Host::clone(host)))
    }

    /// Registers a host by its host key: see [`Contents::add_host`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn add_host(&mut self, name: &str, spki: &[u8], labels: &Labels, now: i64) -> Result<Host, StateError> {
        self.add_host_with(HostKind::HostKey, name, spki, labels, now)
    }

    /// See [`Contents::add_host`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn add_host_with(
        &mut self,
        kind: HostKind,
        name: &str,
        spki: &[u8],
        labels: &Labels,
        now: i64,
    ) -> Result<Host, StateError> {
        self.change(|contents| contents.add_host(kind, name, spki, labels, now))
    }

    /// See [`Contents::remove_host`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn remove_host(&mut self, name: &str) -> Result<Host, StateError> {
        self.change(|contents| contents.remove_host(name))
    }

    /// See [`Contents::enable_host`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn enable_host(&mut self, name: &str, enabled: bool) -> Result<Host, StateError> {
        self.change(|contents| contents.enable_host(name, enabled))
    }

    /// See [`Contents::label_host`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn label_host(&mut self, name: &str, change: impl Fn(&Labels) -> Labels) -> Result<Host, StateError> {
        self.change(|contents| contents.label_host(name, &change))
    }

    /// All baselines by name, with their logs.
    ///
    /// # Errors
    /// See [`State::contents`].
    pub fn baselines(&self) -> Result<Vec<Baseline>, StateError> {
        self.baselines_without_logs()?.into_iter().map(|baseline| self.with_log(baseline)).collect()
    }

    /// See [`Contents::baselines`].
    ///
    /// # Errors
    /// See [`State::contents`].
    pub fn baselines_without_logs(&self) -> Result<Vec<Baseline>, StateError> {
        Ok(self.contents()?.baselines()?.cloned().collect())
    }

    /// The log of the baseline that was added under this name at this time, if any. Read the logs one at a time:
    /// together they may be large.
    ///
    /// # Errors
    /// [`StateError::Database`].
    pub fn baseline_log(&self, name: &str, added: i64) -> Result<Option<Vec<u8>>, StateError> {
        self.store.baseline_log(name, added)
    }

    fn with_log(&self, baseline: Baseline) -> Result<Baseline, StateError> {
        let log = self.baseline_log(&baseline.name, baseline.added)?;
        Ok(Baseline { log, ..baseline })
    }

    /// The baseline with this name, ignoring case, with its log.
    ///
    /// # Errors
    /// [`StateError::NotFound`]; see [`State::contents`].
    pub fn baseline_by_name(&self, name: &str) -> Result<Baseline, StateError> {
        let contents = self.contents()?;
        self.with_log(contents.baseline_by_name(name)?.clone())
    }

    /// See [`Contents::add_baseline`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn add_baseline(
        &mut self,
        name: &str,
        values: &PcrValues,
        log: Option<&[u8]>,
        now: i64,
    ) -> Result<Baseline, StateError> {
        let reservation = self.store.reservation();
        self.change(|contents| contents.add_baseline(name, values, log, now, reservation))
    }

    /// Enables or disables a baseline and returns it with its log.
    ///
    /// # Errors
    /// See [`Contents::enable_baseline`].
    pub fn enable_baseline(&mut self, name: &str, enabled: bool) -> Result<Baseline, StateError> {
        let changed = self.change(|contents| contents.enable_baseline(name, enabled))?;
        self.with_log(changed)
    }

    /// See [`Contents::reserved_until`].
    ///
    /// # Errors
    /// See [`State::contents`].
    pub fn reserved_until(&self, name: &str, values: &PcrValues, now: i64) -> Result<Option<i64>, StateError> {
        self.contents()?.reserved_until(name, values, now, self.store.reservation())
    }

    /// Removes a baseline and returns it with its log.
    ///
    /// # Errors
    /// See [`Contents::remove_baseline`].
    pub fn remove_baseline(&mut self, name: &str, now: i64) -> Result<Baseline, StateError> {
        let log = self.baseline_by_name(name)?.log;
        let reservation = self.store.reservation();
        let removed = self.change(|contents| contents.remove_baseline(name, now, reservation))?;
        Ok(Baseline { log, ..removed })
    }

    /// See [`Contents::certificates`].
    ///
    /// # Errors
    /// See [`State::contents`].
    pub fn certificates(&self) -> Result<Vec<Certificate>, StateError> {
        self.contents()?.certificates()
    }

    /// See [`Contents::add_certificate`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn add_certificate(&mut self, new: &NewCertificate<'_>, now: i64) -> Result<Certificate, StateError> {
        self.change(|contents| contents.add_certificate(new, now))
    }

    /// See [`Contents::add_limited_certificate`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn add_limited_certificate(
        &mut self,
        new: &NewCertificate<'_>,
        labels: &Labels,
        now: i64,
    ) -> Result<Certificate, StateError> {
        self.change(|contents| contents.add_limited_certificate(new, labels, now))
    }

    /// See [`Contents::set_primary`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn set_primary(&mut self, kind: Kind, thumbprint: &str) -> Result<(), StateError> {
        self.change(|contents| contents.set_primary(kind, thumbprint))
    }

    /// See [`Contents::set_communications`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn set_communications(&mut self, thumbprint: Option<&str>) -> Result<(), StateError> {
        self.change(|contents| contents.set_communications(thumbprint))
    }

    /// See [`Contents::limit_certificate`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn limit_certificate(
        &mut self,
        kind: Kind,
        thumbprint: &str,
        labels: &Labels,
    ) -> Result<Vec<Certificate>, StateError> {
        self.change(|contents| contents.limit_certificate(kind, thumbprint, labels))
    }

    /// See [`Contents::enable_certificate`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn enable_certificate(&mut self, kind: Kind, thumbprint: &str, enabled: bool) -> Result<(), StateError> {
        self.change(|contents| contents.enable_certificate(kind, thumbprint, enabled))
    }

    /// See [`Contents::remove_certificate`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn remove_certificate(&mut self, kind: Kind, thumbprint: &str) -> Result<(), StateError> {
        self.change(|contents| contents.remove_certificate(kind, thumbprint))
    }

    /// See [`Contents::signers`].
    ///
    /// # Errors
    /// See [`State::contents`].
    pub fn signers(&self) -> Result<Vec<Signer>, StateError> {
        self.contents()?.signers()
    }

    /// See [`Contents::add_signer`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn add_signer(&mut self, new: &NewSigner<'_>, replaces: Option<&str>, now: i64) -> Result<Signer, StateError> {
        self.change(|contents| contents.add_signer(new, replaces, now))
    }

    /// See [`Contents::revoked_signers`].
    ///
    /// # Errors
    /// See [`State::contents`].
    pub fn revoked_signers(&self) -> Result<Vec<RevokedSigner>, StateError> {
        self.contents()?.revoked_signers()
    }

    /// See [`Contents::signers_of_key`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn signers_of_key(&self, thumbprint: &str) -> Result<Vec<Signer>, StateError> {
        self.contents()?.signers_of_key(thumbprint)
    }

    /// See [`Contents::revoke_signer`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn revoke_signer(&mut self, thumbprint: &str, force: bool, now: i64) -> Result<Vec<String>, StateError> {
        self.change(|contents| contents.revoke_signer(thumbprint, force, now))
    }

    /// See [`Contents::forget_signers_before`].
    ///
    /// # Errors
    /// The errors of that method.
    pub fn forget_signers_before(&mut self, time: i64) -> Result<usize, StateError> {
        self.change(|contents| contents.forget_signers_before(time))
    }

    /// Returns what an import of another state's contents would change.
    ///
    /// # Errors
    /// See [`Contents::import`].
    pub fn plan_import(&mut self, import: &Import, now: i64) -> Result<Merged, StateError> {
        let reservation = self.store.reservation();
        Contents::clone(&*self.contents()?).import(import, now, reservation)
    }

    /// Imports another state's contents atomically, if this makes the `planned` changes and no others: those are on record.
    ///
    /// # Errors
    /// See [`Contents::import`]; and a conflict if the state has changed since the plan.
    pub fn import(&mut self, import: &Import, now: i64, planned: &[String]) -> Result<Merged, StateError> {
        let reservation = self.store.reservation();
        self.change(|contents| {
            let merged = contents.import(import, now, reservation)?;
            if merged.changes == planned {
                return Ok(merged);
            }
            Err(conflict("the state has changed since the import began; nothing was imported; import again".to_owned()))
        })
    }
}
