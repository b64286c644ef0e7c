//! Observation of the daemon: metrics, the audit trail, the last hour, the log.

pub(crate) mod audit;
pub mod history;
pub mod log;
pub mod metrics;
