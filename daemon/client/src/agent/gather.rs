//! Collects releases into batches: a plain value that is handed `now`.

use std::time::{Duration, Instant};

use claviger_protocol::batch::MAX_ITEMS;

/// Most bytes of protectors in a batch. As base64 in a request, they stay below the largest body that a service
/// accepts.
const MAX_BYTES: usize = 10 * 1024 * 1024;

/// How long releases are collected.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// A batch is sent when no further release has arrived for this time.
    pub quiet: Duration,
    /// A batch is sent at the latest this long after its first release.
    pub longest: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { quiet: Duration::from_millis(150), longest: Duration::from_secs(2) }
    }
}

/// The releases of the next batch.
#[derive(Debug)]
pub struct Gathering<T> {
    pace: Pace,
    items: Vec<T>,
    bytes: usize,
    first: Instant,
    last: Instant,
}

impl<T> Gathering<T> {
    /// Starts a batch at `now` with one protector of `bytes` bytes.
    #[must_use]
    pub fn begin(pace: Pace, item: T, bytes: usize, now: Instant) -> Self {
        Self { pace, items: vec![item], bytes, first: now, last: now }
    }

    /// Adds a release if there is room. Otherwise the release is returned, and the batch is due.
    ///
    /// # Errors
    /// The release.
    pub fn add(&mut self, item: T, bytes: usize, now: Instant) -> Result<(), T> {
        if self.items.len() == MAX_ITEMS || self.bytes + bytes > MAX_BYTES {
            return Err(item);
        }
        self.items.push(item);
        self.bytes += bytes;
        self.last = now;
        Ok(())
    }

    /// The time at which to send the batch.
    #[must_use]
    pub fn due(&self) -> Instant {
        if self.items.len() == MAX_ITEMS {
            return self.last;
        }
        (self.last + self.pace.quiet).min(self.first + self.pace.longest)
    }

    /// The releases.
    #[must_use]
    pub(crate) fn into_items(self) -> Vec<T> {
        self.items
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const PACE: Pace = Pace { quiet: Duration::from_millis(100), longest: Duration::from_millis(1000) };

    #[test]
    fn a_batch_goes_when_none_comes_any_more_or_its_first_has_waited_long_enough() {
        let begun = Instant::now();
        let mut batch = Gathering::begin(PACE, 0, 1, begun);
        assert_eq!(batch.due(), begun + 100 * MS);
        for at in 1..=95 {
            assert_eq!(batch.add(at, 1, begun + at * 10 * MS), Ok(()));
            let expected = (at * 10 + 100).min(1000);
            assert_eq!(batch.due(), begun + expected * MS);
        }
        assert_eq!(batch.into_items(), (0..=95).collect::<Vec<_>>());
    }

    #[test]
    fn a_full_batch_goes_at_once() {
        let begun = Instant::now();
        let mut batch = Gathering::begin(PACE, 0, 1, begun);
        for at in 1..MAX_ITEMS {
            assert_eq!(batch.add(at, 1, begun + MS), Ok(()));
        }
        assert_eq!((batch.due(), batch.add(7, 1, begun + MS)), (begun + MS, Err(7)));
        let mut batch = Gathering::begin(PACE, 0, MAX_BYTES - 5, begun);
        assert_eq!((batch.add(1, 6, begun), batch.add(2, 5, begun)), (Err(1), Ok(())));
    }
}
