//! Length limits of record fields.

use super::error::StateError;

/// Longest stored public key or certificate, in bytes of DER.
const DER_LIMIT: usize = 64 * 1024;

pub(super) fn check_der(what: &str, der: &[u8]) -> Result<(), StateError> {
    if (1..=DER_LIMIT).contains(&der.len()) {
        return Ok(());
    }
    Err(StateError::Invalid(format!("{what} has 1 to {DER_LIMIT} octets of DER, not {}", der.len())))
}

pub(super) fn check_key_id(key_id: &[u8]) -> Result<(), StateError> {
    if (1..=255).contains(&key_id.len()) {
        return Ok(());
    }
    Err(StateError::Invalid(format!("a key's CKA_ID has 1 to 255 octets, not {}", key_id.len())))
}
