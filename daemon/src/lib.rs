//! Claviger, a key-release daemon: it releases the transport keys of shielded virtual machines to hosts that have
//! proved their health. The private keys stay in HSMs.
//!
//! Start reading at [`release`]: one release from request to reply. `http::routes` calls it, [`service`] is the
//! context that all requests share, and [`run`] starts and stops the daemon.
#![forbid(unsafe_code)]

pub mod admin;
mod admission;
mod attest;
mod checks;
pub mod cli;
pub mod config;
pub mod http;
pub mod lab;
mod nodes;
pub mod observe;
pub mod registry;
pub mod release;
pub mod request;
pub mod run;
pub mod service;
mod signing;
mod status;
mod stock;
pub mod store;
pub mod sys;
pub mod tls;
