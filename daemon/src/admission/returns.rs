//! When the callers that were refused come again: places in time, each of which is promised once.
//!
//! A caller that is refused is promised a place behind everybody who waits and behind those who were promised a place
//! before, in the order in which hosts take turns. It comes as far ahead of its place as the queue can hold others, so that
//! the HSMs have work when it is late or the estimate of the pace was too low. A caller that asks again before its time
//! keeps its place, however often it asks.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::declined::LONGEST;
use super::lengths::Lengths;

/// So many times as many callers are promised a second as are served at the estimated pace. Who comes and finds no room
/// comes again, which costs little; an HSM that has nothing to do because too few were asked to come is lost.
const OVERBOOKED: f64 = 1.25;

/// Seconds after which a place may begin that is promised: longer than that nobody knows the pace. Callers that would get a
/// place after it are told a time between half of [`LONGEST`] and all of it.
const FARTHEST: u64 = 2 * LONGEST;

/// Seconds that are told as they are. Of a longer time a caller is told half, since many clients wait for up to twice as
/// long as they are told, so that they do not all come at once. A caller that comes early is told half of what is left.
const EXACT: u64 = 2;

/// How often places are forgotten whose time has come.
const SWEEP: Duration = Duration::from_millis(500);

/// Most places that are remembered, some 24 bytes each.
const MOST: usize = 262_144;

/// What lies before a caller that is refused now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backlog {
    /// How many of those that wait run before it.
    pub(super) ahead: usize,
    /// The time between two that begin to run.
    pub(super) interval: Duration,
    /// For how long callers may wait in the queue before their turn.
    pub(super) room: Duration,
}

/// The places that are promised. `host` tells whose, and a hash of the request tells which caller's.
#[derive(Debug, Default)]
pub(super) struct Returns {
    hosts: HashMap<Arc<str>, HashMap<u64, Instant>>,
    lengths: Lengths,
    count: usize,
    swept: Option<Instant>,
    /// How many were asked to come again without a place.
    unpromised: u64,
}

impl Returns {
    /// After how many seconds a caller that is refused at `now` may come again.
    pub(super) fn tell(&mut self, host: &Arc<str>, request: u64, backlog: Backlog, now: Instant) -> u16 {
        self.sweep(now);
        let places = self.hosts.get(host);
        if let Some(due) = places.and_then(|places| places.get(&request)).filter(|due| **due > now) {
            return told((*due - now).as_secs() + 1);
        }
        let own = places.map_or(0, HashMap::len);
        // Each host with places has as many turns before this caller as its own host, at most.
        let place = backlog.ahead + self.lengths.up_to(own + 1) + 1;
        let begins = backlog.interval.mul_f64(place as f64 / OVERBOOKED);
        let comes = begins.saturating_sub(backlog.room / 2).as_secs();
        if comes <= FARTHEST {
            self.promise(host, request, now + Duration::from_secs(comes.max(1)));
            return told(comes);
        }
        self.unpromised += 1;
        let seconds = LONGEST - self.unpromised % (LONGEST / 2);
        self.promise(host, request, now + Duration::from_secs(seconds));
        seconds as u16
    }

    fn promise(&mut self, host: &Arc<str>, request: u64, due: Instant) {
        if self.count >= MOST {
            return;
        }
        let places = self.hosts.entry(Arc::clone(host)).or_default();
        let length = places.len();
        if places.insert(request, due).is_none() {
            self.lengths.grow(length);
            self.count += 1;
        }
    }

    /// A caller of `host` is let in. Which one is not looked at, since that would take a hash of its request: the host's next place
    /// is taken as its own.
    pub(super) fn let_in(&mut self, host: &Arc<str>) {
        let Some(places) = self.hosts.get_mut(host) else { return };
        let next = places.iter().min_by_key(|(_, due)| **due).map(|(request, _)| *request);
        if next.is_some_and(|next| places.remove(&next).is_some()) {
            self.lengths.shrink(places.len() + 1);
            self.count -= 1;
        }
        if places.is_empty() {
            self.hosts.remove(host);
        }
    }

    /// Forgets places whose time has come.
    fn sweep(&mut self, now: Instant) {
        if self.swept.is_some_and(|swept| now.saturating_duration_since(swept) < SWEEP) {
            return;
        }
        self.swept = Some(now);
        let Self { hosts, lengths, count, .. } = self;
        hosts.retain(|_, places| {
            let before = places.len();
            places.retain(|_, due| *due > now);
            (places.len()..before).rev().for_each(|length| lengths.shrink(length + 1));
            *count -= before - places.len();
            !places.is_empty()
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
        // 100 are served a second, and 2 seconds of them may wait.
        Backlog { ahead, interval: Duration::from_millis(10), room: 2 * SECOND }
    }

    fn host(name: &str) -> Arc<str> {
        Arc::from(name)
    }

    /// The seconds after which a caller's place begins.
    fn place(returns: &Returns, request: u64, now: Instant) -> u64 {
        (returns.hosts["a"][&request] - now).as_secs()
    }

    #[test]
    fn callers_are_spread_over_the_time_that_those_before_them_take() {
        let (mut returns, now) = (Returns::default(), Instant::now());
        let told: Vec<_> = (0..2_000).map(|request| returns.tell(&host("a"), request, backlog(200), now)).collect();
        let places: Vec<_> = (0..2_000).map(|request| place(&returns, request, now)).collect();
        let at = |second| places.iter().filter(|place| **place == second).count();
        // In a second come a quarter more than are served.
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
        (0..500).for_each(|request| drop(returns.tell(&host("a"), request, backlog(200), now)));
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
        (0..500).for_each(|request| drop(returns.tell(&host("a"), request, backlog(200), now)));
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
        (0..3_000).for_each(|request| drop(returns.tell(&host("many"), request, backlog(100), now)));
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
        let host = host("e");
        (0..MOST as u64 + 10).for_each(|request| returns.promise(&host, request, now + 90 * SECOND));
        assert_eq!(returns.count, MOST);
    }
}
