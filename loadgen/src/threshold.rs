//! Conditions for a run: `p99<50ms`, `errors<0.1%`, `achieved>490/s`.

use std::fmt;
use std::str::FromStr;

use crate::bound::{Bound, Judgement, Of};
use crate::tally::Tally;
use crate::units;

/// The measured quantity of a condition.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Measure {
    /// Latency at a quantile from 0 to 1.
    Latency(f64),
    /// Service time at a quantile.
    Service(f64),
    /// Share of the due releases that failed.
    Errors,
    /// Share of the due releases that were dropped.
    Dropped,
    /// Successful releases a second.
    Achieved,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Relation {
    Less,
    AtMost,
    More,
    AtLeast,
}

impl Relation {
    fn holds(self, value: f64, bound: f64) -> bool {
        match self {
            Self::Less => value < bound,
            Self::AtMost => value <= bound,
            Self::More => value > bound,
            Self::AtLeast => value >= bound,
        }
    }

    fn is_upper_bound(self) -> bool {
        matches!(self, Self::Less | Self::AtMost)
    }
}

/// A condition.
#[derive(Clone, PartialEq, Debug)]
pub struct Threshold {
    text: String,
    measure: Measure,
    relation: Relation,
    /// The bound: seconds, a share, or releases a second.
    bound: f64,
}

const HELP: &str = "write it like p99<50ms, service.p99.9<1s, max<2s, errors<0.1%, dropped<1% or achieved>490/s";

impl FromStr for Threshold {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let at = text.find(['<', '>']).ok_or_else(|| format!("{text:?} has neither < nor >; {HELP}"))?;
        let (name, rest) = text.split_at(at);
        let (relation, bound) =
            [("<=", Relation::AtMost), (">=", Relation::AtLeast), ("<", Relation::Less), (">", Relation::More)]
                .into_iter()
                .find_map(|(sign, relation)| Some((relation, rest.strip_prefix(sign)?)))
                .ok_or_else(|| format!("{text:?} cannot be read; {HELP}"))?;
        let measure = match name.trim() {
            "errors" => Measure::Errors,
            "dropped" => Measure::Dropped,
            "achieved" => Measure::Achieved,
            name => match name.strip_prefix("service.") {
                Some(name) => quantile(name).map(Measure::Service),
                None => quantile(name).map(Measure::Latency),
            }
            .ok_or_else(|| format!("{name:?} is not measured; {HELP}"))?,
        };
        let bound = match measure {
            Measure::Latency(_) | Measure::Service(_) => units::duration(bound)?.as_secs_f64(),
            Measure::Errors | Measure::Dropped => units::share(bound)?,
            Measure::Achieved => units::rate(bound)?,
        };
        Ok(Self { text: text.to_owned(), measure, relation, bound })
    }
}

/// Parses a quantile: `p99.9` → 0.999, `max` → 1.
fn quantile(name: &str) -> Option<f64> {
    if name == "max" {
        return Some(1.0);
    }
    let percent: f64 = name.strip_prefix('p')?.parse().ok()?;
    (0.0..=100.0).contains(&percent).then_some(percent / 100.0)
}

impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Parses several conditions, separated by commas.
///
/// # Errors
/// A sentence that explains the syntax.
pub fn list(text: &str) -> Result<Vec<Threshold>, String> {
    text.split(',').map(str::parse).collect()
}

/// Parses objectives, separated by commas: conditions on latency and errors only.
///
/// # Errors
/// A sentence that explains the syntax.
pub fn objectives(text: &str) -> Result<Vec<Threshold>, String> {
    let objectives = list(text)?;
    let says_what_is_enough =
        |o: &&Threshold| matches!(o.measure, Measure::Latency(_) | Measure::Errors) && o.relation.is_upper_bound();
    match objectives.iter().find(|o| !says_what_is_enough(o)) {
        Some(other) => Err(format!(
            "{other} is no objective; write upper bounds of latencies and errors, like p99<100ms,errors<0.1%"
        )),
        None => Ok(objectives),
    }
}

/// Parses a condition that stops a run. It must be an upper bound, and not on the achieved rate, because that rate is
/// known only after the run.
///
/// # Errors
/// A sentence that explains the syntax.
pub fn stopping(text: &str) -> Result<Threshold, String> {
    let condition: Threshold = text.parse()?;
    if condition.relation.is_upper_bound() && condition.measure != Measure::Achieved {
        return Ok(condition);
    }
    Err(format!("{condition} cannot stop a run; write an upper bound, like p99<1s, errors<5% or dropped<1%"))
}

/// `true` if the latency at a quantile is known when the share `unsuccessful` of all releases has no latency, because
/// they failed or were dropped.
#[must_use]
pub(crate) fn is_known(quantile: f64, unsuccessful: f64) -> bool {
    unsuccessful <= 1.0 - quantile + 1e-12
}

impl Threshold {
    /// Evaluates the condition. Releases that failed or were dropped have no latency, so a percentile that reaches into
    /// their share is unknown. An upper bound on an unknown percentile does not hold. `achieved_per_second` is the rate
    /// of the whole run.
    #[must_use]
    pub fn judge(&self, tally: &Tally, achieved_per_second: f64) -> Judgement {
        let (value, measured) = match self.measure {
            Measure::Achieved => (Some(achieved_per_second), format!("{}/s", units::per_second(achieved_per_second))),
            _ => self.measured(tally),
        };
        let passed = value.is_some_and(|value| self.relation.holds(value, self.bound));
        Judgement { threshold: self.text.clone(), measured, passed, bound: Some(self.bound()) }
    }

    /// Returns a message if the condition fails with the counters so far.
    #[must_use]
    pub(crate) fn fails_already(&self, tally: &Tally) -> Option<String> {
        let (value, measured) = self.measured(tally);
        let holds = value.is_some_and(|value| self.relation.holds(value, self.bound));
        (!holds).then(|| format!("{self} failed ({measured})"))
    }

    /// The measured value, if it is known, and its text. The rate is not handled here.
    fn measured(&self, tally: &Tally) -> (Option<f64>, String) {
        let share = |part: u64| if tally.offered == 0 { 0.0 } else { part as f64 / tally.offered as f64 };
        let timed = |histogram: &hdrhistogram::Histogram<u64>, quantile: f64| {
            if tally.achieved == 0 || !is_known(quantile, tally.unsuccessful()) {
                let share = units::percent(tally.unsuccessful());
                return (None, format!("not known: {share} failed or were dropped"));
            }
            let seconds = histogram.value_at_quantile(quantile) as f64 / 1e6;
            (Some(seconds), units::seconds(seconds))
        };
        let shared = |share: f64| (Some(share), units::percent(share));
        match self.measure {
            Measure::Latency(quantile) => timed(&tally.latency, quantile),
            Measure::Service(quantile) => timed(&tally.service, quantile),
            Measure::Errors => shared(share(tally.failed())),
            Measure::Dropped => shared(share(tally.dropped)),
            Measure::Achieved => (None, "not known while it runs".to_owned()),
        }
    }

    /// The bound of the condition.
    #[must_use]
    pub fn bound(&self) -> Bound {
        let (of, quantile) = match self.measure {
            Measure::Latency(quantile) => (Of::Latency, Some(quantile)),
            Measure::Service(quantile) => (Of::Service, Some(quantile)),
            Measure::Errors => (Of::Errors, None),
            Measure::Dropped => (Of::Dropped, None),
            Measure::Achieved => (Of::Achieved, None),
        };
        Bound { of, quantile, value: self.bound, text: self.text.clone() }
    }

    /// `true` if a simulated result meets the condition, given its latency at each quantile and its share of errors.
    /// Only conditions that [`objectives`] accepts are supported.
    #[must_use]
    pub fn holds(&self, latency: impl Fn(f64) -> f64, errors: f64) -> bool {
        let value = match self.measure {
            Measure::Latency(quantile) | Measure::Service(quantile) if is_known(quantile, errors) => latency(quantile),
            Measure::Latency(_) | Measure::Service(_) => f64::INFINITY,
            Measure::Errors | Measure::Dropped => errors,
            Measure::Achieved => return true,
        };
        self.relation.holds(value, self.bound)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_read() {
        let threshold: Threshold = "p99.9<50ms".parse().unwrap();
        let Measure::Latency(quantile) = threshold.measure else { panic!("{threshold:?}") };
        assert!((quantile - 0.999).abs() < 1e-12);
        assert_eq!((threshold.relation, threshold.bound), (Relation::Less, 0.05));
        assert_eq!("errors<=0.1%".parse::<Threshold>().unwrap().relation, Relation::AtMost);
        assert_eq!("achieved >= 490/s".parse::<Threshold>().unwrap().bound, 490.0);
        assert_eq!("service.max<2s".parse::<Threshold>().unwrap().measure, Measure::Service(1.0));
        assert_eq!(objectives("p99<100ms,errors<0.1%").unwrap().len(), 2);
        assert!(stopping("errors<5%").is_ok() && stopping("service.p99<=1s").is_ok());
        for wrong in ["achieved>5", "achieved<5", "p99>1s"] {
            assert!(stopping(wrong).unwrap_err().contains("cannot stop a run"), "{wrong}");
        }
        for wrong in ["p99<100ms,achieved>5", "p99>5ms", "dropped<1%"] {
            let message = objectives(wrong).unwrap_err();
            assert!(message.contains("is no objective; write upper bounds"), "{message}");
        }
        for wrong in ["", "p99", "p99=5ms", "p101<5ms", "speed>9", "p99<5", "errors<x", "achieved>-1"] {
            let message = wrong.parse::<Threshold>().unwrap_err();
            assert!(message.contains("write"), "{wrong}: {message}");
        }
    }

    #[test]
    fn what_failed_is_slower_than_any_bound() {
        let threshold: Threshold = "p99<50ms".parse().unwrap();
        assert!(threshold.holds(|_| 0.04, 0.0));
        assert!(threshold.holds(|_| 0.04, 0.01));
        assert!(!threshold.holds(|_| 0.04, 0.011), "p99 reaches into what failed");
        assert!(!threshold.holds(|_| 0.06, 0.0));
        assert!(!"errors<1%".parse::<Threshold>().unwrap().holds(|_| 0.0, 0.01));
    }
}
