//! Who wrote a protector, and for whom: steps 4 and 5 of a release.

use crate::certificate::Certificate;
use crate::error::Refusal;
use crate::protector::{Protector, Wrapping};
use crate::rsa_key::RsaPublicKey;

/// The two certificates of a wrapping, judged: X.509 with strong RSA keys.
#[derive(Clone, Debug)]
pub struct Party {
    /// Signs other parties' signing certificates, this party's encryption certificate, and protectors.
    pub signing: Certificate,
    /// What the transport key is encrypted to.
    pub encryption: Certificate,
}

/// A protector whose guardian signature and wrappings are right. The transport key's own signature is not checked yet.
#[derive(Clone, Debug)]
pub struct Verified {
    /// What was checked.
    pub protector: Protector,
    /// The parties of its wrappings, in the same order.
    pub parties: Vec<Party>,
    /// The wrapping that is its own parent: an index.
    pub owner: usize,
}

/// Checks the guardian signature, then every wrapping.
///
/// # Errors
/// `InvalidProtectorException` for the guardian signature (`InvalidWrappingException` when its certificate cannot be
/// used), `InvalidWrappingException` for the wrappings.
pub fn verify(protector: Protector) -> Result<Verified, Refusal> {
    let guardian = signing_certificate(&protector.wrappings[protector.guardian])?;
    guardian
        .key()
        .verify(protector.guardian_signature.algorithm, &protector.signed_octets, &protector.guardian_signature.value)
        .map_err(|_| Refusal::protector("the guardian signature does not fit the wrappings"))?;
    let parties = parties(&protector.wrappings)?;
    let owner = owner(&protector)?;
    for (wrapping, party) in protector.wrappings.iter().zip(&parties) {
        let parent = protector.index_of(wrapping.parent).map(|at| &parties[at]);
        let parent = parent.ok_or_else(|| refused(wrapping, "its parent is not in this protector"))?;
        signed_by(parent.signing.key(), wrapping)?;
        let signature = &wrapping.encryption_certificate_signature;
        party
            .signing
            .key()
            .verify(signature.algorithm, &wrapping.encryption_certificate, &signature.value)
            .map_err(|_| refused(wrapping, "the signature of its encryption certificate is wrong"))?;
    }
    Ok(Verified { protector, parties, owner })
}

fn signed_by(parent: &RsaPublicKey, wrapping: &Wrapping) -> Result<(), Refusal> {
    let signature = &wrapping.signing_certificate_signature;
    parent
        .verify(signature.algorithm, &wrapping.signing_certificate, &signature.value)
        .map_err(|_| refused(wrapping, "the signature of its signing certificate is wrong"))
}

fn refused(wrapping: &Wrapping, why: &str) -> Refusal {
    Refusal::wrapping(format!("wrapping {}: {why}", wrapping.id))
}

fn signing_certificate(wrapping: &Wrapping) -> Result<Certificate, Refusal> {
    Certificate::parse(&wrapping.signing_certificate)
        .map_err(|e| refused(wrapping, &format!("its signing certificate cannot be used: {e}")))
}

fn parties(wrappings: &[Wrapping]) -> Result<Vec<Party>, Refusal> {
    let party = |wrapping: &Wrapping| {
        let encryption = Certificate::parse(&wrapping.encryption_certificate)
            .map_err(|e| refused(wrapping, &format!("its encryption certificate cannot be used: {e}")))?;
        Ok(Party { signing: signing_certificate(wrapping)?, encryption })
    };
    wrappings.iter().map(party).collect()
}

/// The one wrapping that is its own parent, which every other one leads up to.
fn owner(protector: &Protector) -> Result<usize, Refusal> {
    let wrappings = &protector.wrappings;
    let mut owners = wrappings.iter().enumerate().filter(|(_, w)| w.parent == w.id);
    let owner = owners.next().ok_or_else(|| Refusal::wrapping("no wrapping is an owner's"))?.0;
    if let Some((_, second)) = owners.next() {
        return Err(refused(second, "a second owner"));
    }
    for wrapping in wrappings {
        let mut at = wrapping;
        // A chain longer than the protector has wrappings goes in a circle.
        for _ in 0..wrappings.len() {
            let parent = protector.index_of(at.parent).map(|i| &wrappings[i]);
            at = parent.ok_or_else(|| refused(at, "its parent is not in this protector"))?;
            if at.parent == at.id {
                break;
            }
        }
        if at.parent != at.id {
            return Err(refused(wrapping, "it does not lead up to the owner"));
        }
    }
    Ok(owner)
}
