//! Decides when refused callers should try again. Each of them is promised a place in time, and each place is
//! promised once.
//!
//! A refused caller gets a place behind all waiting requests and behind all places promised before, in the order in
//! which the hosts take turns. It is told to come earlier than its place by the time that the queue can cover. So the
//! HSMs have work even if the caller is late or the estimated rate was too low. A caller that asks again before its
//! time keeps its place, however often it asks.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::declined::LONGEST;
use super::lengths::Lengths;

/// The number of callers that are promised a place per second, divided by the estimated number of releases per
/// second. A caller that finds no room tries again, which costs little. If too few callers are told to come, the HSMs
/// are idle, and that time is lost.
const OVERBOOKED: f64 = 1.25;

/// Seconds after which a place may begin that is promised: longer than that nobody knows the pace. Callers that would get a
/// place after it are told a time between half of [`LONGEST`] and all of it.
const FARTHEST: u64 = 2 * LONGEST;

/// Seconds that are told as they are. Of a longer time a caller is told half, since many clients wait for up to twice as
/// long as they are told, so that they do not all come at once. A caller that comes early is told half of what is left.
const EXACT: u64 = 2;

/// Interval at which places in the past are forgotten.
const SWEEP: Duration = Duration::from_millis(500);

/// Maximum number of remembered places, of about 60 bytes each.
const MOST: usize = 262_144;

/// Maximum number of places of one host. A host may ask with ever other requests, and each of them would be another caller.
const MOST_OF_HOST: usize = 4_096;

/// What is ahead of a caller that is refused now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backlog {
    /// The number of waiting requests that run before its request.
    pub(super) ahead: usize,
    /// The time between the starts of two requests.
    pub(super) interval: Duration,
    /// The maximum time that a request may wait in the queue.
    pub(super) room: Duration,
}

/// The promised places. The key is the host and a hash of the request, which identifies the caller.
#[derive(Debug, Default)]
pub(super) struct Returns {
    hosts: HashMap<Arc<str>, Places>,
    lengths: Lengths,
    count: usize,
    swept: Option<Instant>,
    /// The number of callers that were told to try again without getting a place.
    unpromised: u64,
}

/// The places of one host.
#[derive(Debug, Default)]
struct Places {
    due: HashMap<u64, Instant>,
    /// The same, the next one first.
    in_order: BTreeSet<(Instant, u64)>,
}

impl Places {
    fn len(&self) -> usize {
        self.due.len()
    }

    /// Sets the time of a caller's place. Returns whether it is a new one.
    fn set(&mut self, request: u64, due: Instant) -> bool {
        let before = self.due.insert(request, due);
        if let Some(before) = before {
            self.in_order.remove(&(before, request));
        }
        self.in_order.insert((due, request));
        before.is_none()
    }

    /// Takes the next place. Returns whether there was one.
    fn take_next(&mut self) -> bool {
        self.in_order.pop_first().is_some_and(|(_, request)| self.due.remove(&request).is_some())
    }

    /// Takes the next place if its time has come.
    fn take_past(&mut self, now: Instant) -> bool {
        self.in_order.first().is_some_and(|(due, _)| *due <= now) && self.take_next()
    }
}

impl Returns {
    /// Returns the number of seconds after which a caller that is refused at `now` should try again.
    pub(super) fn tell(&mut self, host: &Arc<str>, request: u64, backlog: Backlog, now: Instant) -> u16 {
        self.sweep(now);
        let places = self.hosts.get(host);
        let known = places.and_then(|places| places.due.get(&request));
        if let Some(due) = known.filter(|due| **due > now) {
            return told((*due - now).as_secs() + 1);
        }
        let own = places.map_or(0, Places::len);
        // Without a place of its own it is spread as well.
        let may_have_place = known.is_some() || own < MOST_OF_HOST && self.count < MOST;
        // Each host with places has at most as many turns before this caller as the caller's own host.
        let place = backlog.ahead + self.lengths.up_to(own + 1) + 1;
        let begins = backlog.interval.mul_f64(place as f64 / OVERBOOKED);
        let comes = begins.saturating_sub(backlog.room / 2).as_secs();
        if may_have_place && comes <= FARTHEST {
            self.promise(host, request, now + Duration::from_secs(comes.max(1)));
            return told(comes);
        }
        self.unpromised += 1;
        let seconds = LONGEST - self.unpromised % (LONGEST / 2);
        if may_have_place {
            self.promise(host, request, now + Duration::from_secs(seconds));
        }
        seconds as u16
    }

    fn promise(&mut self, host: &Arc<str>, request: u64, due: Instant) {
        let places = self.hosts.entry(Arc::clone(host)).or_default();
        let length = places.len();
        if places.set(request, due) {
            self.lengths.grow(length);
            self.count += 1;
        }
    }

    /// A caller of `host` is let in. Which one is not looked at, since that would take a hash of its request: the host's next place
    /// is taken as its own.
    pub(super) fn let_in(&mut self, host: &Arc<str>) {
        let Some(places) = self.hosts.get_mut(host) else { return };
        if places.take_next() {
            self.lengths.shrink(places.len() + 1);
            self.count -= 1;
        }
        if places.len() == 0 {
            self.hosts.remove(host);
        }
    }

    /// Forgets places in the past.
    fn sweep(&mut self, now: Instant) {
        if self.swept.is_some_and(|swept| now.saturating_duration_since(swept) < SWEEP) {
            return;
        }
        self.swept = Some(now);
        let Self { hosts, lengths, count, .. } = self;
        hosts.retain(|_, places| {
            while places.take_past(now) {
                lengths.shrink(places.len() + 1);
                *count -= 1;
            }
            places.len() > 0
        });
    }
}

/// What a caller is told whose place begins after so many seconds.
fn told(comes: u64) -> u16 {
    let seconds = if comes <= EXACT { comes.max(1) } else { comes.div_ceil(2).max(EXACT) };
    seconds.min(LONGEST) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn backlog(ahead: usize) -> Backlog {
        // 100 requests are served per second, and requests for 2 seconds may wait.
        Backlog { ahead, interval: Duration::from_millis(10), room: 2 * SECOND }
    }

    fn host(name: &str) -> Arc<str> {
        Arc::from(name)
    }

    /// The seconds after which a caller's place begins.
    fn place(returns: &Returns, request: u64, now: Instant) -> u64 {
        (returns.hosts["a"].due[&request] - now).as_secs()
    }

    #[test]
    fn callers_are_spread_over_the_time_that_those_before_them_take() {
        let (mut returns, now) = (Returns::default(), Instant::now());
        let told: Vec<_> = (0..2_000).map(|request| returns.tell(&host("a"), request, backlog(200), now)).collect();
        let places: Vec<_> = (0..2_000).map(|request| place(&returns, request, now)).collect();
        let at = |second| places.iter().filter(|place| **place == second).count();
        // The promised places per second are a quarter more than the requests served per second.
        assert!((2..14).all(|second| (124..=126).contains(&at(second))), "{places:?}");
        assert!(places.is_sorted() && told.is_sorted(), "{places:?}");
        // 200 wait and 2,000 were promised a place: 2,200 ÷ 125 − 1 s. A client that waits for twice as long as it is told comes
        // in time.
        assert_eq!((places.last(), told.last()), (Some(&16), Some(&8)));
        for (place, told) in places.into_iter().zip(told) {
            assert!(u64::from(told) <= place && 2 * u64::from(told) <= place.max(EXACT) + EXACT, "{told} for {place}");
        }
    }

    #[test]
    fn who_asks_before_its_time_keeps_its_place_and_takes_no_other() {
        let (mut returns, now) = (Returns::default(), Instant::now());
        (0..500).for_each(|request| {
            returns.tell(&host("a"), request, backlog(200), now);
        });
        returns.tell(&host("a"), 500, backlog(200), now);
        let last = place(&returns, 500, now);
        for _ in 0..1_000 {
            returns.tell(&host("a"), 500, backlog(200), now + SECOND / 4);
            assert_eq!(place(&returns, 500, now), last);
        }
        returns.tell(&host("a"), 501, backlog(200), now);
        assert_eq!(place(&returns, 501, now), last);
        // Its time has come, and there is no room: it gets another place.
        let then = now + Duration::from_secs(last);
        assert_eq!(returns.tell(&host("a"), 500, backlog(200), then), 1, "no other has a place any more");
    }

    #[test]
    fn who_is_let_in_leaves_its_place_to_others() {
        let (mut returns, now) = (Returns::default(), Instant::now());
        (0..500).for_each(|request| {
            returns.tell(&host("a"), request, backlog(200), now);
        });
        let before = place(&returns, 499, now);
        (0..250).for_each(|_| returns.let_in(&host("a")));
        returns.let_in(&host("b"));
        assert_eq!((returns.count, returns.lengths.longest()), (250, 250));
        returns.tell(&host("a"), 500, backlog(200), now);
        assert_eq!(place(&returns, 500, now), before - 2);
        (0..300).for_each(|_| returns.let_in(&host("a")));
        assert_eq!((returns.count, returns.lengths.longest(), returns.hosts.len()), (0, 0, 0));
    }

    #[test]
    fn a_host_waits_for_its_own_callers_and_not_for_those_of_others() {
        let (mut returns, now) = (Returns::default(), Instant::now());
        (0..3_000).for_each(|request| {
            returns.tell(&host("many"), request, backlog(100), now);
        });
        assert_eq!(returns.tell(&host("few"), 0, backlog(100), now), 1);
        assert!(returns.tell(&host("many"), 3_000, backlog(100), now) > 10);
    }

    #[test]
    fn who_is_too_far_away_asks_again_before_the_longest_time_is_over() {
        let (mut returns, now) = (Returns::default(), Instant::now());
        let far: Vec<_> = (0..300).map(|request| returns.tell(&host("a"), request, backlog(100_000), now)).collect();
        for seconds in LONGEST as u16 / 2 + 1..=LONGEST as u16 {
            assert_eq!(far.iter().filter(|told| **told == seconds).count(), 20, "{seconds} s");
        }
    }

    #[test]
    fn places_are_forgotten_when_their_time_has_come() {
        let (mut returns, now) = (Returns::default(), Instant::now());
        for request in 0..1_000 {
            returns.tell(&host(["a", "b", "c"][request as usize % 3]), request, backlog(0), now);
        }
        assert_eq!((returns.count, returns.lengths.up_to(usize::MAX)), (1_000, 1_000));
        returns.tell(&host("d"), 0, backlog(0), now + 60 * SECOND);
        assert_eq!((returns.count, returns.lengths.up_to(usize::MAX), returns.hosts.len()), (1, 1, 1));
    }

    #[test]
    fn a_host_with_ever_other_requests_has_so_many_places_and_is_spread_beyond_them() {
        let (mut returns, now) = (Returns::default(), Instant::now());
        let told: Vec<_> = (0..20_000).map(|request| returns.tell(&host("a"), request, backlog(0), now)).collect();
        assert_eq!((returns.count, returns.lengths.longest()), (MOST_OF_HOST, MOST_OF_HOST));
        let spread = &told[MOST_OF_HOST..];
        for seconds in LONGEST as u16 / 2 + 1..=LONGEST as u16 {
            let share = spread.iter().filter(|told| **told == seconds).count() * LONGEST as usize / 2;
            assert!(share.abs_diff(spread.len()) < 100, "{seconds} s");
        }
        // Its places do not hide those of others.
        let others: Vec<_> = (0..1_000).map(|request| returns.tell(&host("b"), request, backlog(0), now)).collect();
        assert!(others[0] == 1 && others[999] > 2 && others.is_sorted());
        // One that has a place keeps it.
        let last = place(&returns, MOST_OF_HOST as u64 - 1, now);
        returns.tell(&host("a"), MOST_OF_HOST as u64 - 1, backlog(0), now);
        assert_eq!(place(&returns, MOST_OF_HOST as u64 - 1, now), last);
    }

    #[test]
    fn beyond_the_places_of_all_callers_are_spread_as_well() {
        let (mut returns, now) = (Returns::default(), Instant::now());
        let hosts: Vec<_> = (0..MOST / MOST_OF_HOST + 1).map(|number| host(&number.to_string())).collect();
        for (number, host) in hosts.iter().enumerate().take(MOST / MOST_OF_HOST) {
            (0..MOST_OF_HOST as u64)
                .for_each(|request| returns.promise(host, request, now + (number as u32 + 9) * SECOND));
        }
        assert_eq!(returns.count, MOST);
        let told: HashMap<u16, ()> =
            (0..100).map(|request| (returns.tell(&hosts[MOST / MOST_OF_HOST], request, backlog(0), now), ())).collect();
        assert_eq!((returns.count, told.len()), (MOST, LONGEST as usize / 2));
    }
}
