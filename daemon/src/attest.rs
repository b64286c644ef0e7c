//! Who is healthy: attestation, and the health certificates it issues (protocol page, section 3).

pub mod baselines;
pub mod endorsement;
pub mod evidence;
pub mod health_cache;
pub mod host_key;
pub mod issued;
pub mod signer;
pub mod tpm;
