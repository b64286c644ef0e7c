#![allow(clippy::unwrap_used)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use proptest::prelude::*;

use super::*;
use crate::admission::declined::whole_seconds;

const MILLI: Duration = Duration::from_millis(1);
const AGES: Duration = Duration::from_secs(3600);

/// A request in these tests: its host and its number.
type Caller = (&'static str, usize);

/// A host with a single address.
fn at(host: &str) -> HostAt {
    HostAt { host: Arc::from(host), network: None }
}

/// A host with one of several addresses.
fn from(host: &str, address: u8) -> HostAt {
    HostAt { host: Arc::from(host), network: Some(Network::of([192, 0, 2, address].into())) }
}

/// Expects that the request waits and evicts none.
fn waits(arrival: Arrival<Caller>) -> Ticket {
    match arrival {
        Arrival::Waits { ticket, evicted: None } => ticket,
        other => panic!("does not just wait: {other:?}"),
    }
}

fn refused(arrival: Arrival<Caller>) -> Dropped {
    match arrival {
        Arrival::Refused(reason) => reason,
        other => panic!("is not refused: {other:?}"),
    }
}

/// A queue with one place, which is in use, and these waiting requests.
fn queue_of(limit: usize, callers: &[Caller], now: Instant) -> (Queue<Caller>, Vec<Ticket>) {
    let mut queue = Queue::new(1, limit, AGES);
    assert!(matches!(queue.arrive(&at("first"), now + AGES, ("first", 0), now), Arrival::Runs));
    let tickets =
        callers.iter().map(|caller| waits(queue.arrive(&at(caller.0), now + AGES, *caller, now))).collect::<Vec<_>>();
    (queue, tickets)
}

/// The order in which all waiting requests run.
fn order(queue: &mut Queue<Caller>, now: Instant) -> Vec<Caller> {
    std::iter::from_fn(|| {
        queue.end(None);
        let (caller, turn) = queue.next(now)?;
        assert_eq!(turn, Turn::Runs);
        assert!(queue.next(now).is_none(), "two for one place");
        Some(caller)
    })
    .collect()
}

#[test]
fn hosts_take_turns_and_each_is_first_come_first_served() {
    let now = Instant::now();
    let storm = [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("a", 4), ("c", 1), ("c", 2)];
    let (mut queue, _) = queue_of(100, &storm, now);
    let expected = [("a", 1), ("b", 1), ("c", 1), ("a", 2), ("c", 2), ("a", 3), ("a", 4)];
    assert_eq!(order(&mut queue, now), expected);
    assert_eq!((queue.running(), queue.waiting()), (0, 0));
}

#[test]
fn who_left_has_no_turn() {
    let now = Instant::now();
    let (mut queue, tickets) = queue_of(100, &[("a", 1), ("a", 2), ("b", 1), ("a", 3), ("c", 1)], now);
    assert!(queue.leave(&tickets[2]) && queue.leave(&tickets[1]));
    assert!(!queue.leave(&tickets[1]), "left twice");
    assert_eq!(order(&mut queue, now), [("a", 1), ("c", 1), ("a", 3)]);
    assert!(!queue.leave(&tickets[0]), "left while it ran");
}

#[test]
fn when_all_is_full_the_longest_queue_pays() {
    let now = Instant::now();
    let (mut queue, _) = queue_of(5, &[("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2)], now);
    assert_eq!(refused(queue.arrive(&at("a"), now + AGES, ("a", 4), now)), Dropped::Full);
    // With the new request, its line would be as long as the longest.
    assert_eq!(refused(queue.arrive(&at("b"), now + AGES, ("b", 3), now)), Dropped::Full);
    let Arrival::Waits { evicted, .. } = queue.arrive(&at("c"), now + AGES, ("c", 1), now) else { panic!("refused") };
    assert_eq!(evicted, Some(("a", 3)), "not the newest of the longest");
    let Arrival::Waits { evicted, .. } = queue.arrive(&at("d"), now + AGES, ("d", 1), now) else { panic!("refused") };
    assert_eq!(evicted, Some(("b", 2)), "not the newer one");
    let Arrival::Waits { evicted, .. } = queue.arrive(&at("e"), now + AGES, ("e", 1), now) else { panic!("refused") };
    assert_eq!(evicted, Some(("a", 2)));
    assert_eq!(refused(queue.arrive(&at("f"), now + AGES, ("f", 1), now)), Dropped::Full, "all are equal");
    assert_eq!(order(&mut queue, now), [("a", 1), ("b", 1), ("c", 1), ("d", 1), ("e", 1)]);
}

#[test]
fn what_cannot_be_done_in_time_is_not_begun() {
    let now = Instant::now();
    let mut queue = Queue::new(1, 100, AGES);
    assert_eq!(refused(queue.arrive(&at("a"), now, ("a", 0), now)), Dropped::Deadline);
    assert!(matches!(queue.arrive(&at("a"), now + AGES, ("a", 0), now), Arrival::Runs));
    for _ in 0..100 {
        queue.pace.ended(100 * MILLI, 0);
    }
    // The next place becomes free after about 100 ms, and the release takes as long again.
    assert_eq!(refused(queue.arrive(&at("a"), now + 150 * MILLI, ("a", 1), now)), Dropped::Late);
    waits(queue.arrive(&at("a"), now + 230 * MILLI, ("a", 1), now));
    assert_eq!(refused(queue.arrive(&at("a"), now + 300 * MILLI, ("a", 2), now)), Dropped::Late, "one is ahead of it");
    // In fair order, only one request of `a` is ahead of another host's first request.
    assert_eq!(refused(queue.arrive(&at("b"), now + 300 * MILLI, ("b", 1), now)), Dropped::Late);
    waits(queue.arrive(&at("a"), now + 500 * MILLI, ("a", 2), now));
    waits(queue.arrive(&at("b"), now + 500 * MILLI, ("b", 1), now));
    // It took longer than expected: the first request has expired, and the second one would. Neither costs `a` its
    // turn.
    let later = now + 390 * MILLI;
    queue.end(None);
    assert_eq!(queue.next(now + 240 * MILLI), Some((("a", 1), Turn::Refused(Dropped::Deadline))));
    assert_eq!(queue.next(later), Some((("a", 2), Turn::Runs)));
    queue.end(None);
    assert_eq!(queue.next(later + 20 * MILLI), Some((("b", 1), Turn::Refused(Dropped::Late))));
    assert_eq!(queue.next(later), None);
    assert_eq!((queue.running(), queue.waiting()), (0, 0));
}

#[test]
fn bad_times_are_forgotten() {
    let mut now = Instant::now();
    let mut queue = Queue::new(2, 100, AGES);
    for _ in 0..2 {
        assert!(matches!(queue.arrive(&at("a"), now + 500 * MILLI, ("a", 0), now), Arrival::Runs));
    }
    // The tokens hung for a while.
    now += 5000 * MILLI;
    queue.end(Some(5000 * MILLI));
    queue.end(Some(5000 * MILLI));
    assert!(queue.pace.run() > 500 * MILLI);
    // No request is queued, but one that finds a free place runs; soon the estimate improves.
    for _ in 0..200 {
        while matches!(queue.arrive(&at("a"), now + 500 * MILLI, ("a", 0), now), Arrival::Runs) {}
        now += 10 * MILLI;
        queue.end(Some(10 * MILLI));
        while queue.next(now).is_some() {}
    }
    waits(queue.arrive(&at("b"), now + 500 * MILLI, ("b", 0), now));
}

#[test]
fn who_is_refused_is_told_when_there_will_be_room() {
    let now = Instant::now();
    let (mut queue, _) = queue_of(100, &[("a", 1), ("a", 2), ("a", 3)], now);
    queue.set_limit(100, 4000 * MILLI);
    assert_eq!(queue.come_again(&at("a"), 0, now), 1, "nothing is known yet");
    // Three wait before it, and it may come two seconds before its turn. A quarter more are promised than can be served.
    for (request, held, expected) in [(1, 100, 1), (2, 1300, 2), (3, 2600, 6), (4, 60_000, 29)] {
        queue.pace = Pace::default();
        queue.pace.ended(held * MILLI, 0);
        assert_eq!(queue.come_again(&at("a"), request, now), expected, "{held} ms");
    }
    // A host that nobody waits for comes after one of `a`.
    queue.pace = Pace::default();
    queue.pace.ended(2600 * MILLI, 0);
    assert_eq!(queue.come_again(&at("b"), 5, now), 2);
    assert_eq!([0, 1, 1000, 1001, 2500].map(|millis| whole_seconds(millis * MILLI)), [1, 1, 1, 2, 3]);
}

/// Five times more releases arrive than can be processed. All processed releases are in time, and the capacity is fully
/// used.
#[test]
fn overload_keeps_what_gets_done() {
    const CONCURRENCY: usize = 8;
    // 8 concurrent releases of 40 ms each are 200 per second.
    const CAPACITY: usize = 200;
    const SECONDS: usize = 30;
    let deadline = 500 * MILLI;
    let begun = Instant::now();
    let mut queue = Queue::<(usize, Instant)>::new(CONCURRENCY, 4096, deadline);
    let mut running: BinaryHeap<Reverse<(Instant, Instant, Instant)>> = BinaryHeap::new();
    // A linear congruential generator, so that each run is the same.
    let mut noise = 7_u64;
    let mut took = || {
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // 10 to 70 ms.
        10 * MILLI + Duration::from_micros((noise >> 33) % 60_000)
    };
    let (mut in_time, mut late, mut waited_for_nothing) = (0, 0, 0);
    for arrival in 0..SECONDS * CAPACITY * 5 {
        let now = begun + Duration::from_secs(1) * arrival as u32 / (5 * CAPACITY) as u32;
        while let Some(Reverse((ends, since, due))) = running.peek().copied()
            && ends <= now
        {
            running.pop();
            if ends <= due {
                in_time += 1
            } else {
                late += 1
            }
            queue.end(Some(ends - since));
            while let Some(((_, due), turn)) = queue.next(ends) {
                match turn {
                    Turn::Runs => running.push(Reverse((ends + took(), ends, due))),
                    Turn::Refused(_) => waited_for_nothing += 1,
                }
            }
        }
        let host = ["a", "b", "c"][arrival % 3];
        if let Arrival::Runs = queue.arrive(&at(host), now + deadline, (arrival, now + deadline), now) {
            running.push(Reverse((now + took(), now, now + deadline)));
        }
        assert_eq!(queue.running(), running.len());
    }
    let ratio = in_time as f64 / (SECONDS * CAPACITY) as f64;
    assert!(ratio > 0.97, "{ratio} of the capacity");
    assert!(late * 1000 <= in_time, "{late} were late, {in_time} were not");
    assert!(waited_for_nothing * 20 < in_time, "{waited_for_nothing} waited for nothing");
}

#[test]
fn networks_of_one_host_take_turns_for_its_turns() {
    let now = Instant::now();
    let (mut queue, _) = queue_of(100, &[], now);
    let mut arrive = |host, address, number| waits(queue.arrive(&from(host, address), now + AGES, (host, number), now));
    // A storm with a stolen certificate from one address, the host's own releases from another one, and another host.
    (10..14).for_each(|number| drop(arrive("a", 1, number)));
    drop(arrive("b", 3, 1));
    drop(arrive("a", 2, 20));
    let left = arrive("a", 2, 21);
    drop(arrive("a", 2, 22));
    assert!(queue.leave(&left));
    let expected = [("a", 10), ("b", 1), ("a", 20), ("a", 11), ("a", 12), ("a", 22), ("a", 13)];
    assert_eq!(order(&mut queue, now), expected);
}

#[test]
fn one_release_at_a_time_does_not_pass_a_line_by() {
    let now = Instant::now();
    let (mut queue, _) = queue_of(100, &[], now);
    for number in 10..20 {
        waits(queue.arrive(&from("a", 1), now + AGES, ("a", number), now));
    }
    // The other address sends its next request as soon as it is served: it gets every second turn, not every turn.
    let mut served = Vec::new();
    waits(queue.arrive(&from("a", 2), now + AGES, ("a", 0), now));
    for _ in 0..8 {
        queue.end(None);
        let ((_, number), _) = queue.next(now).unwrap();
        served.push(number);
        if number == 0 {
            waits(queue.arrive(&from("a", 2), now + AGES, ("a", 0), now));
        }
    }
    assert_eq!(served, [10, 0, 11, 0, 12, 0, 13, 0]);
}

#[test]
fn a_full_line_makes_room_for_another_address_of_its_host() {
    let now = Instant::now();
    let (mut queue, _) = queue_of(4, &[], now);
    for number in 10..14 {
        waits(queue.arrive(&from("a", 1), now + AGES, ("a", number), now));
    }
    assert_eq!(refused(queue.arrive(&from("a", 1), now + AGES, ("a", 14), now)), Dropped::Full);
    for (number, out) in [(20, 13), (21, 12)] {
        let arrival = queue.arrive(&from("a", 2), now + AGES, ("a", number), now);
        let Arrival::Waits { evicted, .. } = arrival else { panic!("refused") };
        assert_eq!(evicted, Some(("a", out)));
    }
    assert_eq!(refused(queue.arrive(&from("a", 2), now + AGES, ("a", 22), now)), Dropped::Full);
    assert_eq!(order(&mut queue, now), [("a", 10), ("a", 20), ("a", 11), ("a", 21)]);
}

#[derive(Clone, Debug)]
enum Step {
    Arrive {
        host: usize,
        within: u64,
    },
    /// A waiting request leaves.
    Leave(prop::sample::Index),
    /// A running request ends.
    End,
    Pass(u64),
}

const HOSTS: [&str; 5] = ["a", "b", "c", "d", "e"];

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..HOSTS.len(), 1..400_u64).prop_map(|(host, within)| Step::Arrive { host, within }),
        1 => any::<prop::sample::Index>().prop_map(Step::Leave),
        4 => Just(Step::End),
        2 => (1..40_u64).prop_map(Step::Pass),
    ];
    prop::collection::vec(step, 1..300)
}

/// A simple model with the required properties of the queue.
struct Model {
    queue: Queue<Caller>,
    now: Instant,
    /// Start times of the running requests.
    running: VecDeque<Instant>,
    waiting: BTreeMap<Caller, Ticket>,
    decided: BTreeSet<Caller>,
    /// For each host with waiting requests: the hosts that were served since its own last turn or its arrival.
    passed_by: BTreeMap<&'static str, BTreeSet<&'static str>>,
}

impl Model {
    fn arrive(&mut self, caller: Caller, within: Duration, limit: usize) {
        let (host, now) = (caller.0, self.now);
        let lengths: BTreeMap<_, _> = HOSTS.map(|host| (host, self.queue.length(host))).into();
        match self.queue.arrive(&at(host), now + within, caller, now) {
            Arrival::Runs => {
                assert!(self.waiting.is_empty(), "runs while others wait");
                self.running.push_back(now);
                self.decide(caller);
            }
            Arrival::Waits { ticket, evicted } => {
                self.waiting.insert(caller, ticket);
                self.passed_by.entry(host).or_default();
                assert_eq!(evicted.is_some(), lengths.values().sum::<usize>() == limit);
                if let Some(evicted) = evicted {
                    let newest = *self.waiting.keys().rfind(|(of, _)| *of == evicted.0).unwrap();
                    assert_eq!(evicted, newest, "not the newest");
                    assert_eq!(Some(&lengths[evicted.0]), lengths.values().max(), "not the longest");
                    assert!(lengths[evicted.0] > lengths[host] + 1);
                    self.waiting.remove(&evicted);
                    self.decide(evicted);
                }
            }
            Arrival::Refused(_) => self.decide(caller),
        }
    }

    fn decide(&mut self, caller: Caller) {
        assert!(self.decided.insert(caller), "{caller:?} is told twice");
    }

    fn end(&mut self) {
        let Some(since) = self.running.pop_front() else { return };
        self.queue.end(Some(self.now - since));
        while let Some((caller, turn)) = self.queue.next(self.now) {
            let oldest = *self.waiting.keys().find(|(of, _)| *of == caller.0).unwrap();
            assert_eq!(caller, oldest, "not first come, first served");
            self.waiting.remove(&caller);
            self.decide(caller);
            if self.queue.length(caller.0) == 0 {
                self.passed_by.remove(caller.0);
            }
            if turn == Turn::Runs {
                self.running.push_back(self.now);
                for (host, starts) in &mut self.passed_by {
                    if *host == caller.0 {
                        starts.clear();
                    } else {
                        assert!(starts.insert(caller.0), "{caller:?} is the second one before one of {host}");
                    }
                }
            }
        }
    }

    fn check(&mut self, concurrency: usize, limit: usize, arrived: usize) {
        let queue = &self.queue;
        assert_eq!(queue.running(), self.running.len());
        assert_eq!(queue.waiting(), self.waiting.len());
        assert!(queue.running() <= concurrency && queue.waiting() <= limit);
        assert!(queue.waiting() == 0 || queue.running() == concurrency, "a free place while somebody waits");
        assert_eq!(self.decided.len() + self.waiting.len(), arrived, "somebody is lost");
        let hosts: BTreeSet<_> = self.waiting.keys().map(|(host, _)| *host).collect();
        assert!(queue.turns.iter().map(|turn| &*turn.host).collect::<BTreeSet<_>>() == hosts);
        assert_eq!((queue.turns.len(), queue.hosts.len()), (hosts.len(), hosts.len()));
        for most in 0..4 {
            assert_eq!(queue.lengths.up_to(most), HOSTS.iter().map(|host| queue.length(host).min(most)).sum::<usize>());
        }
        self.passed_by.retain(|host, _| hosts.contains(host));
    }
}

proptest! {
    #[test]
    fn whatever_happens(steps in steps(), concurrency in 1..5_usize, limit in 1..12_usize) {
        let mut model = Model {
            queue: Queue::new(concurrency, limit, AGES),
            now: Instant::now(),
            running: VecDeque::new(),
            waiting: BTreeMap::new(),
            decided: BTreeSet::new(),
            passed_by: BTreeMap::new(),
        };
        let mut arrived = 0;
        for step in steps {
            match step {
                Step::Arrive { host, within } => {
                    model.arrive((HOSTS[host], arrived), within as u32 * MILLI, limit);
                    arrived += 1;
                }
                Step::Leave(_) if model.waiting.is_empty() => {}
                Step::Leave(which) => {
                    let caller = *which.get(&model.waiting.keys().collect::<Vec<_>>()).to_owned();
                    let ticket = model.waiting.remove(&caller).unwrap();
                    prop_assert!(model.queue.leave(&ticket));
                    model.decide(caller);
                }
                Step::End => model.end(),
                Step::Pass(millis) => model.now += millis as u32 * MILLI,
            }
            model.check(concurrency, limit, arrived);
        }
        while !model.running.is_empty() {
            model.end();
            model.check(concurrency, limit, arrived);
        }
        prop_assert!(model.waiting.is_empty(), "never had a turn");
    }

    /// The position that is predicted for a new request is its actual position.
    #[test]
    fn ahead_are_those_that_run_before(
        arrivals in prop::collection::vec((0..HOSTS.len(), 1..4_u8, any::<bool>()), 1..60),
        newcomer in (0..HOSTS.len(), 1..4_u8),
    ) {
        let now = Instant::now();
        let (mut queue, _) = queue_of(1000, &[], now);
        for (number, (host, address, ends)) in arrivals.into_iter().enumerate() {
            waits(queue.arrive(&from(HOSTS[host], address), now + AGES, (HOSTS[host], number), now));
            if ends {
                queue.end(None);
                queue.next(now);
            }
        }
        let newcomer = from(HOSTS[newcomer.0], newcomer.1);
        let ahead = queue.ahead(&newcomer);
        let (least, most) = queue.least_and_most_ahead(&newcomer);
        prop_assert!(least <= ahead && ahead <= most, "{} to {}, not {}", least, most, ahead);
        waits(queue.arrive(&newcomer, now + AGES, ("newcomer", 0), now));
        let place = order(&mut queue, now).into_iter().position(|caller| caller.0 == "newcomer");
        prop_assert_eq!(place, Some(ahead));
    }
}
