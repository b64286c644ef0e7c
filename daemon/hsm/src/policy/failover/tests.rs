//! Tests that step the failover by hand: every reply in every situation, and random operations.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::policy::budget::Settings;
use crate::policy::simulation::Rng;
use Standing::{Able, Returning, Unable};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use std::collections::{BTreeMap, BTreeSet};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const DEADLINE: Duration = Duration::from_secs(4);
const WATCHDOG: Duration = Duration::from_secs(3);
const WELL: Standing = Able(Candidate { weight: 1, latency: MS, oldest: None, in_flight: 0 });

/// A cluster of one tier, and one operation on it.
struct Stage {
    start: Instant,
    now: Instant,
    standings: Vec<Standing>,
    budget: Budget,
    failover: Failover<&'static str>,
}

impl Stage {
    fn new(standings: &[Standing], retries: f64) -> Self {
        let start = Instant::now();
        let mut budget = Budget::new(Settings { share: 0.0, reserve: retries, reserve_per_second: 0.0 });
        let failover = Failover::new(start + DEADLINE, WATCHDOG, &mut budget, start);
        Stage { start, now: start, standings: standings.to_vec(), budget, failover }
    }

    fn next(&mut self) -> Result<Step, GaveUp<&'static str>> {
        let tiers = Tiers::new(&vec![0; self.standings.len()]);
        self.failover.next(self.now, &tiers, |member| self.standings[member], |_| 0)
    }

    /// Returns the member that is asked next.
    fn asks(&mut self) -> usize {
        match self.next() {
            Ok(Step::Ask { member, .. }) => member,
            other => panic!("{other:?}"),
        }
    }

    fn replied(&mut self, reply: Reply<&'static str>) -> Result<(), &'static str> {
        self.failover.replied(reply, &mut self.budget, self.now)
    }

    /// Gives the same reply for every member that is asked, until the operation is given up. Returns the members asked.
    fn all_reply(&mut self, reply: Reply<&'static str>) -> (Vec<usize>, GaveUp<&'static str>) {
        let mut asked = Vec::new();
        loop {
            match self.next() {
                Ok(Step::Ask { member, .. }) => asked.push(member),
                Ok(Step::Wait { .. }) => panic!("waits after {asked:?}"),
                Err(gave_up) => return (asked, gave_up),
            }
            if let Err(error) = self.replied(reply) {
                return (asked, GaveUp::Error(error));
            }
        }
    }
}

fn rejected(error: &'static str, credible: bool) -> Reply<&'static str> {
    Reply::Rejected { error, credible, rejection: Rejection { wrong: false, generation: 7 } }
}

const FAILED: Reply<&str> = Reply::Failed("failed");
const NOT_RUN: Reply<&str> = Reply::NotRun("full");

#[test]
fn success_at_once_costs_nothing_and_earns_a_share_of_a_retry() {
    let now = Instant::now();
    let mut budget = Budget::new(Settings { share: 0.25, reserve: 0.0, reserve_per_second: 0.0 });
    let mut failover = Failover::<()>::new(now + DEADLINE, WATCHDOG, &mut budget, now);
    let step = failover.next(now, &Tiers::new(&[0, 0]), |_| WELL, |_| 0);
    assert_eq!(step, Ok(Step::Ask { member: 0, share: DEADLINE / 2 }));
    assert_eq!(failover.succeeded(), Success::default());
    assert_eq!(budget.left(now), 0.25);
}

#[test]
fn a_failure_is_taken_elsewhere_out_of_the_budget() {
    let mut stage = Stage::new(&[WELL; 2], 1.0);
    let first = stage.asks();
    stage.replied(FAILED).unwrap();
    assert_ne!(stage.asks(), first);
    assert_eq!(stage.budget.left(stage.now), 0.0);
    let success = Success { retries: 1, failed_over_from: Some(first), contradicted: Vec::new() };
    assert_eq!(stage.failover.succeeded(), success);
    let mut poor = Stage::new(&[WELL; 2], 0.9);
    poor.asks();
    assert_eq!(poor.replied(FAILED), Err("failed"));
}

#[test]
fn to_be_turned_away_costs_no_retry() {
    let mut stage = Stage::new(&[WELL; 2], 0.0);
    let first = stage.asks();
    stage.replied(NOT_RUN).unwrap();
    assert_ne!(stage.asks(), first);
    let success = Success { retries: 0, failed_over_from: Some(first), contradicted: Vec::new() };
    assert_eq!(stage.failover.succeeded(), success);
}

#[test]
fn each_member_is_asked_twice_when_all_fail() {
    for reply in [FAILED, NOT_RUN] {
        let (asked, gave_up) = Stage::new(&[WELL; 3], 100.0).all_reply(reply);
        assert_eq!(asked.len(), 6);
        for round in asked.chunks(3) {
            assert_eq!(round.iter().collect::<BTreeSet<_>>().len(), 3, "{asked:?}");
        }
        assert_eq!(gave_up, GaveUp::Error(if reply == FAILED { "failed" } else { "full" }));
    }
}

#[test]
fn the_same_member_is_no_failover() {
    let mut stage = Stage::new(&[WELL], 1.0);
    stage.asks();
    stage.replied(FAILED).unwrap();
    stage.asks();
    assert_eq!(stage.failover.succeeded(), Success { retries: 1, ..Success::default() });
}

#[test]
fn a_rejection_needs_a_quorum_of_different_members_where_there_are_as_many() {
    for (members, different) in [(1, 1), (2, 2), (5, 5), (9, 5)] {
        let (asked, gave_up) = Stage::new(&vec![WELL; members], 0.0).all_reply(rejected("invalid", true));
        assert_eq!(asked.len(), REJECTION_QUORUM);
        assert_eq!(asked.iter().collect::<BTreeSet<_>>().len(), different, "{asked:?}");
        assert_eq!(gave_up, GaveUp::Error("invalid"));
    }
}

#[test]
fn one_member_that_is_not_credible_spares_the_caller_the_blame() {
    for doubtful in 0..REJECTION_QUORUM {
        let mut stage = Stage::new(&[WELL; 5], 0.0);
        let outcomes: Vec<_> = (0..REJECTION_QUORUM)
            .map(|at| {
                stage.asks();
                stage.replied(if at == doubtful { rejected("unclear", false) } else { rejected("invalid", true) })
            })
            .collect();
        assert_eq!(outcomes, [Ok(()), Ok(()), Ok(()), Ok(()), Err("unclear")]);
    }
    // The outcome is the same when no members are left to ask.
    let mut stage = Stage::new(&[WELL; 2], 0.0);
    stage.asks();
    stage.replied(rejected("unclear", false)).unwrap();
    stage.asks();
    stage.replied(rejected("invalid", true)).unwrap();
    stage.standings = vec![Unable; 2];
    assert_eq!(stage.next(), Err(GaveUp::Error("unclear")));
}

#[test]
fn a_rejection_says_more_than_a_failure() {
    let mut stage = Stage::new(&[WELL; 2], 9.0);
    stage.asks();
    stage.replied(rejected("invalid", true)).unwrap();
    stage.asks();
    stage.replied(FAILED).unwrap();
    stage.standings = vec![Unable; 2];
    assert_eq!(stage.next(), Err(GaveUp::Error("invalid")));
}

#[test]
fn success_contradicts_those_that_rejected() {
    let mut stage = Stage::new(&[WELL; 3], 0.0);
    let rejection = |wrong, generation| Rejection { wrong, generation };
    let first = stage.asks();
    stage.replied(Reply::Rejected { error: "", credible: true, rejection: rejection(true, 3) }).unwrap();
    let second = stage.asks();
    stage.replied(Reply::Rejected { error: "", credible: false, rejection: rejection(false, 4) }).unwrap();
    stage.asks();
    let contradicted = vec![(first, rejection(true, 3)), (second, rejection(false, 4))];
    assert_eq!(stage.failover.succeeded(), Success { contradicted, ..Success::default() });
}

#[test]
fn half_of_the_time_is_kept_while_another_member_could_use_it() {
    let shares = |standings: &[Standing]| {
        let mut stage = Stage::new(standings, 9.0);
        let mut shares = Vec::new();
        while let Ok(Step::Ask { share, .. }) = stage.next() {
            shares.push(share);
            stage.now += share;
            stage.replied(FAILED).unwrap();
        }
        assert!(shares.iter().sum::<Duration>() <= DEADLINE);
        shares
    };
    assert_eq!(shares(&[WELL, WELL]), [2 * SECOND, 2 * SECOND]);
    assert_eq!(shares(&[WELL, WELL, WELL]), [2 * SECOND, SECOND, SECOND]);
    assert_eq!(shares(&[WELL]), [WATCHDOG, SECOND], "never more than the watchdog allows");
    assert_eq!(shares(&[WELL, Unable]), [WATCHDOG, SECOND]);
}

#[test]
fn nothing_is_begun_at_the_deadline() {
    let mut stage = Stage::new(&[WELL], 9.0);
    stage.now += DEADLINE;
    assert_eq!(stage.next(), Err(GaveUp::Deadline));
    let mut stage = Stage::new(&[WELL; 2], 9.0);
    stage.asks();
    stage.now += DEADLINE;
    stage.replied(FAILED).unwrap();
    assert_eq!(stage.next(), Err(GaveUp::Error("failed")), "which says more");
}

#[test]
fn an_operation_waits_for_a_member_that_restarts() {
    let mut stage = Stage::new(&[WELL], 9.0);
    stage.asks();
    // The worker of this member was killed.
    stage.replied(FAILED).unwrap();
    stage.standings = vec![Returning { since: stage.now }];
    let until = stage.now + GRACE;
    for _ in 0..9 {
        assert_eq!(stage.next(), Ok(Step::Wait { until }), "however often it is woken for nothing");
        stage.now += MS;
    }
    stage.standings = vec![WELL];
    assert_eq!(stage.asks(), 0);
    assert_eq!(stage.failover.succeeded().retries, 1);
}

#[test]
fn it_does_not_wait_for_longer_than_is_worth_it() {
    let start = Stage::new(&[], 0.0).start;
    let standings = [Unable, Returning { since: start }, Returning { since: start - SECOND }];
    let mut stage = Stage::new(&standings, 0.0);
    let Ok(Step::Wait { until }) = stage.next() else { panic!() };
    assert_eq!(until, start + GRACE, "the latest of them");
    stage.now = until;
    assert_eq!(stage.next(), Err(GaveUp::NoCandidate));
    let mut late = Stage::new(&standings, 0.0);
    late.now += DEADLINE - MS;
    late.standings[0] = Returning { since: late.now };
    assert_eq!(late.next(), Ok(Step::Wait { until: late.start + DEADLINE }));
    late.now += MS;
    assert_eq!(late.next(), Err(GaveUp::Deadline));
    assert_eq!(Stage::new(&[Unable; 3], 0.0).next(), Err(GaveUp::NoCandidate), "nothing to wait for");
}

#[test]
fn an_input_that_kills_members_kills_each_twice_at_most() {
    let mut stage = Stage::new(&[WELL; 2], 100.0);
    let mut kills = [0; 2];
    let gave_up = loop {
        match stage.next() {
            Ok(Step::Ask { member, .. }) => {
                kills[member] += 1;
                stage.standings[member] = Returning { since: stage.now };
                stage.replied(FAILED).unwrap();
            }
            // The first member comes back.
            Ok(Step::Wait { .. }) => {
                stage.now += MS;
                let returning = stage.standings.iter().position(|standing| *standing != WELL).unwrap();
                stage.standings[returning] = WELL;
            }
            Err(gave_up) => break gave_up,
        }
    };
    assert_eq!((kills, gave_up), ([2, 2], GaveUp::Error("failed")));
}

#[test]
fn to_be_turned_away_before_a_wait_costs_no_round() {
    let mut stage = Stage::new(&[WELL], 9.0);
    for _ in 0..5 {
        stage.standings = vec![WELL];
        stage.asks();
        stage.replied(NOT_RUN).unwrap();
        stage.standings = vec![Returning { since: stage.now }];
        assert!(matches!(stage.next(), Ok(Step::Wait { .. })));
    }
    stage.standings = vec![WELL];
    let (asked, gave_up) = stage.all_reply(FAILED);
    assert_eq!((asked.len(), gave_up), (2, GaveUp::Error("failed")));
}

#[test]
fn an_attempt_without_a_reply_counts_as_turned_away() {
    let mut stage = Stage::new(&[WELL; 2], 0.0);
    let first = stage.asks();
    assert_ne!(stage.asks(), first);
}

// Every reply in every situation.

#[derive(Clone, Copy, PartialEq, Debug)]
enum Then {
    /// Another member is asked.
    Elsewhere,
    /// The same member is asked.
    Again,
    Waits,
    GivesUp(&'static str),
    DeadlinePassed,
}
use Then::*;

/// Returns the step after the reply of a member that is asked after `replies`, `late` or in time, with the given
/// `standings`.
fn then(
    replies: &[Reply<&'static str>],
    reply: Reply<&'static str>,
    members: usize,
    retries: f64,
    change: impl Fn(&mut Stage, usize),
) -> Then {
    let mut stage = Stage::new(&vec![WELL; members], retries);
    for reply in replies {
        stage.asks();
        stage.replied(*reply).unwrap();
    }
    let asked = stage.asks();
    change(&mut stage, asked);
    if let Err(error) = stage.replied(reply) {
        return GivesUp(error);
    }
    match stage.next() {
        Ok(Step::Ask { member, .. }) => {
            if member == asked {
                Again
            } else {
                Elsewhere
            }
        }
        Ok(Step::Wait { .. }) => Waits,
        Err(GaveUp::Error(error)) => GivesUp(error),
        Err(GaveUp::Deadline) => DeadlinePassed,
        Err(GaveUp::NoCandidate) => panic!("something was said"),
    }
}

#[test]
fn every_reply_in_every_situation() {
    let invalid = rejected("invalid", true);
    let (not_run, failed, last) = (NOT_RUN, FAILED, Reply::Final("final"));
    let nothing = |_: &mut Stage, _: usize| {};
    let down = |stage: &mut Stage, asked: usize| stage.standings[asked] = Returning { since: stage.now };
    let gone = |stage: &mut Stage, asked: usize| stage.standings[asked] = Unable;
    let late = |stage: &mut Stage, _: usize| stage.now += DEADLINE;
    let replies = [not_run, invalid, failed, last];
    let check = |situation: &str, expected: [Then; 4], then: &dyn Fn(Reply<&'static str>) -> Then| {
        let found = replies.map(then);
        assert_eq!(found, expected, "{situation}");
    };
    let fails = GivesUp("failed");
    let ends = GivesUp("final");
    check("another member is well", [Elsewhere, Elsewhere, Elsewhere, ends], &|r| then(&[], r, 2, 9.0, nothing));
    check("there is no other member", [Again, Again, Again, ends], &|r| then(&[], r, 1, 9.0, nothing));
    check("no retry is left", [Elsewhere, Elsewhere, fails, ends], &|r| then(&[], r, 2, 0.0, nothing));
    check("the only member restarts", [Waits, Waits, Waits, ends], &|r| then(&[], r, 1, 9.0, down));
    let gives_up = [GivesUp("full"), GivesUp("invalid"), fails, ends];
    check("the only member is gone", gives_up, &|r| then(&[], r, 1, 9.0, gone));
    check("one of two restarts", [Elsewhere, Elsewhere, Elsewhere, ends], &|r| then(&[], r, 2, 9.0, down));
    let late_result = [GivesUp("full"), DeadlinePassed, fails, ends];
    check("the deadline has passed", late_result, &|r| then(&[], r, 2, 9.0, late));
    check("second round", [fails, Again, fails, ends], &|r| then(&[failed], r, 1, 9.0, nothing));
    check("restarts in the second round", [Waits, Waits, fails, ends], &|r| then(&[failed], r, 1, 9.0, down));
    let quorum = [Elsewhere, GivesUp("invalid"), Elsewhere, ends];
    check("four members have rejected it", quorum, &|r| then(&[invalid; 4], r, 6, 9.0, nothing));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 5_000, rng_seed: RngSeed::Fixed(5), failure_persistence: None, ..ProptestConfig::default()
    })]

    /// 5,000 operations on up to seven members that fail, reject, restart and leave at random.
    #[test]
    fn no_operation_asks_too_much(
        priorities in proptest::collection::vec(0..3_u32, 1..8), reserve in 0..9_u32, seed: u64,
    ) {
        let mut rng = Rng(seed);
        let members = priorities.len();
        let tiers = Tiers::new(&priorities);
        let start = Instant::now();
        let mut now = start;
        let settings = Settings { share: 0.0, reserve: f64::from(reserve), reserve_per_second: 0.0 };
        let mut budget = Budget::new(settings);
        let mut failover = Failover::new(start + DEADLINE, WATCHDOG, &mut budget, start);
        let mut standings = vec![WELL; members];
        // Members that were asked in this round; true if they ran the operation.
        let (mut round, mut rounds) = (BTreeMap::new(), 1);
        let (mut ran, mut rejections, mut failures, mut waits) = (vec![0; members], 0, 0, 0);
        loop {
            for standing in &mut standings {
                *standing = match rng.below(12) {
                    0 => Unable,
                    1 => Returning { since: now },
                    2..6 => WELL,
                    _ => *standing,
                };
            }
            let step = failover.next(now, &tiers, |member| standings[member], |n| rng.below(n));
            let left = (start + DEADLINE).saturating_duration_since(now);
            let able = |member: &usize| matches!(standings[*member], Able(_));
            match step {
                Ok(Step::Ask { member, share }) => {
                    prop_assert!(now < start + DEADLINE);
                    prop_assert!(able(&member));
                    let left_over = (0..members).filter(able).any(|other| !round.contains_key(&other));
                    if round.contains_key(&member) {
                        prop_assert!(!left_over, "a new round too soon");
                        round.clear();
                        rounds += 1;
                    }
                    let others = (0..members).filter(able);
                    let others: Vec<_> = others.filter(|at| *at != member && !round.contains_key(at)).collect();
                    let first_tier = others.iter().all(|other| priorities[*other] >= priorities[member]);
                    prop_assert!(first_tier, "{} before {:?} of {:?}", member, others, priorities);
                    let most = if others.is_empty() { left } else { left / 2 };
                    prop_assert_eq!(share, most.min(WATCHDOG));
                    now += share.mul_f64(rng.unit());
                    let reply = match rng.below(8) {
                        0..3 => Reply::NotRun("not run"),
                        3..5 => rejected("rejected", rng.below(4) > 0),
                        5..7 => FAILED,
                        _ if rng.below(4) > 0 => { now += share; FAILED }
                        _ => Reply::Final("final"),
                    };
                    round.insert(member, reply != Reply::NotRun("not run"));
                    ran[member] += usize::from(round[&member]);
                    rejections += usize::from(matches!(reply, Reply::Rejected { .. }));
                    let allowed = if rejections > 0 { REJECTION_QUORUM } else { 2 };
                    prop_assert!(ran[member] <= allowed, "{:?}", ran);
                    prop_assert!(rejections <= REJECTION_QUORUM);
                    let before = budget.left(now);
                    let result = failover.replied(reply, &mut budget, now);
                    let paid = (before - budget.left(now)) as u32;
                    prop_assert_eq!(paid, u32::from(reply == FAILED && before >= 1.0));
                    failures += paid;
                    if let Err(error) = result {
                        let why = match reply {
                            Reply::Final(_) => error == "final",
                            Reply::Failed(_) => before < 1.0,
                            Reply::Rejected { .. } => rejections == REJECTION_QUORUM,
                            Reply::NotRun(_) => false,
                        };
                        prop_assert!(why, "{:?} after {:?}", error, reply);
                        break;
                    }
                }
                Ok(Step::Wait { until }) => {
                    prop_assert!(until > now && until <= start + DEADLINE && until <= now + GRACE);
                    prop_assert!((0..members).filter(able).all(|member| round.contains_key(&member)));
                    let returning = standings.iter().any(|standing| matches!(standing, Returning { .. }));
                    prop_assert!(returning);
                    if rounds < if rejections > 0 { REJECTION_QUORUM } else { 2 } {
                        rounds += usize::from(round.values().any(|ran| *ran));
                        round.clear();
                    } else {
                        round.retain(|_, ran| *ran);
                    }
                    waits += 1;
                    now += (until - now).mul_f64(rng.unit());
                }
                Err(gave_up) => {
                    if now < start + DEADLINE {
                        let all = (0..members).filter(able).all(|member| round.contains_key(&member));
                        prop_assert!(all, "{:?}", gave_up);
                    }
                    if gave_up == GaveUp::NoCandidate {
                        prop_assert!(rejections == 0 && failures == 0);
                    }
                    break;
                }
            }
        }
        prop_assert!(failures <= reserve);
        prop_assert_eq!(failover.succeeded().retries, failures);
        prop_assert!(waits > 0 || ran.iter().sum::<usize>() <= members * REJECTION_QUORUM);
    }
}
