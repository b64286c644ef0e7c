//! The tenant's operations: create and open a protector, grant a guardian access, revoke a guardian.

use crate::algorithm::{Oaep, SignatureAlgorithm};
use crate::build::{Unsigned, fresh_transport_key};
use crate::certificate::Certificate;
use crate::error::Refusal;
use crate::metadata::{GuardianInformation, Metadata};
use crate::protector::{Encryption, MAX_WRAPPINGS, Protector, Signature, TransportKey, Wrapping, transport_key};
use crate::rsa_key::{RsaPrivateKey, RsaPublicKey};
use crate::verify::{self, KnownCertificates, Party, Verified};

/// The owner's Id in new protectors.
const OWNER_ID: u32 = 1;

/// The owner's two key pairs and their certificates.
pub struct Owner {
    /// Signs guardians' certificates, and protectors.
    pub signing_key: RsaPrivateKey,
    /// The certificate of the signing key.
    pub signing_certificate: Certificate,
    /// Decrypts the transport keys of protectors.
    pub encryption_key: RsaPrivateKey,
    /// The certificate of the encryption key.
    pub encryption_certificate: Certificate,
}

/// Why an owner's operation failed.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// The protector is invalid, or the new protector would be.
    #[error(transparent)]
    Protector(#[from] Refusal),
    /// The protector has no wrapping for this owner's encryption key.
    #[error("no wrapping of this protector is for this owner's encryption key")]
    NotOurs,
    /// The owner's key does not decrypt the transport key, or the transport-key signature is wrong.
    #[error("the transport key cannot be decrypted, or its signature is wrong")]
    Decrypt,
    /// The owner's key failed to sign.
    #[error("the owner's key cannot sign")]
    Sign,
    /// Another owner made the protector. Only its owner may change its guardians.
    #[error("this owner key does not own the protector; use that of the owner who made it")]
    NotOwner,
    /// The new protector would have more wrappings than a service accepts.
    #[error("a protector has room for {MAX_WRAPPINGS} parties, the owner and {} guardians", MAX_WRAPPINGS - 1)]
    Full,
    /// No wrapping matches the guardian to revoke.
    #[error("the protector has no wrapping for that guardian")]
    NoSuchGuardian,
    /// The owner's own wrapping matches the guardian to revoke.
    #[error("the owner's own wrapping cannot be revoked")]
    OwnerStays,
}

/// The result of [`Owner::revoke`].
pub struct Revoked {
    /// The new protector.
    pub file: Vec<u8>,
    /// The fresh transport key. Revoked guardians never had access to it.
    pub key: TransportKey,
    /// The Ids of the removed wrappings.
    pub gone: Vec<u32>,
}

impl Owner {
    /// Creates a transport key, and a protector of it for the owner and `guardians` (Ids 1, 2, 3 …).
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

    /// Decrypts the transport key of a protector that has a wrapping for this owner.
    ///
    /// # Errors
    /// See [`OwnerError`].
    pub fn open(&self, protector: &[u8]) -> Result<TransportKey, OwnerError> {
        self.open_verified(&verify::verify(Protector::parse(protector)?, &KnownCertificates::default())?)
    }

    /// Adds a guardian to the protector. The transport key and the other wrappings stay; the owner signs.
    ///
    /// # Errors
    /// See [`OwnerError`].
    pub fn grant(&self, protector: &[u8], guardian: &Metadata) -> Result<Vec<u8>, OwnerError> {
        let verified = verify::verify(Protector::parse(protector)?, &KnownCertificates::default())?;
        self.is_owner_of(&verified)?;
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

    /// Creates a protector of a *fresh* transport key for the parties of `protector`, except those that `chosen`
    /// selects. The remaining wrappings keep their Ids, certificates and certificate signatures; the owner signs.
    ///
    /// Two kinds of wrappings are removed as well: those that a removed wrapping vouches for, and those with the same
    /// key. A service searches for its own key, so another wrapping of the same key would still give access.
    ///
    /// A revoked guardian can always open the old protector. To exclude it, encrypt the data again with the new
    /// transport key.
    ///
    /// # Errors
    /// See [`OwnerError`].
    pub fn revoke(&self, protector: &[u8], chosen: impl Fn(u32, &Party) -> bool) -> Result<Revoked, OwnerError> {
        let verified = verify::verify(Protector::parse(protector)?, &KnownCertificates::default())?;
        self.is_owner_of(&verified)?;
        // The owner must be able to open the protector.
        self.open_verified(&verified)?;
        let (wrappings, parties) = (&verified.protector.wrappings, &verified.parties);
        let mut gone: Vec<bool> = wrappings.iter().zip(parties).map(|(w, party)| chosen(w.id, party)).collect();
        if gone[verified.owner] {
            return Err(OwnerError::OwnerStays);
        }
        if !gone.contains(&true) {
            return Err(OwnerError::NoSuchGuardian);
        }
        // The rules below never remove the owner's wrapping. Otherwise a guardian that puts the owner's certificate into
        // its own wrapping could not be revoked.
        loop {
            let follows = |at: usize| {
                let (wrapping, party) = (&wrappings[at], &parties[at]);
                let lost = |other: usize| {
                    wrappings[other].id == wrapping.parent
                        || parties[other].signing.key() == party.signing.key()
                        || parties[other].encryption.key() == party.encryption.key()
                };
                (0..wrappings.len()).any(|other| gone[other] && lost(other))
            };
            let Some(next) = (0..wrappings.len()).find(|at| !gone[*at] && *at != verified.owner && follows(*at)) else {
                break;
            };
            gone[next] = true;
        }
        let kept: Vec<Wrapping> =
            wrappings.iter().zip(&gone).filter(|(_, gone)| !**gone).map(|(w, _)| w.clone()).collect();
        let recipients = parties.iter().zip(&gone).filter(|(_, gone)| !**gone).map(|(party, _)| party.encryption.key());
        let key = fresh_transport_key()?;
        let file = self.write(&kept, recipients, &key, wrappings[verified.owner].id)?;
        let gone = wrappings.iter().zip(&gone).filter(|(_, gone)| **gone).map(|(w, _)| w.id).collect();
        Ok(Revoked { file, key, gone })
    }

    /// A metadata document of this owner, signed with its own signing key, for other owners who want to grant it
    /// access.
    ///
    /// # Errors
    /// [`OwnerError::Sign`].
    pub fn metadata(&self) -> Result<Vec<u8>, OwnerError> {
        let (signing, encryption) = (self.signing_certificate.der(), self.encryption_certificate.der());
        let information = GuardianInformation {
            encryption_certificate: encryption.to_vec(),
            signing_certificate: signing.to_vec(),
            encryption_certificate_signature: self.sign(encryption)?,
            signing_certificate_self_signature: self.sign(signing)?,
            other_signing_certificates: Vec::new(),
        };
        let unsigned = information.unsigned(signing);
        Ok(unsigned.finish(&self.sign(unsigned.signed_octets())?.value))
    }

    fn is_owner_of(&self, verified: &Verified) -> Result<(), OwnerError> {
        let owner = verified.parties[verified.owner].signing.key();
        if owner == self.signing_key.public() { Ok(()) } else { Err(OwnerError::NotOwner) }
    }

    fn open_verified(&self, verified: &Verified) -> Result<TransportKey, OwnerError> {
        let ours = verified.parties.iter().position(|p| p.encryption.key() == self.encryption_key.public());
        let wrapping = &verified.protector.wrappings[ours.ok_or(OwnerError::NotOurs)?];
        let plaintext = self.encryption_key.decrypt_oaep(wrapping.encryption.oaep, &wrapping.cipher_value);
        let key = transport_key(&plaintext.map_err(|_| OwnerError::Decrypt)?).ok_or(OwnerError::Decrypt)?;
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
        if wrappings.len() > MAX_WRAPPINGS {
            return Err(OwnerError::Full);
        }
        let unsigned = Unsigned::new(wrappings, recipients, key, 0)?;
        let signature = self.sign(&unsigned.signed_octets())?;
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

/// The encryption of new wrappings: all clients understand it, and all tokens support it natively.
const DEFAULT_ENCRYPTION: Encryption = Encryption { oaep: Oaep::SHA1, version_11: false };
