//! Decides when the stock may be filled: in the gaps between releases, if the releases leave any.
//!
//! Making an item uses a session and a processor that a release may need meanwhile. So after each release, no item is
//! made for a time called the rest. The busier the service was lately, the longer the rest:
//!
//! ```text
//! release │ rest │ 1 item at a time │ 2 at a time │ … │ half of the idle sessions        until the next release
//! ```
//!
//! If a caller sends its next request as soon as it gets an answer, no gap is as long as the rest, and no items are
//! made. If releases take a tenth of the time, the rest is as long as the making of one item, and most of each gap is
//! used. A service with so many sessions that a release is always running has no gaps. There, items are made in
//! sessions that the releases do not need.
//!
//! This is a plain value; its methods get `now` as an argument.

use std::time::{Duration, Instant};

/// After this time, an observation has half of its weight in the share of busy time.
const HALF_LIFE: Duration = Duration::from_secs(2);
/// Assumed time for making an item, until the first one was made.
const FIRST_GUESS: Duration = Duration::from_millis(5);
/// Weight of the latest item in the estimate of the time for making one.
const WEIGHT: f64 = 0.125;
/// The length of the rest, in items, if releases took half of the time lately. The rest grows with the ratio of busy
/// time to idle time.
const ITEMS_AT_HALF: f64 = 4.0;
/// The longest rest, in items.
const MOST_ITEMS: f64 = 400.0;
/// Number of idle sessions that stay idle while a release runs, in addition to one for each release. A quarter of the
/// others make items.
const RESERVED: usize = 8;
const SHARE: usize = 4;

/// The running releases, and the share of the time in which at least one ran.
#[derive(Debug)]
pub(super) struct Gaps {
    running: usize,
    /// Share of the time in which a release ran, calculated at `at`.
    busy: f64,
    at: Instant,
    /// The time since which no release has run. It is only valid while none runs.
    quiet_since: Instant,
    /// Time for making an item, from its order until it is in the stock.
    item: Duration,
}

/// The number of items that may be made at the same time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Allowed {
    /// This number, at least one.
    Items(usize),
    /// No item may be made for this time, if no release begins in it.
    NoneFor(Duration),
}

impl Gaps {
    pub(super) fn new(now: Instant) -> Self {
        Self { running: 0, busy: 0.0, at: now, quiet_since: now, item: FIRST_GUESS }
    }

    /// A release begins.
    pub(super) fn begins(&mut self, now: Instant) {
        self.advance(now);
        self.running += 1;
    }

    /// A release ends, successfully or not.
    pub(super) fn ends(&mut self, now: Instant) {
        self.advance(now);
        self.running = self.running.saturating_sub(1);
        self.quiet_since = now;
    }

    /// An item was made in this time.
    pub(super) fn made(&mut self, took: Duration) {
        self.item = self.item.mul_f64(1.0 - WEIGHT) + took.mul_f64(WEIGHT);
    }

    /// The number of items that may be made at the same time. `sessions` is the number of sessions that are idle or
    /// make an item.
    pub(super) fn allowed(&mut self, now: Instant, sessions: usize) -> Allowed {
        self.advance(now);
        let rest = self.rest();
        let items = if self.running > 0 {
            sessions.saturating_sub(RESERVED + self.running) / SHARE
        } else {
            let quiet = now.saturating_duration_since(self.quiet_since);
            if quiet < rest {
                return Allowed::NoneFor(rest - quiet);
            }
            let rests = quiet.as_nanos() / rest.as_nanos().max(1);
            usize::try_from(rests).unwrap_or(usize::MAX).min(sessions.div_ceil(2))
        };
        if items == 0 { Allowed::NoneFor(rest) } else { Allowed::Items(items) }
    }

    /// The length of the rest: the time after a release in which no item is made.
    fn rest(&self) -> Duration {
        let busy_for_idle = self.busy / (1.0 - self.busy).max(f64::EPSILON);
        self.item.mul_f64((ITEMS_AT_HALF * busy_for_idle).clamp(1.0, MOST_ITEMS))
    }

    fn advance(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at);
        let kept = (-passed.as_secs_f64() / HALF_LIFE.as_secs_f64()).exp2();
        let seen = if self.running > 0 { 1.0 } else { 0.0 };
        self.busy = seen + (self.busy - seen) * kept;
        self.at = self.at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ITEM: Duration = FIRST_GUESS;
    const SESSIONS: usize = 4;

    /// Simulates a caller for a minute. Its releases take `runs`, with `pauses` between them. Items are made whenever
    /// that is allowed, and each takes [`ITEM`]. Returns the number of items per release, counted from the time when
    /// the share of busy time is known.
    fn items_for_a_release(runs: Duration, pauses: Duration) -> f64 {
        let begun = Instant::now();
        let (mut now, mut gaps) = (begun, Gaps::new(begun));
        let (mut releases, mut items) = (0, 0);
        while now < begun + Duration::from_secs(60) {
            if now < begun + Duration::from_secs(20) {
                (releases, items) = (0, 0);
            }
            gaps.begins(now);
            now += runs;
            gaps.ends(now);
            releases += 1;
            let next = now + pauses;
            while now < next {
                match gaps.allowed(now, SESSIONS) {
                    Allowed::Items(allowed) => {
                        items += allowed;
                        now += ITEM;
                    }
                    Allowed::NoneFor(time) => now += time,
                }
            }
            now = next;
        }
        f64::from(u32::try_from(items).unwrap_or(u32::MAX)) / f64::from(releases)
    }

    #[test]
    fn beside_a_caller_that_asks_again_at_once_nothing_is_made() {
        for runs in [1, 2, 5, 50] {
            let runs = Duration::from_millis(runs);
            for part in [2, 5, 20] {
                let items = items_for_a_release(runs, runs / part);
                assert!(items == 0.0, "{runs:?}, pauses of 1/{part}: {items}");
            }
        }
    }

    #[test]
    fn at_a_tenth_of_the_time_each_release_has_its_item_made_in_the_gap_after_it() {
        for runs in [2, 5, 50] {
            let runs = Duration::from_millis(runs);
            let items = items_for_a_release(runs, runs * 9);
            assert!(items >= 1.0, "{runs:?}: {items}");
        }
    }

    #[test]
    fn after_the_load_the_stock_is_filled_within_moments_and_more_and_more_at_a_time() {
        let begun = Instant::now();
        let mut gaps = Gaps::new(begun);
        gaps.begins(begun);
        let mut now = begun + Duration::from_secs(600);
        gaps.ends(now);
        let ended = now;
        let mut allowed = Vec::new();
        while now < ended + Duration::from_secs(30) {
            match gaps.allowed(now, 16) {
                Allowed::Items(items) => {
                    allowed.push(items);
                    now += ITEM;
                }
                // The simulation looks more often, because the rest becomes shorter meanwhile.
                Allowed::NoneFor(time) => now += time.min(Duration::from_millis(50)),
            }
        }
        assert!(now - ended < Duration::from_secs(31) && allowed[0] == 1, "{:?}", &allowed[..3]);
        assert!(allowed.is_sorted() && allowed.contains(&2) && allowed.last() == Some(&8), "half of the sessions");
        let first = ITEM * u32::try_from(allowed.len()).unwrap_or(u32::MAX);
        assert!(first > Duration::from_secs(25), "the first is made within five seconds: {first:?}");
    }

    #[test]
    fn while_releases_run_only_sessions_that_they_do_not_need_are_used() {
        let now = Instant::now();
        let mut gaps = Gaps::new(now);
        for _ in 0..8 {
            gaps.begins(now);
        }
        let mut allowed = |sessions| match gaps.allowed(now, sessions) {
            Allowed::Items(items) => items,
            Allowed::NoneFor(_) => 0,
        };
        assert_eq!([0, 4, 16, 19, 20, 56].map(&mut allowed), [0, 0, 0, 0, 1, 10]);
    }

    #[test]
    fn the_rest_follows_the_time_that_an_item_takes() {
        let now = Instant::now();
        let mut gaps = Gaps::new(now);
        assert_eq!(gaps.allowed(now, SESSIONS), Allowed::NoneFor(ITEM));
        for _ in 0..100 {
            gaps.made(Duration::from_millis(40));
        }
        let Allowed::NoneFor(rest) = gaps.allowed(now, SESSIONS) else { panic!("no rest") };
        assert!((38..=40).contains(&rest.as_millis()), "{rest:?}");
        // No session is idle.
        assert!(matches!(gaps.allowed(now + rest * 9, 0), Allowed::NoneFor(_)));
        assert_eq!(gaps.allowed(now + rest, 1), Allowed::Items(1));
    }
}
