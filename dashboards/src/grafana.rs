//! The Grafana dashboards.

mod capacity;
mod cluster;
mod dashboard;
mod notation;
mod panel;
mod service;

use serde_json::Value;

/// Every dashboard, with its path in the repository.
pub(crate) fn all() -> Vec<(&'static str, Value)> {
    vec![
        ("dashboards/grafana/service.json", service::dashboard()),
        ("dashboards/grafana/cluster.json", cluster::dashboard()),
        ("dashboards/grafana/capacity.json", capacity::dashboard()),
    ]
}

/// The dashboards in Grafana's import format.
#[must_use]
pub fn dashboards() -> Vec<Value> {
    all().into_iter().map(|(_, dashboard)| dashboard).collect()
}
