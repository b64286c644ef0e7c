//! Everything that all clients of the service share.
//!
//! | topic | module |
//! |---|---|
//! | connecting to a name that may have several addresses | [`Endpoint`] |
//! | requests and replies, TLS and its errors | [`http`], [`error`], [`trust`] |
//! | a guarded host, its files and its TPM | [`host`], [`host_files`], [`tpm`] |
//! | several servers, asked again where that helps | [`failover`], [`retry`] |
//! | files that people hand over and that commands write | [`files`] |
//! | one process that asks for all machines of a host | [`agent`] |
//! | a virtual machine's protector and secrets in one file | [`vault`] |
#![forbid(unsafe_code)]

pub mod agent;
mod base_url;
mod connect;
mod durable;
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
pub mod vault;

#[cfg(test)]
mod testing;

pub use endpoint::{ConnectError, Endpoint, Lack};
