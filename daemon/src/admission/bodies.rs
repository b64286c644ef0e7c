//! Rations the memory for request bodies, whose senders are not known yet.
//!
//! Memory is taken in steps as bytes arrive; the announced length costs nothing. There are four limits: for all bodies
//! together, for a connection, for a network, and a part of the total that is reserved for small bodies (single
//! releases and attestations). If memory is short, bodies are dropped that are still arriving, or whose senders are not
//! known yet, and replies that their clients have not read for some seconds: first those of the network and the connection that
//! hold most memory, and of these the oldest. Bodies of correct clients arrive within moments.
//!
//! `Ledger` is a plain value that is handed `now`. [`Bodies`] shares a ledger; [`Room`] is the memory of one request.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use claviger_hsm::standstill;
use claviger_process::lock::lock;
use tokio::sync::Notify;

use crate::config::Server;
use crate::observe::metrics;
use crate::request::{BodyMemory, Network};

/// Bytes of memory for each byte of a body while its request is processed: the body, its decoded form, the reply.
const COST: u64 = 3;

/// Memory is taken in multiples of this. The first step also covers the request's header and its task.
const STEP: u64 = 32 * 1024;

/// Cost up to which a body counts as small. A release with a protector of an owner and three guardians takes a third of
/// it.
const SMALL: u64 = 64 * 1024 * COST;

/// Time for which an arriving body is safe from being dropped. Most bodies arrive at once.
const ARRIVES_WITHIN: Duration = Duration::from_millis(20);

/// Time for which a reply is safe from being dropped. A client on a slow line needs longer for a large one, but loses it only where
/// memory is short.
const READ_WITHIN: Duration = Duration::from_secs(5);

/// Part of the total that is freed at once if memory is short, because each search visits every body.
const FREED_PART: u64 = 64;

/// Replies with more bytes than this keep their memory until they are sent.
const SMALL_ANSWER: usize = 4 * 1024;

/// Why there is no memory for a body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoRoom {
    /// The limit of all bodies is reached.
    All,
    /// The connection's limit is reached.
    Connection,
    /// The network's limit is reached.
    Network,
    /// The memory was taken for others: the body arrived slowly, its sender was not known yet, or its reply was not read.
    GaveWay,
}

impl NoRoom {
    /// All reasons.
    pub const ALL: [Self; 4] = [Self::All, Self::Connection, Self::Network, Self::GaveWay];

    /// The reason's name in the metrics.
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

/// The limits, in bytes of memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Bounds {
    all: u64,
    /// The part that is reserved for small bodies.
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
        // Enough for a largest batch, and for an HTTP/2 connection with as many releases as allowed.
        Self { all, kept: all / 4, connection: all / 8, network }
    }
}

/// The accounts of all bodies.
struct Ledger<T> {
    bounds: Bounds,
    used: u64,
    /// Memory of all bodies beyond the size of small ones.
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
    /// When its stage began; of a body, when it began to arrive.
    since: Instant,
    stage: Stage,
    tag: T,
}

/// What the memory of an account is used for.
///
/// ```text
///  Body ──▶ Kept ──▶ Answer
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// A body that arrives, or whose sender is not known yet.
    Body,
    /// A body that is worked on.
    Kept,
    /// A reply that its client reads.
    Answer,
}

impl<T> Account<T> {
    /// Whether it gives way to others.
    fn may_give_way(&self, now: Instant) -> bool {
        match self.stage {
            Stage::Body => now >= self.since + ARRIVES_WITHIN,
            Stage::Kept => false,
            Stage::Answer => now >= self.since + READ_WITHIN,
        }
    }
}

/// The part of `held` beyond a small body.
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

    /// Opens an account with memory for the first step. The tags of dropped bodies are added to `gave_way`, even if the
    /// memory is still not enough.
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
        self.accounts.insert(id, Account { network, connection, held: 0, since: now, stage: Stage::Body, tag });
        let grown = self.grow(id, STEP, now, gave_way);
        if grown.is_err() {
            self.accounts.remove(&id);
        }
        grown.map(|()| id)
    }

    /// Grows an account to `wanted` bytes of memory, in whole steps; otherwise like [`Ledger::open`].
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

    /// Keeps a complete body: from here on its memory is safe. Returns `false` if it was dropped before.
    fn keep(&mut self, id: u64) -> bool {
        self.accounts.get_mut(&id).map(|account| account.stage = Stage::Kept).is_some()
    }

    /// The request is answered: from here on the account holds the reply, of `length` bytes.
    fn answer(&mut self, id: u64, length: u64, now: Instant) {
        self.shrink(id, length);
        if let Some(account) = self.accounts.get_mut(&id) {
            (account.stage, account.since) = (Stage::Answer, now);
        }
    }

    /// Gives back the memory beyond `wanted`.
    fn shrink(&mut self, id: u64, wanted: u64) {
        let wanted = wanted.next_multiple_of(STEP);
        if self.accounts.get(&id).is_some_and(|account| wanted < account.held) {
            self.set(id, wanted);
        }
    }

    /// Closes an account if it is open.
    fn close(&mut self, id: u64) -> Option<Account<T>> {
        self.set(id, 0);
        self.accounts.remove(&id)
    }

    /// Whether another small body would get memory now.
    fn has_room(&self, now: Instant) -> bool {
        self.used + SMALL <= self.bounds.all || {
            let free: u64 =
                self.accounts.values().filter(|account| account.may_give_way(now)).map(|account| account.held).sum();
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

    /// Closes accounts that may give way until `short` bytes, counted by `worth`, and some more are free. If all of
    /// them together are not enough, closes none and returns `None`.
    fn free(&mut self, short: u64, but: u64, now: Instant, worth: impl Fn(&Account<T>) -> u64) -> Option<Vec<T>> {
        let may_give_way =
            |id: &u64, account: &Account<T>| *id != but && account.may_give_way(now) && worth(account) > 0;
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

/// Tells the holder of memory that it was taken away.
#[derive(Default)]
struct Summons {
    body: Notify,
    /// Cuts the connection that reads the reply.
    answer: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// The memory of all request bodies.
pub struct Bodies(Mutex<Ledger<Arc<Summons>>>);

/// The memory of one body. Given back on drop.
pub struct Room {
    bodies: Arc<Bodies>,
    id: u64,
    summons: Arc<Summons>,
}

impl Bodies {
    /// Creates the ledger with the limits of the settings.
    #[must_use]
    pub fn new(server: &Server) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Ledger::new(Bounds::of(server)))))
    }

    /// Applies new settings. Existing bodies keep their memory.
    pub fn change(&self, server: &Server) {
        self.ledger().bounds = Bounds::of(server);
    }

    /// Takes memory for the beginning of a body.
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

    /// Whether a request of the usual size would get memory now.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.ledger().has_room(standstill::now())
    }

    /// Bytes of memory in use, and the total.
    #[must_use]
    pub fn used(&self) -> (u64, u64) {
        let ledger = self.ledger();
        (ledger.used, ledger.bounds.all)
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger<Arc<Summons>>> {
        lock(&self.0)
    }
}

/// Counts a refusal. A dropped body was already counted when it was dropped.
fn count(reason: &NoRoom) {
    if *reason != NoRoom::GaveWay {
        metrics::body_refused(reason.as_str());
    }
}

fn summon(bodies: Vec<Arc<Summons>>) {
    for summons in bodies {
        metrics::body_refused(NoRoom::GaveWay.as_str());
        summons.body.notify_one();
        summons.answer.get().into_iter().for_each(|cut| cut());
    }
}

impl Room {
    /// Grows the memory for a body of this many bytes.
    ///
    /// # Errors
    /// [`NoRoom`]; counted.
    pub fn grow(&self, bytes: u64) -> Result<(), NoRoom> {
        let mut gave_way = Vec::new();
        let grown = self.bodies.ledger().grow(self.id, bytes.saturating_mul(COST), standstill::now(), &mut gave_way);
        summon(gave_way);
        grown.inspect_err(count)
    }

    /// Completes when the body has been dropped in favour of others.
    pub async fn summoned(&self) {
        self.summons.body.notified().await;
    }

    /// The reply to the request. A large reply keeps as much memory as it takes itself until it is sent. A client has a moment
    /// to read it; then it gives way where memory is short: `cut` is called, which ends the connection.
    #[must_use]
    pub fn for_answer(self: Arc<Self>, answer: Bytes, cut: impl Fn() + Send + Sync + 'static) -> Bytes {
        if answer.len() <= SMALL_ANSWER {
            return answer;
        }
        // It is set once, because a request has one reply.
        let _ = self.summons.answer.set(Box::new(cut));
        self.bodies.ledger().answer(self.id, answer.len() as u64, standstill::now());
        Bytes::from_owner(Held { answer, _room: self })
    }
}

impl BodyMemory for Room {
    fn keep(&self) -> bool {
        self.bodies.ledger().keep(self.id)
    }

    fn taken_away(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.summoned())
    }
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Room").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.bodies.ledger().close(self.id);
    }
}

struct Held {
    answer: Bytes,
    _room: Arc<Room>,
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

    /// A ledger that returns the dropped bodies on success.
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
        assert!(ledger.keep(large));
        ledger.bounds.network = 7 * STEP;
        ledger.open(network(1), 1, 1, now).unwrap();
        let later = now + ARRIVES_WITHIN;
        let (grows, _) = ledger.open(network(1), 3, 3, later).unwrap();
        assert_eq!(ledger.grow(grows, 6 * STEP, later), Ok(Vec::new()));
        // Dropping the slow body frees enough for its network. The memory for large bodies is full, and none of them is
        // dropped.
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
        // None is dropped, because all are complete.
        for at in 0..3u8 {
            let (large, _) = ledger.open(network(at), at.into(), at.into(), now).unwrap();
            let most = (1..=64).take_while(|steps| ledger.grow(large, steps * STEP, now).is_ok()).last();
            assert!(most.is_some());
            assert!(ledger.keep(large));
        }
        assert_eq!(ledger.large, BOUNDS.all - 32 * STEP);
        // Large bodies may also use the memory for small ones, like any other body, but no more.
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
        assert!(ledger.keep(there));
        let slow: Vec<_> = (0..55).map(|at| ledger.open(network(2), 10 + at, 10 + at, later).unwrap().0).collect();
        // Bodies of the network itself would be dropped, but not those that just arrived.
        assert_eq!(ledger.open(network(2), 3, 3, later).unwrap_err(), NoRoom::Network);
        let even_later = later + ARRIVES_WITHIN;
        let (_, gave_way) = ledger.open(network(2), 3, 3, even_later).unwrap();
        assert_eq!(gave_way.len(), 1);
        assert!((10..65).contains(&gave_way[0]), "{gave_way:?}");
        // All memory is used. The oldest body is not dropped, but one of the network that holds most.
        while ledger.used < BOUNDS.all {
            ledger.open(network(3), 4, 4, even_later).unwrap();
        }
        let (newcomer, gave_way) = ledger.open(network(4), 5, 5, even_later).unwrap();
        assert!(!gave_way.is_empty() && gave_way.iter().all(|tag| (10..65).contains(tag)), "{gave_way:?}");
        assert!(ledger.accounts.contains_key(&oldest) && ledger.accounts.contains_key(&newcomer));
        assert!(slow.iter().filter(|id| !ledger.accounts.contains_key(id)).count() >= 2);
        assert!(ledger.has_room(even_later));
        // A complete body is never dropped.
        assert!(ledger.accounts.contains_key(&there));
        assert_eq!(ledger.used, ledger.accounts.values().map(|account| account.held).sum::<u64>());
    }

    #[test]
    fn of_a_network_the_connection_that_holds_most_gives_way_first() {
        let (mut ledger, now) = ledger();
        let later = now + ARRIVES_WITHIN;
        // Two networks with one body each, one of them the oldest of all, and one network with many streams.
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
            // Each body has its own network, so that the slow one's network holds most.
            rooms.push(bodies.open(Network::of(std::net::Ipv4Addr::from_bits(rooms.len() as u32).into()), 7).unwrap());
        }
        slow.summoned().await;
        assert!(!slow.keep());
        assert_eq!(slow.grow(2 * 1024 * 1024), Err(NoRoom::GaveWay));
        drop(slow);
        drop(rooms);
        assert_eq!(bodies.used(), (0, 64 * 1024 * 1024));

        let room = bodies.open(network(1), 1).unwrap();
        room.grow(1024 * 1024).unwrap();
        assert!(room.keep());
        let answer = Arc::new(room).for_answer(Bytes::from(vec![7; 100_000]), || ());
        assert_eq!(bodies.used().0, 100_000u64.next_multiple_of(STEP));
        let part = answer.slice(99_999..);
        drop(answer);
        assert!(bodies.used().0 > 0);
        drop(part);
        assert_eq!(bodies.used().0, 0);
        // A small body does not reduce the memory of others.
        let room = bodies.open(network(1), 1).unwrap();
        let _small = Arc::new(room).for_answer(Bytes::from_static(b"x"), || ());
        assert_eq!(bodies.used().0, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn replies_that_are_not_read_give_way_to_new_requests() {
        let reply = Bytes::from(vec![7; 1024 * 1024]);
        let memory = Bodies::new(&Server { body_memory_mib: 16, body_memory_per_address_mib: 0, ..Server::default() });
        let cut = Arc::new(std::sync::Mutex::new(Vec::new()));
        let mut replies = Vec::new();
        for connection in 0.. {
            let Ok(room) = memory.open(network(connection as u8 / 2), connection) else { break };
            if room.grow(reply.len() as u64 / COST).is_err() {
                break;
            }
            assert!(room.keep());
            let cut = cut.clone();
            replies.push(Arc::new(room).for_answer(reply.clone(), move || lock(&cut).push(connection)));
        }
        // For a moment they are safe.
        assert!(memory.open(network(200), 200).and_then(|room| room.grow(reply.len() as u64)).is_err());
        assert!(lock(&cut).is_empty());
        tokio::time::advance(READ_WITHIN).await;
        assert!(memory.has_room());
        let room = memory.open(network(200), 200).unwrap();
        room.grow(reply.len() as u64 / COST).unwrap();
        let cut = lock(&cut).clone();
        assert!(!cut.is_empty() && cut.len() < replies.len(), "{cut:?} of {}", replies.len());
        // Nothing is taken from a request that is worked on.
        assert!(room.keep());
        tokio::time::advance(READ_WITHIN).await;
        assert!(!room.bodies.ledger().accounts[&room.id].may_give_way(standstill::now()));
    }
}
