//! Limits a log line to one per second, however often its cause occurs.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::lock::lock;

const PAUSE: Duration = Duration::from_secs(1);

/// Decides when a line is due.
#[derive(Debug)]
pub struct Throttle(Mutex<(Option<Instant>, u64)>);

impl Throttle {
    /// For one kind of line.
    #[must_use]
    pub const fn new() -> Self {
        Self(Mutex::new((None, 0)))
    }

    /// Whether to log now; if so, the number of lines that were suppressed since the last one.
    pub fn due(&self, now: Instant) -> Option<u64> {
        let mut state = lock(&self.0);
        let (said, unsaid) = &mut *state;
        if said.is_some_and(|at| now.saturating_duration_since(at) < PAUSE) {
            *unsaid += 1;
            return None;
        }
        *said = Some(now);
        Some(std::mem::take(unsaid))
    }
}

impl Default for Throttle {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_a_second_with_the_number_of_the_unsaid() {
        let (throttle, now) = (Throttle::new(), Instant::now());
        assert_eq!(throttle.due(now), Some(0));
        assert_eq!(throttle.due(now), None);
        assert_eq!(throttle.due(now + PAUSE / 2), None);
        assert_eq!(throttle.due(now + PAUSE), Some(2));
        assert_eq!(throttle.due(now + PAUSE * 2), Some(0));
    }
}
