//! Two runs, held against each other: what differs, and what is noise.
//!
//! The bounds come from the runs' own seconds: a moving-block bootstrap of each run's per-second values, since what is slow
//! in one second is likely to be slow in the next. What is compared is the mean over the seconds.

use serde::Serialize;

use crate::print::table;
use crate::report::{Report, Row};
use crate::units;

/// Resamplings.
const ROUNDS: usize = 2_000;
/// The share of resamplings within the bounds: 95 %.
const TAILS: f64 = 0.025;
/// Fewer seconds than this tell nothing of noise.
const FEWEST: usize = 5;

/// What became of a measure.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Better, beyond noise.
    Better,
    /// Worse, beyond noise.
    Worse,
    /// No difference that noise would not make.
    Same,
    /// Too few seconds to tell.
    Unknown,
}

/// One measure of both runs.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Difference {
    /// What.
    pub measure: &'static str,
    /// Mean over the seconds of the first run.
    pub before: f64,
    /// Mean over the seconds of the second run.
    pub after: f64,
    /// Bounds of `after − before`, 95 %; `None` when there are too few seconds.
    pub bounds: Option<[f64; 2]>,
    /// What follows.
    pub verdict: Verdict,
}

type Measure = fn(&Row) -> Option<f64>;

/// Name, value of a second, whether more is better.
const MEASURES: [(&str, Measure, bool); 7] = [
    ("released/s", |row| Some(row.achieved as f64), true),
    ("failed/s", |row| Some(row.errors as f64), false),
    ("dropped/s", |row| Some(row.dropped as f64), false),
    ("latency p50", |row| Some(row.latency_seconds?.p50), false),
    ("latency p90", |row| Some(row.latency_seconds?.p90), false),
    ("latency p99", |row| Some(row.latency_seconds?.p99), false),
    ("latency max", |row| Some(row.latency_seconds?.max), false),
];

/// Compares two runs.
#[must_use]
pub fn compare(before: &Report, after: &Report) -> Vec<Difference> {
    let difference = |(measure, value, more_is_better): (&'static str, Measure, bool)| {
        let values = |report: &Report| {
            // Answers that came after the end belong to seconds in which nothing was due any more.
            let asked = report.duration_seconds.ceil() as usize;
            report.timeline.iter().take(asked).filter_map(value).collect::<Vec<_>>()
        };
        let (before, after) = (values(before), values(after));
        let bounds = bounds(&before, &after);
        let verdict = match bounds {
            None => Verdict::Unknown,
            Some([low, high]) if low <= 0.0 && high >= 0.0 => Verdict::Same,
            Some([low, _]) if (low > 0.0) == more_is_better => Verdict::Better,
            Some(_) => Verdict::Worse,
        };
        Difference { measure, before: mean(&before), after: mean(&after), bounds, verdict }
    };
    MEASURES.map(difference).to_vec()
}

fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

fn bounds(before: &[f64], after: &[f64]) -> Option<[f64; 2]> {
    if before.len().min(after.len()) < FEWEST {
        return None;
    }
    // Seeded: the same files give the same bounds.
    let mut lots = fastrand::Rng::with_seed(1);
    let mut differences: Vec<f64> =
        (0..ROUNDS).map(|_| resampled(after, &mut lots) - resampled(before, &mut lots)).collect();
    differences.sort_by(f64::total_cmp);
    let at = |share: f64| differences[((ROUNDS - 1) as f64 * share).round() as usize];
    Some([at(TAILS), at(1.0 - TAILS)])
}

/// The mean of as many values, drawn in runs of neighbours.
fn resampled(values: &[f64], lots: &mut fastrand::Rng) -> f64 {
    let block = (values.len() as f64).cbrt().ceil() as usize;
    let mut sum = 0.0;
    let mut drawn = 0;
    while drawn < values.len() {
        let start = lots.usize(..values.len());
        for at in (start..).take(block.min(values.len() - drawn)) {
            sum += values[at % values.len()];
            drawn += 1;
        }
    }
    sum / values.len() as f64
}

/// For a person.
#[must_use]
pub fn for_people(names: [&str; 2], reports: [&Report; 2], differences: &[Difference]) -> String {
    let mut out = String::new();
    for (name, report) in names.iter().zip(reports) {
        let valid = if report.valid { "" } else { " INVALID: the generator was too slow, so this proves nothing" };
        out.push_str(&format!("{name}: {} at {}{valid}\n", report.profile, report.url));
    }
    if reports[0].profile != reports[1].profile || reports[0].settings != reports[1].settings {
        out.push_str("these runs did not ask for the same: compare with care\n");
    }
    out.push('\n');
    let head = ["mean over the seconds", names[0], names[1], "change", "95 % bounds", ""].map(str::to_owned);
    let mut rows = vec![head.to_vec()];
    for difference in differences {
        let show = |value: f64| {
            if difference.measure.starts_with("latency") {
                let sign = if value < 0.0 { "-" } else { "" };
                format!("{sign}{}", units::seconds(value.abs()))
            } else {
                format!("{value:.1}")
            }
        };
        let Difference { measure, before, after, bounds, verdict } = difference;
        let change = if *before == 0.0 { "-".to_owned() } else { format!("{:+.1} %", (after / before - 1.0) * 100.0) };
        let bounds =
            bounds.map_or("too few seconds".to_owned(), |[low, high]| format!("{} … {}", show(low), show(high)));
        let verdict = match verdict {
            Verdict::Better => "better",
            Verdict::Worse => "WORSE",
            Verdict::Same => "noise",
            Verdict::Unknown => "?",
        };
        rows.push(vec![(*measure).to_owned(), show(*before), show(*after), change, bounds, verdict.to_owned()]);
    }
    out.push_str(&table(&rows));
    out.truncate(out.trim_end().len());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noisy(mean: f64, seed: u64) -> Vec<f64> {
        let mut lots = fastrand::Rng::with_seed(seed);
        (0..60).map(|_| mean + lots.f64() - 0.5).collect()
    }

    #[test]
    fn differences_beyond_noise_are_found_and_noise_is_not() {
        let within = |bounds: Option<[f64; 2]>| bounds.is_some_and(|[low, high]| low <= 0.0 && high >= 0.0);
        let same = (0..20).filter(|seed| within(bounds(&noisy(10.0, *seed), &noisy(10.0, seed + 100)))).count();
        assert!(same >= 16, "{same} of 20");
        assert!((0..20).all(|seed| !within(bounds(&noisy(10.0, seed), &noisy(10.5, seed + 100)))));
        assert_eq!(bounds(&[1.0; 4], &[1.0; 60]), None);
        assert_eq!(bounds(&[1.0; 10], &[1.0; 10]), Some([0.0, 0.0]));
    }
}
