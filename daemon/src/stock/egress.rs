//! An egress protector: a fresh transport key for the parties of a wrapping set, signed in an HSM.

use std::sync::Arc;

use claviger_protocol::algorithm::SignatureAlgorithm;
use claviger_protocol::build::Unsigned;
use claviger_protocol::error::Refusal;
use claviger_protocol::protector::TransportKey;

/// A protector that is complete but not written out yet. The parts that it shares with its set are stored once per set.
#[derive(Debug)]
pub(crate) struct Egress {
    pub(crate) key: TransportKey,
    pub(crate) unsigned: Unsigned,
    /// Id of the wrapping whose signing key made the signature.
    pub(crate) guardian: u32,
    pub(crate) signature: Vec<u8>,
    /// Name of the member that signed.
    pub(crate) member: Arc<str>,
}

impl Egress {
    /// The member that signed.
    pub(crate) fn member(&self) -> &str {
        &self.member
    }

    /// Writes the protector file; returns the file and its SHA-256.
    ///
    /// # Errors
    /// The file would be larger than a protector may be.
    pub(crate) fn write(&self) -> Result<(Vec<u8>, [u8; 32]), Refusal> {
        let file = self.unsigned.finish(self.guardian, SignatureAlgorithm::DEFAULT, self.signature.clone())?;
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(self.unsigned.file_sha256(&file).as_ref());
        Ok((file, sha256))
    }

    /// The transport key in the protector.
    pub(crate) fn into_key(self) -> TransportKey {
        self.key
    }

    /// Memory use in bytes.
    pub(crate) fn size(&self) -> usize {
        size_of::<Self>() + self.key.len() + self.unsigned.size() + self.signature.capacity()
    }
}
