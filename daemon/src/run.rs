//! From start to stop: what keeps the daemon from starting, the daemon itself, reloads, and what systemd is told.

mod audit_tasks;
pub mod daemon;
pub mod members;
pub mod preflight;
pub mod reload;
pub mod serve;
pub mod systemd;
