//! The data that the balancer reads of a member: atomics only, except for a member that lacks keys.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use claviger_process::lock::lock;

use super::parts::{LACKS, MOST_LACKING, Member};
use crate::identity::KeyRef;
use crate::policy::pick::Candidate;

impl Member {
    pub(crate) fn priority(&self) -> u32 {
        self.gauges.priority.load(Ordering::Relaxed)
    }

    /// Returns the member's data for [`pick`](crate::policy::pick::pick); `None` if it cannot take a call now. Reads only
    /// atomics, unless the member lacks keys.
    pub(crate) fn candidate(&self, key: Option<&KeyRef>, now: Instant) -> Option<Candidate> {
        let gauges = &self.gauges;
        let in_flight = gauges.in_flight.load(Ordering::Acquire);
        let oldest = Duration::from_nanos(gauges.oldest.load(Ordering::Relaxed));
        let able = gauges.serving.load(Ordering::Acquire)
            && in_flight < self.config.queue.max(1)
            && !key.is_some_and(|key| self.lacks(key, now));
        able.then(|| Candidate {
            weight: gauges.weight.load(Ordering::Relaxed),
            latency: Duration::from_nanos(gauges.latency.load(Ordering::Relaxed)),
            oldest: Some(oldest).filter(|oldest| in_flight > 0 && !oldest.is_zero()),
            in_flight,
        })
    }

    /// Returns true if the member takes calls.
    pub(crate) fn is_serving(&self) -> bool {
        self.gauges.serving.load(Ordering::Acquire)
    }

    /// Returns true if the member would serve if it had the key.
    pub(crate) fn only_lacks(&self, key: &KeyRef, now: Instant) -> bool {
        self.is_serving() && self.lacks(key, now)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.is_serving() && self.gauges.in_flight.load(Ordering::Acquire) >= self.config.queue.max(1)
    }

    /// Returns the time of the fault after which a fresh worker is being started; `None` if the member serves or is not
    /// restarting.
    pub(crate) fn returning_since(&self) -> Option<Instant> {
        self.machine().returning_since()
    }

    /// Returns true if the member was proved wrong a short time ago.
    pub(crate) fn is_doubtful(&self, now: Instant) -> bool {
        lock(&self.credibility).is_doubtful(now)
    }

    /// Returns the number of the current worker.
    pub(crate) fn generation(&self) -> u64 {
        self.workers.load(Ordering::Acquire)
    }

    fn lacks(&self, key: &KeyRef, now: Instant) -> bool {
        self.gauges.lacks_keys.load(Ordering::Acquire) && lock(&self.lacking).get(key).is_some_and(|until| now < *until)
    }

    pub(super) fn remember_lack(&self, key: &KeyRef, now: Instant) {
        let mut lacking = lock(&self.lacking);
        lacking.retain(|_, until| now < *until);
        if lacking.len() < MOST_LACKING {
            lacking.insert(key.clone(), now + LACKS);
            self.gauges.lacks_keys.store(true, Ordering::Release);
        }
    }

    pub(super) fn forget_lacks(&self) {
        lock(&self.lacking).clear();
        self.gauges.lacks_keys.store(false, Ordering::Release);
    }

    pub(crate) fn rank(&self, priority: u32, weight: u32) {
        self.gauges.priority.store(priority, Ordering::Relaxed);
        self.gauges.weight.store(weight, Ordering::Relaxed);
    }
}
