//! Creates egress protectors.

use std::time::Instant;

use claviger_hsm::KeyRef;
use claviger_protocol::build;
use claviger_protocol::error::Refusal;
use claviger_protocol::wrapping_set::{SetWrapping, WrappingSet};

use super::hsm::{Hsm, Unavailable};
use crate::admission::strangers::apart_if_large;
use crate::signing::signed_by;
use crate::stock::Egress;

/// Writes a protector of a fresh key for `set`, and has an HSM sign it with `signing_key`, the private key of this
/// service's wrapping `ours`. The signature is verified before it is used.
///
/// # Errors
/// A refusal if the protector cannot be written; the inner error if no HSM signed in time.
pub(super) async fn make<H: Hsm>(
    hsm: &H,
    set: &WrappingSet,
    ours: &SetWrapping,
    signing_key: &KeyRef,
    max_offline_unwraps: u32,
    deadline: Instant,
) -> Result<Result<Egress, Unavailable>, Refusal> {
    let key = build::fresh_transport_key()?;
    let unsigned = apart_if_large(set.size(), || set.protect(&key, max_offline_unwraps))?;
    let digest = unsigned.signed_sha256();
    let right = signed_by(ours.party.signing.key(), digest);
    let signed = hsm.sign(signing_key, digest.as_ref(), deadline, right).await;
    Ok(signed.map(|signed| Egress { key, unsigned, guardian: ours.id, signature: signed.value, member: signed.member }))
}
