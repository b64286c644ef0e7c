//! Conditions in results: the bound that was asked for, and the outcome.

use serde::{Deserialize, Serialize};

/// A threshold, and its outcome.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Judgement {
    /// The threshold as written on the command line.
    pub threshold: String,
    /// The measured value, as text.
    pub measured: String,
    /// `true` if the threshold holds.
    pub passed: bool,
    /// The bound; `None` in results of older versions.
    #[serde(default)]
    pub bound: Option<Bound>,
}

/// The quantity that a bound limits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Of {
    /// Latency, in seconds.
    Latency,
    /// Service time, in seconds.
    Service,
    /// Share of the due releases that failed.
    Errors,
    /// Share of the due releases that were dropped.
    Dropped,
    /// Releases a second.
    Achieved,
}

/// The bound of a condition, for pictures.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Bound {
    /// The quantity that is limited.
    pub of: Of,
    /// The quantile of a time, from 0 to 1; `None` for other quantities.
    pub quantile: Option<f64>,
    /// The limit, in the unit of the quantity.
    pub value: f64,
    /// The condition as written on the command line.
    pub text: String,
}

/// Joins the texts of conditions with commas.
#[must_use]
pub(crate) fn stated(bounds: &[Bound]) -> String {
    bounds.iter().map(|bound| bound.text.as_str()).collect::<Vec<_>>().join(", ")
}
