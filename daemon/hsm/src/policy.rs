//! The pure policies of a cluster: plain values that are handed `now`. No clock, no threads, no tokens, so that tests and
//! capacity plans can step them through simulated time ([`simulation`]). They need no PKCS#11: without the feature
//! `tokens` this crate consists of them.

pub mod breaker;
pub mod budget;
pub mod failover;
pub mod pick;
pub mod simulation;
