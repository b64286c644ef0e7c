//! Grafana dashboards, Prometheus rules and the metric reference for operators. All of them are generated from the
//! daemon's own table of metrics ([`claviger::observe::metrics::ALL`]), and committed.
//!
//! [`files`] generates them. [`lint`](lint::lint) finds faults in a dashboard. [`Exported`](exported::Exported) knows
//! the series that an expression may use. [`panels`] returns the queries that a test sends to a live Prometheus.

#![forbid(unsafe_code)]

pub mod exported;
mod grafana;
pub mod lint;
mod prometheus;
pub mod promql;
mod queries;
mod reference;

use std::path::{Path, PathBuf};

use serde_json::Value;

pub use grafana::dashboards;
pub use prometheus::{Alert, Group, Recording, Rule, groups};
pub use queries::{Query, Variable, panels, panels_of, variables};

/// The command that generates the files.
pub const REGENERATE: &str = "cargo run -p claviger-dashboards";

/// The runbook in the repository.
pub const RUNBOOK: &str = "docs/runbook.md";

/// A generated file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// The path, relative to the root of the repository.
    pub path: &'static str,
    /// The content of the file.
    pub text: String,
}

/// Generates all files.
#[must_use]
pub fn files() -> Vec<File> {
    let mut files: Vec<File> = grafana::all()
        .into_iter()
        .map(|(path, dashboard)| File { path, text: format!("{:#}\n", sorted(dashboard)) })
        .collect();
    files.push(File { path: "dashboards/prometheus/claviger.rules.yml", text: rules(RUNBOOK) });
    files.push(File { path: "docs/metrics.md", text: reference::markdown(REGENERATE) });
    files
}

/// Generates the rules, whose `runbook_url`s begin with the address `runbook`.
#[must_use]
pub fn rules(runbook: &str) -> String {
    prometheus::yaml(&groups(), REGENERATE, runbook)
}

/// The root of the repository that this crate was built in.
#[must_use]
pub fn root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// Sorts the keys of all objects. Without this, the order would depend on a feature of the JSON library that another
/// crate may enable.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut pairs: Vec<_> = map.into_iter().map(|(key, value)| (key, sorted(value))).collect();
            pairs.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(pairs.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}
