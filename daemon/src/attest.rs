//! Attestation: which hosts are healthy, and the health certificates issued to them (protocol page, section 3).

pub(crate) mod endorsement;
pub(crate) mod host_key;
pub(crate) mod issuing;
pub(crate) mod signer_rotation;
pub(crate) mod tpm;
