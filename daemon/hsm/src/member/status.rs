//! Status of a member, for people and metrics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use claviger_process::lock::lock;

use super::parts::Member;
use super::state::{LastError, MemberState};
use crate::standstill;

/// Status of one member at one moment.
#[derive(Clone, Debug)]
pub struct MemberStatus {
    /// Name of the member.
    pub name: String,
    /// Token that the member serves.
    pub token: String,
    /// Current state.
    pub state: MemberState,
    /// Time at which the member came up or stopped serving.
    pub since: std::time::SystemTime,
    /// Members with the lowest priority number serve while any of them can.
    pub priority: u32,
    /// Share of the load within a priority.
    pub weight: u32,
    /// Moving estimate of the time of a call, queueing included.
    pub latency: Duration,
    /// Number of calls that wait or run.
    pub in_flight: usize,
    /// Number of calls that wait for a session.
    pub waiting: usize,
    /// Number of open sessions for operations; the session that holds the login is not counted.
    pub sessions_open: usize,
    /// Number of sessions in the configuration.
    pub sessions_wanted: usize,
    /// Maximum number of sessions: lower than configured if the token granted fewer.
    pub sessions_limit: usize,
    /// Number of sessions that are in a call.
    pub sessions_busy: usize,
    /// Number of calls that hang until their worker is killed.
    pub sessions_stuck: usize,
    /// Number of times that a fault took the member down.
    pub closings: u64,
    /// Number of operations that returned from the token.
    pub calls: u64,
    /// Number of those operations that failed through the member's fault.
    pub faults: u64,
    /// Total time that its sessions spent in operations that returned.
    pub worked: Duration,
    /// Processor time of its workers within operations of the token. This is the vendor's library; if the token is
    /// software, it is all of the token's work.
    pub spent: Duration,
    /// Process id of its worker; `None` without a worker.
    pub worker: Option<u32>,
    /// Total processor time of its workers.
    pub worker_processor: Duration,
    /// Resident memory of its worker in bytes.
    pub worker_resident: u64,
    /// Last error that was the member's fault, kept after the member comes up again.
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
