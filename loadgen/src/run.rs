//! Sends each request when it is due, independent of the server's replies.
//!
//! A separate thread keeps the time and does nothing else. Each due request becomes a task of the runtime. For each
//! task, the delay until it sends its request is measured. If this program was late, the run says nothing about the
//! server, and is invalid.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use claviger_client::retry::pause;
use claviger_process::clock::since_1970;
use claviger_process::lock::lock;
use claviger_protocol::batch::parse_results;
use claviger_protocol::payload::ApiVersion;
use claviger_protocol::request::RollResponse;

use crate::Failure;
use crate::cpu;
use crate::host::{self, Host};
use crate::http::{self, Client, ClientError, lack_text};
use crate::interrupt::Interrupt;
use crate::prepare::{Machine, World};
use crate::profile::{Arrivals, Profile};
use crate::record::record;
use crate::tally::{Codes, Event, Tally, WRONG_REPLY};
use crate::threshold::Threshold;
use crate::verify::{Checker, Job, Reply, Verify};

/// Interval at which the lateness of the runtime is measured in a run without a schedule.
const HEARTBEAT: Duration = Duration::from_millis(5);
/// Time for which a machine of a storm repeats its request, from when it was due.
const PATIENCE: Duration = Duration::from_secs(120);
/// Pause of a closed-loop caller that found no free file or port.
const LACK_PAUSE: Duration = Duration::from_millis(10);
/// Longest sleep of the pacing thread. It bounds the delay until the thread notices an interruption.
const NAP: Duration = Duration::from_millis(50);
/// If this program uses more than this share of all processors, it may itself have been too slow.
const STARVED: f64 = 0.9;

/// The rule that decides when a request starts.
#[derive(Clone, Debug)]
pub enum Mode {
    /// An open loop: a schedule decides.
    Open(Profile),
    /// A closed loop: each caller sends its next request when it has the reply to the previous one.
    Closed {
        /// Number of callers.
        callers: usize,
        /// Duration of the load.
        duration: Duration,
    },
}

impl Mode {
    /// Duration of the load.
    #[must_use]
    pub fn duration(&self) -> Duration {
        match self {
            Self::Open(profile) => profile.duration(),
            Self::Closed { duration, .. } => *duration,
        }
    }

    /// `true` if the rate is constant for the whole run.
    #[must_use]
    pub(crate) fn is_constant(&self) -> bool {
        match self {
            Self::Open(Profile::Rates(segments)) => {
                segments.iter().all(|segment| segment.from == segment.to && segment.from == segments[0].from)
            }
            _ => false,
        }
    }

    /// `true` for a boot storm.
    #[must_use]
    pub(crate) fn is_storm(&self) -> bool {
        matches!(self, Self::Open(Profile::Storm { .. }))
    }
}

/// The settings of the load.
#[derive(Clone, Debug)]
pub struct Load {
    /// The rule that decides when requests start.
    pub mode: Mode,
    /// Arrivals at a rate: even or random.
    pub arrivals: Arrivals,
    /// Duration of the load before the measured time.
    pub warmup: Duration,
    /// Largest number of requests in flight.
    pub in_flight: usize,
    /// Releases in one request; `None` for requests of one release each.
    pub batch: Option<usize>,
    /// The version of the interface for requests of one release.
    pub api: ApiVersion,
    /// `true` if the egress protector of each release is used for the machine's next release.
    pub roll: bool,
    /// The selection of replies to check.
    pub verify: Verify,
    /// The bound of this program's own lag, at its 99th percentile.
    pub max_lag: Duration,
    /// An artificial delay of this program, to test that the lag is noticed.
    pub handicap: Duration,
    /// `true` to show the progress.
    pub show: bool,
    /// Conditions that end the run when one of them fails.
    pub stop: Vec<Threshold>,
}

/// The results of a run.
pub struct Outcome {
    /// The counters of the run.
    pub tally: Tally,
    /// Duration of the load, up to an interruption.
    pub duration: Duration,
    /// `true` if the run was interrupted.
    pub interrupted: bool,
    /// The condition that ended the run early, and the measured value.
    pub stopped: Option<String>,
    /// Number of processors that this program used.
    pub processors: f64,
    /// The reasons why the run says nothing about the server; empty if it is valid.
    pub invalid: Vec<String>,
    /// Start of the measured time, in seconds since 1970.
    pub began: u64,
}

/// The virtual machines, and the next one to request.
enum Source {
    /// The machines take turns. A machine may be requested again before its reply has arrived.
    Turn(Vec<Machine>, AtomicUsize),
    /// One release at a time for each machine, because each release makes the protector for the next one. Holds the
    /// free machines, and all machines.
    Roll(Mutex<VecDeque<usize>>, Vec<Mutex<Machine>>),
}

impl Source {
    fn take(&self, count: usize) -> Option<Vec<(usize, Machine)>> {
        match self {
            Self::Turn(machines, next) => {
                let first = next.fetch_add(count, Ordering::Relaxed);
                Some((first..first + count).map(|at| (at, machines[at % machines.len()].clone())).collect())
            }
            Self::Roll(free, machines) => {
                let mut free = lock(free);
                if free.len() < count {
                    return None;
                }
                let taken: Vec<usize> = free.drain(..count).collect();
                Some(taken.into_iter().map(|at| (at, lock(&machines[at]).clone())).collect())
            }
        }
    }

    /// Marks the machine as free, and stores its new protector if there is one.
    fn give_back(&self, at: usize, egress: Option<Vec<u8>>) {
        if let Self::Roll(free, machines) = self {
            if let Some(egress) = egress {
                *lock(&machines[at]) = Machine { protector: Arc::new(egress), key: None };
            }
            lock(free).push_back(at);
        }
    }
}

/// State that all tasks share. When the last task drops it, the channel closes and the counting ends.
struct Engine {
    client: Arc<Client>,
    hosts: Arc<[Host]>,
    next_host: AtomicUsize,
    source: Source,
    load: Load,
    in_flight: AtomicUsize,
    checker: Checker,
    events: Sender<Event>,
    interrupt: Interrupt,
    /// Start of the measured time.
    zero: Instant,
}

/// Makes load with the prepared hosts and machines, until the load is complete or interrupted.
///
/// # Errors
/// The system has no threads left, or the run was interrupted before the measured time.
pub async fn run(client: Arc<Client>, world: &World, load: Load, interrupt: &Interrupt) -> Result<Outcome, Failure> {
    let (events, received) = mpsc::channel();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(2));
    let checker = Checker::start(load.verify, threads, &world.guardian, &events)?;
    let (show, duration) = (load.show, load.mode.duration());
    let counting = std::thread::Builder::new().name("counting".to_owned());
    let (stop, stopping) = (load.stop.clone(), interrupt.clone());
    let counting = counting.spawn(move || record(&received, duration, show, &stop, &stopping))?;
    let machines = world.machines.clone();
    let source = if load.roll {
        Source::Roll(Mutex::new((0..machines.len()).collect()), machines.into_iter().map(Mutex::new).collect())
    } else {
        Source::Turn(machines, AtomicUsize::new(0))
    };
    // A short delay lets every thread start before the first request.
    let first = Instant::now() + Duration::from_millis(20);
    let warmup = if load.mode.is_storm() { Duration::ZERO } else { load.warmup };
    let zero = first + warmup;
    let (mode, max_lag) = (load.mode.clone(), load.max_lag);
    let engine = Arc::new(Engine {
        client,
        hosts: world.hosts.clone(),
        next_host: AtomicUsize::new(0),
        source,
        load,
        in_flight: AtomicUsize::new(0),
        checker,
        events,
        interrupt: interrupt.clone(),
        zero,
    });
    let interrupted = interrupt.clone();
    let meter = tokio::spawn(async move {
        tokio::select! { () = tokio::time::sleep_until(zero.into()) => {}, _ = interrupted.wait() => {} }
        let (before, began) = (cpu::seconds(None), since_1970().as_secs());
        tokio::select! { () = tokio::time::sleep(duration) => {}, _ = interrupted.wait() => {} }
        // If the system does not report processor time, only the lag decides.
        (cpu::seconds(None).zip(before).map_or(0.0, |(after, before)| after - before), began)
    });
    match mode {
        Mode::Open(profile) => {
            let (batch, arrivals) = (engine.load.batch.unwrap_or(1), engine.load.arrivals);
            let warm = Profile::constant(warmup, profile.first_rate());
            let warm = (!warmup.is_zero()).then(|| warm.starts(batch, arrivals)).into_iter().flatten();
            let due = warm.map(move |at| first + at).chain(profile.starts(batch, arrivals).map(move |at| zero + at));
            let runtime = tokio::runtime::Handle::current();
            let pacing = std::thread::Builder::new().name("pacing".to_owned());
            let pacing =
                pacing.spawn(move || due.take_while(|due| start_at(&engine, &runtime, *due)).for_each(drop))?;
            tokio::task::spawn_blocking(move || pacing.join()).await?.map_err(|_| "the pacing thread panicked")?;
        }
        Mode::Closed { callers, duration } => {
            let until = zero + duration;
            tokio::spawn(heartbeat(zero, until, engine.events.clone(), interrupt.clone()));
            for _ in 0..callers {
                tokio::spawn(call_until(engine.clone(), first, until));
            }
            drop(engine);
        }
    }
    let tally =
        tokio::task::spawn_blocking(move || counting.join()).await?.map_err(|_| "the counting thread panicked")?;
    let (cpu, began) = meter.await?;
    let ran = interrupt.since().map(|at| at.into_std().saturating_duration_since(zero)).filter(|ran| *ran < duration);
    if ran.is_some_and(|ran| ran.is_zero()) {
        return Err("interrupted before anything was measured".into());
    }
    let stopped = ran.and_then(|_| interrupt.reason()).map(str::to_owned);
    let (interrupted, duration) = (ran.is_some() && stopped.is_none(), ran.unwrap_or(duration));
    let processors = cpu / duration.as_secs_f64();
    let mut invalid = Vec::new();
    let lag = tally.lag.value_at_quantile(0.99) as f64 / 1e6;
    if lag > max_lag.as_secs_f64() {
        let (lag, bound) = (lag * 1e3, max_lag.as_secs_f64() * 1e3);
        invalid.push(format!(
            "the load generator fell behind: 1 % of its own starts were {lag:.1} ms late or more, and {bound:.1} ms is the bound; \
             ask for less, or give it more processors"
        ));
    }
    for (lack, releases) in &tally.lacks {
        invalid.push(format!("{releases} releases were not asked for: {}", lack_text(*lack)));
    }
    let all = std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64);
    if processors > STARVED * all {
        invalid.push(format!(
            "the load generator used {processors:.1} of {all} processors and could hardly have done more"
        ));
    }
    Ok(Outcome { tally, duration, interrupted, stopped, processors, invalid, began })
}

/// Waits until `due` and starts a request. Returns `false` if the run was interrupted first.
fn start_at(engine: &Arc<Engine>, runtime: &tokio::runtime::Handle, due: Instant) -> bool {
    loop {
        if engine.interrupt.since().is_some() {
            return false;
        }
        match due.checked_duration_since(Instant::now()) {
            Some(rest) if !rest.is_zero() => std::thread::sleep(rest.min(NAP)),
            _ => break,
        }
    }
    if !engine.load.handicap.is_zero() {
        std::thread::sleep(engine.load.handicap);
    }
    let batch = engine.load.batch.unwrap_or(1);
    let room = engine.in_flight.load(Ordering::Relaxed) < engine.load.in_flight;
    match room.then(|| engine.source.take(batch)).flatten() {
        Some(machines) => {
            engine.in_flight.fetch_add(1, Ordering::Relaxed);
            let engine = engine.clone();
            runtime.spawn(async move {
                engine.release(due, machines).await;
                engine.in_flight.fetch_sub(1, Ordering::Relaxed);
            });
        }
        None => {
            let lag = due.elapsed().as_secs_f64();
            let due = engine.seconds(due);
            let _ = engine.events.send(Event::Dropped { due, lag, releases: batch as u64, lack: None });
        }
    }
    true
}

/// One caller of a closed loop.
async fn call_until(engine: Arc<Engine>, first: Instant, until: Instant) {
    tokio::time::sleep_until(first.into()).await;
    while Instant::now() < until && engine.interrupt.since().is_none() {
        if !engine.load.handicap.is_zero() {
            std::thread::sleep(engine.load.handicap);
        }
        match engine.source.take(engine.load.batch.unwrap_or(1)) {
            Some(machines) => engine.release(Instant::now(), machines).await,
            None => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}

/// Measures the lateness of the runtime with periodic wake-ups, because a closed loop has no schedule that it could be
/// late for.
async fn heartbeat(zero: Instant, until: Instant, events: Sender<Event>, interrupt: Interrupt) {
    let mut due = zero;
    while due < until {
        tokio::select! { () = tokio::time::sleep_until(due.into()) => {}, _ = interrupt.wait() => return }
        let lag = due.elapsed().as_secs_f64();
        let _ = events.send(Event::Lag { due: due.duration_since(zero).as_secs_f64(), lag });
        due = (due + HEARTBEAT).max(Instant::now());
    }
}

/// The result of an exchange.
struct Answer {
    released: u64,
    errors: Codes,
}

impl Engine {
    /// Seconds from the start of the measured time; negative before it.
    fn seconds(&self, at: Instant) -> f64 {
        match at.checked_duration_since(self.zero) {
            Some(after) => after.as_secs_f64(),
            None => -(self.zero - at).as_secs_f64(),
        }
    }

    async fn release(&self, due: Instant, machines: Vec<(usize, Machine)>) {
        let host = &self.hosts[self.next_host.fetch_add(1, Ordering::Relaxed) % self.hosts.len()];
        let protectors: Vec<_> = machines.iter().map(|(_, machine)| machine.protector.clone()).collect();
        let (path, body) = host.request(self.load.api, self.load.batch.is_some(), &protectors);
        let mut begun = Instant::now();
        let lag = begun.saturating_duration_since(due).as_secs_f64();
        let (mut retries, mut refusals) = (Codes::new(), 0);
        let (reply, ended) = loop {
            let asked = self.client.post(&path, "application/xml", body.clone());
            let reply = tokio::select! { reply = asked => reply, () = self.interrupt.abandon() => return self.abandon(machines) };
            let ended = Instant::now();
            match &reply {
                Ok(reply)
                    if self.load.mode.is_storm()
                        && matches!(reply.status.as_u16(), 429 | 503)
                        && ended.duration_since(due) < PATIENCE =>
                {
                    retries.push((host::error_code(reply).into(), 1));
                    // A machine that waits is not in flight. It comes again as claviger's own client does.
                    self.in_flight.fetch_sub(1, Ordering::Relaxed);
                    let asked = reply.retry_after().map(|seconds| Duration::from_secs(seconds.into()));
                    let rest = tokio::time::sleep(pause(asked, refusals, fastrand::f64()));
                    refusals += 1;
                    let go_on = tokio::select! { () = rest => true, _ = self.interrupt.wait() => false };
                    self.in_flight.fetch_add(1, Ordering::Relaxed);
                    if !go_on {
                        return self.abandon(machines);
                    }
                    begun = Instant::now();
                }
                _ => break (reply, ended),
            }
        };
        let service = ended.duration_since(begun).as_secs_f64();
        let latency = ended.duration_since(due).as_secs_f64();
        let due = self.seconds(due);
        if let Some(lack) = reply.as_ref().err().and_then(ClientError::lack) {
            let releases = machines.len() as u64;
            machines.iter().for_each(|(at, _)| self.source.give_back(*at, None));
            let _ = self.events.send(Event::Dropped { due, lag, releases, lack: Some(lack) });
            if let Mode::Closed { .. } = self.load.mode {
                // Files and ports become free when other requests end. Without a pause, the caller would only use
                // processor time.
                tokio::time::sleep(LACK_PAUSE).await;
            }
            return;
        }
        let Answer { released, errors } = self.answer(due, host, machines, reply).await;
        let _ = self.events.send(Event::Done { due, lag, service, latency, released, errors, retries });
    }

    /// Drops the reply of a request that was in flight when the run was interrupted.
    fn abandon(&self, machines: Vec<(usize, Machine)>) {
        let _ = self.events.send(Event::Abandoned { releases: machines.len() as u64 });
    }

    /// Evaluates the reply. The time has already been taken, and slow checks run on other threads.
    async fn answer(
        &self,
        due: f64,
        host: &Host,
        machines: Vec<(usize, Machine)>,
        reply: Result<http::Reply, ClientError>,
    ) -> Answer {
        let all_failed = |code: Cow<'static, str>| {
            machines.iter().for_each(|(at, _)| self.source.give_back(*at, None));
            Answer { released: 0, errors: vec![(code, machines.len() as u64)] }
        };
        let body = match reply {
            Ok(reply) if reply.status == 200 => reply.body,
            Ok(reply) => return all_failed(host::error_code(&reply).into()),
            Err(error) => return all_failed(http::error_code(&error).into()),
        };
        let check = |machine: Machine, reply: Reply| {
            if self.checker.draws() {
                self.checker.check(Job { due, machine, identity: host.identity.clone(), reply });
            }
        };
        let batch = self.load.batch.is_some();
        if !batch && !self.load.roll {
            machines.into_iter().for_each(|(_, machine)| check(machine, Reply::Body(body.clone())));
            return Answer { released: 1, errors: Codes::new() };
        }
        let read = tokio::task::spawn_blocking(move || {
            if batch { parse_results(&body).ok() } else { Some(vec![Ok(RollResponse::parse(&body).ok()?)]) }
        });
        let results = read.await.ok().flatten().filter(|results| results.len() == machines.len());
        let Some(results) = results else { return all_failed(WRONG_REPLY.into()) };
        let mut answer = Answer { released: 0, errors: Codes::new() };
        for ((at, machine), result) in machines.into_iter().zip(results) {
            match result {
                Ok(response) => {
                    answer.released += 1;
                    self.source.give_back(at, Some(response.egress_protector.clone()));
                    check(machine, Reply::Read(Box::new(response)));
                }
                Err(refusal) => {
                    self.source.give_back(at, None);
                    answer.errors.push((refusal.code.as_str().into(), 1));
                }
            }
        }
        answer
    }
}
