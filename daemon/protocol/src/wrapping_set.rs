//! Wrapping sets: what all protectors of one owner with the same guardians have in common, which is every byte of `Wrappings` but
//! the `CipherValue`s.
//!
//! Nearly every protector that comes in is one that a service wrote, for a set that it has seen before. Such a protector needs no
//! XML parser, no canonical form and no look at its certificates: it is compared byte for byte with the set's skeleton. Any
//! other protector takes the full path, and both give the same answers.
//!
//! ```text
//! file ──► equals a known skeleton? ── yes ──► guardian signature known by the file's digest, or checked ──► Ingress
//!              │ no                                                                                            ▲
//!              └──► parse, canonical form, certificates, guardian signature, chain ──► its set ────────────────┘
//! ```
//!
//! What is remembered is public and was found right: a set only after the full path read the set's own skeleton as that set, and a
//! file only after its guardian signature was checked, or made and checked, in this process.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use claviger_process::lock::lock;

use crate::algorithm::{Oaep, SignatureAlgorithm};
use crate::build::Unsigned;
use crate::error::Refusal;
use crate::hash::sha256;
use crate::plain::plain_base64;
use crate::protector::{Encryption, MAX_WRAPPINGS, Protector, TransportKey, TransportKeySignature, Wrapping};
use crate::recent::Recent;
use crate::skeleton::{self, Ciphers, Skeleton, Values};
use crate::verify::{self, KnownCertificates, Party, Verified, judge_wrappings, wrong_guardian_signature};
use crate::work::Work;

/// Bytes of sets with their certificates and keys that are remembered at least; twice as many at most. An owner with three guardians
/// has some 40 KiB, certificates that other sets share included.
const SETS: usize = 32 * 1024 * 1024;
/// Longest skeleton that is remembered.
const LONGEST: usize = 128 * 1024;
/// Sets that look alike in the samples by which one is found: as many are kept.
const ALIKE: usize = 4;
/// Files whose guardian signature is known to be right, at least; twice as many at most, of 40 bytes each.
const FILES: usize = 128 * 1024;

/// The wrappings of a protector without the `CipherValue`s: certificates, Ids and signatures of certificates, all found right.
#[derive(Debug)]
pub struct WrappingSet {
    skeleton: Arc<Skeleton>,
    /// In document order.
    wrappings: Vec<SetWrapping>,
    owner: usize,
    identity: OnceLock<[u8; 32]>,
    memory: usize,
}

/// A wrapping of a set.
#[derive(Debug)]
pub struct SetWrapping {
    /// Names it within the protector.
    pub id: u32,
    /// Whom it is for.
    pub party: Arc<Party>,
    encryption: Encryption,
}

impl SetWrapping {
    /// How its `CipherValue`s are encrypted.
    #[must_use]
    pub fn oaep(&self) -> Oaep {
        self.encryption.oaep
    }
}

impl WrappingSet {
    fn new(wrappings: &[Wrapping], parties: Vec<Arc<Party>>, owner: usize) -> Self {
        let skeleton = Arc::new(Skeleton::of(wrappings));
        let wrappings = wrappings.iter().zip(parties);
        let wrappings = wrappings.map(|(Wrapping { id, encryption, .. }, party)| SetWrapping {
            id: *id,
            party,
            encryption: encryption.clone(),
        });
        let wrappings: Vec<_> = wrappings.collect();
        let each = |wrapping: &SetWrapping| size_of::<SetWrapping>() + wrapping.party.memory();
        let memory = size_of::<Self>() + skeleton.body().len() + wrappings.iter().map(each).sum::<usize>();
        Self { skeleton, wrappings, owner, identity: OnceLock::new(), memory }
    }

    /// Its wrappings, in document order.
    #[must_use]
    pub fn wrappings(&self) -> &[SetWrapping] {
        &self.wrappings
    }

    /// The party whose wrapping is its own parent.
    #[must_use]
    pub fn owner(&self) -> &Party {
        &self.wrappings[self.owner].party
    }

    /// Bytes that all protectors of the set have in common.
    #[must_use]
    pub fn size(&self) -> usize {
        self.skeleton.body().len()
    }

    /// Bytes of memory that it takes with its certificates and keys, which other sets may share.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.memory
    }

    /// A name that no other set has.
    #[must_use]
    pub fn identity(&self) -> [u8; 32] {
        *self.identity.get_or_init(|| sha256(self.skeleton.body().as_bytes()))
    }

    /// Step 8: a protector of `key` for the same parties, which lacks the guardian's signature.
    ///
    /// # Errors
    /// As [`Unsigned::new`].
    pub fn protect(&self, key: &TransportKey, max_offline_unwraps: u32) -> Result<Unsigned, Refusal> {
        let recipients = self.wrappings.iter().map(|wrapping| (wrapping.party.encryption.key(), wrapping.oaep()));
        Unsigned::with(Arc::clone(&self.skeleton), recipients, key, max_offline_unwraps)
    }

    /// The set as a document, to be kept for [`KnownSets::restore`]: a protector that protects nothing, with a placeholder for every
    /// value that is not the set's. All of it is public.
    #[must_use]
    pub fn to_document(&self) -> Vec<u8> {
        let mut ciphers = Ciphers::with_capacity(self.wrappings.len());
        self.wrappings.iter().for_each(|_| ciphers.push(&[0]));
        self.skeleton.write_placeholder(&ciphers, self.wrappings[self.owner].id)
    }

    /// Whether this is what the full path makes of the set's own document.
    fn reads_as_itself(&self, certificates: &KnownCertificates) -> bool {
        Self::of_document(&self.to_document(), certificates).is_some_and(|other| self.is(&other))
    }

    fn of_document(document: &[u8], certificates: &KnownCertificates) -> Option<Self> {
        let Protector { wrappings, signed_octets, .. } = Protector::parse(document).ok()?;
        let (parties, owner) = judge_wrappings(&wrappings, certificates, &mut Work::default()).ok()?;
        let set = Self::new(&wrappings, parties, owner);
        let mut ciphers = Ciphers::with_capacity(wrappings.len());
        wrappings.iter().for_each(|wrapping| ciphers.push(&wrapping.cipher_value));
        let signed: Vec<u8> = set.skeleton.signed(&ciphers).flat_map(str::bytes).collect();
        (signed == signed_octets).then_some(set)
    }

    fn is(&self, other: &Self) -> bool {
        let same = |(one, other): (&SetWrapping, &SetWrapping)| {
            one.id == other.id && one.encryption == other.encryption && one.party == other.party
        };
        self.skeleton.body() == other.skeleton.body()
            && self.owner == other.owner
            && self.wrappings.len() == other.wrappings.len()
            && self.wrappings.iter().zip(&other.wrappings).all(same)
    }
}

/// A protector that came in: steps 3 to 5 found it right.
#[derive(Debug)]
pub struct Ingress {
    /// Its wrappings.
    pub set: Arc<WrappingSet>,
    /// The transport key encrypted to each of them, in the same order.
    pub cipher_values: Vec<Vec<u8>>,
    /// Proves that whoever wrote the wrappings knew the transport key.
    pub transport_key_signature: TransportKeySignature,
    /// What that signature covers.
    pub signed_octets: Vec<u8>,
}

impl Ingress {
    fn of(verified: Verified) -> Self {
        let Verified { protector, parties, owner } = verified;
        let set = Arc::new(WrappingSet::new(&protector.wrappings, parties, owner));
        Self {
            set,
            cipher_values: protector.wrappings.into_iter().map(|wrapping| wrapping.cipher_value).collect(),
            transport_key_signature: protector.transport_key_signature,
            signed_octets: protector.signed_octets,
        }
    }
}

/// Sets, certificates and files that were found right before. Bounded: what has not been met for long is forgotten.
#[derive(Debug)]
pub struct KnownSets {
    certificates: KnownCertificates,
    /// By [`KnownSets::place`]; the ones met last come first.
    sets: Mutex<Recent<u64, Vec<Arc<WrappingSet>>>>,
    /// SHA-256 of files whose guardian signature is right.
    files: Mutex<Recent<[u8; 32], ()>>,
    hasher: RandomState,
}

impl KnownSets {
    /// Knows nothing yet. Remembers the certificates of so many parties at least, see [`KnownCertificates::new`].
    #[must_use]
    pub fn new(parties: usize) -> Self {
        let weigh = |sets: &Vec<Arc<WrappingSet>>| sets.iter().map(|set| set.memory()).sum();
        Self {
            certificates: KnownCertificates::new(parties),
            sets: Mutex::new(Recent::new(SETS, weigh)),
            files: Mutex::new(Recent::new(FILES, |()| 1)),
            hasher: RandomState::new(),
        }
    }

    /// Steps 3 to 5 of a release. `sha256` is that of `file`; `work` tells which operations it took, also when it fails.
    ///
    /// # Errors
    /// As [`Protector::parse`] and [`verify::verify`].
    pub fn read(&self, file: &[u8], sha256: &[u8; 32], work: &mut Work) -> Result<Ingress, Refusal> {
        match self.read_known(file, sha256, work) {
            Some(read) => read,
            None => self.read_in_full(file, sha256, work),
        }
    }

    /// Reads a protector with all checks, even if its wrapping set is known.
    ///
    /// # Errors
    /// As [`KnownSets::read`].
    pub(crate) fn read_in_full(&self, file: &[u8], sha256: &[u8; 32], work: &mut Work) -> Result<Ingress, Refusal> {
        let protector = Protector::parse(file)?;
        let mut ingress = Ingress::of(verify::verify_counting(protector, &self.certificates, work)?);
        self.know_file(*sha256);
        if let Some(known) =
            self.find(ingress.set.skeleton.body().as_bytes(), |known| known.is(&ingress.set).then_some(()))
        {
            ingress.set = known.0;
        }
        Ok(ingress)
    }

    /// Reads a protector whose wrapping set is known. Returns `None` if the set is not known, or if the file is not written in
    /// the usual form.
    pub fn read_known(&self, file: &[u8], sha256: &[u8; 32], work: &mut Work) -> Option<Result<Ingress, Refusal>> {
        let (set, values) = self.find(file, |set| set.skeleton.read(file))?;
        let Values { ciphers, transport_key_signature, guardian, guardian_signature, body } = values;
        let cipher_values = ciphers.into_iter().map(plain_base64).collect::<Option<Vec<_>>>()?;
        let guardian = set.wrappings.iter().find(|wrapping| wrapping.id == guardian)?;
        let body = &file[body];
        let signed_octets = set.skeleton.signed_octets_of(body);
        if !self.is_known_file(sha256) {
            let key = guardian.party.signing.key();
            work.add(key);
            let right = if guardian_signature.algorithm == SignatureAlgorithm::DEFAULT {
                key.verify_digest(set.skeleton.signed_sha256_of(body).as_ref(), &guardian_signature.value)
            } else {
                key.verify(guardian_signature.algorithm, &signed_octets, &guardian_signature.value)
            };
            if right.is_err() {
                return Some(Err(wrong_guardian_signature()));
            }
            self.know_file(*sha256);
        }
        Some(Ok(Ingress { set, cipher_values, transport_key_signature, signed_octets }))
    }

    /// Remembers a set for the next protector of it. One that the full path does not read as it was written is not remembered.
    pub fn remember(&self, set: &Arc<WrappingSet>) {
        if set.skeleton.body().len() > LONGEST {
            return;
        }
        let Some(place) = self.place(set.skeleton.body().as_bytes()) else { return };
        let known = self.sets().get(&place).unwrap_or_default();
        if known.iter().any(|known| Arc::ptr_eq(known, set)) || !set.reads_as_itself(&self.certificates) {
            return;
        }
        let others = known.into_iter().filter(|known| !known.is(set));
        let all = std::iter::once(Arc::clone(set)).chain(others).take(ALIKE).collect();
        self.sets().insert(place, all);
    }

    /// Takes in a set that [`WrappingSet::to_document`] wrote, after the same checks as for a protector that comes in. `None`: it
    /// does not pass them.
    #[must_use]
    pub fn restore(&self, document: &[u8]) -> Option<Arc<WrappingSet>> {
        let set = Arc::new(WrappingSet::of_document(document, &self.certificates)?);
        self.remember(&set);
        Some(set)
    }

    /// Notes that a file has a right guardian signature, because this process had it made and checked it.
    pub fn know_file(&self, sha256: [u8; 32]) {
        self.files().insert(sha256, ());
    }

    fn is_known_file(&self, sha256: &[u8; 32]) -> bool {
        self.files().get(sha256).is_some()
    }

    /// The first known set that looks like that of `text` and of which `of` makes something.
    fn find<T>(&self, text: &[u8], of: impl Fn(&WrappingSet) -> Option<T>) -> Option<(Arc<WrappingSet>, T)> {
        let alike = self.sets().get(&self.place(text)?)?;
        alike.into_iter().find_map(|set| of(&set).map(|found| (set, found)))
    }

    /// Where a set is kept, by the text of a protector of it or its skeleton.
    fn place(&self, text: &[u8]) -> Option<u64> {
        let samples: Vec<&[u8]> = skeleton::samples(text).take(MAX_WRAPPINGS + 1).collect();
        (1..=MAX_WRAPPINGS).contains(&samples.len()).then(|| self.hasher.hash_one(samples))
    }

    fn sets(&self) -> MutexGuard<'_, Recent<u64, Vec<Arc<WrappingSet>>>> {
        // A panic in there leaves tables that are whole.
        lock(&self.sets)
    }

    fn files(&self) -> MutexGuard<'_, Recent<[u8; 32], ()>> {
        lock(&self.files)
    }
}
