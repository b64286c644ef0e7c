//! A cluster in simulated time: the daemon's own policies ([`Failover`], [`pick`](super::pick::pick), [`Breaker`],
//! [`Budget`]) applied to members that a few numbers describe. Used in tests of the policies and for capacity plans. It has
//! no clock and no threads, and its random numbers are seeded: the same input gives the same result.
//!
//! A request arrives, waits until it may run, gets time on a processor of the daemon, and submits its operations, all at
//! once. Each operation goes to the picked member and waits there, first come first served, until a session takes it. The
//! session sends it, which takes half a round trip; the HSM computes it as soon as an engine is free; half a round trip
//! later the result is back. A member gets a new worker if it hangs, if its worker is killed, or if it fails too often; the
//! new worker must pass a probe.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use super::breaker::{self, Breaker};
use super::budget::{self, Budget};
use super::failover::{Failover, GaveUp, Reply, Standing, Step};
use super::pick::{Candidate, Latency, Tiers};

/// Period in which the supervisor checks for late calls, due probes, and operations that have waited long enough.
const TICK: Duration = Duration::from_millis(20);
/// Time of an operation that fails at a member, beside the round trip.
const FAILING_TAKES: Duration = Duration::from_micros(50);
/// Pause of a closed-loop caller after a request that failed.
const PAUSE: Duration = Duration::from_millis(1);
/// Estimated time of an operation before a member has done any.
const FIRST_GUESS: Duration = Duration::from_millis(1);
/// Weight of one request in the mean run time of requests, and in the deviation from the mean; and the number of deviations
/// above the mean that nearly no request exceeds. The values are those of the daemon's admission.
const RUN_GAIN: f64 = 1.0 / 16.0;
const DEVIATION_GAIN: f64 = 1.0 / 8.0;
const DEVIATIONS: f64 = 4.0;

/// SplitMix64: small, seeded, and good enough for this simulation.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Returns a number from 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Returns a number from 0 to below `n`, which must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// Arrival of requests.
#[derive(Clone, Copy, Debug)]
pub enum Load {
    /// This many requests per second at random times, independent of their results.
    Open(f64),
    /// This many callers; each makes its next request as soon as it has its reply.
    Closed(usize),
    /// The caller hands in each request with [`Simulation::submit`], and takes its end out of
    /// [`Simulation::ended`](field@Simulation::ended).
    Handed,
}

/// Settings of the daemon.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Arrival of requests.
    pub load: Load,
    /// Maximum number of requests that run at a time; the others wait, first come first served.
    pub concurrency: usize,
    /// Maximum number of requests that wait. Further requests fail at once.
    pub queue: usize,
    /// Number of operations of a request, all submitted at the same time.
    pub operations: u32,
    /// Processor time of a request before its operations.
    pub own_cost: Duration,
    /// Number of processors of the daemon.
    pub processors: usize,
    /// Time limit of a request.
    pub deadline: Duration,
    /// Time limit of a call, after which its member counts as hung.
    pub watchdog: Duration,
}

impl Settings {
    /// Requests with one operation and without processor time. Any number of them run at a time.
    #[must_use]
    pub fn new(load: Load) -> Self {
        let seconds = Duration::from_secs;
        Settings {
            load,
            concurrency: usize::MAX,
            queue: usize::MAX,
            operations: 1,
            own_cost: Duration::ZERO,
            processors: 1,
            deadline: seconds(5),
            watchdog: seconds(2),
        }
    }
}

/// Configuration and hardware of a member.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Priority; the smallest serves first.
    pub priority: u32,
    /// Share of the load within a priority.
    pub weight: u32,
    /// Maximum number of operations under way at a time.
    pub sessions: usize,
    /// Maximum number of operations that wait or run.
    pub queue: usize,
    /// Number of operations that the HSM computes at a time.
    pub engines: usize,
    /// Network round trip time.
    pub rtt: Duration,
    /// Initial behaviour.
    pub behaviour: Behaviour,
}

impl Default for Spec {
    fn default() -> Self {
        Spec {
            priority: 0,
            weight: 1,
            sessions: 8,
            queue: 4_096,
            engines: usize::MAX,
            rtt: Duration::ZERO,
            behaviour: Behaviour::default(),
        }
    }
}

/// Current behaviour of a member. The policies do not see it.
#[derive(Clone, Copy, Debug)]
pub struct Behaviour {
    /// Time of an operation at an engine, ± 20 %.
    pub service: Duration,
    /// One operation in this number takes `slow` instead; 0 for none.
    pub slow_one_in: usize,
    /// Time of a slow operation.
    pub slow: Duration,
    /// One operation in this number fails; 0 for none.
    pub fails_one_in: usize,
}

impl Default for Behaviour {
    fn default() -> Self {
        let ms = Duration::from_millis(1);
        Behaviour { service: ms, slow_one_in: 0, slow: ms, fails_one_in: 0 }
    }
}

impl Behaviour {
    fn fails(&self, rng: &mut Rng) -> bool {
        self.fails_one_in > 0 && rng.below(self.fails_one_in) == 0
    }

    fn takes(&self, rng: &mut Rng) -> Duration {
        let slow = self.slow_one_in > 0 && rng.below(self.slow_one_in) == 0;
        let time = if slow { self.slow } else { self.service };
        time.mul_f64(0.8 + 0.4 * rng.unit())
    }
}

/// Nanoseconds since the start.
type Nanos = u64;

fn nanos(time: Duration) -> Nanos {
    time.as_nanos() as Nanos
}

/// A member, and counts of its operations since [`Simulation::forget`].
#[derive(Debug)]
pub struct Member {
    spec: Spec,
    /// Current behaviour; change it to break or repair the member.
    pub behaviour: Behaviour,
    breaker: Breaker,
    latency: Latency,
    waiting: VecDeque<Operation>,
    sessions: Vec<Option<Call>>,
    /// Sessions whose operation has reached the HSM and waits for an engine.
    at_engine: VecDeque<usize>,
    engines_free: usize,
    /// Number of the current worker: events of earlier workers are ignored.
    worker: u64,
    /// Time at which a new worker is ready for its probe.
    ready_at: Nanos,
    /// True if a call hangs. The worker is killed once no other call is still in time.
    hung: bool,
    idle_since: Nanos,
    /// Number of operations submitted to the member; probes do not count.
    pub calls: u64,
    /// Number of operations that failed at the member.
    pub failures: u64,
    /// Number of probes that began.
    pub probes: u64,
    /// Longest time without an operation that ended with a new operation.
    pub longest_idle: Duration,
    /// Maximum number of operations that waited or ran.
    pub most_in_flight: usize,
    /// Total busy time of its engines.
    pub engines_busy: Duration,
    /// Total busy time of its sessions.
    pub sessions_busy: Duration,
}

/// An operation in a session.
#[derive(Debug)]
struct Call {
    since: Nanos,
    good: bool,
    /// `None` once its caller was sent to another member.
    operation: Option<Operation>,
}

#[derive(Debug)]
struct Operation {
    request: usize,
    failover: Failover<()>,
    /// Time of submission to the member. The next field is the breaker's number of openings at that time.
    submitted: Nanos,
    openings: u64,
    /// Time limit of the operation in a session.
    share: Duration,
}

#[derive(Debug)]
struct Request {
    arrived: Nanos,
    /// Time at which the request started to run.
    began: Nanos,
    /// Number of operations without a result.
    left: u32,
    failed: bool,
}

/// A call in a session, or a probe, of one worker of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct At {
    member: usize,
    worker: u64,
    session: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrives,
    /// A processor has finished with a request.
    Processed(usize),
    /// A session's operation reaches the HSM.
    Reaches(At),
    /// An engine has computed it.
    Computed(At),
    /// The session has received the reply.
    Replied(At),
    ProbeEnds {
        at: At,
        began: Nanos,
        good: bool,
    },
    Tick,
}

/// A cluster, its load, and the results since [`forget`](Simulation::forget).
#[derive(Debug)]
pub struct Simulation {
    settings: Settings,
    start: Instant,
    now: Nanos,
    events: BinaryHeap<Reverse<(Nanos, u64, Event)>>,
    /// Number of events so far; orders events of the same instant.
    pub steps: u64,
    rng: Rng,
    /// The members.
    pub members: Vec<Member>,
    tiers: Tiers,
    budget: Budget,
    requests: Vec<Request>,
    /// Requests that wait to run.
    for_turn: VecDeque<usize>,
    running: usize,
    /// True while waiting requests are started: prevents nested calls by requests that fail at once.
    taking_turns: bool,
    /// Mean run time of requests, and mean deviation from it, in seconds.
    run_time: (f64, f64),
    for_processor: VecDeque<usize>,
    processors_free: usize,
    /// Operations that wait for a member to come up.
    parked: Vec<Operation>,
    arriving: bool,
    counted_from: Nanos,
    /// Latencies of the requests that arrived since `forget` and succeeded in time.
    pub latencies: Vec<Duration>,
    /// Number of requests that arrived since `forget` and failed.
    pub lost: u64,
    /// Number of requests that succeeded since `forget`, whenever they arrived.
    pub succeeded: u64,
    /// Total busy time of processors.
    pub processors_busy: Duration,
    /// With [`Load::Handed`]: the requests that ended, in this order, and whether each succeeded. The caller takes them out.
    pub ended: Vec<(usize, bool)>,
}

impl Simulation {
    /// Creates a cluster in which all members are up. Requests start at once.
    #[must_use]
    pub fn new(seed: u64, settings: Settings, specs: &[Spec]) -> Self {
        let priorities: Vec<_> = specs.iter().map(|spec| spec.priority).collect();
        let mut simulation = Simulation {
            settings,
            start: Instant::now(),
            now: 0,
            events: BinaryHeap::new(),
            steps: 0,
            rng: Rng(seed),
            members: specs.iter().map(Member::new).collect(),
            tiers: Tiers::new(&priorities),
            budget: Budget::new(budget::Settings::default()),
            requests: Vec::new(),
            for_turn: VecDeque::new(),
            running: 0,
            taking_turns: false,
            run_time: (0.0, 0.0),
            for_processor: VecDeque::new(),
            processors_free: settings.processors,
            parked: Vec::new(),
            arriving: true,
            counted_from: 0,
            latencies: Vec::new(),
            lost: 0,
            succeeded: 0,
            processors_busy: Duration::ZERO,
            ended: Vec::new(),
        };
        let arrivals = match settings.load {
            Load::Open(_) => 1,
            Load::Closed(callers) => callers,
            Load::Handed => 0,
        };
        for _ in 0..arrivals {
            simulation.after(Duration::ZERO, Event::Arrives);
        }
        simulation.after(TICK, Event::Tick);
        simulation
    }

    /// Advances the simulated time.
    pub fn run(&mut self, time: Duration) {
        let end = self.now + nanos(time);
        while self.events.peek().is_some_and(|Reverse((at, ..))| *at <= end) {
            let Some(Reverse((at, _, event))) = self.events.pop() else { break };
            self.now = at;
            self.handle(event);
        }
        self.now = end;
        for member in &mut self.members {
            member.note_idle(end);
        }
    }

    /// Hands in a request now, and returns its number.
    pub fn submit(&mut self) -> usize {
        let number = self.requests.len();
        self.arrives();
        number
    }

    /// Returns the time of the next event. The caller of [`Simulation::submit`] lets no more time pass at once.
    #[must_use]
    pub fn next_at(&self) -> Instant {
        let at = self.events.peek().map_or(self.now, |Reverse((at, ..))| *at);
        self.start + Duration::from_nanos(at)
    }

    /// Resets all counts. Requests that arrived earlier are not counted any more.
    pub fn forget(&mut self) {
        self.counted_from = self.now;
        self.latencies.clear();
        (self.lost, self.succeeded, self.processors_busy) = (0, 0, Duration::ZERO);
        for member in &mut self.members {
            (member.calls, member.failures, member.probes, member.most_in_flight) = (0, 0, 0, 0);
            (member.idle_since, member.longest_idle) = (self.now, Duration::ZERO);
            (member.engines_busy, member.sessions_busy) = (Duration::ZERO, Duration::ZERO);
        }
    }

    /// Ends the load, and runs the pending requests until their deadlines. Requests that need longer are lost.
    pub fn finish(&mut self) {
        self.arriving = false;
        self.run(self.settings.deadline + TICK);
        let open = |request: &&Request| request.left > 0 && !request.failed && request.arrived >= self.counted_from;
        self.lost += self.requests.iter().filter(open).count() as u64;
    }

    /// Kills a member's worker. The next worker is ready for its probe after `restart`.
    pub fn kill(&mut self, member: usize, restart: Duration) {
        let (now, jitter) = (self.time(), self.rng.unit());
        self.members[member].breaker.force_open(now, jitter);
        self.renew_worker(member, restart);
    }

    /// Returns a member's share of all submitted operations.
    #[must_use]
    pub fn share(&self, member: usize) -> f64 {
        self.members[member].calls as f64 / self.members.iter().map(|member| member.calls).sum::<u64>() as f64
    }

    /// Returns the number of requests that succeeded.
    #[must_use]
    pub fn done(&self) -> usize {
        self.latencies.len()
    }

    /// Returns the mean time from arrival to reply.
    #[must_use]
    pub fn mean(&self) -> Duration {
        self.latencies.iter().sum::<Duration>() / self.done().max(1) as u32
    }

    /// Returns the time since [`forget`](Self::forget).
    #[must_use]
    pub fn counted(&self) -> Duration {
        Duration::from_nanos(self.now - self.counted_from)
    }

    /// Returns a summary for the messages of tests.
    #[must_use]
    pub fn report(&self) -> String {
        let each = self.members.iter().enumerate().map(|(index, member)| {
            format!(
                "\n  {:5.2} %, {} calls, {} failures, {} probes, idle {:?}, at most {} in flight, estimate {:?}, {:?}",
                100.0 * self.share(index),
                member.calls,
                member.failures,
                member.probes,
                member.longest_idle,
                member.most_in_flight,
                member.latency.estimate(self.time()),
                member.breaker.state(),
            )
        });
        let (done, lost, mean) = (self.done(), self.lost, self.mean());
        format!("{done} done, {lost} lost, mean {mean:?}{}", each.collect::<String>())
    }

    /// Returns the simulated time.
    #[must_use]
    pub fn time(&self) -> Instant {
        self.start + Duration::from_nanos(self.now)
    }

    fn after(&mut self, wait: Duration, event: Event) {
        self.steps += 1;
        self.events.push(Reverse((self.now + nanos(wait), self.steps, event)));
    }

    /// Schedules an event, or handles it at once if `wait` is zero.
    fn then(&mut self, wait: Duration, event: Event) {
        if wait.is_zero() { self.handle(event) } else { self.after(wait, event) }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrives => self.arrives(),
            Event::Processed(request) => {
                self.processors_free += 1;
                self.processors_busy += self.settings.own_cost;
                self.process();
                for _ in 0..self.settings.operations {
                    self.begin(request);
                }
            }
            Event::Reaches(at) if self.is_current(at) => self.reaches(at),
            Event::Computed(at) if self.is_current(at) => {
                let member = &mut self.members[at.member];
                member.engines_free += 1;
                let wait = member.spec.rtt / 2;
                self.compute(at.member);
                self.then(wait, Event::Replied(at));
            }
            Event::Replied(at) if self.is_current(at) => self.replied(at),
            Event::ProbeEnds { at, began, good } if self.is_current(at) => self.probe_ends(at.member, began, good),
            Event::Reaches(_) | Event::Computed(_) | Event::Replied(_) | Event::ProbeEnds { .. } => {}
            Event::Tick => {
                self.supervise();
                self.after(TICK, Event::Tick);
            }
        }
    }

    fn is_current(&self, at: At) -> bool {
        self.members[at.member].worker == at.worker
    }

    // Requests.

    fn arrives(&mut self) {
        if !self.arriving {
            return;
        }
        if let Load::Open(rate) = self.settings.load {
            let wait = -(1.0 - self.rng.unit()).ln() / rate;
            self.after(Duration::from_secs_f64(wait), Event::Arrives);
        }
        let (now, left) = (self.now, self.settings.operations);
        let full = self.running >= self.settings.concurrency && self.for_turn.len() >= self.settings.queue;
        self.requests.push(Request { arrived: now, began: now, left: if full { 0 } else { left }, failed: full });
        if full {
            self.lost += 1;
            self.again(true);
        } else {
            self.for_turn.push_back(self.requests.len() - 1);
            self.take_turns();
        }
    }

    /// Starts requests that wait. As in the daemon, a request that would end after its deadline fails instead and takes no
    /// resources.
    fn take_turns(&mut self) {
        if std::mem::replace(&mut self.taking_turns, true) {
            return;
        }
        while self.running < self.settings.concurrency {
            let Some(index) = self.for_turn.pop_front() else { break };
            let request = &mut self.requests[index];
            let waited = Duration::from_nanos(self.now - request.arrived);
            let runs = Duration::from_secs_f64(self.run_time.0 + DEVIATIONS * self.run_time.1);
            if !waited.is_zero() && waited + runs > self.settings.deadline {
                (request.left, request.failed) = (0, true);
                self.lost += u64::from(request.arrived >= self.counted_from);
                self.again(true);
                continue;
            }
            request.began = self.now;
            self.running += 1;
            self.for_processor.push_back(index);
            self.process();
        }
        self.taking_turns = false;
    }

    /// Makes the next request of a closed-loop caller.
    fn again(&mut self, failed: bool) {
        if matches!(self.settings.load, Load::Closed(_)) {
            self.after(if failed { PAUSE } else { Duration::ZERO }, Event::Arrives);
        }
    }

    /// Gives requests to free processors.
    fn process(&mut self) {
        while self.processors_free > 0 {
            let Some(request) = self.for_processor.pop_front() else { return };
            self.processors_free -= 1;
            self.then(self.settings.own_cost, Event::Processed(request));
        }
    }

    fn begin(&mut self, request: usize) {
        let (now, arrived) = (self.time(), Duration::from_nanos(self.requests[request].arrived));
        let deadline = self.start + arrived + self.settings.deadline;
        let failover = Failover::new(deadline, self.settings.watchdog, &mut self.budget, now);
        self.step(Operation { request, failover, submitted: self.now, openings: 0, share: Duration::ZERO });
    }

    fn ended(&mut self, operation: &Operation, good: bool) {
        let request = &mut self.requests[operation.request];
        request.left -= 1;
        let took = Duration::from_nanos(self.now - request.arrived);
        let failed_before = std::mem::replace(&mut request.failed, !good || took > self.settings.deadline);
        request.failed |= failed_before;
        let counts = request.arrived >= self.counted_from;
        if counts && request.failed && !failed_before {
            self.lost += 1;
        } else if counts && request.left == 0 && !request.failed {
            self.latencies.push(took);
        }
        if request.left == 0 {
            let (failed, ran) = (request.failed, Duration::from_nanos(self.now - request.began).as_secs_f64());
            let (mean, deviation) = &mut self.run_time;
            *deviation += ((ran - *mean).abs() - *deviation) * DEVIATION_GAIN;
            *mean += (ran - *mean) * RUN_GAIN;
            self.running -= 1;
            self.succeeded += u64::from(!failed);
            if matches!(self.settings.load, Load::Handed) {
                self.ended.push((operation.request, !failed));
            }
            self.again(failed);
            self.take_turns();
        }
    }

    // Operations.

    fn step(&mut self, mut operation: Operation) {
        let now = self.time();
        let (members, rng) = (&self.members, &mut self.rng);
        let step =
            operation.failover.next(now, &self.tiers, |at| members[at].standing(now, self.now), |n| rng.below(n));
        if matches!(step, Ok(Step::Wait { .. }) | Err(GaveUp::NoCandidate)) {
            self.members.iter_mut().for_each(|member| member.breaker.probe_now(now));
        }
        match step {
            Ok(Step::Ask { member: index, share }) => {
                let member = &mut self.members[index];
                member.calls += 1;
                member.note_idle(self.now);
                let openings = member.breaker.openings();
                member.waiting.push_back(Operation { submitted: self.now, openings, share, ..operation });
                member.most_in_flight = member.most_in_flight.max(member.in_flight());
                self.serve(index);
            }
            Ok(Step::Wait { .. }) => self.parked.push(operation),
            Err(_) => self.ended(&operation, false),
        }
    }

    fn reply(&mut self, mut operation: Operation, reply: Reply<()>) {
        let now = self.time();
        match operation.failover.replied(reply, &mut self.budget, now) {
            Ok(()) => self.step(operation),
            Err(()) => self.ended(&operation, false),
        }
    }

    fn resume_parked(&mut self) {
        for operation in std::mem::take(&mut self.parked) {
            self.step(operation);
        }
    }

    // Members.

    /// Gives waiting operations to free sessions.
    fn serve(&mut self, index: usize) {
        while let Some(session) = self.members[index].sessions.iter().position(Option::is_none) {
            let member = &mut self.members[index];
            let Some(operation) = member.waiting.pop_front() else { return };
            if self.now >= self.requests[operation.request].arrived + nanos(self.settings.deadline) {
                self.reply(operation, Reply::NotRun(()));
                continue;
            }
            let member = &mut self.members[index];
            let good = !member.behaviour.fails(&mut self.rng);
            member.sessions[session] = Some(Call { since: self.now, good, operation: Some(operation) });
            let at = At { member: index, worker: member.worker, session };
            let there = member.spec.rtt / 2;
            self.then(there, Event::Reaches(at));
        }
    }

    fn reaches(&mut self, at: At) {
        let member = &mut self.members[at.member];
        if member.sessions[at.session].as_ref().is_some_and(|call| call.good) {
            member.at_engine.push_back(at.session);
            self.compute(at.member);
        } else {
            let back = FAILING_TAKES + member.spec.rtt / 2;
            self.after(back, Event::Replied(at));
        }
    }

    /// Gives operations to free engines.
    fn compute(&mut self, index: usize) {
        while self.members[index].engines_free > 0 {
            let member = &mut self.members[index];
            let Some(session) = member.at_engine.pop_front() else { return };
            member.engines_free -= 1;
            let takes = member.behaviour.takes(&mut self.rng);
            member.engines_busy += takes;
            let at = At { member: index, worker: member.worker, session };
            self.after(takes, Event::Computed(at));
        }
    }

    fn replied(&mut self, at: At) {
        let Some(call) = self.members[at.member].sessions[at.session].take() else { return };
        let member = &mut self.members[at.member];
        member.sessions_busy += Duration::from_nanos(self.now - call.since.max(self.counted_from));
        member.idle_since = self.now;
        member.failures += u64::from(!call.good);
        if let Some(operation) = &call.operation {
            self.judge(at.member, operation, call.good);
        }
        self.serve(at.member);
        match call.operation {
            Some(operation) if call.good => self.ended(&operation, true),
            Some(operation) => self.reply(operation, Reply::Failed(())),
            None => {}
        }
    }

    /// Updates estimate and breaker after an operation. A result from before the member went down is ignored.
    fn judge(&mut self, index: usize, operation: &Operation, good: bool) {
        let (now, jitter) = (self.time(), self.rng.unit());
        let member = &mut self.members[index];
        if operation.openings != member.breaker.openings() {
            return;
        }
        let took = Duration::from_nanos(self.now - operation.submitted);
        if good {
            member.latency.observe(took, now);
            member.breaker.success(now);
        } else {
            member.latency.observe_failure(took, now);
            if member.breaker.failure(now, jitter) {
                self.turn_away(index);
            }
        }
    }

    /// Sends the operations that wait at a member that went down to other members.
    fn turn_away(&mut self, index: usize) {
        for operation in std::mem::take(&mut self.members[index].waiting) {
            self.reply(operation, Reply::NotRun(()));
        }
    }

    fn supervise(&mut self) {
        for index in 0..self.members.len() {
            self.watch(index);
            let now = self.time();
            let member = &mut self.members[index];
            if !member.hung && member.breaker.may_probe(now) {
                member.probes += 1;
                let good = !member.behaviour.fails(&mut self.rng);
                let works = if good { member.behaviour.takes(&mut self.rng) } else { FAILING_TAKES };
                let starts = Duration::from_nanos(member.ready_at.saturating_sub(self.now));
                let takes = starts + member.spec.rtt + works;
                let in_time = takes <= self.settings.watchdog;
                let at = At { member: index, worker: member.worker, session: 0 };
                let ends = Event::ProbeEnds { at, began: self.now, good: good && in_time };
                self.after(takes.min(self.settings.watchdog), ends);
            }
        }
        self.resume_parked();
    }

    /// Finds calls that exceed their share or the watchdog's time.
    fn watch(&mut self, index: usize) {
        let mut late = Vec::new();
        let member = &mut self.members[index];
        for call in member.sessions.iter_mut().flatten() {
            let took = Duration::from_nanos(self.now - call.since);
            if call.operation.as_ref().is_some_and(|operation| took >= operation.share) {
                late.extend(call.operation.take());
            }
            member.hung |= took >= self.settings.watchdog;
        }
        let hung = member.hung;
        if hung {
            let (now, jitter) = (self.time(), self.rng.unit());
            self.members[index].breaker.force_open(now, jitter);
            self.turn_away(index);
        }
        for operation in late {
            self.members[index].failures += 1;
            self.judge(index, &operation, false);
            self.reply(operation, Reply::Failed(()));
        }
        if hung && self.members[index].sessions.iter().flatten().all(|call| call.operation.is_none()) {
            self.renew_worker(index, Duration::ZERO);
        }
    }

    /// Ends a worker and its calls, and starts another worker.
    fn renew_worker(&mut self, index: usize, restart: Duration) {
        let member = &mut self.members[index];
        member.worker += 1;
        member.ready_at = self.now + nanos(restart);
        member.hung = false;
        member.at_engine.clear();
        member.engines_free = member.spec.engines;
        member.idle_since = self.now;
        let running: Vec<_> =
            member.sessions.iter_mut().filter_map(Option::take).filter_map(|call| call.operation).collect();
        member.failures += running.len() as u64;
        self.turn_away(index);
        for operation in running {
            self.reply(operation, Reply::Failed(()));
        }
    }

    fn probe_ends(&mut self, index: usize, began: Nanos, good: bool) {
        let (now, jitter) = (self.time(), self.rng.unit());
        let member = &mut self.members[index];
        if good {
            member.latency = Latency::new(Duration::from_nanos(self.now - began));
            member.breaker.probe_succeeded(now);
            self.resume_parked();
        } else {
            member.breaker.probe_failed(now, jitter);
        }
    }
}

impl Member {
    fn new(spec: &Spec) -> Self {
        Member {
            spec: *spec,
            behaviour: spec.behaviour,
            breaker: Breaker::new(breaker::Settings::default()),
            latency: Latency::new(FIRST_GUESS),
            waiting: VecDeque::new(),
            sessions: (0..spec.sessions).map(|_| None).collect(),
            at_engine: VecDeque::new(),
            engines_free: spec.engines,
            worker: 0,
            ready_at: 0,
            hung: false,
            idle_since: 0,
            calls: 0,
            failures: 0,
            probes: 0,
            longest_idle: Duration::ZERO,
            most_in_flight: 0,
            engines_busy: Duration::ZERO,
            sessions_busy: Duration::ZERO,
        }
    }

    fn note_idle(&mut self, now: Nanos) {
        if self.in_flight() == 0 {
            self.longest_idle = self.longest_idle.max(Duration::from_nanos(now - self.idle_since));
        }
    }

    fn in_flight(&self) -> usize {
        self.waiting.len() + self.sessions.iter().flatten().count()
    }

    fn standing(&self, now: Instant, nanos: Nanos) -> Standing {
        if let Some(since) = self.breaker.opened_at() {
            return Standing::Returning { since };
        }
        let in_flight = self.in_flight();
        if in_flight >= self.spec.queue {
            return Standing::Unable;
        }
        let oldest = self.sessions.iter().flatten().map(|call| call.since).min();
        Standing::Able(Candidate {
            weight: self.spec.weight,
            latency: self.latency.estimate(now),
            oldest: oldest.map(|began| Duration::from_nanos(nanos - began)),
            in_flight,
        })
    }
}

#[cfg(test)]
mod tests;
