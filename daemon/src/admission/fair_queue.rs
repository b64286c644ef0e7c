//! Who runs, who waits, and whose turn it is: a plain value that is handed `now`.
//!
//! Turns are fair in two levels. Hosts take turns; and where a host asks from several networks, as one does whose health
//! certificate somebody else got hold of, its networks take turns for its turns.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::declined::Dropped;
use super::host_at::HostAt;
use super::lengths::Lengths;
use super::returns::{Backlog, Returns};
use super::wait_estimate::Pace;
use crate::request::Network;

/// At most `concurrency` run. The others wait, at most `limit` of them, in a line for each host; the hosts that have
/// somebody waiting take turns. As long as somebody waits, all places to run are taken.
///
/// `T` is how a waiting caller is reached.
#[derive(Debug)]
pub(super) struct Queue<T> {
    concurrency: usize,
    limit: usize,
    /// Maximum time for which a caller waits.
    patience: Duration,
    running: usize,
    waiting: usize,
    /// The tickets so far.
    tickets: u64,
    /// No line in it is empty.
    hosts: HashMap<Arc<str>, Line<T>>,
    /// Each host of `hosts` once; the first one has the next turn.
    turns: VecDeque<InTurn>,
    /// The lengths of all lines.
    lengths: Lengths,
    pace: Pace,
    returns: Returns,
}

/// A host in the order of turns, with the length of its line. [`Queue::ahead`] reads the lengths of many hosts, and a look
/// into the map for each of them would cost most of what a refusal costs.
#[derive(Debug)]
struct InTurn {
    host: Arc<str>,
    length: Arc<AtomicUsize>,
}

/// Those of one host that wait, in the order of their places.
#[derive(Debug)]
struct Line<T> {
    waiting: VecDeque<Waiting<T>>,
    /// The number of `waiting`, shared with the host's [`InTurn`].
    length: Arc<AtomicUsize>,
    /// The round that was served last.
    served: u64,
}

/// A place in a line: its round, of which each network has one release, and the number of its ticket.
type Place = (u64, u64);

#[derive(Debug)]
struct Waiting<T> {
    place: Place,
    network: Option<Network>,
    deadline: Instant,
    caller: T,
}

impl<T> Line<T> {
    fn new() -> Self {
        Self { waiting: VecDeque::new(), length: Arc::default(), served: 0 }
    }

    /// The round of a newcomer from `network`: after all of the same network, and not before any round that has begun.
    fn round(&self, network: Option<Network>) -> u64 {
        // The last one in the line is of the same network wherever a host asks from one.
        let last = self.waiting.iter().rev().find(|waiting| waiting.network == network);
        last.map_or(self.served, |waiting| waiting.place.0) + 1
    }

    /// How many stay ahead of a newcomer with this round.
    fn ahead_of(&self, round: u64) -> usize {
        self.waiting.partition_point(|waiting| waiting.place.0 <= round)
    }

    /// Publishes the length after a change of the line.
    fn note_length(&self) {
        self.length.store(self.waiting.len(), Ordering::Relaxed);
    }

    fn last(&self) -> Option<Place> {
        self.waiting.back().map(|waiting| waiting.place)
    }
}

/// Says which waiting caller is meant.
#[derive(Debug)]
pub(super) struct Ticket {
    host: Arc<str>,
    place: Place,
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
    /// At most `concurrency` requests run. At most `limit` requests wait, each for at most `patience`.
    pub(super) fn new(concurrency: usize, limit: usize, patience: Duration) -> Self {
        Self {
            concurrency: concurrency.max(1),
            limit,
            patience,
            running: 0,
            waiting: 0,
            tickets: 0,
            hosts: HashMap::new(),
            turns: VecDeque::new(),
            lengths: Lengths::default(),
            pace: Pace::default(),
            returns: Returns::default(),
        }
    }

    /// Sets how many requests may wait, and for how long. Requests that already wait stay in the queue.
    pub(super) fn set_limit(&mut self, limit: usize, patience: Duration) {
        (self.limit, self.patience) = (limit, patience);
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

    /// A release arrives that has to be done by `deadline`.
    ///
    /// While there is a place to run it runs, whatever was learned before: so a pace that was learned in bad times cannot
    /// keep everybody out for ever.
    pub(super) fn arrive(&mut self, from: &HostAt, deadline: Instant, caller: T, now: Instant) -> Arrival<T> {
        if let Err(reason) = self.outlook(from, deadline, now) {
            return Arrival::Refused(reason);
        }
        self.returns.let_in(&from.host);
        if self.running < self.concurrency {
            self.running += 1;
            return Arrival::Runs;
        }
        let evicted = if self.waiting < self.limit { None } else { self.evict_for(from) };
        let entry = self.hosts.entry(Arc::clone(&from.host));
        let host = Arc::clone(entry.key());
        let line = entry.or_insert_with_key(|host| {
            let line = Line::new();
            self.turns.push_back(InTurn { host: Arc::clone(host), length: Arc::clone(&line.length) });
            line
        });
        self.tickets += 1;
        self.waiting += 1;
        self.lengths.grow(line.waiting.len());
        let round = line.round(from.network);
        let place = (round, self.tickets);
        line.waiting.insert(line.ahead_of(round), Waiting { place, network: from.network, deadline, caller });
        line.note_length();
        Arrival::Waits { ticket: Ticket { host, place }, evicted }
    }

    /// Returns whether a release that arrived now, with this deadline, would run or wait.
    pub(super) fn outlook(&self, from: &HostAt, deadline: Instant, now: Instant) -> Result<(), Dropped> {
        if deadline <= now {
            Err(Dropped::Deadline)
        } else if self.running < self.concurrency {
            Ok(())
        } else if self.is_too_late(from, deadline, now) {
            Err(Dropped::Late)
        } else if self.waiting >= self.limit && self.line_to_shorten(from).is_none() {
            Err(Dropped::Full)
        } else {
            Ok(())
        }
    }

    /// Returns `true` if a newcomer that has to wait would probably not be finished by `deadline`.
    fn is_too_late(&self, from: &HostAt, deadline: Instant, now: Instant) -> bool {
        let left = deadline.saturating_duration_since(now).saturating_sub(self.pace.run());
        let late = |ahead| self.pace.wait(ahead, self.concurrency) > left;
        // The exact number of requests ahead needs a look at each line. If a limit is enough for the decision, the
        // lines are not read.
        let (least, most) = self.least_and_most_ahead(from);
        late(least) || late(most) && late(self.ahead(from))
    }

    /// Lower and upper limit of the number of requests that would run before a newcomer. Before it runs, each other
    /// host gets as many turns as requests of the newcomer's own host run before it, or one more.
    fn least_and_most_ahead(&self, from: &HostAt) -> (usize, usize) {
        let Some(line) = self.hosts.get(&from.host) else { return (self.turns.len(), self.turns.len()) };
        let own = line.ahead_of(line.round(from.network));
        let most = self.lengths.up_to(own + 1) - line.waiting.len().min(own + 1) + own;
        (self.lengths.up_to(own), most)
    }

    /// How many of those that wait now would run before a newcomer.
    fn ahead(&self, from: &HostAt) -> usize {
        let Some(line) = self.hosts.get(&from.host) else {
            // The last turn of the first round.
            return self.turns.len();
        };
        let own = line.ahead_of(line.round(from.network));
        // Each round serves one of every host that still has one. Hosts with an earlier turn are a round ahead.
        let earlier = self.turns.iter().take_while(|turn| turn.host != from.host);
        let a_round_more = earlier.filter(|turn| turn.length.load(Ordering::Relaxed) > own).count();
        self.lengths.up_to(own) + a_round_more
    }

    fn length(&self, host: &str) -> usize {
        self.hosts.get(host).map_or(0, |line| line.waiting.len())
    }

    /// The line that makes room for a newcomer: the longest one, unless the newcomer's would then be the longest; of
    /// several the one that was joined last. Else its own, where a network has more in it than the newcomer's.
    fn line_to_shorten(&self, from: &HostAt) -> Option<Arc<str>> {
        if self.lengths.longest() > self.length(&from.host) + 1 {
            let joined = |line: &Line<T>| (line.waiting.len(), line.last().map(|(_, ticket)| ticket));
            let (longest, _) = self.hosts.iter().max_by_key(|(_, line)| joined(line))?;
            return Some(Arc::clone(longest));
        }
        let (host, own) = self.hosts.get_key_value(&from.host)?;
        own.last().is_some_and(|(round, _)| round > own.round(from.network)).then(|| Arc::clone(host))
    }

    /// The last of that line makes room. A line that becomes empty is the newcomer's own, which keeps its turn.
    fn evict_for(&mut self, from: &HostAt) -> Option<T> {
        let shortened = self.line_to_shorten(from)?;
        let line = self.hosts.get_mut(&shortened)?;
        let evicted = line.waiting.pop_back()?;
        line.note_length();
        self.lengths.shrink(line.waiting.len() + 1);
        self.waiting -= 1;
        Some(evicted.caller)
    }

    /// A waiting caller goes away. `false` when it does not wait any more.
    pub(super) fn leave(&mut self, ticket: &Ticket) -> bool {
        let Some(line) = self.hosts.get_mut(&ticket.host) else { return false };
        let Ok(at) = line.waiting.binary_search_by_key(&ticket.place, |waiting| waiting.place) else { return false };
        self.lengths.shrink(line.waiting.len());
        line.waiting.remove(at);
        line.note_length();
        self.waiting -= 1;
        if line.waiting.is_empty() {
            self.hosts.remove(&ticket.host);
            self.turns.retain(|turn| turn.host != ticket.host);
        }
        true
    }

    /// One that ran has ended. `held` is for how long it had its place, `None` when it never made use of it. Who runs
    /// now, [`Queue::next`] tells.
    pub(super) fn end(&mut self, held: Option<Duration>) {
        self.running = self.running.saturating_sub(1);
        if let Some(held) = held {
            self.pace.ended(held, self.waiting);
        }
    }

    /// Gives a free place to the one whose turn it is. To be called again and again until there is none: who cannot be
    /// done in time any more is not started, and its host keeps its turn.
    pub(super) fn next(&mut self, now: Instant) -> Option<(T, Turn)> {
        if self.running >= self.concurrency {
            return None;
        }
        let first = self.turns.pop_front()?;
        let line = self.hosts.get_mut(&first.host)?;
        let Waiting { place, deadline, caller, .. } = line.waiting.pop_front()?;
        line.note_length();
        self.lengths.shrink(line.waiting.len() + 1);
        line.served = place.0;
        self.waiting -= 1;
        let turn = if deadline <= now {
            Turn::Refused(Dropped::Deadline)
        } else if now + self.pace.run() > deadline {
            Turn::Refused(Dropped::Late)
        } else {
            self.running += 1;
            Turn::Runs
        };
        if line.waiting.is_empty() {
            self.hosts.remove(&first.host);
        } else if turn == Turn::Runs {
            self.turns.push_back(first);
        } else {
            self.turns.push_front(first);
        }
        Some((caller, turn))
    }

    /// The number of seconds after which the caller of a request that is refused now should try again. `request`
    /// distinguishes the request from others of its host.
    pub(super) fn come_again(&mut self, from: &HostAt, request: u64, now: Instant) -> u16 {
        let interval = self.pace.drain(1, self.concurrency);
        let room = self.patience.min(self.pace.drain(self.limit, self.concurrency));
        let (ahead, _) = self.least_and_most_ahead(from);
        self.returns.tell(&from.host, request, Backlog { ahead, interval, room }, now)
    }
}

#[cfg(test)]
mod tests;
