//! The pure policies of a cluster: plain values that are handed `now`. No clock, no threads, no tokens, so that tests, and whoever
//! wants to know what a cluster will do, can step them through simulated time. They need no PKCS#11: without the feature
//! `tokens` they are all there is of this crate.

pub mod batch;
pub mod breaker;
pub mod budget;
pub mod failover;
pub mod pick;
#[cfg(test)]
mod sim;
