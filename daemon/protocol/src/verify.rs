//! Who wrote a protector, and for whom: steps 4 and 5 of a release.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ring::digest;

use crate::certificate::Certificate;
use crate::error::Refusal;
use crate::protector::{MAX_WRAPPINGS, Protector, Signature, Wrapping};
use crate::rsa_key::{BadSignature, RsaPublicKey};

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

/// Signatures over certificates that were found right before. A tenant's protectors all carry the same ones, and what was
/// right once is right for ever. Bounded: what has not been met for long is forgotten.
#[derive(Debug)]
pub struct KnownSignatures {
    /// By [`Self::digest`]. When the young ones are full they become the old ones, which are forgotten.
    lately: Mutex<Lately>,
    capacity: usize,
}

impl Default for KnownSignatures {
    /// For one protector: its wrappings may repeat certificates, too.
    fn default() -> Self {
        Self::new(2 * MAX_WRAPPINGS)
    }
}

impl KnownSignatures {
    /// Remembers `capacity` signatures at least, and twice as many at most; 32 octets each, and the table's own.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { lately: Mutex::default(), capacity: capacity.max(1) }
    }

    /// Everything that decides whether the signature is right.
    fn digest(key: &RsaPublicKey, signature: &Signature, message: &[u8]) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        // Each with its length before it, so that no two sets of parts look the same.
        for part in [key.spki_der(), signature.algorithm.uri().as_bytes(), &signature.value, message] {
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part);
        }
        let mut octets = [0; 32];
        octets.copy_from_slice(context.finish().as_ref());
        octets
    }

    fn verify(&self, key: &RsaPublicKey, signature: &Signature, message: &[u8]) -> Result<(), BadSignature> {
        let digest = Self::digest(key, signature, message);
        if !self.lock().contains(&digest) {
            key.verify(signature.algorithm, message, &signature.value)?;
        }
        self.lock().insert(digest, self.capacity);
        Ok(())
    }

    /// How many it remembers now.
    #[must_use]
    pub fn len(&self) -> usize {
        let lately = self.lock();
        lately.young.len() + lately.old.len()
    }

    /// Whether it remembers none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, Lately> {
        // A panic in there leaves two sets.
        self.lately.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Lately {
    young: HashSet<[u8; 32]>,
    old: HashSet<[u8; 32]>,
}

impl Lately {
    fn contains(&self, digest: &[u8; 32]) -> bool {
        self.young.contains(digest) || self.old.contains(digest)
    }

    fn insert(&mut self, digest: [u8; 32], capacity: usize) {
        self.young.insert(digest);
        if self.young.len() >= capacity {
            self.old = std::mem::take(&mut self.young);
        }
    }
}

/// Checks the guardian signature, then every wrapping; of the wrappings' signatures those that `known` does not know.
///
/// # Errors
/// `InvalidProtectorException` for the guardian signature (`InvalidWrappingException` when its certificate cannot be
/// used), `InvalidWrappingException` for the wrappings.
pub fn verify(protector: Protector, known: &KnownSignatures) -> Result<Verified, Refusal> {
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
        let Wrapping { signing_certificate_signature, encryption_certificate_signature, .. } = wrapping;
        known
            .verify(parent.signing.key(), signing_certificate_signature, &wrapping.signing_certificate)
            .map_err(|_| refused(wrapping, "the signature of its signing certificate is wrong"))?;
        known
            .verify(party.signing.key(), encryption_certificate_signature, &wrapping.encryption_certificate)
            .map_err(|_| refused(wrapping, "the signature of its encryption certificate is wrong"))?;
    }
    Ok(Verified { protector, parties, owner })
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
