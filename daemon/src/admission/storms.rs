//! Storms in simulated time: after a power failure, all machines send requests within two seconds. The queue is the
//! daemon's own. The clients that obey `Retry-After` use the rule of claviger's client. The HSMs are those of
//! [`claviger_hsm::policy::simulation`].

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger_client::retry::{Fallback, Fault, Step};
use claviger_hsm::policy::simulation::{Behaviour, Load, Rng, Settings, Simulation, Spec};

use super::LEAST_CONCURRENCY;
use super::fair_queue::{Arrival, Queue, Ticket, Turn};
use super::host_at::HostAt;
use crate::config::Release;

const SECOND: Duration = Duration::from_secs(1);
/// All machines send their first request within this time.
const WITHIN: Duration = Duration::from_secs(2);
const MACHINES_OF_A_HOST: usize = 100;
const SESSIONS: usize = 4;
/// Time of an operation. A member with four engines does 250 or 100 releases a second.
const FAST: Duration = Duration::from_millis(8);
const SLOW: Duration = Duration::from_millis(20);
/// A storm must end within this multiple of the time that the HSMs need for all machines.
const OF_BOUND: f64 = 1.1;

/// What a machine does after it is told to try again later.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// It obeys, as claviger's own client does.
    Obeys,
    /// It obeys, and spreads itself over as much time again.
    Spreads,
    /// It tries again after this time and ignores the given time.
    Every(Duration),
}

impl Kind {
    /// Of a hundred machines, two are impatient, and ten ask again at fixed times as an HGS client does.
    fn of(machine: usize) -> Self {
        match machine % 50 {
            0 => Self::Every(SECOND),
            9 | 19 | 29 | 39 | 49 => Self::Every(2 * SECOND),
            number if number % 2 == 0 => Self::Obeys,
            _ => Self::Spreads,
        }
    }
}

struct Machine {
    host: HostAt,
    kind: Kind,
    fallback: Fallback,
    /// The number of requests that it has sent.
    asked: u32,
    deadline: Instant,
    /// Its ticket while it waits.
    ticket: Option<Ticket>,
    began: Instant,
    done: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Asks,
    /// A request of this machine reaches its time limit; the number counts the machine's requests.
    Deadline(u32),
}

/// A storm and its results.
struct Storm {
    hsms: Simulation,
    queue: Queue<usize>,
    machines: Vec<Machine>,
    /// The future actions of the machines.
    events: BinaryHeap<Reverse<(Instant, usize, Event)>>,
    /// The machine of each request that the HSMs work on.
    requests: Vec<usize>,
    rng: Rng,
    open: usize,
    refusals: usize,
}

impl Storm {
    fn new(machines: usize, members: usize, operation: Duration) -> Self {
        let behaviour = Behaviour { service: operation, ..Behaviour::default() };
        let spec = Spec { sessions: SESSIONS, engines: SESSIONS, queue: usize::MAX, behaviour, ..Spec::default() };
        let settings =
            Settings { operations: 2, deadline: 60 * SECOND, watchdog: 10 * SECOND, ..Settings::new(Load::Handed) };
        let hsms = Simulation::new(5, settings, &vec![spec; members]);
        let (begun, release) = (hsms.time(), Release::default());
        let concurrency = (2 * SESSIONS * members).max(LEAST_CONCURRENCY);
        let hosts: Vec<Arc<str>> =
            (0..machines.div_ceil(MACHINES_OF_A_HOST)).map(|host| format!("host-{host}").into()).collect();
        let machine = |number: usize| Machine {
            host: HostAt { host: Arc::clone(&hosts[number % hosts.len()]), network: None },
            kind: Kind::of(number / hosts.len()),
            fallback: Fallback::new(1, begun + 100_000 * SECOND),
            asked: 0,
            deadline: begun,
            ticket: None,
            began: begun,
            done: None,
        };
        let asks = |number| Reverse((begun + WITHIN.mul_f64(number as f64 / machines as f64), number, Event::Asks));
        Self {
            hsms,
            queue: Queue::new(concurrency, release.queue, release.deadline()),
            machines: (0..machines).map(machine).collect(),
            events: (0..machines).map(asks).collect(),
            requests: Vec::new(),
            rng: Rng(9),
            open: machines,
            refusals: 0,
        }
    }

    /// Runs until every machine has its keys, and returns the time that this took.
    fn run(&mut self) -> Duration {
        let begun = self.hsms.time();
        self.until(|storm| storm.open == 0);
        self.hsms.time() - begun
    }

    fn until(&mut self, over: impl Fn(&Self) -> bool) {
        while !over(self) {
            let (hsms, now) = (self.hsms.next_at(), self.hsms.time());
            match self.events.peek() {
                Some(Reverse((at, ..))) if *at <= hsms => {
                    let Some(Reverse((at, number, event))) = self.events.pop() else { continue };
                    self.hsms.run(at - now);
                    self.happens(number, event, at);
                }
                _ => self.hsms.run(hsms - now),
            }
            self.take_ended();
        }
    }

    fn happens(&mut self, number: usize, event: Event, now: Instant) {
        let machine = &mut self.machines[number];
        match event {
            Event::Asks => {
                machine.asked += 1;
                machine.deadline = now + Release::default().deadline();
                match self.queue.arrive(&machine.host, machine.deadline, number, now) {
                    Arrival::Runs => self.begins(number, now),
                    Arrival::Waits { ticket, evicted } => {
                        machine.ticket = Some(ticket);
                        self.events.push(Reverse((machine.deadline, number, Event::Deadline(machine.asked))));
                        evicted.into_iter().for_each(|evicted| self.is_refused(evicted, now));
                    }
                    Arrival::Refused(_) => self.is_refused(number, now),
                }
            }
            Event::Deadline(asked) => {
                if machine.asked == asked
                    && let Some(ticket) = machine.ticket.take()
                {
                    assert!(self.queue.leave(&ticket));
                    self.is_refused(number, now);
                }
            }
        }
    }

    fn begins(&mut self, number: usize, now: Instant) {
        (self.machines[number].ticket, self.machines[number].began) = (None, now);
        let request = self.hsms.submit();
        assert_eq!(request, self.requests.len());
        self.requests.push(number);
    }

    fn is_refused(&mut self, number: usize, now: Instant) {
        self.refusals += 1;
        let machine = &mut self.machines[number];
        machine.ticket = None;
        let seconds = self.queue.come_again(&machine.host, number as u64, now);
        let pause = match machine.kind {
            Kind::Every(pause) => pause,
            Kind::Spreads => Duration::from_secs(seconds.into()).mul_f64(1.0 + self.rng.unit()),
            Kind::Obeys => {
                let asked = Duration::from_secs(seconds.into());
                machine.fallback.failed(0, Fault::Server(Some(asked)), now, self.rng.unit());
                let Step::Wait(pause) = machine.fallback.next(now) else { panic!("it does not wait") };
                pause
            }
        };
        self.events.push(Reverse((now + pause, number, Event::Asks)));
    }

    fn take_ended(&mut self) {
        let now = self.hsms.time();
        // A request that begins here may end at the same moment.
        while !self.hsms.ended.is_empty() {
            for (request, good) in std::mem::take(&mut self.hsms.ended) {
                let number = self.requests[request];
                let machine = &mut self.machines[number];
                self.queue.end(Some(now - machine.began));
                if good && now <= machine.deadline {
                    machine.done = Some(now);
                    self.open -= 1;
                } else {
                    self.is_refused(number, now);
                }
            }
            while let Some((number, turn)) = self.queue.next(now) {
                match turn {
                    Turn::Runs => self.begins(number, now),
                    Turn::Refused(_) => self.is_refused(number, now),
                }
            }
        }
    }
}

/// Runs storms with 1, 3 and 16 members. If one takes too long, the test reports all of them.
fn end_in_time(machines: usize, shapes: &[(usize, Duration)]) {
    let mut report = String::new();
    let mut worst: f64 = 0.0;
    for (members, operation) in shapes.iter().copied() {
        let mut storm = Storm::new(machines, members, operation);
        let took = storm.run();
        let alone = operation.mul_f64(machines as f64 * 2.0 / (members * SESSIONS) as f64);
        let ratio = took.div_duration_f64(alone.max(WITHIN));
        worst = worst.max(ratio);
        let refusals = storm.refusals as f64 / machines as f64;
        report += &format!(
            "\n{machines} machines, {members} members, {operation:?} each: {took:.2?} of {alone:.2?}: {ratio:.3}, {refusals:.2} \
             refusals for each"
        );
    }
    assert!(worst <= OF_BOUND, "{report}");
}

const SHAPES: [(usize, Duration); 6] = [(1, FAST), (3, FAST), (16, FAST), (1, SLOW), (3, SLOW), (16, SLOW)];

#[test]
fn a_storm_of_a_thousand_machines_ends_when_the_hsms_can_have_done_it() {
    end_in_time(1_000, &SHAPES);
}

#[test]
fn a_storm_of_ten_thousand_machines_ends_when_the_hsms_can_have_done_it() {
    end_in_time(10_000, &SHAPES);
}

#[test]
fn a_storm_of_a_hundred_thousand_machines_ends_when_the_hsms_can_have_done_it() {
    // Fewer members than these take minutes without optimisation.
    end_in_time(100_000, &[(3, FAST), (16, FAST), (16, SLOW)]);
}
