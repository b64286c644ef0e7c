//! The data that requests read: snapshots of the state, and caches.

pub(crate) mod baselines;
pub(crate) mod currency;
pub(crate) mod decisions;
pub(crate) mod error;
pub(crate) mod follow;
pub mod health_cache;
pub(crate) mod hosts;
pub(crate) mod issued;
pub mod keys;
pub(crate) mod signers;
pub(crate) mod snapshot;
pub(crate) mod tpm_sessions;
