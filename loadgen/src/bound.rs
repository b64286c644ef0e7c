//! Conditions as results hold them: what was asked for, and how it was met.

use serde::{Deserialize, Serialize};

/// A threshold that was asked for, and how it was met.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Judgement {
    /// As it was written.
    pub threshold: String,
    /// What was measured, in words.
    pub measured: String,
    /// Whether it holds.
    pub passed: bool,
    /// What it asks for.
    #[serde(default)]
    pub bound: Option<Bound>,
}

/// What a bound is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Of {
    /// Latency, in seconds.
    Latency,
    /// Service time, in seconds.
    Service,
    /// Share of those due that failed.
    Errors,
    /// Share of those due that were dropped.
    Dropped,
    /// Releases a second.
    Achieved,
}

/// The bound of a condition, for pictures.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Bound {
    /// What it is of.
    pub of: Of,
    /// For times: from 0 to 1.
    pub quantile: Option<f64>,
    /// What is held against.
    pub value: f64,
    /// As the condition is written.
    pub text: String,
}

/// Conditions as they were written, with commas between them.
#[must_use]
pub fn stated(bounds: &[Bound]) -> String {
    bounds.iter().map(|bound| bound.text.as_str()).collect::<Vec<_>>().join(", ")
}
