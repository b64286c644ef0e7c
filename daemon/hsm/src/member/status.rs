//! What a member shows of itself: to people and metrics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::parts::Member;
use super::state::{LastError, MemberState};
use crate::lock::lock;
use crate::standstill;

/// How a member is.
#[derive(Clone, Debug)]
pub struct MemberStatus {
    /// Its name.
    pub name: String,
    /// The token that it is.
    pub token: String,
    /// What it is doing.
    pub state: MemberState,
    /// Since when it is up, or is not.
    pub since: std::time::SystemTime,
    /// Members with the smallest number serve while any of them can.
    pub priority: u32,
    /// Share of the load within a priority.
    pub weight: u32,
    /// The moving estimate of what a call takes there, queueing included.
    pub latency: Duration,
    /// Calls that wait or run.
    pub in_flight: usize,
    /// Calls that wait for a session.
    pub waiting: usize,
    /// Sessions for operations; the one that holds the login is not counted.
    pub sessions_open: usize,
    /// Sessions that the configuration asks for.
    pub sessions_wanted: usize,
    /// Sessions that there can be: fewer than asked for where the token gave fewer.
    pub sessions_limit: usize,
    /// Sessions that are in a call.
    pub sessions_busy: usize,
    /// Calls that hang, until their worker is killed.
    pub sessions_stuck: usize,
    /// How often a fault took it down.
    pub closings: u64,
    /// Operations of its token that returned.
    pub calls: u64,
    /// Those of them that failed by its own fault.
    pub faults: u64,
    /// How long its sessions were in operations that returned, together.
    pub worked: Duration,
    /// Processor time of its workers within operations of the token: the vendor's library, all of the work where the token is
    /// software.
    pub spent: Duration,
    /// The process id of its worker, while there is one.
    pub worker: Option<u32>,
    /// Processor time of its workers, all of it.
    pub worker_processor: Duration,
    /// Bytes of memory of its worker.
    pub worker_resident: u64,
    /// What it was last blamed for, also when it has come up since.
    pub last_error: Option<LastError>,
}

impl Member {
    pub(crate) fn in_flight(&self) -> usize {
        self.gauges.in_flight.load(Ordering::Acquire)
    }

    /// Sessions without a call that waits for them or runs in them.
    pub(crate) fn idle_sessions(&self) -> usize {
        self.talk().map_or(0, |talk| talk.sessions()).saturating_sub(self.in_flight())
    }

    pub(crate) fn status(&self) -> MemberStatus {
        let talk = self.talk();
        let in_flight = self.in_flight();
        let (running, stuck) = talk.as_ref().map_or((0, 0), |talk| talk.running());
        let sent = talk.as_ref().map_or(0, |talk| talk.sent());
        let pid = *lock(&self.worker_pid);
        let machine = self.machine();
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        MemberStatus {
            name: self.name.to_string(),
            token: self.config.token.to_string(),
            state: machine.state(stuck),
            since: machine.since(),
            priority: self.priority(),
            weight: self.gauges.weight.load(Ordering::Relaxed),
            latency: machine.latency.estimate(standstill::now()),
            in_flight,
            waiting: in_flight.saturating_sub(sent) + sent.saturating_sub(running),
            sessions_open: talk.as_ref().map_or(0, |talk| talk.sessions()),
            sessions_wanted: self.config.sessions.max(1),
            sessions_limit: self.granted.load(Ordering::Acquire).min(self.config.sessions.max(1)),
            sessions_busy: running.saturating_sub(stuck),
            sessions_stuck: stuck,
            closings: machine.closings(),
            calls: load(&self.stats.calls),
            faults: load(&self.stats.faults),
            worked: Duration::from_nanos(load(&self.stats.worked)),
            spent: Duration::from_nanos(load(&self.stats.spent)),
            worker: pid,
            worker_processor: self.usage.processor(),
            worker_resident: self.usage.resident(),
            last_error: machine.last_error().cloned(),
        }
    }
}
