//! The position of the trail.

use std::time::Instant;

use super::chain::Link;

/// The position of the trail.
#[derive(Clone, Copy, Debug, Default)]
pub struct Head {
    /// The last line.
    pub link: Link,
    /// Number of records by this process, without checkpoints.
    pub records: u64,
    /// Number of these that a checkpoint covers.
    pub covered: u64,
    /// Since when there are uncovered records.
    pub unsigned_since: Option<Instant>,
    /// The last line that a checkpoint of this process covers.
    pub checkpoint: Option<u64>,
    /// Missing bytes of the reserve.
    pub reserve_missing: u64,
    /// Whether the last group of records could not be written.
    pub failing: bool,
}

impl Head {
    /// Number of records without a checkpoint.
    #[must_use]
    pub fn unsigned(&self) -> u64 {
        self.records.saturating_sub(self.covered)
    }
}
