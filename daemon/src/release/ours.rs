//! Step 6: finds the wrapping of this service, and the private keys that belong to it.

use claviger_protocol::error::Refusal;
use claviger_protocol::wrapping_set::{SetWrapping, WrappingSet};

use crate::registry::keys::{Held, Keys};

/// The wrapping of this service in a set.
#[derive(Debug)]
pub(crate) struct Ours<'a> {
    /// Index in the set.
    pub(crate) at: usize,
    pub(crate) decryption_key: &'a Held,
    pub(crate) signing_key: &'a Held,
}

impl<'a> Ours<'a> {
    /// Finds the first wrapping, in document order, whose encryption key is enabled here. Its signing key must be
    /// enabled as well.
    pub(crate) fn find(set: &WrappingSet, keys: &'a Keys) -> Result<Self, Refusal> {
        let found = set.wrappings().iter().enumerate().find_map(|(at, wrapping)| {
            let decryption_key = keys.encryption(wrapping.party.encryption.key())?;
            Some((at, decryption_key, keys.signing(wrapping.party.signing.key())))
        });
        let (at, decryption_key, signing_key) = found.ok_or_else(not_for_us)?;
        Ok(Self { at, decryption_key, signing_key: signing_key.ok_or_else(signing_key_missing)? })
    }

    /// The wrapping in the set in which it was found.
    pub(crate) fn of<'s>(&self, set: &'s WrappingSet) -> &'s SetWrapping {
        &set.wrappings()[self.at]
    }
}

pub(crate) fn not_for_us() -> Refusal {
    Refusal::wrapping("no wrapping of the protector is for this service")
}

pub(crate) fn signing_key_missing() -> Refusal {
    Refusal::wrapping("the wrapping for this service has a signing certificate whose key is not held here")
}
