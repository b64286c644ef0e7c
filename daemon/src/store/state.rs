//! The state as the rest of the daemon sees it: each call reads the newest contents, or makes one change of them.

use std::path::Path;
use std::sync::Arc;

use claviger_protocol::tpm::pcr::PcrValues;
use tokio::sync::watch;

use super::backend::{Condition, Store};
use super::contents::Contents;
use super::error::StateError;
use super::etcd::{Etcd, EtcdSettings};
use super::import::{Import, Merged};
use super::labels::Labels;
use super::records::{Baseline, Certificate, Host, HostKind, Kind, NewCertificate, NewSigner, RevokedSigner, Signer};
use super::sqlite::Sqlite;

/// The open state, used by one caller at a time. Errors of single changes are those of the methods of [`Contents`].
#[derive(Debug)]
pub struct State {
    store: Box<dyn Store>,
    /// The contents at the last snapshot.
    seen: Arc<Contents>,
}

/// The state as it is in its file, for reading only.
#[derive(Debug)]
pub struct View {
    /// Its content. Changes to it are lost, if they do not fail.
    pub state: State,
    /// The schema version of the file, where it is older than this program's; it is brought up to date in memory only.
    pub older: Option<i64>,
}

impl State {
    /// Opens `state.db` in `folder`. A folder that is missing is made with mode 0700, the file with 0600.
    ///
    /// # Errors
    /// [`StateError::TooNew`], [`StateError::File`] or [`StateError::Database`].
    pub fn open(folder: &Path) -> Result<Self, StateError> {
        Self::of(Sqlite::open(folder)?)
    }

    /// Opens `state.db` in `folder`, which exists, and writes nothing.
    ///
    /// # Errors
    /// [`StateError::TooNew`] or [`StateError::Database`].
    pub fn view(folder: &Path) -> Result<View, StateError> {
        let (store, older) = Sqlite::view(folder)?;
        Ok(View { state: Self::of(store)?, older })
    }

    /// Connects to etcd, and follows it on a thread of its own until this value is dropped.
    ///
    /// # Errors
    /// [`StateError::Unavailable`].
    pub fn etcd(settings: EtcdSettings) -> Result<Self, StateError> {
        Self::of(Etcd::open(settings)?)
    }

    /// How well etcd is followed; `None` for a state on this machine.
    #[must_use]
    pub fn condition(&self) -> Option<Condition> {
        self.store.condition()
    }

    /// Tells of new contents, if the store does; otherwise [`State::changed`] has to be asked.
    #[must_use]
    pub fn changes(&self) -> Option<watch::Receiver<()>> {
        self.store.changes()
    }

    fn of(store: impl Store + 'static) -> Result<Self, StateError> {
        let seen = store.contents()?;
        Ok(Self { store: Box::new(store), seen })
    }

    /// The contents now.
    ///
    /// # Errors
    /// [`StateError::Replaced`], [`StateError::Database`]; what single tables say is in the contents.
    pub fn contents(&self) -> Result<Arc<Contents>, StateError> {
        self.store.contents()
    }

    /// Makes a change, all of it or nothing. `decide` may be called several times, each time with newer contents.
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

    /// Whether the contents have changed, through this value or another one, since the last [`State::snapshot`] that succeeded
    /// (or since the state was opened).
    ///
    /// # Errors
    /// [`StateError::Replaced`], [`StateError::Database`].
    pub fn changed(&self) -> Result<bool, StateError> {
        Ok(!Arc::ptr_eq(&self.seen, &self.contents()?))
    }

    /// Hands the contents to `read`; if that succeeds, they are no change any more.
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
    /// See there.
    pub fn add_host(&mut self, name: &str, spki: &[u8], labels: &Labels, now: i64) -> Result<Host, StateError> {
        self.add_host_with(HostKind::HostKey, name, spki, labels, now)
    }

    /// See [`Contents::add_host`].
    ///
    /// # Errors
    /// See there.
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
    /// See there.
    pub fn remove_host(&mut self, name: &str) -> Result<Host, StateError> {
        self.change(|contents| contents.remove_host(name))
    }

    /// See [`Contents::enable_host`].
    ///
    /// # Errors
    /// See there.
    pub fn enable_host(&mut self, name: &str, enabled: bool) -> Result<Host, StateError> {
        self.change(|contents| contents.enable_host(name, enabled))
    }

    /// See [`Contents::label_host`].
    ///
    /// # Errors
    /// See there.
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

    /// The log of the baseline that was added under this name at this time, if it has one. One at a time: all together may be
    /// large.
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

    /// The baseline of a name, without regard to case, with its log.
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
    /// See there.
    pub fn add_baseline(
        &mut self,
        name: &str,
        values: &PcrValues,
        log: Option<&[u8]>,
        now: i64,
    ) -> Result<Baseline, StateError> {
        self.change(|contents| contents.add_baseline(name, values, log, now))
    }

    /// Enables or disables a baseline and returns it with its log.
    ///
    /// # Errors
    /// See [`Contents::enable_baseline`].
    pub fn enable_baseline(&mut self, name: &str, enabled: bool) -> Result<Baseline, StateError> {
        let changed = self.change(|contents| contents.enable_baseline(name, enabled))?;
        self.with_log(changed)
    }

    /// Removes a baseline and returns it with its log.
    ///
    /// # Errors
    /// See [`Contents::remove_baseline`].
    pub fn remove_baseline(&mut self, name: &str) -> Result<Baseline, StateError> {
        let log = self.baseline_by_name(name)?.log;
        let removed = self.change(|contents| contents.remove_baseline(name))?;
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
    /// See there.
    pub fn add_certificate(&mut self, new: &NewCertificate<'_>, now: i64) -> Result<Certificate, StateError> {
        self.change(|contents| contents.add_certificate(new, now))
    }

    /// See [`Contents::set_primary`].
    ///
    /// # Errors
    /// See there.
    pub fn set_primary(&mut self, kind: Kind, thumbprint: &str) -> Result<(), StateError> {
        self.change(|contents| contents.set_primary(kind, thumbprint))
    }

    /// See [`Contents::set_communications`].
    ///
    /// # Errors
    /// See there.
    pub fn set_communications(&mut self, thumbprint: Option<&str>) -> Result<(), StateError> {
        self.change(|contents| contents.set_communications(thumbprint))
    }

    /// See [`Contents::limit_certificate`].
    ///
    /// # Errors
    /// See there.
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
    /// See there.
    pub fn enable_certificate(&mut self, kind: Kind, thumbprint: &str, enabled: bool) -> Result<(), StateError> {
        self.change(|contents| contents.enable_certificate(kind, thumbprint, enabled))
    }

    /// See [`Contents::remove_certificate`].
    ///
    /// # Errors
    /// See there.
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
    /// See there.
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
    /// See there.
    pub fn signers_of_key(&self, thumbprint: &str) -> Result<Vec<Signer>, StateError> {
        self.contents()?.signers_of_key(thumbprint)
    }

    /// See [`Contents::revoke_signer`].
    ///
    /// # Errors
    /// See there.
    pub fn revoke_signer(&mut self, thumbprint: &str, force: bool, now: i64) -> Result<Vec<String>, StateError> {
        self.change(|contents| contents.revoke_signer(thumbprint, force, now))
    }

    /// See [`Contents::forget_signers_before`].
    ///
    /// # Errors
    /// See there.
    pub fn forget_signers_before(&mut self, time: i64) -> Result<usize, StateError> {
        self.change(|contents| contents.forget_signers_before(time))
    }

    /// Takes in another state's content, all of it or nothing. Without `apply` it only says what would change.
    ///
    /// # Errors
    /// See [`Contents::import`].
    pub fn import(&mut self, import: &Import, now: i64, apply: bool) -> Result<Merged, StateError> {
        if apply {
            return self.change(|contents| contents.import(import, now));
        }
        Contents::clone(&*self.contents()?).import(import, now)
    }
}
