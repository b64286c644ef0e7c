//! What changes a member's state from outside its life: faults that calls show, the regular look at it, and administrators.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::parts::{Member, OWN_TIMEOUT, SILENCE, START_TIMEOUT};
use super::places::Talk;
use super::state::Machine;
use crate::config::Pin;
use crate::error::{Failure, HsmError, WorkerFault};
use crate::event::Event;
use crate::job::Job;
use crate::link::{Request, nanos};
use crate::lock::lock;
use crate::standstill;

/// Faults.
impl Member {
    /// A failure by the member's own fault: evidence.
    pub(super) fn failed(&self, error: HsmError, took: Duration, now: Instant) {
        if self.change(|machine| machine.failed(error, took, now)) {
            self.observe(Event::Closed);
        }
    }

    /// Takes the member down at once.
    pub(super) fn fault(&self, failure: &Failure) {
        if self.change(|machine| machine.fault(failure, standstill::now())) {
            self.observe(Event::Closed);
        }
    }

    /// The token refused the PIN of this number. It is not tried again; one that has replaced it since is.
    pub(super) fn refused_pin(&self, number: u64, error: HsmError) {
        if lock(&self.pin).number != number {
            return;
        }
        if self.change(|machine| machine.pin_refused(error)) {
            self.observe(Event::Closed);
        }
        // Looked at again: one that came in between has found nothing that had to be allowed.
        if lock(&self.pin).number != number {
            self.allow_pin();
        }
    }

    /// Looks for calls that take too long, and refreshes what the balancer reads. Whether the member should be tested: it has
    /// given no result for long, or only a failure.
    pub(crate) fn tick(&self, now: Instant) -> bool {
        let mut oldest = None;
        if let Some(talk) = self.talk() {
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
            // Asked once.
            *heard = now;
        }
        silent || doubt
    }

    /// The member is down, if it has to be, before the callers are told: they look for a member at once.
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

/// What administrators, the configuration and the cluster ask for.
impl Member {
    /// Makes the next attempt come soon.
    pub(crate) fn probe_now(&self) {
        self.change(|machine| machine.probe_now(standstill::now()));
    }

    /// The member's worker. A member without one makes an attempt soon, which is waited for.
    pub(super) async fn talk_or_attempt(&self) -> Result<Talk, Failure> {
        let mut attempts = self.attempts.subscribe();
        // Looked at after that, so that no attempt ends unseen in between.
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
        // One that is under way may have begun with what the caller has just changed.
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
        // The keys of a member that lacks some can be managed, although its attempt failed.
        self.talk().ok_or_else(|| failure.unwrap_or_else(|| HsmError::NotServing.into()))
    }

    /// Waits for the first attempt to bring the member up.
    pub(crate) async fn first_attempt(&self) -> Result<(), Failure> {
        let mut attempts = self.attempts.subscribe();
        let Ok(attempts) = attempts.wait_for(|(count, _)| *count > 0).await else {
            return Err(HsmError::NotServing.into());
        };
        attempts.1.clone().map_or(Ok(()), Err)
    }

    /// Tests the member now, whatever its state; how long the tests took. A member that is down gets a fresh worker first.
    pub(crate) async fn probe(&self) -> Result<Duration, Failure> {
        self.talk_or_attempt().await?;
        self.test().await
    }

    /// Replaces a worker that has inherited what it should not have, and waits until the member serves again, if it did.
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

    /// Like [`probe`](Self::probe), on an administrator's word: a refused PIN may be tried again, also if it is the last try.
    pub(crate) async fn probe_on_request(&self) -> Result<Duration, Failure> {
        let _word = FinalTry::allow(self);
        self.allow_pin();
        self.probe().await
    }

    /// Takes a PIN, and lets it be tried if the last one was refused and was another: the same one again would be one step
    /// nearer to a locked token each time that the log is rotated.
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
        // A worker that cannot take it is replaced for other reasons, and its successor starts with this PIN.
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

    /// Lets the member finish what it has and gives it nothing new, or takes it back into service; whether that changed anything.
    pub(crate) fn drain(&self, drain: bool) -> bool {
        let changed = self.change(|machine| machine.drain(drain, standstill::now()));
        if changed && self.in_flight() == 0 {
            self.change(Machine::idle);
        }
        changed
    }

    /// Begins to leave the cluster: [`live`](Self::live) ends when the worker has.
    pub(crate) fn remove(&self) {
        if self.change(Machine::remove) {
            self.attempts
                .send_modify(|(count, last)| (*count, *last) = (*count + 1, Some(HsmError::NotServing.into())));
        }
    }
}

/// An administrator's word that the last try of the PIN may be used, until the end of what the word was given for, also when
/// that is given up.
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
