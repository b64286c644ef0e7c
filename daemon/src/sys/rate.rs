//! A rate limit for each key, shared by all requests. It may also be unlimited.

mod buckets;

use std::hash::Hash;
use std::sync::Mutex;
use std::time::Duration;

use claviger_hsm::standstill;
use claviger_process::lock::{lock, unpoisoned};

use self::buckets::Buckets;

/// Most buckets that are kept, of about 100 bytes each.
const MOST_BUCKETS: usize = 65_536;

/// A rate limit with the buckets of all keys.
#[derive(Debug)]
pub(crate) struct Rate<K> {
    settings: (u32, u32),
    /// `None`: unlimited.
    buckets: Option<Mutex<Buckets<K>>>,
}

impl<K: Clone + Eq + Hash> Rate<K> {
    /// `rate` tokens per second on average, `burst` at once; a rate of 0 is unlimited.
    pub(crate) fn new(rate: u32, burst: u32) -> Self {
        let buckets = (rate > 0).then(|| Mutex::new(Buckets::new(rate, burst, MOST_BUCKETS)));
        Self { settings: (rate, burst), buckets }
    }

    /// Keeps the buckets of `before` if its settings are the same; otherwise all buckets start full.
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
    /// There is no token; the value is the time until there is one.
    pub(crate) fn take(&self, key: &K) -> Result<(), Duration> {
        self.buckets.as_ref().map_or(Ok(()), |buckets| lock(buckets).take(key, standstill::now()))
    }

    /// Whether a token is available.
    ///
    /// # Errors
    /// As [`Rate::take`].
    pub(crate) fn look(&self, key: &K) -> Result<(), Duration> {
        let look = |buckets: &Mutex<Buckets<K>>| lock(buckets).with_one_less(key, standstill::now()).map(drop);
        self.buckets.as_ref().map_or(Ok(()), look)
    }

    /// Takes tokens for work that was already done; the bucket may go into debt.
    pub(crate) fn debit(&self, key: &K, tokens: u32) {
        if let Some(buckets) = self.buckets.as_ref().filter(|_| tokens > 0) {
            lock(buckets).debit(key, tokens, standstill::now());
        }
    }

    /// Number of tokens that the bucket lacks, including debt.
    pub(crate) fn missing(&self, key: &K) -> u32 {
        self.buckets.as_ref().map_or(0, |buckets| lock(buckets).missing(key, standstill::now()))
    }

    pub(crate) fn give_back(&self, key: &K, tokens: u32) {
        if let Some(buckets) = &self.buckets {
            lock(buckets).give_back(key, tokens, standstill::now());
        }
    }
}
