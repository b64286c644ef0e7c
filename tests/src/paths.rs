//! Paths of the service.

/// Path of a release in `v2.0`.
pub const ROLL: &str = "/KeyProtection/service/v2.0/RollTransportKey";
/// Path of host-key attestation.
pub const ATTEST: &str = "/Attestation/v2.0/hostkeyattest";
/// Path of the metadata document.
pub const METADATA: &str = "/KeyProtection/service/metadata/2014-07/metadata.xml";
