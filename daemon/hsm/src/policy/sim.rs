//! A cluster in simulated time, for tests: calls arrive, wait for a session, take their time, fail, and are tried elsewhere.

use super::pick::{Candidate, Latency, Tiers, pick};
use crate::policy::breaker::{self, Breaker};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

/// SplitMix64: small, seeded, good enough to draw lots.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to below 1.
    pub(super) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

#[derive(Clone, Copy)]
pub(super) enum Load {
    /// So many calls a second, at random times, whatever comes of them.
    Open(f64),
    /// So many callers, each of which makes the next call as soon as it has its answer.
    Closed(usize),
}

/// What is configured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spec {
    pub(super) priority: u32,
    pub(super) weight: u32,
    pub(super) sessions: usize,
    pub(super) truth: Truth,
}

impl Default for Spec {
    fn default() -> Self {
        Spec { priority: 0, weight: 1, sessions: 8, truth: Truth::default() }
    }
}

/// How a member behaves for now; the policies do not see this.
#[derive(Clone, Copy, Debug)]
pub(super) struct Truth {
    /// Give or take a fifth.
    pub(super) service: Duration,
    /// One call in so many takes `slow` instead; 0 for none.
    pub(super) slow_one_in: usize,
    pub(super) slow: Duration,
    /// One call in so many fails, after 50 µs; 0 for none.
    pub(super) fails_one_in: usize,
}

impl Default for Truth {
    fn default() -> Self {
        let ms = Duration::from_millis(1);
        Truth { service: ms, slow_one_in: 0, slow: ms, fails_one_in: 0 }
    }
}

pub(super) struct Member {
    pub(super) spec: Spec,
    pub(super) truth: Truth,
    pub(super) breaker: Breaker,
    latency: Latency,
    waiting: VecDeque<Call>,
    /// When they began, oldest first.
    running: VecDeque<u64>,
    /// Calls placed here, without probes.
    pub(super) calls: u64,
    pub(super) failures: u64,
    pub(super) probes: u64,
    idle_since: u64,
    /// Without any call, until it got one.
    pub(super) longest_idle: Duration,
    pub(super) most_in_flight: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Call {
    arrived: u64,
    /// When it came to the member.
    placed: u64,
    retried: bool,
    /// The breaker's count when it was placed.
    openings: u64,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrives,
    Ends { member: usize, began: u64, call: Call, good: bool },
    ProbeEnds { member: usize, began: u64, good: bool },
}

pub(super) struct Sim {
    start: Instant,
    /// Nanoseconds since the start.
    now: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    /// Events so far; keeps those of one instant in order.
    pub(super) steps: u64,
    rng: Rng,
    load: Load,
    pub(super) members: Vec<Member>,
    tiers: Tiers,
    pub(super) done: u64,
    seconds: f64,
    pub(super) slowest: Duration,
    pub(super) lost: u64,
}

impl Sim {
    pub(super) fn new(seed: u64, load: Load, specs: &[Spec]) -> Self {
        let member = |spec: &Spec| Member {
            spec: *spec,
            truth: spec.truth,
            breaker: Breaker::new(breaker::Settings::default()),
            latency: Latency::new(Duration::from_millis(1)),
            waiting: VecDeque::new(),
            running: VecDeque::new(),
            calls: 0,
            failures: 0,
            probes: 0,
            idle_since: 0,
            longest_idle: Duration::ZERO,
            most_in_flight: 0,
        };
        let mut sim = Sim {
            start: Instant::now(),
            now: 0,
            events: BinaryHeap::new(),
            steps: 0,
            rng: Rng(seed),
            load,
            members: specs.iter().map(member).collect(),
            tiers: Tiers::new(&specs.iter().map(|spec| spec.priority).collect::<Vec<_>>()),
            done: 0,
            seconds: 0.0,
            slowest: Duration::ZERO,
            lost: 0,
        };
        for _ in 0..if let Load::Closed(callers) = load { callers } else { 1 } {
            sim.after(Duration::ZERO, Event::Arrives);
        }
        sim
    }

    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time.as_nanos() as u64;
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

    /// Begins to count anew.
    pub(super) fn forget(&mut self) {
        (self.done, self.seconds, self.slowest, self.lost) = (0, 0.0, Duration::ZERO, 0);
        for member in &mut self.members {
            (member.calls, member.failures, member.probes, member.most_in_flight) = (0, 0, 0, 0);
            (member.idle_since, member.longest_idle) = (self.now, Duration::ZERO);
        }
    }

    /// Of all calls that were placed.
    pub(super) fn share(&self, member: usize) -> f64 {
        self.members[member].calls as f64 / self.members.iter().map(|member| member.calls).sum::<u64>() as f64
    }

    /// From arrival to the right answer.
    pub(super) fn mean(&self) -> Duration {
        Duration::from_secs_f64(self.seconds / self.done.max(1) as f64)
    }

    pub(super) fn report(&self) -> String {
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
        let (done, lost, mean, slowest) = (self.done, self.lost, self.mean(), self.slowest);
        format!("{done} done, {lost} lost, mean {mean:?}, slowest {slowest:?}{}", each.collect::<String>())
    }

    fn time(&self) -> Instant {
        self.start + Duration::from_nanos(self.now)
    }

    fn after(&mut self, wait: Duration, event: Event) {
        self.steps += 1;
        self.events.push(Reverse((self.now + wait.as_nanos() as u64, self.steps, event)));
    }

    fn handle(&mut self, event: Event) {
        let now = self.time();
        match event {
            Event::Arrives => {
                if let Load::Open(rate) = self.load {
                    let wait = -(1.0 - self.rng.unit()).ln() / rate;
                    self.after(Duration::from_secs_f64(wait), Event::Arrives);
                }
                self.place(Call { arrived: self.now, placed: self.now, retried: false, openings: 0 }, None);
            }
            Event::Ends { member: index, began, call, good } => {
                let jitter = self.rng.unit();
                let took = Duration::from_nanos(self.now - call.placed);
                let member = &mut self.members[index];
                let position = member.running.iter().position(|start| *start == began);
                position.map(|position| member.running.remove(position));
                member.idle_since = self.now;
                let current = call.openings == member.breaker.openings();
                match good {
                    true if current => {
                        member.latency.observe(took, now);
                        member.breaker.success(now);
                    }
                    false if current => {
                        member.latency.observe_failure(took, now);
                        member.breaker.failure(now, jitter);
                    }
                    _ => {}
                }
                member.failures += u64::from(!good);
                self.serve(index);
                if good {
                    let took = Duration::from_nanos(self.now - call.arrived);
                    self.done += 1;
                    self.seconds += took.as_secs_f64();
                    self.slowest = self.slowest.max(took);
                    self.answered();
                } else if call.retried {
                    self.lost += 1;
                    self.answered();
                } else {
                    self.place(Call { retried: true, ..call }, Some(index));
                }
            }
            Event::ProbeEnds { member: index, began, good } => {
                let jitter = self.rng.unit();
                let member = &mut self.members[index];
                if good {
                    member.latency = Latency::new(Duration::from_nanos(self.now - began));
                    member.breaker.probe_succeeded(now);
                } else {
                    member.breaker.probe_failed(now, jitter);
                }
            }
        }
    }

    fn answered(&mut self) {
        if let Load::Closed(_) = self.load {
            self.after(Duration::ZERO, Event::Arrives);
        }
    }

    fn place(&mut self, call: Call, avoid: Option<usize>) {
        self.probe();
        let now = self.time();
        let candidate = |index: usize| {
            let member = &self.members[index];
            if Some(index) == avoid { None } else { member.candidate(now, self.now) }
        };
        match pick(&self.tiers, candidate, |n| self.rng.below(n)).map(|choice| choice.member) {
            Some(index) => {
                let member = &mut self.members[index];
                member.calls += 1;
                member.note_idle(self.now);
                member.waiting.push_back(Call { placed: self.now, openings: member.breaker.openings(), ..call });
                member.most_in_flight = member.most_in_flight.max(member.in_flight());
                self.serve(index);
            }
            None => {
                self.lost += 1;
                self.members.iter_mut().for_each(|member| member.breaker.probe_now(now));
                if let Load::Closed(_) = self.load {
                    self.after(Duration::from_millis(1), Event::Arrives);
                }
            }
        }
    }

    fn probe(&mut self) {
        let now = self.time();
        for index in 0..self.members.len() {
            if self.members[index].breaker.may_probe(now) {
                self.members[index].probes += 1;
                let (took, good) = self.members[index].truth.call(&mut self.rng);
                self.after(took, Event::ProbeEnds { member: index, began: self.now, good });
            }
        }
    }

    /// Free sessions take what waits.
    fn serve(&mut self, index: usize) {
        while self.members[index].running.len() < self.members[index].spec.sessions {
            let member = &mut self.members[index];
            let Some(call) = member.waiting.pop_front() else { break };
            member.running.push_back(self.now);
            let (took, good) = member.truth.call(&mut self.rng);
            self.after(took, Event::Ends { member: index, began: self.now, call, good });
        }
    }
}

impl Member {
    fn note_idle(&mut self, now: u64) {
        if self.in_flight() == 0 {
            self.longest_idle = self.longest_idle.max(Duration::from_nanos(now - self.idle_since));
        }
    }

    fn in_flight(&self) -> usize {
        self.waiting.len() + self.running.len()
    }

    fn candidate(&self, now: Instant, nanos: u64) -> Option<Candidate> {
        let able = self.breaker.state() == breaker::State::Closed && self.in_flight() < 4_096;
        able.then(|| Candidate {
            weight: self.spec.weight,
            latency: self.latency.estimate(now),
            oldest: self.running.front().map(|began| Duration::from_nanos(nanos - began)),
            in_flight: self.in_flight(),
        })
    }
}

impl Truth {
    fn call(&self, rng: &mut Rng) -> (Duration, bool) {
        if self.fails_one_in > 0 && rng.below(self.fails_one_in) == 0 {
            return (Duration::from_micros(50), false);
        }
        let slow = self.slow_one_in > 0 && rng.below(self.slow_one_in) == 0;
        let time = if slow { self.slow } else { self.service };
        (time.mul_f64(0.8 + 0.4 * rng.unit()), true)
    }
}
