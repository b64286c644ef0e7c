//! Attestation: which hosts are healthy, and the health certificates issued to them (protocol page, section 3).

pub mod endorsement;
pub mod host_key;
pub mod issuing;
pub mod signer_rotation;
pub mod tpm;
