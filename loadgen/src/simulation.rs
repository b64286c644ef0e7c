//! A cluster in simulated time: the daemon's own policies (pick, batch, breaker, budget) over HSMs that are described by
//! four numbers. No clock, no threads, seeded lots: the same question has the same answer.
//!
//! A release arrives at a random time, has its turn on a processor, and then asks for two operations at once: decrypt and
//! sign. Each waits at the member that was picked, until a session takes it. The session sends it, which takes half a round
//! trip; the HSM computes it as soon as one of its engines is free; half a round trip later it is back. What a session
//! took in one go it does one after the other.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use claviger_hsm::policy::batch::share;
use claviger_hsm::policy::breaker::{self, Breaker};
use claviger_hsm::policy::budget::{self, Budget};
use claviger_hsm::policy::pick::{Candidate, Latency, Tiers, pick};

/// What is simulated. Times in seconds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Model {
    /// Members.
    pub hsms: usize,
    /// Sessions of each.
    pub sessions: usize,
    /// Private-key operations that each does in a second at most.
    pub hsm_rate: f64,
    /// What one operation takes inside an HSM that has nothing else to do. An HSM with a higher rate than one such
    /// operation after the other would give has several engines.
    pub op_time: f64,
    /// Network round trip to an HSM.
    pub rtt: f64,
    /// Processor time of the daemon for a release; 0 leaves the daemon out.
    pub own_cost: f64,
    /// Processors of the daemon.
    pub processors: usize,
    /// Most operations that a session takes at once.
    pub batch: usize,
    /// Most operations that may wait or run at a member.
    pub queue: usize,
    /// A release that is not done by then has failed.
    pub deadline: f64,
}

impl Model {
    /// Operations that one HSM computes at a time.
    #[must_use]
    pub fn engines(&self) -> usize {
        ((self.hsm_rate * self.op_time).round() as usize).max(1)
    }

    /// What an operation takes at an engine: whole engines give the rate exactly.
    #[must_use]
    pub fn engine_time(&self) -> f64 {
        self.engines() as f64 / self.hsm_rate
    }

    /// Releases a second that `hsms` members cannot exceed, whatever the latency: two operations each.
    #[must_use]
    pub fn ceiling(&self) -> f64 {
        let by_sessions = self.sessions as f64 / (self.rtt + self.engine_time());
        let hsms = self.hsms as f64 * self.hsm_rate.min(by_sessions) / 2.0;
        if self.own_cost > 0.0 { hsms.min(self.processors as f64 / self.own_cost) } else { hsms }
    }
}

/// What came of it.
#[derive(Clone, PartialEq, Debug)]
pub struct Simulated {
    /// Latencies of the releases that succeeded, ascending, in seconds.
    pub latencies: Vec<f64>,
    /// Releases that failed: deadline, full queues, no member.
    pub failed: usize,
    /// Share of the time that the engines of the HSMs that serve were busy.
    pub engines_busy: f64,
    /// The same of their sessions.
    pub sessions_busy: f64,
    /// The same of the daemon's processors.
    pub processors_busy: f64,
}

impl Simulated {
    /// Latency at a quantile, in seconds; 0 when nothing succeeded.
    #[must_use]
    pub fn latency(&self, quantile: f64) -> f64 {
        let at = (self.latencies.len() as f64 * quantile).ceil() as usize;
        self.latencies.get(at.clamp(1, self.latencies.len().max(1)) - 1).copied().unwrap_or(0.0)
    }

    /// Share of the releases that failed.
    #[must_use]
    pub fn errors(&self) -> f64 {
        let all = self.latencies.len() + self.failed;
        if all == 0 { 0.0 } else { self.failed as f64 / all as f64 }
    }
}

type Nanos = u64;

fn nanos(seconds: f64) -> Nanos {
    (seconds * 1e9).round() as Nanos
}

#[derive(Clone, Copy)]
struct Operation {
    release: usize,
    /// When it came to the member.
    placed: Nanos,
    /// Members that failed at it.
    tried: u64,
    /// The breaker's count when it was placed.
    openings: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrives,
    /// A processor of the daemon is done with a release.
    Processed {
        release: usize,
    },
    /// A session's operation reaches the HSM.
    Reaches {
        member: usize,
        session: usize,
    },
    /// An engine is done with a session's operation.
    Computed {
        member: usize,
        session: usize,
    },
    /// A session has its answer.
    Answered {
        member: usize,
        session: usize,
    },
    ProbeEnds {
        member: usize,
    },
}

#[derive(Default)]
struct Session {
    /// What it took and has not begun.
    taken: VecDeque<Operation>,
    /// What it does now, and since when.
    running: Option<(Operation, Nanos)>,
}

struct Member {
    breaker: Breaker,
    latency: Latency,
    waiting: VecDeque<Operation>,
    sessions: Vec<Session>,
    /// Operations that are there and wait for an engine, by session.
    at_engine: VecDeque<usize>,
    engines_free: usize,
    in_flight: usize,
    engine_busy: Nanos,
    session_busy: Nanos,
}

struct Release {
    arrived: Nanos,
    left: u8,
    failed: bool,
}

struct Simulation<'a> {
    model: &'a Model,
    rate: f64,
    start: Instant,
    now: Nanos,
    end: Nanos,
    /// From when on the first member fails at everything.
    fault: Option<Nanos>,
    events: BinaryHeap<Reverse<(Nanos, u64, Event)>>,
    steps: u64,
    lots: fastrand::Rng,
    members: Vec<Member>,
    tiers: Tiers,
    budget: Budget,
    releases: Vec<Release>,
    processors_free: usize,
    for_processor: VecDeque<usize>,
    processor_busy: Nanos,
    latencies: Vec<f64>,
    failed: usize,
    measured_from: Nanos,
}

/// Simulates `rate` releases a second for so many seconds, the first tenth of which is not counted. With `one_fails` the
/// first member fails at everything from the beginning, and the policies have to find that out.
///
/// Operations at a member that serves take their time, give or take a fifth.
#[must_use]
pub fn simulate(model: &Model, rate: f64, seconds: f64, one_fails: bool) -> Simulated {
    let member = || Member {
        breaker: Breaker::new(breaker::Settings::default()),
        latency: Latency::new(Duration::from_millis(1)),
        waiting: VecDeque::new(),
        sessions: (0..model.sessions).map(|_| Session::default()).collect(),
        at_engine: VecDeque::new(),
        engines_free: model.engines(),
        in_flight: 0,
        engine_busy: 0,
        session_busy: 0,
    };
    let end = nanos(seconds);
    let mut simulation = Simulation {
        model,
        rate,
        start: Instant::now(),
        now: 0,
        end,
        fault: one_fails.then_some(0),
        events: BinaryHeap::new(),
        steps: 0,
        lots: fastrand::Rng::with_seed(7),
        members: (0..model.hsms).map(|_| member()).collect(),
        tiers: Tiers::new(&vec![0; model.hsms]),
        budget: Budget::new(budget::Settings::default()),
        releases: Vec::new(),
        processors_free: model.processors,
        for_processor: VecDeque::new(),
        processor_busy: 0,
        latencies: Vec::new(),
        failed: 0,
        measured_from: end / 10,
    };
    simulation.run();
    let serving = model.hsms - usize::from(one_fails);
    let share = |busy: Nanos, places: usize| busy as f64 / (end as f64 * places.max(1) as f64);
    let sum = |part: fn(&Member) -> Nanos| simulation.members.iter().skip(model.hsms - serving).map(part).sum();
    let engines_busy = share(sum(|member| member.engine_busy), serving * model.engines());
    let sessions_busy = share(sum(|member| member.session_busy), serving * model.sessions);
    let processors_busy = share(simulation.processor_busy, model.processors);
    let mut latencies = simulation.latencies;
    latencies.sort_by(f64::total_cmp);
    Simulated { latencies, failed: simulation.failed, engines_busy, sessions_busy, processors_busy }
}

impl Simulation<'_> {
    fn run(&mut self) {
        self.after(0, Event::Arrives);
        // Beyond the end nothing arrives; what is there may finish.
        let last = self.end + nanos(self.model.deadline);
        while let Some(Reverse((at, _, event))) = self.events.pop() {
            if at > last {
                break;
            }
            self.now = at;
            self.handle(event);
        }
        self.failed +=
            self.releases.iter().filter(|r| r.left > 0 && !r.failed && r.arrived >= self.measured_from).count();
    }

    fn time(&self) -> Instant {
        self.start + Duration::from_nanos(self.now)
    }

    fn after(&mut self, wait: Nanos, event: Event) {
        self.steps += 1;
        self.events.push(Reverse((self.now + wait, self.steps, event)));
    }

    /// What counts of a span of time, for shares of the measured load: not what lies after the end.
    fn counted(&self, since: Nanos) -> Nanos {
        self.now.min(self.end).saturating_sub(since)
    }

    fn fails(&self, member: usize) -> bool {
        member == 0 && self.fault.is_some_and(|from| self.now >= from)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrives => {
                let wait = -(1.0 - self.lots.f64()).ln() / self.rate;
                if self.now + nanos(wait) < self.end {
                    self.after(nanos(wait), Event::Arrives);
                }
                self.releases.push(Release { arrived: self.now, left: 2, failed: false });
                self.for_processor.push_back(self.releases.len() - 1);
                self.process();
            }
            Event::Processed { release } => {
                self.processors_free += 1;
                self.processor_busy += nanos(self.model.own_cost);
                self.process();
                for _ in 0..2 {
                    self.budget.deposit(self.time());
                    self.place(Operation { release, placed: self.now, tried: 0, openings: 0 });
                }
            }
            Event::Reaches { member, session } => {
                if self.fails(member) {
                    self.after(nanos(self.model.rtt / 2.0), Event::Answered { member, session });
                } else {
                    self.members[member].at_engine.push_back(session);
                    self.compute(member);
                }
            }
            Event::Computed { member, session } => {
                self.members[member].engines_free += 1;
                self.compute(member);
                self.after(nanos(self.model.rtt / 2.0), Event::Answered { member, session });
            }
            Event::Answered { member, session } => self.answered(member, session),
            Event::ProbeEnds { member } => {
                let (now, jitter) = (self.time(), self.lots.f64());
                if self.fails(member) {
                    self.members[member].breaker.probe_failed(now, jitter);
                } else {
                    self.members[member].breaker.probe_succeeded(now);
                }
            }
        }
    }

    /// Free processors take releases.
    fn process(&mut self) {
        while self.processors_free > 0 {
            let Some(release) = self.for_processor.pop_front() else { return };
            self.processors_free -= 1;
            self.after(nanos(self.model.own_cost), Event::Processed { release });
        }
    }

    /// Free engines take operations.
    fn compute(&mut self, member: usize) {
        while self.members[member].engines_free > 0 {
            let Some(session) = self.members[member].at_engine.pop_front() else { return };
            self.members[member].engines_free -= 1;
            let time = nanos(self.model.engine_time() * (0.8 + 0.4 * self.lots.f64()));
            self.members[member].engine_busy += time.min(self.end.saturating_sub(self.now));
            self.after(time, Event::Computed { member, session });
        }
    }

    fn place(&mut self, operation: Operation) {
        self.probe();
        let (now, nanos) = (self.time(), self.now);
        let candidate = |index: usize| {
            let member = &self.members[index];
            let able = member.breaker.state() == breaker::State::Closed
                && member.in_flight < self.model.queue
                && operation.tried & (1 << index) == 0;
            able.then(|| Candidate {
                weight: 1,
                latency: member.latency.estimate(now),
                oldest: member.oldest().map(|since| Duration::from_nanos(nanos - since)),
                in_flight: member.in_flight,
            })
        };
        match pick(&self.tiers, candidate, |n| self.lots.usize(..n)).map(|choice| choice.member) {
            Some(index) => {
                let member = &mut self.members[index];
                member.in_flight += 1;
                let openings = member.breaker.openings();
                member.waiting.push_back(Operation { placed: self.now, openings, ..operation });
                self.serve(index);
            }
            None => {
                self.members.iter_mut().for_each(|member| member.breaker.probe_now(now));
                self.ended(operation, false);
            }
        }
    }

    fn probe(&mut self) {
        let now = self.time();
        for member in 0..self.members.len() {
            if self.members[member].breaker.may_probe(now) {
                self.after(nanos(self.model.rtt), Event::ProbeEnds { member });
            }
        }
    }

    /// Free sessions take their share of what waits, and send the first of it.
    fn serve(&mut self, index: usize) {
        while let Some(free) = self.members[index].free_session() {
            let member = &mut self.members[index];
            let taken = share(member.waiting.len(), self.model.sessions, self.model.batch);
            if taken == 0 {
                return;
            }
            let operations: Vec<_> = member.waiting.drain(..taken).collect();
            member.sessions[free].taken.extend(operations);
            self.send(index, free);
        }
    }

    fn send(&mut self, index: usize, session: usize) {
        let Some(operation) = self.members[index].sessions[session].taken.pop_front() else { return };
        self.members[index].sessions[session].running = Some((operation, self.now));
        self.after(nanos(self.model.rtt / 2.0), Event::Reaches { member: index, session });
    }

    fn answered(&mut self, index: usize, session: usize) {
        let Some((operation, since)) = self.members[index].sessions[session].running.take() else { return };
        let (now, jitter, good) = (self.time(), self.lots.f64(), !self.fails(index));
        let counted = self.counted(since);
        let took = Duration::from_nanos(self.now - operation.placed);
        let member = &mut self.members[index];
        member.in_flight -= 1;
        member.session_busy += counted;
        let mut turned_away = Vec::new();
        // A late result says nothing about a member that was closed since.
        if operation.openings == member.breaker.openings() {
            if good {
                member.latency.observe(took, now);
                member.breaker.success(now);
            } else {
                member.latency.observe_failure(took, now);
                if member.breaker.failure(now, jitter) {
                    turned_away.extend(member.waiting.drain(..));
                    member.in_flight -= turned_away.len();
                }
            }
        }
        if self.members[index].sessions[session].taken.is_empty() {
            self.serve(index);
        } else {
            self.send(index, session);
        }
        for operation in turned_away {
            self.place(Operation { tried: operation.tried | (1 << index), ..operation });
        }
        if good {
            self.ended(operation, true);
        } else if self.budget.withdraw(now) {
            self.place(Operation { tried: operation.tried | (1 << index), ..operation });
        } else {
            self.ended(operation, false);
        }
    }

    fn ended(&mut self, operation: Operation, good: bool) {
        let release = &mut self.releases[operation.release];
        release.left = release.left.saturating_sub(1);
        let took = (self.now - release.arrived) as f64 / 1e9;
        let counts = release.arrived >= self.measured_from;
        let failed_before = release.failed;
        release.failed |= !good || took > self.model.deadline;
        if !counts || failed_before {
            return;
        }
        if release.failed {
            self.failed += 1;
        } else if release.left == 0 {
            self.latencies.push(took);
        }
    }
}

impl Member {
    fn free_session(&self) -> Option<usize> {
        self.sessions.iter().position(|session| session.running.is_none() && session.taken.is_empty())
    }

    /// When the oldest operation that runs now was sent.
    fn oldest(&self) -> Option<Nanos> {
        self.sessions.iter().filter_map(|session| Some(session.running?.1)).min()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const MODEL: Model = Model {
        hsms: 2,
        sessions: 8,
        hsm_rate: 1000.0,
        op_time: 0.001,
        rtt: 0.001,
        own_cost: 0.0,
        processors: 1,
        batch: 16,
        queue: 4096,
        deadline: 5.0,
    };

    #[test]
    fn an_idle_cluster_takes_what_its_parts_take() {
        let simulated = simulate(&MODEL, 10.0, 20.0, false);
        assert_eq!(simulated.failed, 0);
        // Round trip and operation; seldom both operations at one engine.
        assert!((0.0018..0.0024).contains(&simulated.latency(0.5)), "{}", simulated.latency(0.5));
        assert!((simulated.engines_busy - 0.01).abs() < 0.004, "{}", simulated.engines_busy);
    }

    #[test]
    fn it_carries_what_it_can_and_no_more() {
        assert!((MODEL.ceiling() - 1000.0).abs() < 1e-6);
        let below = simulate(&MODEL, 800.0, 5.0, false);
        assert_eq!(below.failed, 0);
        assert!(below.latency(0.99) < 0.05, "{}", below.latency(0.99));
        assert!((below.engines_busy - 0.8).abs() < 0.05, "{}", below.engines_busy);
        let above = simulate(&MODEL, 1200.0, 5.0, false);
        assert!(above.latency(0.99) > 0.3, "{}", above.latency(0.99));
        assert!(above.engines_busy > 0.97);
    }

    #[test]
    fn a_member_that_fails_costs_its_capacity_and_hardly_a_release() {
        let simulated = simulate(&MODEL, 400.0, 5.0, true);
        assert!(simulated.errors() < 0.001, "{}", simulated.errors());
        assert!((simulated.engines_busy - 0.8).abs() < 0.06, "{}", simulated.engines_busy);
    }

    #[test]
    fn sessions_and_processors_may_be_what_limits() {
        let few = Model { sessions: 1, ..MODEL };
        assert!((few.ceiling() - 500.0).abs() < 1e-6);
        assert!(simulate(&few, 450.0, 5.0, false).sessions_busy > 0.8);
        let slow = Model { own_cost: 0.005, processors: 2, ..MODEL };
        assert!((slow.ceiling() - 400.0).abs() < 1e-6);
        assert!(simulate(&slow, 380.0, 5.0, false).processors_busy > 0.9);
    }
}
