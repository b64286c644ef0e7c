//! The types of rules, and the objectives that the rules watch.

/// The share of releases that must succeed, of those whose outcome is not the caller's fault.
pub(crate) const OBJECTIVE: f64 = 0.999;
/// The share of successful releases that must take no longer than [`claviger::observe::metrics::SLO_SECONDS`].
pub(crate) const LATENCY_OBJECTIVE: f64 = 0.99;
/// The outcomes of a release that are the service's fault, as a regular expression.
pub(crate) const FAILED: &str = "ServiceUnavailableException|InternalErrorException";

/// Rules that Prometheus evaluates together, in order.
#[derive(Clone, Debug)]
pub struct Group {
    /// The name of the group.
    pub name: &'static str,
    /// The evaluation interval; `None` for the default of the configuration.
    pub interval: Option<&'static str>,
    /// The rules in their order.
    pub rules: Vec<Rule>,
}

/// A rule.
#[derive(Clone, Debug)]
pub enum Rule {
    /// Records a series.
    Recording(Recording),
    /// Raises an alert.
    Alert(Alert),
}

/// A recorded series.
#[derive(Clone, Debug)]
pub struct Recording {
    /// The name: level, metric, operation.
    pub name: String,
    /// The labels of the series.
    pub labels: &'static [&'static str],
    /// The recorded expression.
    pub expression: String,
}

/// An alert.
#[derive(Clone, Debug)]
pub struct Alert {
    /// The name, which is also the heading of its section in the runbook.
    pub name: &'static str,
    /// `critical` (somebody must act at once) or `warning` (somebody acts on the next working day).
    pub severity: &'static str,
    /// Time for which the expression must hold.
    pub wait: &'static str,
    /// The condition as an expression.
    pub expression: String,
    /// A summary in one line.
    pub summary: &'static str,
    /// A description with numbers.
    pub description: String,
}

impl Alert {
    /// The section in the runbook, which is at `base`.
    #[must_use]
    pub fn runbook(&self, base: &str) -> String {
        format!("{base}#{}", self.name.to_lowercase())
    }
}
