//! Memory for the bodies of requests, rationed while nobody knows yet who sends them.
//!
//! Room is taken as bytes arrive, in steps: what a request announces costs nothing. Four bounds hold: of all bodies
//! together, of one connection, of one network, and a share of it all that is kept for small bodies, which are what single
//! releases and attestations have. Where room is short, bodies that are still arriving give theirs up: first those of the
//! network, and of the connection, that holds the most, and of these the oldest. Honest bodies arrive within moments.
//!
//! `Ledger` is a plain value that is handed `now`; [`Bodies`] shares one, and [`Room`] is what a request holds.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use claviger_hsm::standstill;
use tokio::sync::Notify;

use crate::config::Server;
use crate::observe::metrics;
use crate::request::Network;

/// Bytes of memory that a byte of a body costs while its request is worked on: the body, what it is decoded to, the answer.
const COST: u64 = 3;

/// Room is taken in multiples of this. The first step covers the request's header and its task, too.
const STEP: u64 = 32 * 1024;

/// A body is small up to this cost: a release with the protector of an owner and three guardians takes a third of it.
const SMALL: u64 = 64 * 1024 * COST;

/// How long a body may be arriving before it may have to give up its room: most come in one go.
const ARRIVES_WITHIN: Duration = Duration::from_millis(20);

/// What is freed at once where room is short, as a part of all: a search looks at every body.
const FREED_PART: u64 = 64;

/// Answers of more bytes than this keep their room until they are sent.
const SMALL_ANSWER: usize = 4 * 1024;

/// Why there is no room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoRoom {
    /// All bodies together have what there is.
    All,
    /// The connection has what it may.
    Connection,
    /// The network of the caller has what it may.
    Network,
    /// The body arrived slowly and had to make room for others.
    GaveWay,
}

impl NoRoom {
    /// Every reason.
    pub const ALL: [Self; 4] = [Self::All, Self::Connection, Self::Network, Self::GaveWay];

    /// Its name in the metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Connection => "connection",
            Self::Network => "address",
            Self::GaveWay => "gave_way",
        }
    }
}

/// The bounds, in bytes of memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Bounds {
    all: u64,
    /// Of these, what only small bodies may have.
    kept: u64,
    connection: u64,
    network: u64,
}

impl Bounds {
    fn of(server: &Server) -> Self {
        let mib = |number: u64| number.saturating_mul(1024 * 1024);
        let all = mib(server.body_memory_mib);
        let network = match server.body_memory_per_address_mib {
            0 => u64::MAX,
            limit => mib(limit),
        };
        // One of the largest batches, and a connection of HTTP/2 with as many releases as it may ask for.
        Self { all, kept: all / 4, connection: all / 8, network }
    }
}

/// Who holds how much.
struct Ledger<T> {
    bounds: Bounds,
    used: u64,
    /// What bodies hold beyond what a small one may.
    large: u64,
    networks: HashMap<Network, u64>,
    connections: HashMap<u64, u64>,
    accounts: HashMap<u64, Account<T>>,
    next: u64,
}

struct Account<T> {
    network: Network,
    connection: u64,
    held: u64,
    since: Instant,
    /// Whether the body is still on its way. What has arrived is never taken away.
    arriving: bool,
    tag: T,
}

/// What of `held` is beyond a small body.
fn beyond(held: u64) -> u64 {
    held.saturating_sub(SMALL)
}

impl<T: Clone> Ledger<T> {
    fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            used: 0,
            large: 0,
            networks: HashMap::new(),
            connections: HashMap::new(),
            accounts: HashMap::new(),
            next: 0,
        }
    }

    /// Opens an account with room for the first step. The tags of the bodies that gave way are added to `gave_way`, also where
    /// that was not enough.
    fn open(
        &mut self,
        network: Network,
        connection: u64,
        tag: T,
        now: Instant,
        gave_way: &mut Vec<T>,
    ) -> Result<u64, NoRoom> {
        let id = self.next;
        self.next += 1;
        self.accounts.insert(id, Account { network, connection, held: 0, since: now, arriving: true, tag });
        let grown = self.grow(id, STEP, now, gave_way);
        if grown.is_err() {
            self.accounts.remove(&id);
        }
        grown.map(|()| id)
    }

    /// Brings an account up to `wanted` bytes of memory, in whole steps; the rest as [`Ledger::open`].
    fn grow(&mut self, id: u64, wanted: u64, now: Instant, gave_way: &mut Vec<T>) -> Result<(), NoRoom> {
        let account = self.accounts.get(&id).ok_or(NoRoom::GaveWay)?;
        let wanted = wanted.next_multiple_of(STEP);
        let Some(more) = wanted.checked_sub(account.held).filter(|more| *more > 0) else { return Ok(()) };
        let more_large = beyond(wanted) - beyond(account.held);
        let (network, connection) = (account.network, account.connection);
        if self.connections.get(&connection).unwrap_or(&0) + more > self.bounds.connection {
            return Err(NoRoom::Connection);
        }
        let of_network = self.networks.get(&network).unwrap_or(&0) + more;
        if let Some(short) = of_network.checked_sub(self.bounds.network).filter(|short| *short > 0) {
            let freed = self.free(short, id, now, |account| if account.network == network { account.held } else { 0 });
            gave_way.extend(freed.ok_or(NoRoom::Network)?);
        }
        if let Some(short) = (self.used + more).checked_sub(self.bounds.all).filter(|short| *short > 0) {
            gave_way.extend(self.free(short, id, now, |account| account.held).ok_or(NoRoom::All)?);
        }
        let for_large = self.bounds.all - self.bounds.kept;
        if more_large > 0
            && let Some(short) = (self.large + more_large).checked_sub(for_large).filter(|short| *short > 0)
        {
            gave_way.extend(self.free(short, id, now, |account| beyond(account.held)).ok_or(NoRoom::All)?);
        }
        self.set(id, wanted);
        Ok(())
    }

    /// The body has arrived: from here its room is safe.
    fn arrived(&mut self, id: u64) -> Result<(), NoRoom> {
        let account = self.accounts.get_mut(&id).ok_or(NoRoom::GaveWay)?;
        account.arriving = false;
        Ok(())
    }

    /// Gives back what is beyond `wanted`.
    fn shrink(&mut self, id: u64, wanted: u64) {
        let wanted = wanted.next_multiple_of(STEP);
        if self.accounts.get(&id).is_some_and(|account| wanted < account.held) {
            self.set(id, wanted);
        }
    }

    /// Closes an account, if it is open.
    fn close(&mut self, id: u64) -> Option<Account<T>> {
        self.set(id, 0);
        self.accounts.remove(&id)
    }

    /// Whether one more small body would find room now.
    fn has_room(&self, now: Instant) -> bool {
        let may_give_way = |account: &&Account<T>| account.arriving && now >= account.since + ARRIVES_WITHIN;
        self.used + SMALL <= self.bounds.all || {
            let free: u64 = self.accounts.values().filter(may_give_way).map(|account| account.held).sum();
            self.used + SMALL - free.min(self.used) <= self.bounds.all
        }
    }

    fn set(&mut self, id: u64, held: u64) {
        let Some(account) = self.accounts.get_mut(&id) else { return };
        let before = std::mem::replace(&mut account.held, held);
        let moved = |sum: u64| sum + held - before;
        self.used = moved(self.used);
        self.large = self.large + beyond(held) - beyond(before);
        for sum in
            [self.networks.entry(account.network).or_default(), self.connections.entry(account.connection).or_default()]
        {
            *sum = moved(*sum);
        }
        if self.networks.get(&account.network) == Some(&0) {
            self.networks.remove(&account.network);
        }
        if self.connections.get(&account.connection) == Some(&0) {
            self.connections.remove(&account.connection);
        }
    }

    /// Closes accounts of bodies that are still arriving, until `short` bytes, counted by `worth`, and some more
    /// are free. `None`, and nothing is closed, where all of them are not enough.
    fn free(&mut self, short: u64, but: u64, now: Instant, worth: impl Fn(&Account<T>) -> u64) -> Option<Vec<T>> {
        let may_give_way = |id: &u64, account: &Account<T>| {
            *id != but && account.arriving && now >= account.since + ARRIVES_WITHIN && worth(account) > 0
        };
        let mut candidates: Vec<_> = self
            .accounts
            .iter()
            .filter(|(id, account)| may_give_way(id, account))
            .map(|(id, account)| {
                let of_network = self.networks.get(&account.network).copied().unwrap_or_default();
                let of_connection = self.connections.get(&account.connection).copied().unwrap_or_default();
                (Reverse(of_network), Reverse(of_connection), account.since, *id, worth(account))
            })
            .collect();
        if candidates.iter().map(|(.., worth)| worth).sum::<u64>() < short {
            return None;
        }
        candidates.sort_unstable();
        let wanted = short.max(self.bounds.all / FREED_PART);
        let mut freed = 0;
        let mut tags = Vec::new();
        for (.., id, worth) in candidates {
            if freed >= wanted {
                break;
            }
            freed += worth;
            tags.extend(self.close(id).map(|account| account.tag));
        }
        Some(tags)
    }
}

/// Tells a body that it has to give way.
#[derive(Default)]
struct Summons(Notify);

/// The memory of all bodies.
pub struct Bodies(Mutex<Ledger<Arc<Summons>>>);

/// The room of one body. Given back when it is dropped.
pub struct Room {
    bodies: Arc<Bodies>,
    id: u64,
    summons: Arc<Summons>,
}

impl Bodies {
    /// As much as the settings say.
    #[must_use]
    pub fn new(server: &Server) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Ledger::new(Bounds::of(server)))))
    }

    /// Takes new settings. Bodies that are here keep their room.
    pub fn change(&self, server: &Server) {
        self.ledger().bounds = Bounds::of(server);
    }

    /// Room for the beginning of a body that arrives on a connection.
    ///
    /// # Errors
    /// [`NoRoom`]; counted.
    pub fn open(self: &Arc<Self>, network: Network, connection: u64) -> Result<Room, NoRoom> {
        let summons = Arc::new(Summons::default());
        let mut gave_way = Vec::new();
        let opened = self.ledger().open(network, connection, summons.clone(), standstill::now(), &mut gave_way);
        summon(gave_way);
        let id = opened.inspect_err(count)?;
        Ok(Room { bodies: self.clone(), id, summons })
    }

    /// Whether a request of the usual size would be taken now.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.ledger().has_room(standstill::now())
    }

    /// Bytes of memory that are taken, and that there are.
    #[must_use]
    pub fn used(&self) -> (u64, u64) {
        let ledger = self.ledger();
        (ledger.used, ledger.bounds.all)
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger<Arc<Summons>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a refusal. A body that gives way was counted when it was told to.
fn count(reason: &NoRoom) {
    if *reason != NoRoom::GaveWay {
        metrics::body_refused(reason.as_str());
    }
}

fn summon(bodies: Vec<Arc<Summons>>) {
    for summons in bodies {
        metrics::body_refused(NoRoom::GaveWay.as_str());
        summons.0.notify_one();
    }
}

impl Room {
    /// Makes it large enough for a body of so many bytes.
    ///
    /// # Errors
    /// [`NoRoom`]; counted.
    pub fn grow(&self, bytes: u64) -> Result<(), NoRoom> {
        let mut gave_way = Vec::new();
        let grown = self.bodies.ledger().grow(self.id, bytes.saturating_mul(COST), standstill::now(), &mut gave_way);
        summon(gave_way);
        grown.inspect_err(count)
    }

    /// The body is here as a whole.
    ///
    /// # Errors
    /// [`NoRoom::GaveWay`], where it had to a moment ago.
    pub fn arrived(&self) -> Result<(), NoRoom> {
        self.bodies.ledger().arrived(self.id)
    }

    /// Ends when the body has to give way to others.
    pub async fn summoned(&self) {
        self.summons.0.notified().await;
    }

    /// The answer to the request: it keeps as much of the room as it takes itself until the last of it is sent.
    #[must_use]
    pub fn for_answer(self, answer: Bytes) -> Bytes {
        if answer.len() <= SMALL_ANSWER {
            return answer;
        }
        self.bodies.ledger().shrink(self.id, answer.len() as u64);
        Bytes::from_owner(Held { answer, _room: self })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.bodies.ledger().close(self.id);
    }
}

struct Held {
    answer: Bytes,
    _room: Room,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.answer
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { all: 64 * STEP, kept: 16 * STEP, connection: 40 * STEP, network: 56 * STEP };

    fn network(number: u8) -> Network {
        Network::of([192, 0, 2, number].into())
    }

    fn ledger() -> (Tested, Instant) {
        (Tested(Ledger::new(BOUNDS)), Instant::now())
    }

    /// A ledger that returns the bodies that gave way where there was room.
    struct Tested(Ledger<u64>);

    impl Tested {
        fn open(&mut self, of: Network, connection: u64, tag: u64, now: Instant) -> Result<(u64, Vec<u64>), NoRoom> {
            let mut gave_way = Vec::new();
            self.0.open(of, connection, tag, now, &mut gave_way).map(|id| (id, gave_way))
        }

        fn grow(&mut self, id: u64, wanted: u64, now: Instant) -> Result<Vec<u64>, NoRoom> {
            let mut gave_way = Vec::new();
            self.0.grow(id, wanted, now, &mut gave_way).map(|()| gave_way)
        }
    }

    impl std::ops::Deref for Tested {
        type Target = Ledger<u64>;

        fn deref(&self) -> &Ledger<u64> {
            &self.0
        }
    }

    impl std::ops::DerefMut for Tested {
        fn deref_mut(&mut self) -> &mut Ledger<u64> {
            &mut self.0
        }
    }

    #[test]
    fn who_gave_way_in_vain_hears_of_it_too() {
        let (mut ledger, now) = ledger();
        ledger.bounds.kept = 44 * STEP;
        let (large, _) = ledger.open(network(2), 2, 2, now).unwrap();
        ledger.grow(large, 26 * STEP, now).unwrap();
        ledger.arrived(large).unwrap();
        ledger.bounds.network = 7 * STEP;
        ledger.open(network(1), 1, 1, now).unwrap();
        let later = now + ARRIVES_WITHIN;
        let (grows, _) = ledger.open(network(1), 3, 3, later).unwrap();
        assert_eq!(ledger.grow(grows, 6 * STEP, later), Ok(Vec::new()));
        // Its network has room again without the slow one; what large bodies may have is taken, and none of them gives way.
        let mut gave_way = Vec::new();
        assert_eq!(ledger.0.grow(grows, 7 * STEP, later, &mut gave_way), Err(NoRoom::All));
        assert_eq!(gave_way, [1]);
        assert_eq!(ledger.used, ledger.accounts.values().map(|account| account.held).sum::<u64>());
    }

    #[test]
    fn room_is_taken_in_steps_and_given_back() {
        let (mut ledger, now) = ledger();
        let (one, _) = ledger.open(network(1), 1, 1, now).unwrap();
        assert_eq!(ledger.used, STEP);
        ledger.grow(one, STEP, now).unwrap();
        assert_eq!(ledger.used, STEP);
        ledger.grow(one, STEP + 1, now).unwrap();
        assert_eq!(ledger.used, 2 * STEP);
        ledger.grow(one, 20 * STEP, now).unwrap();
        assert_eq!((ledger.used, ledger.large), (20 * STEP, 20 * STEP - SMALL));
        ledger.shrink(one, 3 * STEP - 1);
        assert_eq!((ledger.used, ledger.large), (3 * STEP, 0));
        ledger.close(one);
        ledger.close(one);
        assert_eq!((ledger.used, ledger.large), (0, 0));
        assert!(ledger.networks.is_empty() && ledger.connections.is_empty() && ledger.accounts.is_empty());
        assert_eq!(ledger.grow(one, 2 * STEP, now), Err(NoRoom::GaveWay));
    }

    #[test]
    fn a_connection_and_a_network_have_their_bounds() {
        let (mut ledger, now) = ledger();
        let (one, _) = ledger.open(network(1), 1, 1, now).unwrap();
        ledger.grow(one, 40 * STEP, now).unwrap();
        assert_eq!(ledger.grow(one, 41 * STEP, now), Err(NoRoom::Connection));
        assert_eq!(ledger.open(network(1), 1, 2, now).unwrap_err(), NoRoom::Connection);
        let (two, _) = ledger.open(network(1), 2, 3, now).unwrap();
        ledger.grow(two, 6 * STEP, now).unwrap();
        let (three, _) = ledger.open(network(1), 3, 4, now).unwrap();
        ledger.grow(three, 6 * STEP, now).unwrap();
        assert_eq!(ledger.grow(three, 17 * STEP, now), Err(NoRoom::Network));
        assert!(ledger.open(network(2), 4, 5, now).is_ok());
    }

    #[test]
    fn large_bodies_leave_a_share_to_small_ones() {
        let (mut ledger, now) = ledger();
        ledger.bounds.kept = 32 * STEP;
        // Nothing of it gives way: all has arrived.
        for at in 0..3u8 {
            let (large, _) = ledger.open(network(at), at.into(), at.into(), now).unwrap();
            let most = (1..=64).take_while(|steps| ledger.grow(large, steps * STEP, now).is_ok()).last();
            assert!(most.is_some());
            ledger.arrived(large).unwrap();
        }
        assert_eq!(ledger.large, BOUNDS.all - 32 * STEP);
        // They hold small ones' room as well as any other body does, and no more.
        let free = (BOUNDS.all - ledger.used) / STEP;
        assert!(ledger.has_room(now) && free >= 8, "{free}");
        for at in 0..free {
            ledger.open(network(9), 100 + at, 100 + at, now).unwrap();
        }
        assert_eq!(ledger.open(network(9), 9, 9, now).unwrap_err(), NoRoom::All);
        assert!(!ledger.has_room(now));
    }

    #[test]
    fn what_arrives_slowly_gives_way_first_of_the_network_that_holds_most() {
        let (mut ledger, now) = ledger();
        let later = now + ARRIVES_WITHIN;
        let (oldest, _) = ledger.open(network(1), 1, 1, now).unwrap();
        let (there, _) = ledger.open(network(2), 2, 2, now).unwrap();
        ledger.arrived(there).unwrap();
        let slow: Vec<_> = (0..55).map(|at| ledger.open(network(2), 10 + at, 10 + at, later).unwrap().0).collect();
        // The network's own bodies go for it; those that came just now do not.
        assert_eq!(ledger.open(network(2), 3, 3, later).unwrap_err(), NoRoom::Network);
        let even_later = later + ARRIVES_WITHIN;
        let (_, gave_way) = ledger.open(network(2), 3, 3, even_later).unwrap();
        assert_eq!(gave_way.len(), 1);
        assert!((10..65).contains(&gave_way[0]), "{gave_way:?}");
        // All is full: not the oldest of all goes, but one of those who hold most.
        while ledger.used < BOUNDS.all {
            ledger.open(network(3), 4, 4, even_later).unwrap();
        }
        let (newcomer, gave_way) = ledger.open(network(4), 5, 5, even_later).unwrap();
        assert!(!gave_way.is_empty() && gave_way.iter().all(|tag| (10..65).contains(tag)), "{gave_way:?}");
        assert!(ledger.accounts.contains_key(&oldest) && ledger.accounts.contains_key(&newcomer));
        assert!(slow.iter().filter(|id| !ledger.accounts.contains_key(id)).count() >= 2);
        assert!(ledger.has_room(even_later));
        // What has arrived stays, whatever happens.
        assert!(ledger.accounts.contains_key(&there));
        assert_eq!(ledger.used, ledger.accounts.values().map(|account| account.held).sum::<u64>());
    }

    #[test]
    fn of_a_network_the_connection_that_holds_most_gives_way_first() {
        let (mut ledger, now) = ledger();
        let later = now + ARRIVES_WITHIN;
        // Two that send one body each, of which one is the oldest of all, and one with many streams.
        ledger.open(network(1), 1, 1, now).unwrap();
        while ledger.open(network(1), 2, 2, later).is_ok() && ledger.used < 40 * STEP {}
        ledger.open(network(1), 3, 3, later).unwrap();
        while ledger.used < BOUNDS.network {
            ledger.open(network(1), 4, 4, later).unwrap();
        }
        let (_, gave_way) = ledger.open(network(1), 5, 5, later + ARRIVES_WITHIN).unwrap();
        assert_eq!(gave_way, [2]);
    }

    #[tokio::test]
    async fn a_body_that_has_to_give_way_hears_of_it_and_an_answer_keeps_its_room() {
        let server = Server { body_memory_mib: 64, body_memory_per_address_mib: 0, ..Server::default() };
        let bodies = Bodies::new(&server);
        let slow = bodies.open(network(1), 0).unwrap();
        bodies.ledger().bounds.connection = u64::MAX;
        slow.grow(1024 * 1024).unwrap();
        // As if it had begun some time ago.
        let since = Instant::now().checked_sub(ARRIVES_WITHIN).unwrap();
        bodies.ledger().accounts.get_mut(&slow.id).unwrap().since = since;
        let mut rooms = Vec::new();
        while bodies.ledger().accounts.contains_key(&slow.id) {
            // Each of a network of its own, so that it is the slow one's that holds the most.
            rooms.push(bodies.open(Network::of(std::net::Ipv4Addr::from_bits(rooms.len() as u32).into()), 7).unwrap());
        }
        slow.summoned().await;
        assert_eq!(slow.arrived(), Err(NoRoom::GaveWay));
        assert_eq!(slow.grow(2 * 1024 * 1024), Err(NoRoom::GaveWay));
        drop(slow);
        drop(rooms);
        assert_eq!(bodies.used(), (0, 64 * 1024 * 1024));

        let room = bodies.open(network(1), 1).unwrap();
        room.grow(1024 * 1024).unwrap();
        room.arrived().unwrap();
        let answer = room.for_answer(Bytes::from(vec![7; 100_000]));
        assert_eq!(bodies.used().0, 100_000u64.next_multiple_of(STEP));
        let part = answer.slice(99_999..);
        drop(answer);
        assert!(bodies.used().0 > 0);
        drop(part);
        assert_eq!(bodies.used().0, 0);
        // A small one does not keep the rest from anybody.
        let room = bodies.open(network(1), 1).unwrap();
        let _small = room.for_answer(Bytes::from_static(b"x"));
        assert_eq!(bodies.used().0, 0);
    }
}
