//! Compares two runs and separates real differences from noise.
//!
//! The comparison uses each run as a whole: its rates, and the percentiles of all its latencies. The confidence bounds
//! come from a moving-block bootstrap over the seconds of each run, because a slow second is often followed by another
//! one. Each resample draws as many seconds as the run has, with their histograms, and takes the percentiles over all
//! of them.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use crate::Failure;
use crate::print::table;
use crate::report::Report;
use crate::threshold::is_known;
use crate::units;

/// Number of resamples.
const ROUNDS: usize = 1_000;
/// Share of the resamples outside the bounds at each end: the bounds hold 95 %.
const TAILS: f64 = 0.025;
/// Smallest number of seconds from which noise can be estimated.
const FEWEST: usize = 5;

/// The verdict on a measure.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Better, beyond noise.
    Better,
    /// Worse, beyond noise.
    Worse,
    /// The difference is within noise.
    Same,
    /// There are too few seconds, or both values are unknown, or the measure is the time of a single release.
    Unknown,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Better => "better",
            Self::Worse => "WORSE",
            Self::Same => "noise",
            Self::Unknown => "cannot tell",
        })
    }
}

/// The unit of a measure.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Releases a second.
    PerSecond,
    /// A share of the due releases.
    Share,
    /// Seconds.
    Seconds,
}

impl Kind {
    /// Formats a value or a difference of two values.
    #[must_use]
    pub fn show(self, value: f64) -> String {
        if value.is_infinite() {
            return "not known".to_owned();
        }
        let sign = if value < 0.0 { "-" } else { "" };
        let size = value.abs();
        let text = match self {
            Self::Seconds if size == 0.0 => "0".to_owned(),
            Self::PerSecond => format!("{size:.1}"),
            Self::Share => units::percent(size),
            Self::Seconds => units::seconds(size),
        };
        format!("{sign}{text}")
    }
}

/// One measure in both runs.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Difference {
    /// The name of the measure.
    pub measure: &'static str,
    /// The unit of the measure.
    pub kind: Kind,
    /// The value of the first run; `None` if failures hide it.
    pub before: Option<f64>,
    /// The value of the second run; `None` if failures hide it.
    pub after: Option<f64>,
    /// Bounds of `after − before`, 95 %; `None` if there are none. An infinite bound (`null` in JSON) is unknown,
    /// because failures hide the percentile in some resamples.
    pub bounds: Option<[f64; 2]>,
    /// The conclusion.
    pub verdict: Verdict,
}

impl Difference {
    /// The change in percent, if both values are known.
    #[must_use]
    pub fn change(&self) -> Option<f64> {
        let (before, after) = self.before.zip(self.after)?;
        (before != 0.0).then(|| (after / before - 1.0) * 100.0)
    }

    /// Formats a value of this measure.
    #[must_use]
    pub fn show(&self, value: Option<f64>) -> String {
        value.map_or("not known".to_owned(), |value| self.kind.show(value))
    }
}

/// The source of a measure.
#[derive(Clone, Copy)]
enum Measure {
    Released,
    Failed,
    Dropped,
    Latency(f64),
}

const MEASURES: [(&str, Kind, Measure); 8] = [
    ("released/s", Kind::PerSecond, Measure::Released),
    ("failed", Kind::Share, Measure::Failed),
    ("dropped", Kind::Share, Measure::Dropped),
    ("latency p50", Kind::Seconds, Measure::Latency(0.5)),
    ("latency p90", Kind::Seconds, Measure::Latency(0.9)),
    ("latency p99", Kind::Seconds, Measure::Latency(0.99)),
    ("latency p99.9", Kind::Seconds, Measure::Latency(0.999)),
    ("latency max", Kind::Seconds, Measure::Latency(1.0)),
];

/// One second of a run: the unit of resampling.
struct Second {
    achieved: u64,
    failed: u64,
    dropped: u64,
    /// Indices into [`Run::times`], each with its number of releases.
    latencies: Vec<(usize, u64)>,
}

/// A run that is prepared for resampling.
struct Run<'a> {
    report: &'a Report,
    seconds: Vec<Second>,
    /// All latencies that occurred, ascending, in seconds.
    times: Vec<f64>,
}

impl<'a> Run<'a> {
    fn new(report: &'a Report) -> Result<Self, Failure> {
        // Replies after the end belong to seconds in which no release was due, so those seconds are left out.
        let asked = report.duration_seconds.ceil() as usize;
        let rows = report.timeline.get(..asked).unwrap_or(&report.timeline);
        let latencies = rows.iter().map(crate::report::Row::latencies).collect::<Result<Vec<_>, _>>()?;
        let times: BTreeSet<u64> = latencies.iter().flatten().map(|(time, _)| *time).collect();
        let times: Vec<u64> = times.into_iter().collect();
        let second = |(row, latencies): (&crate::report::Row, Vec<(u64, u64)>)| Second {
            achieved: row.achieved,
            failed: row.errors,
            dropped: row.dropped,
            latencies: latencies.iter().map(|(time, n)| (times.partition_point(|known| known < time), *n)).collect(),
        };
        let seconds = rows.iter().zip(latencies).map(second).collect();
        Ok(Self { report, seconds, times: times.iter().map(|micros| *micros as f64 / 1e6).collect() })
    }

    /// The value of the whole run.
    fn whole(&self, measure: Measure) -> Option<f64> {
        let report = self.report;
        let share = |part: u64| if report.offered == 0 { 0.0 } else { part as f64 / report.offered as f64 };
        match measure {
            Measure::Released => Some(report.achieved_per_second),
            Measure::Failed => Some(share(report.failed())),
            Measure::Dropped => Some(share(report.dropped)),
            Measure::Latency(quantile) if !report.knows(quantile) => None,
            // The maximum of the report is the maximum of the whole run.
            Measure::Latency(quantile) => Some(report.latency_seconds.at(quantile)),
        }
    }

    /// Draws one resample and computes every measure. Seconds are drawn in blocks of neighbours. An unknown value is
    /// infinite.
    fn resampled(&self, lots: &mut fastrand::Rng) -> [f64; MEASURES.len()] {
        let block = (self.seconds.len() as f64).cbrt().ceil() as usize;
        let (mut achieved, mut failed, mut dropped, mut drawn) = (0, 0, 0, 0);
        let mut counts = vec![0_u64; self.times.len()];
        while drawn < self.seconds.len() {
            let start = lots.usize(..self.seconds.len());
            for at in (start..).take(block.min(self.seconds.len() - drawn)) {
                let second = &self.seconds[at % self.seconds.len()];
                achieved += second.achieved;
                failed += second.failed;
                dropped += second.dropped;
                second.latencies.iter().for_each(|(time, times)| counts[*time] += times);
                drawn += 1;
            }
        }
        let timed: u64 = counts.iter().sum();
        let due = (timed + failed + dropped) as f64;
        let share = |part: u64| if due == 0.0 { 0.0 } else { part as f64 / due };
        let unsuccessful = share(failed + dropped);
        let latency = |quantile: f64| {
            if timed == 0 || !is_known(quantile, unsuccessful) {
                return f64::INFINITY;
            }
            let wanted = ((timed as f64 * quantile).ceil() as u64).max(1);
            let mut sum = 0;
            let at = counts.iter().position(|count| {
                sum += count;
                sum >= wanted
            });
            at.map_or(f64::INFINITY, |at| self.times[at])
        };
        MEASURES.map(|(_, _, measure)| match measure {
            Measure::Released => achieved as f64 / drawn as f64,
            Measure::Failed => share(failed),
            Measure::Dropped => share(dropped),
            Measure::Latency(quantile) => latency(quantile),
        })
    }
}

/// Compares two runs.
///
/// # Errors
/// A result has no histograms, or damaged ones.
pub fn compare(before: &Report, after: &Report) -> Result<Vec<Difference>, Failure> {
    let runs = [Run::new(before)?, Run::new(after)?];
    let enough = runs.iter().all(|run| run.seconds.len() >= FEWEST);
    // The seed is fixed, so the same files give the same bounds.
    let mut lots = fastrand::Rng::with_seed(1);
    let rounds: Vec<_> = (0..if enough { ROUNDS } else { 0 })
        .map(|_| [runs[0].resampled(&mut lots), runs[1].resampled(&mut lots)])
        .collect();
    let difference = |(at, (name, kind, measure)): (usize, &(&'static str, Kind, Measure))| {
        let [before, after] = [runs[0].whole(*measure), runs[1].whole(*measure)];
        let single = matches!(measure, Measure::Latency(quantile) if *quantile >= 1.0);
        let comparable = enough && !single && before.is_some() && after.is_some();
        let bounds = comparable.then(|| bounds(rounds.iter().map(|[before, after]| (before[at], after[at]))));
        let more_is_better = matches!(measure, Measure::Released);
        let verdict = match (before, after, bounds) {
            (Some(_), None, _) => Verdict::Worse,
            (None, Some(_), _) => Verdict::Better,
            (_, _, None) => Verdict::Unknown,
            (_, _, Some([low, high])) if low <= 0.0 && high >= 0.0 => Verdict::Same,
            (_, _, Some([low, _])) if (low > 0.0) == more_is_better => Verdict::Better,
            _ => Verdict::Worse,
        };
        Difference { measure: name, kind: *kind, before, after, bounds, verdict }
    };
    Ok(MEASURES.iter().enumerate().map(difference).collect())
}

/// The bounds around 95 % of the differences.
fn bounds(pairs: impl Iterator<Item = (f64, f64)>) -> [f64; 2] {
    // If both values are unknown (infinite), no difference can be stated.
    let difference = |(before, after): (f64, f64)| if before == after { 0.0 } else { after - before };
    let mut differences: Vec<f64> = pairs.map(difference).collect();
    differences.sort_by(f64::total_cmp);
    let at = |share: f64| differences[((differences.len() - 1) as f64 * share).round() as usize];
    [at(TAILS), at(1.0 - TAILS)]
}

/// Warnings about the two runs, for the top of the comparison.
#[must_use]
pub fn cautions(names: [&str; 2], reports: [&Report; 2]) -> Vec<String> {
    let mut cautions = Vec::new();
    for (name, report) in names.iter().zip(reports) {
        for reason in &report.invalid_because {
            cautions.push(format!("{name} is INVALID and proves nothing: {reason}"));
        }
        if report.interrupted {
            cautions.push(format!("{name} was interrupted after {}", units::seconds(report.duration_seconds)));
        }
    }
    if reports[0].profile != reports[1].profile || reports[0].settings != reports[1].settings {
        cautions.push("these runs did not ask for the same: compare with care".to_owned());
    }
    cautions
}

/// The comparison as text.
#[must_use]
pub fn for_people(names: [&str; 2], reports: [&Report; 2], differences: &[Difference]) -> String {
    let mut out = String::new();
    for (name, report) in names.iter().zip(reports) {
        out.push_str(&format!("{name}: {} at {}\n", report.profile, report.url));
    }
    for caution in cautions(names, reports) {
        out.push_str(&format!("{caution}\n"));
    }
    out.push('\n');
    let head = ["whole runs", names[0], names[1], "change", "95 % bounds", ""].map(str::to_owned);
    let mut rows = vec![head.to_vec()];
    for difference in differences {
        let change = difference.change().map_or("-".to_owned(), |change| format!("{change:+.1} %"));
        let show = |value: f64| difference.kind.show(value);
        let bounds = difference.bounds.map_or("-".to_owned(), |[low, high]| format!("{} … {}", show(low), show(high)));
        let Difference { measure, before, after, verdict, .. } = difference;
        let (before, after) = (difference.show(*before), difference.show(*after));
        rows.push(vec![(*measure).to_owned(), before, after, change, bounds, verdict.to_string()]);
    }
    out.push_str(&table(&rows));
    let shortest = reports.map(|report| report.duration_seconds.ceil() as usize).into_iter().min().unwrap_or(0);
    if shortest < FEWEST {
        out.push_str(&format!("{shortest} seconds are too few to tell noise; make runs of {FEWEST} or more"));
    }
    out.truncate(out.trim_end().len());
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;
    use crate::report::tests::told;
    use crate::tally::{Event, Tally};

    /// Makes a run of one minute with 50 releases a second. `takes` computes the latency of a release from its second
    /// and a random number.
    pub(crate) fn run(seed: u64, takes: impl Fn(u32, f64) -> f64, fails_one_in: u64) -> Report {
        let mut lots = fastrand::Rng::with_seed(seed);
        let mut tally = Tally::default();
        for second in 0..60 {
            for at in 0..50 {
                let latency = takes(second, lots.f64());
                let due = f64::from(second) + f64::from(at) / 50.0;
                let fails = fails_one_in > 0 && lots.u64(..fails_one_in) == 0;
                let errors = if fails { vec![("Timeout".into(), 1)] } else { Vec::new() };
                let (released, retries) = (u64::from(!fails), Vec::new());
                tally.count(Event::Done { due, lag: 0.0, service: latency, latency, released, errors, retries });
            }
        }
        told(tally, 60)
    }

    fn verdicts(before: &Report, after: &Report) -> Vec<(&'static str, Verdict)> {
        compare(before, after).unwrap().iter().map(|difference| (difference.measure, difference.verdict)).collect()
    }

    fn verdict(before: &Report, after: &Report, measure: &str) -> Verdict {
        verdicts(before, after).into_iter().find(|(name, _)| *name == measure).unwrap().1
    }

    #[test]
    fn differences_beyond_noise_are_found_and_noise_is_not() {
        let base = |_, random: f64| 0.010 + 0.004 * random;
        let slower = |_, random: f64| 0.011 + 0.004 * random;
        let wrong = (0..10)
            .flat_map(|seed| verdicts(&run(seed, base, 0), &run(seed + 100, base, 0)))
            .filter(|(_, verdict)| matches!(verdict, Verdict::Better | Verdict::Worse));
        assert!(wrong.count() <= 6, "of 80 comparisons of equals more than 5 % differ");
        for seed in 0..5 {
            let (before, after) = (run(seed, base, 0), run(seed + 100, slower, 0));
            for measure in ["latency p50", "latency p90", "latency p99"] {
                assert_eq!(verdict(&before, &after, measure), Verdict::Worse, "{measure}");
                assert_eq!(verdict(&after, &before, measure), Verdict::Better, "{measure}");
            }
        }
    }

    #[test]
    fn a_stall_shows_with_its_whole_length() {
        let base = |_, random: f64| 0.010 + 0.004 * random;
        let stalls = |second, random: f64| if second == 30 { 0.5 + 1.55 * random } else { 0.010 + 0.004 * random };
        let (before, after) = (run(1, base, 0), run(2, stalls, 0));
        let differences = compare(&before, &after).unwrap();
        let max = differences.last().unwrap();
        let longest =
            after.timeline.iter().filter_map(|row| row.latency_seconds).map(|times| times.max).fold(0.0, f64::max);
        assert_eq!((max.measure, max.verdict), ("latency max", Verdict::Unknown));
        assert!((max.after.unwrap() - longest).abs() < 0.003 && longest > 2.0, "{max:?}");
        // The stall affects one sixtieth of all releases. This is beyond the p99 of the whole run, but it changes the
        // median of only one second.
        assert!(differences[5].after.unwrap() > 0.5, "{:?}", differences[5]);
        let text = for_people(["a", "b"], [&before, &after], &differences);
        assert!(text.contains(&units::seconds(max.after.unwrap())), "{text}");
    }

    #[test]
    fn what_failures_hide_is_not_known_and_worse_than_what_is() {
        let base = |_, random: f64| 0.010 + 0.004 * random;
        let (good, failing) = (run(1, base, 0), run(2, base, 20));
        let differences = compare(&good, &failing).unwrap();
        let p99 = &differences[5];
        assert_eq!((p99.measure, p99.after, p99.verdict), ("latency p99", None, Verdict::Worse));
        assert_eq!(differences[1].verdict, Verdict::Worse, "{:?}", differences[1]);
        assert!(differences[4].after.is_some(), "5 % hide no p90");
        assert_eq!(verdict(&failing, &failing, "latency p99"), Verdict::Unknown);
        let text = for_people(["a", "b"], [&good, &failing], &differences);
        assert!(text.contains("not known"), "{text}");
    }

    #[test]
    fn results_without_histograms_and_short_ones_are_told_apart() {
        let base = |_, random: f64| 0.010 + 0.004 * random;
        let whole = run(1, base, 0);
        let mut old = whole.clone();
        old.timeline[3].latency_histogram = None;
        assert!(compare(&whole, &old).unwrap_err().to_string().contains("older version"));
        old.timeline[3].latency_histogram = Some("AAAA".to_owned());
        assert!(compare(&whole, &old).unwrap_err().to_string().contains("damaged"));
        let short = Report { duration_seconds: 4.0, ..whole.clone() };
        let differences = compare(&whole, &short).unwrap();
        assert!(differences.iter().all(|difference| difference.verdict == Verdict::Unknown));
        assert!(for_people(["a", "b"], [&whole, &short], &differences).contains("4 seconds are too few"));
    }
}
