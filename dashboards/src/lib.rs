//! What an operator looks at: Grafana dashboards, Prometheus rules and the metric reference, all made from the daemon's
//! own table of metrics ([`claviger::observe::metrics::ALL`]) and committed beside this crate.
//!
//! [`files`] makes them, [`lint`](lint::lint) says what is wrong with a dashboard, [`Exported`](exported::Exported)
//! which
//! series an expression may ask for, and [`panels`] what a test asks a live Prometheus.

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
pub use queries::{Query, Variable, panels, panels_of, variables, variables_of};

/// How to make the files anew.
pub const REGENERATE: &str = "cargo run -p claviger-dashboards";

/// A file that is generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Where it belongs, from the root of the repository.
    pub path: &'static str,
    /// What is in it.
    pub text: String,
}

/// Every file that is generated.
#[must_use]
pub fn files() -> Vec<File> {
    let mut files: Vec<File> = grafana::all()
        .into_iter()
        .map(|(path, dashboard)| File { path, text: format!("{:#}\n", sorted(dashboard)) })
        .collect();
    files
        .push(File { path: "dashboards/prometheus/claviger.rules.yml", text: prometheus::yaml(&groups(), REGENERATE) });
    files.push(File { path: "docs/metrics.md", text: reference::markdown(REGENERATE) });
    files
}

/// The root of the repository that this crate was built in.
#[must_use]
pub fn root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// With the keys of all objects in order: whether the JSON library keeps them as they came is another crate's choice.
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
