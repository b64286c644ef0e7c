//! How many waiting jobs a free session takes. A plain function: no clock, no threads.

/// What a free session takes of `waiting` jobs, when the member has `sessions` open, itself among them: its fair share,
/// rounded up, but at most `most`. The others will be free soon, and what one session takes is done one after the
/// other; had it taken everything, the others would idle.
///
/// It takes at least one when anything waits: a batch is what has gathered while all sessions were busy, and nobody
/// ever waits for one to fill.
#[must_use]
pub fn share(waiting: usize, sessions: usize, most: usize) -> usize {
    waiting.div_ceil(sessions.max(1)).min(most.max(1))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    fn config() -> ProptestConfig {
        ProptestConfig {
            cases: 2_000,
            rng_seed: RngSeed::Fixed(1),
            failure_persistence: None,
            ..ProptestConfig::default()
        }
    }

    /// What `sessions` sessions take in turn until nothing waits.
    fn takes(mut waiting: usize, sessions: usize, most: usize) -> Vec<usize> {
        let mut takes = Vec::new();
        while waiting > 0 {
            let taken = share(waiting, sessions, most);
            assert!(taken > 0 && taken <= waiting);
            waiting -= taken;
            takes.push(taken);
        }
        takes
    }

    #[test]
    fn shares_are_fair_and_bounded() {
        assert_eq!(share(0, 8, 16), 0);
        assert_eq!(share(1, 8, 16), 1, "nobody waits for company");
        assert_eq!(share(8, 8, 16), 1);
        assert_eq!(share(9, 8, 16), 2);
        assert_eq!(share(1_000, 8, 16), 16);
        assert_eq!(share(5, 1, 16), 5, "alone it takes all");
        assert_eq!(share(5, 0, 0), 1, "never nothing, whatever the settings");
        assert_eq!(share(usize::MAX, 1, usize::MAX), usize::MAX);
        assert_eq!(takes(20, 4, 16), [5, 4, 3, 2, 2, 1, 1, 1, 1]);
    }

    proptest! {
        #![proptest_config(config())]

        #[test]
        fn takes_empty_the_queue(waiting in 0..5_000_usize, sessions in 1..65_usize, most in 1..65_usize) {
            let takes = takes(waiting, sessions, most);
            prop_assert_eq!(takes.iter().sum::<usize>(), waiting);
            prop_assert!(takes.iter().all(|taken| *taken <= most && *taken <= waiting.div_ceil(sessions)));
            prop_assert!(takes.is_sorted_by(|earlier, later| earlier >= later), "less waits, less is taken");
            // Work-conserving, and yet few trips: each turn of all sessions takes over 1 - 1/e of what waits, or a full
            // batch each.
            let turns = takes.len().div_ceil(sessions);
            let full = waiting / (sessions * most);
            prop_assert!(turns <= full + 3 + waiting.checked_ilog2().unwrap_or(0) as usize, "{} turns", turns);
        }

        #[test]
        fn nobody_idles_while_another_has_more_than_its_share(
            waiting in 0..5_000_usize, sessions in 1..65_usize, most in 1..65_usize,
        ) {
            let takes = takes(waiting, sessions, most);
            let held: Vec<_> = (0..sessions).map(|session| takes.get(session).copied().unwrap_or(0)).collect();
            let largest = held.iter().max().copied().unwrap_or(0);
            prop_assert!(largest <= waiting.div_ceil(sessions));
            if held.contains(&0) {
                prop_assert!(largest <= 1, "{:?}", held);
            }
        }

        #[test]
        fn more_waiting_is_never_less_taken(waiting: u16, sessions in 0..65_usize, most in 0..65_usize) {
            let waiting = usize::from(waiting);
            prop_assert!(share(waiting, sessions, most) <= share(waiting + 1, sessions, most));
            prop_assert!(share(waiting, sessions + 1, most) <= share(waiting, sessions, most));
            prop_assert!(share(waiting, sessions, most) <= share(waiting, sessions, most + 1));
            prop_assert_eq!(share(waiting, sessions, most) == 0, waiting == 0);
        }
    }
}
