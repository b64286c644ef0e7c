//! One token of one module: its login, its pool of sessions, and whether it is up.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::TrySendError;
use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, SessionState, UserType};
use cryptoki::slot::Slot;
use deadpool::managed::{self, Metrics, Object, Pool, PoolError, RecycleError};
use tokio::sync::{Notify, oneshot};
use tracing::{error, info, warn};

use super::pick::Candidate;
use crate::config::{MemberConfig, Pin, TokenRef};
use crate::error::HsmError;
use crate::fault::{Fate, Whose, refuses_pin};
use crate::keys::Oaep;
use crate::module::Module;
use crate::session::{self, Answer, Handle, Job, Request};
use crate::{Event, Observer};

/// How long a member that failed for its own reasons sits out, and how often one that is down is tried.
const REST: Duration = Duration::from_secs(1);
/// After how long a token that gave fewer sessions than asked for is asked again.
const ASK_FOR_MORE: Duration = Duration::from_secs(30);
/// How long to wait at the end for calls that are still at the token.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);

/// How a token decrypts with certain OAEP parameters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scheme {
    /// With CKM_RSA_PKCS_OAEP.
    Native,
    /// With CKM_RSA_X_509; the padding is removed in software.
    Raw,
}

/// A member as the cluster sees it.
pub(crate) struct Member {
    pub(crate) shared: Arc<Shared>,
    pool: Pool<Sessions>,
    /// Places in the pool that the token does not fill: held, so that nobody waits for a session there.
    unfilled: Mutex<Vec<(Instant, Object<Sessions>)>>,
    priority: u32,
    weight: u32,
}

/// What a member's sessions share.
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) token: TokenRef,
    pub(crate) module: Arc<Module>,
    pin: Pin,
    observer: Observer,
    /// Kept for the life of the member: a token logs out when its last session closes. The lock also makes sure that the PIN
    /// is tried by one session at a time.
    login: Mutex<Option<Login>>,
    state: Mutex<State>,
    /// Mirrors `state.condition`, so that a call that went well need not lock.
    up: AtomicBool,
    shut_out: AtomicBool,
    closed: AtomicBool,
    /// Raised when a fault makes all handles stale; older sessions are not used again.
    generation: AtomicU64,
    /// Open sessions of the current generation.
    usable: Mutex<usize>,
    /// Open sessions of any generation.
    open: AtomicUsize,
    in_flight: AtomicUsize,
    keys_made: AtomicU64,
    tried_out: Mutex<bool>,
    /// What trials have found, by [`Oaep::index`]: 0 unknown, 1 native, 2 raw.
    schemes: [AtomicU8; Oaep::COUNT],
    opens: Mutex<Opens>,
    /// Raised when an open has an outcome.
    opened: Notify,
    live_threads: AtomicUsize,
    threads: Mutex<Vec<JoinHandle<()>>>,
    max_sessions: usize,
    /// How many calls may wait or run.
    max_queue: usize,
    said_few_sessions: AtomicBool,
}

/// Opening a session outlives the caller it was begun for, since the call into the module cannot be stopped; who comes next
/// takes what came of it. So there are never more opens under way than the pool has places, however impatient callers are.
#[derive(Default)]
struct Opens {
    outcomes: VecDeque<Result<Handle, HsmError>>,
    under_way: usize,
    waiting: usize,
}

/// A caller that waits for a session to be opened.
struct Waiting<'a>(&'a Shared);

impl<'a> Waiting<'a> {
    fn new(shared: &'a Shared) -> Self {
        lock(&shared.opens).waiting += 1;
        Waiting(shared)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        lock(&self.0.opens).waiting -= 1;
    }
}

/// The duty to say how the opening of a session ended.
pub(crate) struct Opening {
    shared: Arc<Shared>,
    outcome: Option<Result<Handle, HsmError>>,
}

impl Opening {
    pub(crate) fn report(mut self, outcome: Result<Handle, HsmError>) {
        self.outcome = Some(outcome);
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        let outcome = self.outcome.take();
        let outcome = outcome.unwrap_or_else(|| Err(self.shared.thread_died()));
        let mut opens = lock(&self.shared.opens);
        opens.under_way -= 1;
        // An error that nobody waits for is old when somebody does. And after `close` nobody ever comes.
        let wanted = outcome.is_ok() || opens.waiting > 0;
        if wanted && !self.shared.closed.load(Ordering::Acquire) {
            opens.outcomes.push_back(outcome);
        }
        drop(opens);
        self.shared.opened.notify_waiters();
    }
}

struct Login {
    session: Session,
    slot: Slot,
}

struct State {
    condition: Condition,
    last_error: Option<String>,
    rests_until: Option<Instant>,
    /// No session is opened before this, for this reason.
    no_open_before: Option<(Instant, HsmError)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Condition {
    New,
    Up,
    Down,
}

/// One call that waits or runs, counted while this lives.
pub(crate) struct InFlight(Arc<Shared>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The right to use a session for one job. Dropping it gives the session back to the pool.
pub(crate) struct Lease {
    session: Object<Sessions>,
    in_flight: InFlight,
}

impl Lease {
    /// Takes the session out of the pool for good.
    pub(crate) fn discard(self) {
        drop(Object::take(self.session));
    }
}

/// Counts a session thread while it lives.
pub(crate) struct LiveThread(Arc<Shared>);

impl Drop for LiveThread {
    fn drop(&mut self) {
        self.0.live_threads.fetch_sub(1, Ordering::Relaxed);
    }
}

/// deadpool's way to sessions.
pub(crate) struct Sessions {
    shared: Arc<Shared>,
}

/// A place in the pool.
pub(crate) enum Place {
    Filled(Handle),
    /// The token gives no session for this place now, but others work.
    Unfilled,
}

impl managed::Manager for Sessions {
    type Type = Place;
    type Error = HsmError;

    async fn create(&self) -> Result<Place, HsmError> {
        let shared = &self.shared;
        let _waiting = Waiting::new(shared);
        loop {
            let woken = shared.opened.notified();
            tokio::pin!(woken);
            // From here on no news is missed.
            woken.as_mut().enable();
            match shared.next_open() {
                Some(Ok(handle)) => return Ok(Place::Filled(handle)),
                Some(Err(error)) if shared.usable() > 0 => {
                    shared.say_few_sessions(&error);
                    return Ok(Place::Unfilled);
                }
                Some(Err(error)) => return Err(error),
                None => {}
            }
            if let Some(opening) = shared.begin_open()? {
                let thread = session::spawn(Arc::clone(shared), opening).map_err(|error| HsmError::Token {
                    token: shared.token.to_string(),
                    reason: format!("no thread for a session: {error}"),
                })?;
                shared.keep_thread(thread);
            }
            woken.await;
        }
    }

    async fn recycle(&self, place: &mut Place, _: &Metrics) -> managed::RecycleResult<HsmError> {
        match place {
            Place::Filled(handle) if handle.is_usable(self.shared.generation()) => Ok(()),
            Place::Filled(_) => Err(RecycleError::message("session is stale")),
            Place::Unfilled => Err(RecycleError::message("ask for a session again")),
        }
    }
}

impl Member {
    pub(crate) fn new(config: MemberConfig, module: Arc<Module>, observer: Observer) -> Result<Self, HsmError> {
        let max_sessions = config.sessions.max(1);
        let shared = Arc::new(Shared {
            name: config.name,
            token: config.token,
            module,
            pin: config.pin,
            observer,
            login: Mutex::new(None),
            state: Mutex::new(State {
                condition: Condition::New,
                last_error: None,
                rests_until: None,
                no_open_before: None,
            }),
            up: AtomicBool::new(false),
            shut_out: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            generation: AtomicU64::new(0),
            usable: Mutex::new(0),
            open: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            keys_made: AtomicU64::new(0),
            tried_out: Mutex::new(false),
            schemes: Default::default(),
            opens: Mutex::new(Opens::default()),
            opened: Notify::new(),
            live_threads: AtomicUsize::new(0),
            threads: Mutex::new(Vec::new()),
            max_sessions,
            max_queue: config.queue.max(1),
            said_few_sessions: AtomicBool::new(false),
        });
        let pool = Pool::builder(Sessions { shared: Arc::clone(&shared) })
            .max_size(max_sessions)
            .build()
            .map_err(|error| HsmError::NoMember(error.to_string()))?;
        Ok(Member { shared, pool, unfilled: Mutex::new(Vec::new()), priority: config.priority, weight: config.weight })
    }

    /// For [`pick`](super::pick::pick).
    pub(crate) fn candidate(&self) -> Candidate {
        let shared = &self.shared;
        let rests_until = if shared.up.load(Ordering::Acquire) {
            None
        } else {
            let state = lock(&shared.state);
            // Who is down stays out of the way until a session has come up, however long it takes.
            match state.condition {
                Condition::Down => Some(state.rests_until.unwrap_or_else(Instant::now) + REST),
                Condition::New | Condition::Up => None,
            }
        };
        Candidate {
            priority: self.priority,
            weight: self.weight,
            in_flight: shared.in_flight.load(Ordering::Relaxed),
            out: shared.shut_out.load(Ordering::Acquire) || shared.closed.load(Ordering::Acquire) || self.is_full(),
            rests_until,
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.shared.in_flight.load(Ordering::Relaxed) >= self.shared.max_queue
    }

    /// Whether the member is down and it is time to see if it still is. Says so to one caller each second.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        if self.shared.up.load(Ordering::Acquire)
            || self.shared.shut_out.load(Ordering::Acquire)
            || self.shared.closed.load(Ordering::Acquire)
        {
            return false;
        }
        let mut state = lock(&self.shared.state);
        let due = state.condition == Condition::Down && state.rests_until.is_none_or(|until| until <= now);
        if due {
            state.rests_until = Some(now + REST);
        }
        due
    }

    /// Gets a session, which opens one where there is none, and so finds out whether the member is up.
    pub(crate) async fn bring_up(&self) -> Result<(), HsmError> {
        let session = self.checkout().await?;
        // A session from before may have been handed out: whether it still works, the next call will tell.
        self.shared.succeeded();
        drop(session);
        Ok(())
    }

    /// One request to one session.
    pub(crate) async fn call(&self, request: &Arc<Request>, deadline: Instant) -> Result<Answer, HsmError> {
        if Instant::now() >= deadline {
            return Err(HsmError::Deadline);
        }
        let in_flight = self.enter()?;
        tokio::time::timeout_at(deadline.into(), self.exchange(request, deadline, in_flight))
            .await
            .unwrap_or(Err(HsmError::Deadline))
    }

    async fn exchange(
        &self,
        request: &Arc<Request>,
        deadline: Instant,
        mut in_flight: InFlight,
    ) -> Result<Answer, HsmError> {
        loop {
            let session = self.checkout().await?;
            let Place::Filled(handle) = &*session else {
                continue;
            };
            let jobs = handle.sender();
            let (reply, answer) = oneshot::channel();
            let job = Job { request: Arc::clone(request), deadline, reply, lease: Lease { session, in_flight } };
            // There is room for one job, and only who holds the lease may send one.
            let sent = jobs.try_send(job);
            // The thread ends when all senders are gone; this one must not outlive the job.
            drop(jobs);
            match sent {
                Ok(()) => {
                    return answer.await.unwrap_or_else(|_| Err(self.shared.thread_died()));
                }
                // The thread ended between the pool's check and now.
                Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => {
                    drop(Object::take(job.lease.session));
                    in_flight = job.lease.in_flight;
                }
            }
        }
    }

    /// Waits for a session. Holds places aside that the token does not fill, so that callers wait for those that work.
    async fn checkout(&self) -> Result<Object<Sessions>, HsmError> {
        loop {
            let now = Instant::now();
            lock(&self.unfilled)
                .retain(|(since, _)| now.duration_since(*since) < ASK_FOR_MORE && self.shared.usable() > 0);
            match self.pool.get().await {
                Ok(place) if matches!(*place, Place::Filled(_)) => return Ok(place),
                Ok(unfilled) => lock(&self.unfilled).push((now, unfilled)),
                Err(PoolError::Backend(error)) => return Err(error),
                Err(PoolError::Closed) => {
                    return Err(HsmError::NoMember(format!("{} is closed", self.shared.name)));
                }
                Err(other) => return Err(HsmError::NoMember(other.to_string())),
            }
        }
    }

    fn enter(&self) -> Result<InFlight, HsmError> {
        // Counted first, so that two callers cannot both take the last place.
        let before = self.shared.in_flight.fetch_add(1, Ordering::Relaxed);
        let in_flight = InFlight(Arc::clone(&self.shared));
        if before >= self.shared.max_queue {
            return Err(HsmError::QueueFull);
        }
        Ok(in_flight)
    }

    /// Ends all sessions and gives the module back. Calls that are at the token run to their end.
    pub(crate) async fn close(&self) {
        let shared = &self.shared;
        if shared.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        self.pool.close();
        lock(&shared.opens).outcomes.clear();
        lock(&self.unfilled).clear();
        let patience = Instant::now() + CLOSE_PATIENCE;
        while !shared.join_finished() {
            if Instant::now() >= patience {
                // Finalising under a call that hangs would take the process down.
                warn!(member = shared.name, "calls hang at the token, its module is not finalised");
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let shared = Arc::clone(shared);
        let closing = tokio::task::spawn_blocking(move || {
            lock(&shared.login).take();
            shared.module.release();
        });
        if closing.await.is_err() {
            warn!(member = self.shared.name, "closing failed");
        }
    }
}

/// What sessions tell and ask.
impl Shared {
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

    /// Makes sure that the token is logged in; says in which slot it is.
    pub(crate) fn ensure_login(&self) -> Result<Slot, HsmError> {
        let mut login = lock(&self.login);
        if self.shut_out.load(Ordering::Acquire) {
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
        match session.login(UserType::User, Some(&self.pin.to_auth())) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {
                *login = Some(Login { session, slot });
                Ok(slot)
            }
            Err(Error::Pkcs11(code, function)) if refuses_pin(code) => {
                self.shut_out.store(true, Ordering::Release);
                let refused = HsmError::from(Error::Pkcs11(code, function));
                error!(
                    member = self.name, token = %self.token, error = %refused,
                    "THE TOKEN REFUSES THE PIN. It is not tried again: the member stays out until the process is started with the right one"
                );
                Err(refused)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn pin_refused(&self) -> HsmError {
        HsmError::NoMember(format!("{}: the token refused the PIN", self.name))
    }

    pub(crate) fn thread_died(&self) -> HsmError {
        HsmError::Token { token: self.token.to_string(), reason: "the session's thread died".to_owned() }
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn session_opened(&self, generation: u64) {
        let mut usable = lock(&self.usable);
        if generation == self.generation() {
            *usable += 1;
        }
        self.open.fetch_add(1, Ordering::Relaxed);
        drop(usable);
        self.observe(Event::SessionOpened);
    }

    pub(crate) fn session_closed(&self, generation: u64) {
        let mut usable = lock(&self.usable);
        if generation == self.generation() {
            *usable = usable.saturating_sub(1);
        }
        self.open.fetch_sub(1, Ordering::Relaxed);
        drop(usable);
        self.observe(Event::SessionClosed);
    }

    /// Sessions that may serve.
    fn usable(&self) -> usize {
        *lock(&self.usable)
    }

    /// Ends a generation, unless somebody has ended it before.
    fn end_generation(&self, generation: u64) {
        let mut usable = lock(&self.usable);
        if generation == self.generation() {
            self.generation.store(generation + 1, Ordering::Release);
            *usable = 0;
        }
    }

    /// A call went well.
    pub(crate) fn succeeded(&self) {
        if self.up.load(Ordering::Acquire) {
            return;
        }
        let mut state = lock(&self.state);
        if state.condition != Condition::Up {
            state.condition = Condition::Up;
            state.rests_until = None;
            state.no_open_before = None;
            self.up.store(true, Ordering::Release);
            info!(member = self.name, token = %self.token, "member is up");
        }
    }

    /// A call did not go well; `generation` is that of its session.
    pub(crate) fn call_failed(&self, error: &HsmError, generation: u64) {
        let fault = error.fault();
        if fault.fate == Fate::Rebuild {
            self.end_generation(generation);
        }
        if fault.whose == Whose::Member {
            self.down(error);
        }
    }

    /// No session came up. While others work that is no reason to be down.
    pub(crate) fn open_failed(&self, error: &HsmError, generation: u64) {
        if self.usable() > 0 && !self.shut_out.load(Ordering::Acquire) {
            return;
        }
        self.end_generation(generation);
        lock(&self.state).no_open_before = Some((Instant::now() + REST, error.clone()));
        self.down(error);
    }

    fn down(&self, error: &HsmError) {
        let mut state = lock(&self.state);
        state.rests_until = Some(Instant::now() + REST);
        state.last_error = Some(error.to_string());
        if state.condition != Condition::Down {
            state.condition = Condition::Down;
            self.up.store(false, Ordering::Release);
            warn!(member = self.name, token = %self.token, %error, "member is down");
        }
    }

    /// After an open that failed, the next one waits, and one caller makes it.
    fn may_open(&self, now: Instant) -> Result<(), HsmError> {
        if self.shut_out.load(Ordering::Acquire) {
            return Err(self.pin_refused());
        }
        // Threads that hang while they close a session are not answered with ever more threads.
        if self.live_threads.load(Ordering::Relaxed) > 4 * self.max_sessions + 8 {
            return Err(HsmError::Token {
                token: self.token.to_string(),
                reason: "session threads hang in the module".to_owned(),
            });
        }
        let mut state = lock(&self.state);
        match &mut state.no_open_before {
            Some((at, error)) if *at > now => Err(error.clone()),
            Some((at, _)) => {
                *at = now + REST;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn say_few_sessions(&self, error: &HsmError) {
        if !self.said_few_sessions.swap(true, Ordering::Relaxed) {
            warn!(
                member = self.name,
                sessions = self.usable(),
                wanted = self.max_sessions,
                %error,
                "the token gives fewer sessions than wanted, going on with those"
            );
        }
    }

    pub(crate) fn keys_made(&self) -> u64 {
        self.keys_made.load(Ordering::Acquire)
    }

    /// Says that all key tables but the caller's are old; returns the new count.
    pub(crate) fn key_made(&self) -> u64 {
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

    /// What came of an open that is over.
    fn next_open(&self) -> Option<Result<Handle, HsmError>> {
        let generation = self.generation();
        let mut opens = lock(&self.opens);
        std::iter::from_fn(|| opens.outcomes.pop_front()).find(|outcome| match outcome {
            Ok(handle) => handle.is_usable(generation),
            Err(_) => true,
        })
    }

    /// The right to open one more session; `None` when enough opens are under way for those who wait.
    fn begin_open(self: &Arc<Self>) -> Result<Option<Opening>, HsmError> {
        let mut opens = lock(&self.opens);
        if opens.under_way >= opens.waiting {
            return Ok(None);
        }
        self.may_open(Instant::now())?;
        opens.under_way += 1;
        Ok(Some(Opening { shared: Arc::clone(self), outcome: None }))
    }

    pub(crate) fn count_thread(self: &Arc<Self>) -> LiveThread {
        self.live_threads.fetch_add(1, Ordering::Relaxed);
        LiveThread(Arc::clone(self))
    }

    fn keep_thread(&self, thread: JoinHandle<()>) {
        let mut threads = lock(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
    }

    /// Whether no thread is left.
    fn join_finished(&self) -> bool {
        let mut threads = lock(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        threads.is_empty()
    }

    pub(crate) fn status(&self) -> super::MemberStatus {
        super::MemberStatus {
            name: self.name.clone(),
            up: self.up.load(Ordering::Acquire),
            sessions_open: self.open.load(Ordering::Relaxed),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            last_error: lock(&self.state).last_error.clone(),
        }
    }
}

/// A panic under any of these locks leaves nothing half-done that would do harm.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
