//! Claviger, a key-release daemon: it releases the transport keys of shielded virtual machines to hosts that proved
//! their health. Private keys stay in HSMs.
//!
//! Start with [`release`]: one release from request to reply. [`http::routes`] leads there, [`service`] is what all requests
//! share, [`run`] starts and stops it all.
#![forbid(unsafe_code)]

pub mod admin;
pub mod admission;
pub mod attest;
pub mod checks;
pub mod cli;
pub mod config;
pub mod http;
pub mod lab;
pub mod observe;
pub mod registry;
pub mod release;
pub mod request;
pub mod run;
pub mod service;
pub mod signing;
pub mod status;
mod stock;
pub mod store;
pub mod sys;
pub mod tls;
