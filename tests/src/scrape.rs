//! Parsed contents of `/metrics`.

use std::collections::{BTreeMap, BTreeSet};

type Labels = BTreeMap<String, String>;

/// One scrape: every series with its value.
#[derive(Clone, Debug)]
pub struct Metrics(Vec<(String, Labels, f64)>);

impl Metrics {
    /// Parses the Prometheus text format as this daemon writes it (without escapes in label values).
    ///
    /// # Panics
    /// If the page has another format.
    #[must_use]
    pub fn parse(page: &str) -> Self {
        let lines = page.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self(lines.map(|line| series(line).unwrap_or_else(|| panic!("no series: {line}"))).collect())
    }

    /// Returns the sum of all series with this name and these labels; `None` if there is none.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let fits = |has: &Labels| labels.iter().all(|(label, value)| has.get(*label).is_some_and(|v| v == value));
        let values = self.0.iter().filter(|(n, has, _)| n == name && fits(has)).map(|(.., value)| *value);
        values.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
    }

    /// Returns the sum as a whole number.
    ///
    /// # Panics
    /// If there is no such series.
    #[must_use]
    pub fn count(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        self.sum(name, labels).unwrap_or_else(|| panic!("no {name} {labels:?} in {:#?}", self.0)) as u64
    }

    /// Returns the names of all series, without repetition.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, ..)| name.as_str()).collect::<BTreeSet<_>>().into_iter()
    }

    /// Returns all values of a label of a metric.
    #[must_use]
    pub fn values_of(&self, name: &str, label: &str) -> Vec<String> {
        self.0.iter().filter(|(n, ..)| n == name).filter_map(|(_, labels, _)| labels.get(label).cloned()).collect()
    }
}

fn series(line: &str) -> Option<(String, Labels, f64)> {
    let (series, value) = line.rsplit_once(' ')?;
    let value = value.parse().ok()?;
    let Some((name, labels)) = series.split_once('{') else { return Some((series.to_owned(), Labels::new(), value)) };
    let labels = labels.strip_suffix('}')?.split(',').filter(|label| !label.is_empty());
    let label = |text: &str| {
        let (name, value) = text.split_once('=')?;
        Some((name.to_owned(), value.strip_prefix('"')?.strip_suffix('"')?.to_owned()))
    };
    Some((name.to_owned(), labels.map(label).collect::<Option<_>>()?, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_found_by_name_and_labels() {
        let page = "# HELP a x\n# TYPE a counter\na{b=\"1\",c=\"x\"} 2\na{b=\"2\",c=\"x\"} 3\n\nd 1.5\n";
        let metrics = Metrics::parse(page);
        assert_eq!(metrics.count("a", &[("c", "x")]), 5);
        assert_eq!(metrics.count("a", &[("b", "2")]), 3);
        assert_eq!(metrics.sum("d", &[]), Some(1.5));
        assert_eq!(metrics.sum("a", &[("b", "3")]), None);
        assert_eq!(metrics.values_of("a", "b"), ["1", "2"]);
    }
}
