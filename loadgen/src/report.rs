//! Reports a run as text, as JSON (`--json`), as a table (`--csv`) and as histograms (`--hdr`).

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use data_encoding::BASE64;
use hdrhistogram::serialization::interval_log::IntervalLogWriterBuilder;
use hdrhistogram::serialization::{Deserializer, Serializer, V2DeflateSerializer};
use hdrhistogram::{Counter, Histogram};
use serde::{Deserialize, Serialize};

use crate::Failure;
use crate::about::About;
use crate::bound::Judgement;
use crate::http::lack_code;
use crate::print::table;
use crate::profile::Arrivals;
use crate::run::{Load, Mode, Outcome};
use crate::tally;
use crate::threshold::is_known;
use crate::units;

/// Percentiles of a time, in seconds.
#[derive(Clone, Copy, PartialEq, Default, Debug, Serialize, Deserialize)]
pub struct Percentiles {
    /// The median.
    pub p50: f64,
    /// The 90th percentile.
    pub p90: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// The 99.9th percentile.
    #[serde(rename = "p99.9")]
    pub p99_9: f64,
    /// The 99.99th percentile.
    #[serde(rename = "p99.99")]
    pub p99_99: f64,
    /// The maximum.
    pub max: f64,
}

impl Percentiles {
    /// Percentiles of a histogram in microseconds; all zero if it is empty.
    #[must_use]
    pub fn of<C: Counter>(histogram: &Histogram<C>) -> Self {
        let at = |quantile: f64| histogram.value_at_quantile(quantile) as f64 / 1e6;
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99), p99_9: at(0.999), p99_99: at(0.9999), max: at(1.0) }
    }

    /// The percentile at a quantile. If the quantile is not one of the fields, the next higher one is returned.
    #[must_use]
    pub fn at(&self, quantile: f64) -> f64 {
        match quantile {
            q if q <= 0.5 => self.p50,
            q if q <= 0.9 => self.p90,
            q if q <= 0.99 => self.p99,
            q if q <= 0.999 => self.p99_9,
            q if q <= 0.9999 => self.p99_99,
            _ => self.max,
        }
    }

    /// Names and values, in ascending order.
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
    /// Number of the second, from 0.
    pub second: usize,
    /// Releases that were due in this second.
    pub offered: u64,
    /// Releases that succeeded in this second, whenever they were due.
    pub achieved: u64,
    /// Releases that were due in this second and were dropped.
    pub dropped: u64,
    /// Releases that failed in this second.
    pub errors: u64,
    /// Latency of the releases that were due in this second; `None` if none of them succeeded.
    pub latency_seconds: Option<Percentiles>,
    /// The full distribution of this latency, for `compare`: an HDR histogram in microseconds (V2, deflated), in
    /// base64.
    #[serde(default)]
    pub latency_histogram: Option<String>,
    /// Service time of the releases that were due in this second.
    #[serde(default)]
    pub service_seconds: Option<Percentiles>,
    /// Releases that failed in this second, by error code.
    #[serde(default)]
    pub codes: BTreeMap<String, u64>,
}

impl Row {
    /// Latencies of the releases that were due in this second, in microseconds, with the number of releases for each;
    /// `None` if no release succeeded.
    ///
    /// # Errors
    /// The histogram is missing, as in results of older versions, or damaged.
    pub fn latencies(&self) -> Result<Vec<(u64, u64)>, Failure> {
        match (&self.latency_histogram, self.latency_seconds) {
            (None, None) => Ok(Vec::new()),
            (None, Some(_)) => Err("it has no histograms: it was made by an older version".into()),
            (Some(text), _) => {
                let bytes = BASE64.decode(text.as_bytes())?;
                let histogram: Histogram<u32> = Deserializer::new()
                    .deserialize(&mut bytes.as_slice())
                    .map_err(|error| format!("a histogram in it is damaged: {error}"))?;
                Ok(histogram.iter_recorded().map(|at| (at.value_iterated_to(), at.count_at_value().into())).collect())
            }
        }
    }
}

/// The load generator's own timing.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Generator {
    /// Delay between the time a request was due and the time it was sent.
    pub lag_seconds: Percentiles,
    /// The bound of the lag's p99. A run beyond it is invalid.
    pub lag_bound_seconds: f64,
    /// Number of processors that the load generator used, on average.
    pub processors: f64,
}

/// The results of checking replies.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Checked {
    /// The selection of replies to check.
    pub mode: String,
    /// Number of correct replies.
    pub right: u64,
    /// Number of wrong replies.
    pub wrong: u64,
    /// Number of replies that were selected but not checked, because the checks fell too far behind.
    pub unchecked: u64,
    /// The problem with the first wrong reply.
    pub first_wrong: Option<String>,
}

/// The settings of a run, except the profile.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// Number of hosts.
    pub hosts: usize,
    /// Number of virtual machines.
    pub vms: usize,
    /// Releases in one request.
    pub batch: usize,
    /// `v1.0`, `v2.0`, or `batch`.
    pub api: String,
    /// `true` if the egress protector of each release was used for the machine's next release.
    pub roll: bool,
    /// Largest number of requests in flight.
    pub in_flight: usize,
    /// Duration of the load before the measured time, in seconds.
    pub warmup_seconds: f64,
    /// Arrivals at a rate: `even` or `random`.
    #[serde(default = "even")]
    pub arrivals: String,
}

fn even() -> String {
    Arrivals::Even.as_str().to_owned()
}

/// A point of the distribution, for pictures.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Point {
    /// The quantile, from 0 to 1.
    pub quantile: f64,
    /// Latency at the quantile.
    pub latency_seconds: f64,
    /// Service time at the quantile.
    pub service_seconds: f64,
}

/// The explanation of overload in a report.
pub(crate) const OVERLOAD: &str =
    "more was due than was done, and what waited grew: a longer run would show longer times or more failures";

/// The report of a run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The test, the daemon and the machine.
    #[serde(default)]
    pub about: Option<About>,
    /// The name and version of the load generator.
    pub generator_version: String,
    /// The URL of the service.
    pub url: String,
    /// Start of the measured time, in seconds since 1970.
    pub began: u64,
    /// The profile, or `closed:N/DURATION`.
    pub profile: String,
    /// `open`, `storm` or `closed`.
    pub mode: String,
    /// The other settings.
    pub settings: Settings,
    /// `true` if the run is a valid measurement of the server.
    pub valid: bool,
    /// The reasons why the run is invalid.
    pub invalid_because: Vec<String>,
    /// `true` if the run was interrupted. The results then cover the time until the interruption.
    #[serde(default)]
    pub interrupted: bool,
    /// `true` if the number of open releases kept growing: more releases were due than the service completed. Set only
    /// for constant rates.
    #[serde(default)]
    pub overload: bool,
    /// The condition that ended the run early, and the measured value.
    #[serde(default)]
    pub stopped: Option<String>,
    /// Duration of the load in seconds, up to an interruption.
    pub duration_seconds: f64,
    /// Releases that were due.
    pub offered: u64,
    /// Releases that succeeded.
    pub achieved: u64,
    /// Releases that were due and not requested.
    pub dropped: u64,
    /// Dropped releases for which the load generator had no file or port, by error code.
    #[serde(default)]
    pub lacked: BTreeMap<String, u64>,
    /// Releases that were in flight when an interrupted run ended. They are counted nowhere else.
    #[serde(default)]
    pub abandoned: u64,
    /// `offered` ÷ duration.
    pub offered_per_second: f64,
    /// `achieved` ÷ the time from the first due release to the last reply, or ÷ the duration if that is longer. For a
    /// closed loop: successes in whole seconds ÷ the number of these seconds.
    pub achieved_per_second: f64,
    /// Releases that failed, by error code.
    pub errors: BTreeMap<String, u64>,
    /// Storms only: replies after which the request was repeated, by error code.
    pub retries: BTreeMap<String, u64>,
    /// The highest known quantile over all due releases, from 0 to 1. Releases that failed or were dropped have no
    /// time.
    #[serde(default)]
    pub known_to: f64,
    /// Time from when a release was due to the complete reply, for releases that succeeded.
    pub latency_seconds: Percentiles,
    /// Time from when the request was sent to the complete reply, for releases that succeeded.
    pub service_seconds: Percentiles,
    /// The load generator's own timing.
    pub generator: Generator,
    /// The results of checking replies.
    pub verify: Checked,
    /// The thresholds and their outcomes.
    pub thresholds: Vec<Judgement>,
    /// One row for each second.
    pub timeline: Vec<Row>,
    /// The distribution of latency and service time.
    pub distribution: Vec<Point>,
}

impl Report {
    /// Makes the report of a run.
    #[must_use]
    pub fn new(url: &str, load: &Load, hosts: usize, vms: usize, outcome: &Outcome) -> Self {
        let tally = &outcome.tally;
        let seconds = outcome.duration.as_secs_f64();
        let (profile, mode) = match &load.mode {
            Mode::Open(profile) if load.mode.is_storm() => (profile.to_string(), "storm"),
            Mode::Open(profile) => (profile.to_string(), "open"),
            Mode::Closed { callers, duration } => (format!("closed:{callers}/{}s", duration.as_secs_f64()), "closed"),
        };
        let row = |(second, row): (usize, &tally::Second)| Row {
            second,
            offered: row.offered,
            achieved: row.achieved,
            dropped: row.dropped,
            errors: row.errors,
            latency_seconds: (!row.latency.is_empty()).then(|| Percentiles::of(&row.latency)),
            service_seconds: (!row.service.is_empty()).then(|| Percentiles::of(&row.service)),
            codes: row.codes.iter().map(|(code, times)| (code.to_string(), *times)).collect(),
            latency_histogram: (!row.latency.is_empty()).then(|| encoded(&row.latency)).flatten(),
        };
        Self {
            about: None,
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
                arrivals: load.arrivals.as_str().to_owned(),
            },
            valid: outcome.invalid.is_empty(),
            invalid_because: outcome.invalid.clone(),
            interrupted: outcome.interrupted,
            overload: load.mode.is_constant()
                && tally::grows(&tally.seconds, outcome.duration.as_secs() as usize, load.arrivals),
            stopped: outcome.stopped.clone(),
            duration_seconds: seconds,
            offered: tally.offered,
            achieved: tally.achieved,
            dropped: tally.dropped,
            lacked: tally.lacks.iter().map(|(lack, times)| (lack_code(*lack).to_owned(), *times)).collect(),
            abandoned: tally.abandoned,
            offered_per_second: tally.offered as f64 / seconds,
            achieved_per_second: tally.achieved_per_second(seconds, mode == "closed"),
            errors: tally.errors.clone(),
            retries: tally.retries.clone(),
            known_to: if tally.achieved > 0 { 1.0 - tally.unsuccessful() } else { 0.0 },
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

    /// Number of releases that failed.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.errors.values().sum()
    }

    /// Share of the due releases that failed or were dropped. Percentiles above the remaining share are unknown.
    #[must_use]
    pub(crate) fn unsuccessful(&self) -> f64 {
        tally::unsuccessful(self.offered, self.failed(), self.dropped)
    }

    /// `true` if a percentile over all due releases is known. Releases that failed or were dropped have no time.
    #[must_use]
    pub fn knows(&self, quantile: f64) -> bool {
        self.achieved > 0 && is_known(quantile, self.unsuccessful())
    }

    /// Times at percentiles as text; an unknown percentile is marked.
    pub(crate) fn told(&self, times: &Percentiles) -> [(&'static str, String); 6] {
        let quantiles = [0.5, 0.9, 0.99, 0.999, 0.9999, 1.0];
        let mut quantiles = quantiles.into_iter();
        times.all().map(|(name, time)| {
            let known = quantiles.next().is_some_and(|quantile| self.knows(quantile));
            (name, if known { units::seconds(time) } else { "not known".to_owned() })
        })
    }

    /// The report as text.
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
            "{} at {}: {}, {}, {}{}{}",
            self.profile,
            self.url,
            plural(settings.hosts, "host"),
            plural(settings.vms, "machine"),
            if settings.batch > 1 { format!("{} in a request", settings.batch) } else { settings.api.clone() },
            if settings.roll { ", rolled" } else { "" },
            if settings.arrivals == "random" { ", at random times" } else { "" },
        ));
        if self.interrupted {
            let ran = units::seconds(self.duration_seconds);
            say(&format!(
                "INTERRUPTED after {ran}: this is what was measured until then ({} were still in flight)",
                plural(usize::try_from(self.abandoned).unwrap_or(usize::MAX), "release")
            ));
        }
        if let Some(reason) = &self.stopped {
            say(&format!("STOPPED after {}: {reason}", units::seconds(self.duration_seconds)));
        }
        if self.overload {
            say(&format!("OVERLOAD: {OVERLOAD}"));
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
            std::iter::once(what.to_owned()).chain(self.told(times).map(|(_, time)| time)).collect()
        };
        let lag = self.generator.lag_seconds.all().map(|(_, time)| units::seconds(time));
        say(&table(&[
            titles.collect(),
            times("latency", &self.latency_seconds),
            times("service", &self.service_seconds),
            std::iter::once("own lag".to_owned()).chain(lag).collect(),
        ]));
        if self.unsuccessful() > 0.0 {
            let known = (1.0 - self.unsuccessful()) * 100.0;
            say(&format!(
                "what failed or was dropped has no time: beyond p{known:.2} of all that was due nothing is known\n"
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

    /// The timeline as a table with a line for each second. Times are in seconds, and empty if there is none. `time` is
    /// the start of the second in UTC. The last columns are the errors by code.
    #[must_use]
    pub fn to_csv(&self) -> String {
        let names = Percentiles::default().all().map(|(name, _)| name);
        let service = names.map(|name| format!("service.{name}"));
        let codes: Vec<_> = self.errors.keys().map(String::as_str).collect();
        let fixed = ["second", "offered", "achieved", "dropped", "errors"];
        let head: Vec<&str> = fixed
            .into_iter()
            .chain(names)
            .chain(["time"])
            .chain(service.iter().map(String::as_str))
            .chain(codes.iter().copied())
            .collect();
        let mut out = head.join(",");
        for row in &self.timeline {
            let times = |times: &Option<Percentiles>| match times {
                Some(times) => times.all().map(|(_, time)| time.to_string()).to_vec(),
                None => vec![String::new(); names.len()],
            };
            let counts = [row.second as u64, row.offered, row.achieved, row.dropped, row.errors];
            let cells: Vec<String> = counts
                .iter()
                .map(u64::to_string)
                .chain(times(&row.latency_seconds))
                .chain([units::timestamp(self.began + row.second as u64)])
                .chain(times(&row.service_seconds))
                .chain(codes.iter().map(|code| row.codes.get(*code).copied().unwrap_or(0).to_string()))
                .collect();
            out.push('\n');
            out.push_str(&cells.join(","));
        }
        out.push('\n');
        out
    }
}

/// Formats a histogram in microseconds as a distribution in milliseconds, in the format of HdrHistogram's tools
/// (`.hgrm`).
#[must_use]
pub fn hgrm(histogram: &Histogram<u64>) -> String {
    let mut out = "       Value     Percentile TotalCount 1/(1-Percentile)\n\n".to_owned();
    let mut below = 0;
    // Five steps for each half of the remaining values, as in the other tools.
    for at in histogram.iter_quantiles(5) {
        below += at.count_since_last_iteration();
        let (value, quantile) = (at.value_iterated_to() as f64 / 1e3, at.quantile_iterated_to());
        let rest = if quantile < 1.0 { format!("{:>14.2}", 1.0 / (1.0 - quantile)) } else { String::new() };
        out.push_str(&format!("{value:>12.3} {quantile:2.12} {below:>10} {rest}\n"));
    }
    let (mean, deviation) = (histogram.mean() / 1e3, histogram.stdev() / 1e3);
    out.push_str(&format!("#[Mean    = {mean:>12.3}, StdDeviation   = {deviation:>12.3}]\n"));
    let (max, count) = (histogram.max() as f64 / 1e3, histogram.len());
    out.push_str(&format!("#[Max     = {max:>12.3}, Total count    = {count:>12}]\n"));
    let (buckets, each) = (histogram.distinct_values(), 10_u64.pow(histogram.sigfig().into()));
    out.push_str(&format!("#[Buckets = {buckets:>12}, SubBuckets     = {each:>12}]\n"));
    out
}

/// Encodes a histogram as text; `None` if it cannot be encoded, which only an extremely large counter causes.
fn encoded(histogram: &Histogram<u32>) -> Option<String> {
    let mut bytes = Vec::new();
    V2DeflateSerializer::new().serialize(histogram, &mut bytes).ok()?;
    Some(BASE64.encode(&bytes))
}

/// Points with decreasing distance towards quantile 1, as far as the values differ.
fn distribution(latency: &Histogram<u64>, service: &Histogram<u64>) -> Vec<Point> {
    let mut points = Vec::new();
    let (mut quantile, count) = (0.0, latency.len() as f64);
    while count > 0.0 && (1.0 - quantile) * count >= 1.0 {
        let at = |histogram: &Histogram<u64>| histogram.value_at_quantile(quantile) as f64 / 1e6;
        points.push(Point { quantile, latency_seconds: at(latency), service_seconds: at(service) });
        // Twelve steps for each half of the remaining values.
        quantile += (1.0 - quantile) / 18.0;
    }
    points
}

/// The histograms of latency, one for each second, in the HDR log format V2. Values are in microseconds and shown in
/// milliseconds.
///
/// # Errors
/// A histogram cannot be encoded, which only an extremely large counter causes.
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;
    use crate::profile::Profile;
    use crate::tally::{Event, Tally};
    use crate::threshold::Threshold;
    use claviger_protocol::payload::ApiVersion;

    /// Makes a report of a tally over a number of seconds.
    pub(crate) fn told(tally: Tally, seconds: u64) -> Report {
        let duration = Duration::from_secs(seconds);
        let load = Load {
            mode: Mode::Open(Profile::constant(duration, tally.offered as f64 / seconds as f64)),
            arrivals: Arrivals::Even,
            warmup: Duration::ZERO,
            in_flight: 16,
            batch: None,
            api: ApiVersion::V2,
            roll: false,
            verify: "all".parse().unwrap(),
            max_lag: Duration::from_secs(1),
            handicap: Duration::ZERO,
            show: false,
            stop: Vec::new(),
        };
        let invalid = Vec::new();
        let outcome = Outcome {
            tally,
            duration,
            interrupted: false,
            stopped: None,
            processors: 0.1,
            invalid,
            began: 951_827_696,
        };
        Report::new("http://127.0.0.1:1", &load, 1, 1, &outcome)
    }

    #[test]
    fn what_failures_hide_is_not_known_anywhere() {
        let mut tally = Tally::default();
        for at in 0..1_000 {
            let (released, errors) = if at % 50 == 0 { (0, vec![("Timeout".into(), 1)]) } else { (1, Vec::new()) };
            let due = f64::from(at) / 100.0;
            tally.count(Event::Done {
                due,
                lag: 0.0,
                service: 0.01,
                latency: 0.02,
                released,
                errors,
                retries: Vec::new(),
            });
        }
        let mut report = told(tally.clone(), 10);
        // 2 % of the releases failed.
        assert!(report.knows(0.98) && !report.knows(0.99) && (report.known_to - 0.98).abs() < 1e-9);
        let known: Vec<_> = report.told(&report.latency_seconds).map(|(_, time)| time != "not known").to_vec();
        assert_eq!(known, [true, true, false, false, false, false]);
        for (text, passed) in [("p90<1s", true), ("p99<1s", false), ("service.max<1s", false)] {
            let judgement = text.parse::<Threshold>().unwrap().judge(&tally, report.achieved_per_second);
            assert_eq!(judgement.passed, passed, "{judgement:?}");
            report.thresholds.push(judgement);
        }
        let text = report.for_people();
        let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        assert_eq!(line("latency").matches("not known").count(), 4, "{text}");
        assert_eq!(line("service").matches("not known").count(), 4, "{text}");
        let page = crate::html::run(&report);
        assert!(page.contains("<b class=\"unknown\">not known</b><span>latency, p99</span>"), "{page}");
    }

    #[test]
    fn overload_is_not_told_as_if_it_were_a_steady_state() {
        let at = |served: f64| {
            let mut tally = Tally::default();
            for at in 0..1_000 {
                let due = f64::from(at) / 100.0;
                let latency = (f64::from(at) / served - due).max(0.0) + 0.05;
                let (errors, retries) = (Vec::new(), Vec::new());
                tally.count(Event::Done { due, lag: 0.0, service: latency, latency, released: 1, errors, retries });
            }
            told(tally, 10)
        };
        let (good, over) = (at(101.0), at(90.0));
        assert!(!good.overload && !good.for_people().contains("OVERLOAD"));
        assert!(over.overload && over.for_people().contains("OVERLOAD: more was due than was done"));
        assert!(crate::html::run(&over).contains("Overload: more was due"));
    }

    #[test]
    fn the_table_of_seconds_has_wall_clock_service_times_and_codes() {
        let mut tally = Tally::default();
        for (due, errors) in [(0.2, vec![]), (1.2, vec![("Timeout".into(), 2), ("Http502".into(), 1)])] {
            let (lag, service, latency, retries) = (0.0, 0.010, 0.020, Vec::new());
            tally.count(Event::Done { due, lag, service, latency, released: 1, errors, retries });
        }
        let csv = told(tally, 2).to_csv();
        let rows: Vec<Vec<_>> = csv.lines().map(|line| line.split(',').collect()).collect();
        let column = |name: &str| rows[0].iter().position(|head| *head == name).unwrap();
        assert!(
            csv.starts_with("second,offered,achieved,dropped,errors,p50,p90,p99,p99.9,p99.99,max,time,service.p50,")
        );
        assert!(rows.iter().all(|row| row.len() == rows[0].len()), "{csv}");
        assert_eq!(
            (rows[1][column("time")], rows[2][column("time")]),
            ("2000-02-29T12:34:56Z", "2000-02-29T12:34:57Z")
        );
        assert_eq!(
            (rows[1][column("Timeout")], rows[2][column("Timeout")], rows[2][column("Http502")]),
            ("0", "2", "1")
        );
        assert!(rows[1][column("service.p99")].starts_with("0.01"), "{csv}");
    }

    #[test]
    fn a_distribution_is_written_as_other_tools_read_it() {
        let mut histogram = Histogram::new(3).unwrap();
        (1..=1_000_u64).for_each(|millis| histogram.record(millis * 1_000).unwrap());
        let text = hgrm(&histogram);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[0].split_whitespace().collect::<Vec<_>>(),
            ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"]
        );
        let numbers = |line: &str| line.split_whitespace().map(|n| n.parse::<f64>().unwrap()).collect::<Vec<_>>();
        let median = lines.iter().find(|line| line.contains(" 0.500000000000 ")).map(|line| numbers(line)).unwrap();
        assert!((median[0] - 500.0).abs() < 1.0 && (median[2] - 500.0).abs() <= 1.0 && median[3] == 2.0, "{median:?}");
        let last = lines.iter().rfind(|line| !line.starts_with('#')).map(|line| numbers(line)).unwrap();
        assert_eq!((last[1], last[2], last.len()), (1.0, 1000.0, 3));
        assert!(text.contains("#[Max     =     1000.") && text.contains("Total count    =         1000]"), "{text}");
    }

    #[test]
    fn histograms_of_seconds_survive_being_written() {
        let mut tally = Tally::default();
        for (due, latency) in [(0.1, 0.010), (0.2, 0.010), (0.3, 2.05), (1.5, 0.020)] {
            let (errors, retries) = (Vec::new(), Vec::new());
            tally.count(Event::Done { due, lag: 0.0, service: latency, latency, released: 1, errors, retries });
        }
        let report = told(tally, 3);
        let report: Report = serde_json::from_str(&serde_json::to_string(&report).unwrap()).unwrap();
        let latencies: Vec<_> = report.timeline.iter().map(|row| row.latencies().unwrap()).collect();
        assert_eq!(latencies[0].iter().map(|(_, times)| *times).collect::<Vec<_>>(), [2, 1]);
        assert!((latencies[0][1].0 as f64 / 2.05e6 - 1.0).abs() < 1e-3, "{latencies:?}");
        assert_eq!((latencies[1].len(), latencies[2].len()), (1, 0));
    }
}
