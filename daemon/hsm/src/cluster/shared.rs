//! What the sessions of a member share, and what they tell and ask: its queue, its login, what is known about its keys, and
//! who is to blame.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use crossbeam::channel::{self, Receiver, Sender};
use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, SessionState, UserType};
use cryptoki::slot::Slot;
use deadpool::managed::PoolError;
use tokio::sync::{Notify, oneshot};
use tracing::{error, info, warn};

use super::health::Health;
use super::member::Patience;
use crate::config::{MemberConfig, Pin, TokenRef};
use crate::error::{HsmError, class};
use crate::fault::Whose;
use crate::identity::KeyRef;
use crate::keys::Oaep;
use crate::module::{self, Module};
use crate::pin_tries::{PinTries, Word};
use crate::policy::batch;
use crate::request::{KnownGood, Outcome, Request, first_known};
use crate::standstill;
use crate::usual_cost::{Cost, UsualCost};
use crate::worker::{Desk, Job};
use crate::{Event, Observer};

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
/// How many oddities of a token's keys the log is told.
const MOST_ODDITIES: usize = 32;

/// How a token decrypts with certain OAEP parameters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scheme {
    /// With CKM_RSA_PKCS_OAEP.
    Native,
    /// With CKM_RSA_X_509; the padding is removed in software.
    Raw,
}

/// What a member's sessions share.
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) token: TokenRef,
    pub(crate) module: Arc<Module>,
    pub(super) pin: Mutex<Pin>,
    observer: Observer,
    pub(super) known: Arc<RwLock<Arc<[KnownGood]>>>,
    pub(super) health: Mutex<Health>,
    pub(super) waiting: (Sender<Job>, Receiver<Job>),
    /// Sessions that were hired and have not looked at the queue yet.
    pub(super) on_their_way: AtomicUsize,
    /// When there was last a result, good or bad.
    pub(super) heard: Mutex<Instant>,
    /// When a session last took something from the queue, or something came into the empty queue.
    pub(super) progress: Mutex<Instant>,
    pub(super) desks: Mutex<Vec<Weak<Desk>>>,
    /// Kept for as long as the member is not closed: a token logs out when its last session closes. The inner lock also
    /// makes sure that the PIN is tried by one session at a time. Another cell for every generation, so that nobody waits
    /// for a login that hangs.
    login: Mutex<Arc<Mutex<Option<Login>>>>,
    /// Raised when the member is closed; older sessions are not used again.
    pub(super) generation: AtomicU64,
    /// Open sessions of the current generation.
    pub(super) usable: Mutex<usize>,
    /// When the token gave fewer sessions than asked for. For a while no more are asked for.
    pub(super) short_since: Mutex<Option<Instant>>,
    /// How many sessions the token gave when it gave no more; `max_sessions` as long as it never refused one.
    pub(super) granted: AtomicUsize,
    /// Told when a session becomes free.
    pub(super) freed: Notify,
    /// Open sessions of any generation.
    pub(super) open: AtomicUsize,
    pub(super) in_flight: AtomicUsize,
    /// Processor time within operations of the token, in nanoseconds.
    pub(super) spent: AtomicU64,
    pub(crate) usual_decryption: UsualCost,
    /// Operations that returned.
    pub(super) calls: AtomicU64,
    /// How long they took together, in nanoseconds, without queueing.
    pub(super) worked: AtomicU64,
    /// Those of them whose failure the member is to blame for.
    pub(super) faults: AtomicU64,
    pub(super) keys_made: AtomicU64,
    lacking: Mutex<HashMap<KeyRef, Instant>>,
    tried_out: Mutex<bool>,
    /// What trials have found, by [`Oaep::index`]: 0 unknown, 1 native, 2 raw.
    schemes: [AtomicU8; Oaep::COUNT],
    blame: Mutex<Blame>,
    pub(super) live_threads: AtomicUsize,
    pub(super) stuck: AtomicUsize,
    /// A probe failed in a way that a fresh module may help against.
    pub(super) wants_module: AtomicBool,
    pub(super) max_sessions: usize,
    batch: usize,
    /// How many calls may wait or run.
    pub(super) max_queue: usize,
    pub(super) said_few_sessions: AtomicBool,
    /// An administrator said that the last try of the PIN may be used.
    may_use_final_try: AtomicBool,
    /// What the log was last told of the PIN's tries.
    said_tries: Mutex<PinTries>,
    said_oddities: Mutex<Vec<String>>,
    /// No slot held the token when it was last looked for.
    pub(super) token_missing: AtomicBool,
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

/// Counts a session thread while it lives.
pub(crate) struct LiveThread(Arc<Shared>);

impl Drop for LiveThread {
    fn drop(&mut self) {
        self.0.live_threads.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What threads tell and ask.
impl Shared {
    /// Of a member that proved nothing yet.
    pub(super) fn new(
        config: MemberConfig,
        module: Arc<Module>,
        known: Arc<RwLock<Arc<[KnownGood]>>>,
        observer: Observer,
    ) -> Self {
        let now = standstill::now();
        Shared {
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
            granted: AtomicUsize::new(config.sessions.max(1)),
            freed: Notify::new(),
            open: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            spent: AtomicU64::new(0),
            usual_decryption: UsualCost::default(),
            calls: AtomicU64::new(0),
            worked: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            keys_made: AtomicU64::new(0),
            lacking: Mutex::default(),
            tried_out: Mutex::new(false),
            schemes: Default::default(),
            blame: Mutex::new(Blame { at: None, innocent: true, doubtful_until: None }),
            live_threads: AtomicUsize::new(0),
            stuck: AtomicUsize::new(0),
            wants_module: AtomicBool::new(false),
            max_sessions: config.sessions.max(1),
            batch: config.batch.max(1),
            max_queue: config.queue.max(1),
            said_few_sessions: AtomicBool::new(false),
            may_use_final_try: AtomicBool::new(false),
            said_tries: Mutex::new(PinTries::Full),
            said_oddities: Mutex::default(),
            token_missing: AtomicBool::new(false),
        }
    }

    pub(crate) fn health(&self) -> MutexGuard<'_, Health> {
        lock(&self.health)
    }

    pub(crate) fn observe(&self, event: Event<'_>) {
        (self.observer)(&self.name, event);
    }

    /// Does something at the token, and observes how that went.
    pub(crate) fn observed<T>(
        &self,
        op: &'static str,
        work: impl FnOnce() -> Result<T, HsmError>,
    ) -> Result<T, HsmError> {
        let started = standstill::now();
        let result = work();
        self.observe_call(op, class(&result), standstill::since(started));
        result
    }

    /// An operation came back, with this class of return code.
    pub(crate) fn observe_call(&self, op: &'static str, rv: &'static str, took: Duration) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.worked.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(0), Ordering::Relaxed);
        if matches!(rv, "stale" | "busy" | "pin" | "broken") {
            self.faults.fetch_add(1, Ordering::Relaxed);
        }
        self.observe(Event::Call { op, rv, took });
    }

    /// A session has worked off a request that it began at `begun`. For one that was refused the token's part of the time is the
    /// usual one, as in [`observe_call`](Self::observe_call).
    pub(crate) fn observe_answer(
        &self,
        request: &Request,
        result: Result<(), &HsmError>,
        submitted: Instant,
        begun: Instant,
    ) {
        let took = standstill::since(begun);
        let took = match (request, result) {
            (Request::Decrypt { .. }, Err(error)) if may_be_data(error) => {
                self.usual_decryption.booked(Cost { took, processor: Duration::ZERO }, false).took
            }
            _ => took,
        };
        let queued = begun.saturating_duration_since(submitted);
        self.observe(Event::Answered { op: request.op(), took: queued + took });
    }

    /// A plaintext or signature was wrong, by the member's own fault.
    pub(crate) fn observe_wrong_answer(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.observe(Event::WrongAnswer);
    }

    /// Counts processor time that a session's thread had within an operation of the token.
    pub(crate) fn spent(&self, time: Duration) {
        self.spent.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(0), Ordering::Relaxed);
    }

    pub(super) fn job(
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
        let submitted = standstill::now();
        let request = Arc::clone(request);
        Ok((Job { request, deadline, share, watchdog, submitted, reply, in_flight }, answer))
    }

    /// Whether more waits than the sessions on their way will take.
    pub(super) fn has_unserved(&self) -> bool {
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
            *lock(&self.progress) = standstill::now();
            self.observe(Event::Batch { jobs: jobs.len() });
        }
        jobs
    }

    /// Lets go of what a closed member has: what waits goes elsewhere at once, sessions end when their call returns. Those that
    /// idle in the pool are the member's to clear; the supervisor sees to it.
    pub(super) fn retire(self: &Arc<Self>, error: &HsmError) {
        self.observe(Event::Closed);
        self.end_generation();
        self.turn_away(error);
    }

    /// Sends everybody elsewhere who waits.
    pub(super) fn turn_away(&self, why: &HsmError) {
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
        let now = standstill::now();
        *lock(&self.heard) = now;
        let took = now.saturating_duration_since(submitted);
        let closed = match result {
            Ok(()) => {
                self.health().succeeded(took, now);
                false
            }
            Err(error @ HsmError::NoSuchKey(key)) if self.known_good_needs(key) => self.health().force_open(error, now),
            Err(HsmError::NoSuchKey(key)) => {
                self.remember_lack(key, now);
                false
            }
            Err(error) if error.fault().whose == Whose::Member => self.health().failed(error, took, now),
            // The member answered. How fast is told for what was accepted only: see `usual_cost`.
            Err(_) => {
                self.health().answered(now);
                false
            }
        };
        if let (true, Err(error)) = (closed, result) {
            self.retire(error);
        }
    }

    /// Whether a member without this key is none: the probe could not go right there.
    fn known_good_needs(&self, key: &KeyRef) -> bool {
        let known = self.known();
        ["decrypt", "sign"].into_iter().any(|op| first_known(&known, op).is_some_and(|first| first.key() == Some(key)))
    }

    /// Whether it was proved wrong not long ago.
    pub(crate) fn is_doubtful(&self, now: Instant) -> bool {
        lock(&self.blame).doubtful_until.is_some_and(|until| now < until)
    }

    /// Another answer proved that this member was wrong to refuse an input: with a `wrong` result, or an error.
    pub(crate) fn contradicted(self: &Arc<Self>, wrong: bool, generation: u64) {
        lock(&self.blame).doubtful_until = Some(standstill::now() + DOUBTFUL);
        if generation != self.generation() {
            return;
        }
        let now = standstill::now();
        // An error may be a busy token's; a wrong result is nothing but wrong.
        let (error, closed) = if wrong {
            self.observe_wrong_answer();
            let error = HsmError::WrongAnswer;
            let closed = self.health().force_open(&error, now);
            (error, closed)
        } else {
            let error = self.token_error("refused what another member accepts".to_owned());
            let closed = self.health().failed(&error, Duration::ZERO, now);
            (error, closed)
        };
        if closed {
            self.retire(&error);
        }
    }

    /// The oldest call that runs now, by its age.
    pub(super) fn oldest(&self, now: Instant) -> Option<Duration> {
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

    pub(super) fn desks(&self) -> Vec<Arc<Desk>> {
        lock(&self.desks).iter().filter_map(Weak::upgrade).collect()
    }

    /// A thread that was given up has returned from its call.
    pub(crate) fn returned(&self) {
        let before = self.stuck.fetch_sub(1, Ordering::AcqRel);
        let mut health = self.health();
        if before == 1 {
            let state = health.state(self.in_flight.load(Ordering::Acquire), 0);
            info!(member = self.name, %state, "all calls that hung have returned");
        }
        // What hung has passed: see at once whether the member serves again.
        health.probe_now(standstill::now());
    }

    /// Makes sure that the token is logged in; says in which slot it is.
    pub(crate) fn ensure_login(&self) -> Result<Slot, HsmError> {
        let cell = Arc::clone(&lock(&self.login));
        let mut login = lock(&cell);
        self.pin_may_be_tried()?;
        if let Some(login) = &*login {
            let state = login.session.get_session_info().map(|info| info.session_state());
            if matches!(state, Ok(SessionState::RoUser | SessionState::RwUser)) {
                return Ok(login.slot);
            }
        }
        // Logged out, or gone: closed first, since some tokens count sessions.
        *login = None;
        let slot = self.find_token()?;
        let session = self.module.pkcs11().open_ro_session(slot)?;
        self.observe(Event::Login);
        let pin = lock(&self.pin).clone();
        match session.login(UserType::User, Some(&pin.to_auth())) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {
                *login = Some(Login { session, slot });
                Ok(slot)
            }
            Err(error) => {
                let error = HsmError::from(error);
                self.heed_refused_pin(&error, &pin);
                Err(error)
            }
        }
    }

    /// The member's token, if its PIN may be tried now.
    fn find_token(&self) -> Result<Slot, HsmError> {
        let found = self.module.find_token(&self.token);
        self.token_missing.store(matches!(found, Err(HsmError::NoSuchToken { .. })), Ordering::Release);
        let (slot, facts) = found?;
        let word = if self.may_use_final_try.swap(false, Ordering::AcqRel) { Word::Administrator } else { Word::Serve };
        let tries = facts.pin_tries;
        let allowed = tries.allow(word);
        if std::mem::replace(&mut *lock(&self.said_tries), tries) != tries && tries != PinTries::Full {
            let (meaning, remedy) = (tries.meaning(), tries.remedy(&self.name));
            if allowed {
                warn!(member = self.name, token = %self.token, "{meaning}; the PIN is tried once");
            } else {
                error!(member = self.name, token = %self.token, "THE PIN IS NOT TRIED: {meaning}. {remedy}");
            }
        }
        if allowed { Ok(slot) } else { Err(HsmError::PinNotTried { token: self.token.to_string(), tries }) }
    }

    /// An administrator's word that the last try of the PIN may be used by the next login.
    pub(super) fn allow_final_try(&self, allow: bool) {
        self.may_use_final_try.store(allow, Ordering::Release);
    }

    /// A key wants a login for every operation: whether the PIN may be tried.
    ///
    /// # Errors
    /// The token refused it.
    pub(crate) fn pin_may_be_tried(&self) -> Result<(), HsmError> {
        if self.health().pin_refused { Err(self.pin_refused()) } else { Ok(()) }
    }

    /// Logs in for one operation, one session at a time: where the token refuses the PIN, the next session has to know that
    /// before it tries, since tokens count wrong PINs.
    ///
    /// # Errors
    /// What the token says, now or before.
    pub(crate) fn login_for_operation(&self, session: &Session) -> Result<(), HsmError> {
        let cell = Arc::clone(&lock(&self.login));
        let _one_at_a_time = lock(&cell);
        self.pin_may_be_tried()?;
        let pin = lock(&self.pin).clone();
        module::login_for_operation(session, &pin).inspect_err(|error| self.heed_refused_pin(error, &pin))
    }

    /// Sees to it that a PIN that the token refused is not tried again. One that was replaced meanwhile says nothing of the
    /// new one.
    fn heed_refused_pin(&self, error: &HsmError, tried: &Pin) {
        if error.refuses_pin() && lock(&self.pin).is(tried) {
            self.health().refuse_pin(error);
        }
    }

    /// Says what is odd about the token's keys, each thing once.
    pub(crate) fn say_oddities(&self, oddities: Vec<String>) {
        let mut said = lock(&self.said_oddities);
        for oddity in oddities {
            if !said.contains(&oddity) && said.len() < MOST_ODDITIES {
                warn!(member = self.name, token = %self.token, "{oddity}");
                said.push(oddity);
            }
        }
    }

    pub(super) fn pin_refused(&self) -> HsmError {
        self.token_error("refused the PIN, which is not tried again until there is another one".to_owned())
    }

    pub(crate) fn token_error(&self, reason: String) -> HsmError {
        HsmError::Token { token: self.token.to_string(), reason }
    }

    pub(crate) fn thread_ended(&self) -> HsmError {
        self.token_error("the session was closed".to_owned())
    }

    pub(super) fn not_serving(&self) -> HsmError {
        HsmError::NoMember(format!("{} does not serve now", self.name))
    }

    pub(super) fn pool_error(&self, error: PoolError<HsmError>) -> HsmError {
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
            // It gives more than it did.
            self.granted.fetch_max(*usable, Ordering::AcqRel);
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
    pub(super) fn usable(&self) -> usize {
        *lock(&self.usable)
    }

    pub(super) fn end_generation(self: &Arc<Self>) {
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

    /// Closes the session that holds the login. Blocks.
    pub(super) fn forget_login(&self) {
        let cell = std::mem::take(&mut *lock(&self.login));
        drop(lock(&cell).take());
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
    pub(super) fn may_open(&self) -> Result<(), HsmError> {
        if self.live_threads.load(Ordering::Acquire) > 2 * self.max_sessions + 2 {
            return Err(self.token_error("too many session threads hang in the module".to_owned()));
        }
        if self.is_short() {
            return Err(HsmError::new("C_OpenSession", RvError::SessionCount));
        }
        Ok(())
    }

    /// Whether the token gave fewer sessions than asked for not long ago, and some serve.
    pub(super) fn is_short(&self) -> bool {
        let short = lock(&self.short_since).is_some_and(|since| standstill::since(since) < ASK_FOR_MORE);
        short && self.usable() > 0
    }

    /// A session has been given back to the pool.
    pub(crate) fn freed(&self) {
        self.freed.notify_one();
    }

    pub(super) fn lacks(&self, key: &KeyRef, now: Instant) -> bool {
        let lacking = lock(&self.lacking);
        !lacking.is_empty() && lacking.get(key).is_some_and(|until| now < *until)
    }

    fn remember_lack(&self, key: &KeyRef, now: Instant) {
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

/// Whether the input may be at fault, or was found to be.
fn may_be_data(error: &HsmError) -> bool {
    matches!(error, HsmError::WrongAnswer) || matches!(error.fault().whose, Whose::Caller | Whose::Unclear)
}

/// A panic under any of these locks leaves nothing half-done that would do harm.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
