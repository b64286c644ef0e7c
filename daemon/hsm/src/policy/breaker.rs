//! The breaker decides if a member gets calls at all. A plain value that is handed `now`: no clock, no threads.
//!
//! A closed breaker lets calls through and gathers evidence. With enough evidence, or when it is forced, it opens: no calls
//! pass until a known-answer test, the only permitted call (the *probe*), shows that the member works again. Failed probes
//! are repeated with backoff.

use std::time::{Duration, Instant};

/// Conditions under which a breaker opens, and the timing of its probes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// The breaker opens after this number of failures without a success in between.
    pub consecutive: u32,
    /// The breaker opens when this share of the results of the last ten seconds are failures.
    pub failed_share: f64,
    /// Minimum number of results for `failed_share` to apply: two failures in three calls prove little.
    pub failed_of: u32,
    /// Delay from opening to the first probe. It is short because most faults are short and one probe costs little.
    pub backoff_first: Duration,
    /// Maximum delay between probes, up to which the delay doubles. A recovered member goes unnoticed for at most this
    /// long.
    pub backoff_most: Duration,
    /// After the breaker has been closed for this time, the backoff starts at `backoff_first` again. If the breaker opens
    /// earlier, the backoff continues to double.
    pub calm: Duration,
    /// Delay from the end of one probe to the next while no other member serves.
    pub pause: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            consecutive: 5,
            failed_share: 0.5,
            failed_of: 20,
            backoff_first: Duration::from_millis(100),
            backoff_most: Duration::from_secs(2),
            calm: Duration::from_secs(10),
            pause: Duration::from_millis(50),
        }
    }
}

/// Maximum share by which jitter shortens the backoff, so that several daemons do not probe in step. Jitter never lengthens
/// the backoff, because `backoff_most` is a guaranteed limit.
const JITTER: f64 = 0.25;

/// State of a breaker: the calls that it lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// All calls pass.
    Closed,
    /// No calls pass; from `until` on, one probe may.
    Open {
        /// Time at which a probe is due.
        until: Instant,
    },
    /// No calls pass; a probe is running.
    Probing,
}

/// The breaker of one member.
///
/// Every parameter `jitter` is a random number from 0 to 1.
#[derive(Clone, Debug)]
pub struct Breaker {
    settings: Settings,
    state: State,
    consecutive: u32,
    window: Window,
    /// The latest backoff, before jitter.
    backoff: Duration,
    opened_at: Option<Instant>,
    closed_at: Option<Instant>,
    /// Time at which the latest probe began or, if it has ended, ended.
    probed_at: Option<Instant>,
    openings: u64,
}

impl Breaker {
    /// Creates a closed breaker without evidence.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Breaker {
            settings,
            state: State::Closed,
            consecutive: 0,
            window: Window::default(),
            backoff: settings.backoff_first,
            opened_at: None,
            closed_at: None,
            probed_at: None,
            openings: 0,
        }
    }

    /// Records a call whose result is not a fault of the member. Ignored unless closed.
    pub fn success(&mut self, now: Instant) {
        if self.state == State::Closed {
            self.consecutive = 0;
            self.window.bucket(now).good += 1;
        }
    }

    /// Records a call that failed through the member's fault. Returns true if this opened the breaker. Ignored unless
    /// closed.
    pub fn failure(&mut self, now: Instant, jitter: f64) -> bool {
        if self.state != State::Closed {
            return false;
        }
        self.consecutive = self.consecutive.saturating_add(1);
        self.window.bucket(now).bad += 1;
        let (good, bad) = self.window.sum();
        let all = good + bad;
        let opens = self.consecutive >= self.settings.consecutive
            || (all >= u64::from(self.settings.failed_of) && bad as f64 >= self.settings.failed_share * all as f64);
        if opens {
            self.open(now, jitter);
        }
        opens
    }

    /// Opens the breaker at once: a call hangs, a result was wrong, or no session could be opened. Returns true if this
    /// opened it.
    ///
    /// While a probe runs, this counts as its failure. An open breaker stays as it is.
    pub fn force_open(&mut self, now: Instant, jitter: f64) -> bool {
        let opens = self.state == State::Closed;
        if opens {
            self.open(now, jitter);
        } else {
            self.probe_failed(now, jitter);
        }
        opens
    }

    /// Returns true if a probe must be made now. The caller then makes the only probe, and must report how it ended, even
    /// if it was cancelled: until then there is no other probe.
    #[must_use]
    pub fn may_probe(&mut self, now: Instant) -> bool {
        let due = matches!(self.state, State::Open { until } if now >= until);
        if due {
            self.state = State::Probing;
            self.probed_at = Some(now);
        }
        due
    }

    /// Records that the probe gave the right result: the breaker closes, without evidence. Ignored when no probe runs.
    pub fn probe_succeeded(&mut self, now: Instant) {
        if self.state == State::Probing {
            self.state = State::Closed;
            self.consecutive = 0;
            self.window = Window::default();
            self.opened_at = None;
            self.closed_at = Some(now);
            self.probed_at = Some(now);
        }
    }

    /// Records that the probe failed: the delay to the next probe doubles. Ignored when no probe runs.
    pub fn probe_failed(&mut self, now: Instant, jitter: f64) {
        if self.state == State::Probing {
            self.probed_at = Some(now);
            self.back_off(self.backoff.saturating_mul(2), now, jitter);
        }
    }

    /// Brings forward the next probe, because no other member serves: it is due now, or `pause` after the latest probe.
    /// Never delays it.
    pub fn probe_now(&mut self, now: Instant) {
        if let State::Open { until } = &mut self.state {
            let earliest = self.probed_at.map_or(now, |at| at + self.settings.pause);
            *until = earliest.max(now).min(*until);
        }
    }

    /// Returns the state.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Returns the time since which no calls pass; failed probes do not change it. `None` when closed.
    #[must_use]
    pub fn opened_at(&self) -> Option<Instant> {
        self.opened_at
    }

    /// Returns the number of times the breaker opened; failed probes do not count.
    ///
    /// The number also identifies late results: the result of a call made when the number was lower says nothing about the
    /// recovered member and should not be reported.
    #[must_use]
    pub fn openings(&self) -> u64 {
        self.openings
    }

    fn open(&mut self, now: Instant, jitter: f64) {
        let calm = self.closed_at.is_none_or(|at| now.saturating_duration_since(at) >= self.settings.calm);
        let backoff = if calm { self.settings.backoff_first } else { self.backoff.saturating_mul(2) };
        self.opened_at = Some(now);
        self.openings += 1;
        self.back_off(backoff, now, jitter);
    }

    fn back_off(&mut self, backoff: Duration, now: Instant, jitter: f64) {
        self.backoff = backoff.min(self.settings.backoff_most);
        let jitter = if (0.0..=1.0).contains(&jitter) { jitter } else { 0.0 };
        self.state = State::Open { until: now + self.backoff.mul_f64(1.0 - JITTER * jitter) };
    }
}

/// Results of the last ten seconds, with a resolution of one second: it covers nine to ten seconds in ten counters.
#[derive(Clone, Debug, Default)]
struct Window {
    buckets: [Results; 10],
    /// Start of second 0: the time of the first result.
    since: Option<Instant>,
    /// The second that is being counted.
    second: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Results {
    good: u64,
    bad: u64,
}

impl Window {
    /// Returns the counters for `now`. A result with an older time, possible with several threads, counts in the latest
    /// second.
    fn bucket(&mut self, now: Instant) -> &mut Results {
        let since = *self.since.get_or_insert(now);
        let second = now.saturating_duration_since(since).as_secs();
        let len = self.buckets.len() as u64;
        for passed in self.second + 1..=second.min(self.second + len) {
            self.buckets[(passed % len) as usize] = Results::default();
        }
        self.second = self.second.max(second);
        &mut self.buckets[(self.second % len) as usize]
    }

    fn sum(&self) -> (u64, u64) {
        self.buckets.iter().fold((0, 0), |(good, bad), results| (good + results.good, bad + results.bad))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    const MS: Duration = Duration::from_millis(1);

    /// Returns a breaker that was opened by the required number of failures, without jitter.
    fn opened(now: Instant) -> Breaker {
        let mut breaker = Breaker::new(Settings::default());
        let opens: Vec<_> = (0..5).map(|_| breaker.failure(now, 0.0)).collect();
        assert_eq!(opens, [false, false, false, false, true]);
        breaker
    }

    fn until(breaker: &Breaker) -> Instant {
        match breaker.state() {
            State::Open { until } => until,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn opens_at_failures_in_a_row() {
        let now = Instant::now();
        let mut breaker = Breaker::new(Settings::default());
        for _ in 0..100 {
            breaker.success(now);
        }
        for _ in 0..4 {
            assert!(!breaker.failure(now, 0.0));
        }
        breaker.success(now);
        for _ in 0..4 {
            assert!(!breaker.failure(now, 0.0), "the success in between counts");
        }
        assert_eq!(breaker.state(), State::Closed);
        assert!(breaker.failure(now, 0.0));
        assert_eq!(breaker.state(), State::Open { until: now + 100 * MS });
        assert_eq!((breaker.openings(), breaker.opened_at()), (1, Some(now)));
    }

    #[test]
    fn opens_when_half_of_twenty_fail() {
        let now = Instant::now();
        let mut breaker = Breaker::new(Settings::default());
        for _ in 0..9 {
            breaker.success(now);
            assert!(!breaker.failure(now, 0.0));
        }
        breaker.success(now);
        assert!(breaker.failure(now, 0.0), "ten of twenty");
    }

    #[test]
    fn old_results_are_no_evidence() {
        let start = Instant::now();
        let mut breaker = Breaker::new(Settings::default());
        for _ in 0..9 {
            breaker.success(start);
            breaker.failure(start, 0.0);
        }
        breaker.success(start);
        assert!(breaker.clone().failure(start + 9_999 * MS, 0.0), "within ten seconds");
        assert!(!breaker.failure(start + 10_000 * MS, 0.0), "after them");
        assert!(!breaker.failure(start + 3_600_000 * MS, 0.0), "long after them");
    }

    #[test]
    fn one_probe_at_a_time_closes_it() {
        let now = Instant::now();
        let mut breaker = opened(now);
        assert!(!breaker.may_probe(now + 99 * MS));
        assert!(breaker.may_probe(now + 100 * MS));
        assert_eq!(breaker.state(), State::Probing);
        assert!(!breaker.may_probe(now + 3_600_000 * MS), "one at a time");
        assert_eq!(breaker.opened_at(), Some(now));
        breaker.probe_succeeded(now + 101 * MS);
        assert_eq!((breaker.state(), breaker.opened_at()), (State::Closed, None));
        assert!(!breaker.failure(now + 102 * MS, 0.0), "fresh evidence");
    }

    #[test]
    fn the_backoff_of_probes_starts_again_after_calm() {
        let mut now = Instant::now();
        let mut breaker = opened(now);
        let mut waits = Vec::new();
        for _ in 0..7 {
            waits.push((until(&breaker) - now).as_millis());
            now = until(&breaker);
            assert!(breaker.may_probe(now));
            breaker.probe_failed(now, 0.0);
        }
        assert_eq!(waits, [100, 200, 400, 800, 1_600, 2_000, 2_000]);
        assert_eq!(breaker.openings(), 1);
        now = until(&breaker);
        assert!(breaker.may_probe(now));
        breaker.probe_succeeded(now);
        let mut soon = breaker.clone();
        assert!(soon.force_open(now + 9_999 * MS, 0.0));
        assert_eq!(until(&soon) - (now + 9_999 * MS), 2_000 * MS, "it flaps");
        assert!(breaker.force_open(now + 10_000 * MS, 0.0));
        assert_eq!(until(&breaker) - (now + 10_000 * MS), 100 * MS, "it was calm");
    }

    #[test]
    fn jitter_shortens_by_a_quarter_at_most() {
        let now = Instant::now();
        for (jitter, wait) in [(0.0, 100), (0.4, 90), (1.0, 75), (7.0, 100), (-1.0, 100), (f64::NAN, 100)] {
            let mut breaker = Breaker::new(Settings::default());
            assert!(breaker.force_open(now, jitter));
            assert_eq!(until(&breaker) - now, wait * MS, "{jitter}");
        }
    }

    #[test]
    fn late_results_do_not_confuse_it() {
        let now = Instant::now();
        let mut breaker = opened(now);
        let before = breaker.state();
        breaker.success(now + MS);
        assert!(!breaker.failure(now + MS, 0.0));
        assert!(!breaker.force_open(now + MS, 0.0));
        breaker.probe_succeeded(now + MS);
        breaker.probe_failed(now + MS, 0.0);
        assert_eq!((breaker.state(), breaker.openings()), (before, 1));
        assert!(breaker.may_probe(now + 100 * MS));
        breaker.success(now + 101 * MS);
        (0..20).for_each(|_| assert!(!breaker.failure(now + 101 * MS, 0.0)));
        assert_eq!(breaker.state(), State::Probing);
    }

    #[test]
    fn a_forced_opening_ends_a_probe() {
        let now = Instant::now();
        let mut breaker = opened(now);
        assert!(breaker.may_probe(now + 100 * MS));
        assert!(!breaker.force_open(now + 150 * MS, 0.0), "it was not closed");
        assert_eq!(breaker.state(), State::Open { until: now + 350 * MS });
        breaker.probe_succeeded(now + 160 * MS);
        assert_ne!(breaker.state(), State::Closed, "the probe has been written off");
    }

    #[test]
    fn probe_now_brings_the_probe_forward() {
        let now = Instant::now();
        let mut breaker = opened(now);
        breaker.probe_now(now + MS);
        assert!(breaker.may_probe(now + MS));
        breaker.probe_now(now + 2 * MS);
        assert_eq!(breaker.state(), State::Probing);
        breaker.probe_failed(now + 11 * MS, 0.0);
        breaker.probe_now(now + 12 * MS);
        assert_eq!(until(&breaker), now + 61 * MS, "50 ms after the latest probe");
        let mut later = breaker.clone();
        later.probe_now(now + 13 * MS);
        assert_eq!(until(&later), now + 61 * MS);
        assert!(!breaker.may_probe(now + 60 * MS));
        assert!(breaker.may_probe(now + 61 * MS));
    }

    /// A second implementation of the breaker's rules, with a list of results instead of counters.
    struct Model {
        start: Option<Instant>,
        results: Vec<(u64, bool)>,
        failed_in_a_row: u32,
    }

    impl Model {
        fn new() -> Self {
            Model { start: None, results: Vec::new(), failed_in_a_row: 0 }
        }

        fn opens_at(&mut self, now: Instant, failed: bool) -> bool {
            let start = *self.start.get_or_insert(now);
            let second = (now - start).as_secs();
            self.results.push((second, failed));
            self.failed_in_a_row = if failed { self.failed_in_a_row + 1 } else { 0 };
            self.results.retain(|(then, _)| then + 10 > second);
            let bad = self.results.iter().filter(|(_, failed)| *failed).count();
            failed && (self.failed_in_a_row >= 5 || (self.results.len() >= 20 && 2 * bad >= self.results.len()))
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Success,
        Failure,
        ForceOpen,
        MayProbe,
        ProbeSucceeded,
        ProbeFailed,
        ProbeNow,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => Just(Step::Success),
            5 => Just(Step::Failure),
            1 => Just(Step::ForceOpen),
            4 => Just(Step::MayProbe),
            2 => Just(Step::ProbeSucceeded),
            2 => Just(Step::ProbeFailed),
            1 => Just(Step::ProbeNow),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 256, rng_seed: RngSeed::Fixed(3), failure_persistence: None, ..ProptestConfig::default()
        })]

        /// 256 runs of up to 1,500 steps.
        #[test]
        fn any_sequence_of_events(
            steps in proptest::collection::vec(
                (step(), 0.0..=1.0_f64, prop_oneof![20 => 0..30_u32, 4 => 0..1_200_u32, 1 => 0..15_000_u32]), 1..1_500,
            ),
        ) {
            let settings = Settings::default();
            let mut now = Instant::now();
            let mut breaker = Breaker::new(settings);
            let mut model = Model::new();
            let (mut backoff, mut closed_at, mut probe_ended) = (None::<Duration>, None::<Instant>, None::<Instant>);
            for (step, jitter, millis) in steps {
                now += millis * MS;
                let (before, openings, opened_at) = (breaker.state(), breaker.openings(), breaker.opened_at());
                // The expected outcome: if it opens, and the delay before jitter.
                let reopening = match (closed_at, backoff) {
                    (Some(at), Some(backoff)) if now - at < settings.calm => (2 * backoff).min(settings.backoff_most),
                    _ => settings.backoff_first,
                };
                let mut wait = None;
                match (step, before) {
                    (Step::Success, _) => {
                        breaker.success(now);
                        if before == State::Closed {
                            model.opens_at(now, false);
                        }
                    }
                    (Step::Failure, _) => {
                        let opens = before == State::Closed && model.opens_at(now, true);
                        prop_assert_eq!(breaker.failure(now, jitter), opens);
                        wait = opens.then_some(reopening);
                    }
                    (Step::ForceOpen, _) => {
                        prop_assert_eq!(breaker.force_open(now, jitter), before == State::Closed);
                        wait = match before {
                            State::Closed => Some(reopening),
                            State::Probing => Some((2 * backoff.unwrap()).min(settings.backoff_most)),
                            State::Open { .. } => None,
                        };
                    }
                    (Step::MayProbe, _) => {
                        let may = matches!(before, State::Open { until } if until <= now);
                        prop_assert_eq!(breaker.may_probe(now), may);
                        if may {
                            prop_assert_eq!(breaker.state(), State::Probing);
                            prop_assert!(probe_ended.is_none_or(|at| now - at >= settings.pause));
                        }
                    }
                    (Step::ProbeSucceeded, _) => breaker.probe_succeeded(now),
                    (Step::ProbeFailed, _) => {
                        breaker.probe_failed(now, jitter);
                        wait = (before == State::Probing).then(|| (2 * backoff.unwrap()).min(settings.backoff_most));
                    }
                    (Step::ProbeNow, State::Open { until: was }) => {
                        breaker.probe_now(now);
                        let earliest = probe_ended.map_or(now, |at| (at + settings.pause).max(now));
                        prop_assert_eq!(until(&breaker), earliest.min(was));
                    }
                    (Step::ProbeNow, _) => breaker.probe_now(now),
                }
                let after = breaker.state();
                if let Some(wait) = wait {
                    let (least, most) = (now + wait.mul_f64(0.75), now + wait);
                    prop_assert!((least..=most).contains(&until(&breaker)), "{:?} {:?}", wait, until(&breaker) - now);
                    prop_assert!(wait >= settings.backoff_first && wait <= settings.backoff_most);
                    backoff = Some(wait);
                } else if !matches!(step, Step::MayProbe | Step::ProbeSucceeded | Step::ProbeNow) {
                    prop_assert_eq!(before, after, "nothing else changes it");
                }
                if before == State::Probing && after != State::Probing {
                    probe_ended = Some(now);
                }
                if before != State::Closed && after == State::Closed {
                    prop_assert!(before == State::Probing && matches!(step, Step::ProbeSucceeded), "closed without a probe");
                    closed_at = Some(now);
                    model = Model::new();
                }
                let opened = before == State::Closed && after != State::Closed;
                prop_assert_eq!(breaker.openings(), openings + u64::from(opened));
                let since = if after == State::Closed { None } else if opened { Some(now) } else { opened_at };
                prop_assert_eq!(breaker.opened_at(), since);
            }
        }
    }
}
