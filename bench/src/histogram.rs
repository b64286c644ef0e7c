//! Times in histograms.

use std::time::Duration;

use hdrhistogram::Histogram;

/// An empty histogram of times up to a minute, in nanoseconds, to three digits.
#[must_use]
pub fn nanoseconds() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).unwrap()
}

/// Counts a time. A time above the maximum of the histogram counts as the maximum.
pub fn record(histogram: &mut Histogram<u64>, time: Duration) {
    histogram.saturating_record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1));
}

/// A quantile, in seconds.
#[must_use]
pub fn seconds(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1e9
}
