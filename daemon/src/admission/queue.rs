//! Who runs, who waits, and whose turn it is: a plain value that is handed `now`.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Dropped;
use super::pace::Pace;

/// Bounds of what a caller is told to wait before it comes again, in seconds.
const RETRY_AFTER: (u64, u64) = (1, 30);

/// At most `concurrency` run. The others wait, at most `limit` of them, in a queue for each host; the hosts that have
/// somebody waiting take turns. As long as somebody waits, all places to run are taken.
///
/// `T` is how a waiting caller is reached.
#[derive(Debug)]
pub(super) struct Queue<T> {
    concurrency: usize,
    limit: usize,
    running: usize,
    waiting: usize,
    /// The tickets so far. In a host's queue they ascend.
    tickets: u64,
    /// No queue in it is empty.
    hosts: HashMap<Arc<str>, VecDeque<Waiting<T>>>,
    /// Each host of `hosts` once; the first one has the next turn.
    turns: VecDeque<Arc<str>>,
    pace: Pace,
}

#[derive(Debug)]
struct Waiting<T> {
    ticket: u64,
    deadline: Instant,
    caller: T,
}

/// Says which waiting caller is meant.
#[derive(Debug)]
pub(super) struct Ticket {
    host: Arc<str>,
    number: u64,
}

/// What becomes of a newcomer.
#[derive(Debug)]
pub(super) enum Arrival<T> {
    /// It runs at once.
    Runs,
    /// It waits. In a full queue somebody else had to make room, and is to be told [`Dropped::Full`].
    Waits {
        /// For [`Queue::leave`].
        ticket: Ticket,
        /// Who made room.
        evicted: Option<T>,
    },
    /// It cannot be served.
    Refused(Dropped),
}

/// What becomes of one that waited.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// It runs now.
    Runs,
    /// Its time is up.
    Refused(Dropped),
}

impl<T> Queue<T> {
    pub(super) fn new(concurrency: usize, limit: usize) -> Self {
        Self {
            concurrency: concurrency.max(1),
            limit,
            running: 0,
            waiting: 0,
            tickets: 0,
            hosts: HashMap::new(),
            turns: VecDeque::new(),
            pace: Pace::default(),
        }
    }

    /// How many may wait from now on; nobody who waits has to leave for it.
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// How many run at the same time from now on. Who waits may have a turn by this: see [`Queue::next`].
    pub(super) fn set_concurrency(&mut self, concurrency: usize) {
        self.concurrency = concurrency.max(1);
    }

    pub(super) fn concurrency(&self) -> usize {
        self.concurrency
    }

    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    pub(super) fn running(&self) -> usize {
        self.running
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// A release of `host` arrives that has to be done by `deadline`.
    ///
    /// While there is a place to run it runs, whatever was learned before: so a pace that was learned in bad times cannot
    /// keep everybody out for ever.
    pub(super) fn arrive(&mut self, host: &str, deadline: Instant, caller: T, now: Instant) -> Arrival<T> {
        if let Err(reason) = self.outlook(host, deadline, now) {
            return Arrival::Refused(reason);
        }
        if self.running < self.concurrency {
            self.running += 1;
            return Arrival::Runs;
        }
        let evicted = if self.waiting < self.limit { None } else { self.evict_for(host) };
        let host = match self.hosts.get_key_value(host) {
            Some((host, _)) => Arc::clone(host),
            None => {
                let host: Arc<str> = Arc::from(host);
                self.turns.push_back(Arc::clone(&host));
                host
            }
        };
        self.tickets += 1;
        self.waiting += 1;
        let waiting = Waiting { ticket: self.tickets, deadline, caller };
        self.hosts.entry(Arc::clone(&host)).or_default().push_back(waiting);
        Arrival::Waits { ticket: Ticket { host, number: self.tickets }, evicted }
    }

    /// Whether a release of `host` that arrived now, to be done by `deadline`, would run or wait.
    pub(super) fn outlook(&self, host: &str, deadline: Instant, now: Instant) -> Result<(), Dropped> {
        if deadline <= now {
            Err(Dropped::Deadline)
        } else if self.running < self.concurrency {
            Ok(())
        } else if now + self.pace.wait(self.ahead(host), self.concurrency) + self.pace.run() > deadline {
            Err(Dropped::Late)
        } else if self.waiting >= self.limit && self.longest_for(host).is_none() {
            Err(Dropped::Full)
        } else {
            Ok(())
        }
    }

    /// How many of those that wait now would run before a newcomer of `host`.
    fn ahead(&self, host: &str) -> usize {
        let own = self.length(host);
        if own == 0 {
            // The last turn of the first round.
            return self.turns.len();
        }
        // Each round serves one of every host that still has one. Hosts with an earlier turn are a round ahead.
        let mut rounds = own + 1;
        let mut ahead = own;
        for other in &self.turns {
            if **other == *host {
                rounds = own;
            } else {
                ahead += self.length(other).min(rounds);
            }
        }
        ahead
    }

    fn length(&self, host: &str) -> usize {
        self.hosts.get(host).map_or(0, VecDeque::len)
    }

    /// Who makes room for a newcomer of `host`: the longest queue, unless the newcomer's would then be the longest. Of
    /// several the one that was joined last.
    fn longest_for(&self, host: &str) -> Option<Arc<str>> {
        let newest = |queue: &VecDeque<Waiting<T>>| queue.back().map(|waiting| waiting.ticket);
        let (longest, queue) = self.hosts.iter().max_by_key(|(_, queue)| (queue.len(), newest(queue)))?;
        (queue.len() > self.length(host) + 1).then(|| Arc::clone(longest))
    }

    /// The newest of that queue makes room. At least one stays, so its host keeps its turn.
    fn evict_for(&mut self, host: &str) -> Option<T> {
        let longest = self.longest_for(host)?;
        let evicted = self.hosts.get_mut(&longest)?.pop_back()?;
        self.waiting -= 1;
        Some(evicted.caller)
    }

    /// A waiting caller goes away. `false` when it does not wait any more.
    pub(super) fn leave(&mut self, ticket: &Ticket) -> bool {
        let Some(queue) = self.hosts.get_mut(&ticket.host) else { return false };
        let Ok(at) = queue.binary_search_by_key(&ticket.number, |waiting| waiting.ticket) else { return false };
        queue.remove(at);
        self.waiting -= 1;
        if queue.is_empty() {
            self.hosts.remove(&ticket.host);
            self.turns.retain(|host| *host != ticket.host);
        }
        true
    }

    /// One that ran has ended. `held` is for how long it had its place, `None` when it never made use of it. Who runs
    /// now, [`Queue::next`] tells.
    pub(super) fn end(&mut self, held: Option<Duration>) {
        self.running = self.running.saturating_sub(1);
        if let Some(held) = held {
            self.pace.ended(held);
        }
    }

    /// Gives a free place to the one whose turn it is. To be called again and again until there is none: who cannot be
    /// done in time any more is not started, and its host keeps its turn.
    pub(super) fn next(&mut self, now: Instant) -> Option<(T, Turn)> {
        if self.running >= self.concurrency {
            return None;
        }
        let host = self.turns.pop_front()?;
        let queue = self.hosts.get_mut(&host)?;
        let Waiting { deadline, caller, .. } = queue.pop_front()?;
        self.waiting -= 1;
        let turn = if deadline <= now {
            Turn::Refused(Dropped::Deadline)
        } else if now + self.pace.run() > deadline {
            Turn::Refused(Dropped::Late)
        } else {
            self.running += 1;
            Turn::Runs
        };
        if queue.is_empty() {
            self.hosts.remove(&host);
        } else if turn == Turn::Runs {
            self.turns.push_back(host);
        } else {
            self.turns.push_front(host);
        }
        Some((caller, turn))
    }

    /// After how many seconds there should be room for one that was refused now: when those that wait have run.
    pub(super) fn retry_after(&self) -> u16 {
        whole_seconds(self.pace.drain(self.waiting + 1, self.concurrency))
    }
}

/// A time as `Retry-After` tells it.
pub(super) fn whole_seconds(time: Duration) -> u16 {
    let seconds = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    seconds.clamp(RETRY_AFTER.0, RETRY_AFTER.1) as u16
}

#[cfg(test)]
mod tests;
