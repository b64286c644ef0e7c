//! The agent of a host: one process that keeps the health certificate fresh and asks for releases, for all machines of the host.
//!
//! ```text
//! claviger host vm open ──▶ socket ──▶ who asks? ──▶ gather ──▶ one RollTransportKeys ──▶ each its own keys
//! ```
//! | what | module |
//! |---|---|
//! | what goes over the socket | [`wire`] |
//! | which releases are asked for together, and when | [`gather`] |
//! | asking an agent | [`client`] |
//! | being one | [`server`] |
//! | what it counts | [`counters`] |

pub mod client;
pub mod counters;
pub mod gather;
pub mod server;
pub mod wire;
