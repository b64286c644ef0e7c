//! Rules for Prometheus: what is recorded, and what somebody is told of.

mod alerts;
mod recording;
mod rule;
mod yaml;

pub use rule::{Alert, Group, Recording, Rule};
pub(crate) use rule::{FAILED, LATENCY_OBJECTIVE, OBJECTIVE};
pub(crate) use yaml::yaml;

/// Every rule.
#[must_use]
pub fn groups() -> Vec<Group> {
    let mut groups = recording::groups();
    groups.extend(alerts::groups());
    groups
}
