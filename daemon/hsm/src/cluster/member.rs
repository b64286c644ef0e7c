//! One token of one module: its queue, its pool of sessions, its login.
//!
//! Calls wait in the member's own bounded queue. Somebody has to get sessions to work at it: a *runner*, a task that takes
//! free sessions out of the pool and hires them, for as long as more waits than they will take. A hired session goes on
//! taking from the queue by itself, so under load nobody but session threads touches it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use crossbeam::channel::{self, Receiver, Sender, TrySendError};
use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, SessionState, UserType};
use cryptoki::slot::Slot;
use deadpool::managed::{self, Metrics, Object, Pool, PoolError, RecycleError};
use tokio::sync::{Notify, oneshot};
use tracing::{info, warn};

use super::health::{Health, LastError, MemberState};
use crate::config::{MemberConfig, Pin, TokenRef};
use crate::error::HsmError;
use crate::fault::{Whose, refuses_pin};
use crate::keys::{KeyId, Oaep};
use crate::module::Module;
use crate::policy::batch;
use crate::policy::pick::Candidate;
use crate::request::{Answer, KnownGood, Outcome, Request, first_known};
use crate::worker::{self, Desk, Handle, Job, Look};
use crate::{Event, Observer};

/// How long opening a session may take. Generous: a network HSM may need seconds for a login, and nobody waits for it but
/// probes and those for whom there is no session at all, who are sent elsewhere earlier.
const OPEN_PATIENCE: Duration = Duration::from_secs(30);
/// After how long a token that gave fewer sessions than asked for is asked again.
const ASK_FOR_MORE: Duration = Duration::from_secs(30);
/// How often a member may be asked to prove itself because of answers that may be the caller's fault.
const BLAME_PAUSE: Duration = Duration::from_millis(100);
/// How long the opinion of a member that was proved wrong does not count.
const DOUBTFUL: Duration = Duration::from_secs(10);
/// How long a member that lacked a key is passed over for it. Replication between HSMs takes a moment.
const LACKS: Duration = Duration::from_secs(2);
/// Keys that a member is known to lack; beyond, nothing is remembered.
const MOST_LACKING: usize = 64;
/// After how long without a result a member that is up has to prove that it still is: the one that nobody needs now is the one
/// that is needed when others fail.
const SILENCE: Duration = Duration::from_secs(10);
/// How long to wait at the end for calls that are still at the token.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);
/// The same when there are none that anybody waits for, and only sessions are to be closed.
const CLOSE_QUICKLY: Duration = Duration::from_secs(1);

/// How a token decrypts with certain OAEP parameters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scheme {
    /// With CKM_RSA_PKCS_OAEP.
    Native,
    /// With CKM_RSA_X_509; the padding is removed in software.
    Raw,
}

/// How a member is.
#[derive(Clone, Debug)]
pub struct MemberStatus {
    /// Its name.
    pub name: String,
    /// The token that it is.
    pub token: String,
    /// What it is doing.
    pub state: MemberState,
    /// Since when it is up, or is not.
    pub since: std::time::SystemTime,
    /// Smaller serves first.
    pub priority: u32,
    /// Share of the load within a priority.
    pub weight: u32,
    /// The moving estimate of what a call takes there, queueing included.
    pub latency: Duration,
    /// Calls that wait or run.
    pub in_flight: usize,
    /// Calls that wait for a session.
    pub waiting: usize,
    /// Sessions for operations; the one that holds the login is not counted.
    pub sessions_open: usize,
    /// Sessions that the configuration asks for.
    pub sessions_wanted: usize,
    /// Sessions that are in a call.
    pub sessions_busy: usize,
    /// Threads that were given up in a call that hangs.
    pub sessions_stuck: usize,
    /// How often it was closed for a fault.
    pub closings: u64,
    /// What it was last blamed for, also when it has come up since.
    pub last_error: Option<LastError>,
}

/// A member as the cluster sees it.
pub(crate) struct Member {
    pub(crate) shared: Arc<Shared>,
    pool: Pool<Sessions>,
    runners: AtomicUsize,
    priority: u32,
    weight: u32,
}

/// What a member's sessions share.
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) token: TokenRef,
    pub(crate) module: Arc<Module>,
    pin: Mutex<Pin>,
    observer: Observer,
    known: Arc<RwLock<Arc<[KnownGood]>>>,
    health: Mutex<Health>,
    waiting: (Sender<Job>, Receiver<Job>),
    /// Sessions that were hired and have not looked at the queue yet.
    on_their_way: AtomicUsize,
    /// When there was last a result, good or bad.
    heard: Mutex<Instant>,
    /// When a session last took something from the queue, or something came into the empty queue.
    progress: Mutex<Instant>,
    desks: Mutex<Vec<Weak<Desk>>>,
    /// Kept for as long as the member is not closed: a token logs out when its last session closes. The inner lock also
    /// makes sure that the PIN is tried by one session at a time. Another cell for every generation, so that nobody waits
    /// for a login that hangs.
    login: Mutex<Arc<Mutex<Option<Login>>>>,
    /// Raised when the member is closed; older sessions are not used again.
    generation: AtomicU64,
    /// Open sessions of the current generation.
    usable: Mutex<usize>,
    /// When the token gave fewer sessions than asked for. For a while no more are asked for.
    short_since: Mutex<Option<Instant>>,
    /// Told when a session becomes free.
    freed: Notify,
    /// Open sessions of any generation.
    open: AtomicUsize,
    in_flight: AtomicUsize,
    keys_made: AtomicU64,
    lacking: Mutex<HashMap<KeyId, Instant>>,
    tried_out: Mutex<bool>,
    /// What trials have found, by [`Oaep::index`]: 0 unknown, 1 native, 2 raw.
    schemes: [AtomicU8; Oaep::COUNT],
    blame: Mutex<Blame>,
    live_threads: AtomicUsize,
    stuck: AtomicUsize,
    /// A probe failed in a way that a fresh module may help against.
    wants_module: AtomicBool,
    max_sessions: usize,
    batch: usize,
    /// How many calls may wait or run.
    max_queue: usize,
    said_few_sessions: AtomicBool,
}

/// What the known-good probe for doubtful answers last found.
struct Blame {
    at: Option<Instant>,
    innocent: bool,
    /// Until then its opinion of an input does not count.
    doubtful_until: Option<Instant>,
}

struct Login {
    session: Session,
    slot: Slot,
}

/// One call that waits or runs, counted while this lives.
pub(crate) struct InFlight(Arc<Shared>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The right to use a session. Dropping it gives the session back to the pool.
pub(crate) type Lease = Object<Sessions>;

/// Counts a session thread while it lives.
pub(crate) struct LiveThread(Arc<Shared>);

impl Drop for LiveThread {
    fn drop(&mut self) {
        self.0.live_threads.fetch_sub(1, Ordering::AcqRel);
    }
}

/// deadpool's way to sessions.
pub(crate) struct Sessions {
    shared: Arc<Shared>,
}

impl managed::Manager for Sessions {
    type Type = Handle;
    type Error = HsmError;

    async fn create(&self) -> Result<Handle, HsmError> {
        self.shared.may_open()?;
        let (told, opened) = oneshot::channel();
        worker::spawn(Arc::clone(&self.shared), told)?;
        match tokio::time::timeout(OPEN_PATIENCE, opened).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(self.shared.thread_ended()),
            Err(_) => Err(HsmError::Hung { op: "open" }),
        }
    }

    async fn recycle(&self, handle: &mut Handle, _: &Metrics) -> managed::RecycleResult<HsmError> {
        if handle.is_usable(self.shared.generation()) {
            Ok(())
        } else {
            Err(RecycleError::message("the session has ended"))
        }
    }
}

/// How long calls may take.
#[derive(Clone, Copy)]
pub(crate) struct Patience {
    /// Before the caller is sent elsewhere.
    pub(crate) share: Duration,
    /// Before the member counts as hung.
    pub(crate) watchdog: Duration,
}

impl Member {
    pub(crate) fn new(
        config: MemberConfig,
        module: Arc<Module>,
        known: Arc<RwLock<Arc<[KnownGood]>>>,
        observer: Observer,
    ) -> Result<Self, HsmError> {
        let max_sessions = config.sessions.max(1);
        let now = Instant::now();
        let shared = Arc::new(Shared {
            health: Mutex::new(Health::new(&config.name, now)),
            name: config.name,
            token: config.token,
            module,
            pin: Mutex::new(config.pin),
            observer,
            known,
            waiting: channel::bounded(config.queue.max(1)),
            on_their_way: AtomicUsize::new(0),
            heard: Mutex::new(now),
            progress: Mutex::new(now),
            desks: Mutex::new(Vec::new()),
            login: Mutex::default(),
            generation: AtomicU64::new(0),
            usable: Mutex::new(0),
            short_since: Mutex::new(None),
            freed: Notify::new(),
            open: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            keys_made: AtomicU64::new(0),
            lacking: Mutex::default(),
            tried_out: Mutex::new(false),
            schemes: Default::default(),
            blame: Mutex::new(Blame { at: None, innocent: true, doubtful_until: None }),
            live_threads: AtomicUsize::new(0),
            stuck: AtomicUsize::new(0),
            wants_module: AtomicBool::new(false),
            max_sessions,
            batch: config.batch.max(1),
            max_queue: config.queue.max(1),
            said_few_sessions: AtomicBool::new(false),
        });
        let pool = Pool::builder(Sessions { shared: Arc::clone(&shared) })
            .max_size(max_sessions)
            .build()
            .map_err(|error| HsmError::NoMember(error.to_string()))?;
        Ok(Member { shared, pool, runners: AtomicUsize::new(0), priority: config.priority, weight: config.weight })
    }

    /// For [`pick`](crate::policy::pick::pick).
    pub(crate) fn candidate(&self, key: Option<&KeyId>, now: Instant) -> Candidate {
        let shared = &self.shared;
        let in_flight = shared.in_flight.load(Ordering::Acquire);
        // Only where something runs is it worth a look how long it has run.
        let oldest = if in_flight == 0 { None } else { shared.oldest(now) };
        let health = shared.health();
        Candidate {
            priority: self.priority,
            weight: self.weight,
            latency: health.latency.estimate(now),
            oldest,
            in_flight,
            able: health.is_able() && in_flight < shared.max_queue && !key.is_some_and(|key| shared.lacks(key, now)),
        }
    }

    /// Whether the member would serve if it had the key.
    pub(crate) fn only_lacks(&self, key: &KeyId, now: Instant) -> bool {
        self.shared.health().is_able() && self.shared.lacks(key, now)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.shared.in_flight.load(Ordering::Acquire) >= self.shared.max_queue
    }

    /// One request to whichever session is free first.
    pub(crate) async fn call(
        self: &Arc<Self>,
        request: &Arc<Request>,
        deadline: Instant,
        patience: Patience,
    ) -> Outcome {
        let shared = &self.shared;
        let (job, answer) = match shared.job(request, deadline, patience) {
            Ok(job) => job,
            Err(error) => return Outcome::NotRun(error),
        };
        if shared.waiting.0.is_empty() {
            *lock(&shared.progress) = Instant::now();
        }
        if let Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) = shared.waiting.0.try_send(job) {
            job.turn_away(&HsmError::QueueFull);
        } else if shared.health().is_able() {
            self.call_runner();
        } else {
            // It was closed between the pick and now, and its queue may have been emptied before this came.
            shared.turn_away(&shared.not_serving());
        }
        self.wait(answer, deadline).await
    }

    /// One request to this very member, whatever its state: probes and key management. One that is up has it wait in the
    /// queue, since under load no session comes back to the pool; a closed one has no queue.
    pub(crate) async fn direct(
        self: &Arc<Self>,
        request: &Arc<Request>,
        deadline: Instant,
        patience: Patience,
    ) -> Result<Answer, HsmError> {
        if self.shared.health().is_able() {
            return match self.call(request, deadline, patience).await {
                Outcome::Ran(result) => result,
                Outcome::NotRun(error) => Err(error),
            };
        }
        loop {
            if self.shared.health().pin_refused {
                return Err(self.shared.pin_refused());
            }
            let lease = match tokio::time::timeout_at(deadline.into(), self.pool.get()).await {
                Ok(lease) => lease.map_err(|error| self.shared.pool_error(error))?,
                Err(_) => return Err(HsmError::Deadline),
            };
            let (job, answer) = self.shared.job(request, deadline, patience)?;
            if worker::hire(lease, Some(job)).is_ok() {
                return match self.wait(answer, deadline).await {
                    Outcome::Ran(result) => result,
                    Outcome::NotRun(error) => Err(error),
                };
            }
        }
    }

    async fn wait(&self, answer: oneshot::Receiver<Outcome>, deadline: Instant) -> Outcome {
        match tokio::time::timeout_at(deadline.into(), answer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Outcome::Ran(Err(self.shared.thread_ended())),
            Err(_) => Outcome::NotRun(HsmError::Deadline),
        }
    }

    /// Makes sure that somebody gets sessions to work at the queue.
    fn call_runner(self: &Arc<Self>) {
        if self.shared.has_unserved() && self.become_runner() {
            let member = Arc::clone(self);
            tokio::spawn(async move { member.run().await });
        }
    }

    /// As many as there are sessions: each may wait for one to open.
    fn become_runner(&self) -> bool {
        let one_more = |runners| (runners < self.shared.max_sessions).then_some(runners + 1);
        self.runners.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_ok()
    }

    async fn run(&self) {
        loop {
            while self.shared.has_unserved() {
                match self.pool.get().await {
                    Ok(lease) => {
                        self.shared.on_their_way.fetch_add(1, Ordering::AcqRel);
                        if worker::hire(lease, None).is_err() {
                            self.shared.arrived();
                        }
                    }
                    Err(error) => {
                        self.no_session(&self.shared.pool_error(error));
                        if self.shared.is_short() {
                            // News of a session that became free between the look into the pool and now is kept.
                            self.shared.freed.notified().await;
                        }
                    }
                }
            }
            self.runners.fetch_sub(1, Ordering::AcqRel);
            // Something may have come between the last look and now.
            if !self.shared.has_unserved() || !self.become_runner() {
                return;
            }
        }
    }

    /// A session could not be opened for calls that wait.
    fn no_session(&self, error: &HsmError) {
        if self.shared.is_short() {
            return;
        }
        let usable = self.shared.usable();
        if usable == 0 {
            self.trip(error);
            // When it was closed before.
            self.shared.turn_away(error);
            return;
        }
        // The others go on.
        *lock(&self.shared.short_since) = Some(Instant::now());
        if error.is_code(RvError::SessionCount) && !self.shared.said_few_sessions.swap(true, Ordering::Relaxed) {
            warn!(
                member = self.shared.name,
                sessions = usable,
                wanted = self.shared.max_sessions,
                %error,
                "the token gives fewer sessions than wanted, going on with those"
            );
        }
        if error.fault().whose == Whose::Member && !error.is_code(RvError::SessionCount) {
            self.failed(error, Duration::ZERO);
        }
    }

    fn failed(&self, error: &HsmError, took: Duration) {
        if self.shared.health().failed(error, took, Instant::now()) {
            self.retire(error);
        }
    }

    /// Closes the member at once.
    pub(crate) fn trip(&self, error: &HsmError) {
        if self.shared.health().trip(error, Instant::now()) {
            self.retire(error);
        }
    }

    /// Lets go of everything that a closed member has: what waits goes elsewhere at once, idle sessions close, the others
    /// when their call returns.
    fn retire(&self, error: &HsmError) {
        self.shared.observe(Event::Closed);
        self.shared.end_generation();
        self.shared.turn_away(error);
        let generation = self.shared.generation();
        self.pool.retain(|handle, _| handle.is_usable(generation));
    }

    /// Does what threads cannot do for themselves: looks for calls that hang and for a queue that nobody serves, and
    /// finishes the closing of a member.
    pub(crate) fn watch(&self, now: Instant, watchdog: Duration) {
        let shared = &self.shared;
        for desk in shared.desks() {
            match desk.look(now) {
                Look::Fine => {}
                Look::Late(error) => self.failed(&error, watchdog),
                Look::Stuck(error) => {
                    let stuck = shared.stuck.fetch_add(1, Ordering::AcqRel) + 1;
                    warn!(member = shared.name, stuck, %error, "a call hangs, its thread is left to itself");
                    shared.observe(Event::Stuck);
                    self.trip(&error);
                }
            }
        }
        let unserved = !shared.waiting.1.is_empty() && shared.usable() == 0;
        if unserved && now.saturating_duration_since(*lock(&shared.progress)) >= watchdog {
            self.trip(&HsmError::Hung { op: "open" });
        }
        // A thread closed the member: it has no pool to clear.
        let generation = shared.generation();
        if self.pool.status().available > 0 && !shared.health().is_up() {
            self.pool.retain(|handle, _| handle.is_usable(generation));
        }
    }

    /// Asks for known-good operations on a session of the member.
    pub(crate) async fn probe(self: &Arc<Self>, patience: Patience) -> Result<Duration, HsmError> {
        let deadline = Instant::now() + OPEN_PATIENCE;
        let generation = self.shared.generation();
        let started = Instant::now();
        match self.direct(&Arc::new(Request::Probe), deadline, patience).await {
            Ok(_) => Ok(started.elapsed()),
            Err(error) => {
                // Who cannot do this much cannot serve, whatever it looked like.
                if generation == self.shared.generation() && self.shared.health().is_up() && error.condemns() {
                    self.trip(&error);
                }
                Err(error)
            }
        }
    }

    /// Whether nothing has been heard of the member for so long that it should be asked whether it still works.
    pub(crate) fn is_silent(&self, now: Instant) -> bool {
        let mut heard = lock(&self.shared.heard);
        let silent = now.saturating_duration_since(*heard) >= SILENCE && self.shared.health().is_able();
        if silent {
            // Asked once.
            *heard = now;
        }
        silent
    }

    /// Probes a closed member, and opens it if that went well. Only for who was told to by `may_probe`.
    pub(crate) async fn probe_to_open(self: &Arc<Self>, patience: Patience) -> Result<(), HsmError> {
        let result = self.probe(patience).await;
        let took = *result.as_ref().unwrap_or(&Duration::ZERO);
        let result = result.map(drop);
        if result.is_err() {
            self.shared.wants_module.store(true, Ordering::Release);
        }
        self.shared.health().probed(result.as_ref().map(drop), took, Instant::now());
        if result.is_err() {
            // The sessions of a failed probe prove nothing, and hold the module.
            self.shared.end_generation();
            let generation = self.shared.generation();
            self.pool.retain(|handle, _| handle.is_usable(generation));
        }
        result
    }

    /// Whether nothing of the member is in the module, nor will be before its next probe.
    pub(crate) fn is_out_of_module(&self) -> bool {
        let health = self.shared.health();
        let idle = self.shared.live_threads.load(Ordering::Acquire) == 0;
        idle && !health.is_up() && !health.is_probing()
    }

    /// The module is not initialised any more.
    pub(crate) fn lost(&self, error: &HsmError) {
        self.shared.wants_module.store(true, Ordering::Release);
        if self.shared.health().is_up() {
            self.trip(error);
        }
    }

    pub(crate) fn wants_module(&self) -> bool {
        self.shared.wants_module.load(Ordering::Acquire)
    }

    /// Closes the session that holds the login, before its module is finalised. Blocks.
    pub(crate) fn forget_login(&self) {
        let cell = std::mem::take(&mut *lock(&self.shared.login));
        drop(lock(&cell).take());
    }

    /// The module is as new.
    pub(crate) fn module_renewed(&self) {
        self.shared.wants_module.store(false, Ordering::Release);
        self.shared.health().hurry(Instant::now());
        self.shared.observe(Event::ModuleRenewed);
    }

    /// It cannot be initialised now. The next probe will fail for it, and ask again.
    pub(crate) fn module_not_renewed(&self, error: &HsmError) {
        self.shared.wants_module.store(false, Ordering::Release);
        self.shared.health().module_failed(error);
    }

    /// Takes a new PIN, and lets it be tried if the last one was refused.
    pub(crate) fn set_pin(&self, pin: Pin) {
        *lock(&self.shared.pin) = pin;
        self.shared.health().allow_pin(Instant::now());
    }

    pub(crate) fn status(&self) -> MemberStatus {
        let shared = &self.shared;
        let in_flight = shared.in_flight.load(Ordering::Acquire);
        let stuck = shared.stuck.load(Ordering::Acquire);
        let busy = shared.desks().iter().filter(|desk| desk.busy_since().is_some()).count();
        let health = shared.health();
        MemberStatus {
            name: shared.name.clone(),
            token: shared.token.to_string(),
            state: health.state(in_flight, stuck),
            since: health.since(),
            priority: self.priority,
            weight: self.weight,
            latency: health.latency.estimate(Instant::now()),
            in_flight,
            waiting: shared.waiting.1.len(),
            sessions_open: shared.open.load(Ordering::Acquire),
            sessions_wanted: shared.max_sessions,
            sessions_busy: busy.saturating_sub(stuck),
            sessions_stuck: stuck,
            closings: health.closings(),
            last_error: health.last_error.clone(),
        }
    }

    /// Ends all sessions and gives the module back. Calls that are at the token run to their end.
    pub(crate) async fn close(&self) {
        let shared = &self.shared;
        let was_up = {
            let mut health = shared.health();
            if health.is_closed() {
                return;
            }
            let was_up = health.is_up();
            health.close();
            was_up
        };
        shared.turn_away(&shared.not_serving());
        self.pool.close();
        let begun = Instant::now();
        while shared.live_threads.load(Ordering::Acquire) > 0 {
            let awaited = was_up && shared.desks().iter().any(|desk| desk.busy_since().is_some());
            if begun.elapsed() >= if awaited { CLOSE_PATIENCE } else { CLOSE_QUICKLY } {
                // Finalising under a call that hangs would take the process down.
                warn!(member = shared.name, "calls hang at the token, its module is not finalised");
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if shared.module.is_shut() {
            warn!(member = shared.name, "its module hangs, and is not finalised");
            return;
        }
        let shared = Arc::clone(shared);
        let (tell, told) = oneshot::channel();
        // Not one of tokio's threads: the runtime's end would wait for a module that hangs.
        let closing = std::thread::Builder::new().name(format!("hsm {} close", self.shared.name)).spawn(move || {
            {
                let _gate = shared.module.enter();
                drop(lock(&lock(&shared.login)).take());
            }
            shared.module.release();
            let _ = tell.send(());
        });
        if closing.is_err() || !matches!(tokio::time::timeout(CLOSE_PATIENCE, told).await, Ok(Ok(()))) {
            warn!(member = self.shared.name, "closing failed");
        }
    }
}

/// What threads tell and ask.
impl Shared {
    pub(crate) fn health(&self) -> MutexGuard<'_, Health> {
        lock(&self.health)
    }

    pub(crate) fn observe(&self, event: Event<'_>) {
        (self.observer)(&self.name, event);
    }

    pub(crate) fn observe_call(&self, op: &'static str, error: Option<&HsmError>, took: Duration) {
        let seconds = took.as_secs_f64();
        match error {
            None => self.observe(Event::Call { op, rv: "ok", seconds }),
            Some(error) => self.observe(Event::Call { op, rv: &error.metric_name(), seconds }),
        }
    }

    fn job(
        self: &Arc<Self>,
        request: &Arc<Request>,
        deadline: Instant,
        patience: Patience,
    ) -> Result<(Job, oneshot::Receiver<Outcome>), HsmError> {
        // Counted first, so that two callers cannot both take the last place.
        let before = self.in_flight.fetch_add(1, Ordering::AcqRel);
        let in_flight = InFlight(Arc::clone(self));
        if before >= self.max_queue {
            return Err(HsmError::QueueFull);
        }
        let (reply, answer) = oneshot::channel();
        let Patience { share, watchdog } = patience;
        let submitted = Instant::now();
        let request = Arc::clone(request);
        Ok((Job { request, deadline, share, watchdog, submitted, reply, in_flight }, answer))
    }

    /// Whether more waits than the sessions on their way will take.
    fn has_unserved(&self) -> bool {
        self.waiting.1.len() > self.on_their_way.load(Ordering::Acquire)
    }

    /// A hired session is there.
    pub(crate) fn arrived(&self) {
        self.on_their_way.fetch_sub(1, Ordering::AcqRel);
    }

    /// What a free session takes of what waits.
    pub(crate) fn share_of_queue(&self) -> Vec<Job> {
        let share = batch::share(self.waiting.1.len(), self.usable(), self.batch);
        let jobs: Vec<Job> = self.waiting.1.try_iter().take(share).collect();
        if !jobs.is_empty() {
            *lock(&self.progress) = Instant::now();
        }
        jobs
    }

    /// Sends everybody elsewhere who waits.
    fn turn_away(&self, why: &HsmError) {
        for job in self.waiting.1.try_iter() {
            job.turn_away(why);
        }
    }

    /// How a session of `generation` did. What the member is to blame for is evidence; enough of it closes the member.
    pub(crate) fn done(
        self: &Arc<Self>,
        request: &Request,
        result: Result<(), &HsmError>,
        submitted: Instant,
        generation: u64,
    ) {
        if let Err(error) = result
            && error.is_code(RvError::CryptokiNotInitialized)
        {
            self.module.lose();
        }
        // What is heard from sessions of a time before the member was closed says nothing about it now; probes have
        // their own way, and key management takes as long as it takes.
        if generation != self.generation() || matches!(request, Request::Probe) || !request.may_repeat() {
            return;
        }
        let now = Instant::now();
        *lock(&self.heard) = now;
        let took = now.saturating_duration_since(submitted);
        let closed = match result {
            Ok(()) => {
                self.health().succeeded(took, now);
                false
            }
            Err(error @ HsmError::NoSuchKey(key)) if self.known_good_needs(key) => self.health().trip(error, now),
            Err(HsmError::NoSuchKey(key)) => {
                self.remember_lack(key, now);
                false
            }
            Err(error) if error.fault().whose == Whose::Member => self.health().failed(error, took, now),
            // Whoever is to blame, the member answered.
            Err(_) => {
                self.health().succeeded(took, now);
                false
            }
        };
        if let (true, Err(error)) = (closed, result) {
            // The supervisor clears the pool.
            self.observe(Event::Closed);
            self.end_generation();
            self.turn_away(error);
        }
    }

    /// Whether a member without this key is none: the probe could not go right there.
    fn known_good_needs(&self, key: &KeyId) -> bool {
        let known = self.known();
        ["decrypt", "sign"].into_iter().any(|op| first_known(&known, op).is_some_and(|first| first.key() == Some(key)))
    }

    /// Whether it was proved wrong not long ago.
    pub(crate) fn is_doubtful(&self, now: Instant) -> bool {
        lock(&self.blame).doubtful_until.is_some_and(|until| now < until)
    }

    /// Another answer proved that this member was wrong to refuse an input: with a `wrong` result, or an error.
    pub(crate) fn contradicted(self: &Arc<Self>, wrong: bool, generation: u64) {
        lock(&self.blame).doubtful_until = Some(Instant::now() + DOUBTFUL);
        if generation != self.generation() {
            return;
        }
        let now = Instant::now();
        // An error may be a busy token's; a wrong result is nothing but wrong.
        let (error, closed) = if wrong {
            let error = HsmError::WrongAnswer;
            let closed = self.health().trip(&error, now);
            (error, closed)
        } else {
            let error = self.token_error("refused what another member accepts".to_owned());
            let closed = self.health().failed(&error, Duration::ZERO, now);
            (error, closed)
        };
        if closed {
            self.observe(Event::Closed);
            self.end_generation();
            self.turn_away(&error);
        }
    }

    /// The oldest call that runs now, by its age.
    fn oldest(&self, now: Instant) -> Option<Duration> {
        let since = self.desks().iter().filter_map(|desk| desk.busy_since()).min()?;
        Some(now.saturating_duration_since(since))
    }

    pub(crate) fn new_desk(&self) -> Arc<Desk> {
        let desk = Arc::new(Desk::default());
        let mut desks = lock(&self.desks);
        desks.retain(|desk| desk.strong_count() > 0);
        desks.push(Arc::downgrade(&desk));
        desk
    }

    fn desks(&self) -> Vec<Arc<Desk>> {
        lock(&self.desks).iter().filter_map(Weak::upgrade).collect()
    }

    /// A thread that was given up has returned from its call.
    pub(crate) fn returned(&self) {
        let before = self.stuck.fetch_sub(1, Ordering::AcqRel);
        if before == 1 {
            info!(member = self.name, "all calls that hung have returned");
        }
        // What hung has passed: see at once whether the member serves again.
        self.health().hurry(Instant::now());
    }

    /// Makes sure that the token is logged in; says in which slot it is.
    pub(crate) fn ensure_login(&self) -> Result<Slot, HsmError> {
        let cell = Arc::clone(&lock(&self.login));
        let mut login = lock(&cell);
        if self.health().pin_refused {
            return Err(self.pin_refused());
        }
        if let Some(login) = &*login {
            let state = login.session.get_session_info().map(|info| info.session_state());
            if matches!(state, Ok(SessionState::RoUser | SessionState::RwUser)) {
                return Ok(login.slot);
            }
        }
        // Logged out, or gone: closed first, since some tokens count sessions.
        *login = None;
        let slot = self.module.find_token(&self.token)?;
        let session = self.module.pkcs11().open_ro_session(slot)?;
        self.observe(Event::Login);
        let pin = lock(&self.pin).to_auth();
        match session.login(UserType::User, Some(&pin)) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {
                *login = Some(Login { session, slot });
                Ok(slot)
            }
            Err(Error::Pkcs11(code, function)) if refuses_pin(code) => {
                let refused = HsmError::from(Error::Pkcs11(code, function));
                self.health().refuse_pin(&refused);
                Err(refused)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn pin_refused(&self) -> HsmError {
        self.token_error("refused the PIN, which is not tried again until the configuration is reloaded".to_owned())
    }

    pub(crate) fn token_error(&self, reason: String) -> HsmError {
        HsmError::Token { token: self.token.to_string(), reason }
    }

    pub(crate) fn thread_ended(&self) -> HsmError {
        self.token_error("the session was closed".to_owned())
    }

    fn not_serving(&self) -> HsmError {
        HsmError::NoMember(format!("{} does not serve now", self.name))
    }

    fn pool_error(&self, error: PoolError<HsmError>) -> HsmError {
        match error {
            PoolError::Backend(error) => error,
            PoolError::Closed => HsmError::NoMember(format!("{} is closed", self.name)),
            other => HsmError::NoMember(other.to_string()),
        }
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn session_opened(&self, generation: u64) {
        let mut usable = lock(&self.usable);
        if generation == self.generation() {
            *usable += 1;
        }
        self.open.fetch_add(1, Ordering::AcqRel);
        drop(usable);
        self.observe(Event::SessionOpened);
    }

    pub(crate) fn session_closed(&self, generation: u64) {
        let mut usable = lock(&self.usable);
        if generation == self.generation() {
            *usable = usable.saturating_sub(1);
        }
        self.open.fetch_sub(1, Ordering::AcqRel);
        drop(usable);
        self.observe(Event::SessionClosed);
    }

    /// Sessions that may serve.
    fn usable(&self) -> usize {
        *lock(&self.usable)
    }

    fn end_generation(self: &Arc<Self>) {
        let mut usable = lock(&self.usable);
        self.generation.fetch_add(1, Ordering::AcqRel);
        *usable = 0;
        let cell = std::mem::take(&mut *lock(&self.login));
        drop(usable);
        // Whoever still opens a session with the old cell closes it.
        if let Some(login) = Arc::into_inner(cell).and_then(|cell| cell.into_inner().ok().flatten()) {
            self.close_aside(login);
        }
    }

    /// Closing a session may block, and this may be a thread that must not.
    fn close_aside(self: &Arc<Self>, login: Login) {
        let counted = self.count_thread();
        let module = Arc::clone(&self.module);
        let closing = std::thread::Builder::new().name(format!("hsm {} close", self.name)).spawn(move || {
            let _gate = module.enter();
            drop(login);
            drop(counted);
        });
        if let Err(error) = closing {
            warn!(member = self.name, %error, "no thread to close a session");
        }
    }

    /// Threads that hang are not answered with ever more threads, and a token that has no more sessions is left alone.
    fn may_open(&self) -> Result<(), HsmError> {
        if self.live_threads.load(Ordering::Acquire) > 2 * self.max_sessions + 2 {
            return Err(self.token_error("too many session threads hang in the module".to_owned()));
        }
        if self.is_short() {
            return Err(HsmError::new("C_OpenSession", RvError::SessionCount));
        }
        Ok(())
    }

    /// Whether the token gave fewer sessions than asked for not long ago, and some serve.
    fn is_short(&self) -> bool {
        let short = lock(&self.short_since).is_some_and(|since| since.elapsed() < ASK_FOR_MORE);
        short && self.usable() > 0
    }

    /// A session has been given back to the pool.
    pub(crate) fn freed(&self) {
        self.freed.notify_one();
    }

    fn lacks(&self, key: &KeyId, now: Instant) -> bool {
        let lacking = lock(&self.lacking);
        !lacking.is_empty() && lacking.get(key).is_some_and(|until| now < *until)
    }

    fn remember_lack(&self, key: &KeyId, now: Instant) {
        let mut lacking = lock(&self.lacking);
        lacking.retain(|_, until| now < *until);
        if lacking.len() < MOST_LACKING {
            lacking.insert(key.clone(), now + LACKS);
        }
    }

    pub(crate) fn keys_made(&self) -> u64 {
        self.keys_made.load(Ordering::Acquire)
    }

    /// Says that all key tables but the caller's are old; returns the new count.
    pub(crate) fn key_made(&self) -> u64 {
        lock(&self.lacking).clear();
        self.keys_made.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Lets one session try the token out; the others wait for what it finds. Until `trials` succeed once.
    pub(crate) fn try_out(&self, trials: impl FnOnce() -> bool) {
        let mut tried_out = lock(&self.tried_out);
        if !*tried_out {
            *tried_out = trials();
            if *tried_out {
                let native: Vec<_> = Oaep::all()
                    .filter(|oaep| self.scheme(*oaep) == Some(Scheme::Native))
                    .map(|oaep| format!("{:?}/{:?}", oaep.hash, oaep.mgf))
                    .collect();
                info!(member = self.name, ?native, "token tried out for OAEP, the rest is unpadded in software");
            }
        }
    }

    pub(crate) fn scheme(&self, oaep: Oaep) -> Option<Scheme> {
        match self.schemes.get(oaep.index())?.load(Ordering::Relaxed) {
            1 => Some(Scheme::Native),
            2 => Some(Scheme::Raw),
            _ => None,
        }
    }

    pub(crate) fn remember_scheme(&self, oaep: Oaep, scheme: Scheme) {
        if let Some(entry) = self.schemes.get(oaep.index()) {
            entry.store(if scheme == Scheme::Native { 1 } else { 2 }, Ordering::Relaxed);
        }
    }

    pub(crate) fn known(&self) -> Arc<[KnownGood]> {
        Arc::clone(&self.known.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether to find out now who is to blame for a doubtful answer; at most once in a while for a member, so that a flood
    /// of bad input costs the honest ones little.
    pub(crate) fn may_probe_for_blame(&self, now: Instant) -> bool {
        let mut blame = lock(&self.blame);
        let due = blame.at.is_none_or(|at| now.saturating_duration_since(at) >= BLAME_PAUSE);
        if due {
            blame.at = Some(now);
        }
        due
    }

    pub(crate) fn remember_blame(&self, innocent: bool) {
        lock(&self.blame).innocent = innocent;
    }

    pub(crate) fn was_innocent(&self) -> bool {
        lock(&self.blame).innocent
    }

    pub(crate) fn count_thread(self: &Arc<Self>) -> LiveThread {
        self.live_threads.fetch_add(1, Ordering::AcqRel);
        LiveThread(Arc::clone(self))
    }
}

/// A panic under any of these locks leaves nothing half-done that would do harm.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
