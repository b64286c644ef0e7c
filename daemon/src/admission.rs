//! Back-pressure: which releases are let in, in which order, and who is told at once to come again later.
//!
//! Work that cannot be done in time is not begun, so that under any load the HSMs do only what still helps somebody:
//!
//! 1. A host asks at most as fast as `release.host_rate` and `release.host_burst` say: 429.
//! 2. At most `release.concurrency` releases run. At most `release.queue` others wait, in one queue for each host, and
//!    the hosts that have something waiting take turns: a host's storm is its own to wait out. In a full queue the
//!    longest host queue pays: 503.
//! 3. Who cannot expect to be done within `release.deadline_ms` is not let wait, and who waited for too long is not
//!    started: 503.
//!
//! A release may be refused at a glance, before it is read, when it is clear already that it would not be let in: most of
//! what a storm costs is the refusing.
//!
//! Every refusal says when to come again. `queue` and `buckets` decide, as plain values; here is what waits and wakes.

mod buckets;
mod pace;
mod queue;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use claviger_hsm::standstill;
use claviger_protocol::error::{Code, Refusal};
use tokio::sync::oneshot;

use self::buckets::Buckets;
use self::queue::{Arrival, Queue, Ticket, Turn, whole_seconds};
use crate::attempt::Attempt;
use crate::config::Release;
use crate::metrics;

/// Fewest releases that run at the same time when the number is computed: whatever the tokens, what a release does
/// outside of them is worth overlapping.
const LEAST_CONCURRENCY: usize = 16;

/// Why a release was not let in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dropped {
    /// The waiting room was full, and its host's queue the longest.
    Full,
    /// Its deadline passed.
    Deadline,
    /// It would not have been done within its deadline.
    Late,
    /// Its host asks too fast.
    Rate,
    /// Its caller went away.
    Left,
}

impl Dropped {
    /// Every reason.
    pub const ALL: [Self; 5] = [Self::Full, Self::Deadline, Self::Late, Self::Rate, Self::Left];

    /// Its name in the metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Deadline => "deadline",
            Self::Late => "late",
            Self::Rate => "rate",
            Self::Left => "left",
        }
    }

    /// What the caller is told, and in how many seconds it may come again. Counts it.
    fn refusal(self, retry_after: u16) -> Refusal {
        metrics::queue_dropped(self.as_str());
        let (code, message) = match self {
            Self::Rate => (Code::TooManyRequests, "this host asks for more releases than it may; try again"),
            Self::Full => (Code::ServiceUnavailable, "too many releases are waiting; try again"),
            Self::Deadline | Self::Late => {
                (Code::ServiceUnavailable, "the service is too busy to do the release in time; try again")
            }
            Self::Left => (Code::ServiceUnavailable, "the caller went away before it was its turn"),
        };
        Refusal::new(code, message).retry_after(retry_after)
    }
}

/// Lets releases in.
pub struct Admission {
    limits: ArcSwap<Limits>,
    room: Arc<Room>,
}

/// What can be changed at any time.
struct Limits {
    /// `None` without a limit.
    buckets: Option<Mutex<Buckets>>,
    /// How fast the buckets fill, and how much is in them.
    rate: (u32, u32),
    /// From a request's arrival to its answer.
    deadline: Duration,
}

impl Limits {
    fn new(release: &Release) -> Self {
        let rate = (release.host_rate, release.host_burst);
        let buckets = (rate.0 > 0).then(|| Mutex::new(Buckets::new(rate.0, rate.1)));
        Self { buckets, rate, deadline: release.deadline() }
    }
}

/// How a waiting release hears that it is its turn.
type Waiter = oneshot::Sender<Result<Permit, Refusal>>;

/// What permits share.
struct Room {
    queue: Mutex<Queue<Waiter>>,
}

/// How much is going on.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Load {
    /// Releases that run.
    pub running: usize,
    /// Releases that wait for their turn.
    pub waiting: usize,
}

/// How many releases run at the same time, given the sessions of all members.
#[must_use]
pub fn concurrency(release: &Release, sessions: usize) -> usize {
    match release.concurrency {
        // A release has two operations at the tokens at the same time, so this keeps every session's next one ready.
        0 => sessions.saturating_mul(2).max(LEAST_CONCURRENCY),
        set => set,
    }
}

impl Admission {
    /// For the settings of `release`, and members with `sessions` sessions in all.
    #[must_use]
    pub fn new(release: &Release, sessions: usize) -> Self {
        let concurrency = concurrency(release, sessions);
        let room = Arc::new(Room { queue: Mutex::new(Queue::new(concurrency, release.queue)) });
        Self { limits: ArcSwap::from_pointee(Limits::new(release)), room }
    }

    /// Takes new limits: the rate of hosts, the deadline, and how many may wait. Those who wait now stay. Where the rate
    /// changes, every host starts with a full burst.
    pub fn change(&self, release: &Release) {
        let before = self.limits.load();
        let mut limits = Limits::new(release);
        if limits.rate == before.rate
            && let (Some(old), Some(new)) = (&before.buckets, &mut limits.buckets)
        {
            let mut old = old.lock().unwrap_or_else(PoisonError::into_inner);
            let new = new.get_mut().unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(&mut *old, new);
        }
        self.limits.store(Arc::new(limits));
        self.room.lock().set_limit(release.queue);
    }

    /// Takes note of members with `sessions` sessions in all. Those who run go on; who has a turn by this runs at once.
    pub fn resize(&self, release: &Release, sessions: usize) {
        let mut queue = self.room.lock();
        queue.set_concurrency(concurrency(release, sessions));
        self.room.hand_out(queue);
    }

    /// Lets a release of `host` in: within the host's rate, and when it is its turn.
    ///
    /// # Errors
    /// `TooManyRequestsException`, `ServiceUnavailableException`.
    pub async fn admit(&self, host: &str, attempt: &Attempt) -> Result<Permit, Refusal> {
        self.within_rate(host)?;
        self.turn(host, attempt).await
    }

    /// Whether `host` may ask for one more release now; it counts against its rate.
    ///
    /// # Errors
    /// `TooManyRequestsException`.
    pub fn within_rate(&self, host: &str) -> Result<(), Refusal> {
        let limits = self.limits.load();
        let Some(buckets) = &limits.buckets else { return Ok(()) };
        let taken = buckets.lock().unwrap_or_else(PoisonError::into_inner).take(host, standstill::now());
        taken.map_err(|wait| Dropped::Rate.refusal(whole_seconds(wait)))
    }

    /// Counts `more` releases against the rate of a host, as far as it has them: what it sent cost that much.
    pub fn charge(&self, host: &str, more: usize) {
        let limits = self.limits.load();
        let Some(buckets) = &limits.buckets else { return };
        let mut buckets = buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let now = standstill::now();
        (0..more).map_while(|_| buckets.take(host, now).ok()).count();
    }

    /// Waits until it is a release's turn. Who stops waiting, by dropping this future too, leaves the queue.
    ///
    /// # Errors
    /// `ServiceUnavailableException`.
    pub async fn turn(&self, host: &str, attempt: &Attempt) -> Result<Permit, Refusal> {
        let deadline = attempt.started() + self.limits.load().deadline;
        let (waiter, answer) = oneshot::channel();
        let place = match self.room.arrive(host, deadline, waiter)? {
            Entry::Permit(permit) => return Ok(permit),
            Entry::Place(place) => place,
        };
        let mut caller = attempt.caller();
        let answer = tokio::select! {
            answer = answer => answer,
            () = standstill::sleep_until(deadline) => return Err(place.leave(Dropped::Deadline)),
            () = caller.left() => return Err(place.leave(Dropped::Left)),
        };
        place.answered();
        // Nobody throws a waiter away without an answer.
        let mut permit = answer.unwrap_or_else(|_| Err(Refusal::internal()))?;
        permit.used = true;
        Ok(permit)
    }

    /// Whether others wait, so that a newcomer might not be let in.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.load().waiting > 0
    }

    /// Whether a release of `host` would be let in, as far as can be said now. It does not count against its rate.
    ///
    /// # Errors
    /// As [`Admission::admit`].
    pub fn outlook(&self, host: &str, attempt: &Attempt) -> Result<(), Refusal> {
        let now = standstill::now();
        let limits = self.limits.load();
        if let Some(buckets) = &limits.buckets {
            let token = buckets.lock().unwrap_or_else(PoisonError::into_inner).with_one_less(host, now);
            token.map_err(|wait| Dropped::Rate.refusal(whole_seconds(wait)))?;
        }
        let queue = self.room.lock();
        let outlook = queue.outlook(host, attempt.started() + limits.deadline, now);
        let retry_after = queue.retry_after();
        drop(queue);
        outlook.map_err(|reason| reason.refusal(retry_after))
    }

    /// How much is going on now.
    #[must_use]
    pub fn load(&self) -> Load {
        let queue = self.room.lock();
        Load { running: queue.running(), waiting: queue.waiting() }
    }

    /// How much may go on.
    #[must_use]
    pub fn limits(&self) -> Load {
        let queue = self.room.lock();
        Load { running: queue.concurrency(), waiting: queue.limit() }
    }
}

/// What a newcomer has got.
enum Entry {
    Permit(Permit),
    Place(Place),
}

impl Room {
    fn lock(&self) -> MutexGuard<'_, Queue<Waiter>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arrive(self: &Arc<Self>, host: &str, deadline: Instant, waiter: Waiter) -> Result<Entry, Refusal> {
        let now = standstill::now();
        let mut queue = self.lock();
        let arrival = queue.arrive(host, deadline, waiter, now);
        let retry_after = queue.retry_after();
        drop(queue);
        match arrival {
            Arrival::Runs => Ok(Entry::Permit(Permit { room: Arc::clone(self), since: now, used: true })),
            Arrival::Waits { ticket, evicted } => {
                if let Some(evicted) = evicted {
                    // It may have gone away at this moment; nothing was kept for it.
                    let _ = evicted.send(Err(Dropped::Full.refusal(retry_after)));
                }
                Ok(Entry::Place(Place { room: Arc::clone(self), ticket: Some(ticket) }))
            }
            Arrival::Refused(reason) => Err(reason.refusal(retry_after)),
        }
    }

    /// Takes a place back that was held for that long, if it was made use of, and gives it to whom it is the turn of.
    fn end(self: &Arc<Self>, held: Option<Duration>) {
        let mut queue = self.lock();
        queue.end(held);
        self.hand_out(queue);
    }

    /// Gives the places that are free to whom it is the turn of.
    fn hand_out(self: &Arc<Self>, mut queue: MutexGuard<'_, Queue<Waiter>>) {
        let now = standstill::now();
        let turns: Vec<_> = std::iter::from_fn(|| queue.next(now)).collect();
        let retry_after = queue.retry_after();
        // A permit that cannot be handed over comes back here: the queue must be free by then.
        drop(queue);
        for (waiter, turn) in turns {
            let answer = match turn {
                Turn::Runs => Ok(Permit { room: Arc::clone(self), since: now, used: false }),
                Turn::Refused(reason) => Err(reason.refusal(retry_after)),
            };
            // Who went away at this moment does not take its permit: dropped, it goes to the next one.
            let _ = waiter.send(answer);
        }
    }
}

/// A place in the waiting room. Dropped, it is given up.
struct Place {
    room: Arc<Room>,
    ticket: Option<Ticket>,
}

impl Place {
    /// The answer has come: there is nothing to give up.
    fn answered(mut self) {
        self.ticket = None;
    }

    /// Gives it up, and says what to tell the caller.
    fn leave(mut self, reason: Dropped) -> Refusal {
        let mut queue = self.room.lock();
        // When it does not wait any more, it was let in at this moment: its permit goes back with its receiver.
        let _ = self.ticket.take().is_some_and(|ticket| queue.leave(&ticket));
        let retry_after = queue.retry_after();
        drop(queue);
        reason.refusal(retry_after)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take()
            && self.room.lock().leave(&ticket)
        {
            metrics::queue_dropped(Dropped::Left.as_str());
        }
    }
}

/// One of the places to run. Dropped, it goes to the next one.
pub struct Permit {
    room: Arc<Room>,
    since: Instant,
    /// Whether it has reached a release. One that never did says nothing about how long they take.
    used: bool,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let held = self.used.then(|| standstill::since(self.since));
        self.room.end(held);
    }
}

#[cfg(test)]
mod tests;
