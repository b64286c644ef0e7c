//! Attestation: which hosts are healthy, and the health certificates issued to them (protocol page, section 3).

pub mod baselines;
pub mod endorsement;
pub mod evidence;
pub mod health_cache;
pub mod host_key;
pub mod issued;
pub mod issuing;
pub mod sessions;
pub mod signer;
pub mod tpm;
