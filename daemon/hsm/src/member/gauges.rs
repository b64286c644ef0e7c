//! Figures that the balancer reads of a member: atomics only.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize};

use crate::config::MemberConfig;

#[derive(Debug)]
pub(super) struct Gauges {
    /// Follows the state: written only under the machine's lock.
    pub(super) serving: AtomicBool,
    /// Latency estimate in nanoseconds.
    pub(super) latency: AtomicU64,
    /// Age of the oldest running call at the last check, in nanoseconds; 0 if no call runs.
    pub(super) oldest: AtomicU64,
    /// Number of calls that wait or run.
    pub(super) in_flight: AtomicUsize,
    pub(super) priority: AtomicU32,
    pub(super) weight: AtomicU32,
    /// True if the member is known to lack a key. While it is false, the list of missing keys need not be read.
    pub(super) lacks_keys: AtomicBool,
}

impl Gauges {
    pub(super) fn new(config: &MemberConfig) -> Self {
        Gauges {
            serving: AtomicBool::new(false),
            latency: AtomicU64::new(0),
            oldest: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            priority: AtomicU32::new(config.priority),
            weight: AtomicU32::new(config.weight),
            lacks_keys: AtomicBool::new(false),
        }
    }
}
