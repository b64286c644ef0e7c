//! Whether to believe a member that says an input is bad. A plain value that is handed `now`.

use std::time::{Duration, Instant};

/// How often a member may be asked to pass a known-answer test because of answers that may be the caller's fault: a flood of bad
/// input costs the honest callers little.
const TEST_PAUSE: Duration = Duration::from_millis(100);
/// How long the opinion of a member that was proved wrong does not count.
const DOUBTFUL: Duration = Duration::from_secs(10);

/// What is known about a member's opinions.
#[derive(Debug, Default)]
pub(crate) struct Credibility {
    tested_at: Option<Instant>,
    /// The last such test went wrong.
    failed: bool,
    doubtful_until: Option<Instant>,
}

impl Credibility {
    /// Whether to make a known-answer test now. If so, its result has to be [told](Self::tested).
    pub(crate) fn wants_test(&mut self, now: Instant) -> bool {
        let due = self.tested_at.is_none_or(|at| now.saturating_duration_since(at) >= TEST_PAUSE);
        if due {
            self.tested_at = Some(now);
        }
        due
    }

    /// How a test went that was wanted.
    pub(crate) fn tested(&mut self, passed: bool) {
        self.failed = !passed;
    }

    /// Whether the last test passed. Before any test a member is believed.
    pub(crate) fn passed(&self) -> bool {
        !self.failed
    }

    /// Another member's answer proved this one wrong.
    pub(crate) fn contradicted(&mut self, now: Instant) {
        self.doubtful_until = Some(now + DOUBTFUL);
    }

    /// Whether the member was proved wrong a short time ago.
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
