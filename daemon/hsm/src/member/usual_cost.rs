//! Reported cost of decryptions whose result is refused.
//!
//! A caller must not learn which step of a decryption refused its ciphertext. Exact sums of service times would reveal it:
//! a token returns early if the padding is broken. So a refused decryption is recorded with the usual cost of an accepted
//! one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::link::{Cost, nanos};

/// Cost recorded before any operation was accepted.
const UNKNOWN: Duration = Duration::from_millis(1);
/// Weight of the latest operation in the average is one part in this number.
const INERTIA: u64 = 8;

/// Moving averages over the accepted operations of one kind at one member.
#[derive(Debug, Default)]
pub(crate) struct UsualCost {
    /// Nanoseconds; 0 without a sample.
    took: AtomicU64,
    processor: AtomicU64,
}

impl UsualCost {
    /// Returns the cost to record: an accepted operation's own cost, which also updates the average; the average for
    /// others.
    pub(crate) fn booked(&self, own: Cost, accepted: bool) -> Cost {
        if accepted {
            learn(&self.took, own.took);
            learn(&self.processor, own.processor);
            return own;
        }
        let read = |average: &AtomicU64| Duration::from_nanos(average.load(Ordering::Relaxed));
        let took = Some(read(&self.took)).filter(|took| !took.is_zero()).unwrap_or(UNKNOWN);
        Cost { took, processor: read(&self.processor) }
    }
}

/// Updates a moving average. A race between two threads may lose one sample.
fn learn(average: &AtomicU64, sample: Duration) {
    let sample = nanos(sample);
    let before = average.load(Ordering::Relaxed);
    let after = if before == 0 { sample } else { before - before / INERTIA + sample / INERTIA };
    average.store(after, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(took: u64, processor: u64) -> Cost {
        Cost { took: Duration::from_micros(took), processor: Duration::from_micros(processor) }
    }

    #[test]
    fn what_is_refused_costs_what_is_usual() {
        let usual = UsualCost::default();
        assert_eq!(usual.booked(cost(3, 2), false), Cost { took: UNKNOWN, processor: Duration::ZERO });
        assert_eq!(usual.booked(cost(800, 400), true), cost(800, 400));
        for own in [cost(1, 1), cost(5_000_000, 9)] {
            assert_eq!(usual.booked(own, false), cost(800, 400), "whatever it took itself");
        }
        assert_eq!(usual.booked(cost(1600, 800), true), cost(1600, 800));
        assert_eq!(usual.booked(cost(1, 1), false), cost(900, 450));
    }

    #[test]
    fn averages_stay_between_what_was_seen() {
        let usual = UsualCost::default();
        for sample in [10, 1000, 10, 1000, 500] {
            usual.booked(cost(sample, sample), true);
            let Cost { took, processor } = usual.booked(cost(0, 0), false);
            assert!((9..=1000).contains(&took.as_micros()) && took == processor, "{took:?}");
        }
        usual.booked(Cost { took: Duration::MAX, processor: Duration::ZERO }, true);
    }
}
