//! State changes that come from outside the member's task: faults of calls, the regular check, and administrators.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use claviger_process::lock::lock;

use super::parts::{Member, OWN_TIMEOUT, SILENCE, START_TIMEOUT};
use super::places::Talk;
use super::state::Machine;
use crate::config::Pin;
use crate::error::{Failure, HsmError, WorkerFault};
use crate::event::Event;
use crate::job::Job;
use crate::link::{Request, nanos};
use crate::standstill;

/// Handling of faults, and the regular check.
impl Member {
    /// Counts a failure that is the member's fault as evidence.
    pub(super) fn failed(&self, error: HsmError, took: Duration, now: Instant) {
        if self.change(|machine| machine.failed(error, took, now)) {
            self.observe(Event::Down);
        }
    }

    /// Takes the member down at once.
    pub(super) fn fault(&self, failure: &Failure) {
        if self.change(|machine| machine.fault(failure, standstill::now())) {
            self.observe(Event::Down);
        }
    }

    /// Handles the refusal of the PIN of this number. That PIN is not tried again; a PIN that has replaced it since is
    /// tried.
    pub(super) fn refused_pin(&self, number: u64, error: HsmError) {
        if lock(&self.pin).number != number {
            return;
        }
        if self.change(|machine| machine.pin_refused(error)) {
            self.observe(Event::Down);
        }
        // Checked again: if a new PIN was set in between, it found no refusal that it could lift.
        if lock(&self.pin).number != number {
            self.allow_pin();
        }
    }

    /// Finds calls that take too long and refreshes the balancer's data. Returns true if the member should be tested: it
    /// has given no result for long, or its last result was a failure. `unread`: time since the last check in which the
    /// daemon could not read answers.
    pub(crate) fn tick(&self, now: Instant, unread: Duration) -> bool {
        let mut oldest = None;
        if let Some(talk) = self.talk() {
            if !unread.is_zero() {
                talk.forgive(unread, now);
            }
            self.look_for_late_calls(&talk, now);
            oldest = talk.oldest(now);
        }
        self.gauges.oldest.store(oldest.map_or(0, nanos), Ordering::Relaxed);
        let idle = self.gauges.in_flight.load(Ordering::Acquire) == 0;
        let (doubt, serves) = {
            let mut machine = self.machine();
            self.gauges.latency.store(nanos(machine.latency.estimate(now)), Ordering::Relaxed);
            if idle {
                machine.idle();
            }
            (machine.is_in_doubt(now), machine.serves())
        };
        let mut heard = lock(&self.heard);
        let silent = serves && now.saturating_duration_since(*heard) >= SILENCE;
        if silent {
            // The test is requested once.
            *heard = now;
        }
        silent || doubt
    }

    /// Handles late calls. The member goes down, if necessary, before the callers are told, since they then pick a member
    /// at once.
    fn look_for_late_calls(&self, talk: &Talk, now: Instant) {
        let (late, hung) = talk.look(now);
        if let Some(operation) = hung {
            self.observe(Event::Stuck);
            self.fault(&HsmError::Hung(operation).into());
        } else {
            let evidence = late.iter().filter(|late| late.limits.are_evidence());
            evidence.for_each(|late| self.failed(HsmError::Hung(late.operation), late.limits.share, now));
        }
        late.into_iter().for_each(|late| late.tell());
    }
}

/// Requests of administrators, the configuration and the cluster.
impl Member {
    /// Brings forward the next attempt.
    pub(crate) fn probe_now(&self) {
        self.change(|machine| machine.probe_now(standstill::now()));
    }

    /// Returns the connection to the worker. If there is none, requests an attempt and waits for it.
    pub(super) async fn talk_or_attempt(&self) -> Result<Talk, Failure> {
        let mut attempts = self.attempts.subscribe();
        // Checked after the subscription above, so that no attempt ends unseen in between.
        if let Some(talk) = self.talk() {
            return Ok(talk);
        }
        {
            let machine = self.machine();
            if machine.is_pin_refused() {
                return Err(HsmError::PinRefused.into());
            }
            if !machine.is_on_its_way() {
                return Err(HsmError::NotServing.into());
            }
        }
        // An attempt that already runs may have begun before the caller's change.
        let wanted = self.begun.load(Ordering::Acquire) + 1;
        let until = standstill::now() + START_TIMEOUT + OWN_TIMEOUT;
        while self.talk().is_none() && attempts.borrow_and_update().0 < wanted && self.machine().is_on_its_way() {
            self.probe_now();
            match standstill::timeout_at(until, attempts.changed()).await {
                Ok(Ok(())) => {}
                _ => return Err(HsmError::Worker(WorkerFault::StartHangs).into()),
            }
        }
        let (_, failure) = attempts.borrow().clone();
        // A member that lacks some keys fails its attempt, but its keys can be managed.
        self.talk().ok_or_else(|| failure.unwrap_or_else(|| HsmError::NotServing.into()))
    }

    /// Waits until the first attempt has ended; returns its failure.
    pub(crate) async fn first_attempt(&self) -> Result<(), Failure> {
        let mut attempts = self.attempts.subscribe();
        let Ok(attempts) = attempts.wait_for(|(count, _)| *count > 0).await else {
            return Err(HsmError::NotServing.into());
        };
        attempts.1.clone().map_or(Ok(()), Err)
    }

    /// Tests the member now, whatever its state, and returns the time of the tests. A member that is down gets a fresh
    /// worker first.
    pub(crate) async fn probe(&self) -> Result<Duration, Failure> {
        self.talk_or_attempt().await?;
        self.test().await
    }

    /// Replaces a worker that inherited a variable which is now hidden. Waits until the member serves again if it served
    /// before.
    pub(crate) async fn replace_worker(&self) {
        if lock(&self.worker_pid).is_none() {
            return;
        }
        let (number, served) = (self.generation(), self.is_serving());
        self.fault(&HsmError::Worker(WorkerFault::Replaced).into());
        let until = standstill::now() + OWN_TIMEOUT;
        while served && !(self.generation() != number && self.is_serving()) && standstill::now() < until {
            self.probe_now();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Like [`probe`](Self::probe), for an administrator: a refused PIN may be tried again, even if it is the last try.
    pub(crate) async fn probe_on_request(&self) -> Result<Duration, Failure> {
        let _word = FinalTry::allow(self);
        self.allow_pin();
        self.probe().await
    }

    /// Sets the PIN. If the last PIN was refused and differs from this one, allows a try. The same PIN is not tried again,
    /// because each reload, such as for log rotation, would bring the token one step nearer to its lock.
    pub(crate) async fn set_pin(&self, pin: Pin) {
        let number = {
            let mut held = lock(&self.pin);
            if held.pin.is(&pin) {
                return;
            }
            held.pin = pin.clone();
            held.number += 1;
            held.number
        };
        // A worker that cannot receive the PIN is replaced for other reasons; its successor starts with this PIN.
        if let Some(talk) = self.talk()
            && let Ok(job) = Job::new(&Request::SetPin(number, pin))
        {
            let _ = self.own_call(&talk, &job).await;
        }
        self.allow_pin();
    }

    fn allow_pin(&self) {
        self.change(|machine| machine.allow_pin(standstill::now()));
    }

    /// Drains the member or puts it back into service; returns true if that changed the state.
    pub(crate) fn drain(&self, drain: bool) -> bool {
        let changed = self.change(|machine| machine.drain(drain, standstill::now()));
        if changed && self.in_flight() == 0 {
            self.change(Machine::idle);
        }
        changed
    }

    /// Starts the removal from the cluster. [`live`](Self::live) returns when the worker has ended.
    pub(crate) fn remove(&self) {
        if self.change(Machine::remove) {
            self.attempts
                .send_modify(|(count, last)| (*count, *last) = (*count + 1, Some(HsmError::NotServing.into())));
        }
    }
}

/// Permission by an administrator to use the last PIN try. It ends with the request that it was given for, also when that
/// request is cancelled.
struct FinalTry<'a>(&'a Member);

impl<'a> FinalTry<'a> {
    fn allow(member: &'a Member) -> Self {
        lock(&member.pin).may_use_final_try = true;
        FinalTry(member)
    }
}

impl Drop for FinalTry<'_> {
    fn drop(&mut self) {
        lock(&self.0.pin).may_use_final_try = false;
    }
}
