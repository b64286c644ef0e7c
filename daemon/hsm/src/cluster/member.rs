//! One token of one module: its queue, its pool of sessions, its login.
//!
//! Calls wait in the member's own bounded queue. Somebody has to get sessions to work at it: a *runner*, a task that takes
//! free sessions out of the pool and hires them, for as long as more waits than they will take. A hired session goes on
//! taking from the queue by itself, so under load nobody but session threads touches it.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use crossbeam::channel::TrySendError;
use cryptoki::error::RvError;
use deadpool::managed::{self, Metrics, Object, Pool, RecycleError};
use tokio::sync::oneshot;
use tracing::warn;

use super::health::{LastError, MemberState};
use super::shared::{Shared, lock};
use crate::config::{MemberConfig, Pin};
use crate::error::HsmError;
use crate::fault::Whose;
use crate::identity::KeyRef;
use crate::module::Module;
use crate::policy::pick::Candidate;
use crate::request::{Answer, KnownGood, Outcome, Request};
use crate::standstill;
use crate::worker::{self, Handle, Look};
use crate::{Event, Observer};

/// How long opening a session may take. Generous: a network HSM may need seconds for a login, and nobody waits for it but
/// probes and those for whom there is no session at all, who are sent elsewhere earlier.
const OPEN_PATIENCE: Duration = Duration::from_secs(30);
/// After how long without a result a member that is up has to prove that it still is: the one that nobody needs now is the one
/// that is needed when others fail.
const SILENCE: Duration = Duration::from_secs(10);
/// How long to wait at the end for calls that are still at the token.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);
/// The same when there are none that anybody waits for, and only sessions are to be closed.
const CLOSE_QUICKLY: Duration = Duration::from_secs(1);

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
    /// Sessions that there can be: fewer than asked for where the token gave fewer.
    pub sessions_limit: usize,
    /// Sessions that are in a call.
    pub sessions_busy: usize,
    /// Threads that were given up in a call that hangs.
    pub sessions_stuck: usize,
    /// How often it was closed for a fault.
    pub closings: u64,
    /// Operations of its token that returned.
    pub calls: u64,
    /// Those of them that failed by its own fault.
    pub faults: u64,
    /// How long its sessions were in operations that returned, together.
    pub worked: Duration,
    /// Processor time of this process within operations of the token: its library's, all of the work where the token is
    /// software in this process.
    pub spent: Duration,
    /// What it was last blamed for, also when it has come up since.
    pub last_error: Option<LastError>,
}

/// A member as the cluster sees it.
pub(crate) struct Member {
    pub(crate) shared: Arc<Shared>,
    pool: Pool<Sessions>,
    runners: AtomicUsize,
    priority: AtomicU32,
    weight: AtomicU32,
}

/// The right to use a session. Dropping it gives the session back to the pool.
pub(crate) type Lease = Object<Sessions>;

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
        match standstill::timeout(OPEN_PATIENCE, opened).await {
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
        let (priority, weight) = (AtomicU32::new(config.priority), AtomicU32::new(config.weight));
        let shared = Arc::new(Shared::new(config, module, known, observer));
        let pool = Pool::builder(Sessions { shared: Arc::clone(&shared) })
            .max_size(shared.max_sessions)
            .build()
            .map_err(|error| HsmError::NoMember(error.to_string()))?;
        Ok(Member { shared, pool, runners: AtomicUsize::new(0), priority, weight })
    }

    /// What [`pick`](crate::policy::pick::pick) compares; `None` when the member cannot take an operation with this key.
    pub(crate) fn candidate(&self, key: Option<&KeyRef>, now: Instant) -> Option<Candidate> {
        let shared = &self.shared;
        let in_flight = shared.in_flight.load(Ordering::Acquire);
        // Only where something runs is it worth a look how long it has run.
        let oldest = if in_flight == 0 { None } else { shared.oldest(now) };
        let health = shared.health();
        let able = health.is_able() && in_flight < shared.max_queue && !key.is_some_and(|key| shared.lacks(key, now));
        able.then(|| Candidate {
            weight: self.weight.load(Ordering::Relaxed),
            latency: health.latency.estimate(now),
            oldest,
            in_flight,
        })
    }

    pub(crate) fn priority(&self) -> u32 {
        self.priority.load(Ordering::Relaxed)
    }

    /// Whether the member would serve if it had the key.
    pub(crate) fn only_lacks(&self, key: &KeyRef, now: Instant) -> bool {
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
            *lock(&shared.progress) = standstill::now();
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
            let lease = match standstill::timeout_at(deadline, self.pool.get()).await {
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
        match standstill::timeout_at(deadline, answer).await {
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
            self.force_open(error);
            // When it was closed before.
            self.shared.turn_away(error);
            return;
        }
        if error.is_code(RvError::SessionCount) {
            self.shared.granted.store(usable, Ordering::Release);
        }
        // The others go on.
        *lock(&self.shared.short_since) = Some(standstill::now());
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
        if self.shared.health().failed(error, took, standstill::now()) {
            self.retire(error);
        }
    }

    /// Closes the member at once.
    pub(crate) fn force_open(&self, error: &HsmError) {
        if self.shared.health().force_open(error, standstill::now()) {
            self.retire(error);
        }
    }

    /// Lets go of everything that a closed member has: what waits goes elsewhere at once, idle sessions close, the others
    /// when their call returns.
    fn retire(&self, error: &HsmError) {
        self.shared.retire(error);
        self.drop_stale_sessions();
    }

    /// Sessions that idle in the pool and are not to be used again close.
    fn drop_stale_sessions(&self) {
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
                    self.force_open(&error);
                }
            }
        }
        shared.health().say_drained(shared.in_flight.load(Ordering::Acquire));
        let unserved = !shared.waiting.1.is_empty() && shared.usable() == 0;
        if unserved && now.saturating_duration_since(*lock(&shared.progress)) >= watchdog {
            self.force_open(&HsmError::Hung { op: "open" });
        }
        // A thread closed the member: it has no pool to clear.
        if self.pool.status().available > 0 && !shared.health().is_up() {
            self.drop_stale_sessions();
        }
    }

    /// Asks for known-good operations on a session of the member.
    pub(crate) async fn probe(self: &Arc<Self>, patience: Patience) -> Result<Duration, HsmError> {
        let deadline = standstill::now() + OPEN_PATIENCE;
        let generation = self.shared.generation();
        let started = standstill::now();
        match self.direct(&Arc::new(Request::Probe), deadline, patience).await {
            Ok(_) => Ok(standstill::since(started)),
            Err(error) => {
                // Who cannot do this much cannot serve, whatever it looked like.
                if generation == self.shared.generation() && self.shared.health().is_up() && error.condemns() {
                    self.force_open(&error);
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
        self.shared.health().probed(result.as_ref().map(drop), took, standstill::now());
        if result.is_err() {
            // The sessions of a failed probe prove nothing, and hold the module.
            self.shared.end_generation();
            self.drop_stale_sessions();
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
            self.force_open(error);
        }
    }

    pub(crate) fn wants_module(&self) -> bool {
        self.shared.wants_module.load(Ordering::Acquire)
    }

    /// The module cannot be initialised again, which this member wants, because others serve with it.
    pub(crate) fn module_in_use(&self, by: &str) {
        if self.shared.token_missing.load(Ordering::Acquire) {
            self.shared.health().module_in_use(by);
        }
    }

    /// Closes the session that holds the login, before its module is finalised. Blocks.
    pub(crate) fn forget_login(&self) {
        self.shared.forget_login();
    }

    /// The module is as new.
    pub(crate) fn module_renewed(&self) {
        self.shared.wants_module.store(false, Ordering::Release);
        self.shared.health().module_renewed(standstill::now());
        self.shared.observe(Event::ModuleRenewed);
    }

    /// It cannot be initialised now. The next probe will fail for it, and ask again.
    pub(crate) fn module_not_renewed(&self, error: &HsmError) {
        self.shared.wants_module.store(false, Ordering::Release);
        self.shared.health().module_failed(error);
    }

    /// Takes a PIN, and lets it be tried if the last one was refused and was another: the same one again would be one step
    /// nearer to a locked token each time that the log is rotated.
    pub(crate) fn set_pin(&self, pin: Pin) {
        let other = {
            let mut held = lock(&self.shared.pin);
            let other = !held.is(&pin);
            *held = pin;
            other
        };
        if other {
            self.allow_pin();
        }
    }

    /// Lets a PIN that was refused be tried, once.
    pub(crate) fn allow_pin(&self) {
        self.shared.health().allow_pin(standstill::now());
    }

    pub(crate) fn rank(&self, priority: u32, weight: u32) {
        self.priority.store(priority, Ordering::Relaxed);
        self.weight.store(weight, Ordering::Relaxed);
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
            priority: self.priority.load(Ordering::Relaxed),
            weight: self.weight.load(Ordering::Relaxed),
            latency: health.latency.estimate(standstill::now()),
            in_flight,
            waiting: shared.waiting.1.len(),
            sessions_open: shared.open.load(Ordering::Acquire),
            sessions_wanted: shared.max_sessions,
            sessions_limit: shared.granted.load(Ordering::Acquire).min(shared.max_sessions),
            sessions_busy: busy.saturating_sub(stuck),
            sessions_stuck: stuck,
            closings: health.closings(),
            calls: shared.calls.load(Ordering::Relaxed),
            faults: shared.faults.load(Ordering::Relaxed),
            worked: Duration::from_nanos(shared.worked.load(Ordering::Relaxed)),
            spent: Duration::from_nanos(shared.spent.load(Ordering::Relaxed)),
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
        let begun = standstill::now();
        while shared.live_threads.load(Ordering::Acquire) > 0 {
            let awaited = was_up && shared.desks().iter().any(|desk| desk.busy_since().is_some());
            if standstill::since(begun) >= if awaited { CLOSE_PATIENCE } else { CLOSE_QUICKLY } {
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
                shared.forget_login();
            }
            shared.module.release();
            let _ = tell.send(());
        });
        if closing.is_err() || !matches!(standstill::timeout(CLOSE_PATIENCE, told).await, Ok(Ok(()))) {
            warn!(member = self.shared.name, "closing failed");
        }
    }
}
