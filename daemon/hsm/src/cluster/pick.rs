//! Which member takes the next call. A plain value in, an index out: no clock, no threads.

use std::cmp::Ordering;
use std::time::Instant;

/// What is known about a member when a call has to be placed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    /// Smaller goes first.
    pub(crate) priority: u32,
    /// Share of the load within a priority.
    pub(crate) weight: u32,
    /// Calls that wait or run there now.
    pub(crate) in_flight: usize,
    /// Cannot take calls at all: its PIN was refused, or its queue is full.
    pub(crate) out: bool,
    /// Failed for its own reasons, and sits out until then.
    pub(crate) rests_until: Option<Instant>,
}

/// Least work in flight for its weight, in the lowest priority that has a rested member. Members that sit out are taken when
/// there is nobody else, and `avoid` when there is not even that. Ties go round by `turn`.
pub(crate) fn pick(candidates: &[Candidate], avoid: Option<usize>, now: Instant, turn: usize) -> Option<usize> {
    let able = |index: &usize| candidates.get(*index).is_some_and(|c| !c.out);
    let others = || (0..candidates.len()).filter(|index| able(index) && Some(*index) != avoid);
    let rested = |index: &usize| candidates[*index].rests_until.is_none_or(|until| until <= now);
    least_loaded(candidates, others().filter(rested), turn)
        .or_else(|| least_loaded(candidates, others(), turn))
        .or_else(|| avoid.filter(able))
}

fn least_loaded(candidates: &[Candidate], among: impl Iterator<Item = usize>, turn: usize) -> Option<usize> {
    let len = candidates.len();
    among.min_by(|a, b| {
        let (one, other) = (&candidates[*a], &candidates[*b]);
        let by_turn = |index: usize| (index + len - turn % len) % len;
        one.priority.cmp(&other.priority).then_with(|| load(one, other)).then_with(|| by_turn(*a).cmp(&by_turn(*b)))
    })
}

/// Compares in flight ÷ weight, counting the call that is being placed, so that weights matter to idle members too.
fn load(one: &Candidate, other: &Candidate) -> Ordering {
    let share = |of: &Candidate, weight: u32| (of.in_flight as u128 + 1) * u128::from(weight.max(1));
    share(one, other.weight).cmp(&share(other, one.weight))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn idle() -> Candidate {
        Candidate { priority: 0, weight: 1, in_flight: 0, out: false, rests_until: None }
    }

    #[test]
    fn nobody_is_nobody() {
        assert_eq!(pick(&[], None, Instant::now(), 7), None);
        assert_eq!(pick(&[], Some(0), Instant::now(), 7), None);
        let out = Candidate { out: true, ..idle() };
        assert_eq!(pick(&[out], None, Instant::now(), 0), None);
        assert_eq!(pick(&[out], Some(0), Instant::now(), 0), None);
    }

    #[test]
    fn equals_take_turns() {
        let all = [idle(); 3];
        let picked: Vec<_> = (0..6).map(|turn| pick(&all, None, Instant::now(), turn).unwrap()).collect();
        assert_eq!(picked, [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn the_lowest_priority_that_can_serve_serves() {
        let now = Instant::now();
        let busy = Candidate { in_flight: 100, ..idle() };
        let spare = Candidate { priority: 1, ..idle() };
        assert_eq!(pick(&[spare, busy], None, now, 0), Some(1));
        let resting = Candidate { rests_until: Some(now + Duration::from_secs(1)), ..busy };
        assert_eq!(pick(&[spare, resting], None, now, 0), Some(0));
        assert_eq!(pick(&[spare, resting], None, now + Duration::from_secs(1), 0), Some(1), "rested");
    }

    #[test]
    fn who_sits_out_serves_when_alone() {
        let now = Instant::now();
        let resting = Candidate { rests_until: Some(now + Duration::from_secs(1)), ..idle() };
        let out = Candidate { out: true, ..idle() };
        assert_eq!(pick(&[out, resting], None, now, 0), Some(1));
    }

    #[test]
    fn the_avoided_is_the_last_resort() {
        let now = Instant::now();
        let resting = Candidate { rests_until: Some(now + Duration::from_secs(1)), ..idle() };
        assert_eq!(pick(&[idle(), idle()], Some(0), now, 0), Some(1));
        assert_eq!(pick(&[idle(), resting], Some(0), now, 0), Some(1));
        assert_eq!(pick(&[idle()], Some(0), now, 0), Some(0));
    }

    #[test]
    fn load_follows_weight() {
        let mut all = [idle(), Candidate { weight: 3, ..idle() }];
        for turn in 0..400 {
            let index = pick(&all, None, Instant::now(), turn).unwrap();
            all[index].in_flight += 1;
        }
        assert_eq!(all.map(|c| c.in_flight), [100, 300]);
    }

    proptest! {
        #[test]
        fn somebody_serves_while_anybody_can(
            members in proptest::collection::vec((0..3_u32, 0..4_u32, 0..9_usize, any::<bool>(), any::<bool>()), 1..6),
            avoid in proptest::option::of(0..6_usize),
            turn: usize,
        ) {
            let now = Instant::now();
            let all: Vec<_> = members.iter().map(|&(priority, weight, in_flight, out, rests)| Candidate {
                priority, weight, in_flight, out,
                rests_until: rests.then(|| now + Duration::from_secs(1)),
            }).collect();
            let picked = pick(&all, avoid, now, turn);
            prop_assert_eq!(picked.is_some(), all.iter().any(|c| !c.out));
            prop_assert!(picked.is_none_or(|index| !all[index].out));
        }
    }
}
