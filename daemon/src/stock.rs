//! The stock: egress protectors that were made and signed while sessions were idle, so that a release in a storm costs one HSM
//! operation instead of two.
//!
//! An egress protector depends on the wrapping set of the ingress protector, not on the machine. One lane holds those of one set.
//! An item leaves its lane in one of four ways, and is wiped from memory when it is dropped:
//!
//! ```text
//!            ┌── taken ──► given out, once                                           used
//! made ──► ready ◄─ back ── the release was refused
//!            ├── older than its time                                                 aged
//!            └── made for other keys or settings than those now, or another set's    dropped
//!                share of the memory
//! ```
//!
//! `shelf` says which lane gets the next item, `gaps` when one may be made. Everything is in memory. What is remembered over restarts
//! is public: which sets are worth it ([`Stock::worth`]).

mod egress;
mod gaps;
mod shelf;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use claviger_hsm::standstill;
use claviger_protocol::wrapping_set::WrappingSet;

pub(crate) use self::egress::Egress;
pub(crate) use self::gaps::Allowed;
use self::gaps::Gaps;
use self::shelf::{Picked, Shelf, Ticket};
use crate::config::Config;
use crate::observe::metrics;
use crate::registry::keys::Keys;

/// How long an item may wait at most.
const LONGEST: Duration = Duration::from_secs(600);
/// Part of [`LONGEST`] by which lifetimes differ, so that items that were made together do not all end together.
const SPREAD: Duration = Duration::from_secs(120);
/// Largest set that gets a lane, in bytes. An owner with three guardians has some 40,000, its certificates read and unread.
const LARGEST_SET: usize = 512 * 1024;
/// Part of the stock's memory that the sets themselves may take, beside the items: a half.
const SETS_SHARE: usize = 2;
/// Lanes and items that a part of a sweep looks at: some 50 µs.
const SWEEP_STEPS: usize = 256;

/// What items depend on beside their set: the keys with their labels, and the settings that are written into a protector.
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
        // Keys that have not changed stay the same value.
        Arc::ptr_eq(&self.keys, &other.keys) && self.max_offline_unwraps == other.max_offline_unwraps
    }
}

/// Egress protectors for the sets in use. A handle: clones are of the same stock.
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

/// A set that is worth stocking: what is remembered of it. All of it is public.
#[derive(Debug)]
pub(crate) struct Worth {
    pub(crate) set: Arc<WrappingSet>,
    pub(crate) releases: f64,
}

/// An item that is to be made.
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

    /// It cannot be made now: other sets come first for a while.
    pub(crate) fn failed(mut self) {
        self.failed = true;
    }

    /// Puts in what was ordered, unless it was made for keys or settings that are not in force any more. `sha256` is that of its file.
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

/// An item on its way out. Dropped without having been given out, it goes back.
pub(crate) struct Taken<'s> {
    stock: &'s Stock,
    picked: Option<Picked<Box<Egress>>>,
    basis: Basis,
}

impl Taken<'_> {
    /// The item, which is gone from the stock with this.
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

/// A release that runs: until it is dropped, the stock makes way for it.
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
    /// Items that wait.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.items().shelf.depth()
    }

    /// A release begins to work at the HSMs.
    pub(crate) fn release_begins(&self) -> Running<'_> {
        self.gaps().begins(standstill::now());
        Running(self)
    }

    /// How many items may be in the making, where `sessions` are idle or make one.
    pub(crate) fn allowed(&self, sessions: usize) -> Allowed {
        self.gaps().allowed(standstill::now(), sessions)
    }

    /// Counts releases for `set`, which is worth stocking by that. `limit` is the stock's memory in bytes: a caller chooses the size
    /// of a set, so sets are bounded by bytes and not by their number alone.
    pub(crate) fn asked(&self, set: &Arc<WrappingSet>, releases: f64, limit: usize) {
        let (size, room) = (set.memory(), limit / SETS_SHARE);
        if size <= LARGEST_SET.min(room) {
            let identity = set.identity();
            self.with(|items| items.shelf.asked(identity, releases, (size, room), || Arc::clone(set), clock()));
        }
    }

    /// An item of `set` that was made for `basis`, which has to be what is in force: a release that began before a change does without.
    pub(crate) fn take(&self, set: &WrappingSet, basis: Basis) -> Option<Taken<'_>> {
        let identity = set.identity();
        let picked = self.with(|items| {
            let in_force = items.basis.as_ref() == Some(&basis);
            in_force.then(|| items.shelf.take(&identity, clock())).flatten()
        })?;
        Some(Taken { stock: self, picked: Some(picked), basis })
    }

    /// Goes on with these keys and settings: what was made for others is thrown away, and what is being made for them is not put in.
    /// `newest` reads what is in force under the lock, so that of two calls the later one has the newer basis.
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

    /// A part of a sweep: throws away what has waited for too long and what exceeds `limit` bytes, and forgets sets that nobody asks
    /// for any more. `true` when the sweep is through.
    pub(crate) fn sweep(&self, limit: usize) -> bool {
        self.with(|items| items.shelf.sweep(limit, SWEEP_STEPS, clock()))
    }

    /// The item that is lacked most, as far as `limit` bytes go. See [`shelf`].
    pub(crate) fn order(&self, limit: usize) -> Option<Order> {
        let (ticket, set, basis) = self.with(|items| {
            let basis = items.basis.clone()?;
            let ticket = items.shelf.order(limit, clock())?;
            let set = items.shelf.label(&ticket).map(Arc::clone)?;
            Some((ticket, set, basis))
        })?;
        Some(Order { stock: self.clone(), ticket, set, basis, begun: standstill::now(), failed: false })
    }

    /// The sets that are asked for most, first of all those.
    pub(crate) fn worth(&self, most: usize) -> Vec<Worth> {
        self.with(|items| {
            let demands = items.shelf.demands(most, clock()).into_iter();
            demands.map(|(set, releases)| Worth { set: Arc::clone(set), releases }).collect()
        })
    }

    /// Does something with the items. What leaves the shelf by it is wiped after the lock was given back.
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
        self.0.items.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gaps(&self) -> MutexGuard<'_, Gaps> {
        self.0.gaps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The clock by which items age. Other than [`standstill`]'s it goes on while the process stands still: a deadline leaves that time
/// out because nobody could do anything in it, but a secret lies in memory for all of it, and in every copy of that memory. The
/// age of an item bounds how long that is.
fn clock() -> Instant {
    // Tokio's, because tests pause and set it.
    tokio::time::Instant::now().into_std()
}
