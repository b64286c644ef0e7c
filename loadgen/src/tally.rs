//! The events of a run, and their counters.

use std::borrow::Cow;
use std::collections::BTreeMap;

use claviger_client::Lack;
use hdrhistogram::Histogram;

use crate::profile::Arrivals;

/// The error code of a reply that a check found wrong.
pub(crate) const WRONG_REPLY: &str = "WrongReply";
/// Significant digits of the histograms. Three digits mean an error of at most 0.1 %.
const DIGITS: u8 = 3;
/// Allowed growth of the number of open releases at a rate that is carried: this share of the due releases, plus a
/// constant, because the number is never exactly the same.
const GROWTH: f64 = 0.02;
const FEW_OPEN: f64 = 2.0;
/// Error codes, each with its number of occurrences.
pub type Codes = Vec<(Cow<'static, str>, u64)>;

/// An event. Times are in seconds. `due` is relative to the start of the measured time, so it is negative in the
/// warm-up.
#[derive(Debug)]
pub enum Event {
    /// Releases that were due and not requested: too many requests were in flight, or this program lacked a resource
    /// for a connection.
    Dropped {
        /// The time when they were due.
        due: f64,
        /// Delay until this program noticed that they were due.
        lag: f64,
        /// Number of releases.
        releases: u64,
        /// The resource that this program lacked.
        lack: Option<Lack>,
    },
    /// Releases whose reply was not awaited, because the run was interrupted.
    Abandoned {
        /// Number of releases.
        releases: u64,
    },
    /// A request ended.
    Done {
        /// The time when the request was due.
        due: f64,
        /// Time from due to sent. This delay is caused by this program.
        lag: f64,
        /// Time from sent to the complete reply.
        service: f64,
        /// Time from due to the complete reply.
        latency: f64,
        /// Number of releases that succeeded.
        released: u64,
        /// Error codes of the other releases.
        errors: Codes,
        /// Refusals after which the request was repeated.
        retries: Codes,
    },
    /// A measurement of the runtime's lateness.
    Lag {
        /// The time when the wake-up was due.
        due: f64,
        /// The delay of the wake-up.
        lag: f64,
    },
    /// A reply that was counted as a success turned out to be wrong.
    Wrong {
        /// The time when its request was due.
        due: f64,
        /// The problem with the reply.
        problem: String,
    },
    /// A reply was checked and is correct.
    Right,
    /// A reply was selected but not checked, because the checks fell too far behind.
    Unchecked,
}

/// The counters of one second of a run.
#[derive(Clone, Debug)]
pub struct Second {
    /// Releases that were due in this second.
    pub offered: u64,
    /// Releases that were due in this second and were dropped.
    pub dropped: u64,
    /// Releases that succeeded in this second, whenever they were due.
    pub achieved: u64,
    /// Releases that failed in this second.
    pub errors: u64,
    /// Latency of the releases that were due in this second and succeeded, in microseconds.
    pub latency: Histogram<u32>,
    /// Service time of the same releases, in microseconds.
    pub service: Histogram<u32>,
    /// Releases that failed in this second, by error code.
    pub codes: BTreeMap<Cow<'static, str>, u64>,
}

/// All counters of a run. Histograms are in microseconds.
#[derive(Clone, Debug)]
pub struct Tally {
    /// Releases that were due.
    pub offered: u64,
    /// Releases that succeeded.
    pub achieved: u64,
    /// Releases that were due and not requested.
    pub dropped: u64,
    /// Releases that were not requested because this program lacked a resource, including those of the warm-up.
    pub lacks: BTreeMap<Lack, u64>,
    /// Releases whose reply was not awaited.
    pub abandoned: u64,
    /// Releases that failed, by error code.
    pub errors: BTreeMap<String, u64>,
    /// Replies after which the request was repeated, by error code.
    pub retries: BTreeMap<String, u64>,
    /// Time from due to reply, for releases that succeeded.
    pub latency: Histogram<u64>,
    /// Time from sent to reply, for releases that succeeded.
    pub service: Histogram<u64>,
    /// Time from due to sent, for all requests.
    pub lag: Histogram<u64>,
    /// The counters of each second.
    pub seconds: Vec<Second>,
    /// The time of the last reply.
    pub last: f64,
    /// Number of replies that were checked and correct.
    pub right: u64,
    /// Number of replies that were checked and wrong, including those of the warm-up.
    pub wrong: u64,
    /// The problem with the first wrong reply.
    pub first_wrong: Option<String>,
    /// Number of replies that were selected but not checked.
    pub unchecked: u64,
}

fn histogram<C: hdrhistogram::Counter>() -> Histogram<C> {
    // This fails only for more than five digits.
    Histogram::new(DIGITS).unwrap_or_else(|_| unreachable!("three digits are allowed"))
}

/// Adds a time to a histogram that grows as needed.
fn add<C: hdrhistogram::Counter>(histogram: &mut Histogram<C>, seconds: f64, times: u64) {
    let micros = (seconds * 1e6).round().clamp(1.0, 1e12) as u64;
    if let Some(times) = C::from_u64(times) {
        // The histogram grows as needed. An error is possible only beyond the range of 64 bits.
        let _ = histogram.record_n(micros, times);
    }
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            offered: 0,
            achieved: 0,
            dropped: 0,
            lacks: BTreeMap::new(),
            abandoned: 0,
            errors: BTreeMap::new(),
            retries: BTreeMap::new(),
            latency: histogram(),
            service: histogram(),
            lag: histogram(),
            seconds: Vec::new(),
            last: 0.0,
            right: 0,
            wrong: 0,
            first_wrong: None,
            unchecked: 0,
        }
    }
}

impl Tally {
    /// Counts one event.
    pub fn count(&mut self, event: Event) {
        match event {
            Event::Dropped { due, lag, releases, lack } => {
                if let Some(lack) = lack {
                    *self.lacks.entry(lack).or_default() += releases;
                }
                if due < 0.0 {
                    return;
                }
                self.offered += releases;
                self.dropped += releases;
                add(&mut self.lag, lag, 1);
                let second = self.second(due);
                second.offered += releases;
                second.dropped += releases;
            }
            Event::Done { due, lag, service, latency, released, errors, retries } if due >= 0.0 => {
                let failed: u64 = errors.iter().map(|(_, times)| times).sum();
                self.offered += released + failed;
                self.achieved += released;
                for (code, times) in &errors {
                    *self.errors.entry(code.to_string()).or_default() += times;
                }
                for (code, times) in retries {
                    *self.retries.entry(code.into_owned()).or_default() += times;
                }
                add(&mut self.lag, lag, 1);
                if released > 0 {
                    add(&mut self.latency, latency, released);
                    add(&mut self.service, service, released);
                    let second = self.second(due);
                    add(&mut second.latency, latency, released);
                    add(&mut second.service, service, released);
                }
                self.second(due).offered += released + failed;
                let ended = due + latency;
                self.last = self.last.max(ended);
                let second = self.second(ended);
                second.achieved += released;
                second.errors += failed;
                for (code, times) in errors {
                    *second.codes.entry(code).or_default() += times;
                }
            }
            Event::Lag { due, lag } if due >= 0.0 => add(&mut self.lag, lag, 1),
            Event::Wrong { due, problem } => {
                self.wrong += 1;
                self.first_wrong.get_or_insert(problem);
                // The reply was counted as a success when it arrived.
                if due >= 0.0 {
                    self.achieved = self.achieved.saturating_sub(1);
                    *self.errors.entry(WRONG_REPLY.to_owned()).or_default() += 1;
                    let second = self.second(due);
                    second.achieved = second.achieved.saturating_sub(1);
                    second.errors += 1;
                    *second.codes.entry(Cow::Borrowed(WRONG_REPLY)).or_default() += 1;
                }
            }
            Event::Right => self.right += 1,
            Event::Unchecked => self.unchecked += 1,
            Event::Abandoned { releases } => self.abandoned += releases,
            Event::Done { .. } | Event::Lag { .. } => {}
        }
    }

    /// Number of releases that failed.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.errors.values().sum()
    }

    /// Releases a second that succeeded, under a load of `seconds` seconds. The count is divided by the time to the
    /// last reply or by `seconds`, whichever is longer. For a closed loop, only whole seconds count: when the time is
    /// over, callers still wait for their last replies and send nothing new.
    #[must_use]
    pub fn achieved_per_second(&self, seconds: f64, closed: bool) -> f64 {
        let whole = seconds.floor();
        if closed && whole >= 1.0 {
            self.seconds.iter().take(whole as usize).map(|second| second.achieved).sum::<u64>() as f64 / whole
        } else {
            self.achieved as f64 / seconds.max(self.last)
        }
    }

    /// Share of the due releases that did not succeed.
    #[must_use]
    pub(crate) fn unsuccessful(&self) -> f64 {
        unsuccessful(self.offered, self.failed(), self.dropped)
    }

    fn second(&mut self, at: f64) -> &mut Second {
        let at = at.max(0.0) as usize;
        if self.seconds.len() <= at {
            let (latency, service, codes) = (histogram(), histogram(), BTreeMap::new());
            let empty = Second { offered: 0, dropped: 0, achieved: 0, errors: 0, latency, service, codes };
            self.seconds.resize(at + 1, empty);
        }
        &mut self.seconds[at]
    }
}

/// `true` if the number of open releases grows over the first `whole` seconds: more releases are due than the service
/// carries. The first quarter is ignored. With random arrivals the number varies by the square root of the number of
/// releases, so this variation is allowed.
pub(crate) fn grows(seconds: &[Second], whole: usize, arrivals: Arrivals) -> bool {
    let (mut open, mut due) = (0.0, 0.0);
    let ends: Vec<(f64, f64)> = seconds
        .iter()
        .take(whole)
        .map(|second| {
            due += second.offered as f64;
            open += second.offered as f64 - (second.achieved + second.errors + second.dropped) as f64;
            (due, open)
        })
        .collect();
    let Some((last, from)) = ends.last().zip(ends.get(ends.len().saturating_sub(1) / 4)) else { return false };
    let came = last.0 - from.0;
    let lots = if arrivals == Arrivals::Even { 0.0 } else { 2.0 * came.sqrt() };
    last.1 - from.1 > GROWTH * came + FEW_OPEN + lots
}

/// Share of `offered` releases that failed or were dropped.
pub(crate) fn unsuccessful(offered: u64, failed: u64, dropped: u64) -> f64 {
    if offered == 0 { 0.0 } else { (failed + dropped) as f64 / offered as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(due: f64, latency: f64, released: u64, errors: Codes) -> Event {
        Event::Done { due, lag: 0.001, service: latency / 2.0, latency, released, errors, retries: Vec::new() }
    }

    #[test]
    fn everything_is_counted_where_it_belongs() {
        let mut tally = Tally::default();
        tally.count(done(-0.5, 9.0, 1, Vec::new()));
        tally.count(done(0.2, 0.010, 1, Vec::new()));
        tally.count(done(0.9, 1.500, 3, vec![("Timeout".into(), 1)]));
        tally.count(Event::Dropped { due: 1.1, lag: 0.0, releases: 2, lack: None });
        tally.count(Event::Dropped { due: -0.1, lag: 0.0, releases: 1, lack: Some(Lack::Files) });
        tally.count(Event::Abandoned { releases: 3 });
        tally.count(Event::Wrong { due: 0.2, problem: "no".to_owned() });
        assert_eq!((tally.offered, tally.achieved, tally.dropped, tally.failed()), (7, 3, 2, 2));
        assert_eq!((&tally.lacks, tally.abandoned), (&BTreeMap::from([(Lack::Files, 1)]), 3));
        assert_eq!(tally.errors["Timeout"], 1);
        assert_eq!(tally.errors[WRONG_REPLY], 1);
        assert_eq!(tally.latency.len(), 4, "the warm-up is not counted");
        assert!((tally.latency.max() as f64 - 1.5e6).abs() < 2e3);
        assert!((tally.service.max() as f64 - 0.75e6).abs() < 1e3);
        let row =
            |second: &Second| (second.offered, second.dropped, second.achieved, second.errors, second.latency.len());
        let rows: Vec<_> = tally.seconds.iter().map(row).collect();
        assert_eq!(rows, [(5, 0, 0, 1, 4), (2, 2, 0, 0, 0), (0, 0, 3, 1, 0)]);
        assert!((tally.unsuccessful() - 4.0 / 7.0).abs() < 1e-9);
        assert!((tally.achieved_per_second(1.0, false) - 3.0 / 2.4).abs() < 1e-9);
        assert!((tally.achieved_per_second(3.0, true) - 1.0).abs() < 1e-9);
        assert!((tally.last - 2.4).abs() < 1e-9);
        let codes = |at: usize| tally.seconds[at].codes.iter().map(|(code, n)| (code.as_ref(), *n)).collect::<Vec<_>>();
        assert_eq!((codes(0), codes(2)), (vec![(WRONG_REPLY, 1)], vec![("Timeout", 1)]));
        assert_eq!(tally.seconds[0].service.len(), 4);
    }

    /// Seconds in which `rate` releases are due evenly. The service completes `served` releases a second, one after the
    /// other.
    fn seconds(rate: f64, served: f64, alone: f64) -> Vec<Second> {
        let mut tally = Tally::default();
        for at in 0..(rate * 4.0) as u32 {
            let due = f64::from(at) / rate;
            let latency = (f64::from(at) / served - due).max(0.0) + alone;
            let (errors, retries) = (Vec::new(), Vec::new());
            tally.count(Event::Done { due, lag: 0.0, service: latency, latency, released: 1, errors, retries });
        }
        tally.seconds
    }

    #[test]
    fn overload_is_found_in_a_short_trial_and_a_long_way_is_none() {
        for rate in [100.0, 1_000.0] {
            for arrivals in [Arrivals::Even, Arrivals::Random] {
                assert!(!grows(&seconds(rate, rate * 1.01, 0.05), 4, arrivals));
                assert!(!grows(&seconds(rate, rate * 1.01, 0.3), 4, arrivals), "a long round trip is no overload");
                assert!(grows(&seconds(rate, rate * 0.85, 0.05), 4, arrivals));
            }
            assert!(grows(&seconds(rate, rate * 0.95, 0.3), 4, Arrivals::Even));
        }
        assert!(!grows(&[], 4, Arrivals::Even));
    }
}
