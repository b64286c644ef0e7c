//! A rate that holds for each caller, shared by all requests; it may be no limit at all.

mod buckets;

use std::hash::Hash;
use std::sync::Mutex;
use std::time::Duration;

use claviger_hsm::standstill;
use claviger_process::lock::{lock, unpoisoned};

use self::buckets::Buckets;

/// Most callers whose buckets are kept; some 100 bytes each.
const MOST_BUCKETS: usize = 65_536;

/// A rate and a burst, and the callers' buckets.
#[derive(Debug)]
pub(crate) struct Rate<K> {
    settings: (u32, u32),
    /// `None` without a limit.
    buckets: Option<Mutex<Buckets<K>>>,
}

impl<K: Clone + Eq + Hash> Rate<K> {
    /// `rate` a second in the long run and `burst` at once; a rate of 0 is no limit.
    pub(crate) fn new(rate: u32, burst: u32) -> Self {
        let buckets = (rate > 0).then(|| Mutex::new(Buckets::new(rate, burst, MOST_BUCKETS)));
        Self { settings: (rate, burst), buckets }
    }

    /// Takes over what callers have used of `before`, where that has the same settings; else all start with a full burst.
    pub(crate) fn inherit(&mut self, before: &Self) {
        if self.settings == before.settings
            && let (Some(old), Some(new)) = (&before.buckets, &mut self.buckets)
        {
            std::mem::swap(&mut *lock(old), unpoisoned(new.get_mut()));
        }
    }

    /// Takes one token.
    ///
    /// # Errors
    /// There is none: the time until there is.
    pub(crate) fn take(&self, key: &K) -> Result<(), Duration> {
        self.buckets.as_ref().map_or(Ok(()), |buckets| lock(buckets).take(key, standstill::now()))
    }

    /// Whether a token could be taken.
    ///
    /// # Errors
    /// As [`Rate::take`].
    pub(crate) fn look(&self, key: &K) -> Result<(), Duration> {
        let look = |buckets: &Mutex<Buckets<K>>| lock(buckets).with_one_less(key, standstill::now()).map(drop);
        self.buckets.as_ref().map_or(Ok(()), look)
    }

    /// Charges what has been spent already; the bucket may owe.
    pub(crate) fn debit(&self, key: &K, tokens: u32) {
        if let Some(buckets) = self.buckets.as_ref().filter(|_| tokens > 0) {
            lock(buckets).debit(key, tokens, standstill::now());
        }
    }

    /// How many tokens the bucket lacks, those that it owes included.
    pub(crate) fn missing(&self, key: &K) -> u32 {
        self.buckets.as_ref().map_or(0, |buckets| lock(buckets).missing(key, standstill::now()))
    }

    /// Gives tokens back.
    pub(crate) fn give_back(&self, key: &K, tokens: u32) {
        if let Some(buckets) = &self.buckets {
            lock(buckets).give_back(key, tokens, standstill::now());
        }
    }
}
