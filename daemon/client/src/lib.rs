//! What every client of the service shares.
//!
//! | what | module |
//! |---|---|
//! | a connection to a name that may have several addresses | [`Endpoint`] |
//! | requests and their answers | [`http`], [`error`], [`trust`] |
//! | a guarded host, its files and its TPM | [`host`], [`host_files`], [`tpm`] |
//! | several servers, asked again where that helps | [`failover`], [`retry`] |
//! | files that people hand over and that commands write | [`files`] |
#![forbid(unsafe_code)]

mod base_url;
mod connect;
mod endpoint;
pub mod error;
pub mod failover;
pub mod files;
pub mod host;
pub mod host_files;
pub mod http;
mod race;
pub mod retry;
mod tls;
pub mod tpm;
pub mod trust;

#[cfg(test)]
mod testing;

pub use endpoint::{ConnectError, Endpoint, Lack};
