//! Where releases and attestations wait for their turn: the waiting and the waking around [`Queue`].

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use claviger_hsm::standstill;
use claviger_process::lock::lock;
use ring::digest::{SHA256, digest};
use tokio::sync::oneshot;

use super::declined::{Declined, Dropped};
use super::fair_queue::{Arrival, Queue, Ticket, Turn};
use super::host_at::HostAt;
use crate::observe::metrics::Load;
use crate::request::Caller;

/// How a waiting request hears that it is its turn.
pub(super) type Waiter = oneshot::Sender<Result<Permit, Dropped>>;

/// A queue for one kind of work. Clones of the inner part are what permits share.
pub(super) struct Turns(pub(super) Arc<Room>);

pub(super) struct Room {
    queue: Mutex<Queue<Waiter>>,
    /// Counts a request that left the queue without an answer.
    left: fn(&'static str),
}

/// A number by which requests are told apart. Processors have instructions for this hash, which is most of what a refusal costs.
fn told_apart(asked: &[u8]) -> u64 {
    let hash = digest(&SHA256, asked);
    hash.as_ref().first_chunk().map_or(0, |first| u64::from_be_bytes(*first))
}

impl Turns {
    /// At most `concurrency` requests run, and at most `limit` wait, each for at most `patience`. `left` counts those
    /// that were abandoned.
    pub(super) fn new(concurrency: usize, limit: usize, patience: Duration, left: fn(&'static str)) -> Self {
        let queue = Mutex::new(Queue::new(concurrency, limit, patience));
        Self(Arc::new(Room { queue, left }))
    }

    /// Waits until it is a request's turn. If the future is dropped, the request leaves the queue. `asked` is the
    /// content of the request, which is the same when its caller tries again.
    ///
    /// # Errors
    /// The reason why the request is refused, and when its caller should try again.
    pub(super) async fn turn(
        &self,
        from: &HostAt,
        deadline: Instant,
        caller: Caller,
        asked: &[u8],
    ) -> Result<Permit, Declined> {
        self.wait(from, deadline, caller).await.map_err(|reason| self.decline(from, reason, asked))
    }

    async fn wait(&self, from: &HostAt, deadline: Instant, mut caller: Caller) -> Result<Permit, Dropped> {
        let (waiter, answer) = oneshot::channel();
        let place = match self.0.arrive(from, deadline, waiter)? {
            Entry::Permit(permit) => return Ok(permit),
            Entry::Place(place) => place,
        };
        let answer = tokio::select! {
            biased;
            // First: a turn that comes at the same moment goes to the next one.
            () = caller.left() => {
                place.leave();
                return Err(Dropped::Left);
            }
            answer = answer => answer,
            () = standstill::sleep_until(deadline) => {
                place.leave();
                return Err(Dropped::Deadline);
            }
        };
        place.answered();
        // No waiter is thrown away without an answer.
        let mut permit = answer.unwrap_or(Err(Dropped::Left))?;
        permit.used = true;
        Ok(permit)
    }

    /// Whether a request that arrived now would run or wait.
    ///
    /// # Errors
    /// The reason why it would be refused, and when its caller should try again.
    pub(super) fn outlook(&self, from: &HostAt, deadline: Instant, asked: &[u8]) -> Result<(), Declined> {
        let outlook = self.0.lock().outlook(from, deadline, standstill::now());
        outlook.map_err(|reason| self.decline(from, reason, asked))
    }

    fn decline(&self, from: &HostAt, reason: Dropped, asked: &[u8]) -> Declined {
        let retry_after = match reason {
            // The answer is not sent to anyone.
            Dropped::Left => 1,
            _ => {
                let request = told_apart(asked);
                self.0.lock().come_again(from, request, standstill::now())
            }
        };
        Declined { reason, retry_after }
    }

    /// Sets how many requests may wait, and for how long. Requests that already wait stay in the queue.
    pub(super) fn set_limit(&self, limit: usize, patience: Duration) {
        self.0.lock().set_limit(limit, patience);
    }

    /// How many may run from now on. Those that run go on; those that have a turn by this run at once.
    pub(super) fn set_concurrency(&self, concurrency: usize) {
        let mut queue = self.0.lock();
        queue.set_concurrency(concurrency);
        self.0.hand_out(queue);
    }

    /// How many run and wait now.
    pub(super) fn load(&self) -> Load {
        let queue = self.0.lock();
        Load { running: queue.running(), waiting: queue.waiting() }
    }

    /// How many may.
    pub(super) fn limits(&self) -> Load {
        let queue = self.0.lock();
        Load { running: queue.concurrency(), waiting: queue.limit() }
    }
}

/// What a newcomer has got.
enum Entry {
    Permit(Permit),
    Place(Place),
}

impl Room {
    pub(super) fn lock(&self) -> MutexGuard<'_, Queue<Waiter>> {
        lock(&self.queue)
    }

    fn arrive(self: &Arc<Self>, from: &HostAt, deadline: Instant, waiter: Waiter) -> Result<Entry, Dropped> {
        let now = standstill::now();
        let arrival = self.lock().arrive(from, deadline, waiter, now);
        match arrival {
            Arrival::Runs => Ok(Entry::Permit(Permit { room: Arc::clone(self), since: now, used: true })),
            Arrival::Waits { ticket, evicted } => {
                if let Some(evicted) = evicted {
                    // It may have gone away at this moment; nothing was kept for it.
                    let _ = evicted.send(Err(Dropped::Full));
                }
                Ok(Entry::Place(Place { room: Arc::clone(self), ticket: Some(ticket) }))
            }
            Arrival::Refused(reason) => Err(reason),
        }
    }

    /// Takes back a place to run. `held` is for how long it was held, where it was made use of.
    fn end(self: &Arc<Self>, held: Option<Duration>) {
        let mut queue = self.lock();
        queue.end(held);
        self.hand_out(queue);
    }

    /// Hands out the places that are free.
    fn hand_out(self: &Arc<Self>, mut queue: MutexGuard<'_, Queue<Waiter>>) {
        let now = standstill::now();
        let turns: Vec<_> = std::iter::from_fn(|| queue.next(now)).collect();
        // A permit that cannot be handed over comes back here: the queue must be free by then.
        drop(queue);
        for (waiter, turn) in turns {
            let answer = match turn {
                Turn::Runs => Ok(Permit { room: Arc::clone(self), since: now, used: false }),
                Turn::Refused(reason) => Err(reason),
            };
            // A caller that went away at this moment does not take its permit: dropped, it goes to the next one.
            let _ = waiter.send(answer);
        }
    }
}

/// A place in the queue. Dropped, it is given up.
struct Place {
    room: Arc<Room>,
    ticket: Option<Ticket>,
}

impl Place {
    /// The answer has come: there is nothing to give up.
    fn answered(mut self) {
        self.ticket = None;
    }

    /// Leaves the queue.
    fn leave(mut self) {
        // When it does not wait any more, it was let in at this moment: its permit goes back with its receiver.
        let _ = self.ticket.take().is_some_and(|ticket| self.room.lock().leave(&ticket));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take()
            && self.room.lock().leave(&ticket)
        {
            (self.room.left)(Dropped::Left.as_str());
        }
    }
}

/// One of the places to run. Dropped, it goes to the next one.
pub struct Permit {
    room: Arc<Room>,
    since: Instant,
    /// Whether it has reached its request. One that never did says nothing about how long they take.
    used: bool,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let held = self.used.then(|| standstill::since(self.since));
        self.room.end(held);
    }
}
