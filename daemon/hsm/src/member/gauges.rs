//! What the balancer reads of a member: atomics only.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize};

use crate::config::MemberConfig;

/// What a balancer reads of a member: atomics only.
#[derive(Debug)]
pub(super) struct Gauges {
    /// Written under the machine's lock only, so that it follows the state.
    pub(super) serving: AtomicBool,
    /// The latency estimate, in nanoseconds.
    pub(super) latency: AtomicU64,
    /// The age of the oldest running call when it was last looked at, in nanoseconds; 0: none runs.
    pub(super) oldest: AtomicU64,
    /// Calls that wait or run.
    pub(super) in_flight: AtomicUsize,
    pub(super) priority: AtomicU32,
    pub(super) weight: AtomicU32,
    /// Whether any key is known to be lacking, so that the list need not be looked at.
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
