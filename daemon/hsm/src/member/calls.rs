//! A call from submission to reply: wait for a place, send a frame to the worker, receive the reply.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use deadpool::managed::{Pool, PoolError, Timeouts};

use super::conversation::{CallResult, Unsent, Waiting};
use super::outstanding::Limits;
use super::parts::Member;
use super::places::{Held, InFlight, Places, Talk};
use crate::error::{Failure, HsmError, WorkerFault};
use crate::job::Job;
use crate::link::Value;
use crate::standstill;

/// Pause between checks for room in a full socket.
const FULL_SOCKET_PAUSE: Duration = Duration::from_millis(1);

/// Outcome of a call at one member.
pub(crate) enum Outcome {
    /// The token ran the operation, or may have run it.
    Ran(Result<Value, HsmError>),
    /// The token did not run the operation, so another member can take it without a retry.
    NotRun(HsmError),
}

impl Member {
    /// Runs one operation of a caller and judges its result.
    pub(crate) async fn call(self: &Arc<Self>, job: &Job, deadline: Instant, limits: Limits) -> Outcome {
        let submitted = standstill::now();
        let Some(queue) = self.queue() else { return Outcome::NotRun(HsmError::NotServing) };
        let held = match self.hold(&queue.places, deadline).await {
            Ok(held) => held,
            Err(error) => return Outcome::NotRun(error),
        };
        let talk = &queue.talk;
        let reply = match self.exchange(talk, job, held, deadline, limits).await {
            Ok(reply) => reply,
            Err(error) => return Outcome::NotRun(error),
        };
        let until = deadline.min(standstill::now() + limits.share);
        let result = self.judge(talk, job, reply, submitted, until).await;
        self.learn(talk, job, result.as_ref().err().copied(), submitted);
        Outcome::Ran(result)
    }

    /// Waits for a place, first come first served.
    async fn hold(&self, places: &Pool<Places>, deadline: Instant) -> Result<Held, HsmError> {
        // The call is counted before the limit is checked, so that two callers cannot both take the last position in the
        // queue.
        let before = self.gauges.in_flight.fetch_add(1, Ordering::AcqRel);
        let in_flight = InFlight(Arc::clone(&self.gauges));
        if before >= self.config.queue.max(1) {
            return Err(HsmError::QueueFull);
        }
        let no_wait = Timeouts { wait: Some(Duration::ZERO), ..Timeouts::default() };
        let place = match places.timeout_get(&no_wait).await {
            Err(PoolError::Timeout(_)) => match standstill::timeout_at(deadline, places.get()).await {
                Ok(place) => place,
                Err(_) => return Err(HsmError::Deadline),
            },
            place => place,
        };
        // A closed pool means that the member has stopped serving; the operation goes to another member.
        let place = place.map_err(|_| HsmError::NotServing)?;
        Ok(Held { _place: Some(place), _in_flight: in_flight })
    }

    /// Sends one frame and receives the reply. An error means that the token was not asked.
    pub(super) async fn exchange(
        &self,
        talk: &Talk,
        job: &Job,
        held: Held,
        deadline: Instant,
        limits: Limits,
    ) -> Result<CallResult, HsmError> {
        let answer = self.send(talk, job, held, deadline, limits).await?;
        match standstill::timeout_at(deadline, answer).await {
            Ok(Ok(Some(reply))) => Ok(reply),
            Ok(Ok(None)) => Err(HsmError::Worker(WorkerFault::Gone)),
            // The task that reads panicked, so the outcome of the call is unknown.
            Ok(Err(_)) => Ok(CallResult::none(HsmError::Worker(WorkerFault::Gone), Duration::ZERO)),
            Err(_) => Err(HsmError::Deadline),
        }
    }

    /// Sends a call as soon as the socket has room. If there is no room within the call's share of time, the worker is
    /// treated as one that does not read.
    async fn send(
        &self,
        talk: &Talk,
        job: &Job,
        mut held: Held,
        deadline: Instant,
        limits: Limits,
    ) -> Result<Waiting, HsmError> {
        let begun = standstill::now();
        loop {
            match talk.submit(job, limits, held) {
                Ok(waiting) => return Ok(waiting),
                Err(Unsent::Gone) => {
                    // The task that reads may not have noticed yet.
                    self.lost_worker(talk.number);
                    return Err(HsmError::Worker(WorkerFault::Gone));
                }
                Err(Unsent::Full(back)) => held = back,
            }
            let now = standstill::now();
            if now >= deadline {
                return Err(HsmError::Deadline);
            }
            if now.saturating_duration_since(begun) >= limits.share {
                let deaf = HsmError::Worker(WorkerFault::Deaf);
                if limits.are_evidence() {
                    self.fault(&deaf.into());
                }
                return Err(deaf);
            }
            tokio::time::sleep(FULL_SOCKET_PAUSE).await;
        }
    }

    /// Runs one operation on this member, whatever its state: key management and tests. A member without a worker starts
    /// one first.
    pub(crate) async fn direct(self: &Arc<Self>, job: &Job, timeout: Duration) -> Result<Value, Failure> {
        let deadline = standstill::now() + timeout;
        if self.machine().is_pin_refused() {
            return Err(HsmError::PinRefused.into());
        }
        let talk = self.talk_or_attempt().await?;
        let held = self.hold_directly();
        let submitted = standstill::now();
        let limits = Limits { share: timeout, watchdog: timeout };
        let reply = self.exchange(&talk, job, held, deadline, limits).await?;
        let result = self.judge(&talk, job, reply, submitted, deadline).await;
        if result.is_ok() && !job.operation.may_repeat() {
            self.forget_lacks();
        }
        Ok(result?)
    }

    /// Creates the guard for a call of the member itself, which needs no place: it is one more call in the socket.
    pub(super) fn hold_directly(&self) -> Held {
        self.gauges.in_flight.fetch_add(1, Ordering::AcqRel);
        Held { _place: None, _in_flight: InFlight(Arc::clone(&self.gauges)) }
    }
}
