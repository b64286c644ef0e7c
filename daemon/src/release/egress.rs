//! An egress protector: a fresh transport key for the parties of a wrapping set, signed in an HSM.

use std::sync::Arc;
use std::time::Instant;

use claviger_hsm::KeyRef;
use claviger_protocol::algorithm::SignatureAlgorithm;
use claviger_protocol::build::{self, Unsigned};
use claviger_protocol::error::Refusal;
use claviger_protocol::protector::TransportKey;
use claviger_protocol::wrapping_set::{SetWrapping, WrappingSet};

use super::hsm::{Hsm, Unavailable};
use crate::admission::strangers::apart_if_large;
use crate::signing::signed_by;

/// A protector that is complete but for being written out: what it shares with others of its set is kept once for all of them.
#[derive(Debug)]
pub(crate) struct Egress {
    key: TransportKey,
    unsigned: Unsigned,
    /// The Id of the wrapping whose signing key made the signature.
    guardian: u32,
    signature: Vec<u8>,
    /// Who signed.
    member: Arc<str>,
}

impl Egress {
    /// Writes a protector of a fresh key for `set`, and has it signed by `signing_key`, the private key of this service's wrapping
    /// `ours`. A signature that is not right never gets here, whatever the HSM says.
    ///
    /// # Errors
    /// A refusal when it cannot be written; else, in the inner result, that no HSM signed in time.
    pub(crate) async fn make<H: Hsm>(
        hsm: &H,
        set: &WrappingSet,
        ours: &SetWrapping,
        signing_key: &KeyRef,
        max_offline_unwraps: u32,
        deadline: Instant,
    ) -> Result<Result<Self, Unavailable>, Refusal> {
        let key = build::fresh_transport_key()?;
        let unsigned = apart_if_large(set.size(), || set.protect(&key, max_offline_unwraps))?;
        let digest = unsigned.signed_sha256();
        let right = signed_by(ours.party.signing.key(), digest);
        let signed = hsm.sign(signing_key, digest.as_ref(), deadline, right).await;
        Ok(signed.map(|signed| Self {
            key,
            unsigned,
            guardian: ours.id,
            signature: signed.value,
            member: signed.member,
        }))
    }

    /// The member that signed.
    pub(crate) fn member(&self) -> &str {
        &self.member
    }

    /// The protector file and its SHA-256.
    ///
    /// # Errors
    /// When it would be larger than a protector may be.
    pub(crate) fn write(&self) -> Result<(Vec<u8>, [u8; 32]), Refusal> {
        let file = self.unsigned.finish(self.guardian, SignatureAlgorithm::DEFAULT, self.signature.clone())?;
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(self.unsigned.file_sha256(&file).as_ref());
        Ok((file, sha256))
    }

    /// The transport key that it protects.
    pub(crate) fn into_key(self) -> TransportKey {
        self.key
    }

    /// Bytes of memory that it takes.
    pub(crate) fn size(&self) -> usize {
        size_of::<Self>() + self.key.len() + self.unsigned.size() + self.signature.capacity()
    }
}
