//! What every client of the service shares. [`Endpoint`] connects to a name that may have several addresses.
#![forbid(unsafe_code)]

mod endpoint;
mod race;

pub use endpoint::{ConnectError, Endpoint, Lack};
