//! One token as the daemon sees it.
//!
//! A member has a queue: calls wait for a *place*, the right to have one call at the member's worker. There are two places for
//! each session, so that a session finds its next call already in the socket. A call is one send; the task that reads the
//! worker's reports wakes the caller.
//!
//! Its life is one task, [`Member::live`]: start a worker, test it, serve until a fault, get rid of the worker, and again.
//!
//! Locks are leaves: none is taken while another one of the member is held.

pub(crate) mod conversation;
mod credibility;
mod outstanding;
mod process;
mod state;
mod usual_cost;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use cryptoki::error::RvError;
use deadpool::managed::{self, Metrics, Object, Pool, PoolError, Timeouts};
use tokio::sync::{Notify, oneshot, watch};
use tracing::{error, info, warn};
use zeroize::Zeroizing;

use crate::config::{MemberConfig, Pin};
use crate::error::{Failure, HsmError, WorkerFault, class};
use crate::event::{Event, Observer};
use crate::fault::FaultOwner;
use crate::identity::KeyRef;
use crate::job::{Job, KnownAnswerTest, Value, known_for, must_pass};
use crate::link::{DaemonEnd, Level, Start};
use crate::operation::Operation;
use crate::pin_tries::PinTries;
use crate::policy::pick::Candidate;
use crate::standstill;
use conversation::{Conversation, News, Reply};
use credibility::Credibility;
pub(crate) use outstanding::Limits;
pub use process::WorkerProgram;
use process::{Process, Usage};
use state::Machine;
pub use state::{LastError, MemberState};
use usual_cost::{Cost, UsualCost};

/// Calls that a session may have at the worker: one that runs and one in the socket.
const PLACES_FOR_A_SESSION: usize = 2;
/// How long a worker may take to load its module, log in and open its first session. Generous: a network HSM may need seconds for a
/// login.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a worker may take to end when it is told to; its calls run to their end first.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a member's own operations may wait: tests, PIN changes.
const OWN_TIMEOUT: Duration = Duration::from_secs(10);
/// After how long without a result a member that is up is tested: the spare one has to work when it is needed.
const SILENCE: Duration = Duration::from_secs(10);
/// How long a member that lacked a key is passed over for it. Replication between HSMs takes a moment.
const LACKS: Duration = Duration::from_secs(2);
/// Keys that a member is known to lack; more are not remembered.
const MOST_LACKING: usize = 64;
/// Notes of workers that are remembered so as not to be repeated.
const MOST_NOTES: usize = 32;

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
    /// Members with the smallest number serve while any of them can.
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
    /// Sessions that there can be: fewer than asked for where the token gave fewer.
    pub sessions_limit: usize,
    /// Sessions that are in a call.
    pub sessions_busy: usize,
    /// Calls that hang, until their worker is killed.
    pub sessions_stuck: usize,
    /// How often a fault took it down.
    pub closings: u64,
    /// Operations of its token that returned.
    pub calls: u64,
    /// Those of them that failed by its own fault.
    pub faults: u64,
    /// How long its sessions were in operations that returned, together.
    pub worked: Duration,
    /// Processor time of its workers within operations of the token: the vendor's library, all of the work where the token is
    /// software.
    pub spent: Duration,
    /// The process id of its worker, while there is one.
    pub worker: Option<u32>,
    /// Processor time of its workers, all of it.
    pub worker_processor: Duration,
    /// Bytes of memory of its worker.
    pub worker_resident: u64,
    /// What it was last blamed for, also when it has come up since.
    pub last_error: Option<LastError>,
}

/// What became of a call at one member.
pub(crate) enum Outcome {
    /// The token was asked, or may have been.
    Ran(Result<Value, HsmError>),
    /// The token was not asked, so asking another one costs nothing twice.
    NotRun(HsmError),
}

/// What a balancer reads of a member: atomics only.
#[derive(Debug)]
struct Gauges {
    serving: AtomicBool,
    /// The latency estimate, in nanoseconds.
    latency: AtomicU64,
    /// The age of the oldest running call when it was last looked at, in nanoseconds; 0: none runs.
    oldest: AtomicU64,
    /// Calls that wait or run.
    in_flight: AtomicUsize,
    priority: AtomicU32,
    weight: AtomicU32,
    /// Whether any key is known to be lacking, so that the list need not be looked at.
    lacks_keys: AtomicBool,
}

#[derive(Debug, Default)]
struct Stats {
    calls: AtomicU64,
    worked: AtomicU64,
    spent: AtomicU64,
    faults: AtomicU64,
}

/// The right to have one call at the worker.
struct Place;

/// deadpool's way to places.
struct Places;

impl managed::Manager for Places {
    type Type = Place;
    type Error = std::convert::Infallible;

    async fn create(&self) -> Result<Place, Self::Error> {
        Ok(Place)
    }

    async fn recycle(&self, _: &mut Place, _: &Metrics) -> managed::RecycleResult<Self::Error> {
        Ok(())
    }
}

/// Held while a call is outstanding.
pub(crate) struct Held {
    _place: Option<Object<Places>>,
    _in_flight: InFlight,
}

/// One call that waits or runs, counted while this lives.
struct InFlight(Arc<Gauges>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

type Talk = Arc<Conversation<Held>>;

/// The PIN, and what is known about it.
struct PinState {
    pin: Pin,
    /// An administrator said that the last try of the PIN may be used.
    may_use_final_try: bool,
    /// What the log was last told of the PIN's tries.
    said: PinTries,
}

/// A member of a cluster.
pub(crate) struct Member {
    pub(crate) name: Arc<str>,
    config: MemberConfig,
    program: WorkerProgram,
    known: Arc<RwLock<Arc<[KnownAnswerTest]>>>,
    observer: Observer,
    /// Told whenever any member of the cluster comes up.
    somebody_up: Arc<Notify>,
    gauges: Arc<Gauges>,
    machine: Mutex<Machine>,
    talk: Mutex<Option<Talk>>,
    places: Pool<Places>,
    pin: Mutex<PinState>,
    /// Told when the machine has changed, or was asked to try now.
    changed: Notify,
    /// Told when the member stops serving: who waits for a place goes elsewhere.
    left: Notify,
    /// How many attempts have ended, and how the last one failed.
    attempts: watch::Sender<(u64, Option<Failure>)>,
    credibility: Mutex<Credibility>,
    lacking: Mutex<HashMap<KeyRef, Instant>>,
    notes: Mutex<Vec<String>>,
    /// When there was last a result, good or bad.
    heard: Mutex<Instant>,
    stats: Stats,
    usage: Usage,
    usual_decryption: UsualCost,
    /// The worker passed the tests.
    tested: AtomicBool,
    /// How long a call may run before the member counts as hung.
    watchdog: Duration,
    /// Sessions that the token gave when it gave no more.
    granted: AtomicUsize,
    workers: AtomicU64,
    worker_pid: Mutex<Option<u32>>,
}

/// What all members of a cluster share.
#[derive(Clone)]
pub(crate) struct Surroundings {
    pub(crate) program: WorkerProgram,
    /// How long a call may run before a member counts as hung.
    pub(crate) watchdog: Duration,
    pub(crate) known: Arc<RwLock<Arc<[KnownAnswerTest]>>>,
    pub(crate) observer: Observer,
    pub(crate) somebody_up: Arc<Notify>,
}

/// What an operation came to, before it is known who is to blame.
enum Finding {
    Right(Zeroizing<Vec<u8>>),
    /// The input or the member is at fault: by a `wrong` result, or by an error.
    Doubtful {
        wrong: bool,
    },
    /// The member's failure, or something that it lacks.
    Failed(HsmError),
}

impl Finding {
    fn of(result: Result<Value, HsmError>, job: &Job) -> Self {
        match result {
            Ok(Value::Bytes(bytes)) if job.accepts(&bytes) => Finding::Right(bytes),
            Ok(Value::Bytes(_)) => Finding::Doubtful { wrong: true },
            Ok(_) => Finding::Failed(HsmError::UnexpectedReply),
            Err(error) if is_about_input(error) => {
                // A random key is checked for nothing, so that this takes as long as a wrong one.
                let mut random = Zeroizing::new([0_u8; 32]);
                random.iter_mut().for_each(|byte| *byte = fastrand::u8(..));
                let _ = job.accepts(&*random);
                Finding::Doubtful { wrong: false }
            }
            Err(error) => Finding::Failed(error),
        }
    }
}

/// Whether the input may be at fault, or was found to be.
fn is_about_input(error: HsmError) -> bool {
    matches!(error.fault().owner, FaultOwner::Caller | FaultOwner::Unclear)
}

impl Member {
    /// A member that has proved nothing yet. [`live`](Self::live) has to run for it to come up.
    pub(crate) fn new(config: MemberConfig, surroundings: &Surroundings) -> Result<Self, HsmError> {
        let now = standstill::now();
        let places = Pool::builder(Places).max_size(PLACES_FOR_A_SESSION).build().map_err(|_| HsmError::NotServing)?;
        let Surroundings { program, watchdog, known, observer, somebody_up } = surroundings.clone();
        Ok(Member {
            name: config.name.as_str().into(),
            gauges: Arc::new(Gauges {
                serving: AtomicBool::new(false),
                latency: AtomicU64::new(0),
                oldest: AtomicU64::new(0),
                in_flight: AtomicUsize::new(0),
                priority: AtomicU32::new(config.priority),
                weight: AtomicU32::new(config.weight),
                lacks_keys: AtomicBool::new(false),
            }),
            machine: Mutex::new(Machine::new(&config.name, now)),
            talk: Mutex::default(),
            places,
            pin: Mutex::new(PinState { pin: config.pin.clone(), may_use_final_try: false, said: PinTries::Full }),
            changed: Notify::new(),
            left: Notify::new(),
            attempts: watch::Sender::new((0, None)),
            credibility: Mutex::default(),
            lacking: Mutex::default(),
            notes: Mutex::default(),
            heard: Mutex::new(now),
            stats: Stats::default(),
            usage: Usage::default(),
            usual_decryption: UsualCost::default(),
            tested: AtomicBool::new(false),
            watchdog,
            granted: AtomicUsize::new(config.sessions.max(1)),
            workers: AtomicU64::new(0),
            worker_pid: Mutex::default(),
            config,
            program,
            known,
            observer,
            somebody_up,
        })
    }

    fn observe(&self, event: Event<'_>) {
        (self.observer)(&self.name, event);
    }

    pub(crate) fn observe_failed_over(&self, to: &str) {
        self.observe(Event::FailedOver { to });
    }

    pub(crate) fn observe_retry(&self) {
        self.observe(Event::Retry);
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        lock(&self.machine)
    }

    fn known(&self) -> Arc<[KnownAnswerTest]> {
        Arc::clone(&self.known.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn talk(&self) -> Option<Talk> {
        lock(&self.talk).clone()
    }
}

/// What the balancer asks.
impl Member {
    pub(crate) fn priority(&self) -> u32 {
        self.gauges.priority.load(Ordering::Relaxed)
    }

    /// For [`pick`](crate::policy::pick::pick); `None`: it cannot take a call now. Reads atomics only, but for a member that
    /// lacks keys.
    pub(crate) fn candidate(&self, key: Option<&KeyRef>, now: Instant) -> Option<Candidate> {
        let gauges = &self.gauges;
        let in_flight = gauges.in_flight.load(Ordering::Acquire);
        let oldest = Duration::from_nanos(gauges.oldest.load(Ordering::Relaxed));
        let able = gauges.serving.load(Ordering::Acquire)
            && in_flight < self.config.queue.max(1)
            && !key.is_some_and(|key| self.lacks(key, now));
        able.then(|| Candidate {
            weight: gauges.weight.load(Ordering::Relaxed),
            latency: Duration::from_nanos(gauges.latency.load(Ordering::Relaxed)),
            oldest: Some(oldest).filter(|oldest| in_flight > 0 && !oldest.is_zero()),
            in_flight,
        })
    }

    /// Whether it gets calls.
    pub(crate) fn is_serving(&self) -> bool {
        self.gauges.serving.load(Ordering::Acquire)
    }

    /// Whether the member would serve if it had the key.
    pub(crate) fn only_lacks(&self, key: &KeyRef, now: Instant) -> bool {
        self.is_serving() && self.lacks(key, now)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.is_serving() && self.gauges.in_flight.load(Ordering::Acquire) >= self.config.queue.max(1)
    }

    /// Since when a fresh worker is being started after a fault; `None`: it serves, or is not on its way up.
    pub(crate) fn returning_since(&self) -> Option<Instant> {
        self.machine().returning_since()
    }

    /// Whether it was proved wrong a short time ago.
    pub(crate) fn is_doubtful(&self, now: Instant) -> bool {
        lock(&self.credibility).is_doubtful(now)
    }

    /// The number of the worker that serves now.
    pub(crate) fn generation(&self) -> u64 {
        self.workers.load(Ordering::Acquire)
    }

    fn lacks(&self, key: &KeyRef, now: Instant) -> bool {
        self.gauges.lacks_keys.load(Ordering::Acquire) && lock(&self.lacking).get(key).is_some_and(|until| now < *until)
    }

    fn remember_lack(&self, key: &KeyRef, now: Instant) {
        let mut lacking = lock(&self.lacking);
        lacking.retain(|_, until| now < *until);
        if lacking.len() < MOST_LACKING {
            lacking.insert(key.clone(), now + LACKS);
            self.gauges.lacks_keys.store(true, Ordering::Release);
        }
    }

    fn forget_lacks(&self) {
        lock(&self.lacking).clear();
        self.gauges.lacks_keys.store(false, Ordering::Release);
    }

    pub(crate) fn rank(&self, priority: u32, weight: u32) {
        self.gauges.priority.store(priority, Ordering::Relaxed);
        self.gauges.weight.store(weight, Ordering::Relaxed);
    }
}

/// Calls.
impl Member {
    /// One operation of a caller, judged.
    pub(crate) async fn call(&self, job: &Job, deadline: Instant, limits: Limits) -> Outcome {
        let submitted = standstill::now();
        let held = match self.hold(deadline).await {
            Ok(held) => held,
            Err(error) => return Outcome::NotRun(error),
        };
        let Some(talk) = self.talk().filter(|_| self.is_serving()) else {
            return Outcome::NotRun(HsmError::NotServing);
        };
        let reply = match self.exchange(&talk, job, held, deadline, limits).await {
            Ok(reply) => reply,
            Err(error) => return Outcome::NotRun(error),
        };
        let result = self.judge(&talk, job, reply, submitted).await;
        self.learn(job, result.as_ref().err().copied(), submitted, talk.number);
        Outcome::Ran(result)
    }

    /// Waits for a place, in order of arrival.
    async fn hold(&self, deadline: Instant) -> Result<Held, HsmError> {
        // Counted first, so that two callers cannot both take the last place in the queue.
        let before = self.gauges.in_flight.fetch_add(1, Ordering::AcqRel);
        let in_flight = InFlight(Arc::clone(&self.gauges));
        if before >= self.config.queue.max(1) {
            return Err(HsmError::QueueFull);
        }
        let no_wait = Timeouts { wait: Some(Duration::ZERO), ..Timeouts::default() };
        let place = match self.places.timeout_get(&no_wait).await {
            Ok(place) => place,
            Err(PoolError::Timeout(_)) => {
                let left = self.left.notified();
                tokio::pin!(left);
                left.as_mut().enable();
                if !self.is_serving() {
                    return Err(HsmError::NotServing);
                }
                tokio::select! {
                    place = standstill::timeout_at(deadline, self.places.get()) => match place {
                        Ok(place) => place.map_err(|_| HsmError::NotServing)?,
                        Err(_) => return Err(HsmError::Deadline),
                    },
                    () = left => return Err(HsmError::NotServing),
                }
            }
            Err(_) => return Err(HsmError::NotServing),
        };
        Ok(Held { _place: Some(place), _in_flight: in_flight })
    }

    /// One frame there and one back. An error: the token was not asked.
    async fn exchange(
        &self,
        talk: &Talk,
        job: &Job,
        held: Held,
        deadline: Instant,
        limits: Limits,
    ) -> Result<Reply, HsmError> {
        let answer = talk.submit(job, limits, held).inspect_err(|error| {
            if *error == HsmError::Worker(WorkerFault::Deaf) {
                self.fault(&(*error).into());
            }
        })?;
        match standstill::timeout_at(deadline, answer).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => Ok(Reply {
                result: Err(HsmError::Worker(WorkerFault::Gone)),
                took: Duration::ZERO,
                processor: Duration::ZERO,
            }),
            Err(_) => Err(HsmError::Deadline),
        }
    }

    /// Decides what a reply is worth. A result that its own check accepts is right, whichever member made it. Every other way in
    /// which an operation can have gone wrong with its input, an error or a wrong result, is the same from here on, in what is
    /// done and in what is said, so that a caller does not learn which it was.
    async fn judge(&self, talk: &Talk, job: &Job, reply: Reply, submitted: Instant) -> Result<Value, HsmError> {
        if !matches!(job.operation, Operation::Decrypt | Operation::Sign) {
            self.book_call(job.operation, class(&reply.result), reply.took, reply.processor);
            self.observe(Event::Answered { op: job.operation, took: standstill::since(submitted) });
            return reply.result;
        }
        let queued = standstill::since(submitted).saturating_sub(reply.took);
        let own = Cost { took: reply.took, processor: reply.processor };
        let finding = Finding::of(reply.result, job);
        let booked = self.book(job.operation, &finding, own);
        self.observe(Event::Answered { op: job.operation, took: queued + booked.took });
        let wrong = match finding {
            Finding::Right(bytes) => return Ok(Value::Bytes(bytes)),
            Finding::Failed(error) => return Err(error),
            Finding::Doubtful { wrong } => wrong,
        };
        let blamed = if wrong && job.operation == Operation::Sign {
            // No input of a caller's makes a signature wrong.
            true
        } else if lock(&self.credibility).wants_test(standstill::now()) {
            let known = self.known();
            let tested = match known_for(&known, job) {
                Some(known) => self.test_one(talk, known).await,
                // Without a known answer the member cannot be blamed.
                None => Ok(()),
            };
            let blamed = tested == Err(HsmError::WrongAnswer);
            lock(&self.credibility).tested(!blamed);
            if !blamed {
                tested?;
            }
            blamed
        } else {
            !lock(&self.credibility).passed()
        };
        if !blamed {
            return Err(HsmError::Refused { wrong });
        }
        if wrong {
            self.observe_wrong_answer();
        }
        Err(HsmError::WrongAnswer)
    }

    /// Observes an operation, once. A decryption that may be the caller's fault is one class, and one time, whatever the token
    /// said: metrics are no oracle.
    fn book(&self, operation: Operation, finding: &Finding, own: Cost) -> Cost {
        let (rv, cost) = match (operation, finding) {
            (Operation::Decrypt, Finding::Right(_)) => ("ok", self.usual_decryption.booked(own, true)),
            (Operation::Decrypt, Finding::Doubtful { .. }) => ("refused", self.usual_decryption.booked(own, false)),
            (_, Finding::Right(_) | Finding::Doubtful { wrong: true }) => ("ok", own),
            (_, Finding::Doubtful { wrong: false }) => ("refused", own),
            (_, Finding::Failed(error)) => (error.class(), own),
        };
        self.book_call(operation, rv, cost.took, cost.processor);
        cost
    }

    fn book_call(&self, op: Operation, rv: &'static str, took: Duration, processor: Duration) {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(0);
        self.stats.calls.fetch_add(1, Ordering::Relaxed);
        self.stats.worked.fetch_add(nanos(took), Ordering::Relaxed);
        self.stats.spent.fetch_add(nanos(processor), Ordering::Relaxed);
        if matches!(rv, "stale" | "busy" | "pin" | "broken") {
            self.stats.faults.fetch_add(1, Ordering::Relaxed);
        }
        self.observe(Event::Call { op, rv, took });
    }

    /// A plaintext or signature was wrong, by the member's own fault.
    fn observe_wrong_answer(&self) {
        self.stats.faults.fetch_add(1, Ordering::Relaxed);
        self.observe(Event::WrongAnswer);
    }

    /// What a caller's operation says about the member. Enough of what is its fault takes it down.
    fn learn(&self, job: &Job, error: Option<HsmError>, submitted: Instant, number: u64) {
        // What comes from a worker before the present one says nothing about the member now; key management takes as long
        // as it takes.
        if number != self.generation() || !job.operation.may_repeat() {
            return;
        }
        let now = standstill::now();
        *lock(&self.heard) = now;
        let took = now.saturating_duration_since(submitted);
        match error {
            None => self.machine().succeeded(took, now),
            Some(error) if error.refuses_pin() => self.refused_pin(error),
            Some(HsmError::NoSuchKey) => match &job.key {
                Some(key) if self.tests_need(key) => self.fault(&HsmError::NoSuchKey.into()),
                Some(key) => self.remember_lack(key, now),
                None => {}
            },
            // The worker's end is judged by who reads from it.
            Some(HsmError::Worker(_)) => {}
            Some(error) if error.is_code(RvError::CryptokiNotInitialized) => self.fault(&error.into()),
            // Told by who looks for calls that take too long.
            Some(HsmError::Hung(_)) => {}
            Some(error) if error.fault().owner == FaultOwner::Member => self.failed(error, took, now),
            // The member answered. Its latency is learnt from accepted operations only: see `usual_cost`.
            Some(_) => self.machine().answered(now),
        }
    }

    /// Whether a member without this key does not pass the tests.
    fn tests_need(&self, key: &KeyRef) -> bool {
        must_pass(&self.known()).any(|test| test.key.as_ref() == Some(key))
    }

    /// Another answer proved that this member was wrong to reject an input: with a `wrong` result, or an error.
    pub(crate) fn contradicted(&self, wrong: bool, number: u64) {
        let now = standstill::now();
        lock(&self.credibility).contradicted(now);
        if number != self.generation() {
            return;
        }
        // An error may be a busy token's; a wrong result is nothing but wrong.
        if wrong {
            self.observe_wrong_answer();
            self.fault(&HsmError::WrongAnswer.into());
        } else {
            self.failed(HsmError::Nonsense, Duration::ZERO, now);
        }
    }

    /// One operation at this very member, whatever its state, as long as it has a worker: key management, tests.
    pub(crate) async fn direct(&self, job: &Job, timeout: Duration) -> Result<Value, Failure> {
        let deadline = standstill::now() + timeout;
        if self.machine().is_pin_refused() {
            return Err(HsmError::PinRefused.into());
        }
        let talk = match self.talk() {
            Some(talk) => talk,
            None => {
                self.attempt_now().await?;
                self.talk().ok_or(HsmError::NotServing)?
            }
        };
        let held = self.hold_directly();
        let submitted = standstill::now();
        let limits = Limits { share: timeout, watchdog: timeout };
        let reply = self.exchange(&talk, job, held, deadline, limits).await?;
        let result = self.judge(&talk, job, reply, submitted).await;
        match &result {
            Ok(_) if !job.operation.may_repeat() => self.forget_lacks(),
            Err(error) if error.refuses_pin() => self.refused_pin(*error),
            _ => {}
        }
        Ok(result?)
    }

    /// A member's own call needs no place: it is one more in the socket.
    fn hold_directly(&self) -> Held {
        self.gauges.in_flight.fetch_add(1, Ordering::AcqRel);
        Held { _place: None, _in_flight: InFlight(Arc::clone(&self.gauges)) }
    }

    /// Passes the known-answer tests, or proves that a session lives as long as there are none; how long that took. Takes the member
    /// down when they fail.
    pub(crate) async fn test(&self) -> Result<Duration, Failure> {
        let talk = self.talk().ok_or(HsmError::NotServing)?;
        let tested = self.test_all(&talk).await;
        if let Err(error) = tested
            && error.condemns()
            && talk.number == self.generation()
        {
            self.fault(&error.into());
        }
        Ok(tested?)
    }

    async fn test_all(&self, talk: &Talk) -> Result<Duration, HsmError> {
        let begun = standstill::now();
        let known = self.known();
        let mut tested = 0;
        for test in must_pass(&known) {
            tested += 1;
            self.test_one(talk, test).await?;
        }
        if tested == 0 {
            self.own_call(talk, &Job::ping()?).await?.result?;
        }
        *lock(&self.heard) = standstill::now();
        Ok(standstill::since(begun))
    }

    /// Whatever goes wrong in a known-answer test is the member's fault.
    async fn test_one(&self, talk: &Talk, test: &Job) -> Result<(), HsmError> {
        let reply = self.own_call(talk, test).await?;
        // The input is right: a member that rejects it is ill.
        let rv = Some(class(&reply.result)).filter(|rv| *rv != "refused").unwrap_or("broken");
        self.book_call(Operation::Probe, rv, reply.took, reply.processor);
        match reply.result {
            Ok(Value::Bytes(bytes)) if test.accepts(&bytes) => Ok(()),
            Ok(_) => {
                self.observe_wrong_answer();
                Err(HsmError::WrongAnswer)
            }
            Err(error) if is_about_input(error) => Err(HsmError::WrongAnswer),
            Err(error) => Err(error),
        }
    }

    async fn own_call(&self, talk: &Talk, job: &Job) -> Result<Reply, HsmError> {
        let limits = Limits { share: self.watchdog, watchdog: self.watchdog };
        self.exchange(talk, job, self.hold_directly(), standstill::now() + OWN_TIMEOUT, limits).await
    }
}

/// Faults, and what administrators say.
impl Member {
    fn failed(&self, error: HsmError, took: Duration, now: Instant) {
        let down = self.machine().failed(error, took, now);
        if down {
            self.went_down();
        }
    }

    /// Takes the member down at once.
    fn fault(&self, failure: &Failure) {
        let down = self.machine().fault(failure, standstill::now());
        if down {
            self.went_down();
        }
    }

    fn refused_pin(&self, error: HsmError) {
        let news = self.machine().pin_refused(error);
        if news {
            self.went_down();
        }
    }

    /// The machine says that the member does not serve any more.
    fn went_down(&self) {
        self.observe(Event::Closed);
        self.stop_serving();
        self.changed.notify_one();
    }

    fn stop_serving(&self) {
        self.gauges.serving.store(false, Ordering::Release);
        self.left.notify_waiters();
    }

    /// Looks for calls that take too long, and refreshes what the balancer reads. Whether the member should be tested: nothing was
    /// heard of it for long, or only a failure.
    pub(crate) fn tick(&self, now: Instant) -> bool {
        let talk = self.talk();
        let mut oldest = None;
        if let Some(talk) = &talk {
            let (late, hung) = talk.look(now);
            match hung {
                Some(operation) => {
                    self.observe(Event::Stuck);
                    self.fault(&HsmError::Hung(operation).into());
                }
                None => late.iter().for_each(|operation| self.failed(HsmError::Hung(*operation), self.watchdog, now)),
            }
            oldest = talk.oldest(now);
        }
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.gauges.oldest.store(oldest.map_or(0, nanos), Ordering::Relaxed);
        let idle = self.gauges.in_flight.load(Ordering::Acquire) == 0;
        let mut machine = self.machine();
        self.gauges.latency.store(nanos(machine.latency.estimate(now)), Ordering::Relaxed);
        if idle {
            machine.idle();
        }
        let doubt = machine.is_in_doubt(now);
        let up = machine.is_up();
        drop(machine);
        let mut heard = lock(&self.heard);
        let silent = up && now.saturating_duration_since(*heard) >= SILENCE;
        if silent {
            // Asked once.
            *heard = now;
        }
        silent || doubt
    }

    /// Makes the next attempt come soon.
    pub(crate) fn probe_now(&self) {
        self.machine().probe_now(standstill::now());
        self.changed.notify_one();
    }

    /// Waits for the next attempt to bring the member up, which is made to come soon.
    async fn attempt_now(&self) -> Result<(), Failure> {
        let mut attempts = self.attempts.subscribe();
        self.probe_now();
        match standstill::timeout(START_TIMEOUT + OWN_TIMEOUT, attempts.changed()).await {
            Ok(Ok(())) => {}
            _ => return Err(HsmError::Worker(WorkerFault::StartHangs).into()),
        }
        let (_, failure) = attempts.borrow().clone();
        match failure {
            // Whoever wants to manage the keys of a member that lacks some can do so.
            Some(failure) if self.talk().is_none() => Err(failure),
            _ => Ok(()),
        }
    }

    /// Waits for the first attempt to bring the member up.
    pub(crate) async fn first_attempt(&self) -> Result<(), Failure> {
        let mut attempts = self.attempts.subscribe();
        let Ok(attempts) = attempts.wait_for(|(count, _)| *count > 0).await else {
            return Err(HsmError::NotServing.into());
        };
        attempts.1.clone().map_or(Ok(()), Err)
    }

    /// Tests the member now, whatever its state; how long the tests took. A member that is down gets a fresh worker first.
    pub(crate) async fn probe(&self) -> Result<Duration, Failure> {
        if self.talk().is_none() {
            self.attempt_now().await?;
        }
        self.test().await
    }

    /// Like [`probe`](Self::probe), on an administrator's word: a refused PIN may be tried again, also if it is the last try.
    pub(crate) async fn probe_on_request(&self) -> Result<Duration, Failure> {
        lock(&self.pin).may_use_final_try = true;
        self.allow_pin();
        let probed = self.probe().await;
        lock(&self.pin).may_use_final_try = false;
        probed
    }

    /// Takes a PIN, and lets it be tried if the last one was refused and was another: the same one again would be one step
    /// nearer to a locked token each time that the log is rotated.
    pub(crate) async fn set_pin(&self, pin: Pin) {
        let other = {
            let mut held = lock(&self.pin);
            let other = !held.pin.is(&pin);
            held.pin = pin.clone();
            other
        };
        if !other {
            return;
        }
        if let Some(talk) = self.talk()
            && let Ok(job) = Job::set_pin(pin)
        {
            // A worker that cannot take it is replaced for other reasons, and its successor starts with this PIN.
            let _ = self.own_call(&talk, &job).await;
        }
        self.allow_pin();
    }

    fn allow_pin(&self) {
        let changed = self.machine().allow_pin(standstill::now());
        if changed {
            self.changed.notify_one();
        }
    }

    /// Lets the member finish what it has and gives it nothing new, or takes it back into service; whether that changed anything.
    pub(crate) fn drain(&self, drain: bool) -> bool {
        let worker = self.tested.load(Ordering::Acquire);
        let (changed, up) = {
            let mut machine = self.machine();
            (machine.drain(drain, worker, standstill::now()), machine.is_up())
        };
        if changed {
            if up {
                self.start_serving();
            } else {
                self.stop_serving();
            }
            self.changed.notify_one();
        }
        changed
    }

    fn start_serving(&self) {
        self.gauges.serving.store(true, Ordering::Release);
        self.somebody_up.notify_waiters();
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.gauges.in_flight.load(Ordering::Acquire)
    }

    pub(crate) fn status(&self) -> MemberStatus {
        let talk = self.talk();
        let in_flight = self.in_flight();
        let (running, stuck) = talk.as_ref().map_or((0, 0), |talk| talk.running());
        let sent = talk.as_ref().map_or(0, |talk| talk.sent());
        let pid = *lock(&self.worker_pid);
        let cost = self.usage.look(pid);
        let machine = self.machine();
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        MemberStatus {
            name: self.name.to_string(),
            token: self.config.token.to_string(),
            state: machine.state(stuck),
            since: machine.since(),
            priority: self.priority(),
            weight: self.gauges.weight.load(Ordering::Relaxed),
            latency: machine.latency.estimate(standstill::now()),
            in_flight,
            waiting: in_flight.saturating_sub(sent) + sent.saturating_sub(running),
            sessions_open: talk.as_ref().map_or(0, |talk| talk.sessions()),
            sessions_wanted: self.config.sessions.max(1),
            sessions_limit: self.granted.load(Ordering::Acquire).min(self.config.sessions.max(1)),
            sessions_busy: running.saturating_sub(stuck),
            sessions_stuck: stuck,
            closings: machine.closings(),
            calls: load(&self.stats.calls),
            faults: load(&self.stats.faults),
            worked: Duration::from_nanos(load(&self.stats.worked)),
            spent: Duration::from_nanos(load(&self.stats.spent)),
            worker: pid,
            worker_processor: cost.processor,
            worker_resident: cost.resident,
            last_error: machine.last_error().cloned(),
        }
    }
}

/// How a worker's service came to its end.
enum End {
    /// It did not come to serve.
    AttemptFailed(Failure),
    /// It served, and ended or broke off the conversation.
    Broken(Failure),
    /// The member does not keep it: a fault, a refused PIN.
    Unwanted,
    /// The member leaves the cluster.
    Removed,
}

/// The member's life.
impl Member {
    /// Starts workers and gets rid of them, until the member is removed.
    pub(crate) async fn live(self: Arc<Self>) {
        while self.until_attempt_is_due().await {
            let worker = self.start_process();
            match worker {
                Ok((process, talk)) => self.serve(process, talk).await,
                Err(failure) => self.attempt_failed(&failure),
            }
        }
    }

    /// `false` when the member is removed.
    async fn until_attempt_is_due(&self) -> bool {
        loop {
            let due = {
                let mut machine = self.machine();
                if machine.is_removed() {
                    return false;
                }
                if machine.begin_attempt(standstill::now()) {
                    return true;
                }
                machine.attempt_due()
            };
            match due {
                Some(due) => tokio::select! {
                    () = standstill::sleep_until(due) => {}
                    () = self.changed.notified() => {}
                },
                None => self.changed.notified().await,
            }
        }
    }

    async fn until_removed(&self) {
        while !self.machine().is_removed() {
            self.changed.notified().await;
        }
    }

    /// Until the member does not keep its worker any more.
    async fn until_unwanted(&self) -> End {
        loop {
            {
                let machine = self.machine();
                if machine.is_removed() {
                    return End::Removed;
                }
                if !machine.keeps_worker() {
                    return End::Unwanted;
                }
            }
            self.changed.notified().await;
        }
    }

    fn start_process(&self) -> Result<(Process, Talk), Failure> {
        let not_started = |error: std::io::Error| {
            Failure::new(HsmError::Worker(WorkerFault::NotStarted), format!("{}: {error}", self.program.path.display()))
        };
        let (process, socket) = Process::start(&self.name, &self.program, &self.config.env).map_err(not_started)?;
        let end = DaemonEnd::new(socket).map_err(not_started)?;
        let number = self.workers.fetch_add(1, Ordering::AcqRel) + 1;
        Ok((process, Arc::new(Conversation::new(end, number))))
    }

    /// Has a worker start and pass the tests, lets it serve, and gets rid of it.
    async fn serve(self: &Arc<Self>, mut process: Process, talk: Talk) {
        *lock(&self.worker_pid) = process.pid();
        let (broken, mut ended) = oneshot::channel();
        let reader = tokio::spawn({
            let (member, talk) = (Arc::clone(self), Arc::clone(&talk));
            async move {
                let failure = talk.read(|news| member.hear(&talk, news)).await;
                talk.fail(failure.error);
                let _ = broken.send(failure);
            }
        });
        let end = self.serve_until_end(&talk, &mut ended).await;
        self.tested.store(false, Ordering::Release);
        self.stop_serving();
        *lock(&self.talk) = None;
        let end = match end {
            End::Broken(failure) => End::Broken(how_it_ended(&mut process, failure).await),
            End::AttemptFailed(failure) => End::AttemptFailed(how_it_ended(&mut process, failure).await),
            End::Unwanted => {
                self.let_calls_finish(&talk).await;
                End::Unwanted
            }
            End::Removed => {
                talk.finish();
                if process.wait(END_TIMEOUT).await.is_none() {
                    warn!(member = &*self.name, "the worker process does not end, it is killed");
                }
                End::Removed
            }
        };
        self.usage.look(process.pid());
        process.kill().await;
        self.usage.ended();
        *lock(&self.worker_pid) = None;
        reader.abort();
        talk.fail(HsmError::Worker(WorkerFault::Gone));
        (0..talk.sessions()).for_each(|_| self.observe(Event::SessionClosed));
        match end {
            End::AttemptFailed(failure) => self.attempt_failed(&failure),
            End::Broken(failure) => self.fault(&failure),
            End::Unwanted | End::Removed => {}
        }
    }

    async fn serve_until_end(&self, talk: &Talk, ended: &mut oneshot::Receiver<Failure>) -> End {
        let started = tokio::select! {
            failure = &mut *ended => Err(failure.unwrap_or(HsmError::Worker(WorkerFault::Gone).into())),
            started = self.start_worker(talk) => started,
            () = self.until_removed() => return End::Removed,
        };
        if let Err(failure) = started {
            return End::AttemptFailed(failure);
        }
        // From now on its keys can be managed, also if it lacks some that the tests need.
        *lock(&self.talk) = Some(Arc::clone(talk));
        loop {
            let tested = tokio::select! {
                failure = &mut *ended => Err(failure.unwrap_or(HsmError::Worker(WorkerFault::Gone).into())),
                tested = self.test_all(talk) => tested.map_err(Failure::from),
                () = self.until_removed() => return End::Removed,
            };
            match tested {
                Ok(took) => break self.came_up(took),
                Err(failure) if failure.error == HsmError::NoSuchKey => self.attempt_failed(&failure),
                Err(failure) => return End::AttemptFailed(failure),
            }
            tokio::select! {
                failure = &mut *ended => {
                    return End::Broken(failure.unwrap_or(HsmError::Worker(WorkerFault::Gone).into()));
                }
                due = self.until_attempt_is_due() => if !due { return End::Removed },
            }
        }
        tokio::select! {
            failure = &mut *ended => End::Broken(failure.unwrap_or(HsmError::Worker(WorkerFault::Gone).into())),
            end = self.until_unwanted() => end,
        }
    }

    /// The first call: the worker loads its module, logs in and opens its first session.
    async fn start_worker(&self, talk: &Talk) -> Result<(), Failure> {
        let (pin, may_use_final_try) = {
            let pin = lock(&self.pin);
            (pin.pin.clone(), pin.may_use_final_try)
        };
        let job = Job::start(Start {
            module: self.config.module.clone(),
            token: self.config.token.clone(),
            pin,
            sessions: u32::try_from(self.config.sessions.max(1)).unwrap_or(u32::MAX),
            may_use_final_try,
        })?;
        let limits = Limits { share: START_TIMEOUT, watchdog: START_TIMEOUT };
        let deadline = standstill::now() + START_TIMEOUT;
        match self.exchange(talk, &job, self.hold_directly(), deadline, limits).await {
            Ok(reply) => Ok(reply.result.map(drop)?),
            Err(HsmError::Deadline) => Err(HsmError::Worker(WorkerFault::StartHangs).into()),
            Err(error) => Err(error.into()),
        }
    }

    /// The worker passed the tests.
    fn came_up(&self, took: Duration) {
        self.tested.store(true, Ordering::Release);
        let (again, up) = {
            let mut machine = self.machine();
            (machine.has_been_up(), machine.passed(took, standstill::now()))
        };
        lock(&self.pin).said = PinTries::Full;
        if up {
            if again {
                self.observe(Event::ModuleRenewed);
            }
            self.start_serving();
        }
        self.attempts.send_modify(|(count, last)| (*count, *last) = (*count + 1, None));
    }

    fn attempt_failed(&self, failure: &Failure) {
        if failure.error.refuses_pin() {
            self.refused_pin(failure.error);
        }
        if let HsmError::PinNotTried(tries) = failure.error {
            self.say_pin_not_tried(tries);
        }
        self.machine().attempt_failed(failure, standstill::now());
        self.attempts.send_modify(|(count, last)| (*count, *last) = (*count + 1, Some(failure.clone())));
    }

    fn say_pin_not_tried(&self, tries: PinTries) {
        let news = std::mem::replace(&mut lock(&self.pin).said, tries) != tries;
        if news {
            let (meaning, remedy) = (tries.meaning(), tries.remedy(&self.name));
            error!(member = &*self.name, token = %self.config.token, "THE PIN IS NOT TRIED: {meaning}. {remedy}");
        }
    }

    /// Lets calls at a worker that is to be killed finish until their callers have been sent elsewhere.
    async fn let_calls_finish(&self, talk: &Talk) {
        talk.stop_sending();
        let until = standstill::now() + self.watchdog;
        loop {
            let now = standstill::now();
            talk.look(now);
            if talk.nobody_waits() || now >= until {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// What a worker says beside its replies.
    fn hear(&self, talk: &Talk, news: News<'_>) {
        let places = || self.places.resize(PLACES_FOR_A_SESSION * talk.sessions().max(1));
        match news {
            News::Login => self.observe(Event::Login),
            News::KeySearch => self.observe(Event::KeySearch),
            News::SessionOpened { took, result } => {
                self.book_call(Operation::Open, class(&result), took, Duration::ZERO);
                match result {
                    Ok(()) => {
                        places();
                        self.granted.fetch_max(talk.sessions(), Ordering::AcqRel);
                        self.observe(Event::SessionOpened);
                    }
                    Err(error) if error.refuses_pin() => self.refused_pin(error),
                    Err(error) if error.fault().owner == FaultOwner::Member => {
                        self.failed(error, took, standstill::now());
                    }
                    Err(_) => {}
                }
            }
            News::SessionClosed => {
                places();
                self.observe(Event::SessionClosed);
            }
            News::FewSessions { given } => {
                let before = self.granted.swap(given, Ordering::AcqRel);
                if before != given {
                    warn!(
                        member = &*self.name,
                        sessions = given,
                        wanted = self.config.sessions,
                        "the token gives fewer sessions than wanted, going on with those"
                    );
                }
            }
            News::Replies(jobs) => self.observe(Event::Batch { jobs }),
            News::Note { level, text } => self.note(level, text),
        }
    }

    /// Logs what a worker found out about its token, each thing once.
    fn note(&self, level: Level, text: &str) {
        let mut notes = lock(&self.notes);
        if notes.iter().any(|said| said == text) || notes.len() >= MOST_NOTES {
            return;
        }
        notes.push(text.to_owned());
        let (member, token) = (&*self.name, &self.config.token);
        match level {
            Level::Info => info!(member, %token, "{text}"),
            Level::Warn => warn!(member, %token, "{text}"),
            Level::Error => error!(member, %token, "{text}"),
        }
    }

    /// Begins to leave the cluster: [`live`](Self::live) ends when the worker has.
    pub(crate) fn remove(&self) {
        let news = self.machine().remove();
        if news {
            self.stop_serving();
            self.changed.notify_one();
        }
    }
}

/// How the process ended says more than that its socket closed.
async fn how_it_ended(process: &mut Process, failure: Failure) -> Failure {
    if failure.error != HsmError::Worker(WorkerFault::Gone) {
        return failure;
    }
    let how = process.wait(Duration::from_millis(50)).await;
    how.map_or(failure, |fault| HsmError::Worker(fault).into())
}

/// A panic under any of these locks leaves nothing half-done that would do harm.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
