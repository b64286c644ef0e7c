//! The data that the balancer reads of a member: atomics only, except for a member that lacks keys.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use claviger_process::lock::lock;

use super::parts::{LACKS, MOST_LACKING, Member};
use crate::job::{Job, Need};
use crate::policy::pick::Candidate;

impl Member {
    pub(crate) fn priority(&self) -> u32 {
        self.gauges.priority.load(Ordering::Relaxed)
    }

    /// Returns the member's data for [`pick`](crate::policy::pick::pick); `None` if it cannot take a call now. Reads only
    /// atomics, unless the member lacks keys.
    pub(crate) fn candidate(&self, need: Option<&Need>, now: Instant) -> Option<Candidate> {
        let gauges = &self.gauges;
        let in_flight = gauges.in_flight.load(Ordering::Acquire);
        let oldest = Duration::from_nanos(gauges.oldest.load(Ordering::Relaxed));
        let able = gauges.serving.load(Ordering::Acquire)
            && in_flight < self.config.queue.max(1)
            && !need.is_some_and(|need| self.lacks(need, now));
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

    /// Returns true if the member would serve if it had the key and could use it.
    pub(crate) fn only_lacks(&self, need: &Need, now: Instant) -> bool {
        self.is_serving() && self.lacks(need, now)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.is_serving() && self.gauges.in_flight.load(Ordering::Acquire) >= self.config.queue.max(1)
    }

    /// Returns the time of the fault after which a fresh worker is being started; `None` if the member serves or is not
    /// restarting.
    pub(crate) fn returning_since(&self) -> Option<Instant> {
        self.machine().returning_since()
    }

    /// Returns true if a rejection by the worker of this number counts.
    pub(crate) fn is_believed(&self, number: u64, now: Instant) -> bool {
        number == self.generation() && lock(&self.credibility).is_believed(now)
    }

    /// Returns the number of the current worker.
    pub(crate) fn generation(&self) -> u64 {
        self.workers.load(Ordering::Acquire)
    }

    fn lacks(&self, need: &Need, now: Instant) -> bool {
        self.gauges.lacks_keys.load(Ordering::Acquire)
            && lock(&self.lacking).get(need).is_some_and(|until| now < *until)
    }

    /// Remembers that the token cannot do this job, for lack of the key or because the key does not work in this way.
    pub(super) fn remember_lack(&self, job: &Job, now: Instant) {
        let Some(need) = &job.need else { return };
        let mut lacking = lock(&self.lacking);
        lacking.retain(|_, until| now < *until);
        if lacking.len() < MOST_LACKING {
            lacking.insert(need.clone(), now + LACKS);
            self.gauges.lacks_keys.store(true, Ordering::Release);
        }
    }

    /// Forgets that the token could not do this job, since it has done it.
    pub(super) fn forget_lack(&self, job: &Job) {
        if let Some(need) = &job.need {
            lock(&self.lacking).remove(need);
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
