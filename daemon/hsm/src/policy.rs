//! The pure policies of a cluster: plain values that are handed `now`. They use no clock, no threads and no tokens, so that
//! tests and capacity plans can step them through simulated time ([`simulation`]). They need no PKCS#11: without the
//! feature `tokens` they are the whole crate.

pub mod breaker;
pub mod budget;
pub mod credibility;
pub mod failover;
pub mod pick;
pub mod simulation;
