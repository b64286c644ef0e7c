//! The last hour, kept in the process: for the status page, when nobody else can be asked.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use claviger_hsm::{MemberState, MemberStatus};
use claviger_process::lock::lock;
use hdrhistogram::Histogram;

use crate::observe::metrics::Class;

/// How long one point stands for.
pub const INTERVAL: Duration = Duration::from_secs(10);
/// How many points there are: an hour's.
pub const POINTS: usize = 360;
/// The longest time that is told from a longer one, in microseconds.
const LONGEST: u64 = 60_000_000;

/// What was released in an interval, and how the members were.
#[derive(Clone, Debug)]
pub struct Point {
    /// How long it was.
    pub lasted: Duration,
    /// Releases that succeeded.
    pub success: u64,
    /// Releases that were refused: the request was at fault.
    pub refused: u64,
    /// Releases that failed: the service was.
    pub failed: u64,
    /// Of those, the ones that were refused before an HSM was asked: too many waited, or for too long.
    pub turned_away: u64,
    /// How long half of those that succeeded took, and 99 in 100; `None` where none did.
    pub latency: Option<(Duration, Duration)>,
    /// The members, by name.
    pub members: Vec<MemberPoint>,
}

/// A member in an interval.
#[derive(Clone, Debug)]
pub struct MemberPoint {
    /// Its name.
    pub name: String,
    /// Its state at the end.
    pub state: MemberState,
    /// Operations that returned.
    pub calls: u64,
    /// Those of them that failed by its own fault.
    pub faults: u64,
    /// How often it was closed.
    pub closings: u64,
    /// How long its sessions worked, together.
    pub worked: Duration,
}

/// Remembers it. Recording a release takes a lock for a moment.
pub struct History {
    now: Mutex<Interval>,
    past: Mutex<VecDeque<Point>>,
}

/// What a member counts, since the start.
#[derive(Clone, Copy, Default)]
struct Counters {
    calls: u64,
    faults: u64,
    closings: u64,
    worked: Duration,
}

impl Counters {
    fn of(member: &MemberStatus) -> Self {
        let MemberStatus { calls, faults, closings, worked, .. } = *member;
        Self { calls, faults, closings, worked }
    }
}

struct Interval {
    since: Instant,
    success: Histogram<u64>,
    refused: u64,
    failed: u64,
    turned_away: u64,
    /// The members' counters when it began.
    before: Vec<(String, Counters)>,
}

impl Default for History {
    fn default() -> Self {
        let (since, success, before) = (Instant::now(), latencies(), Vec::new());
        let now = Interval { since, success, refused: 0, failed: 0, turned_away: 0, before };
        Self { now: Mutex::new(now), past: Mutex::default() }
    }
}

/// Two digits are more than a small graph shows.
fn latencies() -> Histogram<u64> {
    Histogram::new_with_max(LONGEST, 2).unwrap_or_else(|_| {
        // Only for a maximum below 2 or more than 5 digits.
        unreachable!("the bounds of the histogram are constants")
    })
}

impl History {
    /// Notes a release that took so long; `asked` is whether it came as far as the HSMs.
    pub fn released(&self, class: Class, took: Duration, asked: bool) {
        let mut now = lock(&self.now);
        match class {
            Class::Success => {
                let micros = u64::try_from(took.as_micros()).unwrap_or(LONGEST);
                now.success.saturating_record(micros);
            }
            Class::Refused => now.refused += 1,
            Class::Failed => {
                now.failed += 1;
                now.turned_away += u64::from(!asked);
            }
        }
    }

    /// Ends the interval, and begins the next.
    pub fn turn(&self, members: &[MemberStatus]) {
        let mut now = lock(&self.now);
        let before = std::mem::replace(
            &mut now.before,
            members.iter().map(|member| (member.name.clone(), Counters::of(member))).collect(),
        );
        let members = members.iter().map(|member| {
            // A member that was taken in meanwhile began at nothing.
            let before = before.iter().find(|(name, _)| *name == member.name);
            let (before, now) = (before.map(|(_, before)| *before).unwrap_or_default(), Counters::of(member));
            MemberPoint {
                name: member.name.clone(),
                state: member.state,
                calls: now.calls.saturating_sub(before.calls),
                faults: now.faults.saturating_sub(before.faults),
                closings: now.closings.saturating_sub(before.closings),
                worked: now.worked.saturating_sub(before.worked),
            }
        });
        let quantile = |of: f64| Duration::from_micros(now.success.value_at_quantile(of));
        let point = Point {
            lasted: now.since.elapsed(),
            success: now.success.len(),
            refused: now.refused,
            failed: now.failed,
            turned_away: now.turned_away,
            latency: (!now.success.is_empty()).then(|| (quantile(0.5), quantile(0.99))),
            members: members.collect(),
        };
        now.success.reset();
        (now.since, now.refused, now.failed, now.turned_away) = (Instant::now(), 0, 0, 0);
        drop(now);
        let mut past = lock(&self.past);
        if past.len() == POINTS {
            past.pop_front();
        }
        past.push_back(point);
    }

    /// The points so far, the oldest first.
    pub fn points(&self) -> Vec<Point> {
        lock(&self.past).iter().cloned().collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::status::testing::member;

    #[test]
    fn a_point_says_what_happened_in_its_interval() {
        let history = History::default();
        for millis in 1..=100 {
            history.released(Class::Success, Duration::from_millis(millis), true);
        }
        history.released(Class::Refused, Duration::ZERO, false);
        history.released(Class::Failed, Duration::from_secs(5), true);
        history.released(Class::Failed, Duration::ZERO, false);
        history.turn(&[MemberStatus { calls: 200, faults: 3, closings: 1, ..member("a", MemberState::Up) }]);
        history.turn(&[
            MemberStatus { calls: 210, faults: 3, closings: 2, ..member("a", MemberState::Down) },
            MemberStatus { calls: 5, ..member("b", MemberState::Up) },
        ]);
        let points = history.points();
        let [first, second] = points.as_slice() else { panic!("{points:?}") };
        assert_eq!((first.success, first.refused, first.failed, first.turned_away), (100, 1, 2, 1));
        let (half, most) = first.latency.unwrap();
        let near = |time: Duration, millis: f64| (time.as_secs_f64() * 1e3 / millis - 1.0).abs() < 0.02;
        assert!(near(half, 50.0) && near(most, 99.0), "{half:?} {most:?}");
        assert_eq!((second.success, second.failed, second.turned_away, second.latency), (0, 0, 0, None));
        let of = |point: &Point| -> Vec<_> {
            point.members.iter().map(|m| (m.name.clone(), m.state, [m.calls, m.faults, m.closings])).collect()
        };
        assert_eq!(of(first), [("a".to_owned(), MemberState::Up, [200, 3, 1])]);
        let second = of(second);
        assert_eq!(second[0], ("a".to_owned(), MemberState::Down, [10, 0, 1]));
        assert_eq!(second[1], ("b".to_owned(), MemberState::Up, [5, 0, 0]));
    }

    #[test]
    fn an_hour_is_kept() {
        let history = History::default();
        for number in 0..POINTS as u64 + 5 {
            (0..number).for_each(|_| history.released(Class::Failed, Duration::ZERO, true));
            history.turn(&[]);
        }
        let points = history.points();
        assert_eq!((points.len(), points[0].failed, points[POINTS - 1].failed), (POINTS, 5, POINTS as u64 + 4));
    }
}
