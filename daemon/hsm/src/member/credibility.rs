//! Credibility of a member's rejections: decides whether to believe that an input is invalid. A plain value that is handed
//! `now`.

use std::time::{Duration, Instant};

/// Minimum time between known-answer tests that are caused by rejected input. The limit keeps a flood of bad input from
/// slowing down honest callers.
const TEST_PAUSE: Duration = Duration::from_millis(100);
/// Time for which the rejections of a member that was proved wrong do not count.
const DOUBTFUL: Duration = Duration::from_secs(10);

/// State of the credibility of one member.
#[derive(Debug, Default)]
pub(crate) struct Credibility {
    tested_at: Option<Instant>,
    /// True if the last such test failed.
    failed: bool,
    doubtful_until: Option<Instant>,
}

impl Credibility {
    /// Returns true if a known-answer test must be run now. The caller then reports its result to [`tested`](Self::tested).
    pub(crate) fn wants_test(&mut self, now: Instant) -> bool {
        let due = self.tested_at.is_none_or(|at| now.saturating_duration_since(at) >= TEST_PAUSE);
        if due {
            self.tested_at = Some(now);
        }
        due
    }

    /// Records the result of a test that [`wants_test`](Self::wants_test) asked for.
    pub(crate) fn tested(&mut self, passed: bool) {
        self.failed = !passed;
    }

    /// Returns true if the last test passed or if there was none.
    pub(crate) fn passed(&self) -> bool {
        !self.failed
    }

    /// Records that another member's result proved this member wrong.
    pub(crate) fn contradicted(&mut self, now: Instant) {
        self.doubtful_until = Some(now + DOUBTFUL);
    }

    /// Returns true if the member was proved wrong a short time ago.
    pub(crate) fn is_doubtful(&self, now: Instant) -> bool {
        self.doubtful_until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_bad_input_is_tested_now_and_then() {
        let start = Instant::now();
        let mut credibility = Credibility::default();
        assert!(credibility.passed());
        let tests = (0..1_000).filter(|ms| credibility.wants_test(start + Duration::from_millis(*ms))).count();
        assert_eq!(tests, 10);
        credibility.tested(false);
        assert!(!credibility.passed());
        credibility.tested(true);
        assert!(credibility.passed());
    }

    #[test]
    fn a_contradicted_member_is_doubted_for_a_while() {
        let now = Instant::now();
        let mut credibility = Credibility::default();
        assert!(!credibility.is_doubtful(now));
        credibility.contradicted(now);
        assert!(credibility.is_doubtful(now + DOUBTFUL / 2));
        assert!(!credibility.is_doubtful(now + DOUBTFUL));
    }
}
