//! How fast one host may ask: a token bucket for each, a plain value that is handed `now`.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// A token bucket for each host.
///
/// A bucket is written as the time at which it will be full again, which a token taken puts off by the time that one
/// takes to come back. A bucket that is full is no different from one that was never there, and is forgotten.
#[derive(Debug)]
pub(super) struct Buckets {
    /// In which time one token comes back.
    interval: Duration,
    /// In which time an empty bucket is full again.
    capacity: Duration,
    full_at: HashMap<String, Instant>,
    /// When full buckets were last forgotten.
    swept: Option<Instant>,
}

/// Shortest time between two looks at all buckets.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

impl Buckets {
    /// Buckets of `burst` tokens, of which `rate` come back each second. Both are at least 1.
    pub(super) fn new(rate: u32, burst: u32) -> Self {
        let interval = Duration::from_secs(1) / rate.max(1);
        Self { interval, capacity: interval * burst.max(1), full_at: HashMap::new(), swept: None }
    }

    /// Takes one token of `host`'s bucket.
    ///
    /// # Errors
    /// The bucket is empty: the time until there is one in it.
    pub(super) fn take(&mut self, host: &str, now: Instant) -> Result<(), Duration> {
        self.sweep(now);
        let full_at = self.with_one_less(host, now)?;
        match self.full_at.get_mut(host) {
            Some(known) => *known = full_at,
            None => {
                self.full_at.insert(host.to_owned(), full_at);
            }
        }
        Ok(())
    }

    /// When `host`'s bucket would be full again if one token were taken now.
    ///
    /// # Errors
    /// See [`Buckets::take`].
    pub(super) fn with_one_less(&self, host: &str, now: Instant) -> Result<Instant, Duration> {
        let full_at = self.full_at.get(host).map_or(now, |at| now.max(*at)) + self.interval;
        let missing = full_at.saturating_duration_since(now + self.capacity);
        if missing.is_zero() { Ok(full_at) } else { Err(missing) }
    }

    /// Forgets what is full. Not more often than a bucket takes to fill, so that it costs each call next to nothing.
    fn sweep(&mut self, now: Instant) {
        let swept = *self.swept.get_or_insert(now);
        if now.saturating_duration_since(swept) >= self.capacity.max(SWEEP_EVERY) {
            self.full_at.retain(|_, full_at| *full_at > now);
            self.swept = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_burst_then_the_rate_and_each_host_for_itself() {
        let mut buckets = Buckets::new(10, 5);
        let begun = Instant::now();
        for _ in 0..5 {
            buckets.take("a", begun).unwrap();
        }
        assert_eq!(buckets.take("a", begun), Err(SECOND / 10));
        buckets.take("b", begun).unwrap();
        // Who only asks takes nothing, and neither
        assert_eq!(buckets.with_one_less("a", begun), Err(SECOND / 10));
        // what is refused takes nothing.
        assert_eq!(buckets.take("a", begun + SECOND / 20), Err(SECOND / 20));
        buckets.take("a", begun + SECOND / 10).unwrap();
        assert_eq!(buckets.take("a", begun + SECOND / 10), Err(SECOND / 10));
        // It fills up to the burst and no further.
        let later = begun + 60 * SECOND;
        for _ in 0..5 {
            buckets.take("a", later).unwrap();
        }
        assert!(buckets.take("a", later).is_err());
    }

    #[test]
    fn full_buckets_are_forgotten() {
        let mut buckets = Buckets::new(10, 5);
        let begun = Instant::now();
        for host in 0..1000 {
            buckets.take(&host.to_string(), begun).unwrap();
        }
        assert_eq!(buckets.full_at.len(), 1000);
        for _ in 0..5 {
            buckets.take("busy", begun + SECOND * 9 / 10).unwrap();
        }
        buckets.take("late", begun + SECOND).unwrap();
        assert_eq!(buckets.full_at.len(), 2);
        assert!(buckets.full_at.contains_key("busy"));
    }

    proptest! {
        #[test]
        fn never_more_than_the_burst_and_the_rate(
            rate in 1..1000_u32,
            burst in 1..100_u32,
            steps in proptest::collection::vec(0..50_u64, 1..400),
        ) {
            let mut buckets = Buckets::new(rate, burst);
            let begun = Instant::now();
            let (mut now, mut taken) = (begun, 0_u32);
            for millis in steps {
                now += Duration::from_millis(millis);
                if let Err(wait) = buckets.take("a", now) {
                    prop_assert!(wait <= Duration::from_secs(1) / rate);
                    now += wait;
                    prop_assert_eq!(buckets.take("a", now), Ok(()));
                }
                taken += 1;
                let most = f64::from(burst) + (now - begun).as_secs_f64() * f64::from(rate) * 1.001;
                prop_assert!(f64::from(taken) <= most + 1e-6, "{} taken, {} allowed", taken, most);
            }
        }
    }
}
