//! The attestation signers.

use claviger_protocol::health::LIFETIME_SECONDS;
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};

use crate::store::{self, RevokedSigner};

/// What a signer is to this service.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// It issues health certificates.
    Current,
    /// Another one took its place; what it issued is trusted until it expires.
    Replaced,
    /// What it issued is refused.
    Revoked,
}

/// A signer, for people and machines. Times are in seconds since 1970.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Shown {
    /// SHA-256 of its certificate, hexadecimal.
    pub thumbprint: String,
    /// What it is to this service.
    pub state: Standing,
    /// CKA_ID of its key, hexadecimal; not known of one that was revoked.
    pub hsm_key: Option<String>,
    /// End of its certificate's validity.
    pub not_after: i64,
    /// When another one took its place.
    pub replaced: Option<i64>,
    /// When the last health certificate that it can have issued expires; of the current one, that is not known yet.
    pub trusted_until: Option<i64>,
    /// When it was revoked.
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

/// What a rotation did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Rotated {
    /// The signer that issues from now on.
    pub current: String,
    /// The one before.
    pub replaced: Option<String>,
}

/// What a revocation did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Revoked {
    /// The signers whose health certificates are refused now: all certificates of one key.
    pub revoked: Vec<String>,
    /// The signer that issues now; there is none after a forced revocation for which none could be made.
    pub current: Option<String>,
    /// Whether that one was made for this.
    pub made: bool,
    /// What else an administrator should know.
    pub warnings: Vec<String>,
}
