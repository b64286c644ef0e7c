//! Who wrote a protector, and for whom: steps 4 and 5 of a release.

use std::sync::{Arc, Mutex, MutexGuard};

use claviger_process::lock::lock;
use ring::digest;

use crate::certificate::Certificate;
use crate::error::Refusal;
use crate::protector::{MAX_WRAPPINGS, Protector, Signature, Wrapping};
use crate::recent::Recent;
use crate::rsa_key::RsaPublicKey;
use crate::work::Work;

/// Octets of a party's certificates beyond which it is not remembered: nobody fills the memory with large ones.
const MOST_REMEMBERED: usize = 16 * 1024;

/// The two certificates of a wrapping, judged: X.509 with strong RSA keys.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Party {
    /// Signs other parties' signing certificates, this party's encryption certificate, and protectors.
    pub signing: Certificate,
    /// What the transport key is encrypted to.
    pub encryption: Certificate,
}

impl Party {
    /// Bytes of memory that it takes, whoever shares it.
    pub(crate) fn memory(&self) -> usize {
        self.signing.memory() + self.encryption.memory()
    }
}

/// A protector whose guardian signature and wrappings are right. The transport key's own signature is not checked yet.
#[derive(Clone, Debug)]
pub struct Verified {
    /// What was checked.
    pub protector: Protector,
    /// The parties of its wrappings, in the same order.
    pub parties: Vec<Arc<Party>>,
    /// The wrapping that is its own parent: an index.
    pub owner: usize,
}

/// Certificates that were read before and whose signatures were found right. A tenant's protectors all carry the same ones,
/// and what was right once is right for ever. Bounded: what has not been met for long is forgotten.
#[derive(Debug)]
pub struct KnownCertificates(Mutex<Known>);

type Digest = [u8; 32];

#[derive(Debug)]
struct Known {
    /// By [`identity`]. The signing key's signature of the encryption certificate is right.
    parties: Recent<Digest, Arc<Party>>,
    /// By [`vouching`]: a parent's signatures that are right.
    vouched: Recent<Digest, ()>,
}

impl Default for KnownCertificates {
    /// For one protector: its wrappings may repeat certificates, too.
    fn default() -> Self {
        Self::new(MAX_WRAPPINGS)
    }
}

impl KnownCertificates {
    /// Remembers `capacity` parties at least, and twice as many at most; some 6 KiB each, and never more than 32.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.max(1);
        let (parties, vouched) = (Recent::new(capacity, |_| 1), Recent::new(capacity, |()| 1));
        Self(Mutex::new(Known { parties, vouched }))
    }

    /// How many parties it remembers now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().parties.len()
    }

    /// Whether it remembers none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn party(&self, identity: &Digest) -> Option<Arc<Party>> {
        self.lock().parties.get(identity)
    }

    fn remember(&self, identity: Digest, wrapping: &Wrapping, party: &Arc<Party>) {
        if wrapping.signing_certificate.len() + wrapping.encryption_certificate.len() <= MOST_REMEMBERED {
            self.lock().parties.insert(identity, party.clone());
        }
    }

    fn is_vouched(&self, vouching: &Digest) -> bool {
        self.lock().vouched.get(vouching).is_some()
    }

    fn vouch(&self, vouching: Digest) {
        self.lock().vouched.insert(vouching, ());
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // A panic in there leaves tables that are whole.
        lock(&self.0)
    }
}

/// Everything that decides who a wrapping's party is, and whether its encryption certificate is its own.
fn identity(wrapping: &Wrapping) -> Digest {
    let Wrapping { signing_certificate, encryption_certificate, encryption_certificate_signature, .. } = wrapping;
    let Signature { algorithm, value, .. } = encryption_certificate_signature;
    digest_of(&[signing_certificate, encryption_certificate, algorithm.uri().as_bytes(), value])
}

/// Everything that decides whether the party with the identity `parent` vouches for that with the identity `child`.
fn vouching(parent: &Digest, child: &Digest, signature: &Signature) -> Digest {
    digest_of(&[parent, child, signature.algorithm.uri().as_bytes(), &signature.value])
}

/// Of parts each with its length before it, so that no two sets of parts look the same.
fn digest_of(parts: &[&[u8]]) -> Digest {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in parts {
        context.update(&(part.len() as u64).to_le_bytes());
        context.update(part);
    }
    let mut octets = [0; 32];
    octets.copy_from_slice(context.finish().as_ref());
    octets
}

/// Checks the guardian signature, then every wrapping; of the wrappings' certificates those that `known` does not know.
///
/// # Errors
/// `InvalidProtectorException` for the guardian signature (`InvalidWrappingException` when its certificate cannot be
/// used), `InvalidWrappingException` for the wrappings.
pub fn verify(protector: Protector, known: &KnownCertificates) -> Result<Verified, Refusal> {
    verify_counting(protector, known, &mut Work::default())
}

/// The same; `work` tells which operations it took, also when it fails.
///
/// # Errors
/// As [`verify`].
pub fn verify_counting(protector: Protector, known: &KnownCertificates, work: &mut Work) -> Result<Verified, Refusal> {
    let wrappings = &protector.wrappings;
    let met = Met::of(wrappings, known);
    let signature = &protector.guardian_signature;
    let mut signed = |key: &RsaPublicKey| {
        work.add(key);
        key.verify(signature.algorithm, &protector.signed_octets, &signature.value)
    };
    match &met.parties[protector.guardian] {
        Some(guardian) => signed(guardian.signing.key()),
        None => signed(signing_certificate(&wrappings[protector.guardian])?.key()),
    }
    .map_err(|_| wrong_guardian_signature())?;
    let (parties, owner) = met.judge(wrappings, known, work)?;
    Ok(Verified { protector, parties, owner })
}

/// The refusal of step 4.
pub(crate) fn wrong_guardian_signature() -> Refusal {
    Refusal::protector("the guardian signature does not fit the wrappings")
}

/// Step 5 alone: the parties of the wrappings and which is the owner's, if every wrapping is right.
///
/// # Errors
/// `InvalidWrappingException`.
pub(crate) fn judge_wrappings(
    wrappings: &[Wrapping],
    known: &KnownCertificates,
    work: &mut Work,
) -> Result<(Vec<Arc<Party>>, usize), Refusal> {
    Met::of(wrappings, known).judge(wrappings, known, work)
}

/// What is known of the parties of some wrappings already.
struct Met {
    identities: Vec<Digest>,
    parties: Vec<Option<Arc<Party>>>,
}

impl Met {
    fn of(wrappings: &[Wrapping], known: &KnownCertificates) -> Self {
        let identities: Vec<Digest> = wrappings.iter().map(identity).collect();
        let parties = identities.iter().map(|identity| known.party(identity)).collect();
        Self { identities, parties }
    }

    fn judge(
        self,
        wrappings: &[Wrapping],
        known: &KnownCertificates,
        work: &mut Work,
    ) -> Result<(Vec<Arc<Party>>, usize), Refusal> {
        let Self { identities, parties: met } = self;
        let parties = wrappings
            .iter()
            .zip(&met)
            .map(|(wrapping, met)| met.clone().map_or_else(|| party(wrapping).map(Arc::new), Ok))
            .collect::<Result<Vec<_>, _>>()?;
        let owner = owner(wrappings)?;
        for (at, wrapping) in wrappings.iter().enumerate() {
            let parent = index_of(wrappings, wrapping.parent);
            let parent = parent.ok_or_else(|| refused(wrapping, "its parent is not in this protector"))?;
            let signature = &wrapping.signing_certificate_signature;
            let vouching = vouching(&identities[parent], &identities[at], signature);
            if !known.is_vouched(&vouching) {
                let key = parties[parent].signing.key();
                work.add(key);
                key.verify(signature.algorithm, &wrapping.signing_certificate, &signature.value)
                    .map_err(|_| refused(wrapping, "the signature of its signing certificate is wrong"))?;
                known.vouch(vouching);
            }
            if met[at].is_none() {
                let signature = &wrapping.encryption_certificate_signature;
                let key = parties[at].signing.key();
                work.add(key);
                key.verify(signature.algorithm, &wrapping.encryption_certificate, &signature.value)
                    .map_err(|_| refused(wrapping, "the signature of its encryption certificate is wrong"))?;
                known.remember(identities[at], wrapping, &parties[at]);
            }
        }
        Ok((parties, owner))
    }
}

fn index_of(wrappings: &[Wrapping], id: u32) -> Option<usize> {
    wrappings.iter().position(|w| w.id == id)
}

fn refused(wrapping: &Wrapping, why: &str) -> Refusal {
    Refusal::wrapping(format!("wrapping {}: {why}", wrapping.id))
}

fn signing_certificate(wrapping: &Wrapping) -> Result<Certificate, Refusal> {
    Certificate::parse(&wrapping.signing_certificate)
        .map_err(|e| refused(wrapping, &format!("its signing certificate cannot be used: {e}")))
}

fn party(wrapping: &Wrapping) -> Result<Party, Refusal> {
    let encryption = Certificate::parse(&wrapping.encryption_certificate)
        .map_err(|e| refused(wrapping, &format!("its encryption certificate cannot be used: {e}")))?;
    Ok(Party { signing: signing_certificate(wrapping)?, encryption })
}

/// The one wrapping that is its own parent, which every other one leads up to.
fn owner(wrappings: &[Wrapping]) -> Result<usize, Refusal> {
    let mut owners = wrappings.iter().enumerate().filter(|(_, w)| w.parent == w.id);
    let owner = owners.next().ok_or_else(|| Refusal::wrapping("no wrapping is an owner's"))?.0;
    if let Some((_, second)) = owners.next() {
        return Err(refused(second, "a second owner"));
    }
    for wrapping in wrappings {
        let mut at = wrapping;
        // A chain longer than the protector has wrappings goes in a circle.
        for _ in 0..wrappings.len() {
            let parent = index_of(wrappings, at.parent).map(|i| &wrappings[i]);
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
