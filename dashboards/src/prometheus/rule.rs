//! What a rule is, and the objectives that rules watch.

/// Of the releases whose outcome is not the caller's fault, this share succeeds.
pub(crate) const OBJECTIVE: f64 = 0.999;
/// Of the releases that succeed, this share takes no longer than [`claviger::observe::metrics::SLO_SECONDS`].
pub(crate) const LATENCY_OBJECTIVE: f64 = 0.99;
/// The outcomes of a release that the service has to answer for, as a regular expression.
pub(crate) const FAILED: &str = "ServiceUnavailableException|InternalErrorException";

/// Rules that are evaluated together, one after the other.
#[derive(Clone, Debug)]
pub struct Group {
    /// Its name.
    pub name: &'static str,
    /// How often, where that is not what the configuration says for all.
    pub interval: Option<&'static str>,
    /// The rules.
    pub rules: Vec<Rule>,
}

/// A rule.
#[derive(Clone, Debug)]
pub enum Rule {
    /// Makes a series.
    Recording(Recording),
    /// Tells somebody.
    Alert(Alert),
}

/// A series that is made of others.
#[derive(Clone, Debug)]
pub struct Recording {
    /// Its name: level, metric, operation.
    pub name: String,
    /// The labels that it has.
    pub labels: &'static [&'static str],
    /// What is recorded.
    pub expression: String,
}

/// A condition that somebody is told of.
#[derive(Clone, Debug)]
pub struct Alert {
    /// Its name, and the heading of its section in the runbook.
    pub name: &'static str,
    /// `page`: somebody gets up; `ticket`: somebody looks on the next working day.
    pub severity: &'static str,
    /// How long it has to hold.
    pub wait: &'static str,
    /// What has to hold.
    pub expression: String,
    /// One line.
    pub summary: &'static str,
    /// What is the matter, with the numbers.
    pub description: String,
}

impl Alert {
    /// Where the runbook is read, from the root of the repository.
    #[must_use]
    pub fn runbook(&self) -> String {
        format!("docs/runbook.md#{}", self.name.to_lowercase())
    }
}
