//! The life of the daemon: checks before the start, the daemon itself, reloads, and messages to systemd.

mod audit_tasks;
pub mod daemon;
pub mod members;
pub mod preflight;
pub(crate) mod reload;
pub mod serve;
pub(crate) mod systemd;
