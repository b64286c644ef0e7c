//! Messages about attestation signers.

use claviger_protocol::health::LIFETIME_SECONDS;
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};

use crate::store::{self, RevokedSigner};

/// State of a signer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// The signer issues health certificates.
    Current,
    /// Another signer has replaced it; its certificates are trusted until they expire.
    Replaced,
    /// Its certificates are rejected.
    Revoked,
}

/// A signer, for people and programs. Times are in seconds since 1970.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Shown {
    /// SHA-256 of the signer's certificate, hexadecimal.
    pub thumbprint: String,
    /// State of the signer.
    pub state: Standing,
    /// CKA_ID of its key, hexadecimal; unknown for a revoked signer.
    pub hsm_key: Option<String>,
    /// End of the validity of its certificate.
    pub not_after: i64,
    /// Time at which another signer replaced it.
    pub replaced: Option<i64>,
    /// Time at which the last health certificate from it expires; unknown for the current signer.
    pub trusted_until: Option<i64>,
    /// Time of the revocation.
    pub revoked: Option<i64>,
}

impl From<store::Signer> for Shown {
    fn from(signer: store::Signer) -> Self {
        Self {
            thumbprint: signer.thumbprint,
            state: if signer.current { Standing::Current } else { Standing::Replaced },
            hsm_key: Some(HEXLOWER.encode(&signer.key_id)),
            not_after: signer.not_after,
            replaced: signer.replaced,
            trusted_until: signer.replaced.map(|replaced| replaced + LIFETIME_SECONDS),
            revoked: None,
        }
    }
}

impl From<RevokedSigner> for Shown {
    fn from(signer: RevokedSigner) -> Self {
        Self {
            thumbprint: signer.thumbprint,
            state: Standing::Revoked,
            hsm_key: None,
            not_after: signer.not_after,
            replaced: None,
            trusted_until: None,
            revoked: Some(signer.revoked),
        }
    }
}

/// The result of a rotation.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Rotated {
    /// The new current signer.
    pub current: String,
    /// The previous signer.
    pub replaced: Option<String>,
}

/// The result of a revocation.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Revoked {
    /// The revoked signers: all certificates of one key.
    pub revoked: Vec<String>,
    /// The current signer. `None` after a forced revocation if no new signer could be created.
    pub current: Option<String>,
    /// Whether the revocation created this signer.
    pub made: bool,
    /// Warnings for the administrator.
    pub warnings: Vec<String>,
}
