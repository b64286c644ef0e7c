//! From start to stop: what keeps the daemon from starting, the daemon itself, reloads, and what systemd is told.

pub mod daemon;
pub mod preflight;
pub mod reload;
pub mod serve;
pub mod systemd;
