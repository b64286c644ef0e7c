//! HTTP: connections and their limits, TLS, bodies, and the table of the protocol's resources. What answers a request does not know
//! that it came by HTTP.

pub(crate) mod answer;
pub mod attestation;
pub mod body;
pub mod intake;
pub mod resource;
pub mod routes;
pub mod server;
