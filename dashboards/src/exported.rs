//! The series that exist: exported by the daemon, recorded by the rules, or added by Prometheus.

use std::collections::{BTreeMap, BTreeSet};

use claviger::observe::metrics::{ALL, Kind};

use crate::prometheus::{Rule, groups};
use crate::promql::uses;

/// Labels that Prometheus adds to every scraped series.
const TARGET: [&str; 2] = ["job", "instance"];

/// The existing series, with their labels.
#[derive(Clone, Debug)]
pub struct Exported {
    series: BTreeMap<String, Series>,
}

#[derive(Clone, Debug)]
struct Series {
    labels: BTreeSet<String>,
    /// The metric of the series. A histogram has three series.
    metric: Option<&'static str>,
}

impl Default for Exported {
    fn default() -> Self {
        Self::new()
    }
}

impl Exported {
    /// The series of this version of the daemon and its rules.
    #[must_use]
    pub fn new() -> Self {
        let mut exported = Self { series: BTreeMap::new() };
        for metric in ALL {
            let mut add = |suffix: &str, more: &[&str]| {
                exported.add(format!("{}{suffix}", metric.name), metric.labels.iter().chain(more), Some(metric.name));
            };
            if let Kind::Histogram(_) = metric.kind {
                add("_bucket", &["le"]);
                add("_sum", &[]);
                add("_count", &[]);
            } else {
                add("", &[]);
            }
        }
        for rule in groups().iter().flat_map(|group| &group.rules) {
            if let Rule::Recording(rule) = rule {
                exported.add(rule.name.clone(), rule.labels, None);
            }
        }
        exported.add("up".to_owned(), &[], None);
        exported
    }

    fn add<'a>(&mut self, name: String, labels: impl IntoIterator<Item = &'a &'a str>, metric: Option<&'static str>) {
        let labels = labels.into_iter().chain(&TARGET).map(|label| (*label).to_owned()).collect();
        self.series.insert(name, Series { labels, metric });
    }

    /// Describes the series and labels that an expression uses but that do not exist.
    #[must_use]
    pub fn missing(&self, expression: &str) -> Vec<String> {
        let uses = uses(expression);
        let mut missing = Vec::new();
        let mut labels: BTreeSet<&str> = TARGET.into();
        for selector in &uses.selectors {
            let Some(series) = self.series.get(&selector.name) else {
                missing.push(format!("{} is not exported", selector.name));
                continue;
            };
            labels.extend(series.labels.iter().map(String::as_str));
            for (label, ..) in &selector.matchers {
                if !series.labels.contains(label) {
                    missing.push(format!("{} has no label {label}", selector.name));
                }
            }
        }
        for label in &uses.grouping {
            if !labels.contains(label.as_str()) {
                missing.push(format!("nothing here has the label {label}: {expression}"));
            }
        }
        missing
    }

    /// The metrics of the daemon that an expression uses.
    #[must_use]
    pub fn metrics(&self, expression: &str) -> Vec<&'static str> {
        uses(expression).selectors.iter().filter_map(|s| self.series.get(&s.name)?.metric).collect()
    }

    /// `true` if a series of an expression has this label. Used for legends and texts.
    #[must_use]
    pub fn has_label(&self, expression: &str, label: &str) -> bool {
        let uses = uses(expression);
        let mut series = uses.selectors.iter().filter_map(|s| self.series.get(&s.name));
        series.any(|series| series.labels.contains(label))
    }
}
