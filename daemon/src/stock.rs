//! The stock: egress protectors that were made and signed while sessions were idle, so that a release in a storm costs one HSM
//! operation instead of two.
//!
//! An egress protector depends on the wrapping set of the ingress protector, not on the machine. One lane holds those of one set,
//! oldest first. An item leaves its lane in one of four ways, and is wiped from memory when it is dropped:
//!
//! ```text
//!            ┌── taken ──► given out, once                         used
//! made ──► ready ◄─ back ── the release was refused
//!            ├── older than its time                               aged
//!            └── made for other keys or settings than those now    dropped
//! ```
//!
//! Everything is in memory. What is remembered over restarts is public: which sets are worth it ([`Stock::worth`]).

mod egress;

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use claviger_hsm::standstill;
use claviger_protocol::wrapping_set::WrappingSet;
use crossbeam::queue::SegQueue;

pub(crate) use self::egress::Egress;
use crate::config::Config;
use crate::observe::metrics;
use crate::registry::keys::Keys;

/// How long an item may wait at most.
const LONGEST: Duration = Duration::from_secs(600);
/// Part of [`LONGEST`] by which lifetimes differ, so that items that were made together do not all end together.
const SPREAD: Duration = Duration::from_secs(120);
/// Sets that have a lane; when there are more, the one that is asked for least loses its own.
const MOST_LANES: usize = 4_096;
/// Largest set that gets a lane, in bytes. An owner with three guardians has some 13,000.
const LARGEST_SET: usize = 128 * 1024;
/// Part of the stock's memory that the sets themselves may take, beside the items.
const SETS_SHARE: usize = 4;
/// The demand for a set is halved in this time.
const HALF_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a set waits whose item could not be made.
const REST: Duration = Duration::from_secs(5);
/// Sets whose demand fell below this are forgotten.
const LEAST_DEMAND: f64 = 0.25;

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

/// An egress protector that waits to be given out.
#[derive(Debug)]
pub(crate) struct Ready {
    egress: Egress,
    basis: Basis,
    made: Instant,
    lifetime: Duration,
    size: usize,
}

/// The items of one set.
#[derive(Debug)]
struct Lane {
    set: Arc<WrappingSet>,
    ready: SegQueue<Box<Ready>>,
    /// Items that are being made.
    coming: AtomicUsize,
    /// Until when none is ordered, after one could not be made.
    rests_until: Mutex<Option<Instant>>,
    demand: Mutex<Demand>,
}

/// How much a set is asked for: its releases, of which each counts half as much after [`HALF_LIFE`].
#[derive(Clone, Copy, Debug)]
struct Demand {
    releases: f64,
    at: Instant,
}

impl Demand {
    fn at(self, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(self.at);
        self.releases * (-passed.as_secs_f64() / HALF_LIFE.as_secs_f64()).exp2()
    }
}

impl Lane {
    fn rests(&self, now: Instant) -> bool {
        self.rests_until.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|until| now < until)
    }

    fn demand(&self, now: Instant) -> f64 {
        self.demand.lock().unwrap_or_else(PoisonError::into_inner).at(now)
    }

    fn asked(&self, releases: f64, now: Instant) {
        let mut demand = self.demand.lock().unwrap_or_else(PoisonError::into_inner);
        *demand = Demand { releases: demand.at(now) + releases, at: now };
    }
}

/// Egress protectors for the sets in use.
#[derive(Debug, Default)]
pub struct Stock {
    lanes: RwLock<HashMap<[u8; 32], Arc<Lane>>>,
    /// What items are made for now. `None` until the service has taken its first snapshot.
    basis: Mutex<Option<Basis>>,
    size: AtomicUsize,
    depth: AtomicUsize,
}

/// A set that is worth stocking: what is remembered of it. All of it is public.
#[derive(Debug)]
pub(crate) struct Worth {
    pub(crate) set: Arc<WrappingSet>,
    pub(crate) releases: f64,
}

/// An item that is to be made.
pub(crate) struct Order {
    lane: Arc<Lane>,
    basis: Basis,
}

impl Order {
    pub(crate) fn set(&self) -> &Arc<WrappingSet> {
        &self.lane.set
    }

    pub(crate) fn keys(&self) -> &Keys {
        &self.basis.keys
    }

    pub(crate) fn max_offline_unwraps(&self) -> u32 {
        self.basis.max_offline_unwraps
    }

    /// It cannot be made now: other sets come first for a while.
    pub(crate) fn failed(&self) {
        let until = standstill::now() + REST;
        *self.lane.rests_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
    }
}

impl Drop for Order {
    fn drop(&mut self) {
        self.lane.coming.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An item on its way out. Dropped without having been given out, it goes back.
pub(crate) struct Taken<'a> {
    stock: &'a Stock,
    lane: Arc<Lane>,
    ready: Option<Box<Ready>>,
}

impl Taken<'_> {
    /// The item, which is gone from the stock with this.
    pub(crate) fn give_out(mut self) -> Option<Egress> {
        let ready = self.ready.take()?;
        self.stock.gone(&ready);
        metrics::stock_used();
        Some(ready.egress)
    }

    fn put_back(&self, ready: Box<Ready>) {
        self.stock.gone(&ready);
        self.stock.put_in(&self.lane, ready);
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(ready) = self.ready.take() {
            self.put_back(ready);
        }
    }
}

impl Stock {
    /// Items that wait.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.depth.load(Ordering::Relaxed)
    }

    /// Counts a release for `set`, which is worth stocking by that. `limit` is the stock's memory in bytes: a caller chooses the size
    /// of a set, so sets are bounded by bytes and not by their number alone.
    pub(crate) fn asked(&self, set: &Arc<WrappingSet>, releases: f64, limit: usize) {
        let room = limit / SETS_SHARE;
        if set.size() > LARGEST_SET.min(room) {
            return;
        }
        let now = standstill::now();
        let identity = set.identity();
        let known = self.lanes().get(&identity).map(Arc::clone);
        if let Some(lane) = known {
            lane.asked(releases, now);
            return;
        }
        let mut lanes = self.lanes.write().unwrap_or_else(PoisonError::into_inner);
        let mut taken: usize = lanes.values().map(|lane| lane.set.size()).sum();
        while lanes.len() >= MOST_LANES || taken + set.size() > room {
            let least = lanes.iter().min_by(|(_, one), (_, other)| one.demand(now).total_cmp(&other.demand(now)));
            let Some(lane) = least.map(|(identity, _)| *identity).and_then(|least| lanes.remove(&least)) else { break };
            taken -= lane.set.size();
            self.empty(&lane);
        }
        let lane = lanes.entry(identity).or_insert_with(|| {
            Arc::new(Lane {
                set: Arc::clone(set),
                ready: SegQueue::new(),
                coming: AtomicUsize::new(0),
                rests_until: Mutex::new(None),
                demand: Mutex::new(Demand { releases: 0.0, at: now }),
            })
        });
        lane.asked(releases, now);
    }

    /// An item of `set` that was made for `basis`, which has to be what is in force: a release that began before a change does without.
    pub(crate) fn take(&self, set: &WrappingSet, basis: &Basis) -> Option<Taken<'_>> {
        if self.depth() == 0 || self.basis().as_ref() != Some(basis) {
            return None;
        }
        let lane = self.lanes().get(&set.identity()).map(Arc::clone)?;
        let now = standstill::now();
        while let Some(ready) = lane.ready.pop() {
            if self.is_good(&ready, basis, now) {
                return Some(Taken { stock: self, lane, ready: Some(ready) });
            }
        }
        None
    }

    /// Whether an item may still be given out; it is gone if not.
    fn is_good(&self, ready: &Ready, basis: &Basis, now: Instant) -> bool {
        if ready.basis != *basis {
            self.gone(ready);
            metrics::stock_dropped();
            return false;
        }
        if now.saturating_duration_since(ready.made) >= ready.lifetime {
            self.gone(ready);
            metrics::stock_aged();
            return false;
        }
        true
    }

    fn gone(&self, ready: &Ready) {
        self.depth.fetch_sub(1, Ordering::Relaxed);
        self.size.fetch_sub(ready.size, Ordering::Relaxed);
    }

    fn empty(&self, lane: &Lane) {
        while let Some(ready) = lane.ready.pop() {
            self.gone(&ready);
            metrics::stock_dropped();
        }
    }

    /// Goes on with these keys and settings: what was made for others is thrown away. `newest` reads what is in force under the
    /// lock, so that of two calls the later one has the newer basis.
    pub(crate) fn rebase(&self, newest: impl FnOnce() -> Basis) {
        let mut current = self.basis();
        let basis = newest();
        if current.as_ref() == Some(&basis) {
            return;
        }
        *current = Some(basis);
        // Under the lock: what is being made for the old ones is not put in any more.
        self.lanes().values().for_each(|lane| self.empty(lane));
    }

    #[cfg(test)]
    pub(crate) fn is_based_on(&self, basis: &Basis) -> bool {
        self.basis().as_ref() == Some(basis)
    }

    /// Throws away what has waited for too long and what exceeds `limit` bytes, and forgets sets that nobody asks for any more.
    pub(crate) fn sweep(&self, limit: usize) {
        let Some(basis) = self.basis().clone() else { return };
        let now = standstill::now();
        let lanes: Vec<_> = self.lanes().iter().map(|(identity, lane)| (*identity, Arc::clone(lane))).collect();
        for (identity, lane) in lanes {
            // At most once around: releases take and give back meanwhile.
            for _ in 0..lane.ready.len() {
                let Some(ready) = lane.ready.pop() else { break };
                if !self.is_good(&ready, &basis, now) {
                    continue;
                }
                self.gone(&ready);
                if self.size.load(Ordering::Relaxed) + ready.size > limit {
                    metrics::stock_dropped();
                } else {
                    self.put_in(&lane, ready);
                }
            }
            if lane.demand(now) < LEAST_DEMAND {
                let mut lanes = self.lanes.write().unwrap_or_else(PoisonError::into_inner);
                // The set may have got another lane meanwhile.
                if lanes.get(&identity).is_some_and(|current| Arc::ptr_eq(current, &lane)) {
                    lanes.remove(&identity);
                }
                // Before anybody can put something into a lane that is gone.
                self.empty(&lane);
            }
        }
    }

    /// The item that is lacked most, as far as `limit` bytes go: every set has as many as it had releases lately, or its share
    /// of what there is room for.
    pub(crate) fn order(&self, limit: usize) -> Option<Order> {
        let size = self.size.load(Ordering::Relaxed);
        let basis = self.basis().clone()?;
        let now = standstill::now();
        let lanes = self.lanes();
        let demand: f64 = lanes.values().map(|lane| lane.demand(now).ceil()).sum();
        let depth = self.depth().max(1);
        // What an item takes, by those that there are; a first guess is an owner's with three guardians.
        let each = if size == 0 { 4_096.0 } else { size as f64 / depth as f64 };
        let coming: usize = lanes.values().map(|lane| lane.coming.load(Ordering::Relaxed)).sum();
        if size as f64 + each * (coming + 1) as f64 > limit as f64 {
            return None;
        }
        let share = (limit as f64 / each / demand.max(1.0)).min(1.0);
        let lacking = lanes.values().filter(|lane| !lane.rests(now)).filter_map(|lane| {
            let wanted = (lane.demand(now).ceil() * share).floor();
            let there = (lane.ready.len() + lane.coming.load(Ordering::Relaxed)) as f64;
            (wanted > there).then_some((there / wanted, lane))
        });
        let (_, lane) = lacking.min_by(|(one, _), (other, _)| one.total_cmp(other))?;
        lane.coming.fetch_add(1, Ordering::Relaxed);
        Some(Order { lane: Arc::clone(lane), basis })
    }

    /// Puts in what was ordered. `sha256` is that of its file.
    pub(crate) fn put(&self, order: &Order, egress: Egress, sha256: [u8; 32]) {
        metrics::stock_made();
        let size = size_of::<Ready>() + egress.size();
        let lifetime = LONGEST - SPREAD * u32::from(sha256[0]) / 256;
        let ready = Ready { egress, basis: order.basis.clone(), made: standstill::now(), lifetime, size };
        self.put_in(&order.lane, Box::new(ready));
    }

    /// Unless it was made for keys or settings that are not in force any more, or its lane is gone.
    fn put_in(&self, lane: &Arc<Lane>, ready: Box<Ready>) {
        let (current, lanes) = (self.basis(), self.lanes());
        let is_there = lanes.get(&lane.set.identity()).is_some_and(|there| Arc::ptr_eq(there, lane));
        if !is_there || current.as_ref() != Some(&ready.basis) {
            metrics::stock_dropped();
            return;
        }
        self.depth.fetch_add(1, Ordering::Relaxed);
        self.size.fetch_add(ready.size, Ordering::Relaxed);
        lane.ready.push(ready);
    }

    /// The sets that are asked for most, first of all those.
    pub(crate) fn worth(&self, most: usize) -> Vec<Worth> {
        let now = standstill::now();
        let all = self.lanes();
        let mut worth: Vec<_> =
            all.values().map(|lane| Worth { set: Arc::clone(&lane.set), releases: lane.demand(now) }).collect();
        drop(all);
        worth.sort_by(|one, other| other.releases.total_cmp(&one.releases));
        worth.truncate(most);
        worth
    }

    fn lanes(&self) -> std::sync::RwLockReadGuard<'_, HashMap<[u8; 32], Arc<Lane>>> {
        self.lanes.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn basis(&self) -> MutexGuard<'_, Option<Basis>> {
        self.basis.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
