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
use std::sync::{Mutex, MutexGuard};

use claviger_process::lock::lock;
use claviger_protocol::tpm::state::{StateId, StateKey};
use ring::error::Unspecified;

/// Number of used States below which expired ones are not purged.
const LEAST_PURGE: usize = 1_024;

/// The key that seals States, and the used States.
#[derive(Debug)]
pub struct Sessions {
    key: StateKey,
    used: Mutex<Used>,
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
        Ok(Self { key: StateKey::generate()?, used: Mutex::default() })
    }

    /// The key that seals States.
    pub(crate) fn key(&self) -> &StateKey {
        &self.key
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
