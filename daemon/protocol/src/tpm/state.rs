//! State: the data that the service needs in step 2. The service seals it and the host carries it, so that the service
//! stores nothing between the steps.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::error::Unspecified;
use ring::hkdf::{HKDF_SHA256, Salt};
use zeroize::Zeroizing;

use super::credential;
use super::pcr::PcrSet;
use super::reader::Reader;
use crate::random;

/// Seconds for which a State is valid.
pub const LIFETIME_SECONDS: i64 = 120;

/// Associated data of every sealed State.
const PURPOSE: &[u8] = b"claviger-tpm-state-1";

/// The data of a session between its two steps.
#[derive(Clone, PartialEq, Eq)]
pub struct State {
    /// The last second at which the State is valid, unix time.
    pub ends: i64,
    /// The session's GUID, its 16 bytes as sent.
    pub session_id: [u8; 16],
    /// SHA-256 of the endorsement key's SubjectPublicKeyInfo.
    pub endorsement_key: [u8; 32],
    /// The credential that the host's TPM has to recover.
    pub credential: Zeroizing<[u8; credential::LENGTH]>,
    /// The PCRs that the host has to quote.
    pub selection: PcrSet,
    /// `TPMT_PUBLIC` of the attestation key.
    pub ak_public: Vec<u8>,
}

/// Identifies a sealed State, so that it can be used only once.
pub type StateId = [u8; NONCE_LEN];

/// The State cannot be opened: it was changed or truncated, or a server without this key made it (another service, or this
/// server before its last start).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the State was not made by this server since it started")]
pub struct BadState;

/// The key that seals States.
pub struct StateKey(LessSafeKey);

/// Random bytes from which several servers derive the same key. Wiped when dropped.
pub struct StateSeed(Zeroizing<[u8; SEED_LENGTH]>);

/// Length of a seed in bytes. It differs from that of a transport key and of a credential.
const SEED_LENGTH: usize = 48;

/// What the key is derived for.
const DERIVED_FOR: &[u8] = b"claviger-tpm-state-key-1";

impl StateSeed {
    /// A fresh seed.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn generate() -> Result<Self, Unspecified> {
        Ok(Self(Zeroizing::new(random::octets()?)))
    }

    /// The seed with these bytes; `None` if they have another length.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut seed = Zeroizing::new([0; SEED_LENGTH]);
        if bytes.len() != SEED_LENGTH {
            return None;
        }
        seed.copy_from_slice(bytes);
        Some(Self(seed))
    }

    /// The bytes of the seed, which are secret.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &*self.0
    }
}

impl std::fmt::Debug for StateSeed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StateSeed").finish_non_exhaustive()
    }
}

impl StateKey {
    /// A fresh key.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn generate() -> Result<Self, Unspecified> {
        let key: Zeroizing<[u8; 32]> = Zeroizing::new(random::octets()?);
        Ok(Self(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &*key)?)))
    }

    /// The key that is derived from a seed (HKDF, RFC 5869, with SHA-256).
    ///
    /// # Errors
    /// Never with the lengths used here.
    pub fn from_seed(seed: &StateSeed) -> Result<Self, Unspecified> {
        let derived = Salt::new(HKDF_SHA256, &[]).extract(seed.as_bytes());
        let key = derived.expand(&[DERIVED_FOR], &AES_256_GCM)?;
        Ok(Self(LessSafeKey::new(UnboundKey::from(key))))
    }

    /// Seals a State. Nonces are random: one key is safe for 2^32 States, far more than a key seals in its life.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn seal(&self, state: &State) -> Result<Vec<u8>, Unspecified> {
        let nonce: StateId = random::octets()?;
        let mut plain = Zeroizing::new(Vec::with_capacity(128 + state.ak_public.len()));
        plain.extend_from_slice(&state.ends.to_be_bytes());
        plain.extend_from_slice(&state.session_id);
        plain.extend_from_slice(&state.endorsement_key);
        plain.extend_from_slice(&*state.credential);
        plain.extend_from_slice(&state.selection.to_selection());
        plain.extend_from_slice(&state.ak_public);
        let tag = self.0.seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(PURPOSE),
            plain.as_mut_slice(),
        )?;
        Ok([&nonce[..], &plain, tag.as_ref()].concat())
    }

    /// Opens a State that [`Self::seal`] made. The caller has to check whether it has expired.
    ///
    /// # Errors
    /// [`BadState`].
    pub fn open(&self, sealed: &[u8]) -> Result<(StateId, State), BadState> {
        let (nonce, rest) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(BadState)?;
        let mut plain = Zeroizing::new(rest.to_vec());
        let plain = self.0.open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(PURPOSE), &mut plain);
        let state = read(plain.map_err(|_| BadState)?).ok_or(BadState)?;
        Ok((*nonce, state))
    }
}

impl std::fmt::Debug for StateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StateKey").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("ends", &self.ends).field("selection", &self.selection).finish_non_exhaustive()
    }
}

fn read(plain: &[u8]) -> Option<State> {
    fn field<const N: usize>(reader: &mut Reader<'_>) -> Option<[u8; N]> {
        reader.take(N).ok()?.try_into().ok()
    }
    let mut reader = Reader::new(plain);
    let ends = i64::from_be_bytes(field(&mut reader)?);
    let (session_id, endorsement_key) = (field(&mut reader)?, field(&mut reader)?);
    // Copy directly into memory that is wiped: an array by value would leave a copy on the stack.
    let mut credential = Zeroizing::new([0; credential::LENGTH]);
    credential.copy_from_slice(reader.take(credential::LENGTH).ok()?);
    Some(State {
        ends,
        session_id,
        endorsement_key,
        credential,
        selection: PcrSet::from_selection(&field::<10>(&mut reader)?).ok()?,
        ak_public: reader.rest().to_vec(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn state() -> State {
        State {
            ends: 1_800_000_120,
            session_id: [1; 16],
            endorsement_key: [2; 32],
            credential: Zeroizing::new([3; 32]),
            selection: PcrSet::ALWAYS,
            ak_public: vec![4; 400],
        }
    }

    #[test]
    fn a_state_opens_as_it_was_sealed_and_only_so() {
        let key = StateKey::generate().unwrap();
        let sealed = key.seal(&state()).unwrap();
        let (id, opened) = key.open(&sealed).unwrap();
        assert_eq!(opened, state());
        assert_ne!(id, key.open(&key.seal(&state()).unwrap()).unwrap().0);
        assert!(sealed.windows(8).all(|part| part != [3; 8]));
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(key.open(&changed), Err(BadState), "byte {at}");
            assert_eq!(key.open(&sealed[..at]), Err(BadState), "{at} bytes");
        }
        assert_eq!(StateKey::generate().unwrap().open(&sealed), Err(BadState));
        assert!(!format!("{:?} {key:?}", state()).contains("3, 3"));
    }

    #[test]
    fn servers_with_one_seed_open_each_others_states() {
        let seed = StateSeed::generate().unwrap();
        let copy = StateSeed::from_bytes(seed.as_bytes()).unwrap();
        let sealed = StateKey::from_seed(&seed).unwrap().seal(&state()).unwrap();
        assert_eq!(StateKey::from_seed(&copy).unwrap().open(&sealed).unwrap().1, state());
        let other = StateKey::from_seed(&StateSeed::generate().unwrap()).unwrap();
        assert_eq!(other.open(&sealed), Err(BadState));
        assert!(StateSeed::from_bytes(&seed.as_bytes()[1..]).is_none());
        assert_ne!(SEED_LENGTH, crate::protector::TransportKey::default().len());
    }
}
