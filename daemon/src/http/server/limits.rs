//! Limits of connections.

use std::time::Duration;

use crate::config;

/// Most concurrent requests on an HTTP/2 connection.
const STREAMS: u32 = 128;

/// Most connections of addresses that have used up their shares that wait for a place.
const IN_DEBT: usize = 1_024;

/// The limits of a listener's connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most open connections. For another one, the connection that has waited longest for its client is closed.
    pub max_connections: usize,
    /// Most open connections for each address, or each /64 network of IPv6; 0 is no limit.
    pub per_address: usize,
    /// Most connections that wait for a place beside others, because their addresses have used up their shares of processor
    /// time.
    pub in_debt: usize,
    /// Most concurrent requests on an HTTP/2 connection.
    pub streams: u32,
    /// Time limit for a TLS handshake, for the first byte of a connection, and for a header from its first byte to its
    /// end.
    pub header_timeout: Duration,
    /// Time limit for a request's body, which the service sets.
    pub body_timeout: Duration,
    /// Time limit without a request in progress, and without progress while a reply is sent.
    pub idle_timeout: Duration,
    /// Bytes of its answers that a client has to take in a second, on average, beyond [`Limits::idle_timeout`]; 0 is no limit.
    pub body_rate: u64,
    /// How long a stopping server still accepts requests on open connections.
    pub grace: Duration,
    /// How long a stopping server waits for requests in progress before it cuts them.
    pub drain_timeout: Duration,
    /// Limit of processor time, in percent of all processors, for the connections of one address on which no host has
    /// proved itself; 0 is no limit.
    pub unproven_time_percent: u32,
}

impl Limits {
    /// The shortest time that a client has for its part.
    pub(super) fn shortest(&self) -> Duration {
        self.header_timeout.min(self.body_timeout).min(self.idle_timeout)
    }
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
            in_debt: IN_DEBT,
            streams: STREAMS,
            header_timeout: server.header_timeout(),
            body_timeout: server.body_timeout(),
            idle_timeout: server.idle_timeout(),
            body_rate: server.body_rate,
            grace: Duration::from_millis(500),
            drain_timeout: server.drain_timeout(),
            unproven_time_percent: server.unproven_time_percent,
        }
    }
}
