//! The data that requests read: snapshots of the state, and caches.

pub mod baselines;
pub mod currency;
pub mod error;
pub mod follow;
pub mod health_cache;
pub mod hosts;
pub mod issued;
pub mod keys;
pub mod signers;
pub mod snapshot;
pub mod tpm_sessions;
