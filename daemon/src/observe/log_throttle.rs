//! Log lines that come once a second at most, however often there is a reason for them.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use claviger_process::lock::lock;

const PAUSE: Duration = Duration::from_secs(1);

/// Says when a line is due.
#[derive(Debug)]
pub struct Throttle(Mutex<(Option<Instant>, u64)>);

impl Throttle {
    /// For one kind of line.
    #[must_use]
    pub const fn new() -> Self {
        Self(Mutex::new((None, 0)))
    }

    /// Whether to say it now, and if so how often it was not said since it last was.
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
