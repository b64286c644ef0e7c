//! How many refusals may have a line of their own: a bucket that fills with time, as a plain value that is handed `now`.
//!
//! A refusal to a known host has a line, and a health certificate that was seen on its way lets anybody cause one. Beyond the
//! allowance refusals are counted, like those of unknown callers: the disk is for grants and administration.

use std::time::Instant;

/// Lines a second in the long run: some 1 GB a day, at 600 bytes for a line.
const RATE: f64 = 20.0;

/// Lines at once.
const BURST: f64 = 4096.0;

/// The lines that refusals may have.
#[derive(Debug)]
pub(super) struct Allowance {
    left: f64,
    at: Instant,
}

impl Allowance {
    /// A full one.
    pub(super) fn new(now: Instant) -> Self {
        Self { left: BURST, at: now }
    }

    /// Takes a line, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + passed * RATE).min(BURST);
        self.at = self.at.max(now);
        let may = self.left >= 1.0;
        if may {
            self.left -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn refusals_have_lines_at_once_and_then_as_many_as_time_brings() {
        let begun = Instant::now();
        let mut allowance = Allowance::new(begun);
        let taken = |allowance: &mut Allowance, now| (0..10_000).filter(|_| allowance.take(now)).count();
        assert_eq!(taken(&mut allowance, begun), 4096);
        assert_eq!(taken(&mut allowance, begun + Duration::from_secs(10)), 200);
        // A clock that goes back brings nothing.
        assert_eq!(taken(&mut allowance, begun), 0);
        assert_eq!(taken(&mut allowance, begun + Duration::from_secs(10)), 0);
        assert_eq!(taken(&mut allowance, begun + Duration::from_secs(3600)), 4096);
    }
}
