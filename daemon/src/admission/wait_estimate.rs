//! How long releases take now, learned from those that ended.

use std::time::Duration;

/// Weight of one observation in the mean deviation.
const DEVIATION_GAIN: f64 = 1.0 / 8.0;

/// The mean covers the latest releases: a quarter of the number of waiting ones, but within these limits. If few
/// wait, the mean follows the load at once. If many wait, a short pause of the HSMs or the processors does not count
/// as a backlog of seconds.
const OF_THOSE_THAT_WAIT: f64 = 1.0 / 4.0;
const MEAN_OF: (f64, f64) = (16.0, 1024.0);

/// Deviations above the mean within which nearly every release ends; the figure of TCP's retransmission timer (RFC 6298).
const DEVIATIONS: f64 = 4.0;

/// What is added to an expected wait: who is let wait and then refused has waited for nothing.
const CAUTION: f64 = 1.2;

/// Moving mean of the time that releases hold their permits, and of its distance from the mean; in seconds. Before the
/// first one has ended both are zero, and nothing is refused for being late.
#[derive(Debug, Default)]
pub(super) struct Pace {
    mean: f64,
    deviation: f64,
    begun: bool,
}

impl Pace {
    /// A release ended. It held its permit for this time, and this number of requests waited.
    pub(super) fn ended(&mut self, held: Duration, waiting: usize) {
        let held = held.as_secs_f64();
        if std::mem::replace(&mut self.begun, true) {
            self.deviation += ((held - self.mean).abs() - self.deviation) * DEVIATION_GAIN;
            self.mean += (held - self.mean) / (waiting as f64 * OF_THOSE_THAT_WAIT).clamp(MEAN_OF.0, MEAN_OF.1);
        } else {
            (self.mean, self.deviation) = (held, held / 2.0);
        }
    }

    /// The time that nearly every release keeps to.
    pub(super) fn run(&self) -> Duration {
        Duration::from_secs_f64(self.mean + DEVIATIONS * self.deviation)
    }

    /// The time in which `places` permits are handed over when `concurrency` of them are in use. The interval between two
    /// is the mean time that one is held divided by their number (Little's law), which follows the load without having to
    /// know whether there was enough of it.
    pub(super) fn drain(&self, places: usize, concurrency: usize) -> Duration {
        Duration::from_secs_f64(self.mean * places as f64 / concurrency.max(1) as f64)
    }

    /// How long somebody has to expect to wait with `ahead` others ahead, on the cautious side.
    pub(super) fn wait(&self, ahead: usize, concurrency: usize) -> Duration {
        self.drain(ahead + 1, concurrency).mul_f64(CAUTION)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_follow_what_happens() {
        let mut pace = Pace::default();
        assert_eq!((pace.run(), pace.wait(1000, 4)), (Duration::ZERO, Duration::ZERO));
        pace.ended(Duration::from_millis(100), 0);
        assert_eq!(pace.run(), Duration::from_millis(300));
        for _ in 0..200 {
            pace.ended(Duration::from_millis(100), 0);
        }
        assert!(pace.run() < Duration::from_millis(101), "{:?}", pace.run());
        assert_eq!(pace.drain(8, 4).as_millis(), 200);
        assert_eq!(pace.wait(7, 4).as_millis(), 240);
        // Twice as slow: known after a few dozen.
        for _ in 0..64 {
            pace.ended(Duration::from_millis(200), 0);
        }
        assert!(pace.drain(1, 1) > Duration::from_millis(195), "{:?}", pace.drain(1, 1));
        // Times that vary are covered: nine of ten take 100 ms, one takes 200.
        for at in 0..1000 {
            pace.ended(Duration::from_millis(if at % 10 == 0 { 200 } else { 100 }), 0);
        }
        assert!(pace.run() > Duration::from_millis(150), "{:?}", pace.run());
    }

    #[test]
    fn a_stutter_does_not_count_for_a_long_backlog() {
        let mut pace = Pace::default();
        (0..2_000).for_each(|_| pace.ended(Duration::from_millis(30), 2_000));
        // 24 releases run at a time, and once all of them take 150 ms longer.
        (0..24).for_each(|_| pace.ended(Duration::from_millis(180), 2_000));
        let wait = pace.drain(2_000, 24);
        assert!(wait < Duration::from_secs_f64(2.5 * 1.3), "{wait:?}");
        // A lasting change is known before half of the backlog is finished.
        (0..1_000).for_each(|_| pace.ended(Duration::from_millis(180), 2_000));
        assert!(pace.drain(2_000, 24) > Duration::from_secs(12), "{:?}", pace.drain(2_000, 24));
    }
}
