//! Tests of all policies together, in simulated time.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::policy::breaker::State;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

// Tests of estimate, choice and breaker together. A healthy member takes 1 ms per operation and has 8 sessions.

fn behaving(behaviour: Behaviour) -> Spec {
    Spec { behaviour, ..Spec::default() }
}

fn slow(service: Duration) -> Behaviour {
    Behaviour { service, ..Behaviour::default() }
}

const DEAD: Behaviour = Behaviour { service: MS, slow_one_in: 0, slow: MS, fails_one_in: 1 };

/// Returns a simulation after three seconds of load, which are not counted.
fn warm(seed: u64, load: Load, specs: &[Spec]) -> Simulation {
    let mut sim = Simulation::new(seed, Settings::new(load), specs);
    sim.run(3 * SECOND);
    sim.forget();
    sim
}

#[test]
fn equals_carry_equal_shares() {
    let mut sim = warm(1, Load::Open(14_000.0), &[Spec::default(); 3]);
    sim.run(8 * SECOND);
    assert!(sim.done() > 100_000 && sim.lost == 0);
    assert!((0..3).all(|member| (0.32..0.35).contains(&sim.share(member))), "{}", sim.report());
}

#[test]
fn a_member_that_was_slow_once_is_used_again() {
    let mut sim = warm(2, Load::Open(6_000.0), &[Spec::default(); 3]);
    sim.members[0].behaviour = slow(SECOND);
    sim.run(10 * MS);
    sim.members[0].behaviour = Behaviour::default();
    sim.run(20 * SECOND);
    assert!(sim.steps > 100_000);
    // 1.2 s for the call, the grace period, and then the decay from 1.2 s to the cost of the others.
    let bound = Duration::from_secs_f64(1.2 + 1.0 + 2.0 * 1_200_f64.ln());
    assert!(sim.members[0].longest_idle < bound, "{}", sim.report());
    sim.forget();
    sim.run(5 * SECOND);
    assert!((0.28..0.38).contains(&sim.share(0)), "{}", sim.report());
}

#[test]
fn a_dead_member_gets_probes_only_and_comes_back() {
    for (seed, load) in [(3, 4_000.0), (4, 12_000.0)] {
        let mut sim = warm(seed, Load::Open(load), &[Spec::default(); 3]);
        sim.members[0].behaviour = DEAD;
        for _ in 0..60 {
            if sim.members[0].breaker.state() == State::Closed {
                sim.run(SECOND);
            }
        }
        assert_eq!(sim.members[0].breaker.openings(), 1, "{}", sim.report());
        assert!(sim.members[0].failures <= 5 + 8, "never drew traffic: {}", sim.report());
        assert_eq!(sim.lost, 0, "others took over");
        sim.run(10 * MS);
        sim.forget();
        sim.run(8 * SECOND);
        assert_eq!(sim.members[0].calls, 0, "{}", sim.report());
        // One probe every 1.5 to 2 s, and the first few sooner.
        assert!((4..=10).contains(&sim.members[0].probes), "{}", sim.report());
        sim.members[0].behaviour = Behaviour::default();
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
    // The two other members can do 16,000 operations per second, this one 800.
    let mut half = warm(5, Load::Open(8_000.0), &[behaving(slow(10 * MS)), Spec::default(), Spec::default()]);
    half.run(7 * SECOND);
    assert!((0.000_5..0.01).contains(&half.share(0)), "not idle, not forgotten: {}", half.report());
    assert!(half.mean() < MS.mul_f64(1.05), "{}", half.report());
    let mut full = warm(6, Load::Closed(400), &[behaving(slow(10 * MS)), Spec::default(), Spec::default()]);
    full.run(3 * SECOND);
    assert!((0.04..0.055).contains(&full.share(0)), "by its speed, 1 in 21: {}", full.report());
    assert!(half.steps + full.steps > 200_000 && half.lost + full.lost == 0);
}

#[test]
fn now_and_then_slow_is_slow() {
    let moody = Behaviour { slow_one_in: 20, slow: 50 * MS, ..Behaviour::default() };
    let mut sim = warm(7, Load::Open(8_000.0), &[behaving(moody), Spec::default(), Spec::default()]);
    sim.run(10 * SECOND);
    assert!(sim.steps > 200_000);
    assert!((0.000_01..0.01).contains(&sim.share(0)), "{}", sim.report());
    assert!(sim.mean() < MS.mul_f64(1.05), "{}", sim.report());
}

#[test]
fn failing_fast_draws_no_traffic() {
    // Failures are mostly too rare for the breaker.
    let flaky = Behaviour { fails_one_in: 4, ..Behaviour::default() };
    let mut sim = warm(14, Load::Open(8_000.0), &[behaving(flaky), Spec::default(), Spec::default()]);
    sim.run(5 * SECOND);
    assert!(sim.steps > 100_000 && sim.lost == 0);
    assert!(sim.share(0) < 0.01, "{}", sim.report());
}

#[test]
fn a_rare_failure_costs_little_even_under_load() {
    let rare = Behaviour { fails_one_in: 1_000, ..Behaviour::default() };
    let mut sim = warm(8, Load::Open(14_000.0), &[behaving(rare), Spec::default()]);
    sim.run(8 * SECOND);
    assert!(sim.done() > 100_000 && sim.lost == 0 && sim.members[0].failures > 20, "{}", sim.report());
    assert!((0.4..0.52).contains(&sim.share(0)) && sim.mean() < 5 * MS, "{}", sim.report());
    assert_eq!(sim.members[0].breaker.openings(), 0);
}

#[test]
fn a_member_that_hangs_is_left_alone_at_once() {
    let mut sim = warm(9, Load::Open(14_000.0), &[Spec::default(); 3]);
    sim.members[0].behaviour = slow(60 * SECOND);
    sim.run(8 * SECOND);
    assert!(sim.done() > 100_000);
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
    let only = |sim: &mut Simulation, time: Duration, first: bool| {
        sim.forget();
        sim.run(time);
        let (first_tier, second_tier) = (sim.members[0].calls + sim.members[1].calls, sim.members[2].calls);
        let (busy, idle) = if first { (first_tier, second_tier) } else { (second_tier, first_tier) };
        assert!(busy > 10_000 && idle == 0 && sim.lost == 0, "{}", sim.report());
    };
    only(&mut sim, 5 * SECOND, true);
    sim.members[0].behaviour = DEAD;
    sim.run(5 * SECOND);
    only(&mut sim, 5 * SECOND, true);
    sim.members[1].behaviour = DEAD;
    sim.forget();
    sim.run(SECOND / 10);
    assert!(sim.members[1].failures <= 13 && sim.lost <= 13, "few calls prove it: {}", sim.report());
    only(&mut sim, 5 * SECOND, false);
    sim.members[0].behaviour = Behaviour::default();
    sim.run(Duration::from_millis(2_100));
    only(&mut sim, 5 * SECOND, true);
    assert!(sim.steps > 200_000);
}

#[test]
fn when_no_member_serves_the_first_to_recover_does_soon() {
    let mut sim = warm(13, Load::Open(2_000.0), &[Spec::default(); 2]);
    sim.members.iter_mut().for_each(|member| member.behaviour = DEAD);
    sim.run(20 * SECOND);
    sim.members[1].behaviour = Behaviour::default();
    sim.forget();
    sim.run(10 * SECOND);
    // 50 ms between probes while no other member serves; the backoff would be 2 s by now.
    assert!(sim.lost < 140, "{}", sim.report());
    assert_eq!(sim.members[0].calls, 0);
}

#[test]
fn a_killed_worker_loses_no_request() {
    for (members, load) in [(1, 4_000.0), (3, 14_000.0)] {
        let mut sim = warm(15, Load::Open(load), &vec![Spec::default(); members]);
        for _ in 0..3 {
            sim.kill(0, 300 * MS);
            assert_eq!(sim.members[0].in_flight(), 0);
            sim.run(SECOND);
        }
        sim.finish();
        assert!(sim.done() > 10_000 && sim.lost == 0, "{}", sim.report());
        assert!(sim.members[0].failures > 0, "operations were under way: {}", sim.report());
        let slowest = sim.latencies.iter().max().unwrap();
        // Operations wait for the only member until its probe has passed, and then for the operations that arrived
        // meanwhile.
        let bound = if members == 1 { 1_500 * MS } else { 50 * MS };
        assert!(*slowest < bound, "{slowest:?}: {}", sim.report());
    }
}

#[test]
fn a_member_that_stays_away_is_not_waited_for_for_ever() {
    let mut sim = warm(16, Load::Open(1_000.0), &[Spec::default()]);
    sim.kill(0, 60 * SECOND);
    sim.run(SECOND);
    assert_eq!(sim.lost, 0, "{}", sim.report());
    sim.run(9 * SECOND);
    // Two seconds after the kill all waiting requests have failed; later requests fail at once.
    assert!((9_000..11_000).contains(&sim.lost) && sim.parked.is_empty(), "{}", sim.report());
}

#[test]
fn a_hung_member_gets_a_new_worker_and_serves_again() {
    let mut sim = warm(17, Load::Open(10_000.0), &[Spec::default(); 3]);
    sim.members[0].behaviour = slow(3_600 * SECOND);
    sim.run(SECOND);
    sim.members[0].behaviour = Behaviour::default();
    sim.run(9 * SECOND);
    assert!(sim.members[0].worker >= 1, "{}", sim.report());
    sim.forget();
    sim.run(SECOND);
    assert!((0.28..0.38).contains(&sim.share(0)), "{}", sim.report());
    sim.finish();
    assert_eq!(sim.lost, 0, "{}", sim.report());
}

#[test]
fn what_does_not_fit_into_queue_and_deadline_is_lost() {
    let spec = Spec { queue: 100, sessions: 1, ..Spec::default() };
    let mut full = Simulation::new(18, Settings::new(Load::Open(2_000.0)), &[spec]);
    full.run(5 * SECOND);
    assert!(full.members[0].most_in_flight == 100 && (4_500..5_500).contains(&full.lost), "{}", full.report());
    let settings = Settings { deadline: 50 * MS, ..Settings::new(Load::Open(2_000.0)) };
    let mut late = Simulation::new(19, settings, &[Spec { queue: 4_096, ..spec }]);
    late.run(5 * SECOND);
    late.finish();
    assert!(late.latencies.iter().all(|took| *took <= 50 * MS));
    // First come, first served: most operations start so late that they end after their deadline.
    assert!(late.done() > 500 && late.lost > 4_500, "{}", late.report());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24, rng_seed: RngSeed::Fixed(4), failure_persistence: None, ..ProptestConfig::default()
    })]

    /// Members of all kinds, one of which dies and recovers: 8 runs of over 20,000 steps each.
    #[test]
    fn whatever_the_members(
        specs in proptest::collection::vec(
            (1..5_u32, 1..17_usize, 2..21_u32).prop_map(|(weight, sessions, service)| {
                Spec { weight, sessions, behaviour: slow(service * MS), ..Spec::default() }
            }),
            2..6,
        ),
        load in 0.2..0.8_f64,
        seed: u64,
    ) {
        let each = |spec: &Spec| spec.sessions as f64 / spec.behaviour.service.as_secs_f64();
        let capacity: f64 = specs.iter().map(each).sum();
        let mut sim = Simulation::new(seed, Settings::new(Load::Open((capacity * load).min(2_000.0))), &specs);
        sim.run(2 * SECOND);
        sim.members[0].behaviour = DEAD;
        sim.run(4 * SECOND);
        sim.members[0].behaviour = specs[0].behaviour;
        sim.run(3 * SECOND);
        sim.forget();
        sim.run(12 * SECOND);
        prop_assert!(sim.steps > 10_000);
        prop_assert!(sim.lost == 0, "{}", sim.report());
        for member in &sim.members {
            prop_assert_eq!(member.breaker.state(), State::Closed);
            prop_assert!(member.longest_idle < 10 * SECOND, "starved: {}", sim.report());
        }
    }

    /// Members that are killed, hang, fail and recover at random: 24 runs.
    #[test]
    fn every_request_ends_once(
        members in 1..5_usize,
        operations in 1..4_u32,
        faults in proptest::collection::vec((0..5_usize, 0..4_u8, 1..900_u32), 1..20),
        closed: bool,
        limited: bool,
        seed: u64,
    ) {
        let load = if closed { Load::Closed(20) } else { Load::Open(500.0) };
        let settings = Settings { operations, own_cost: MS, processors: 2, ..Settings::new(load) };
        let settings = if limited { Settings { concurrency: 4, queue: 9, ..settings } } else { settings };
        let spec = Spec { rtt: MS, engines: 2, sessions: 3, queue: 200, ..Spec::default() };
        let mut sim = Simulation::new(seed, settings, &vec![spec; members]);
        for (member, fault, millis) in faults {
            let member = member % members;
            match fault {
                0 => sim.kill(member, millis * MS),
                1 => sim.members[member].behaviour = slow(60 * SECOND),
                2 => sim.members[member].behaviour = DEAD,
                _ => sim.members[member].behaviour = Behaviour::default(),
            }
            sim.run(millis * MS);
            for member in &sim.members {
                prop_assert!(member.in_flight() <= 200 && member.engines_free <= 2);
                let computing = member.sessions.iter().flatten().filter(|call| call.good).count();
                prop_assert!(2 - member.engines_free + member.at_engine.len() <= computing);
            }
        }
        sim.finish();
        let all = sim.requests.len();
        prop_assert!(all > 0);
        prop_assert_eq!(sim.done() + sim.lost as usize, all);
        prop_assert!(sim.requests.iter().all(|request| request.left == 0));
        prop_assert!(sim.parked.is_empty());
        prop_assert!(sim.running == 0 && sim.for_turn.is_empty());
    }
}

#[test]
fn under_overload_the_queue_fills_and_the_members_go_on_at_capacity() {
    // One member does 1,000 operations per second; 1,500 requests per second arrive.
    let spec = Spec { engines: 1, sessions: 4, ..Spec::default() };
    let settings = Settings { concurrency: 16, ..Settings::new(Load::Open(1_500.0)) };
    for (queue, deadline, longest) in [(500, 5 * SECOND, 0.52), (usize::MAX, SECOND, 0.97)] {
        let mut sim = Simulation::new(5, Settings { queue, deadline, ..settings }, &[spec]);
        sim.run(5 * SECOND);
        sim.forget();
        sim.run(10 * SECOND);
        let done = sim.succeeded as f64 / 10.0;
        assert!((950.0..1_020.0).contains(&done), "{}", sim.report());
        let mean = sim.mean().as_secs_f64();
        assert!((longest * 0.9..longest * 1.05).contains(&mean), "{}", sim.report());
        let failing = sim.lost as f64 / (sim.lost as f64 + sim.done() as f64);
        assert!((0.3..0.37).contains(&failing), "{}", sim.report());
    }
}
