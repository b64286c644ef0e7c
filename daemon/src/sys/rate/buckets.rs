//! Token buckets: a plain value that is handed `now`.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// A token bucket for each key.
///
/// A bucket is stored as the time at which it will be full again. Taking a token moves this time by the interval in
/// which a token comes back. A full bucket is the same as a new one, so it is dropped.
///
/// A bucket may go into debt: work that was already done is charged even if the bucket has too few tokens. No token can
/// be taken until the debt is paid back. The maximum debt is a full bucket, or [`LEAST_CREDIT`] if that is more.
///
/// The number of buckets is bounded, whatever keys arrive. If it would be exceeded, the fullest buckets are dropped:
/// their owners may get an additional burst, but none is refused because of it.
#[derive(Debug)]
pub(super) struct Buckets<K> {
    /// Time in which one token comes back.
    interval: Duration,
    /// Time in which an empty bucket becomes full.
    capacity: Duration,
    most: usize,
    full_at: HashMap<K, Instant>,
    /// Time at which full buckets were last dropped.
    swept: Option<Instant>,
}

/// Minimum of the maximum debt, in tokens: the possible cost of all releases that run at the same time on a small
/// cluster.
const LEAST_CREDIT: u32 = 256;

/// Minimum time between two passes over all buckets.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

impl<K: Clone + Eq + Hash> Buckets<K> {
    /// At most `most` buckets of `burst` tokens; `rate` tokens per second come back. All numbers are at least 1.
    pub(super) fn new(rate: u32, burst: u32, most: usize) -> Self {
        let interval = Duration::from_secs(1) / rate.max(1);
        let (capacity, most) = (interval * burst.max(1), most.max(1));
        Self { interval, capacity, most, full_at: HashMap::new(), swept: None }
    }

    /// Takes one token of `key`'s bucket.
    ///
    /// # Errors
    /// The bucket is empty; the value is the time until a token is available.
    pub(super) fn take(&mut self, key: &K, now: Instant) -> Result<(), Duration> {
        let full_at = self.with_one_less(key, now)?;
        self.set(key, full_at, now);
        Ok(())
    }

    /// The time at which `key`'s bucket would be full again if one token were taken now.
    ///
    /// # Errors
    /// See [`Buckets::take`].
    pub(super) fn with_one_less(&self, key: &K, now: Instant) -> Result<Instant, Duration> {
        let full_at = self.full_at(key, now) + self.interval;
        let missing = full_at.saturating_duration_since(now + self.capacity);
        if missing.is_zero() { Ok(full_at) } else { Err(missing) }
    }

    /// Takes tokens from `key`'s bucket, which may go into debt.
    pub(super) fn debit(&mut self, key: &K, tokens: u32, now: Instant) {
        let full_at = self.full_at(key, now) + self.interval.saturating_mul(tokens);
        let credit = self.capacity.max(self.interval.saturating_mul(LEAST_CREDIT));
        self.set(key, full_at.min(now + self.capacity + credit), now);
    }

    /// Gives tokens back to `key`'s bucket.
    pub(super) fn give_back(&mut self, key: &K, tokens: u32, now: Instant) {
        if let Some(full_at) = self.full_at.get_mut(key) {
            *full_at = full_at.checked_sub(self.interval.saturating_mul(tokens)).unwrap_or(now);
        }
    }

    /// Number of tokens that `key`'s bucket lacks, including debt.
    pub(super) fn missing(&self, key: &K, now: Instant) -> u32 {
        let missing = self.full_at(key, now) - now;
        u32::try_from(missing.as_nanos().div_ceil(self.interval.as_nanos())).unwrap_or(u32::MAX)
    }

    fn full_at(&self, key: &K, now: Instant) -> Instant {
        self.full_at.get(key).map_or(now, |at| now.max(*at))
    }

    fn set(&mut self, key: &K, full_at: Instant, now: Instant) {
        self.sweep(now);
        if let Some(known) = self.full_at.get_mut(key) {
            *known = full_at;
            return;
        }
        if self.full_at.len() >= self.most {
            self.make_room(now);
        }
        self.full_at.insert(key.clone(), full_at);
    }

    /// Drops full buckets. Runs at most once in the time in which a bucket fills, so its cost per call is negligible.
    fn sweep(&mut self, now: Instant) {
        let swept = *self.swept.get_or_insert(now);
        if now.saturating_duration_since(swept) >= self.capacity.max(SWEEP_EVERY) {
            self.full_at.retain(|_, full_at| *full_at > now);
            self.swept = Some(now);
        }
    }

    /// Drops at least half of the buckets, the fullest ones. Runs rarely, so its cost per call is negligible.
    fn make_room(&mut self, now: Instant) {
        self.full_at.retain(|_, full_at| *full_at > now);
        if self.full_at.len() <= self.most / 2 {
            return;
        }
        let mut times: Vec<_> = self.full_at.values().copied().collect();
        let middle = times.len() / 2;
        let (_, median, _) = times.select_nth_unstable(middle);
        let median = *median;
        self.full_at.retain(|_, full_at| *full_at > median);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn buckets(rate: u32, burst: u32) -> Buckets<&'static str> {
        Buckets::new(rate, burst, 1000)
    }

    #[test]
    fn a_burst_then_the_rate_and_each_host_for_itself() {
        let mut buckets = buckets(10, 5);
        let begun = Instant::now();
        for _ in 0..5 {
            buckets.take(&"a", begun).unwrap();
        }
        assert_eq!(buckets.take(&"a", begun), Err(SECOND / 10));
        buckets.take(&"b", begun).unwrap();
        // Neither a look nor a refusal takes a token.
        assert_eq!(buckets.with_one_less(&"a", begun), Err(SECOND / 10));
        assert_eq!(buckets.take(&"a", begun + SECOND / 20), Err(SECOND / 20));
        buckets.take(&"a", begun + SECOND / 10).unwrap();
        assert_eq!(buckets.take(&"a", begun + SECOND / 10), Err(SECOND / 10));
        // The bucket fills up to the burst and no further.
        let later = begun + 60 * SECOND;
        for _ in 0..5 {
            buckets.take(&"a", later).unwrap();
        }
        assert!(buckets.take(&"a", later).is_err());
    }

    #[test]
    fn a_bucket_owes_what_was_spent_and_no_more_than_it_holds() {
        let mut buckets = buckets(10, 5);
        let begun = Instant::now();
        buckets.debit(&"a", 7, begun);
        // Two tokens are owed, and one must be available.
        assert_eq!(buckets.take(&"a", begun), Err(3 * SECOND / 10));
        buckets.take(&"a", begun + 3 * SECOND / 10).unwrap();
        buckets.debit(&"a", u32::MAX, begun + SECOND);
        assert_eq!(buckets.take(&"a", begun + SECOND), Err(SECOND / 10 * (LEAST_CREDIT + 1)), "it owes without an end");
        buckets.take(&"b", begun + SECOND).unwrap();
        // A large bucket may owe as much as it holds.
        let mut large = Buckets::new(10, 1000, 1000);
        large.debit(&"a", u32::MAX, begun);
        assert_eq!(large.take(&"a", begun), Err(SECOND / 10 * 1001));
    }

    #[test]
    fn what_is_given_back_can_be_taken_again_and_nothing_beyond() {
        let mut buckets = buckets(10, 2);
        let begun = Instant::now();
        for _ in 0..100 {
            buckets.take(&"a", begun).unwrap();
            buckets.give_back(&"a", 1, begun);
            buckets.give_back(&"never asked", 1, begun);
        }
        buckets.take(&"a", begun).unwrap();
        buckets.take(&"a", begun).unwrap();
        assert!(buckets.take(&"a", begun).is_err());
        // The burst is the maximum, however many tokens are given back.
        for _ in 0..10 {
            buckets.give_back(&"a", 1, begun);
        }
        let granted = (0..10).filter(|_| buckets.take(&"a", begun).is_ok()).count();
        assert_eq!(granted, 2);
    }

    #[test]
    fn full_buckets_are_forgotten() {
        let mut buckets = Buckets::new(10, 5, 10_000);
        let begun = Instant::now();
        for host in 0..1000 {
            buckets.take(&host, begun).unwrap();
        }
        assert_eq!(buckets.full_at.len(), 1000);
        for _ in 0..5 {
            buckets.take(&5000, begun + SECOND * 9 / 10).unwrap();
        }
        buckets.take(&6000, begun + SECOND).unwrap();
        assert_eq!(buckets.full_at.len(), 2);
        assert!(buckets.full_at.contains_key(&5000));
    }

    #[test]
    fn the_number_of_buckets_is_bounded_and_the_emptiest_are_kept() {
        const MOST: usize = 64;
        let mut buckets = Buckets::new(1, 10, MOST);
        let begun = Instant::now();
        for _ in 0..10 {
            buckets.take(&u32::MAX, begun).unwrap();
        }
        for host in 0..10_000 {
            buckets.take(&host, begun).expect("a newcomer pays for the others");
            assert!(buckets.full_at.len() <= MOST);
        }
        assert!(buckets.take(&u32::MAX, begun).is_err(), "the emptiest bucket was forgotten");
    }

    proptest! {
        #[test]
        fn never_more_than_the_burst_and_the_rate(
            rate in 1..1000_u32,
            burst in 1..100_u32,
            steps in proptest::collection::vec((0..50_u64, 0..4_u32), 1..400),
        ) {
            let mut buckets = buckets(rate, burst);
            let begun = Instant::now();
            let (mut now, mut taken) = (begun, 0_u32);
            for (millis, charged) in steps {
                now += Duration::from_millis(millis);
                if let Err(wait) = buckets.take(&"a", now) {
                    prop_assert!(wait <= Duration::from_secs(1) / rate * (burst + 1));
                    now += wait;
                    prop_assert_eq!(buckets.take(&"a", now), Ok(()));
                }
                taken += 1;
                let most = f64::from(burst) + (now - begun).as_secs_f64() * f64::from(rate) * 1.001;
                prop_assert!(f64::from(taken) <= most + 1e-6, "{} taken, {} allowed", taken, most);
                // Charges count fully as long as the debt is at most a full bucket.
                if charged <= burst {
                    buckets.debit(&"a", charged, now);
                    taken += charged;
                }
            }
        }
    }
}
