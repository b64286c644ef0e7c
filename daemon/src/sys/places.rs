//! The places for connections: their number, and which connection is closed if there is none left.
//!
//! At the limit, a connection of the group with the most connections is closed: the one that has waited longest, for its
//! client or for its turn. A group is an address, or a user at the administrators' sockets. Connections with work in progress are
//! never closed. A new connection waits only if all connections have work in progress.
//!
//! A connection waits for its turn when its group has used up its share of processor time. Then a new connection of its own group
//! does not take its place: whoever comes back the fastest would be the only one that ever has a turn.
//!
//! [`Places`] is a plain value; its callers wait and wake.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Most connections that were told to close and are still open: the limit may be exceeded by this number for a moment.
pub(crate) const LEAVING: usize = 16;

/// Number of victims that one search finds. A search visits every connection, so it must not run for each arrival.
const FOUND: usize = 64;

/// How long after a search in vain a group is not searched again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Minimum time for which a connection may wait for its client before it is closed: during a flood of connections, a
/// correct client needs a moment to send its request.
pub(crate) const GRACE: Duration = Duration::from_millis(100);

/// The same for a connection of a group that has used up its share of processor time.
const GRACE_IN_DEBT: Duration = Duration::from_secs(1);

/// A connection, as [`Places`] sees it.
pub(crate) trait Guest: Clone {
    /// Since when the connection has waited for its client; `None` while work is in progress.
    fn waiting_since(&self) -> Option<Instant>;

    /// Since when the connection has waited for its turn, because its group has used up its share.
    fn in_line_since(&self) -> Option<Instant> {
        None
    }

    /// Tells the connection to close.
    fn ask_to_leave(&self);
}

/// Why there is no place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NoPlace {
    /// All connections have work in progress. One of them may end at any moment.
    Full,
    /// Too many connections that were told to close are still open, or all candidates have just arrived.
    Leaving,
    /// The group has reached its limit, and all of its connections have work in progress.
    Group,
}

/// The open connections.
pub(crate) struct Places<K, G> {
    limit: usize,
    per_group: usize,
    grace: Duration,
    groups: HashMap<K, Group<G>>,
    /// Number of connections that were not told to close.
    staying: usize,
    leaving: usize,
    next: u64,
    /// Of the last search of each kind, so that none spoils what another found.
    found: [Found<K>; 3],
}

struct Group<G> {
    seats: HashMap<u64, Seat<G>>,
    staying: usize,
    /// When nobody was found in it who may have to close.
    searched_in_vain: Option<Instant>,
}

struct Seat<G> {
    guest: G,
    leaving: bool,
}

/// Which connections may have to close for a new one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Among<K> {
    /// Those of this group that wait for their client.
    Group(K),
    /// Those of this group that have waited for their client for long. It has used up its share of processor time, so they have
    /// waited for a turn, and others of the group have to wait anyway.
    GroupInDebt(K),
    /// Those that wait for their client or for their turn.
    All,
}

impl<K: Eq> Among<K> {
    /// Which of the searches it is.
    fn kind(&self) -> usize {
        match self {
            Self::Group(_) => 0,
            Self::GroupInDebt(_) => 1,
            Self::All => 2,
        }
    }

    fn is_searched(&self, group: &K) -> bool {
        match self {
            Self::Group(only) | Self::GroupInDebt(only) => only == group,
            Self::All => true,
        }
    }

    /// Since when a connection has waited, if it may have to close.
    fn since(&self, guest: &impl Guest) -> Option<Instant> {
        let in_line = || matches!(self, Self::All).then(|| guest.in_line_since()).flatten();
        guest.waiting_since().or_else(in_line)
    }
}

/// The result of a search; the first victim is last.
struct Found<K> {
    among: Among<K>,
    victims: Vec<(K, u64, Instant)>,
    /// The victims' groups had more connections than this number, which is the size of the next largest group.
    next_largest: usize,
}

impl<K: Copy + Eq + Hash, G: Guest> Places<K, G> {
    /// Creates at least one place in total, and `per_group` places for each group; 0 is no limit. A connection is
    /// closed only after it has waited for its client for `grace`.
    pub(crate) fn new(limit: usize, per_group: usize, grace: Duration) -> Self {
        Self {
            limit: limit.max(1),
            per_group: if per_group == 0 { usize::MAX } else { per_group },
            grace,
            groups: HashMap::new(),
            staying: 0,
            leaving: 0,
            next: 0,
            found: std::array::from_fn(|_| Found { among: Among::All, victims: Vec::new(), next_largest: 0 }),
        }
    }

    /// Takes a place for a connection of `group`; another connection may have to close for it. Returns the place's
    /// number, and whether one had to close.
    pub(crate) fn arrive(&mut self, group: K, guest: &G, now: Instant) -> Result<(u64, bool), NoPlace> {
        self.take(group, guest, Among::All, now)
    }

    /// The same for a group that has used up its share of processor time: only a connection of its own has to close.
    pub(crate) fn arrive_in_debt(&mut self, group: K, guest: &G, now: Instant) -> Result<(u64, bool), NoPlace> {
        self.take(group, guest, Among::GroupInDebt(group), now)
    }

    fn take(&mut self, group: K, guest: &G, among: Among<K>, now: Instant) -> Result<(u64, bool), NoPlace> {
        let of_group = self.groups.get(&group).map_or(0, |group| group.staying);
        let mut made_room = false;
        if of_group >= self.per_group {
            // A group at its own limit never makes others wait.
            self.dismiss(Among::Group(group), NoPlace::Group, now).map_err(|_| NoPlace::Group)?;
            made_room = true;
        }
        if self.staying >= self.limit {
            self.dismiss(among, NoPlace::Full, now)?;
            made_room = true;
        }
        let id = self.next;
        self.next += 1;
        let of_group = self.groups.entry(group).or_insert_with(|| Group {
            seats: HashMap::new(),
            staying: 0,
            searched_in_vain: None,
        });
        of_group.seats.insert(id, Seat { guest: guest.clone(), leaving: false });
        of_group.staying += 1;
        self.staying += 1;
        Ok((id, made_room))
    }

    /// Gives a place back.
    pub(crate) fn leave(&mut self, group: K, id: u64) {
        let Some(of_group) = self.groups.get_mut(&group) else { return };
        let Some(seat) = of_group.seats.remove(&id) else { return };
        if seat.leaving {
            self.leaving -= 1;
        } else {
            of_group.staying -= 1;
            self.staying -= 1;
        }
        if of_group.seats.is_empty() {
            self.groups.remove(&group);
        }
    }

    /// A connection that was told to close has new work and stays. The limit may be exceeded by one then.
    pub(crate) fn stay(&mut self, group: K, id: u64) {
        let Some(of_group) = self.groups.get_mut(&group) else { return };
        let Some(seat) = of_group.seats.get_mut(&id) else { return };
        if std::mem::take(&mut seat.leaving) {
            of_group.staying += 1;
            self.staying += 1;
            self.leaving -= 1;
        }
    }

    /// Tells a connection to close. `without` is the error if all have work in progress.
    fn dismiss(&mut self, among: Among<K>, without: NoPlace, now: Instant) -> Result<(), NoPlace> {
        if self.leaving >= LEAVING {
            return Err(NoPlace::Leaving);
        }
        // Newcomers that are refused do not have all connections of their group looked at each time.
        if let Among::Group(group) | Among::GroupInDebt(group) = among {
            let vain = self.groups.get(&group).and_then(|group| group.searched_in_vain);
            if vain.is_some_and(|at| now < at + LOOK_AGAIN) {
                return Err(without);
            }
        }
        if !self.dismiss_found(among) {
            let waits = self.search(among, now);
            if !self.dismiss_found(among) {
                return Err(if waits { NoPlace::Leaving } else { without });
            }
        }
        Ok(())
    }

    /// Takes the next victim of the last search that is still valid.
    fn dismiss_found(&mut self, among: Among<K>) -> bool {
        let found = &mut self.found[among.kind()];
        if found.among != among {
            return false;
        }
        while let Some((group, id, since)) = found.victims.pop() {
            let Some(of_group) = self.groups.get_mut(&group) else { continue };
            if among == Among::All && of_group.staying <= found.next_largest {
                // Another group has the same number of connections by now.
                found.victims.clear();
                return false;
            }
            let Some(seat) = of_group.seats.get_mut(&id) else { continue };
            if seat.leaving || among.since(&seat.guest) != Some(since) {
                continue;
            }
            seat.leaving = true;
            seat.guest.ask_to_leave();
            of_group.staying -= 1;
            self.staying -= 1;
            self.leaving += 1;
            return true;
        }
        false
    }

    /// Finds the next victims. Returns whether some connections are waiting for their clients and will soon be
    /// candidates.
    fn search(&mut self, among: Among<K>, now: Instant) -> bool {
        let mut largest = 0;
        let mut next_largest = 0;
        let mut victims = Vec::new();
        let mut others_wait = false;
        let grace = if matches!(among, Among::GroupInDebt(_)) { GRACE_IN_DEBT } else { self.grace };
        for (group, of_group) in self.groups.iter().filter(|(group, _)| among.is_searched(group)) {
            if of_group.staying < largest {
                next_largest = next_largest.max(of_group.staying);
                continue;
            }
            let waiting = of_group.seats.iter().filter(|(_, seat)| !seat.leaving);
            let before = victims.len();
            for (id, seat) in waiting {
                match among.since(&seat.guest) {
                    Some(since) if since + grace <= now => victims.push((*group, *id, since)),
                    Some(_) => others_wait = true,
                    None => {}
                }
            }
            if of_group.staying > largest && victims.len() > before {
                victims.drain(..before);
                next_largest = next_largest.max(largest);
                largest = of_group.staying;
            }
        }
        if victims.len() > FOUND {
            victims.select_nth_unstable_by_key(FOUND, |(.., since)| *since);
            victims.truncate(FOUND);
        }
        victims.sort_unstable_by_key(|(.., since)| std::cmp::Reverse(*since));
        if let Among::Group(group) | Among::GroupInDebt(group) = among
            && let Some(group) = self.groups.get_mut(&group)
        {
            group.searched_in_vain = victims.is_empty().then_some(now);
        }
        self.found[among.kind()] = Found { among, victims, next_largest };
        others_wait
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;
    use std::time::Duration;

    #[derive(Clone)]
    struct Client(Rc<State>);

    #[derive(Default)]
    struct State {
        waiting: Cell<Option<Instant>>,
        in_line: Cell<Option<Instant>>,
        told: Cell<bool>,
        looked_at: Cell<usize>,
    }

    impl Guest for Client {
        fn waiting_since(&self) -> Option<Instant> {
            self.0.looked_at.update(|times| times + 1);
            self.0.waiting.get()
        }

        fn in_line_since(&self) -> Option<Instant> {
            self.0.in_line.get()
        }

        fn ask_to_leave(&self) {
            self.0.told.set(true);
        }
    }

    impl Client {
        /// A client that has waited since `since` milliseconds after `begun`.
        fn waiting(begun: Instant, since: u64) -> Self {
            let waiting = Cell::new(Some(begun + Duration::from_millis(since)));
            Self(Rc::new(State { waiting, ..State::default() }))
        }

        fn is_leaving(&self) -> bool {
            self.0.told.get()
        }

        fn work(&self) {
            self.0.waiting.set(None);
        }

        fn stand_in_line(&self) {
            self.0.in_line.set(self.0.waiting.take());
        }
    }

    #[test]
    fn at_the_limit_the_longest_idle_of_the_largest_group_leaves() {
        let begun = Instant::now();
        let later = begun + Duration::from_secs(60);
        let mut places = Places::new(4, 0, GRACE);
        // The oldest connection is the only one of its client.
        let honest = Client::waiting(begun, 0);
        places.arrive("honest", &honest, later).unwrap();
        let silent: Vec<_> = (1..=3).map(|since| Client::waiting(begun, since)).collect();
        let ids: Vec<_> = silent.iter().map(|client| places.arrive("silent", client, later).unwrap()).collect();
        assert!(ids.iter().all(|(_, made_room)| !made_room));
        let newcomer = Client::waiting(begun, 9);
        assert!(places.arrive("honest", &newcomer, later).unwrap().1);
        assert_eq!([true, false, false], [0, 1, 2].map(|at: usize| silent[at].is_leaving()));
        places.leave("silent", ids[0].0);
        // Both have two connections now; the larger groups have been reduced.
        assert!(places.arrive("third", &Client::waiting(begun, 10), later).unwrap().1);
        assert!(silent[1].is_leaving() && !honest.is_leaving());
        // From here on, the honest client has the most connections.
        assert!(places.arrive("third", &Client::waiting(begun, 11), later).unwrap().1);
        assert!(honest.is_leaving() && !silent[2].is_leaving() && !newcomer.is_leaving());
    }

    #[test]
    fn a_connection_that_is_worked_for_is_never_closed() {
        let begun = Instant::now();
        let later = begun + Duration::from_secs(60);
        let mut places = Places::new(2, 0, GRACE);
        let (one, two) = (Client::waiting(begun, 0), Client::waiting(begun, 1));
        let (first, _) = places.arrive(1, &one, later).unwrap();
        places.arrive(1, &two, later).unwrap();
        one.work();
        two.work();
        let newcomer = Client::waiting(begun, 2);
        assert_eq!(places.arrive(2, &newcomer, later), Err(NoPlace::Full));
        places.leave(1, first);
        assert!(!places.arrive(2, &newcomer, later).unwrap().1);
        // The largest group has no candidate, so the other group loses a connection.
        let mut places = Places::new(3, 0, GRACE);
        let newcomer = Client::waiting(begun, 2);
        places.arrive(1, &one, later).unwrap();
        places.arrive(1, &two, later).unwrap();
        places.arrive(2, &newcomer, later).unwrap();
        assert!(places.arrive(1, &Client::waiting(begun, 3), later).unwrap().1);
        assert!(newcomer.is_leaving());
    }

    #[test]
    fn a_group_has_a_limit_of_its_own() {
        let begun = Instant::now();
        let later = begun + Duration::from_secs(60);
        let mut places = Places::new(100, 2, GRACE);
        let (one, two) = (Client::waiting(begun, 1), Client::waiting(begun, 0));
        places.arrive(1, &one, later).unwrap();
        places.arrive(1, &two, later).unwrap();
        places.arrive(2, &Client::waiting(begun, 2), later).unwrap();
        assert!(places.arrive(1, &Client::waiting(begun, 3), later).unwrap().1);
        assert!(two.is_leaving() && !one.is_leaving());
        let mut places = Places::new(100, 1, GRACE);
        one.work();
        places.arrive(1, &one, later).unwrap();
        assert_eq!(places.arrive(1, &two, later), Err(NoPlace::Group));
        assert!(places.arrive(2, &two, later).is_ok());
    }

    #[test]
    fn who_waits_for_a_turn_gives_way_to_others_and_not_to_a_group_in_debt() {
        let begun = Instant::now();
        let later = begun + Duration::from_secs(60);
        let mut places = Places::new(3, 0, GRACE);
        let [one, two, other] = [0, 1, 0].map(|since| Client::waiting(begun, since));
        places.arrive(1, &one, later).unwrap();
        places.arrive(1, &two, later).unwrap();
        places.arrive(9, &other, later).unwrap();
        one.stand_in_line();
        two.stand_in_line();
        let newcomer = Client::waiting(begun, 2);
        assert_eq!(places.arrive_in_debt(1, &newcomer, later), Err(NoPlace::Full));
        assert!(places.arrive(2, &newcomer, later).unwrap().1);
        assert!(one.is_leaving() && !two.is_leaving() && !other.is_leaving());
        // Nor does it at the limit of its group.
        let mut places = Places::new(100, 1, GRACE);
        places.arrive(1, &two, later).unwrap();
        assert_eq!(places.arrive(1, &newcomer, later), Err(NoPlace::Group));
    }

    #[test]
    fn newcomers_that_are_refused_cost_no_search_each() {
        let begun = Instant::now();
        let later = begun + Duration::from_secs(60);
        let newcomer = || Client::waiting(begun, 1);
        let mut places = Places::new(100, 50, GRACE);
        let groups = [1, 2].map(|group| {
            let clients: Vec<_> = (0..50).map(|since| Client::waiting(begun, since)).collect();
            for client in &clients {
                client.stand_in_line();
                places.arrive(group, client, later).unwrap();
            }
            clients
        });
        let looked_at = || groups.iter().flatten().map(|client| client.0.looked_at.get()).sum::<usize>();
        places.arrive(3, &newcomer(), later).unwrap();
        // The other group is still at its limit.
        let full = if groups[0].iter().any(Client::is_leaving) { 2 } else { 1 };
        let before = looked_at();
        for _ in 0..1_000 {
            assert_eq!(places.arrive(full, &newcomer(), later), Err(NoPlace::Group));
        }
        assert!(looked_at() <= before + 50, "{}", looked_at() - before);
        let before = looked_at();
        assert_eq!(places.arrive(full, &newcomer(), later + LOOK_AGAIN), Err(NoPlace::Group));
        assert_eq!(looked_at(), before + 50, "after a while they are looked at again");
        // What was found for all groups remains found.
        let before = looked_at();
        assert!(places.arrive(3, &newcomer(), later).unwrap().1);
        assert!(looked_at() <= before + 2, "{}", looked_at() - before);
    }

    #[test]
    fn who_found_something_to_do_stays_and_counts() {
        let begun = Instant::now();
        let later = begun + Duration::from_secs(60);
        let mut places = Places::new(1, 0, GRACE);
        let one = Client::waiting(begun, 0);
        let (first, _) = places.arrive(1, &one, later).unwrap();
        let (second, _) = places.arrive(2, &Client::waiting(begun, 1), later).unwrap();
        assert!(one.is_leaving());
        one.work();
        places.stay(1, first);
        // Two of the same group were told to close: when the second one closes, no place becomes free.
        places.leave(2, second);
        assert_eq!(places.arrive(2, &Client::waiting(begun, 2), later), Err(NoPlace::Full));
        places.leave(1, first);
        assert!(places.arrive(2, &Client::waiting(begun, 2), later).is_ok());
        assert_eq!((places.staying, places.leaving, places.groups.len()), (1, 0, 1));
    }

    #[test]
    fn a_flood_of_newcomers_moves_the_flood_and_counts_right() {
        let begun = Instant::now();
        let later = begun + Duration::from_secs(60);
        let mut places = Places::new(500, 0, GRACE);
        let mut open = HashMap::new();
        let honest: Vec<_> = (0..20).map(|since| Client::waiting(begun, since)).collect();
        for (number, client) in honest.iter().enumerate() {
            places.arrive(number % 10, client, later).unwrap();
        }
        for number in 0..20_000u64 {
            let client = Client::waiting(begun, 100 + number);
            let (id, _) = places.arrive(99, &client, later).unwrap();
            open.insert(id, client);
            open.retain(|id, client| {
                if client.is_leaving() {
                    places.leave(99, *id);
                }
                !client.is_leaving()
            });
        }
        assert_eq!((open.len(), places.staying, places.leaving), (480, 500, 0));
        assert!(honest.iter().all(|client| !client.is_leaving()));
    }

    #[test]
    fn a_connection_has_a_moment_to_say_what_it_wants() {
        let begun = Instant::now();
        let mut places = Places::new(1, 1, GRACE);
        let one = Client::waiting(begun, 0);
        places.arrive(1, &one, begun).unwrap();
        let newcomer = Client::waiting(begun, 10);
        for (group, refused) in [(1, NoPlace::Group), (2, NoPlace::Leaving)] {
            assert_eq!(places.arrive(group, &newcomer, begun + GRACE / 2), Err(refused));
        }
        assert!(places.arrive(2, &newcomer, begun + GRACE).unwrap().1);
        assert!(one.is_leaving());
    }
}
