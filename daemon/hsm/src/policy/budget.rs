//! The budget limits how many operations are retried. A plain value that is handed `now`: no clock, no threads.
//!
//! A fixed number of retries for each request ("three attempts") multiplies the load just when everything fails. A budget
//! is a share of the traffic instead: while few operations fail, all of them are retried; when all fail, the load grows
//! only by that share.

use std::time::{Duration, Instant};

/// Time constant with which earned retries decay. It is long enough to carry the budget through a fault of a member, which
/// causes a burst, and short enough that retries earned in normal operation are gone before a later storm.
const MEMORY: Duration = Duration::from_secs(10);

/// Limits of retries.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Retries earned by each first attempt.
    pub share: f64,
    /// Retries available without any previous traffic, for the first burst after a quiet time.
    pub reserve: f64,
    /// Retries per second by which the reserve refills, so that operations are retried under light traffic too.
    pub reserve_per_second: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { share: 0.2, reserve: 100.0, reserve_per_second: 10.0 }
    }
}

/// Number of retries left.
///
/// In total it allows at most `reserve` + `reserve_per_second` × seconds + `share` × first attempts. At any moment at most
/// `reserve` plus the earnings of ten seconds are left: earnings decay with that time constant, and the reserve is capped.
/// Without these limits, a quiet hour or a busy hour without failures would save up retries for a storm, when the members
/// can bear them least.
#[derive(Clone, Debug)]
pub struct Budget {
    settings: Settings,
    reserve: f64,
    earned: f64,
    /// Time at which both values were computed. `None` before the first use.
    at: Option<Instant>,
}

impl Budget {
    /// Creates a budget with a full reserve. Negative settings and NaN count as zero.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let settings = Settings {
            share: settings.share.max(0.0),
            reserve: settings.reserve.max(0.0),
            reserve_per_second: settings.reserve_per_second.max(0.0),
        };
        Budget { settings, reserve: settings.reserve, earned: 0.0, at: None }
    }

    /// Records a first attempt.
    pub fn deposit(&mut self, now: Instant) {
        self.advance(now);
        self.earned += self.settings.share;
    }

    /// Pays for one more attempt and returns true, if there is budget. Decaying earnings are spent before the reserve.
    #[must_use]
    pub fn withdraw(&mut self, now: Instant) -> bool {
        self.advance(now);
        if self.reserve + self.earned < 1.0 {
            return false;
        }
        let earned = self.earned.min(1.0);
        self.earned -= earned;
        self.reserve = (self.reserve - (1.0 - earned)).max(0.0);
        true
    }

    /// Returns the number of retries that could be made now.
    #[must_use]
    pub fn left(&self, now: Instant) -> f64 {
        let (reserve, earned) = self.by(now);
        reserve + earned
    }

    fn advance(&mut self, now: Instant) {
        (self.reserve, self.earned) = self.by(now);
        self.at = self.at.max(Some(now));
    }

    /// Returns reserve and earnings at `now`. Callers on several threads may be slightly out of order; then no time has
    /// passed.
    fn by(&self, now: Instant) -> (f64, f64) {
        let seconds = self.at.map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        let reserve = (self.reserve + self.settings.reserve_per_second * seconds).min(self.settings.reserve);
        (reserve, self.earned * (-seconds / MEMORY.as_secs_f64()).exp())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    fn withdrawn(budget: &mut Budget, now: Instant) -> usize {
        (0..1_000_000).take_while(|_| budget.withdraw(now)).count()
    }

    #[test]
    fn rests_with_its_reserve() {
        let now = Instant::now();
        let mut budget = Budget::new(Settings::default());
        assert_eq!(budget.left(now), 100.0);
        assert_eq!(withdrawn(&mut budget, now), 100);
        assert_eq!(withdrawn(&mut budget, now + Duration::from_millis(99)), 0);
        assert_eq!(withdrawn(&mut budget, now + Duration::from_millis(101)), 1);
        assert_eq!(withdrawn(&mut budget, now + Duration::from_secs(3600)), 100, "not 36,000");
    }

    #[test]
    fn traffic_earns_its_share() {
        let now = Instant::now();
        let mut budget = Budget::new(Settings { reserve: 0.0, reserve_per_second: 0.0, share: 0.25 });
        assert!(!budget.withdraw(now));
        (0..400).for_each(|_| budget.deposit(now));
        assert_eq!(withdrawn(&mut budget, now), 100);
    }

    #[test]
    fn earnings_melt_and_are_bounded() {
        let mut now = Instant::now();
        let mut budget = Budget::new(Settings::default());
        // An hour at 1,000 operations per second without a fault.
        for _ in 0..360_000 {
            (0..10).for_each(|_| budget.deposit(now));
            now += Duration::from_millis(10);
        }
        let left = budget.left(now);
        assert!((2_090.0..2_110.0).contains(&left), "reserve + share × 10 s of traffic, not {left}");
        let later = budget.left(now + Duration::from_secs(60));
        assert!((100.0..106.0).contains(&later), "{later}");
    }

    #[test]
    fn when_everything_fails_load_grows_by_the_share() {
        let mut now = Instant::now();
        let mut budget = Budget::new(Settings::default());
        let mut retries = 0;
        for _ in 0..100_000 {
            budget.deposit(now);
            retries += usize::from(budget.withdraw(now));
            now += Duration::from_micros(100);
        }
        // 20,000 from the share, 100 from the reserve, 100 from ten seconds of refill.
        assert!((20_190..=20_200).contains(&retries), "{retries}");
    }

    #[test]
    fn nonsense_allows_nothing() {
        let now = Instant::now();
        let mut budget = Budget::new(Settings { share: f64::NAN, reserve: -1.0, reserve_per_second: -5.0 });
        budget.deposit(now);
        assert!(!budget.withdraw(now + Duration::from_secs(5)));
        assert_eq!(budget.left(now), 0.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 256, rng_seed: RngSeed::Fixed(2), failure_persistence: None, ..ProptestConfig::default()
        })]

        /// 256 runs of up to 2,000 steps.
        #[test]
        fn never_allows_more_than_it_promises(
            share in 0.0..1.0_f64, reserve in 0.0..200.0_f64, reserve_per_second in 0.0..50.0_f64,
            steps in proptest::collection::vec((0..4_u8, prop_oneof![9 => 0..5_u64, 1 => 0..3_000_u64]), 1..2_000),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut budget = Budget::new(Settings { share, reserve, reserve_per_second });
            let (mut deposits, mut withdrawals) = (0.0, 0.0);
            for (step, millis) in steps {
                let before = budget.left(now);
                match step {
                    // Times out of order, as from several threads.
                    0 => budget.deposit(now.checked_sub(Duration::from_millis(millis)).unwrap()),
                    1 => budget.deposit(now),
                    _ => {
                        let allowed = budget.withdraw(now);
                        prop_assert_eq!(allowed, before >= 1.0);
                        withdrawals += f64::from(u8::from(allowed));
                        prop_assert!((before - budget.left(now) - f64::from(u8::from(allowed))).abs() < 1e-9);
                    }
                }
                deposits += f64::from(u8::from(step < 2));
                now += Duration::from_millis(millis);
                let seconds = now.duration_since(start).as_secs_f64();
                prop_assert!(withdrawals <= reserve + reserve_per_second * seconds + share * deposits + 1e-6);
                prop_assert!((0.0..=reserve + share * deposits + 1e-6).contains(&budget.left(now)));
            }
        }
    }
}
