//! What connections may cost.

use std::time::Duration;

use crate::config;

/// Most requests on a connection of HTTP/2 at once.
const STREAMS: u32 = 128;

/// What connections may cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most connections that are open at once. For one more, the one that has waited longest for its client is closed.
    pub max_connections: usize,
    /// The same for each address, or for each /64 network of IPv6; 0 is no limit.
    pub per_address: usize,
    /// Most requests on a connection of HTTP/2 at once.
    pub streams: u32,
    /// Longest time for a TLS handshake, for a connection's first byte, and from a request's first byte to the end of its
    /// header.
    pub header_timeout: Duration,
    /// Longest time without a request in progress, and without progress while an answer is being sent.
    pub idle_timeout: Duration,
    /// How long a stopping server goes on taking requests from open connections.
    pub grace: Duration,
    /// How long a stopping server waits for the requests in progress before it cuts them.
    pub drain_timeout: Duration,
    /// Percent of the processors' time for the connections of one address on which no host has proved itself; 0 is no limit.
    pub unproven_time_percent: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self::from(&config::Server::default())
    }
}

impl From<&config::Server> for Limits {
    fn from(server: &config::Server) -> Self {
        Self {
            max_connections: server.max_connections,
            per_address: server.max_connections_per_address,
            streams: STREAMS,
            header_timeout: server.header_timeout(),
            idle_timeout: server.idle_timeout(),
            grace: Duration::from_millis(500),
            drain_timeout: server.drain_timeout(),
            unproven_time_percent: server.unproven_time_percent,
        }
    }
}
