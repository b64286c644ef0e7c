//! The lanes of the stock. The shelf decides which lane gets the next item. It is a plain value; its methods get
//! `now` as an argument.
//!
//! A lane may have as many items as its set has machines, which are estimated from its releases. The lanes share the
//! memory by max-min fairness: each lane gets an equal share of the bytes, or less if it wants less. The next item
//! always goes to the lane with the fewest bytes that needs items. If the memory is full, the lane with the most bytes
//! loses an item to it, unless that would leave this lane with fewer bytes than the other.
//!
//! ```text
//!  bytes │ ▒▒                 wanted, but beyond the share
//!        │ ▒▒ ▒▒
//!  share ├─██─██───────────
//!        │ ██ ██ ██
//!        │ ██ ██ ██ ██
//!        └────────────────── lanes
//! ```
//!
//! The time of each step grows at most with the logarithm of the number of lanes. Work on all lanes is done in parts.

use std::cmp::Ordering;
use std::collections::{BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::time::{Duration, Instant};

/// Maximum number of lanes. If there are more, the lane with the smallest demand is removed.
const MOST_LANES: usize = 4_096;
/// The demand for a lane falls to one half in this time.
const HALF_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Time for which a lane gets no new order after making its item failed.
const REST: Duration = Duration::from_secs(5);
/// A lane is forgotten when its demand is less than this.
const LEAST_DEMAND: f64 = 0.25;
/// Assumed size of an item until the first one was made: the size for an owner with three guardians.
const FIRST_GUESS: usize = 4_096;

/// The name of a lane: the identity of its set.
pub(super) type Id = [u8; 32];

/// Lanes, each with a label `L` and with items `T`.
#[derive(Debug)]
pub(super) struct Shelf<L, T> {
    lanes: HashMap<Id, Lane<L, T>>,
    epoch: Instant,
    lanes_made: u64,
    /// Bytes of all labels.
    labels: usize,
    depth: usize,
    /// Bytes of all items.
    size: usize,
    /// Bytes of the items that are being made, as far as their size is known.
    ordered: usize,
    /// Lanes that need items and do not rest, ordered by the bytes that they have or get; the fewest first.
    lacking: BTreeSet<(usize, Id)>,
    /// Lanes that have items, ordered by the bytes that they have; the most last.
    holding: BTreeSet<(usize, Id)>,
    by_demand: BTreeSet<(Demand, Id)>,
    /// Lanes that rest, and the end of each rest; the earliest end first.
    resting: VecDeque<(Instant, Id)>,
    /// Lanes that the current sweep has not examined yet.
    unswept: Vec<Id>,
    /// Items that left without being given out.
    gone: Gone<T>,
}

/// Items that the caller must drop and count.
#[derive(Debug)]
pub(super) struct Gone<T> {
    /// Items that waited too long.
    pub(super) aged: Vec<T>,
    /// Items for which there was no room, or that were made for keys or settings no longer in use.
    pub(super) dropped: Vec<T>,
}

impl<T> Default for Gone<T> {
    fn default() -> Self {
        Self { aged: Vec::new(), dropped: Vec::new() }
    }
}

#[derive(Debug)]
struct Lane<L, T> {
    label: L,
    label_size: usize,
    /// Distinguishes a lane from a later lane of the same set.
    number: u64,
    ready: BinaryHeap<Item<T>>,
    held: usize,
    coming: usize,
    /// Size of the latest item of this lane; 0 before the first one.
    item_size: usize,
    demand: Demand,
    rests_until: Option<Instant>,
    /// The positions in `lacking` and `holding`.
    lacks: Option<usize>,
    holds: Option<usize>,
}

/// A waiting item. The one that expires first is the greatest.
#[derive(Debug)]
pub(super) struct Item<T> {
    pub(super) value: T,
    size: usize,
    ends: Instant,
}

impl<T> Ord for Item<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        other.ends.cmp(&self.ends)
    }
}

impl<T> PartialOrd for Item<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> PartialEq for Item<T> {
    fn eq(&self, other: &Self) -> bool {
        self.ends == other.ends
    }
}

impl<T> Eq for Item<T> {}

/// The demand for a lane: the logarithm (base 2) of its machines. Each of them counts half as much after every
/// [`HALF_LIFE`]. The value is converted to the epoch. All demands fall at the same rate, so their order does not
/// change.
#[derive(Clone, Copy, Debug)]
struct Demand(f64);

impl Demand {
    const NONE: Self = Self(f64::NEG_INFINITY);

    /// The number of machines at a moment, given as half-lives after the epoch.
    fn machines(self, half_lives: f64) -> f64 {
        (self.0 - half_lives).exp2()
    }

    fn plus(self, machines: f64, half_lives: f64) -> Self {
        Self((self.machines(half_lives) + machines.max(0.0)).log2() + half_lives)
    }
}

impl Ord for Demand {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Demand {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Demand {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Demand {}

/// An item that is being made. The caller must pass it to [`Shelf::finished`], whether making it succeeds or fails.
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) id: Id,
    number: u64,
    reserved: usize,
}

/// An item that was taken.
#[derive(Debug)]
pub(super) struct Picked<T> {
    pub(super) item: Item<T>,
    id: Id,
    number: u64,
}

impl<L, T> Shelf<L, T> {
    pub(super) fn new(epoch: Instant) -> Self {
        Self {
            lanes: HashMap::new(),
            epoch,
            lanes_made: 0,
            labels: 0,
            depth: 0,
            size: 0,
            ordered: 0,
            lacking: BTreeSet::new(),
            holding: BTreeSet::new(),
            by_demand: BTreeSet::new(),
            resting: VecDeque::new(),
            unswept: Vec::new(),
            gone: Gone::default(),
        }
    }

    /// The number of waiting items.
    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    /// The items that left since the last call.
    pub(super) fn gone(&mut self) -> Gone<T> {
        std::mem::take(&mut self.gone)
    }

    /// The label of the lane for which an item is made; `None` if the lane no longer exists.
    pub(super) fn label(&self, ticket: &Ticket) -> Option<&L> {
        self.lanes.get(&ticket.id).filter(|lane| lane.number == ticket.number).map(|lane| &lane.label)
    }

    /// Counts machines for a lane. A missing lane is created, with a label of `size` bytes. All labels together may
    /// take `room` bytes; so lanes with less demand may be removed.
    pub(super) fn asked(
        &mut self,
        id: Id,
        machines: f64,
        (size, room): (usize, usize),
        label: impl FnOnce() -> L,
        now: Instant,
    ) {
        let half_lives = self.half_lives(now);
        if !self.lanes.contains_key(&id) {
            while self.lanes.len() >= MOST_LANES || self.labels + size > room {
                let Some((_, least)) = self.by_demand.first().copied() else { return };
                self.forget(&least);
            }
            self.lanes_made += 1;
            self.labels += size;
            self.by_demand.insert((Demand::NONE, id));
            let lane = Lane {
                label: label(),
                label_size: size,
                number: self.lanes_made,
                ready: BinaryHeap::new(),
                held: 0,
                coming: 0,
                item_size: 0,
                demand: Demand::NONE,
                rests_until: None,
                lacks: None,
                holds: None,
            };
            self.lanes.insert(id, lane);
        }
        let Some(lane) = self.lanes.get_mut(&id) else { return };
        self.by_demand.remove(&(lane.demand, id));
        lane.demand = lane.demand.plus(machines, half_lives);
        self.by_demand.insert((lane.demand, id));
        self.place(&id, now);
    }

    /// The item of a lane that expires first.
    pub(super) fn take(&mut self, id: &Id, now: Instant) -> Option<Picked<T>> {
        self.age(id, now, usize::MAX);
        let lane = self.lanes.get_mut(id)?;
        let item = lane.ready.pop()?;
        lane.held -= item.size;
        let number = lane.number;
        self.depth -= 1;
        self.size -= item.size;
        self.place(id, now);
        Some(Picked { item, id: *id, number })
    }

    /// Puts back an item that was taken.
    pub(super) fn put_back(&mut self, picked: Picked<T>, now: Instant) {
        let Picked { item, id, number } = picked;
        self.put_in(&id, number, item, now);
    }

    /// The next item to make, if there is room for it within `limit` bytes.
    pub(super) fn order(&mut self, limit: usize, now: Instant) -> Option<Ticket> {
        while let Some((until, id)) = self.resting.front().copied() {
            if now < until {
                break;
            }
            self.resting.pop_front();
            self.place(&id, now);
        }
        if limit == 0 {
            return None;
        }
        loop {
            let (level, id) = self.lacking.first().copied()?;
            let lane = self.lanes.get(&id)?;
            let guess = self.size.checked_div(self.depth).unwrap_or(FIRST_GUESS.min(limit));
            let reserved = if lane.item_size > 0 { lane.item_size } else { guess };
            if reserved > limit {
                // The items of other lanes may be smaller.
                self.rest(&id, now);
                continue;
            }
            while self.size + self.ordered + reserved > limit {
                let (most, richest) = self.holding.last().copied()?;
                let item = self.lanes.get(&richest)?.ready.peek().map_or(0, |item| item.size);
                if richest == id || most.saturating_sub(item) < level + reserved {
                    return None;
                }
                self.drop_one(&richest, now);
            }
            let lane = self.lanes.get_mut(&id)?;
            lane.coming += 1;
            self.ordered += reserved;
            let number = lane.number;
            self.place(&id, now);
            return Some(Ticket { id, number, reserved });
        }
    }

    /// Adds an item that was ordered. It has `size` bytes and may be given out until `ends`.
    pub(super) fn put(&mut self, ticket: &Ticket, value: T, size: usize, ends: Instant, now: Instant) {
        if let Some(lane) = self.lanes.get_mut(&ticket.id) {
            lane.item_size = size;
        }
        self.put_in(&ticket.id, ticket.number, Item { value, size, ends }, now);
    }

    /// Ends an order. If it failed, its lane rests for a while.
    pub(super) fn finished(&mut self, ticket: &Ticket, failed: bool, now: Instant) {
        self.ordered -= ticket.reserved;
        let Some(lane) = self.lanes.get_mut(&ticket.id).filter(|lane| lane.number == ticket.number) else { return };
        lane.coming -= 1;
        if failed {
            self.rest(&ticket.id, now);
        } else {
            self.place(&ticket.id, now);
        }
    }

    /// Drops all items.
    pub(super) fn clear(&mut self, now: Instant) {
        for id in self.lanes.keys().copied().collect::<Vec<_>>() {
            self.empty(&id);
            self.place(&id, now);
        }
    }

    /// Examines a part of the lanes: drops items that have waited too long or exceed `limit` bytes, and forgets lanes
    /// without demand. Does at most `steps` steps; the next call continues. Returns `true` when all lanes were
    /// examined.
    pub(super) fn sweep(&mut self, limit: usize, mut steps: usize, now: Instant) -> bool {
        while self.size > limit && steps > 0 {
            let Some((_, richest)) = self.holding.last().copied() else { break };
            self.drop_one(&richest, now);
            steps -= 1;
        }
        if self.unswept.is_empty() {
            self.unswept.extend(self.lanes.keys());
        }
        let half_lives = self.half_lives(now);
        while steps > 0
            && let Some(id) = self.unswept.last().copied()
        {
            steps -= self.age(&id, now, steps);
            if steps == 0 {
                // The lane may have more such items.
                return false;
            }
            steps -= 1;
            self.unswept.pop();
            // The lane may no longer exist.
            match self.lanes.get(&id) {
                Some(lane) if lane.demand.machines(half_lives) < LEAST_DEMAND => self.forget(&id),
                // The number of items that the lane wants falls with its demand.
                _ => self.place(&id, now),
            }
        }
        self.unswept.is_empty()
    }

    /// The labels of all lanes and their machines, in descending order of the machines.
    pub(super) fn demands(&self, most: usize, now: Instant) -> Vec<(&L, f64)> {
        let half_lives = self.half_lives(now);
        let lanes = self.by_demand.iter().rev().take(most).filter_map(|(_, id)| self.lanes.get(id));
        lanes.map(|lane| (&lane.label, lane.demand.machines(half_lives))).collect()
    }

    fn half_lives(&self, now: Instant) -> f64 {
        now.saturating_duration_since(self.epoch).as_secs_f64() / HALF_LIFE.as_secs_f64()
    }

    fn put_in(&mut self, id: &Id, number: u64, item: Item<T>, now: Instant) {
        let Some(lane) = self.lanes.get_mut(id).filter(|lane| lane.number == number) else {
            self.gone.dropped.push(item.value);
            return;
        };
        lane.held += item.size;
        self.depth += 1;
        self.size += item.size;
        lane.ready.push(item);
        self.place(id, now);
    }

    /// Drops up to `most` items of a lane that have waited too long. Returns their number.
    fn age(&mut self, id: &Id, now: Instant, most: usize) -> usize {
        let Some(lane) = self.lanes.get_mut(id) else { return 0 };
        let mut aged = 0;
        while aged < most
            && lane.ready.peek().is_some_and(|item| item.ends <= now)
            && let Some(item) = lane.ready.pop()
        {
            aged += 1;
            lane.held -= item.size;
            self.depth -= 1;
            self.size -= item.size;
            self.gone.aged.push(item.value);
        }
        if aged > 0 {
            self.place(id, now);
        }
        aged
    }

    fn drop_one(&mut self, id: &Id, now: Instant) {
        let Some(lane) = self.lanes.get_mut(id) else { return };
        if let Some(item) = lane.ready.pop() {
            lane.held -= item.size;
            self.depth -= 1;
            self.size -= item.size;
            self.gone.dropped.push(item.value);
        }
        self.place(id, now);
    }

    fn empty(&mut self, id: &Id) {
        let Some(lane) = self.lanes.get_mut(id) else { return };
        self.depth -= lane.ready.len();
        self.size -= std::mem::take(&mut lane.held);
        self.gone.dropped.extend(lane.ready.drain().map(|item| item.value));
    }

    fn forget(&mut self, id: &Id) {
        self.empty(id);
        let Some(lane) = self.lanes.remove(id) else { return };
        self.labels -= lane.label_size;
        self.by_demand.remove(&(lane.demand, *id));
        lane.lacks.map(|level| self.lacking.remove(&(level, *id)));
        lane.holds.map(|held| self.holding.remove(&(held, *id)));
    }

    fn rest(&mut self, id: &Id, now: Instant) {
        let until = now + REST;
        if let Some(lane) = self.lanes.get_mut(id) {
            lane.rests_until = Some(until);
            self.resting.push_back((until, *id));
            self.place(id, now);
        }
    }

    /// Puts a lane into its position in the ordered lists. To be called after any change to the lane.
    fn place(&mut self, id: &Id, now: Instant) {
        let half_lives = self.half_lives(now);
        let Some(lane) = self.lanes.get_mut(id) else { return };
        // For three machines, the logarithm may give slightly more than three.
        let wanted = (lane.demand.machines(half_lives) - 1e-6).ceil();
        let rests = lane.rests_until.is_some_and(|until| now < until);
        let lacks = !rests && ((lane.ready.len() + lane.coming) as f64) < wanted;
        let lacks = lacks.then(|| lane.held + lane.coming * lane.item_size);
        let holds = (lane.held > 0).then_some(lane.held);
        if lane.lacks != lacks {
            lane.lacks.map(|level| self.lacking.remove(&(level, *id)));
            lacks.map(|level| self.lacking.insert((level, *id)));
            lane.lacks = lacks;
        }
        if lane.holds != holds {
            lane.holds.map(|held| self.holding.remove(&(held, *id)));
            holds.map(|held| self.holding.insert((held, *id)));
            lane.holds = holds;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SIZE: usize = 10;
    const ROOM: usize = 1 << 20;
    const LIFETIME: Duration = Duration::from_secs(600);

    struct Scene {
        shelf: Shelf<u8, u32>,
        now: Instant,
        made: u32,
        dropped: usize,
        aged: usize,
    }

    fn id(lane: u8) -> Id {
        [lane; 32]
    }

    impl Scene {
        fn new() -> Self {
            let now = Instant::now();
            Self { shelf: Shelf::new(now), now, made: 0, dropped: 0, aged: 0 }
        }

        fn asked(&mut self, lane: u8, machines: f64) {
            self.shelf.asked(id(lane), machines, (100, ROOM), || lane, self.now);
        }

        /// Makes items of `size` bytes until none is ordered. Returns the number of items made.
        fn fill(&mut self, limit: usize, size: impl Fn(u8) -> usize) -> u32 {
            let before = self.made;
            while let Some(ticket) = self.shelf.order(limit, self.now) {
                self.made += 1;
                assert!(self.made < 100_000, "it never ends");
                let ends = self.now + LIFETIME;
                self.shelf.put(&ticket, self.made, size(ticket.id[0]), ends, self.now);
                self.shelf.finished(&ticket, false, self.now);
                self.count();
            }
            self.made - before
        }

        fn count(&mut self) {
            let gone = self.shelf.gone();
            self.dropped += gone.dropped.len();
            self.aged += gone.aged.len();
        }

        fn items<const N: usize>(&self, lanes: [u8; N]) -> [usize; N] {
            lanes.map(|lane| self.shelf.lanes.get(&id(lane)).map_or(0, |lane| lane.ready.len()))
        }

        /// Checks that the ordered lists and sums agree with the lanes.
        fn check(&self) {
            let shelf = &self.shelf;
            let sum = |of: fn(&Lane<u8, u32>) -> usize| shelf.lanes.values().map(of).sum::<usize>();
            assert_eq!(shelf.depth, sum(|lane| lane.ready.len()));
            assert_eq!(shelf.size, sum(|lane| lane.held));
            assert_eq!(shelf.size, sum(|lane| lane.ready.iter().map(|item| item.size).sum()));
            assert_eq!(shelf.labels, sum(|lane| lane.label_size));
            assert_eq!(shelf.by_demand.len(), shelf.lanes.len());
            assert_eq!(shelf.holding.len(), sum(|lane| usize::from(lane.held > 0)));
            assert_eq!(shelf.lacking.len(), sum(|lane| usize::from(lane.lacks.is_some())));
            assert!(shelf.by_demand.iter().all(|(demand, id)| shelf.lanes[id].demand == *demand));
        }
    }

    #[test]
    fn memory_is_shared_equally_up_to_what_each_set_can_use() {
        let mut scene = Scene::new();
        for (lane, machines) in [(1, 100_000.0), (2, 60.0), (3, 5.0), (4, 20.0)] {
            scene.asked(lane, machines);
        }
        scene.fill(100 * SIZE, |_| SIZE);
        let [one, two, three, four] = scene.items([1, 2, 3, 4]);
        assert_eq!((three, four, one + two), (5, 20, 75), "who wants less than the share has what it wants");
        assert!(one.abs_diff(two) <= 1, "{one} and {two}");
        assert_eq!(scene.dropped, 0);
        scene.check();
    }

    #[test]
    fn an_owner_whose_machine_loops_takes_nothing_from_the_others() {
        let mut scene = Scene::new();
        for lane in 1..=4 {
            scene.asked(lane, 40.0);
        }
        scene.fill(100 * SIZE, |_| SIZE);
        for _ in 0..10_000 {
            assert!(scene.shelf.take(&id(1), scene.now).is_some());
            scene.asked(1, 1.0);
            scene.fill(100 * SIZE, |_| SIZE);
        }
        assert_eq!(scene.items([1, 2, 3, 4]), [25; 4]);
        assert_eq!((scene.dropped, scene.made), (0, 100 + 10_000), "each item of its own was replaced, no other one");
        scene.check();
    }

    #[test]
    fn a_set_that_comes_later_gets_its_share_and_then_nothing_moves() {
        let mut scene = Scene::new();
        scene.asked(1, 1e6);
        assert_eq!(scene.fill(100 * SIZE, |_| SIZE), 100);
        scene.asked(2, 1e6);
        scene.asked(3, 7.0);
        assert_eq!(scene.fill(100 * SIZE, |_| SIZE), 46 + 7);
        assert_eq!((scene.items([1, 2, 3]), scene.dropped), ([47, 46, 7], 53));
        assert_eq!(scene.fill(100 * SIZE, |_| SIZE), 0);
        scene.check();
    }

    #[test]
    fn a_set_with_large_items_gets_as_many_bytes_and_not_as_many_items() {
        let mut scene = Scene::new();
        let size = |lane| if lane == 1 { 10 * SIZE } else { SIZE };
        scene.asked(1, 1e6);
        scene.asked(2, 1e6);
        scene.fill(400 * SIZE, size);
        let [large, small] = scene.items([1, 2]);
        assert!((19..=20).contains(&large) && (190..=210).contains(&small), "{large} and {small}");
        // A lane whose item does not fit does not keep the other lanes from getting items.
        let mut scene = Scene::new();
        scene.asked(1, 1e6);
        scene.asked(2, 3.0);
        scene.shelf.lanes.get_mut(&id(1)).unwrap().item_size = 1_000;
        scene.shelf.lanes.get_mut(&id(2)).unwrap().item_size = SIZE;
        scene.fill(100, size);
        assert_eq!(scene.items([1, 2]), [0, 3]);
        scene.check();
    }

    #[test]
    fn a_lane_whose_item_cannot_be_made_rests_and_the_others_go_on() {
        let mut scene = Scene::new();
        scene.asked(1, 3.0);
        scene.asked(2, 3.0);
        let first = scene.shelf.order(ROOM, scene.now).unwrap();
        scene.shelf.finished(&first, true, scene.now);
        let failed = first.id[0];
        assert_eq!(scene.fill(ROOM, |_| SIZE), 3);
        assert_eq!(scene.items([failed, 3 - failed]), [0, 3]);
        scene.now += REST;
        assert_eq!(scene.fill(ROOM, |_| SIZE), 3);
        scene.check();
    }

    #[test]
    fn what_ends_first_is_taken_first_and_what_has_ended_is_not() {
        let mut scene = Scene::new();
        scene.asked(1, 4.0);
        let begun = scene.now;
        for seconds in [30, 10, 40, 20] {
            let ticket = scene.shelf.order(ROOM, begun).unwrap();
            scene.shelf.put(&ticket, seconds, SIZE, begun + Duration::from_secs(seconds.into()), begun);
            scene.shelf.finished(&ticket, false, begun);
        }
        let picked = scene.shelf.take(&id(1), begun).unwrap();
        assert_eq!(picked.item.value, 10);
        scene.shelf.put_back(picked, begun);
        let now = begun + Duration::from_secs(20);
        assert_eq!(scene.shelf.take(&id(1), now).map(|picked| picked.item.value), Some(30));
        assert_eq!(scene.shelf.gone().aged, [10, 20]);
        assert!(scene.shelf.take(&id(1), begun + Duration::from_secs(40)).is_none());
        scene.check();
    }

    #[test]
    fn a_sweep_is_done_in_parts_and_leaves_nothing_out() {
        let mut scene = Scene::new();
        for lane in 1..=50 {
            scene.asked(lane, 4.0);
        }
        scene.asked(51, 0.3);
        scene.fill(ROOM, |_| SIZE);
        let sweep = |scene: &mut Scene, limit: usize| {
            let mut parts = 1;
            while !scene.shelf.sweep(limit, 10, scene.now) {
                let gone = scene.shelf.gone();
                assert!(gone.aged.len() + gone.dropped.len() <= 10);
                scene.aged += gone.aged.len();
                scene.dropped += gone.dropped.len();
                parts += 1;
                assert!(parts < 1_000, "it never ends");
            }
            scene.count();
            parts
        };
        assert_eq!(sweep(&mut scene, ROOM), 6, "51 lanes by tens");
        assert_eq!((scene.aged, scene.dropped), (0, 0));
        sweep(&mut scene, 101 * SIZE);
        assert_eq!((scene.shelf.depth, scene.dropped), (101, 100));
        assert!(scene.items([1, 2, 3]).iter().all(|items| (2..=3).contains(items)), "all give alike");
        scene.now += LIFETIME;
        assert!(sweep(&mut scene, ROOM) > 10);
        assert_eq!((scene.shelf.depth, scene.aged), (0, 101));
        scene.check();
        // A set without demand is forgotten.
        scene.now += HALF_LIFE;
        sweep(&mut scene, ROOM);
        assert_eq!(scene.shelf.lanes.len(), 50);
        scene.now += HALF_LIFE * 4;
        sweep(&mut scene, ROOM);
        assert!(scene.shelf.lanes.is_empty());
        scene.check();
    }

    #[test]
    fn the_lane_that_is_asked_for_least_makes_room() {
        let mut scene = Scene::new();
        for lane in 0..MOST_LANES + 1 {
            let mut id = [0; 32];
            id[..8].copy_from_slice(&lane.to_be_bytes());
            let machines = if lane == 7 { 1.0 } else { 2.0 };
            scene.shelf.asked(id, machines, (1, ROOM), || 0, scene.now);
        }
        assert_eq!(scene.shelf.lanes.len(), MOST_LANES);
        assert!(!scene.shelf.lanes.keys().any(|id| id[..8] == 7_usize.to_be_bytes()));
        scene.check();
        // The limit is in bytes: there is room for two labels.
        let mut scene = Scene::new();
        for (lane, machines) in [(1, 5.0), (2, 1.0), (3, 3.0)] {
            scene.shelf.asked(id(lane), machines, (100, 200), || lane, scene.now);
        }
        let demands = scene.shelf.demands(9, scene.now);
        assert_eq!(demands.iter().map(|(label, _)| **label).collect::<Vec<_>>(), [1, 3]);
        assert!((demands[0].1 - 5.0).abs() < 1e-9);
        scene.now += HALF_LIFE;
        assert!((scene.shelf.demands(1, scene.now)[0].1 - 2.5).abs() < 1e-9);
        scene.check();
    }

    #[test]
    fn an_item_for_a_lane_that_is_gone_stays_out() {
        let mut scene = Scene::new();
        scene.asked(1, 2.0);
        scene.fill(ROOM, |_| SIZE);
        let picked = scene.shelf.take(&id(1), scene.now).unwrap();
        let ticket = scene.shelf.order(ROOM, scene.now).unwrap();
        scene.shelf.forget(&id(1));
        scene.asked(1, 2.0);
        assert!(scene.shelf.label(&ticket).is_none());
        scene.shelf.put(&ticket, 7, SIZE, scene.now + LIFETIME, scene.now);
        scene.shelf.finished(&ticket, false, scene.now);
        scene.shelf.put_back(picked, scene.now);
        assert_eq!((scene.shelf.depth, scene.shelf.ordered), (0, 0));
        assert_eq!(scene.shelf.gone().dropped.len(), 3);
        assert_eq!(scene.fill(ROOM, |_| SIZE), 2);
        scene.check();
    }
}
