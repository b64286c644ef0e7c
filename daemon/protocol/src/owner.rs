//! The tenant's side: making a protector, opening it, and letting a guardian in.

use crate::algorithm::{Oaep, SignatureAlgorithm};
use crate::build::{Unsigned, fresh_transport_key};
use crate::certificate::Certificate;
use crate::error::Refusal;
use crate::metadata::Metadata;
use crate::protector::{Encryption, Protector, Signature, TransportKey, Wrapping};
use crate::rsa_key::{RsaPrivateKey, RsaPublicKey};
use crate::verify::{self, KnownCertificates, Verified};

/// The owner's Id in the protectors made here.
const OWNER_ID: u32 = 1;

/// An owner: two key pairs, and a certificate for each.
pub struct Owner {
    /// Signs guardians' certificates and protectors.
    pub signing_key: RsaPrivateKey,
    /// Its certificate.
    pub signing_certificate: Certificate,
    /// Opens protectors.
    pub encryption_key: RsaPrivateKey,
    /// Its certificate.
    pub encryption_certificate: Certificate,
}

/// Why an owner's operation failed.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// The protector is not acceptable, or would not be.
    #[error(transparent)]
    Protector(#[from] Refusal),
    /// The protector has no wrapping for this key.
    #[error("no wrapping of this protector is for this owner's encryption key")]
    NotOurs,
    /// The owner's key does not open it, or its transport-key signature is wrong.
    #[error("the transport key cannot be decrypted, or its signature is wrong")]
    Decrypt,
    /// The owner's key cannot sign.
    #[error("the owner's key cannot sign")]
    Sign,
}

impl Owner {
    /// A fresh transport key, and a protector of it for the owner and `guardians` (Ids 1, 2, 3 …).
    ///
    /// # Errors
    /// See [`OwnerError`].
    pub fn create(&self, guardians: &[Metadata]) -> Result<(Vec<u8>, TransportKey), OwnerError> {
        let mut wrappings = vec![self.own_wrapping()?];
        let mut recipients = vec![self.encryption_key.public()];
        for (guardian, id) in guardians.iter().zip(OWNER_ID + 1..) {
            wrappings.push(self.guardian_wrapping(guardian, id)?);
            recipients.push(&guardian.encryption_key);
        }
        let key = fresh_transport_key()?;
        let file = self.write(&wrappings, recipients, &key, OWNER_ID)?;
        Ok((file, key))
    }

    /// The transport key of a protector that has a wrapping for this owner.
    ///
    /// # Errors
    /// See [`OwnerError`].
    pub fn open(&self, protector: &[u8]) -> Result<TransportKey, OwnerError> {
        self.open_verified(&verify::verify(Protector::parse(protector)?, &KnownCertificates::default())?)
    }

    /// The protector with one more guardian: same transport key, the other wrappings kept, signed by the owner.
    ///
    /// # Errors
    /// See [`OwnerError`].
    pub fn grant(&self, protector: &[u8], guardian: &Metadata) -> Result<Vec<u8>, OwnerError> {
        let verified = verify::verify(Protector::parse(protector)?, &KnownCertificates::default())?;
        if verified.parties[verified.owner].signing.key() != self.signing_key.public() {
            return Err(OwnerError::NotOurs);
        }
        let key = self.open_verified(&verified)?;
        let mut wrappings = verified.protector.wrappings;
        let owner = wrappings[verified.owner].id;
        let free = (1..=u32::MAX).find(|id| wrappings.iter().all(|w| w.id != *id)).unwrap_or(u32::MAX);
        let mut wrapping = self.guardian_wrapping(guardian, free)?;
        wrapping.parent = owner;
        wrappings.push(wrapping);
        let recipients = verified.parties.iter().map(|p| p.encryption.key()).chain([&guardian.encryption_key]);
        self.write(&wrappings, recipients, &key, owner)
    }

    fn open_verified(&self, verified: &Verified) -> Result<TransportKey, OwnerError> {
        let ours = verified.parties.iter().position(|p| p.encryption.key() == self.encryption_key.public());
        let wrapping = &verified.protector.wrappings[ours.ok_or(OwnerError::NotOurs)?];
        let plaintext = self.encryption_key.decrypt_oaep(wrapping.encryption.oaep, &wrapping.cipher_value);
        let mut key = TransportKey::default();
        let plaintext = plaintext.map_err(|_| OwnerError::Decrypt)?;
        if plaintext.len() != key.len() {
            return Err(OwnerError::Decrypt);
        }
        key.copy_from_slice(&plaintext);
        let signature = &verified.protector.transport_key_signature;
        if signature.verify(&key, &verified.protector.signed_octets) { Ok(key) } else { Err(OwnerError::Decrypt) }
    }

    fn write<'a>(
        &self,
        wrappings: &[Wrapping],
        recipients: impl IntoIterator<Item = &'a RsaPublicKey>,
        key: &TransportKey,
        owner: u32,
    ) -> Result<Vec<u8>, OwnerError> {
        let unsigned = Unsigned::new(wrappings, recipients, key, 0)?;
        let signature = self.sign(unsigned.signed_octets())?;
        Ok(unsigned.finish(owner, signature.algorithm, signature.value)?)
    }

    fn own_wrapping(&self) -> Result<Wrapping, OwnerError> {
        Ok(Wrapping {
            id: OWNER_ID,
            signing_certificate: self.signing_certificate.der().to_vec(),
            parent: OWNER_ID,
            signing_certificate_signature: self.sign(self.signing_certificate.der())?,
            encryption_certificate: self.encryption_certificate.der().to_vec(),
            encryption_certificate_signature: self.sign(self.encryption_certificate.der())?,
            encryption: DEFAULT_ENCRYPTION,
            cipher_value: Vec::new(),
        })
    }

    fn guardian_wrapping(&self, metadata: &Metadata, id: u32) -> Result<Wrapping, OwnerError> {
        let guardian = &metadata.guardian;
        Ok(Wrapping {
            id,
            signing_certificate: guardian.signing_certificate.clone(),
            parent: OWNER_ID,
            signing_certificate_signature: self.sign(&guardian.signing_certificate)?,
            encryption_certificate: guardian.encryption_certificate.clone(),
            encryption_certificate_signature: guardian.encryption_certificate_signature.clone(),
            encryption: DEFAULT_ENCRYPTION,
            cipher_value: Vec::new(),
        })
    }

    fn sign(&self, octets: &[u8]) -> Result<Signature, OwnerError> {
        let algorithm = SignatureAlgorithm::DEFAULT;
        let value = self.signing_key.sign(algorithm, octets).map_err(|_| OwnerError::Sign)?;
        Ok(Signature { algorithm, parameters: None, value })
    }
}

/// What a new wrapping is encrypted by: understood by every client and natively by every token.
const DEFAULT_ENCRYPTION: Encryption = Encryption { oaep: Oaep::SHA1, version_11: false };
