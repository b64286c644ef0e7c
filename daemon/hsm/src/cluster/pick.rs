//! Which member takes the next call. Plain values that are handed `now`: no clock, no threads, no randomness of their own.

use std::time::{Duration, Instant};

/// How fast an estimate follows calls that got faster, when there are few. Two seconds: a few quick answers do not make up for a slow
/// one, and a member that recovered has its share back within seconds.
const TAU: Duration = Duration::from_secs(2);
/// Of a result at least one part in so many counts, however soon it comes after another. Under load, when calls to a member that had one
/// bad moment are missed most, dozens of good ones outweigh it within milliseconds. By [`TAU`] alone it would be left idle for
/// seconds, and at over half of their capacity the others' queues fill up: in simulation one failure in 5,000 at one of two
/// members took the mean time of all from 1 to 240 ms.
const RESULTS: f64 = 16.0;
/// After how long without a result an estimate fades by itself, again with [`TAU`]. A member that gets calls at all is heard of more
/// often; one that is shunned for what it once was has to be tried again some time.
const GRACE: Duration = Duration::from_secs(1);
/// Estimates end here: faster than any private-key operation, so that this never blurs who is faster, and above zero, so that
/// work in flight always costs something.
const FLOOR: Duration = Duration::from_micros(10);
/// And here, so that nonsense in does not overflow.
const CEILING: Duration = Duration::from_secs(3600);
/// What a failed call counts as. Far above what a call takes: a member that fails at once must not look fast, or it draws all
/// the traffic.
pub const FAILURE_COUNTS_AS: Duration = Duration::from_secs(1);

/// How long an operation takes at a member, as far as one can tell: a moving estimate that jumps to peaks and comes down slowly
/// (peak-EWMA), because the harm is in the slow calls; and on top of it [`FAILURE_COUNTS_AS`] × the share of calls that fail.
#[derive(Clone, Debug)]
pub struct Latency {
    seconds: f64,
    /// From 0 to 1: the share of failures, the latest counting most.
    failing: f64,
    /// When it was last told something. `None` as long as it is a guess.
    at: Option<Instant>,
}

impl Latency {
    /// A guess, until there is a result. It does not fade: guess low, or the member is not tried while others serve. For a member
    /// that comes back, the time its probe took is a good one; what was known from before is of no use then.
    #[must_use]
    pub fn new(initial: Duration) -> Self {
        Latency { seconds: bounded(initial), failing: 0.0, at: None }
    }

    /// An operation took that long, from submission to answer, the wait for a session included. That a member's sessions are
    /// few for its weight, or its token busy for others, shows in the wait first; in simulation, times without it made the mean
    /// two to five times as long wherever members differed.
    ///
    /// A peak counts at once; what is below the estimate pulls it down, the more so the longer there was no other result.
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

    /// A call failed for the member's reasons after `elapsed`. That it was quick does not count, that it was slow does.
    ///
    /// The first failure counts a part in sixteen of [`FAILURE_COUNTS_AS`], enough to be shunned while others idle; when all
    /// fail it counts in full.
    pub fn observe_failure(&mut self, elapsed: Duration, now: Instant) {
        let (seconds, failing) = self.parts(now);
        self.seconds = seconds.max(bounded(elapsed));
        self.failing = failing + (1.0 - failing) / RESULTS;
        self.at = self.at.max(Some(now));
    }

    /// The estimate. It fades when nothing has been observed for over a second.
    #[must_use]
    pub fn estimate(&self, now: Instant) -> Duration {
        let (seconds, failing) = self.parts(now);
        Duration::from_secs_f64(seconds) + FAILURE_COUNTS_AS.mul_f64(failing)
    }

    /// Seconds and share of failures by then.
    fn parts(&self, now: Instant) -> (f64, f64) {
        let left = fade(self.since(now).saturating_sub(GRACE));
        ((self.seconds * left).max(FLOOR.as_secs_f64()), self.failing * left)
    }

    /// Callers on several threads may be a little out of order; that counts as no time at all.
    fn since(&self, now: Instant) -> Duration {
        self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at))
    }
}

fn bounded(sample: Duration) -> f64 {
    sample.clamp(FLOOR, CEILING).as_secs_f64()
}

/// What is left of a difference after so long.
fn fade(elapsed: Duration) -> f64 {
    (-elapsed.as_secs_f64() / TAU.as_secs_f64()).exp()
}

/// What is known about a member when a call has to be placed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Smaller goes first.
    pub priority: u32,
    /// Share of the load within a priority; 0 counts as 1. Where members differ in sessions, their numbers make good weights.
    pub weight: u32,
    /// How long an operation takes there: [`Latency::estimate`].
    pub latency: Duration,
    /// Age of the oldest call that is running there, or `None`. A call that hangs makes the member expensive at once, long before
    /// there is a result to learn from. Leave out what may well take minutes, such as generating a key.
    pub oldest: Option<Duration>,
    /// Operations that wait or run there now.
    pub in_flight: usize,
    /// Can take a call: its breaker is closed and its queue has room.
    pub able: bool,
}

/// What one more operation costs there, in seconds: time for one × those before it and itself ÷ weight.
#[must_use]
pub fn cost(candidate: &Candidate) -> f64 {
    let time = candidate.oldest.unwrap_or_default().max(candidate.latency).as_secs_f64();
    time * (candidate.in_flight as f64 + 1.0) / f64::from(candidate.weight.max(1))
}

/// In the lowest priority that has a member that is able and not to be avoided: the cheaper of two such members drawn at random.
/// `None` if nobody is.
///
/// Two at random are nearly as good as the best of all, and callers that know the same do not all run to the same member.
///
/// `random(n)` is a number below `n`, all equally likely.
pub fn pick(
    candidates: &[Candidate],
    avoid: impl Fn(usize) -> bool,
    mut random: impl FnMut(usize) -> usize,
) -> Option<usize> {
    let able = || candidates.iter().enumerate().filter(|(index, candidate)| candidate.able && !avoid(*index));
    let priority = able().map(|(_, candidate)| candidate.priority).min()?;
    let tier = || able().filter(|(_, candidate)| candidate.priority == priority);
    let count = tier().count();
    let first = random(count) % count;
    let (index, candidate) = tier().nth(first)?;
    if count == 1 {
        return Some(index);
    }
    // One of the others: a step of 1 to count - 1 further round.
    let second = (first + 1 + random(count - 1) % (count - 1)) % count;
    let (other_index, other) = tier().nth(second)?;
    Some(if cost(other) < cost(candidate) { other_index } else { index })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::sim::{Load, Rng, Sim, Spec, Truth};
    use super::*;
    use crate::policy::breaker;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    const MS: Duration = Duration::from_millis(1);
    const SECOND: Duration = Duration::from_secs(1);

    fn idle() -> Candidate {
        Candidate { priority: 0, weight: 1, latency: MS, oldest: None, in_flight: 0, able: true }
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
    fn who_is_not_heard_of_is_forgiven() {
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
                // Late, as threads are.
                let at = if late { now.checked_sub(3 * MS).unwrap() } else { now };
                let before = latency.estimate(at);
                if failed { latency.observe_failure(sample, at) } else { latency.observe(sample, at) }
                let after = latency.estimate(at);
                // For rounding.
                let slack = Duration::from_nanos(2);
                prop_assert!(after + slack >= sample, "peaks count at once");
                let most = if failed { before.max(sample) + FAILURE_COUNTS_AS } else if index == 0 { sample } else { before + sample };
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
    fn nobody_is_nobody() {
        let out = Candidate { able: false, ..idle() };
        assert_eq!(pick(&[], |_| false, |_| 0), None);
        assert_eq!(pick(&[out, out], |_| false, |_| 0), None);
        assert_eq!(pick(&[idle(), out], |index| index == 0, |_| 0), None, "not even the avoided one");
    }

    #[test]
    fn the_cheaper_of_two_whichever_comes_first() {
        let all = [Candidate { in_flight: 9, ..idle() }, idle()];
        for first in 0..2 {
            assert_eq!(pick(&all, |_| false, |n| first % n), Some(1));
        }
    }

    #[test]
    fn equals_share_evenly() {
        let mut rng = Rng(1);
        let mut counts = [0; 5];
        for _ in 0..50_000 {
            counts[pick(&[idle(); 5], |_| false, |n| rng.below(n)).unwrap()] += 1;
        }
        assert!(counts.iter().all(|count| (9_500..10_500).contains(count)), "{counts:?}");
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
            let all: Vec<_> = members.iter().map(|&(priority, weight, latency, oldest, in_flight, able)| Candidate {
                priority, weight, in_flight, able,
                latency: Duration::from_millis(latency),
                oldest: oldest.map(Duration::from_millis),
            }).collect();
            let avoid = |index: usize| avoided >> index & 1 == 1;
            let may: Vec<_> = (0..all.len()).filter(|index| all[*index].able && !avoid(*index)).collect();
            let lowest = may.iter().map(|index| all[*index].priority).min();
            let tier: Vec<_> = may.into_iter().filter(|index| Some(all[*index].priority) == lowest).collect();
            let dearest = tier.iter().map(|index| cost(&all[*index])).fold(0.0, f64::max);
            let mut rng = Rng(seed);
            for _ in 0..5 {
                let picked = pick(&all, avoid, |n| { assert!(n > 0); rng.below(n) });
                prop_assert_eq!(picked.is_some(), !tier.is_empty());
                let Some(index) = picked else { continue };
                prop_assert!(tier.contains(&index), "{} of {:?}", index, tier);
                // The dearest loses to any other.
                let alike = tier.iter().filter(|other| cost(&all[**other]) >= dearest).count();
                prop_assert!(cost(&all[index]) < dearest || alike > 1 || tier.len() == 1);
            }
        }
    }

    // Estimate, choice and breaker together, in simulated time. What a healthy member takes: 1 ms, 8 sessions.

    fn truly(truth: Truth) -> Spec {
        Spec { truth, ..Spec::default() }
    }

    fn slow(service: Duration) -> Truth {
        Truth { service, ..Truth::default() }
    }

    const DEAD: Truth = Truth { service: MS, slow_one_in: 0, slow: MS, fails_one_in: 1 };

    /// Warmed up for three seconds, which do not count.
    fn warm(seed: u64, load: Load, specs: &[Spec]) -> Sim {
        let mut sim = Sim::new(seed, load, specs);
        sim.run(3 * SECOND);
        sim.forget();
        sim
    }

    #[test]
    fn equals_carry_equal_shares() {
        let mut sim = warm(1, Load::Open(14_000.0), &[Spec::default(); 3]);
        sim.run(8 * SECOND);
        assert!(sim.done > 100_000 && sim.lost == 0);
        assert!((0..3).all(|member| (0.32..0.35).contains(&sim.share(member))), "{}", sim.report());
    }

    #[test]
    fn who_was_slow_once_is_used_again() {
        let mut sim = warm(2, Load::Open(6_000.0), &[Spec::default(); 3]);
        sim.members[0].truth = slow(SECOND);
        sim.run(10 * MS);
        sim.members[0].truth = Truth::default();
        sim.run(20 * SECOND);
        assert!(sim.steps > 100_000);
        // 1.2 s for the call, grace, and then down from 1.2 s to what the others cost.
        let bound = Duration::from_secs_f64(1.2 + 1.0 + 2.0 * 1_200_f64.ln());
        assert!(sim.members[0].longest_idle < bound, "{}", sim.report());
        sim.forget();
        sim.run(5 * SECOND);
        assert!((0.28..0.38).contains(&sim.share(0)), "{}", sim.report());
    }

    #[test]
    fn a_dead_member_gets_probes_only_and_comes_back() {
        for (seed, load) in [(3, 4_000.0), (4, 14_000.0)] {
            let mut sim = warm(seed, Load::Open(load), &[Spec::default(); 3]);
            sim.members[0].truth = DEAD;
            while sim.members[0].breaker.state() == breaker::State::Closed {
                sim.run(SECOND);
            }
            let evidence = sim.members[0].calls - sim.members[0].failures;
            assert!(sim.members[0].failures <= 5 + 8 && evidence <= 30, "never drew traffic: {}", sim.report());
            assert_eq!(sim.lost, 0, "others took over");
            sim.run(10 * MS);
            sim.forget();
            sim.run(15 * SECOND);
            assert_eq!(sim.members[0].calls, 0, "{}", sim.report());
            // Every 1.5 to 2 s, and the first few sooner.
            assert!((7..=15).contains(&sim.members[0].probes), "{}", sim.report());
            sim.members[0].truth = Truth::default();
            sim.forget();
            sim.run(3 * SECOND);
            assert!(sim.members[0].longest_idle < Duration::from_millis(2_100), "{}", sim.report());
            sim.forget();
            sim.run(SECOND);
            assert!((0.28..0.38).contains(&sim.share(0)), "{}", sim.report());
        }
    }

    #[test]
    fn a_slow_member_gets_no_more_than_it_is_worth() {
        // The two others can do 16,000 a second, it can do 800.
        let mut half = warm(5, Load::Open(8_000.0), &[truly(slow(10 * MS)), Spec::default(), Spec::default()]);
        half.run(7 * SECOND);
        assert!((0.000_5..0.01).contains(&half.share(0)), "not idle, not forgotten: {}", half.report());
        assert!(half.mean() < MS.mul_f64(1.05), "{}", half.report());
        let mut full = warm(6, Load::Closed(400), &[truly(slow(10 * MS)), Spec::default(), Spec::default()]);
        full.run(3 * SECOND);
        assert!((0.04..0.055).contains(&full.share(0)), "by its speed, 1 in 21: {}", full.report());
        assert!(half.steps + full.steps > 200_000 && half.lost + full.lost == 0);
    }

    #[test]
    fn now_and_then_slow_is_slow() {
        let moody = Truth { slow_one_in: 20, slow: 50 * MS, ..Truth::default() };
        let mut sim = warm(7, Load::Open(8_000.0), &[truly(moody), Spec::default(), Spec::default()]);
        sim.run(10 * SECOND);
        assert!(sim.steps > 200_000);
        assert!((0.000_01..0.05).contains(&sim.share(0)), "{}", sim.report());
        assert!(sim.mean() < MS.mul_f64(1.05), "{}", sim.report());
    }

    #[test]
    fn a_rare_failure_costs_little_even_under_load() {
        let rare = Truth { fails_one_in: 1_000, ..Truth::default() };
        let mut sim = warm(8, Load::Open(14_000.0), &[truly(rare), Spec::default()]);
        sim.run(8 * SECOND);
        assert!(sim.done > 100_000 && sim.lost == 0 && sim.members[0].failures > 20, "{}", sim.report());
        assert!((0.4..0.52).contains(&sim.share(0)) && sim.mean() < 5 * MS, "{}", sim.report());
        assert_eq!(sim.members[0].breaker.openings(), 0);
    }

    #[test]
    fn who_hangs_is_left_alone_at_once() {
        let mut sim = warm(9, Load::Open(14_000.0), &[Spec::default(); 3]);
        sim.members[0].truth = slow(60 * SECOND);
        sim.run(8 * SECOND);
        assert!(sim.done > 100_000);
        assert!(sim.members[0].calls <= 16, "{}", sim.report());
        assert!(sim.mean() < MS.mul_f64(1.5), "{}", sim.report());
    }

    #[test]
    fn load_follows_weight() {
        let specs = [3, 1].map(|weight| Spec { weight, sessions: 64, ..Spec::default() });
        for (seed, load) in [(10, Load::Open(30_000.0)), (11, Load::Closed(48))] {
            let mut sim = warm(seed, load, &specs);
            sim.run(Duration::from_millis(1_500));
            let ratio = sim.share(0) / sim.share(1);
            assert!((2.4..3.6).contains(&ratio), "{ratio}: {}", sim.report());
            assert!(sim.steps > 100_000);
        }
    }

    #[test]
    fn tiers_stand_in_and_step_back() {
        let spare = Spec { priority: 1, ..Spec::default() };
        let mut sim = warm(12, Load::Open(5_000.0), &[Spec::default(), Spec::default(), spare]);
        let only = |sim: &mut Sim, time: Duration, first: bool| {
            sim.forget();
            sim.run(time);
            let (first_tier, second_tier) = (sim.members[0].calls + sim.members[1].calls, sim.members[2].calls);
            let (busy, idle) = if first { (first_tier, second_tier) } else { (second_tier, first_tier) };
            assert!(busy > 10_000 && idle == 0 && sim.lost == 0, "{}", sim.report());
        };
        only(&mut sim, 5 * SECOND, true);
        sim.members[0].truth = DEAD;
        sim.run(5 * SECOND);
        only(&mut sim, 5 * SECOND, true);
        sim.members[1].truth = DEAD;
        sim.forget();
        sim.run(SECOND / 10);
        assert!(sim.members[1].failures <= 13 && sim.lost <= 13, "few calls prove it: {}", sim.report());
        only(&mut sim, 5 * SECOND, false);
        sim.members[0].truth = Truth::default();
        sim.run(Duration::from_millis(2_100));
        only(&mut sim, 5 * SECOND, true);
        assert!(sim.steps > 200_000);
    }

    #[test]
    fn when_nobody_serves_the_first_to_recover_does_soon() {
        let mut sim = warm(13, Load::Open(2_000.0), &[Spec::default(); 2]);
        sim.members.iter_mut().for_each(|member| member.truth = DEAD);
        sim.run(20 * SECOND);
        sim.members[1].truth = Truth::default();
        sim.forget();
        sim.run(10 * SECOND);
        // 50 ms between probes in a hurry, where the backoff would be 2 s by now.
        assert!(sim.lost < 140, "{}", sim.report());
        assert_eq!(sim.members[0].calls, 0);
    }

    proptest! {
        #![proptest_config(config(12))]

        /// Members of all kinds, of which one dies and recovers: 12 runs of over 10,000 steps each.
        #[test]
        fn whatever_the_members(
            specs in proptest::collection::vec(
                (1..5_u32, 1..17_usize, 1..11_u32).prop_map(|(weight, sessions, service)| {
                    Spec { weight, sessions, truth: slow(service * MS), priority: 0 }
                }),
                2..6,
            ),
            load in 0.2..0.8_f64,
            seed: u64,
        ) {
            let each = |spec: &Spec| spec.sessions as f64 / spec.truth.service.as_secs_f64();
            let capacity: f64 = specs.iter().map(each).sum();
            let mut sim = Sim::new(seed, Load::Open((capacity * load).min(6_000.0)), &specs);
            sim.run(2 * SECOND);
            sim.members[0].truth = DEAD;
            sim.run(4 * SECOND);
            sim.members[0].truth = specs[0].truth;
            sim.run(3 * SECOND);
            sim.forget();
            let begun = sim.steps;
            sim.run(20 * SECOND);
            prop_assert!(sim.steps - begun > 2_000);
            prop_assert!(sim.lost == 0, "{}", sim.report());
            for member in &sim.members {
                prop_assert_eq!(member.breaker.state(), breaker::State::Closed);
                prop_assert!(member.longest_idle < 15 * SECOND, "starved: {}", sim.report());
            }
        }
    }
}

/// A cluster in simulated time: calls arrive, wait for a session, take their time, fail, and are tried elsewhere.
#[cfg(test)]
mod sim {
    use super::{Candidate, Latency, pick};
    use crate::policy::breaker::{self, Breaker};
    use std::cmp::Reverse;
    use std::collections::{BinaryHeap, VecDeque};
    use std::time::{Duration, Instant};

    /// SplitMix64: small, seeded, good enough to draw lots.
    pub(super) struct Rng(pub(super) u64);

    impl Rng {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            mixed ^ (mixed >> 31)
        }

        /// From 0 to below 1.
        pub(super) fn unit(&mut self) -> f64 {
            (self.next() >> 11) as f64 / (1_u64 << 53) as f64
        }

        pub(super) fn below(&mut self, n: usize) -> usize {
            (self.next() % n as u64) as usize
        }
    }

    #[derive(Clone, Copy)]
    pub(super) enum Load {
        /// So many calls a second, at random times, whatever comes of them.
        Open(f64),
        /// So many callers, each of which makes the next call as soon as it has its answer.
        Closed(usize),
    }

    /// What is configured.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Spec {
        pub(super) priority: u32,
        pub(super) weight: u32,
        pub(super) sessions: usize,
        pub(super) truth: Truth,
    }

    impl Default for Spec {
        fn default() -> Self {
            Spec { priority: 0, weight: 1, sessions: 8, truth: Truth::default() }
        }
    }

    /// How a member behaves for now; the policies do not see this.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Truth {
        /// Give or take a fifth.
        pub(super) service: Duration,
        /// One call in so many takes `slow` instead; 0 for none.
        pub(super) slow_one_in: usize,
        pub(super) slow: Duration,
        /// One call in so many fails, after 50 µs; 0 for none.
        pub(super) fails_one_in: usize,
    }

    impl Default for Truth {
        fn default() -> Self {
            let ms = Duration::from_millis(1);
            Truth { service: ms, slow_one_in: 0, slow: ms, fails_one_in: 0 }
        }
    }

    pub(super) struct Member {
        pub(super) spec: Spec,
        pub(super) truth: Truth,
        pub(super) breaker: Breaker,
        latency: Latency,
        waiting: VecDeque<Call>,
        /// When they began, oldest first.
        running: VecDeque<u64>,
        /// Calls placed here, without probes.
        pub(super) calls: u64,
        pub(super) failures: u64,
        pub(super) probes: u64,
        idle_since: u64,
        /// Without any call, until it got one.
        pub(super) longest_idle: Duration,
        pub(super) most_in_flight: usize,
    }

    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    struct Call {
        arrived: u64,
        /// When it came to the member.
        placed: u64,
        retried: bool,
        /// The breaker's count when it was placed.
        openings: u64,
    }

    #[derive(PartialEq, Eq, PartialOrd, Ord)]
    enum Event {
        Arrives,
        Ends { member: usize, began: u64, call: Call, good: bool },
        ProbeEnds { member: usize, began: u64, good: bool },
    }

    pub(super) struct Sim {
        start: Instant,
        /// Nanoseconds since the start.
        now: u64,
        events: BinaryHeap<Reverse<(u64, u64, Event)>>,
        /// Events so far; keeps those of one instant in order.
        pub(super) steps: u64,
        rng: Rng,
        load: Load,
        pub(super) members: Vec<Member>,
        pub(super) done: u64,
        seconds: f64,
        pub(super) slowest: Duration,
        pub(super) lost: u64,
    }

    impl Drop for Sim {
        fn drop(&mut self) {
            eprintln!("@@ {} steps {} {}", std::thread::current().name().unwrap(), self.steps, self.report());
        }
    }
    impl Sim {
        pub(super) fn new(seed: u64, load: Load, specs: &[Spec]) -> Self {
            let member = |spec: &Spec| Member {
                spec: *spec,
                truth: spec.truth,
                breaker: Breaker::new(breaker::Settings::default()),
                latency: Latency::new(Duration::from_millis(1)),
                waiting: VecDeque::new(),
                running: VecDeque::new(),
                calls: 0,
                failures: 0,
                probes: 0,
                idle_since: 0,
                longest_idle: Duration::ZERO,
                most_in_flight: 0,
            };
            let mut sim = Sim {
                start: Instant::now(),
                now: 0,
                events: BinaryHeap::new(),
                steps: 0,
                rng: Rng(seed),
                load,
                members: specs.iter().map(member).collect(),
                done: 0,
                seconds: 0.0,
                slowest: Duration::ZERO,
                lost: 0,
            };
            for _ in 0..if let Load::Closed(callers) = load { callers } else { 1 } {
                sim.after(Duration::ZERO, Event::Arrives);
            }
            sim
        }

        pub(super) fn run(&mut self, time: Duration) {
            let end = self.now + time.as_nanos() as u64;
            while self.events.peek().is_some_and(|Reverse((at, ..))| *at <= end) {
                let Some(Reverse((at, _, event))) = self.events.pop() else { break };
                self.now = at;
                self.handle(event);
            }
            self.now = end;
            for member in &mut self.members {
                member.note_idle(end);
            }
        }

        /// Begins to count anew.
        pub(super) fn forget(&mut self) {
            (self.done, self.seconds, self.slowest, self.lost) = (0, 0.0, Duration::ZERO, 0);
            for member in &mut self.members {
                (member.calls, member.failures, member.probes, member.most_in_flight) = (0, 0, 0, 0);
                (member.idle_since, member.longest_idle) = (self.now, Duration::ZERO);
            }
        }

        /// Of all calls that were placed.
        pub(super) fn share(&self, member: usize) -> f64 {
            self.members[member].calls as f64 / self.members.iter().map(|member| member.calls).sum::<u64>() as f64
        }

        /// From arrival to the right answer.
        pub(super) fn mean(&self) -> Duration {
            Duration::from_secs_f64(self.seconds / self.done.max(1) as f64)
        }

        pub(super) fn report(&self) -> String {
            let each = self.members.iter().enumerate().map(|(index, member)| {
                format!(
                    "\n  {:5.2} %, {} calls, {} failures, {} probes, idle {:?}, at most {} in flight, estimate {:?}, {:?}",
                    100.0 * self.share(index),
                    member.calls,
                    member.failures,
                    member.probes,
                    member.longest_idle,
                    member.most_in_flight,
                    member.latency.estimate(self.time()),
                    member.breaker.state(),
                )
            });
            let (done, lost, mean, slowest) = (self.done, self.lost, self.mean(), self.slowest);
            format!("{done} done, {lost} lost, mean {mean:?}, slowest {slowest:?}{}", each.collect::<String>())
        }

        fn time(&self) -> Instant {
            self.start + Duration::from_nanos(self.now)
        }

        fn after(&mut self, wait: Duration, event: Event) {
            self.steps += 1;
            self.events.push(Reverse((self.now + wait.as_nanos() as u64, self.steps, event)));
        }

        fn handle(&mut self, event: Event) {
            let now = self.time();
            match event {
                Event::Arrives => {
                    if let Load::Open(rate) = self.load {
                        let wait = -(1.0 - self.rng.unit()).ln() / rate;
                        self.after(Duration::from_secs_f64(wait), Event::Arrives);
                    }
                    self.place(Call { arrived: self.now, placed: self.now, retried: false, openings: 0 }, None);
                }
                Event::Ends { member: index, began, call, good } => {
                    let jitter = self.rng.unit();
                    let took = Duration::from_nanos(self.now - call.placed);
                    let member = &mut self.members[index];
                    let position = member.running.iter().position(|start| *start == began);
                    position.map(|position| member.running.remove(position));
                    member.idle_since = self.now;
                    let current = call.openings == member.breaker.openings();
                    match good {
                        true if current => {
                            member.latency.observe(took, now);
                            member.breaker.success(now);
                        }
                        false if current => {
                            member.latency.observe_failure(took, now);
                            member.breaker.failure(now, jitter);
                        }
                        _ => {}
                    }
                    member.failures += u64::from(!good);
                    self.serve(index);
                    if good {
                        let took = Duration::from_nanos(self.now - call.arrived);
                        self.done += 1;
                        self.seconds += took.as_secs_f64();
                        self.slowest = self.slowest.max(took);
                        self.answered();
                    } else if call.retried {
                        self.lost += 1;
                        self.answered();
                    } else {
                        self.place(Call { retried: true, ..call }, Some(index));
                    }
                }
                Event::ProbeEnds { member: index, began, good } => {
                    let jitter = self.rng.unit();
                    let member = &mut self.members[index];
                    if good {
                        member.latency = Latency::new(Duration::from_nanos(self.now - began));
                        member.breaker.probe_succeeded(now);
                    } else {
                        member.breaker.probe_failed(now, jitter);
                    }
                }
            }
        }

        fn answered(&mut self) {
            if let Load::Closed(_) = self.load {
                self.after(Duration::ZERO, Event::Arrives);
            }
        }

        fn place(&mut self, call: Call, avoid: Option<usize>) {
            self.probe();
            let now = self.time();
            let all: Vec<_> = self.members.iter().map(|member| member.candidate(now, self.now)).collect();
            match pick(&all, |index| Some(index) == avoid, |n| self.rng.below(n)) {
                Some(index) => {
                    let member = &mut self.members[index];
                    member.calls += 1;
                    member.note_idle(self.now);
                    member.waiting.push_back(Call { placed: self.now, openings: member.breaker.openings(), ..call });
                    member.most_in_flight = member.most_in_flight.max(member.in_flight());
                    self.serve(index);
                }
                None => {
                    self.lost += 1;
                    self.members.iter_mut().for_each(|member| member.breaker.hurry(now));
                    if let Load::Closed(_) = self.load {
                        self.after(Duration::from_millis(1), Event::Arrives);
                    }
                }
            }
        }

        fn probe(&mut self) {
            let now = self.time();
            for index in 0..self.members.len() {
                if self.members[index].breaker.may_probe(now) {
                    self.members[index].probes += 1;
                    let (took, good) = self.members[index].truth.call(&mut self.rng);
                    self.after(took, Event::ProbeEnds { member: index, began: self.now, good });
                }
            }
        }

        /// Free sessions take what waits.
        fn serve(&mut self, index: usize) {
            while self.members[index].running.len() < self.members[index].spec.sessions {
                let member = &mut self.members[index];
                let Some(call) = member.waiting.pop_front() else { break };
                member.running.push_back(self.now);
                let (took, good) = member.truth.call(&mut self.rng);
                self.after(took, Event::Ends { member: index, began: self.now, call, good });
            }
        }
    }

    impl Member {
        fn note_idle(&mut self, now: u64) {
            if self.in_flight() == 0 {
                self.longest_idle = self.longest_idle.max(Duration::from_nanos(now - self.idle_since));
            }
        }

        fn in_flight(&self) -> usize {
            self.waiting.len() + self.running.len()
        }

        fn candidate(&self, now: Instant, nanos: u64) -> Candidate {
            Candidate {
                priority: self.spec.priority,
                weight: self.spec.weight,
                latency: self.latency.estimate(now),
                oldest: self.running.front().map(|began| Duration::from_nanos(nanos - began)),
                in_flight: self.in_flight(),
                able: self.breaker.state() == breaker::State::Closed && self.in_flight() < 4_096,
            }
        }
    }

    impl Truth {
        fn call(&self, rng: &mut Rng) -> (Duration, bool) {
            if self.fails_one_in > 0 && rng.below(self.fails_one_in) == 0 {
                return (Duration::from_micros(50), false);
            }
            let slow = self.slow_one_in > 0 && rng.below(self.slow_one_in) == 0;
            let time = if slow { self.slow } else { self.service };
            (time.mul_f64(0.8 + 0.4 * rng.unit()), true)
        }
    }
}
