//! HTTP: connections and their limits, TLS, bodies, and the table of the protocol's resources. The handlers of requests
//! do not depend on HTTP.

pub(crate) mod answer;
pub(crate) mod attestation;
pub(crate) mod body;
pub(crate) mod intake;
pub(crate) mod resource;
pub(crate) mod routes;
pub mod server;
