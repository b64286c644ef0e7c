//! Parts of a member and the transitions of its state.
//!
//! Invariants:
//! - The state changes only in [`Member::change`]. Under the machine's lock, that function also updates [`Member::queue`]
//!   and the balancer's `serving`: the queue exists and `serving` is true exactly while the machine
//!   [serves](Machine::serves).
//! - A member that serves has a worker, and so a `talk`. When the worker is lost, the state changes before any call fails,
//!   so that a caller that picks again finds the member restarting and waits.
//! - There is one worker at a time: the next one starts after the last process was killed and the task that read from it
//!   has ended. The worker's number identifies results that arrive later.
//!
//! Lock order: `machine`, `queue`, `talk`. All other locks are leaves: no lock is taken while one of them is held.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use claviger_process::lock::{lock, unpoisoned};
use tokio::sync::{Notify, watch};

use super::exam_queue::ExamQueue;
use super::gauges::Gauges;
use super::places::{CallQueue, Talk};
use super::process::{Environment, Process, Usage, WorkerProgram};
use super::state::Machine;
use super::usual_cost::UsualCost;
use crate::config::{MemberConfig, Pin};
use crate::error::Failure;
use crate::event::{Event, Observer};
use crate::job::{KnownAnswerTest, Need};
use crate::pin_tries::PinTries;
use crate::policy::breaker;
use crate::policy::credibility::Credibility;
use crate::standstill;

/// Time limit for a worker to load its module, log in and open its first session. It is generous because a network HSM may
/// need seconds for a login.
pub(super) const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Time limit for a worker to end when it is told to. Its calls may take two seconds of it.
pub(super) const END_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for the member's own operations: tests and PIN changes.
pub(super) const OWN_TIMEOUT: Duration = Duration::from_secs(10);
/// Time without a result after which a member that is up is tested: a spare member must work when it is needed.
pub(super) const SILENCE: Duration = Duration::from_secs(10);
/// Time for which a member that lacked a key, or could not use it, is not asked for that again. Replication between HSMs may
/// lag.
pub(super) const LACKS: Duration = Duration::from_secs(2);
/// Maximum number of such lacks that are remembered for a member.
pub(super) const MOST_LACKING: usize = 64;
/// Maximum number of workers' notes that are remembered to avoid repeated log lines.
pub(super) const MOST_NOTES: usize = 32;

#[derive(Debug, Default)]
pub(super) struct Stats {
    pub(super) calls: AtomicU64,
    pub(super) worked: AtomicU64,
    pub(super) spent: AtomicU64,
    pub(super) faults: AtomicU64,
}

/// The PIN, and the state of its tries.
pub(super) struct PinState {
    pub(super) pin: Pin,
    /// Number of PINs set so far. A worker reports which one its token refused.
    pub(super) number: u64,
    /// True if an administrator allows use of the last PIN try.
    pub(super) may_use_final_try: bool,
    /// The state of the PIN's tries that was last logged.
    pub(super) said: PinTries,
}

/// A member of a cluster.
pub(crate) struct Member {
    pub(crate) name: Arc<str>,
    pub(super) config: MemberConfig,
    pub(super) launch: Launch,
    pub(super) hidden: HiddenVariables,
    pub(super) known: Arc<RwLock<Arc<[KnownAnswerTest]>>>,
    pub(super) observer: Observer,
    /// Notified whenever a member of the cluster comes up.
    pub(super) somebody_up: Arc<Notify>,
    pub(super) gauges: Arc<Gauges>,
    pub(super) machine: Mutex<Machine>,
    /// The callers' queue; `None` while the member does not serve.
    pub(super) queue: Mutex<Option<Arc<CallQueue>>>,
    /// The connection to the worker, from the worker's start to its end, even while the member does not serve.
    pub(super) talk: Mutex<Option<Talk>>,
    pub(super) pin: Mutex<PinState>,
    /// Notified on each change of the member's state machine. Only the member's task waits for it, in one place at a time: a
    /// change wakes one waiter.
    pub(super) changed: Notify,
    /// Number of attempts that have begun.
    pub(super) begun: AtomicU64,
    /// Number of attempts that have ended, and the failure of the last one.
    pub(super) attempts: watch::Sender<(u64, Option<Failure>)>,
    pub(super) credibility: Mutex<Credibility>,
    /// Known-answer tests that doubtful results wait for.
    pub(super) exams: ExamQueue,
    /// What the token lacked or could not do, and until when it is not asked for that.
    pub(super) lacking: Mutex<HashMap<Need, Instant>>,
    pub(super) notes: Mutex<Vec<String>>,
    /// Time of the last result, good or bad.
    pub(super) heard: Mutex<Instant>,
    pub(super) stats: Stats,
    pub(super) usage: Usage,
    pub(super) usual_decryption: UsualCost,
    /// Time after which a running call makes the member count as hung.
    pub(super) watchdog: Duration,
    /// Number of sessions that the token granted when it refused another one.
    pub(super) granted: AtomicUsize,
    pub(super) workers: AtomicU64,
    pub(super) worker_pid: Mutex<Option<u32>>,
}

/// Starts a worker for the named member with this environment; returns its process and the daemon's end of its socket.
pub(crate) type Launch = Arc<dyn Fn(&str, Environment<'_>) -> io::Result<(Process, OwnedFd)> + Send + Sync>;

/// Environment variables of the daemon that workers do not inherit.
pub(crate) type HiddenVariables = Arc<RwLock<BTreeSet<String>>>;

/// Returns a function that starts this program as a worker.
pub(crate) fn launch(program: WorkerProgram) -> Launch {
    Arc::new(move |member, environment| {
        Process::start(member, &program, environment)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", program.path.display())))
    })
}

/// Context that all members of a cluster share.
#[derive(Clone)]
pub(crate) struct Surroundings {
    pub(crate) launch: Launch,
    pub(crate) hidden: HiddenVariables,
    pub(crate) breaker: breaker::Settings,
    /// Time after which a running call makes its member count as hung.
    pub(crate) watchdog: Duration,
    pub(crate) known: Arc<RwLock<Arc<[KnownAnswerTest]>>>,
    pub(crate) observer: Observer,
    pub(crate) somebody_up: Arc<Notify>,
}

impl Member {
    /// Creates a member without a worker. It comes up only while [`live`](Self::live) runs.
    pub(crate) fn new(config: MemberConfig, surroundings: &Surroundings) -> Self {
        let now = standstill::now();
        let Surroundings { launch, hidden, breaker, watchdog, known, observer, somebody_up } = surroundings.clone();
        Member {
            name: config.name.as_str().into(),
            gauges: Arc::new(Gauges::new(&config)),
            machine: Mutex::new(Machine::new(&config.name, breaker, now)),
            queue: Mutex::default(),
            talk: Mutex::default(),
            pin: Mutex::new(PinState {
                pin: config.pin.clone(),
                number: 0,
                may_use_final_try: false,
                said: PinTries::Full,
            }),
            changed: Notify::new(),
            begun: AtomicU64::new(0),
            attempts: watch::Sender::new((0, None)),
            credibility: Mutex::default(),
            exams: ExamQueue::default(),
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
            hidden,
            known,
            observer,
            somebody_up,
        }
    }

    pub(super) fn observe(&self, event: Event<'_>) {
        (self.observer)(&self.name, event);
    }

    pub(crate) fn observe_failed_over(&self, to: &str) {
        self.observe(Event::FailedOver { to });
    }

    pub(crate) fn observe_retry(&self) {
        self.observe(Event::Retry);
    }

    pub(super) fn machine(&self) -> MutexGuard<'_, Machine> {
        lock(&self.machine)
    }

    pub(super) fn known(&self) -> Arc<[KnownAnswerTest]> {
        Arc::clone(&*unpoisoned(self.known.read()))
    }

    /// Changes the machine, and updates everything that follows its state.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Machine) -> T) -> T {
        let mut machine = self.machine();
        let result = change(&mut machine);
        let serves = machine.serves();
        let mut queue = lock(&self.queue);
        let (begins, ends) = (serves && queue.is_none(), !serves && queue.is_some());
        if begins {
            *queue = self.talk().and_then(CallQueue::new);
        }
        let ended = queue.take_if(|_| ends);
        self.gauges.serving.store(queue.is_some(), Ordering::Release);
        drop(queue);
        drop(machine);
        if let Some(queue) = ended {
            queue.close();
        }
        if begins {
            self.somebody_up.notify_waiters();
        }
        self.changed.notify_one();
        result
    }

    pub(super) fn queue(&self) -> Option<Arc<CallQueue>> {
        lock(&self.queue).clone()
    }

    pub(super) fn talk(&self) -> Option<Talk> {
        lock(&self.talk).clone()
    }
}
