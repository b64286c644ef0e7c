//! Processor time for connections on which no host has proved itself, rationed by address.
//!
//! A TLS handshake, half a request, junk, a document: all take processor time before anything is known of the caller. The time
//! that such a connection takes is charged to its address. When the address has used up its share, each of its connections waits,
//! for five seconds at most, and then has a turn: processor time that is enough for a handshake and a request. An honest
//! newcomer at that address is slower by its wait, which is below every time limit, and no connection is closed for it. When a host
//! proves itself on a connection, the address gets back what the connection took, and the connection waits no more.
//!
//! An address has two such shares: one for the first turns of its connections, and one for what connections take beyond their
//! first turn. So a newcomer does not wait because others at its address keep a connection busy.
//!
//! HTTP/2 lets a client send many requests in one turn, and the work on them is done beside the connection. So a request begins only
//! within a turn of its connection, and a turn is enough for few of them to begin: the others wait in line for the next turn.
//! Work that has begun is charged and does not wait, because it may hold what others need.
//!
//! [`Ration`] is what all connections of a listener share, [`Account`] and [`Meter`] are those of one connection. Time is that of
//! the thread, not of the clock: a machine that is busy otherwise charges nobody for that.

use std::collections::HashMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::thread::available_parallelism;
use std::time::Duration;

use claviger_process::lock::lock;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};

use super::activity::Activity;
use crate::request::Network;
use crate::sys::rate::Rate;

/// Time that one token stands for.
const TOKEN: Duration = Duration::from_micros(10);

/// Tokens that one percent of a processor yields in a second.
const TOKENS_FOR_A_PERCENT: u32 = 1_000;

/// Percent of a second of all processors' time that may be used at once in each kind of turns.
const BURST_PERCENT: u32 = 50;

/// All addresses together have so many times the share of one.
const TOGETHER: u32 = 2;

/// Longest wait for a turn. It bounds what the connections of an address take together, however many they are: 500 of them
/// take 200 ms of processor time a second. It is below the time that clients wait for a connection, ten seconds and more, and
/// where the server's own time limits are short, it is shorter.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Processor time of a turn in nanoseconds: a TLS handshake and a release.
const TURN: u64 = 2_000_000;

/// Processor time of a turn that is set aside for a request when it begins, in nanoseconds. What it takes is known only later, when
/// many others may have begun: so no more than four begin in a turn.
const REQUEST: u64 = TURN / 4;

/// An address that has used less than this part of its burst does not answer for what all addresses use together.
const INNOCENT_PART: u32 = 4;

/// What it takes to accept a connection and to close it, apart from what is measured.
pub(super) const ACCEPT: Duration = Duration::from_micros(30);

/// The shares of a listener's addresses. `None` without a limit.
#[derive(Debug)]
pub(super) struct Ration {
    shares: Option<Shares>,
    longest_wait: Duration,
    /// Number of connections that wait for their turn, of each address that has any.
    in_line: Mutex<HashMap<Network, usize>>,
}

#[derive(Debug)]
struct Shares {
    first_turns: Share,
    later_turns: Share,
}

/// The shares of all addresses in one kind of turns.
#[derive(Debug)]
struct Share {
    networks: Rate<Network>,
    together: Rate<()>,
    /// Tokens that an address may have used before it answers for all.
    innocent: u32,
}

impl Ration {
    /// So many percent of the processors' time for each address and each kind of turns; 0 is no limit. `shortest` is the
    /// shortest of the time limits that go on while a client waits for its turn: half of it is left to the client.
    pub(super) fn new(percent: u32, shortest: Duration) -> Arc<Self> {
        let processors = available_parallelism().map_or(1, |number| u32::try_from(number.get()).unwrap_or(1));
        Arc::new(Self { longest_wait: LONGEST_WAIT.min(shortest / 2), ..Self::of(percent, processors) })
    }

    fn of(percent: u32, processors: u32) -> Self {
        let share = || Share::new(percent, processors);
        let shares = (percent > 0).then(|| Shares { first_turns: share(), later_turns: share() });
        Self { shares, longest_wait: LONGEST_WAIT, in_line: Mutex::default() }
    }

    /// Uses up all shares of an address for good.
    #[cfg(test)]
    pub(super) fn use_up(&self, network: &Network) {
        for share in self.shares.iter().flat_map(|shares| [&shares.first_turns, &shares.later_turns]) {
            share.debit(network, u32::MAX / 2);
        }
    }

    /// How long a connection that has taken `spent` nanoseconds waits for its next turn.
    fn wait(&self, network: &Network, spent: u64) -> Option<Duration> {
        let shares = self.shares.as_ref()?;
        let share = if spent < TURN { &shares.first_turns } else { &shares.later_turns };
        share.wait(network).map(|wait| wait.min(self.longest_wait))
    }

    /// Whether connections of this address wait for their turn, or a new one would have to.
    pub(super) fn is_in_debt(&self, network: &Network) -> bool {
        self.wait(network, 0).is_some() || lock(&self.in_line).contains_key(network)
    }

    /// Charges what a connection took beyond the `before` nanoseconds that it had taken until then.
    fn charge(&self, network: &Network, before: u64, after: u64) {
        self.for_each_share(before, after, |share, tokens| share.debit(network, tokens));
    }

    /// Gives back the `spent` nanoseconds that a connection took.
    fn give_back(&self, network: &Network, spent: u64) {
        self.for_each_share(0, spent, |share, tokens| share.give_back(network, tokens));
    }

    /// Splits what a connection took into its first turn and the rest.
    fn for_each_share(&self, before: u64, after: u64, act: impl Fn(&Share, u32)) {
        let Some(shares) = &self.shares else { return };
        let parts = [(&shares.first_turns, 0, TURN), (&shares.later_turns, TURN, u64::MAX)];
        for (share, begin, end) in parts {
            let tokens = tokens(after.clamp(begin, end)) - tokens(before.clamp(begin, end));
            if tokens > 0 {
                act(share, u32::try_from(tokens).unwrap_or(u32::MAX));
            }
        }
    }
}

impl Share {
    fn new(percent: u32, processors: u32) -> Self {
        let rate = percent.saturating_mul(processors).saturating_mul(TOKENS_FOR_A_PERCENT);
        let burst = BURST_PERCENT.saturating_mul(processors).saturating_mul(TOKENS_FOR_A_PERCENT);
        Self {
            networks: Rate::new(rate, burst),
            together: Rate::new(rate.saturating_mul(TOGETHER), burst.saturating_mul(TOGETHER)),
            innocent: burst / INNOCENT_PART,
        }
    }

    fn wait(&self, network: &Network) -> Option<Duration> {
        let own = self.networks.look(network).err();
        let answers_for_all = self.networks.missing(network) > self.innocent;
        let all = answers_for_all.then(|| self.together.look(&()).err()).flatten();
        own.max(all)
    }

    fn debit(&self, network: &Network, tokens: u32) {
        self.networks.debit(network, tokens);
        self.together.debit(&(), tokens);
    }

    fn give_back(&self, network: &Network, tokens: u32) {
        self.networks.give_back(network, tokens);
        self.together.give_back(&(), tokens);
    }
}

/// The turns of a connection on which no host has proved itself.
///
/// ```text
///           in debt              the wait is over
///  Unasked ─────────▶ Waiting ─────────────────────▶ Running ──┐ used up,
///     │                  ▲                           │ ▲   ▲   │ not in debt
///     │                  └───── used up, in debt ────┘ │   └───┘
///     └─────────────────── not in debt ────────────────┘
/// ```
#[derive(Clone, Copy, Debug)]
enum Turn {
    Unasked,
    Waiting {
        until: Instant,
    },
    Running {
        /// What the account will have spent when the turn ends, in nanoseconds.
        ends: u64,
        /// Nanoseconds that are set aside for the requests that have begun in this turn.
        set_aside: u64,
    },
}

/// Who wants to go on in a turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wants {
    /// The connection, to read and write.
    ToGoOn,
    /// A request that was read, to begin.
    ToBegin,
}

/// The account of one connection.
#[derive(Debug)]
pub(super) struct Account {
    ration: Arc<Ration>,
    network: Network,
    /// Whether a host has proved itself on the connection.
    proved: AtomicBool,
    /// Told when it does.
    has_proved: Notify,
    /// Nanoseconds that the connection took and that were not given back.
    spent: AtomicU64,
    turn: Mutex<Turn>,
    /// Nanoseconds that the connection has had to wait, and those that it still has to.
    waits: AtomicU64,
    /// Held by the request that begins next; the others are in line for it.
    begins_next: tokio::sync::Mutex<()>,
}

impl Account {
    /// A connection of an address, which has cost what every connection costs.
    pub(super) fn open(ration: &Arc<Ration>, network: Network) -> Arc<Self> {
        let account = Self {
            ration: Arc::clone(ration),
            network,
            proved: AtomicBool::new(false),
            has_proved: Notify::new(),
            spent: AtomicU64::new(0),
            turn: Mutex::new(Turn::Unasked),
            waits: AtomicU64::new(0),
            begins_next: tokio::sync::Mutex::new(()),
        };
        account.charge(ACCEPT);
        Arc::new(account)
    }

    /// A host has proved itself.
    pub(super) fn prove(&self) {
        if !self.proved.swap(true, Ordering::AcqRel) {
            self.ration.give_back(&self.network, self.spent.swap(0, Ordering::AcqRel));
            self.has_proved.notify_waiters();
        }
    }

    /// Something was refused whose sender did not prove to be a host.
    pub(super) fn doubt(&self) {
        self.proved.store(false, Ordering::Release);
    }

    /// Whether a host has proved itself.
    pub(super) fn is_proved(&self) -> bool {
        self.proved.load(Ordering::Acquire)
    }

    fn is_free(&self) -> bool {
        self.ration.shares.is_none() || self.is_proved()
    }

    /// Whether it is the connection's turn, which begins here if there is nothing to wait for.
    ///
    /// # Errors
    /// It is not; the value is when the next one begins.
    fn turn(&self, wants: Wants) -> Result<(), Instant> {
        let spent = self.spent.load(Ordering::Acquire);
        let reserve = if wants == Wants::ToBegin { REQUEST } else { 0 };
        let mut turn = lock(&self.turn);
        let wait = match &mut *turn {
            Turn::Waiting { until } if Instant::now() < *until => return Err(*until),
            Turn::Waiting { .. } => None,
            Turn::Running { ends, set_aside } => {
                // A turn that was granted lasts, however many others take theirs meanwhile.
                let left = ends.saturating_sub(spent);
                let taken = if wants == Wants::ToBegin { *set_aside } else { 0 };
                // More than a turn is left where the address got back what was spent: then the turn is over.
                if left <= TURN && taken < left {
                    *set_aside += reserve;
                    return Ok(());
                }
                self.ration.wait(&self.network, spent)
            }
            Turn::Unasked => self.ration.wait(&self.network, spent),
        };
        if let Some(wait) = wait {
            let until = Instant::now() + wait;
            *turn = Turn::Waiting { until };
            return Err(until);
        }
        *turn = Turn::Running { ends: spent.saturating_add(TURN), set_aside: reserve };
        Ok(())
    }

    /// How long the connection has had to wait for its turns, and still has to. It counts in no time limit of its client.
    pub(super) fn waits(&self) -> Duration {
        Duration::from_nanos(self.waits.load(Ordering::Relaxed))
    }

    /// Whether a request that was read may begin at once.
    pub(super) fn may_begin(&self) -> bool {
        self.is_free() || (self.begins_next.try_lock().is_ok() && self.turn(Wants::ToBegin).is_ok())
    }

    /// Waits until a request that was read may begin: within a turn of its connection, or when a host has proved itself.
    pub(super) async fn turn_to_begin(&self) {
        let _first = self.begins_next.lock().await;
        loop {
            let mut proved = pin!(self.has_proved.notified());
            // What is proved from here on is not missed.
            proved.as_mut().enable();
            if self.is_free() {
                return;
            }
            let Err(until) = self.turn(Wants::ToBegin) else { return };
            tokio::select! {
                () = tokio::time::sleep_until(until) => {}
                () = proved => {}
            }
        }
    }

    fn charge(&self, time: Duration) {
        let spent = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let before = self.spent.fetch_add(spent, Ordering::AcqRel);
        self.ration.charge(&self.network, before, before.saturating_add(spent));
    }

    /// Does `work`, and charges the time that it takes.
    pub(super) fn charged<T>(&self, work: impl FnOnce() -> T) -> T {
        if self.is_free() {
            return work();
        }
        let begun = thread_time();
        let done = work();
        self.charge(thread_time().saturating_sub(begun));
        done
    }
}

fn tokens(nanoseconds: u64) -> u64 {
    nanoseconds / TOKEN.as_nanos() as u64
}

/// Processor time of this thread.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
}

/// Has a connection wait for its turns. Meanwhile it is not the client that is waited for.
pub(super) struct Meter {
    account: Arc<Account>,
    activity: Arc<Activity>,
    /// Set while it waits.
    waiting: Option<(Pin<Box<Sleep>>, InLine)>,
}

/// A connection that waits for its turn, among those of its address.
struct InLine(Arc<Account>);

impl InLine {
    fn stand(account: &Arc<Account>) -> Self {
        *lock(&account.ration.in_line).entry(account.network).or_default() += 1;
        Self(account.clone())
    }
}

impl Drop for InLine {
    fn drop(&mut self) {
        let mut in_line = lock(&self.0.ration.in_line);
        if let Some(number) = in_line.get_mut(&self.0.network) {
            *number -= 1;
            if *number == 0 {
                in_line.remove(&self.0.network);
            }
        }
    }
}

impl Meter {
    pub(super) fn new(account: Arc<Account>, activity: Arc<Activity>) -> Self {
        Self { account, activity, waiting: None }
    }

    fn set_waiting(&mut self, until: Option<Instant>) {
        if until.is_some() != self.waiting.is_some() {
            self.activity.wait_for_turn(until.is_some());
        }
        if let Some(until) = until {
            let wait = until.saturating_duration_since(Instant::now());
            self.account.waits.fetch_add(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        self.waiting = until.map(|until| (Box::pin(tokio::time::sleep_until(until)), InLine::stand(&self.account)));
    }

    /// Polls when it is the connection's turn, and charges the time that it takes.
    pub(super) fn poll<T>(&mut self, cx: &mut Context<'_>, poll: impl FnOnce(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        if self.account.is_free() {
            self.set_waiting(None);
            return poll(cx);
        }
        if self.waiting.is_none()
            && let Err(until) = self.account.turn(Wants::ToGoOn)
        {
            self.set_waiting(Some(until));
        }
        if let Some((waiting, _)) = &mut self.waiting {
            ready!(waiting.as_mut().poll(cx));
            self.set_waiting(None);
            // It has waited, and is polled even if requests that waited as well have used up this turn.
            let _ = self.account.turn(Wants::ToGoOn);
        }
        self.account.charged(|| poll(cx))
    }
}

/// Work for a connection that is charged to it, and does not wait.
pub(super) struct Charged<F> {
    work: Pin<Box<F>>,
    account: Arc<Account>,
}

impl<F> Charged<F> {
    pub(super) fn new(work: Pin<Box<F>>, account: Arc<Account>) -> Self {
        Self { work, account }
    }
}

impl<F: Future> Future for Charged<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { work, account } = &mut *self;
        account.charged(|| work.as_mut().poll(cx))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    fn network(last: u8) -> Network {
        Network::of(std::net::IpAddr::from([192, 0, 2, last]))
    }

    /// One percent of two processors: twenty milliseconds a second, and a second at once.
    fn ration() -> Arc<Ration> {
        Arc::new(Ration::of(1, 2))
    }

    /// New connections of this address take so much time together, in their first turns.
    fn spend_in_first_turns(ration: &Arc<Ration>, network: Network, milliseconds: u64) {
        for _ in 0..milliseconds / 2 {
            // What opening it cost is a part.
            Account::open(ration, network).charge(Duration::from_nanos(TURN) - ACCEPT);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_is_in_debt_while_one_of_its_connections_waits() {
        let ration = ration();
        spend_in_first_turns(&ration, network(1), 1_200);
        let mut meter = Meter::new(Account::open(&ration, network(1)), Activity::new(false, 1));
        let polled = poll_fn(|cx| Poll::Ready(meter.poll(cx, |_| Poll::Ready(())).is_ready())).await;
        assert!(!polled && ration.is_in_debt(&network(1)) && !ration.is_in_debt(&network(2)));
        // What others of the address used is given back, and the connection still waits.
        (0..700).for_each(|_| ration.give_back(&network(1), TURN));
        assert_eq!(ration.wait(&network(1), 0), None);
        assert!(ration.is_in_debt(&network(1)));
        drop(meter);
        assert!(!ration.is_in_debt(&network(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_used_up_its_share_waits_and_then_each_connection_has_a_turn() {
        let ration = ration();
        spend_in_first_turns(&ration, network(1), 1_200);
        assert_eq!(ration.wait(&network(1), 0), Some(LONGEST_WAIT), "however much the address owes");
        assert_eq!(ration.wait(&network(2), 0), None);
        // Each waits once, although the first that has its turn uses up more again.
        let begun = Instant::now();
        let turn = |number: u64| {
            let account = Account::open(&ration, network(1));
            async move {
                let mut meter = Meter::new(account.clone(), Activity::new(false, 1));
                poll_fn(|cx| meter.poll(cx, |_| Poll::Ready(()))).await;
                account.charge(Duration::from_millis(100));
                (number, Instant::now() - begun)
            }
        };
        let waited = tokio::join!(turn(1), turn(2), turn(3));
        for (number, waited) in [waited.0, waited.1, waited.2] {
            assert!(waited < LONGEST_WAIT * 2, "{number} waited {waited:?}");
        }
        // Another address does not.
        let begun = Instant::now();
        let mut meter = Meter::new(Account::open(&ration, network(2)), Activity::new(false, 1));
        poll_fn(|cx| meter.poll(cx, |_| Poll::Ready(()))).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_newcomer_does_not_wait_for_what_others_take_beyond_their_first_turn() {
        let ration = ration();
        let busy = Account::open(&ration, network(1));
        busy.charge(Duration::from_secs(2));
        assert_eq!(ration.wait(&network(1), 0), None);
        assert_eq!(ration.wait(&network(1), TURN), Some(LONGEST_WAIT));
        let begun = Instant::now();
        let mut meter = Meter::new(busy, Activity::new(false, 1));
        poll_fn(|cx| meter.poll(cx, |_| Poll::Ready(()))).await;
        assert_eq!(begun.elapsed(), LONGEST_WAIT, "it was not its turn");
        let mut meter = Meter::new(Account::open(&ration, network(1)), Activity::new(false, 1));
        poll_fn(|cx| meter.poll(cx, |_| Poll::Ready(()))).await;
        assert_eq!(begun.elapsed(), LONGEST_WAIT, "a newcomer waited");
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_is_enough_for_a_handshake_and_a_request_in_many_polls() {
        let ration = ration();
        spend_in_first_turns(&ration, network(1), 2_000);
        let account = Account::open(&ration, network(1));
        let mut meter = Meter::new(account.clone(), Activity::new(false, 1));
        let begun = Instant::now();
        for _ in 0..6 {
            poll_fn(|cx| meter.poll(cx, |_| Poll::Ready(()))).await;
            account.charge(Duration::from_nanos(TURN / 6 - 1_000));
        }
        assert!(begun.elapsed() < LONGEST_WAIT * 2, "it waited {:?}", begun.elapsed());
        // Beyond that it is the other share that decides.
        Account::open(&ration, network(1)).charge(Duration::from_secs(2));
        account.charge(Duration::from_nanos(TURN));
        poll_fn(|cx| meter.poll(cx, |_| Poll::Ready(()))).await;
        assert!(begun.elapsed() >= LONGEST_WAIT * 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_waits_for_its_turn_is_not_closed_for_room() {
        let ration = ration();
        spend_in_first_turns(&ration, network(1), 2_000);
        let account = Account::open(&ration, network(1));
        let activity = Activity::new(false, 1);
        let mut meter = Meter::new(account, activity.clone());
        activity.look();
        assert!(activity.may_be_closed());
        let mut first = true;
        poll_fn(|cx| {
            let polled = meter.poll(cx, |_| Poll::Ready(()));
            assert_eq!((polled.is_pending(), activity.may_be_closed()), (first, !first));
            first = false;
            polled
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_host_took_is_given_back_and_its_connection_does_not_wait() {
        let ration = ration();
        let host = Account::open(&ration, network(1));
        let stranger = Account::open(&ration, network(1));
        host.charge(Duration::from_secs(2));
        assert!(ration.wait(&network(1), TURN).is_some());
        host.prove();
        host.prove();
        assert_eq!(ration.wait(&network(1), TURN), None, "the host's share was not given back");
        stranger.charge(Duration::from_secs(2));
        spend_in_first_turns(&ration, network(1), 2_000);
        assert!(ration.wait(&network(1), TURN).is_some());
        let begun = Instant::now();
        let mut meter = Meter::new(host.clone(), Activity::new(false, 1));
        poll_fn(|cx| meter.poll(cx, |_| Poll::Ready(()))).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        // Until something is refused on it that no host has sent.
        host.doubt();
        poll_fn(|cx| meter.poll(cx, |_| Poll::Ready(()))).await;
        assert!(begun.elapsed() >= LONGEST_WAIT);
    }

    #[tokio::test(start_paused = true)]
    async fn all_addresses_together_have_a_bound() {
        let ration = ration();
        for last in 1..=5 {
            Account::open(&ration, network(last)).charge(Duration::from_millis(600));
            spend_in_first_turns(&ration, network(last), 600);
            for spent in [0, TURN] {
                assert_eq!(ration.wait(&network(last), spent).is_some(), last > 3, "{last}");
            }
        }
        assert_eq!(ration.wait(&network(200), 0), None, "an address that has used nothing waits for others");
        let free = Arc::new(Ration::of(0, 1));
        Account::open(&free, network(1)).charge(Duration::from_secs(1_000));
        assert_eq!(free.wait(&network(1), TURN), None);
    }

    #[tokio::test]
    async fn it_is_the_time_of_the_thread_that_is_charged() {
        let account = Account::open(&ration(), network(1));
        account.charged(|| std::thread::sleep(Duration::from_millis(30)));
        let slept = account.spent.load(Ordering::Relaxed);
        assert!(slept < 20_000_000, "{slept}");
        let work = async {
            let begun = thread_time();
            while thread_time() - begun < Duration::from_millis(5) {}
        };
        let begun = Instant::now();
        Charged::new(Box::pin(work), account.clone()).await;
        let worked = account.spent.load(Ordering::Relaxed) - slept;
        assert!(worked >= 5_000_000, "{worked} ns charged in {:?}", begun.elapsed());
    }

    /// A request of a connection: it begins when it may, and takes a millisecond.
    async fn request(account: Arc<Account>, begun: Arc<Mutex<Vec<Instant>>>) {
        if !account.may_begin() {
            account.turn_to_begin().await;
        }
        lock(&begun).push(Instant::now());
        tokio::task::yield_now().await;
        account.charge(Duration::from_millis(1));
    }

    #[tokio::test(start_paused = true)]
    async fn of_the_requests_of_a_connection_few_begin_in_a_turn_until_a_host_proves_itself() {
        let ration = ration();
        ration.use_up(&network(1));
        let account = Account::open(&ration, network(1));
        let begun = Arc::new(Mutex::new(Vec::new()));
        let first = Instant::now();
        let mut all = tokio::task::JoinSet::new();
        for _ in 0..128 {
            all.spawn(request(account.clone(), begun.clone()));
        }
        for turn in 0..4_u32 {
            tokio::time::sleep_until(first + LONGEST_WAIT * turn + LONGEST_WAIT / 2).await;
            let begun = lock(&begun).len() as u64;
            assert!(begun <= u64::from(turn) * TURN / REQUEST, "{begun} have begun after {turn} waits");
            assert!(begun >= u64::from(turn), "{begun} have begun after {turn} waits");
        }
        // The connection itself has its turns, however many requests wait for theirs.
        let mut meter = Meter::new(account.clone(), Activity::new(false, 1));
        let waits = Instant::now();
        poll_fn(|cx| meter.poll(cx, |_| Poll::Ready(()))).await;
        assert!(waits.elapsed() <= LONGEST_WAIT);
        let proved = Instant::now();
        account.prove();
        all.join_all().await;
        assert_eq!((lock(&begun).len(), proved.elapsed()), (128, Duration::ZERO));
        // From here on, all of them begin at once.
        let mut all = tokio::task::JoinSet::new();
        for _ in 0..128 {
            all.spawn(request(account.clone(), begun.clone()));
        }
        all.join_all().await;
        assert_eq!((lock(&begun).len(), proved.elapsed()), (256, Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn the_requests_of_an_address_that_has_its_share_begin_at_once() {
        let account = Account::open(&ration(), network(1));
        let begun = Arc::new(Mutex::new(Vec::new()));
        let first = Instant::now();
        let mut all = tokio::task::JoinSet::new();
        for _ in 0..128 {
            all.spawn(request(account.clone(), begun.clone()));
        }
        all.join_all().await;
        assert_eq!(first.elapsed(), Duration::ZERO);
    }
}
