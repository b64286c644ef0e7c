//! A cluster in simulated time: the daemon's own policies ([`Failover`], [`pick`](super::pick::pick), [`Breaker`],
//! [`Budget`]) over members that are described by a few numbers. For tests of the policies and for capacity plans. No
//! clock, no threads, seeded random numbers: the same question has the same answer.
//!
//! A request arrives, has its turn on a processor of the daemon, and asks for its operations, all at once. Each operation
//! is submitted to the member that was picked and waits there, first come first served, until a session takes it. The
//! session sends it, which takes half a round trip; the HSM computes it as soon as an engine is free; half a round trip
//! later the result is back. A member that hangs, whose worker is killed, or that fails too often gets a new worker, which
//! has to pass a probe.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use super::breaker::{self, Breaker};
use super::budget::{self, Budget};
use super::failover::{Failover, GaveUp, Reply, Standing, Step};
use super::pick::{Candidate, Latency, Tiers};

/// How often the supervisor looks for late calls, probes that are due and operations that have waited long enough.
const TICK: Duration = Duration::from_millis(20);
/// How long an operation takes at a member that fails, beside the round trip.
const FAILING_TAKES: Duration = Duration::from_micros(50);
/// How long a caller in a closed loop pauses after a request that failed.
const PAUSE: Duration = Duration::from_millis(1);
/// What an operation is expected to take before a member has done any.
const FIRST_GUESS: Duration = Duration::from_millis(1);

/// SplitMix64: small, seeded, good enough to draw lots.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// From 0 to below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// When requests arrive.
#[derive(Clone, Copy, Debug)]
pub enum Load {
    /// So many a second, at random times, whatever comes of them.
    Open(f64),
    /// So many callers, each of which makes the next request as soon as it has its reply.
    Closed(usize),
}

/// The daemon.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// When requests arrive.
    pub load: Load,
    /// Operations of a request, all at the same time.
    pub operations: u32,
    /// Processor time for a request before its operations.
    pub own_cost: Duration,
    /// Processors that spend it.
    pub processors: usize,
    /// How long a request may take.
    pub deadline: Duration,
    /// How long a call may take before its member counts as hung.
    pub watchdog: Duration,
}

impl Settings {
    /// Requests of one operation, which cost the daemon nothing.
    #[must_use]
    pub fn new(load: Load) -> Self {
        let seconds = Duration::from_secs;
        Settings {
            load,
            operations: 1,
            own_cost: Duration::ZERO,
            processors: 1,
            deadline: seconds(5),
            watchdog: seconds(2),
        }
    }
}

/// How a member is configured and built.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// Smaller serves first.
    pub priority: u32,
    /// Share of the load within a priority.
    pub weight: u32,
    /// Operations that are under way at a time.
    pub sessions: usize,
    /// Most operations that may wait or run.
    pub queue: usize,
    /// Operations that the HSM computes at a time.
    pub engines: usize,
    /// Network round trip.
    pub rtt: Duration,
    /// How it behaves at first.
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

/// How a member behaves for now. The policies do not see this.
#[derive(Clone, Copy, Debug)]
pub struct Behaviour {
    /// What an operation takes at an engine, give or take a fifth.
    pub service: Duration,
    /// One operation in so many takes `slow` instead; 0 for none.
    pub slow_one_in: usize,
    /// See `slow_one_in`.
    pub slow: Duration,
    /// One operation in so many fails; 0 for none.
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

/// A member, and what became of its operations since [`Simulation::forget`].
#[derive(Debug)]
pub struct Member {
    spec: Spec,
    /// How it behaves; change it to break or mend the member.
    pub behaviour: Behaviour,
    breaker: Breaker,
    latency: Latency,
    waiting: VecDeque<Operation>,
    sessions: Vec<Option<Call>>,
    /// Sessions whose operation is at the HSM and waits for an engine.
    at_engine: VecDeque<usize>,
    engines_free: usize,
    /// Counts workers: an event of an earlier one says nothing.
    worker: u64,
    /// When a new worker is ready for its probe.
    ready_at: Nanos,
    /// A call hangs. Its worker is killed when no other call is in time any more.
    hung: bool,
    idle_since: Nanos,
    /// Operations that were submitted to it; probes do not count.
    pub calls: u64,
    /// Operations that failed there.
    pub failures: u64,
    /// Probes that began.
    pub probes: u64,
    /// Longest time without an operation, until it got one.
    pub longest_idle: Duration,
    /// Most operations that waited or ran.
    pub most_in_flight: usize,
    /// Time that its engines were busy, together.
    pub engines_busy: Duration,
    /// Time that its sessions were busy, together.
    pub sessions_busy: Duration,
}

/// An operation at a session.
#[derive(Debug)]
struct Call {
    since: Nanos,
    good: bool,
    /// `None` when its caller was sent elsewhere.
    operation: Option<Operation>,
}

#[derive(Debug)]
struct Operation {
    request: usize,
    failover: Failover<()>,
    /// When it was submitted to the member, which was opened so often until then.
    submitted: Nanos,
    openings: u64,
    /// How long a session may take for it.
    share: Duration,
}

#[derive(Debug)]
struct Request {
    arrived: Nanos,
    /// Operations without a result.
    left: u32,
    failed: bool,
}

/// A session's call, or a probe, of one worker of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct At {
    member: usize,
    worker: u64,
    session: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrives,
    /// A processor is done with a request.
    Processed(usize),
    /// A session's operation reaches the HSM.
    Reaches(At),
    /// An engine is done with it.
    Computed(At),
    /// The session has the reply.
    Replied(At),
    ProbeEnds {
        at: At,
        began: Nanos,
        good: bool,
    },
    Tick,
}

/// A cluster, its load, and what came of it since [`forget`](Simulation::forget).
#[derive(Debug)]
pub struct Simulation {
    settings: Settings,
    start: Instant,
    now: Nanos,
    events: BinaryHeap<Reverse<(Nanos, u64, Event)>>,
    /// Events so far; keeps those of one instant in order.
    pub steps: u64,
    rng: Rng,
    /// The members.
    pub members: Vec<Member>,
    tiers: Tiers,
    budget: Budget,
    requests: Vec<Request>,
    for_processor: VecDeque<usize>,
    processors_free: usize,
    /// Operations that wait for a member to come up.
    parked: Vec<Operation>,
    arriving: bool,
    counted_from: Nanos,
    /// Latencies of the requests that arrived since and succeeded in time.
    pub latencies: Vec<Duration>,
    /// Requests that arrived since and failed.
    pub lost: u64,
    /// Time that processors were busy, together.
    pub processors_busy: Duration,
}

impl Simulation {
    /// Members that are all up, and requests from now on.
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
            for_processor: VecDeque::new(),
            processors_free: settings.processors,
            parked: Vec::new(),
            arriving: true,
            counted_from: 0,
            latencies: Vec::new(),
            lost: 0,
            processors_busy: Duration::ZERO,
        };
        for _ in 0..if let Load::Closed(callers) = settings.load { callers } else { 1 } {
            simulation.after(Duration::ZERO, Event::Arrives);
        }
        simulation.after(TICK, Event::Tick);
        simulation
    }

    /// Lets so much time pass.
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

    /// Starts to count again. Requests that arrived before are not counted any more.
    pub fn forget(&mut self) {
        self.counted_from = self.now;
        self.latencies.clear();
        (self.lost, self.processors_busy) = (0, Duration::ZERO);
        for member in &mut self.members {
            (member.calls, member.failures, member.probes, member.most_in_flight) = (0, 0, 0, 0);
            (member.idle_since, member.longest_idle) = (self.now, Duration::ZERO);
            (member.engines_busy, member.sessions_busy) = (Duration::ZERO, Duration::ZERO);
        }
    }

    /// Ends the load, and gives the requests that are under way the time that they have. Those that need more are lost.
    pub fn finish(&mut self) {
        self.arriving = false;
        self.run(self.settings.deadline + TICK);
        let open = |request: &&Request| request.left > 0 && !request.failed && request.arrived >= self.counted_from;
        self.lost += self.requests.iter().filter(open).count() as u64;
    }

    /// Kills a member's worker. The next one is ready for its probe after `restart`.
    pub fn kill(&mut self, member: usize, restart: Duration) {
        let (now, jitter) = (self.time(), self.rng.unit());
        self.members[member].breaker.force_open(now, jitter);
        self.renew_worker(member, restart);
    }

    /// A member's share of all operations that were submitted.
    #[must_use]
    pub fn share(&self, member: usize) -> f64 {
        self.members[member].calls as f64 / self.members.iter().map(|member| member.calls).sum::<u64>() as f64
    }

    /// Requests that succeeded.
    #[must_use]
    pub fn done(&self) -> usize {
        self.latencies.len()
    }

    /// Mean time from arrival to the reply.
    #[must_use]
    pub fn mean(&self) -> Duration {
        self.latencies.iter().sum::<Duration>() / self.done().max(1) as u32
    }

    /// Time since [`forget`](Self::forget).
    #[must_use]
    pub fn counted(&self) -> Duration {
        Duration::from_nanos(self.now - self.counted_from)
    }

    /// For the messages of tests.
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

    fn time(&self) -> Instant {
        self.start + Duration::from_nanos(self.now)
    }

    fn after(&mut self, wait: Duration, event: Event) {
        self.steps += 1;
        self.events.push(Reverse((self.now + nanos(wait), self.steps, event)));
    }

    /// The same, without an event where no time passes.
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
        self.requests.push(Request { arrived: self.now, left: self.settings.operations, failed: false });
        self.for_processor.push_back(self.requests.len() - 1);
        self.process();
    }

    /// Free processors take requests.
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
        if request.left == 0 && matches!(self.settings.load, Load::Closed(_)) {
            let pause = if request.failed { PAUSE } else { Duration::ZERO };
            self.after(pause, Event::Arrives);
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

    /// Free sessions take what waits.
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

    /// Free engines take operations.
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

    /// Tells estimate and breaker how an operation went. A result from before the member went down says nothing about it now.
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

    /// What waits at a member that went down goes elsewhere.
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

    /// Finds calls that take longer than their share or the watchdog's time.
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

    /// Ends a worker with all that it has, and starts another one.
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
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::policy::breaker::State;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    const MS: Duration = Duration::from_millis(1);
    const SECOND: Duration = Duration::from_secs(1);

    // Estimate, choice and breaker together, in simulated time. What a healthy member takes: 1 ms, 8 sessions.

    fn behaving(behaviour: Behaviour) -> Spec {
        Spec { behaviour, ..Spec::default() }
    }

    fn slow(service: Duration) -> Behaviour {
        Behaviour { service, ..Behaviour::default() }
    }

    const DEAD: Behaviour = Behaviour { service: MS, slow_one_in: 0, slow: MS, fails_one_in: 1 };

    /// Warmed up for three seconds, which do not count.
    fn warm(seed: u64, load: Load, specs: &[Spec]) -> Simulation {
        let mut sim = Simulation::new(seed, Settings::new(load), specs);
        sim.run(3 * SECOND);
        sim.forget();
        sim
    }

    #[test]
    fn equals_carry_equal_shares() {
        let mut sim = warm(1, Load::Open(14_000.0), &[Spec::default(); 3]);
        sim.run(8 * SECOND);
        assert!(sim.done() > 100_000 && sim.lost == 0);
        assert!((0..3).all(|member| (0.32..0.35).contains(&sim.share(member))), "{}", sim.report());
    }

    #[test]
    fn a_member_that_was_slow_once_is_used_again() {
        let mut sim = warm(2, Load::Open(6_000.0), &[Spec::default(); 3]);
        sim.members[0].behaviour = slow(SECOND);
        sim.run(10 * MS);
        sim.members[0].behaviour = Behaviour::default();
        sim.run(20 * SECOND);
        assert!(sim.steps > 100_000);
        // 1.2 s for the call, grace, and then down from 1.2 s to what the others cost.
        let bound = Duration::from_secs_f64(1.2 + 1.0 + 2.0 * 1_200_f64.ln());
        assert!(sim.members[0].longest_idle < bound, "{}", sim.report());
        sim.forget();
        sim.run(5 * SECOND);
        assert!((0.28..0.38).contains(&sim.share(0)), "{}", sim.report());
    }

    #[test]
    fn a_dead_member_gets_probes_only_and_comes_back() {
        for (seed, load) in [(3, 4_000.0), (4, 12_000.0)] {
            let mut sim = warm(seed, Load::Open(load), &[Spec::default(); 3]);
            sim.members[0].behaviour = DEAD;
            for _ in 0..60 {
                if sim.members[0].breaker.state() == State::Closed {
                    sim.run(SECOND);
                }
            }
            assert_eq!(sim.members[0].breaker.openings(), 1, "{}", sim.report());
            assert!(sim.members[0].failures <= 5 + 8, "never drew traffic: {}", sim.report());
            assert_eq!(sim.lost, 0, "others took over");
            sim.run(10 * MS);
            sim.forget();
            sim.run(8 * SECOND);
            assert_eq!(sim.members[0].calls, 0, "{}", sim.report());
            // Every 1.5 to 2 s, and the first few sooner.
            assert!((4..=10).contains(&sim.members[0].probes), "{}", sim.report());
            sim.members[0].behaviour = Behaviour::default();
            sim.forget();
            sim.run(3 * SECOND);
            assert!(sim.members[0].longest_idle < Duration::from_millis(2_100), "{}", sim.report());
            sim.forget();
            sim.run(SECOND);
            assert!((0.28..0.38).contains(&sim.share(0)), "{}", sim.report());
        }
    }

    #[test]
    fn a_slow_member_gets_no_more_than_it_is_worth() {
        // The two others can do 16,000 a second, it can do 800.
        let mut half = warm(5, Load::Open(8_000.0), &[behaving(slow(10 * MS)), Spec::default(), Spec::default()]);
        half.run(7 * SECOND);
        assert!((0.000_5..0.01).contains(&half.share(0)), "not idle, not forgotten: {}", half.report());
        assert!(half.mean() < MS.mul_f64(1.05), "{}", half.report());
        let mut full = warm(6, Load::Closed(400), &[behaving(slow(10 * MS)), Spec::default(), Spec::default()]);
        full.run(3 * SECOND);
        assert!((0.04..0.055).contains(&full.share(0)), "by its speed, 1 in 21: {}", full.report());
        assert!(half.steps + full.steps > 200_000 && half.lost + full.lost == 0);
    }

    #[test]
    fn now_and_then_slow_is_slow() {
        let moody = Behaviour { slow_one_in: 20, slow: 50 * MS, ..Behaviour::default() };
        let mut sim = warm(7, Load::Open(8_000.0), &[behaving(moody), Spec::default(), Spec::default()]);
        sim.run(10 * SECOND);
        assert!(sim.steps > 200_000);
        assert!((0.000_01..0.01).contains(&sim.share(0)), "{}", sim.report());
        assert!(sim.mean() < MS.mul_f64(1.05), "{}", sim.report());
    }

    #[test]
    fn failing_fast_draws_no_traffic() {
        // Too rarely for the breaker, mostly.
        let flaky = Behaviour { fails_one_in: 4, ..Behaviour::default() };
        let mut sim = warm(14, Load::Open(8_000.0), &[behaving(flaky), Spec::default(), Spec::default()]);
        sim.run(5 * SECOND);
        assert!(sim.steps > 100_000 && sim.lost == 0);
        assert!(sim.share(0) < 0.01, "{}", sim.report());
    }

    #[test]
    fn a_rare_failure_costs_little_even_under_load() {
        let rare = Behaviour { fails_one_in: 1_000, ..Behaviour::default() };
        let mut sim = warm(8, Load::Open(14_000.0), &[behaving(rare), Spec::default()]);
        sim.run(8 * SECOND);
        assert!(sim.done() > 100_000 && sim.lost == 0 && sim.members[0].failures > 20, "{}", sim.report());
        assert!((0.4..0.52).contains(&sim.share(0)) && sim.mean() < 5 * MS, "{}", sim.report());
        assert_eq!(sim.members[0].breaker.openings(), 0);
    }

    #[test]
    fn a_member_that_hangs_is_left_alone_at_once() {
        let mut sim = warm(9, Load::Open(14_000.0), &[Spec::default(); 3]);
        sim.members[0].behaviour = slow(60 * SECOND);
        sim.run(8 * SECOND);
        assert!(sim.done() > 100_000);
        assert!(sim.members[0].calls <= 16, "{}", sim.report());
        assert!(sim.mean() < MS.mul_f64(1.5), "{}", sim.report());
    }

    #[test]
    fn load_follows_weight() {
        let specs = [3, 1].map(|weight| Spec { weight, sessions: 64, ..Spec::default() });
        for (seed, load) in [(10, Load::Open(30_000.0)), (11, Load::Closed(48))] {
            let mut sim = warm(seed, load, &specs);
            sim.run(Duration::from_millis(1_500));
            let ratio = sim.share(0) / sim.share(1);
            assert!((2.4..3.6).contains(&ratio), "{ratio}: {}", sim.report());
            assert!(sim.steps > 100_000);
        }
    }

    #[test]
    fn tiers_stand_in_and_step_back() {
        let spare = Spec { priority: 1, ..Spec::default() };
        let mut sim = warm(12, Load::Open(5_000.0), &[Spec::default(), Spec::default(), spare]);
        let only = |sim: &mut Simulation, time: Duration, first: bool| {
            sim.forget();
            sim.run(time);
            let (first_tier, second_tier) = (sim.members[0].calls + sim.members[1].calls, sim.members[2].calls);
            let (busy, idle) = if first { (first_tier, second_tier) } else { (second_tier, first_tier) };
            assert!(busy > 10_000 && idle == 0 && sim.lost == 0, "{}", sim.report());
        };
        only(&mut sim, 5 * SECOND, true);
        sim.members[0].behaviour = DEAD;
        sim.run(5 * SECOND);
        only(&mut sim, 5 * SECOND, true);
        sim.members[1].behaviour = DEAD;
        sim.forget();
        sim.run(SECOND / 10);
        assert!(sim.members[1].failures <= 13 && sim.lost <= 13, "few calls prove it: {}", sim.report());
        only(&mut sim, 5 * SECOND, false);
        sim.members[0].behaviour = Behaviour::default();
        sim.run(Duration::from_millis(2_100));
        only(&mut sim, 5 * SECOND, true);
        assert!(sim.steps > 200_000);
    }

    #[test]
    fn when_no_member_serves_the_first_to_recover_does_soon() {
        let mut sim = warm(13, Load::Open(2_000.0), &[Spec::default(); 2]);
        sim.members.iter_mut().for_each(|member| member.behaviour = DEAD);
        sim.run(20 * SECOND);
        sim.members[1].behaviour = Behaviour::default();
        sim.forget();
        sim.run(10 * SECOND);
        // 50 ms between probes in a hurry, where the backoff would be 2 s by now.
        assert!(sim.lost < 140, "{}", sim.report());
        assert_eq!(sim.members[0].calls, 0);
    }

    #[test]
    fn a_killed_worker_loses_no_request() {
        for (members, load) in [(1, 4_000.0), (3, 14_000.0)] {
            let mut sim = warm(15, Load::Open(load), &vec![Spec::default(); members]);
            for _ in 0..3 {
                sim.kill(0, 300 * MS);
                assert_eq!(sim.members[0].in_flight(), 0);
                sim.run(SECOND);
            }
            sim.finish();
            assert!(sim.done() > 10_000 && sim.lost == 0, "{}", sim.report());
            assert!(sim.members[0].failures > 0, "operations were under way: {}", sim.report());
            let slowest = sim.latencies.iter().max().unwrap();
            // The only one is waited for until its probe has passed, and then for what came meanwhile.
            let bound = if members == 1 { 1_500 * MS } else { 50 * MS };
            assert!(*slowest < bound, "{slowest:?}: {}", sim.report());
        }
    }

    #[test]
    fn a_member_that_stays_away_is_not_waited_for_for_ever() {
        let mut sim = warm(16, Load::Open(1_000.0), &[Spec::default()]);
        sim.kill(0, 60 * SECOND);
        sim.run(SECOND);
        assert_eq!(sim.lost, 0, "{}", sim.report());
        sim.run(9 * SECOND);
        // Two seconds after the kill all are told; from then on each at once.
        assert!((9_000..11_000).contains(&sim.lost) && sim.parked.is_empty(), "{}", sim.report());
    }

    #[test]
    fn a_hung_member_gets_a_new_worker_and_serves_again() {
        let mut sim = warm(17, Load::Open(10_000.0), &[Spec::default(); 3]);
        sim.members[0].behaviour = slow(3_600 * SECOND);
        sim.run(SECOND);
        sim.members[0].behaviour = Behaviour::default();
        sim.run(9 * SECOND);
        assert!(sim.members[0].worker >= 1, "{}", sim.report());
        sim.forget();
        sim.run(SECOND);
        assert!((0.28..0.38).contains(&sim.share(0)), "{}", sim.report());
        sim.finish();
        assert_eq!(sim.lost, 0, "{}", sim.report());
    }

    #[test]
    fn what_does_not_fit_into_queue_and_deadline_is_lost() {
        let spec = Spec { queue: 100, sessions: 1, ..Spec::default() };
        let mut full = Simulation::new(18, Settings::new(Load::Open(2_000.0)), &[spec]);
        full.run(5 * SECOND);
        assert!(full.members[0].most_in_flight == 100 && (4_500..5_500).contains(&full.lost), "{}", full.report());
        let settings = Settings { deadline: 50 * MS, ..Settings::new(Load::Open(2_000.0)) };
        let mut late = Simulation::new(19, settings, &[Spec { queue: 4_096, ..spec }]);
        late.run(5 * SECOND);
        late.finish();
        assert!(late.latencies.iter().all(|took| *took <= 50 * MS));
        // First come first served: most operations start so late that they end after their deadline.
        assert!(late.done() > 500 && late.lost > 4_500, "{}", late.report());
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 24, rng_seed: RngSeed::Fixed(4), failure_persistence: None, ..ProptestConfig::default()
        })]

        /// Members of all kinds, of which one dies and recovers: 8 runs of over 20,000 steps each.
        #[test]
        fn whatever_the_members(
            specs in proptest::collection::vec(
                (1..5_u32, 1..17_usize, 2..21_u32).prop_map(|(weight, sessions, service)| {
                    Spec { weight, sessions, behaviour: slow(service * MS), ..Spec::default() }
                }),
                2..6,
            ),
            load in 0.2..0.8_f64,
            seed: u64,
        ) {
            let each = |spec: &Spec| spec.sessions as f64 / spec.behaviour.service.as_secs_f64();
            let capacity: f64 = specs.iter().map(each).sum();
            let mut sim = Simulation::new(seed, Settings::new(Load::Open((capacity * load).min(2_000.0))), &specs);
            sim.run(2 * SECOND);
            sim.members[0].behaviour = DEAD;
            sim.run(4 * SECOND);
            sim.members[0].behaviour = specs[0].behaviour;
            sim.run(3 * SECOND);
            sim.forget();
            sim.run(12 * SECOND);
            prop_assert!(sim.steps > 10_000);
            prop_assert!(sim.lost == 0, "{}", sim.report());
            for member in &sim.members {
                prop_assert_eq!(member.breaker.state(), State::Closed);
                prop_assert!(member.longest_idle < 10 * SECOND, "starved: {}", sim.report());
            }
        }

        /// Members that are killed, hang, fail and recover at random: 24 runs.
        #[test]
        fn every_request_ends_once(
            members in 1..5_usize,
            operations in 1..4_u32,
            faults in proptest::collection::vec((0..5_usize, 0..4_u8, 1..900_u32), 0..20),
            closed: bool,
            seed: u64,
        ) {
            let load = if closed { Load::Closed(20) } else { Load::Open(500.0) };
            let settings = Settings { operations, own_cost: MS, processors: 2, ..Settings::new(load) };
            let spec = Spec { rtt: MS, engines: 2, sessions: 3, queue: 200, ..Spec::default() };
            let mut sim = Simulation::new(seed, settings, &vec![spec; members]);
            for (member, fault, millis) in faults {
                let member = member % members;
                match fault {
                    0 => sim.kill(member, millis * MS),
                    1 => sim.members[member].behaviour = slow(60 * SECOND),
                    2 => sim.members[member].behaviour = DEAD,
                    _ => sim.members[member].behaviour = Behaviour::default(),
                }
                sim.run(millis * MS);
                for member in &sim.members {
                    prop_assert!(member.in_flight() <= 200 && member.engines_free <= 2);
                    let computing = member.sessions.iter().flatten().filter(|call| call.good).count();
                    prop_assert!(2 - member.engines_free + member.at_engine.len() <= computing);
                }
            }
            sim.finish();
            let all = sim.requests.len();
            prop_assert!(all > 0);
            prop_assert_eq!(sim.done() + sim.lost as usize, all);
            prop_assert!(sim.requests.iter().all(|request| request.left == 0));
            prop_assert!(sim.parked.is_empty());
        }
    }
}
