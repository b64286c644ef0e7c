//! One token as the daemon sees it.
//!
//! A member has a queue: calls wait for a *place*, the right to have one call at the member's worker. There are two places for
//! each session, so that a session finds its next call already in the socket. A call is one send; the task that reads the
//! worker's reports wakes the caller (`calls.rs`). What a reply is worth is decided in `judge.rs`. The member's life is one task
//! (`life.rs`); what changes its state from outside that task is in `control.rs`.
//!
//! Invariants:
//! - The state changes in [`Member::change`] only. There, under the machine's lock, [`Member::service`] and the balancer's
//!   `serving` follow it: both are there exactly while the machine [serves](state::Machine::serves).
//! - A member that serves has a worker, and so a `talk`. When the worker is lost the state changes before any call fails: a
//!   caller that looks for a member again finds it on its way back, and waits.
//! - One worker at a time: the next one starts after the process of the last one was killed and the task that read from it has
//!   ended. Results that come later are told by the worker's number.
//!
//! Lock order: `machine`, `service`, `talk`. All other locks are leaves: none is taken while another one is held.

mod balance;
mod calls;
mod control;
pub(crate) mod conversation;
mod credibility;
mod judge;
mod life;
mod outstanding;
mod process;
mod state;
mod status;
mod usual_cost;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use crate::config::{MemberConfig, Pin};
use crate::error::Failure;
use crate::event::{Event, Observer};
use crate::identity::KeyRef;
use crate::job::KnownAnswerTest;
use crate::pin_tries::PinTries;
use crate::policy::breaker;
use crate::standstill;
use balance::Gauges;
pub(crate) use calls::Outcome;
use calls::{Held, Service};
use conversation::Conversation;
use credibility::Credibility;
pub(crate) use outstanding::Limits;
pub use process::WorkerProgram;
use process::{Process, Usage};
use state::Machine;
pub use state::{LastError, MemberState};
pub use status::MemberStatus;
use usual_cost::UsualCost;

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

#[derive(Debug, Default)]
struct Stats {
    calls: AtomicU64,
    worked: AtomicU64,
    spent: AtomicU64,
    faults: AtomicU64,
}

type Talk = Arc<Conversation<Held>>;

/// The PIN, and what is known about it.
struct PinState {
    pin: Pin,
    /// Counts the PINs that there have been. A worker says which one its token refused.
    number: u64,
    /// An administrator said that the last try of the PIN may be used.
    may_use_final_try: bool,
    /// What the log was last told of the PIN's tries.
    said: PinTries,
}

/// A member of a cluster.
pub(crate) struct Member {
    pub(crate) name: Arc<str>,
    config: MemberConfig,
    launch: Launch,
    known: Arc<RwLock<Arc<[KnownAnswerTest]>>>,
    observer: Observer,
    /// Told whenever any member of the cluster comes up.
    somebody_up: Arc<Notify>,
    gauges: Arc<Gauges>,
    machine: Mutex<Machine>,
    /// For callers, while the member serves.
    service: Mutex<Option<Arc<Service>>>,
    /// The worker from its start to its end, also while the member does not serve.
    talk: Mutex<Option<Talk>>,
    pin: Mutex<PinState>,
    /// Told when the machine has changed. The member's life alone waits for it.
    changed: Notify,
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
    /// How long a call may run before the member counts as hung.
    watchdog: Duration,
    /// Sessions that the token gave when it gave no more.
    granted: AtomicUsize,
    workers: AtomicU64,
    worker_pid: Mutex<Option<u32>>,
}

/// Starts a worker for the member of this name, with these environment variables; its process and the daemon's end of its socket.
pub(crate) type Launch = Arc<dyn Fn(&str, &BTreeMap<String, String>) -> io::Result<(Process, OwnedFd)> + Send + Sync>;

/// Starts workers that run this program.
pub(crate) fn launch(program: WorkerProgram) -> Launch {
    Arc::new(move |member, env| {
        Process::start(member, &program, env)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", program.path.display())))
    })
}

/// What all members of a cluster share.
#[derive(Clone)]
pub(crate) struct Surroundings {
    pub(crate) launch: Launch,
    pub(crate) breaker: breaker::Settings,
    /// How long a call may run before a member counts as hung.
    pub(crate) watchdog: Duration,
    pub(crate) known: Arc<RwLock<Arc<[KnownAnswerTest]>>>,
    pub(crate) observer: Observer,
    pub(crate) somebody_up: Arc<Notify>,
}

impl Member {
    /// A member that has proved nothing yet. [`live`](Self::live) has to run for it to come up.
    pub(crate) fn new(config: MemberConfig, surroundings: &Surroundings) -> Self {
        let now = standstill::now();
        let Surroundings { launch, breaker, watchdog, known, observer, somebody_up } = surroundings.clone();
        Member {
            name: config.name.as_str().into(),
            gauges: Arc::new(Gauges::new(&config)),
            machine: Mutex::new(Machine::new(&config.name, breaker, now)),
            service: Mutex::default(),
            talk: Mutex::default(),
            pin: Mutex::new(PinState {
                pin: config.pin.clone(),
                number: 0,
                may_use_final_try: false,
                said: PinTries::Full,
            }),
            changed: Notify::new(),
            attempts: watch::Sender::new((0, None)),
            credibility: Mutex::default(),
            lacking: Mutex::default(),
            notes: Mutex::default(),
            heard: Mutex::new(now),
            stats: Stats::default(),
            usage: Usage::default(),
            usual_decryption: UsualCost::default(),
            watchdog,
            granted: AtomicUsize::new(config.sessions.max(1)),
            workers: AtomicU64::new(0),
            worker_pid: Mutex::default(),
            config,
            launch,
            known,
            observer,
            somebody_up,
        }
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

    /// Changes the machine, and what follows its state.
    fn change<T>(&self, change: impl FnOnce(&mut Machine) -> T) -> T {
        let mut machine = self.machine();
        let result = change(&mut machine);
        let serves = machine.serves();
        let mut service = lock(&self.service);
        let (begins, ends) = (serves && service.is_none(), !serves && service.is_some());
        if begins {
            *service = self.talk().and_then(Service::new);
        }
        let ended = service.take_if(|_| ends);
        self.gauges.serving.store(service.is_some(), Ordering::Release);
        drop(service);
        drop(machine);
        if let Some(service) = ended {
            service.close();
        }
        if begins {
            self.somebody_up.notify_waiters();
        }
        self.changed.notify_one();
        result
    }

    fn service(&self) -> Option<Arc<Service>> {
        lock(&self.service).clone()
    }

    fn talk(&self) -> Option<Talk> {
        lock(&self.talk).clone()
    }
}

/// A panic under any of these locks leaves nothing half-done that would do harm.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
