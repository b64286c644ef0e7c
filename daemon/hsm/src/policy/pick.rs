//! Picks the member for the next call. Plain values that are handed `now`: no clock, no threads, no randomness of their
//! own.

use std::time::{Duration, Instant};

/// Time constant with which an estimate follows calls that got faster, under light load. With two seconds, a few fast
/// results do not hide a slow one, and a recovered member has its share back within seconds.
const TAU: Duration = Duration::from_secs(2);
/// A result counts at least one part in this number, however soon it follows another one. Under load, when a member's
/// capacity is needed most, dozens of good results then outweigh one bad result within milliseconds. With [`TAU`] alone,
/// the member would stay idle for seconds while the others' queues fill. In simulation with two members at 7/8 of their
/// capacity, one failure in 1,000 at one of them raised the mean time of all operations from 1 to 235 ms.
const RESULTS: f64 = 16.0;
/// Time without a result after which an estimate fades by itself, also with [`TAU`]. A member in use has results more
/// often; a member that is avoided for its past must be tried again at some time.
const GRACE: Duration = Duration::from_secs(1);
/// Lower limit of estimates. It is below the time of any private-key operation, so that it never hides which member is
/// faster, and above zero, so that operations in flight always have a cost.
const FLOOR: Duration = Duration::from_micros(10);
/// Upper limit of estimates, so that invalid input does not overflow.
const CEILING: Duration = Duration::from_secs(3600);
/// Time that a failed call counts as. It is far above the time of a call: a member that fails at once must not look fast,
/// or it attracts all the traffic.
pub const FAILURE_COUNTS_AS: Duration = Duration::from_secs(1);

/// Estimated time of an operation at a member: a moving estimate that jumps to peaks and comes down slowly (peak-EWMA),
/// because slow calls do the harm; plus [`FAILURE_COUNTS_AS`] × the share of calls that fail.
#[derive(Clone, Debug)]
pub struct Latency {
    seconds: f64,
    /// Share of failures, from 0 to 1, with the most weight on the latest calls.
    failing: f64,
    /// Time of the latest result. `None` while the estimate is a guess.
    at: Option<Instant>,
}

impl Latency {
    /// Starts with a guess, used until the first result. A guess does not fade, so it should be low, or the member is not
    /// tried while others serve. For a member that comes back, the time of its probe is a good guess; older estimates are
    /// useless then.
    #[must_use]
    pub fn new(initial: Duration) -> Self {
        Latency { seconds: bounded(initial), failing: 0.0, at: None }
    }

    /// Records the time of an operation from submission to answer, including the wait for a session. The wait is the first
    /// sign that a member has few sessions for its weight or that its token is busy with other work. In simulation,
    /// estimates without it made the mean time 1.5 to 5 times as long where members differed in sessions or one was slow
    /// now and then.
    ///
    /// A peak counts at once. A lower result pulls the estimate down, more strongly the longer ago the last result is.
    pub fn observe(&mut self, sample: Duration, now: Instant) {
        let sample = bounded(sample);
        let (seconds, failing) = self.parts(now);
        let keep = fade(self.since(now)).min(1.0 - 1.0 / RESULTS);
        self.failing = failing * keep;
        self.seconds = match self.at {
            Some(_) if sample < seconds => sample + (seconds - sample) * keep,
            _ => sample,
        };
        self.at = self.at.max(Some(now));
    }

    /// Records a call that failed through the member's fault after `elapsed`. A fast failure gains nothing; a slow one
    /// counts.
    ///
    /// The first failure counts one sixteenth of [`FAILURE_COUNTS_AS`], enough to avoid the member while others are idle.
    /// If all calls fail, it counts in full.
    pub fn observe_failure(&mut self, elapsed: Duration, now: Instant) {
        let (seconds, failing) = self.parts(now);
        self.seconds = seconds.max(bounded(elapsed));
        self.failing = failing + (1.0 - failing) / RESULTS;
        self.at = self.at.max(Some(now));
    }

    /// Returns the estimate. It fades when there was no result for over a second.
    #[must_use]
    pub fn estimate(&self, now: Instant) -> Duration {
        let (seconds, failing) = self.parts(now);
        Duration::from_secs_f64(seconds) + FAILURE_COUNTS_AS.mul_f64(failing)
    }

    /// Returns the seconds and the share of failures at `now`.
    fn parts(&self, now: Instant) -> (f64, f64) {
        let left = fade(self.since(now).saturating_sub(GRACE));
        ((self.seconds * left).max(FLOOR.as_secs_f64()), self.failing * left)
    }

    /// Returns the time since the last result. Callers on several threads may be slightly out of order; then no time has
    /// passed.
    fn since(&self, now: Instant) -> Duration {
        self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at))
    }
}

fn bounded(sample: Duration) -> f64 {
    sample.clamp(FLOOR, CEILING).as_secs_f64()
}

/// Returns the part of a difference that remains after `elapsed`.
fn fade(elapsed: Duration) -> f64 {
    (-elapsed.as_secs_f64() / TAU.as_secs_f64()).exp()
}

/// Facts about a member that can take an operation now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Share of the load within a priority; 0 counts as 1. Where members differ in sessions, their numbers of sessions are
    /// good weights.
    pub weight: u32,
    /// Estimated time of an operation at the member: [`Latency::estimate`].
    pub latency: Duration,
    /// Age of the oldest running call, if any. It makes a member with a hanging call expensive at once, long before the
    /// call has a result. Leave out calls that may take minutes, such as key generation.
    pub oldest: Option<Duration>,
    /// Number of operations that wait or run at the member.
    pub in_flight: usize,
}

/// Returns the cost of one more operation at the member, in seconds: time of one operation × (operations in flight + 1) ÷
/// weight.
#[must_use]
pub fn cost(candidate: &Candidate) -> f64 {
    let time = candidate.oldest.unwrap_or_default().max(candidate.latency).as_secs_f64();
    time * (candidate.in_flight as f64 + 1.0) / f64::from(candidate.weight.max(1))
}

/// Members grouped by priority. Computed when members or priorities change, so that a pick does not need to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tiers {
    /// Members in order of priority, lowest number first.
    order: Vec<usize>,
    /// End of each tier in `order`.
    ends: Vec<usize>,
}

impl Tiers {
    /// Groups members 0, 1, 2, … by these priorities; the smallest serves first.
    #[must_use]
    pub fn new(priorities: &[u32]) -> Self {
        let mut order: Vec<usize> = (0..priorities.len()).collect();
        // A stable sort: members of equal priority stay in the order of the configuration.
        order.sort_by_key(|member| priorities[*member]);
        let ends = order
            .chunk_by(|one, next| priorities[*one] == priorities[*next])
            .scan(0, |end, tier| {
                *end += tier.len();
                Some(*end)
            })
            .collect();
        Tiers { order, ends }
    }

    /// Returns the number of members.
    #[must_use]
    pub fn members(&self) -> usize {
        self.order.len()
    }

    /// Returns the members of each tier, lowest priority number first.
    fn iter(&self) -> impl Iterator<Item = &[usize]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.order[start..*end])
    }
}

/// A picked member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Index of the member.
    pub member: usize,
    /// True if no other member could have been picked, of any priority.
    pub alone: bool,
}

/// Picks from the lowest priority that has a candidate: the cheaper of two candidates drawn at random. Returns `None` if
/// there is no candidate at all.
///
/// Two random candidates are nearly as good as the best of all, and callers with the same data do not all pick the same
/// member. If both can take the operation, exactly these two are examined; otherwise the rest of the tier, and the
/// following tiers up to the first candidate.
///
/// `candidate(member)` is `None` for a member that cannot take the operation or is to be avoided. `random(n)` returns a
/// uniformly distributed number below `n`.
pub fn pick(
    tiers: &Tiers,
    candidate: impl Fn(usize) -> Option<Candidate>,
    mut random: impl FnMut(usize) -> usize,
) -> Option<Choice> {
    if let Some(tier) = tiers.iter().next()
        && tier.len() > 1
    {
        let (first, second) = two_of(tier.len(), &mut random);
        let (first, second) = (tier[first], tier[second]);
        if let (Some(one), Some(other)) = (candidate(first), candidate(second)) {
            return Some(Choice { member: cheaper((first, one), (second, other)), alone: false });
        }
    }
    let mut rest = tiers.iter();
    let found = rest.by_ref().find_map(|tier| {
        let able: Vec<_> = tier.iter().filter_map(|member| Some((*member, candidate(*member)?))).collect();
        (!able.is_empty()).then_some(able)
    })?;
    if let [(member, _)] = found[..] {
        return Some(Choice { member, alone: !rest.flatten().any(|member| candidate(*member).is_some()) });
    }
    let (first, second) = two_of(found.len(), &mut random);
    Some(Choice { member: cheaper(found[first], found[second]), alone: false })
}

/// Returns two different numbers below `n`, which is at least 2. Every pair is equally likely in either order.
fn two_of(n: usize, random: &mut impl FnMut(usize) -> usize) -> (usize, usize) {
    let first = random(n) % n;
    // A different index: 1 to n - 1 steps further in the ring.
    (first, (first + 1 + random(n - 1) % (n - 1)) % n)
}

/// Returns the member that costs less; the first one if both cost the same.
fn cheaper((member, candidate): (usize, Candidate), (other_member, other): (usize, Candidate)) -> usize {
    if cost(&other) < cost(&candidate) { other_member } else { member }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::policy::simulation::Rng;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    const MS: Duration = Duration::from_millis(1);
    const SECOND: Duration = Duration::from_secs(1);

    fn idle() -> Candidate {
        Candidate { weight: 1, latency: MS, oldest: None, in_flight: 0 }
    }

    fn config(cases: u32) -> ProptestConfig {
        ProptestConfig { cases, rng_seed: RngSeed::Fixed(4), failure_persistence: None, ..ProptestConfig::default() }
    }

    // The estimate.

    #[test]
    fn a_peak_counts_at_once() {
        let now = Instant::now();
        let mut latency = Latency::new(5 * MS);
        assert_eq!(latency.estimate(now + 3600 * SECOND), 5 * MS, "a guess stays");
        latency.observe(MS, now);
        assert_eq!(latency.estimate(now), MS, "the first result replaces the guess");
        latency.observe(100 * MS, now);
        assert_eq!(latency.estimate(now), 100 * MS);
    }

    #[test]
    fn estimates_come_down_by_time_or_by_results() {
        let now = Instant::now();
        let mut latency = Latency::new(MS);
        latency.observe(101 * MS, now);
        let mut few = latency.clone();
        few.observe(MS, now + 2 * SECOND);
        let left = few.estimate(now + 2 * SECOND).as_secs_f64();
        // A second of grace, then a second of fading, then two since the result before.
        let expected = 0.001 + (0.101 * (-0.5_f64).exp() - 0.001) * (-1.0_f64).exp();
        assert!((left - expected).abs() < 1e-6, "{left}");
        (0..16).for_each(|_| latency.observe(MS, now));
        let left = latency.estimate(now).as_secs_f64();
        assert!((left - (0.001 + 0.1 * (15.0_f64 / 16.0).powi(16))).abs() < 1e-6, "{left}");
    }

    #[test]
    fn an_estimate_without_results_fades() {
        let now = Instant::now();
        let mut latency = Latency::new(MS);
        latency.observe(SECOND, now);
        assert_eq!(latency.estimate(now + SECOND), SECOND, "not at once");
        let later = latency.estimate(now + 3 * SECOND).as_secs_f64();
        assert!((later - (-1.0_f64).exp()).abs() < 1e-6, "{later}");
        assert!(latency.estimate(now + 15 * SECOND) < MS);
        assert_eq!(latency.estimate(now + 3600 * SECOND), FLOOR);
    }

    #[test]
    fn failures_are_slow() {
        let now = Instant::now();
        let mut latency = Latency::new(MS);
        latency.observe(MS, now);
        latency.observe_failure(Duration::ZERO, now);
        assert_eq!(latency.estimate(now), MS + SECOND / 16, "one of many");
        (0..200).for_each(|_| latency.observe_failure(Duration::ZERO, now));
        assert!(latency.estimate(now) > 999 * MS, "all of them");
        (0..100).for_each(|_| latency.observe(MS, now));
        assert!(latency.estimate(now) < 3 * MS, "no more");
        latency.observe_failure(7 * SECOND, now);
        assert!(latency.estimate(now) > 7 * SECOND, "it was slow, too");
        latency.observe(Duration::MAX, now);
        assert!(latency.estimate(now) < 2 * CEILING);
    }

    proptest! {
        #![proptest_config(config(256))]

        /// 256 runs of up to 1,000 results.
        #[test]
        fn estimates_stay_between_what_was_seen(
            steps in proptest::collection::vec((0..2_000_000_u64, 0..5_000_u32, any::<bool>(), any::<bool>()), 1..1_000),
        ) {
            let mut now = Instant::now();
            let mut latency = Latency::new(MS);
            for (index, (micros, millis, late, failed)) in steps.into_iter().enumerate() {
                let sample = Duration::from_micros(micros).max(FLOOR);
                // A late time, as from several threads.
                let at = if late { now.checked_sub(3 * MS).unwrap() } else { now };
                let before = latency.estimate(at);
                if failed { latency.observe_failure(sample, at) } else { latency.observe(sample, at) }
                let after = latency.estimate(at);
                // Tolerance for rounding.
                let slack = Duration::from_nanos(2);
                prop_assert!(after + slack >= sample, "peaks count at once");
                let most = match (failed, index) {
                    (true, _) => before.max(sample) + FAILURE_COUNTS_AS,
                    (false, 0) => sample,
                    (false, _) => before + sample,
                };
                prop_assert!(after <= most + slack);
                if failed {
                    prop_assert!(after + slack >= before.min(FAILURE_COUNTS_AS), "never better for a failure");
                } else if sample + FAILURE_COUNTS_AS < before && index > 0 {
                    prop_assert!(after <= before + slack, "never worse for a quick answer");
                }
                now += millis * MS;
                let idle = latency.estimate(now);
                prop_assert!(idle <= after + slack && idle >= FLOOR);
            }
        }
    }

    // The choice.

    #[test]
    fn tiers_hold_every_member_once_lowest_priority_first() {
        let tiers = Tiers::new(&[7, 0, 7, 3, 0]);
        assert_eq!(tiers.iter().collect::<Vec<_>>(), [&[1, 4][..], &[3], &[0, 2]]);
        assert_eq!(tiers.members(), 5);
        assert_eq!(Tiers::new(&[]).iter().count(), 0);
    }

    #[test]
    fn without_a_candidate_nothing_is_picked() {
        assert_eq!(pick(&Tiers::new(&[]), |_| Some(idle()), |_| 0), None);
        assert_eq!(pick(&Tiers::new(&[0, 0, 1]), |_| None, |_| 0), None);
    }

    #[test]
    fn the_cheaper_of_two_is_picked_whichever_is_drawn_first() {
        let all = [Candidate { in_flight: 9, ..idle() }, idle()];
        for first in 0..2 {
            let choice = pick(&Tiers::new(&[0, 0]), |member| Some(all[member]), |n| first % n);
            assert_eq!(choice, Some(Choice { member: 1, alone: false }));
        }
    }

    #[test]
    fn equals_share_evenly() {
        let mut rng = Rng(1);
        // Either all members are able, or one is not and is sometimes drawn in vain.
        for (able, expected) in [(5, 10_000), (4, 12_500_i32)] {
            let mut counts = [0; 5];
            for _ in 0..50_000 {
                let candidate = |member| (member < able).then(idle);
                counts[pick(&Tiers::new(&[0; 5]), candidate, |n| rng.below(n)).unwrap().member] += 1;
            }
            assert!(counts[..able].iter().all(|count| (count - expected).abs() < 500), "{counts:?}");
        }
    }

    #[test]
    fn while_members_are_well_two_are_looked_at() {
        let mut rng = Rng(2);
        let looked = std::cell::Cell::new(0);
        for _ in 0..1_000 {
            looked.set(0);
            let candidate = |_| {
                looked.set(looked.get() + 1);
                Some(idle())
            };
            pick(&Tiers::new(&[1, 0, 0, 0, 2, 0]), candidate, |n| rng.below(n)).unwrap();
            assert_eq!(looked.get(), 2);
        }
    }

    #[test]
    fn the_only_candidate_is_alone() {
        let choice = |able: &[usize], priorities: &[u32]| {
            pick(&Tiers::new(priorities), |member| able.contains(&member).then(idle), |_| 0).unwrap()
        };
        assert!(choice(&[0], &[0]).alone);
        assert!(choice(&[1], &[0, 0, 1]).alone);
        assert!(choice(&[2], &[0, 0, 1]).alone);
        assert!(!choice(&[0, 1], &[0, 0]).alone);
        assert!(!choice(&[0, 1], &[0, 1]).alone, "the other tier could take it");
    }

    #[test]
    fn cost_is_time_for_all_before_it() {
        let seconds = |candidate: Candidate| (cost(&candidate) * 1e6).round() / 1e6;
        assert_eq!(seconds(idle()), 0.001);
        assert_eq!(seconds(Candidate { in_flight: 9, ..idle() }), 0.01);
        assert_eq!(seconds(Candidate { in_flight: 9, weight: 5, ..idle() }), 0.002);
        assert_eq!(seconds(Candidate { weight: 0, ..idle() }), 0.001);
        assert_eq!(seconds(Candidate { oldest: Some(MS / 2), ..idle() }), 0.001);
        assert_eq!(seconds(Candidate { oldest: Some(SECOND), in_flight: 1, ..idle() }), 2.0, "it hangs");
    }

    proptest! {
        #![proptest_config(config(20_000))]

        /// 20,000 sets of up to twelve members, five picks each.
        #[test]
        fn picks_are_right_whatever_the_members(
            members in proptest::collection::vec(
                (0..3_u32, 0..4_u32, 0..3_u64, proptest::option::of(0..3_u64), 0..9_usize, any::<bool>()), 0..12,
            ),
            avoided: u16,
            seed: u64,
        ) {
            let priorities: Vec<_> = members.iter().map(|member| member.0).collect();
            let all: Vec<_> = members.iter().map(|&(_, weight, latency, oldest, in_flight, able)| able.then(|| Candidate {
                weight, in_flight,
                latency: Duration::from_millis(latency),
                oldest: oldest.map(Duration::from_millis),
            })).collect();
            let candidate = |index: usize| all[index].filter(|_| avoided >> index & 1 == 0);
            let may: Vec<_> = (0..all.len()).filter(|index| candidate(*index).is_some()).collect();
            let lowest = may.iter().map(|index| priorities[*index]).min();
            let tier: Vec<_> = may.iter().copied().filter(|index| Some(priorities[*index]) == lowest).collect();
            let cost = |index: usize| cost(&candidate(index).unwrap());
            let dearest = tier.iter().map(|index| cost(*index)).fold(0.0, f64::max);
            let tiers = Tiers::new(&priorities);
            let mut rng = Rng(seed);
            for _ in 0..5 {
                let picked = pick(&tiers, candidate, |n| { assert!(n > 0); rng.below(n) });
                prop_assert_eq!(picked.is_some(), !tier.is_empty());
                let Some(Choice { member, alone }) = picked else { continue };
                prop_assert!(tier.contains(&member), "{} of {:?}", member, tier);
                prop_assert_eq!(alone, may.len() == 1);
                // The most expensive member loses to any other.
                let alike = tier.iter().filter(|other| cost(**other) >= dearest).count();
                prop_assert!(cost(member) < dearest || alike > 1 || tier.len() == 1);
            }
        }
    }
}
