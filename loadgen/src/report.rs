//! What a run is told as: for people, for machines (`--json`), as a table (`--csv`), as histograms (`--hdr`).

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::IntervalLogWriterBuilder;
use hdrhistogram::{Counter, Histogram};
use serde::{Deserialize, Serialize};

use crate::Failure;
use crate::http::lack_code;
use crate::print::table;
use crate::record;
use crate::run::{Load, Mode, Outcome};
use crate::units;

/// Percentiles of a time, in seconds.
#[derive(Clone, Copy, PartialEq, Default, Debug, Serialize, Deserialize)]
pub struct Percentiles {
    /// The median.
    pub p50: f64,
    /// Nine of ten are at most this.
    pub p90: f64,
    /// 99 of 100.
    pub p99: f64,
    /// 999 of 1,000.
    #[serde(rename = "p99.9")]
    pub p99_9: f64,
    /// 9,999 of 10,000.
    #[serde(rename = "p99.99")]
    pub p99_99: f64,
    /// All.
    pub max: f64,
}

impl Percentiles {
    /// Of a histogram in microseconds; all zero when it is empty.
    #[must_use]
    pub fn of<C: Counter>(histogram: &Histogram<C>) -> Self {
        let at = |quantile: f64| histogram.value_at_quantile(quantile) as f64 / 1e6;
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99), p99_9: at(0.999), p99_99: at(0.9999), max: at(1.0) }
    }

    /// Names and values, in order.
    #[must_use]
    pub fn all(&self) -> [(&'static str, f64); 6] {
        [
            ("p50", self.p50),
            ("p90", self.p90),
            ("p99", self.p99),
            ("p99.9", self.p99_9),
            ("p99.99", self.p99_99),
            ("max", self.max),
        ]
    }
}

/// One second of a run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Which, from 0.
    pub second: usize,
    /// Releases that were due in it.
    pub offered: u64,
    /// Releases that succeeded in it, whenever they were due.
    pub achieved: u64,
    /// Of those due in it, how many were dropped.
    pub dropped: u64,
    /// Releases that failed in it.
    pub errors: u64,
    /// Latency of those due in it; `None` when none of them succeeded.
    pub latency_seconds: Option<Percentiles>,
}

/// How the load generator itself did.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Generator {
    /// How late it was to send what was due.
    pub lag_seconds: Percentiles,
    /// The bound of the lag's p99; beyond it the run is invalid.
    pub lag_bound_seconds: f64,
    /// What it used of the processors, on average.
    pub processors: f64,
}

/// What checking replies found.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Checked {
    /// Which replies were to be checked.
    pub mode: String,
    /// Found right.
    pub right: u64,
    /// Found wrong.
    pub wrong: u64,
    /// Not checked, though they were to be: the checks fell too far behind.
    pub unchecked: u64,
    /// What was wrong with the first wrong one.
    pub first_wrong: Option<String>,
}

/// What was asked for, besides the profile.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// Hosts that ask.
    pub hosts: usize,
    /// Machines they ask for.
    pub vms: usize,
    /// Releases in one request.
    pub batch: usize,
    /// `v1.0`, `v2.0`, or `batch`.
    pub api: String,
    /// Whether each release fed the machine's next one.
    pub roll: bool,
    /// Most requests in flight.
    pub in_flight: usize,
    /// Before the measured time.
    pub warmup_seconds: f64,
}

/// A point of the distribution, for pictures.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Point {
    /// From 0 to 1.
    pub quantile: f64,
    /// Latency at it.
    pub latency_seconds: f64,
    /// Service time at it.
    pub service_seconds: f64,
}

/// A threshold that was asked for, and how it was met.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Judgement {
    /// As it was written.
    pub threshold: String,
    /// What was measured, in words.
    pub measured: String,
    /// Whether it holds.
    pub passed: bool,
}

/// A run, told.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The program and its version.
    pub generator_version: String,
    /// The service.
    pub url: String,
    /// Seconds since 1970 at the first measured moment.
    pub began: u64,
    /// The profile, or `closed:N/DURATION`.
    pub profile: String,
    /// `open`, `storm` or `closed`.
    pub mode: String,
    /// What else was asked for.
    pub settings: Settings,
    /// Whether the run says something about the server.
    pub valid: bool,
    /// Why not.
    pub invalid_because: Vec<String>,
    /// Whether the run was interrupted; the rest is what was measured until then.
    #[serde(default)]
    pub interrupted: bool,
    /// How long load was asked for, or until the run was interrupted.
    pub duration_seconds: f64,
    /// Releases that were due.
    pub offered: u64,
    /// Releases that succeeded.
    pub achieved: u64,
    /// Releases that were due and not asked for.
    pub dropped: u64,
    /// Of those, how many the load generator had no file or port for, by code.
    #[serde(default)]
    pub lacked: BTreeMap<String, u64>,
    /// Releases that were in flight when an interrupted run ended; they are counted nowhere else.
    #[serde(default)]
    pub abandoned: u64,
    /// `offered` ÷ duration.
    pub offered_per_second: f64,
    /// `achieved` ÷ the time from the first due to the last answer, or the duration if that is longer.
    pub achieved_per_second: f64,
    /// Releases that failed, by code.
    pub errors: BTreeMap<String, u64>,
    /// Storms: answers after which it was asked again, by code.
    pub retries: BTreeMap<String, u64>,
    /// From when a release was due to its whole answer; of those that succeeded.
    pub latency_seconds: Percentiles,
    /// From when it was sent to its whole answer; of those that succeeded.
    pub service_seconds: Percentiles,
    /// How the load generator itself did.
    pub generator: Generator,
    /// What checking found.
    pub verify: Checked,
    /// Thresholds that were asked for.
    pub thresholds: Vec<Judgement>,
    /// By second.
    pub timeline: Vec<Row>,
    /// The distribution of both times.
    pub distribution: Vec<Point>,
}

impl Report {
    /// Tells a run.
    #[must_use]
    pub fn new(url: &str, load: &Load, hosts: usize, vms: usize, outcome: &Outcome) -> Self {
        let tally = &outcome.tally;
        let seconds = outcome.duration.as_secs_f64();
        let (profile, mode) = match &load.mode {
            Mode::Open(profile) if load.mode.is_storm() => (profile.to_string(), "storm"),
            Mode::Open(profile) => (profile.to_string(), "open"),
            Mode::Closed { callers, duration } => (format!("closed:{callers}/{}s", duration.as_secs_f64()), "closed"),
        };
        let row = |(second, row): (usize, &crate::record::Second)| Row {
            second,
            offered: row.offered,
            achieved: row.achieved,
            dropped: row.dropped,
            errors: row.errors,
            latency_seconds: (!row.latency.is_empty()).then(|| Percentiles::of(&row.latency)),
        };
        Self {
            generator_version: concat!("claviger-loadgen ", env!("CARGO_PKG_VERSION")).to_owned(),
            url: url.to_owned(),
            began: outcome.began,
            profile,
            mode: mode.to_owned(),
            settings: Settings {
                hosts,
                vms,
                batch: load.batch.unwrap_or(1),
                api: if load.batch.is_some() { "batch" } else { load.api.as_str() }.to_owned(),
                roll: load.roll,
                in_flight: load.in_flight,
                warmup_seconds: if load.mode.is_storm() { 0.0 } else { load.warmup.as_secs_f64() },
            },
            valid: outcome.invalid.is_empty(),
            invalid_because: outcome.invalid.clone(),
            interrupted: outcome.interrupted,
            duration_seconds: seconds,
            offered: tally.offered,
            achieved: tally.achieved,
            dropped: tally.dropped,
            lacked: tally.lacks.iter().map(|(lack, times)| (lack_code(*lack).to_owned(), *times)).collect(),
            abandoned: tally.abandoned,
            offered_per_second: tally.offered as f64 / seconds,
            achieved_per_second: tally.achieved as f64 / seconds.max(tally.last),
            errors: tally.errors.clone(),
            retries: tally.retries.clone(),
            latency_seconds: Percentiles::of(&tally.latency),
            service_seconds: Percentiles::of(&tally.service),
            generator: Generator {
                lag_seconds: Percentiles::of(&tally.lag),
                lag_bound_seconds: load.max_lag.as_secs_f64(),
                processors: outcome.processors,
            },
            verify: Checked {
                mode: load.verify.to_string(),
                right: tally.right,
                wrong: tally.wrong,
                unchecked: tally.unchecked,
                first_wrong: tally.first_wrong.clone(),
            },
            thresholds: Vec::new(),
            timeline: tally.seconds.iter().enumerate().map(row).collect(),
            distribution: distribution(&tally.latency, &tally.service),
        }
    }

    /// Releases that failed.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.errors.values().sum()
    }

    /// Share of those due that did not succeed: dropped and failed. Percentiles above the rest are not known.
    #[must_use]
    pub fn unsuccessful(&self) -> f64 {
        record::unsuccessful(self.offered, self.failed(), self.dropped)
    }

    /// For a person.
    #[must_use]
    pub fn for_people(&self) -> String {
        let mut out = String::new();
        let mut say = |line: &str| {
            out.push_str(line);
            out.push('\n');
        };
        let settings = &self.settings;
        let plural = |count: usize, what: &str| {
            format!("{} {what}{}", units::count(count as f64), if count == 1 { "" } else { "s" })
        };
        say(&format!(
            "{} at {}: {}, {}, {}{}",
            self.profile,
            self.url,
            plural(settings.hosts, "host"),
            plural(settings.vms, "machine"),
            if settings.batch > 1 { format!("{} in a request", settings.batch) } else { settings.api.clone() },
            if settings.roll { ", rolled" } else { "" },
        ));
        if self.interrupted {
            let ran = units::seconds(self.duration_seconds);
            say(&format!(
                "INTERRUPTED after {ran}: this is what was measured until then ({} were still in flight)",
                plural(usize::try_from(self.abandoned).unwrap_or(usize::MAX), "release")
            ));
        }
        say("");
        let share = |part: u64| if self.offered == 0 { 0.0 } else { part as f64 / self.offered as f64 };
        let number = |what: &str, number: u64, aside: String| vec![what.to_owned(), units::count(number as f64), aside];
        let counts = table(&[
            number("offered", self.offered, format!("{}/s", units::per_second(self.offered_per_second))),
            number("achieved", self.achieved, format!("{}/s", units::per_second(self.achieved_per_second))),
            number("dropped", self.dropped, units::percent(share(self.dropped))),
            number("errors", self.failed(), units::percent(share(self.failed()))),
        ]);
        say(counts.trim_end());
        for (code, times) in &self.lacked {
            say(&format!("  {code}, by the generator's own fault: {}", units::count(*times as f64)));
        }
        for (code, times) in &self.errors {
            say(&format!("  {code}: {}", units::count(*times as f64)));
        }
        for (code, times) in &self.retries {
            say(&format!("  {code}, asked again: {}", units::count(*times as f64)));
        }
        say("");
        let titles = std::iter::once(String::new()).chain(self.latency_seconds.all().map(|(name, _)| name.to_owned()));
        let times = |what: &str, times: &Percentiles| {
            std::iter::once(what.to_owned()).chain(times.all().map(|(_, time)| units::seconds(time))).collect()
        };
        say(&table(&[
            titles.collect(),
            times("latency", &self.latency_seconds),
            times("service", &self.service_seconds),
            times("own lag", &self.generator.lag_seconds),
        ]));
        if self.unsuccessful() > 0.0001 {
            let known = (1.0 - self.unsuccessful()) * 100.0;
            say(&format!(
                "times are of those that succeeded: beyond p{known:.2} of all that was due nothing is known\n"
            ));
        }
        if self.mode == "storm" {
            let last = self.latency_seconds.max;
            say(&format!(
                "{} of {} machines have their keys; the slowest waited {}",
                units::count(self.achieved as f64),
                units::count(self.offered as f64),
                units::seconds(last)
            ));
        }
        if self.mode == "closed" {
            say("closed loop: a caller that waits offers nothing, so latency is service time");
        }
        let checked = &self.verify;
        let mut verdict =
            format!("{} replies checked ({})", units::count((checked.right + checked.wrong) as f64), checked.mode);
        match &checked.first_wrong {
            None => verdict.push_str(": all right"),
            Some(problem) => verdict.push_str(&format!(": {} WRONG; the first: {problem}", checked.wrong)),
        }
        if checked.unchecked > 0 {
            verdict.push_str(&format!("; {} more were to be checked, but the checks fell behind", checked.unchecked));
        }
        say(&verdict);
        if self.valid {
            let bound = units::seconds(self.generator.lag_bound_seconds);
            let processors = self.generator.processors;
            say(&format!(
                "valid: the generator kept up (p99 of its own lag within {bound}; it used {processors:.2} processors)"
            ));
        }
        for reason in &self.invalid_because {
            say(&format!("INVALID: {reason}"));
        }
        for judgement in &self.thresholds {
            let verdict = if judgement.passed { "passed" } else { "FAILED" };
            say(&format!("{verdict}: {} ({})", judgement.threshold, judgement.measured));
        }
        out.truncate(out.trim_end().len());
        out
    }

    /// The timeline as a table; times in seconds, empty where there is none.
    #[must_use]
    pub fn to_csv(&self) -> String {
        let mut out = "second,offered,achieved,dropped,errors,p50,p90,p99,p99.9,p99.99,max\n".to_owned();
        for row in &self.timeline {
            let times = match &row.latency_seconds {
                Some(times) => times.all().map(|(_, time)| time.to_string()).join(","),
                None => ",,,,,".to_owned(),
            };
            let Row { second, offered, achieved, dropped, errors, .. } = row;
            out.push_str(&format!("{second},{offered},{achieved},{dropped},{errors},{times}\n"));
        }
        out
    }
}

/// Ever finer towards 1: as far as there are values to tell apart.
fn distribution(latency: &Histogram<u64>, service: &Histogram<u64>) -> Vec<Point> {
    let mut points = Vec::new();
    let (mut quantile, count) = (0.0, latency.len() as f64);
    while count > 0.0 && (1.0 - quantile) * count >= 1.0 {
        let at = |histogram: &Histogram<u64>| histogram.value_at_quantile(quantile) as f64 / 1e6;
        points.push(Point { quantile, latency_seconds: at(latency), service_seconds: at(service) });
        // Twelve steps to each half of what is left.
        quantile += (1.0 - quantile) / 18.0;
    }
    points
}

/// The histograms of latency, one for each second, in the HDR log format V2; microseconds, shown as milliseconds.
///
/// # Errors
/// A histogram cannot be written, which takes a counter beyond all bounds.
pub fn hdr_log(outcome: &Outcome) -> Result<Vec<u8>, Failure> {
    let mut out = Vec::new();
    let mut serializer = V2DeflateSerializer::new();
    let start = UNIX_EPOCH + Duration::from_secs(outcome.began);
    let mut writer = IntervalLogWriterBuilder::new()
        .add_comment("claviger-loadgen: latency from due to answered, in microseconds, by second of being due")
        .with_start_time(start)
        .with_base_time(start)
        .with_max_value_divisor(1e3)
        .begin_log_with(&mut out, &mut serializer)?;
    for (second, row) in (0..).zip(&outcome.tally.seconds) {
        if !row.latency.is_empty() {
            let from = Duration::from_secs(second);
            writer
                .write_histogram(&row.latency, from, Duration::from_secs(1), None)
                .map_err(|error| format!("the histogram log cannot be written: {error:?}"))?;
        }
    }
    Ok(out)
}
