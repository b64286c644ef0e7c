//! How far the trail has come.

use std::time::Instant;

use super::chain::Link;

/// How far the trail has come.
#[derive(Clone, Copy, Debug, Default)]
pub struct Head {
    /// The last line.
    pub link: Link,
    /// Records of this process, which checkpoints are not.
    pub records: u64,
    /// How many of them a checkpoint covers.
    pub covered: u64,
    /// Since when there are records that none covers.
    pub unsigned_since: Option<Instant>,
    /// The last line that a checkpoint of this process covers.
    pub checkpoint: Option<u64>,
    /// How much of the reserve is missing, in bytes.
    pub reserve_missing: u64,
    /// Whether the last group of records could not be written.
    pub failing: bool,
}

impl Head {
    /// Records that no checkpoint covers.
    #[must_use]
    pub fn unsigned(&self) -> u64 {
        self.records.saturating_sub(self.covered)
    }
}
