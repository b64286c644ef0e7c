//! Credibility of a member's rejections: decides whether to believe that an input is invalid. Plain values that are handed
//! `now`.
//!
//! A result may be wrong because of the input, because of one key on the token, or because of the whole token. Known-answer
//! tests that begin after the result decide: [`verdict`]. [`Credibility`] limits their number and remembers their results.

use std::time::{Duration, Instant};

use super::failover::REJECTION_QUORUM;

/// Mean time between exams that are caused by doubtful results. The limit keeps a flood of bad input from slowing down
/// honest callers at the token; and while results wait for it, they keep their turns from honest callers.
const TEST_PAUSE: Duration = Duration::from_millis(50);
/// Number of such tests that may follow each other without a pause: those of one input that the same member rejects each
/// time.
const TESTS_AT_ONCE: u32 = REJECTION_QUORUM as u32;
/// Number of tests in a row that prove a member faulty although none of them does alone. A throttled token passes some.
const FAILED_TESTS: u32 = 5;
/// Time for which the rejections of a member that was proved wrong do not count.
const DOUBTFUL: Duration = Duration::from_secs(10);

/// The party at fault for a doubtful result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict<E> {
    /// The member works, so the input is invalid.
    Input,
    /// The key does not work on this token. The token itself works.
    Key,
    /// The member does not work, or did not prove that it works.
    Member(E),
}

/// Returns the party at fault. `key` is the result of the test with the key of the doubtful result. `token` is the result of
/// the test that every member must pass; it is needed only if `key` failed, and is `None` if both are the same test.
pub fn verdict<E>(key: Result<(), E>, token: Option<Result<(), E>>) -> Verdict<E> {
    match (key, token) {
        (Ok(()), _) => Verdict::Input,
        (Err(_), Some(Ok(()))) => Verdict::Key,
        (Err(_), Some(Err(error))) | (Err(error), None) => Verdict::Member(error),
    }
}

/// State of the credibility of one member.
#[derive(Debug, Default)]
pub struct Credibility {
    /// Time of the next test if all tests were a [`TEST_PAUSE`] apart.
    next_test: Option<Instant>,
    /// Time at which the last reserved test may begin.
    begins: Option<Instant>,
    /// Number of tests in a row that failed.
    failed_tests: u32,
    doubtful_until: Option<Instant>,
}

impl Credibility {
    /// Reserves a test and returns the time at which it may begin. Different tests that wait begin together: else the wait
    /// would grow with their number, which callers choose by the keys and algorithms of their bad input.
    pub fn reserve_test(&mut self, now: Instant) -> Instant {
        if let Some(begins) = self.begins.filter(|begins| *begins > now) {
            return begins;
        }
        let regular = self.next_test.map_or(now, |at| at.max(now));
        self.next_test = Some(regular + TEST_PAUSE);
        let begins = regular.checked_sub(TEST_PAUSE * (TESTS_AT_ONCE - 1)).map_or(now, |at| at.max(now));
        self.begins = Some(begins);
        begins
    }

    /// Records that the member gave a right result.
    pub fn proved_right(&mut self) {
        self.failed_tests = 0;
    }

    /// Records that a test failed. Returns true if so many failed in a row that the member is faulty.
    pub fn test_failed(&mut self) -> bool {
        self.failed_tests = self.failed_tests.saturating_add(1);
        self.failed_tests >= FAILED_TESTS
    }

    /// Records that another member's result proved this member wrong.
    pub fn contradicted(&mut self, now: Instant) {
        self.doubtful_until = Some(now + DOUBTFUL);
    }

    /// Records that the member has a fresh worker: tests of the last one do not count. That the member was proved wrong
    /// still does.
    pub fn fresh_worker(&mut self) {
        *self = Credibility { doubtful_until: self.doubtful_until, ..Credibility::default() };
    }

    /// Returns true if the member's rejections count: the last test passed, and the member was not proved wrong a short
    /// time ago.
    #[must_use]
    pub fn is_believed(&self, now: Instant) -> bool {
        self.failed_tests == 0 && self.doubtful_until.is_none_or(|until| until <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_party_at_fault_is_known_from_two_tests() {
        for (key, token, expected) in [
            (Ok(()), None, Verdict::Input),
            (Err("key"), None, Verdict::Member("key")),
            (Err("key"), Some(Ok(())), Verdict::Key),
            (Err("key"), Some(Err("token")), Verdict::Member("token")),
        ] {
            assert_eq!(verdict(key, token), expected, "{key:?}, {token:?}");
        }
    }

    #[test]
    fn a_flood_of_bad_input_is_tested_now_and_then() {
        let start = Instant::now();
        let mut credibility = Credibility::default();
        let mut now = start;
        let mut begun = Vec::new();
        while now < start + Duration::from_secs(1) {
            // Results that become doubtful before the test begins wait for it too; the next one needs another test.
            now = credibility.reserve_test(now);
            begun.push(now);
            now += Duration::from_millis(1);
        }
        assert!((24..=26).contains(&begun.len()), "{}", begun.len());
        assert_eq!(begun[4], start + Duration::from_millis(4), "the first ones follow each other at once");
        assert!(begun.windows(2).skip(6).all(|pair| pair[1] - pair[0] == TEST_PAUSE), "{begun:?}");
        let later = start + Duration::from_secs(10);
        assert_eq!(credibility.reserve_test(later), later);
    }

    #[test]
    fn different_tests_that_wait_begin_together() {
        let now = Instant::now();
        let mut credibility = Credibility::default();
        let begins: Vec<_> = (0..100).map(|_| credibility.reserve_test(now)).collect();
        assert!(begins[..TESTS_AT_ONCE as usize].iter().all(|at| *at == now));
        assert!(begins[TESTS_AT_ONCE as usize..].iter().all(|at| *at == now + TEST_PAUSE), "{begins:?}");
    }

    #[test]
    fn tests_that_fail_in_a_row_prove_a_fault() {
        let now = Instant::now();
        let mut credibility = Credibility::default();
        assert!(credibility.is_believed(now));
        for _ in 0..10 {
            assert!((1..FAILED_TESTS).all(|_| !credibility.test_failed()));
            assert!(!credibility.is_believed(now));
            credibility.proved_right();
            assert!(credibility.is_believed(now));
        }
        assert!((1..FAILED_TESTS).all(|_| !credibility.test_failed()));
        assert!(credibility.test_failed());
        credibility.fresh_worker();
        assert!(credibility.is_believed(now));
    }

    #[test]
    fn a_contradicted_member_is_doubted_for_a_while() {
        let now = Instant::now();
        let mut credibility = Credibility::default();
        credibility.contradicted(now);
        credibility.fresh_worker();
        assert!(!credibility.is_believed(now + DOUBTFUL / 2));
        assert!(credibility.is_believed(now + DOUBTFUL));
    }
}
