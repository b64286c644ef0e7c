//! The service's data for attestations by TPM between their two steps: the key that seals States, and the list of used
//! States.
//!
//! ```text
//!             claim                 spend
//!   unused ──────────► claimed ───────────────► used ──── after its end ───► forgotten
//!     ▲                   │                                                  (an expired State cannot be claimed)
//!     └── claim dropped ──┘
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::ArcSwap;
use claviger_process::lock::lock;
use claviger_protocol::tpm::state::{BadState, State, StateId, StateKey};
use ring::error::Unspecified;

/// Number of used States below which expired ones are not purged.
const LEAST_PURGE: usize = 1_024;

/// The key that seals States, and the used States.
#[derive(Debug)]
pub struct Sessions {
    keys: ArcSwap<SealingKeys>,
    used: Mutex<Used>,
}

#[derive(Debug)]
struct SealingKeys {
    /// Seals and opens States.
    current: Arc<StateKey>,
    /// Opens the States that it has sealed.
    previous: Option<Arc<StateKey>>,
}

#[derive(Debug, Default)]
struct Used {
    /// Expiry of each used State, in seconds since 1970.
    until: HashMap<StateId, i64>,
    /// Number of entries at which expired ones are purged.
    purge_at: usize,
}

/// Exclusive use of a State. Dropping it without [`Claim::spend`] makes the State unused again.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    sessions: &'a Sessions,
    id: StateId,
    is_spent: bool,
}

impl Sessions {
    /// Generates the key.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn new() -> Result<Self, Unspecified> {
        let keys = SealingKeys { current: Arc::new(StateKey::generate()?), previous: None };
        Ok(Self { keys: ArcSwap::from_pointee(keys), used: Mutex::default() })
    }

    /// Seals a State.
    ///
    /// # Errors
    /// The system has no randomness.
    pub(crate) fn seal(&self, state: &State) -> Result<Vec<u8>, Unspecified> {
        self.keys.load().current.seal(state)
    }

    /// Opens a State that the current or the previous key has sealed.
    ///
    /// # Errors
    /// [`BadState`].
    pub(crate) fn open(&self, sealed: &[u8]) -> Result<(StateId, State), BadState> {
        let keys = self.keys.load();
        let opened = keys.current.open(sealed);
        opened.or_else(|error| keys.previous.as_ref().map_or(Err(error), |previous| previous.open(sealed)))
    }

    /// Seals with another key from now on.
    pub(crate) fn replace_key(&self, key: StateKey) {
        let previous = Some(Arc::clone(&self.keys.load().current));
        self.keys.store(Arc::new(SealingKeys { current: Arc::new(key), previous }));
    }

    /// Whether a State was used for a certificate, or is claimed.
    pub(crate) fn is_used(&self, id: &StateId) -> bool {
        self.used().until.contains_key(id)
    }

    /// Claims a State that is valid up to and including `ends`. Returns `None` if it has expired, was used, or is
    /// claimed.
    pub(crate) fn claim(&self, id: StateId, ends: i64, now: i64) -> Option<Claim<'_>> {
        let mut used = self.used();
        // The table forgets expired States, so an expired State may have been used even if it is not in the table.
        if ends < now || used.until.contains_key(&id) {
            return None;
        }
        if used.until.len() >= used.purge_at.max(LEAST_PURGE) {
            used.until.retain(|_, ends| *ends >= now);
            used.purge_at = 2 * used.until.len();
        }
        used.until.insert(id, ends);
        Some(Claim { sessions: self, id, is_spent: false })
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        lock(&self.used)
    }
}

impl Claim<'_> {
    /// Marks the State as used until it expires.
    pub(crate) fn spend(mut self) {
        self.is_spent = true;
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if !self.is_spent {
            self.sessions.used().until.remove(&self.id);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_state_serves_one_certificate() {
        let sessions = Sessions::new().unwrap();
        let (one, two) = ([1; 12], [2; 12]);
        let claim = sessions.claim(one, 120, 0).unwrap();
        assert!(sessions.is_used(&one) && sessions.claim(one, 120, 0).is_none(), "claimed");
        drop(claim);
        assert!(!sessions.is_used(&one), "a dropped claim leaves the State unused");
        sessions.claim(one, 120, 0).unwrap().spend();
        assert!(sessions.is_used(&one) && sessions.claim(one, 120, 0).is_none());
        assert!(sessions.claim(two, 120, 0).is_some());
    }

    #[test]
    fn the_previous_key_opens_what_it_has_sealed() {
        let state = State {
            ends: 120,
            session_id: [1; 16],
            endorsement_key: [2; 32],
            credential: zeroize::Zeroizing::new([3; 32]),
            selection: claviger_protocol::tpm::pcr::PcrSet::ALWAYS,
            ak_public: vec![4; 40],
        };
        let (here, there) = (Sessions::new().unwrap(), Sessions::new().unwrap());
        let sealed = here.seal(&state).unwrap();
        assert!(there.open(&sealed).is_err());
        let seed = claviger_protocol::tpm::state::StateSeed::generate().unwrap();
        for sessions in [&here, &there] {
            sessions.replace_key(StateKey::from_seed(&seed).unwrap());
        }
        assert!(here.open(&sealed).unwrap().1 == state);
        let common = here.seal(&state).unwrap();
        assert!(there.open(&common).unwrap().1 == state, "both nodes have the key");
        here.replace_key(StateKey::generate().unwrap());
        assert!(here.open(&sealed).is_err() && here.open(&common).is_ok(), "one before the current one");
    }

    #[test]
    fn an_expired_state_cannot_be_claimed() {
        let sessions = Sessions::new().unwrap();
        assert!(sessions.claim([1; 12], 120, 121).is_none());
        assert!(!sessions.is_used(&[1; 12]));
        assert!(sessions.claim([1; 12], 120, 120).is_some());
    }

    #[test]
    fn expired_states_are_purged() {
        let sessions = Sessions::new().unwrap();
        for at in 0..20 * LEAST_PURGE {
            let mut id = [0; 12];
            id[..8].copy_from_slice(&at.to_le_bytes());
            let now = at as i64;
            sessions.claim(id, now + 120, now).unwrap().spend();
            assert!(sessions.used().until.len() <= LEAST_PURGE, "{at}");
        }
    }
}
