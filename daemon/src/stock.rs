//! The stock contains egress protectors that were created and signed while sessions were idle. A release that uses
//! one of them needs one HSM operation instead of two.
//!
//! An egress protector depends on the wrapping set of the ingress protector, not on the machine. Each wrapping set
//! has one lane, which contains its items. An item leaves its lane in one of four ways. Its memory is wiped when it
//! is dropped:
//!
//! ```text
//!            ┌── taken ──► given out, once                                           used
//! made ──► ready ◄─ back ── the release was refused
//!            ├── older than its time                                                 aged
//!            └── made for other keys or settings than those now, or another set's    dropped
//!                share of the memory
//! ```
//!
//! `shelf` decides which lane gets the next item, and `gaps` decides when an item may be made. Everything is in
//! memory. Only public data is stored across restarts: the list of sets that are worth stocking ([`Stock::worth`]).

mod egress;
mod gaps;
mod shelf;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use claviger_hsm::standstill;
use claviger_process::lock::lock;
use claviger_protocol::wrapping_set::WrappingSet;

pub(crate) use self::egress::Egress;
pub(crate) use self::gaps::Allowed;
use self::gaps::Gaps;
use self::shelf::{Picked, Shelf, Ticket};
use crate::config::Config;
use crate::observe::metrics;
use crate::registry::keys::Keys;

/// Maximum time for which an item may wait.
const LONGEST: Duration = Duration::from_secs(600);
/// Part of [`LONGEST`] by which the lifetimes vary, so that items made at the same time do not all expire at the same
/// time.
const SPREAD: Duration = Duration::from_secs(120);
/// Largest set that gets a lane, in bytes. The set of an owner with three guardians takes about 40,000, with its
/// certificates both parsed and unparsed.
const LARGEST_SET: usize = 512 * 1024;
/// Part of the stock's memory that the sets themselves may take, in addition to the items: one half.
const SETS_SHARE: usize = 2;
/// Machines that one release of a set stands for. Machines run for a long time: the releases that count are those of about
/// ten days (a release counts half after a week), and a machine that is restarted once a year is in one of 37 such times.
pub(crate) const MACHINES_FOR_A_RELEASE: f64 = 40.0;
/// Number of lanes and items that one part of a sweep examines. It takes about 50 µs.
const SWEEP_STEPS: usize = 256;

/// What the items depend on besides their set: the keys with their labels, and the settings that are written into a
/// protector.
#[derive(Clone, Debug)]
pub(crate) struct Basis {
    keys: Arc<Keys>,
    max_offline_unwraps: u32,
}

impl Basis {
    pub(crate) fn new(keys: &Arc<Keys>, config: &Config) -> Self {
        Self { keys: Arc::clone(keys), max_offline_unwraps: config.release.max_offline_unwraps }
    }
}

impl PartialEq for Basis {
    fn eq(&self, other: &Self) -> bool {
        // An unchanged key remains the same value.
        Arc::ptr_eq(&self.keys, &other.keys) && self.max_offline_unwraps == other.max_offline_unwraps
    }
}

/// Egress protectors for the sets in use. This is a handle: its clones refer to the same stock.
#[derive(Clone)]
pub struct Stock(Arc<Shared>);

struct Shared {
    items: Mutex<Items>,
    gaps: Mutex<Gaps>,
}

struct Items {
    /// What all items on the shelf are made for. `None` until the service has taken its first snapshot.
    basis: Option<Basis>,
    shelf: Shelf<Arc<WrappingSet>, Box<Egress>>,
}

/// A set that is worth stocking, in the form that is stored across restarts. All of its data is public.
#[derive(Debug)]
pub(crate) struct Worth {
    pub(crate) set: Arc<WrappingSet>,
    pub(crate) releases: f64,
}

/// An item to make.
pub(crate) struct Order {
    stock: Stock,
    ticket: Ticket,
    set: Arc<WrappingSet>,
    basis: Basis,
    begun: Instant,
    failed: bool,
}

impl Order {
    pub(crate) fn set(&self) -> &Arc<WrappingSet> {
        &self.set
    }

    pub(crate) fn keys(&self) -> &Keys {
        &self.basis.keys
    }

    pub(crate) fn max_offline_unwraps(&self) -> u32 {
        self.basis.max_offline_unwraps
    }

    /// The item cannot be made now: for a while, other sets are preferred.
    pub(crate) fn failed(mut self) {
        self.failed = true;
    }

    /// Adds an item that was ordered, unless it was made for keys or settings that are no longer in use. `sha256` is
    /// the hash of its file.
    pub(crate) fn put(self, egress: Egress, sha256: [u8; 32]) {
        metrics::stock_made();
        self.stock.gaps().made(standstill::since(self.begun));
        let size = size_of::<Egress>() + egress.size();
        let ends = clock() + LONGEST - SPREAD * u32::from(sha256[0]) / 256;
        let mut out = None;
        self.stock.with(|items| {
            if items.basis.as_ref() == Some(&self.basis) {
                items.shelf.put(&self.ticket, Box::new(egress), size, ends, clock());
            } else {
                out = Some(egress);
            }
        });
        if out.is_some() {
            metrics::stock_dropped();
        }
    }
}

impl Drop for Order {
    fn drop(&mut self) {
        self.stock.with(|items| items.shelf.finished(&self.ticket, self.failed, clock()));
    }
}

/// An item that was taken from the stock. If it is dropped without being given out, it returns to the stock.
pub(crate) struct Taken<'s> {
    stock: &'s Stock,
    picked: Option<Picked<Box<Egress>>>,
    basis: Basis,
}

impl Taken<'_> {
    /// Returns the item. It then no longer belongs to the stock.
    pub(crate) fn give_out(mut self) -> Option<Egress> {
        let picked = self.picked.take()?;
        metrics::stock_used();
        Some(*picked.item.value)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let Some(picked) = self.picked.take() else { return };
        let mut out = None;
        self.stock.with(|items| {
            if items.basis.as_ref() == Some(&self.basis) {
                items.shelf.put_back(picked, clock());
            } else {
                out = Some(picked);
            }
        });
        if out.is_some() {
            metrics::stock_dropped();
        }
    }
}

/// A running release. Until this value is dropped, the stock leaves the HSMs to releases.
pub(crate) struct Running<'s>(&'s Stock);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.gaps().ends(standstill::now());
    }
}

impl Default for Stock {
    fn default() -> Self {
        let items = Items { basis: None, shelf: Shelf::new(clock()) };
        let gaps = Gaps::new(standstill::now());
        Self(Arc::new(Shared { items: Mutex::new(items), gaps: Mutex::new(gaps) }))
    }
}

impl fmt::Debug for Stock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stock").field("depth", &self.depth()).finish_non_exhaustive()
    }
}

impl Stock {
    /// The number of waiting items.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.items().shelf.depth()
    }

    /// A release starts to use the HSMs.
    pub(crate) fn release_begins(&self) -> Running<'_> {
        self.gaps().begins(standstill::now());
        Running(self)
    }

    /// The number of items that may be made at the same time. `sessions` is the number of sessions that are idle or
    /// make an item.
    pub(crate) fn allowed(&self, sessions: usize) -> Allowed {
        self.gaps().allowed(standstill::now(), sessions)
    }

    /// Counts releases for `set`, which makes the set more worth stocking. `limit` is the stock's memory in bytes. A
    /// caller chooses the size of a set; so the sets are limited by their bytes and not only by their number.
    pub(crate) fn asked(&self, set: &Arc<WrappingSet>, releases: f64, limit: usize) {
        let (size, room) = (set.memory(), limit / SETS_SHARE);
        if size <= LARGEST_SET.min(room) {
            let identity = set.identity();
            let machines = releases * MACHINES_FOR_A_RELEASE;
            self.with(|items| items.shelf.asked(identity, machines, (size, room), || Arc::clone(set), clock()));
        }
    }

    /// Returns an item of `set` that was made for `basis`. `basis` must be in use now: a release that began before a
    /// change gets no item.
    pub(crate) fn take(&self, set: &WrappingSet, basis: Basis) -> Option<Taken<'_>> {
        let identity = set.identity();
        let picked = self.with(|items| {
            let in_force = items.basis.as_ref() == Some(&basis);
            in_force.then(|| items.shelf.take(&identity, clock())).flatten()
        })?;
        Some(Taken { stock: self, picked: Some(picked), basis })
    }

    /// Changes to these keys and settings. Items that were made for other ones are dropped, and items that are being
    /// made for other ones will not be added. `newest` is called under the lock, so that of two calls the later one has
    /// the newer basis.
    pub(crate) fn rebase(&self, newest: impl FnOnce() -> Basis) {
        self.with(|items| {
            let basis = newest();
            if items.basis.as_ref() != Some(&basis) {
                items.basis = Some(basis);
                items.shelf.clear(clock());
            }
        });
    }

    #[cfg(test)]
    pub(crate) fn is_based_on(&self, basis: &Basis) -> bool {
        self.items().basis.as_ref() == Some(basis)
    }

    /// Does a part of a sweep: drops items that have waited too long or exceed `limit` bytes, and forgets sets that
    /// no caller requests any more. Returns `true` when the sweep is complete.
    pub(crate) fn sweep(&self, limit: usize) -> bool {
        self.with(|items| items.shelf.sweep(limit, SWEEP_STEPS, clock()))
    }

    /// The item that is needed most and fits into `limit` bytes. See [`shelf`].
    pub(crate) fn order(&self, limit: usize) -> Option<Order> {
        let (ticket, set, basis) = self.with(|items| {
            let basis = items.basis.clone()?;
            let ticket = items.shelf.order(limit, clock())?;
            let set = items.shelf.label(&ticket).map(Arc::clone)?;
            Some((ticket, set, basis))
        })?;
        Some(Order { stock: self.clone(), ticket, set, basis, begun: standstill::now(), failed: false })
    }

    /// The sets with the most releases, in descending order.
    pub(crate) fn worth(&self, most: usize) -> Vec<Worth> {
        self.with(|items| {
            let demands = items.shelf.demands(most, clock()).into_iter();
            let worth = |(set, machines)| Worth { set: Arc::clone(set), releases: machines / MACHINES_FOR_A_RELEASE };
            demands.map(worth).collect()
        })
    }

    /// Runs a function on the items. The items that it removes from the shelf are wiped after the lock is released.
    fn with<T>(&self, work: impl FnOnce(&mut Items) -> T) -> T {
        let mut items = self.items();
        let result = work(&mut items);
        let gone = items.shelf.gone();
        drop(items);
        gone.aged.iter().for_each(|_| metrics::stock_aged());
        gone.dropped.iter().for_each(|_| metrics::stock_dropped());
        result
    }

    fn items(&self) -> MutexGuard<'_, Items> {
        lock(&self.0.items)
    }

    fn gaps(&self) -> MutexGuard<'_, Gaps> {
        lock(&self.0.gaps)
    }
}

/// The clock that measures the age of items. Unlike the clock of [`standstill`], it also counts the time for which
/// the process was paused. A deadline leaves that time out, because nothing could be done in it. But a secret is in
/// memory during all of that time, and in every copy of that memory. The limit on an item's age limits this time.
fn clock() -> Instant {
    // Tokio's clock, because tests can pause and set it.
    tokio::time::Instant::now().into_std()
}
