//! The agent of a host: a process that renews the health certificate and requests releases for all machines of the
//! host.
//!
//! ```text
//! claviger host vm open ──▶ socket ──▶ who asks? ──▶ gather ──▶ one RollTransportKeys ──▶ each its own keys
//! ```
//! | what | module |
//! |---|---|
//! | the messages on the socket | [`wire`] |
//! | collecting releases into batches | [`gather`] |
//! | the client of an agent | [`client`] |
//! | the agent itself | [`server`] |
//! | its counters | [`counters`] |

pub mod client;
pub mod counters;
pub mod gather;
pub mod server;
pub mod wire;
