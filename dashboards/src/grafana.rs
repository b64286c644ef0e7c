//! The Grafana dashboards.

mod capacity;
mod cluster;
mod dashboard;
mod panel;
mod service;

use serde_json::Value;

/// Every dashboard with its path in the repository.
pub(crate) fn all() -> Vec<(&'static str, Value)> {
    vec![
        ("dashboards/grafana/service.json", service::dashboard()),
        ("dashboards/grafana/cluster.json", cluster::dashboard()),
        ("dashboards/grafana/capacity.json", capacity::dashboard()),
    ]
}

/// The selection of the variables in an expression: `@hsm` stands for the matchers of job, instance and member, `@`
/// for those
/// of job and instance, `[~]` for the interval that Grafana picks for rates.
fn selected(expression: &str) -> String {
    const TARGET: &str = r#"job=~"$job", instance=~"$instance""#;
    expression
        .replace("@hsm", &format!(r#"{TARGET}, hsm=~"$hsm""#))
        .replace('@', TARGET)
        .replace("[~]", "[$__rate_interval]")
}

/// An id that stays when panels come and go around it.
fn id_of(title: &str) -> u32 {
    // FNV-1a, and small enough to be read.
    title.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)) % 1_000_000 + 1
}
