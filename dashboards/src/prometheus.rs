//! Rules for Prometheus: recorded series and alerts.

mod alerts;
mod recording;
mod rule;
mod yaml;

pub use rule::{Alert, Group, Recording, Rule};
pub(crate) use rule::{FAILED, LATENCY_OBJECTIVE, OBJECTIVE};
pub(crate) use yaml::yaml;

/// All rules, in groups.
#[must_use]
pub fn groups() -> Vec<Group> {
    let mut groups = recording::groups();
    groups.extend(alerts::groups());
    groups
}
