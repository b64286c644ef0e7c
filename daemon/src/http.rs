//! HTTP: connections and their limits, TLS, bodies, and the table of the protocol's resources. The handlers of requests
//! do not depend on HTTP.

pub(crate) mod answer;
pub mod attestation;
pub mod body;
pub mod intake;
pub mod resource;
pub mod routes;
pub mod server;
