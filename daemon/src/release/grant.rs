//! What a release gives, and whether host and keys still allow it.

use std::sync::Arc;

use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::health::HealthClaims;
use claviger_protocol::request::RollResponse;
use claviger_protocol::rsa_key::RsaPublicKey;

use super::ours::{not_for_us, signing_key_missing};
use crate::config::AttestMode;
use crate::registry::keys::Held;
use crate::registry::snapshot::Snapshot;
use crate::service::Service;
use crate::store::Host;

/// A release that is right as far as the request goes, with the facts about host and keys that it rests on.
///
/// The HSMs may have taken seconds, in which an administrator may have removed the host or disabled a key. The answer
/// leaves only through [`Grant::confirm`], which is called where the decision is recorded.
#[derive(Debug)]
pub struct Grant {
    pub(super) response: RollResponse,
    pub(super) host: Arc<HealthClaims>,
    /// The public halves of the two private keys of this service that were used.
    pub(super) encryption: RsaPublicKey,
    pub(super) signing: RsaPublicKey,
}

impl Grant {
    /// The answer, if host, keys and the keys' labels still allow it.
    ///
    /// # Errors
    /// What a release that arrived now would be refused with.
    pub fn confirm(self, service: &Service) -> Result<RollResponse, Refusal> {
        let in_force = service.snapshot();
        let encryption = in_force.keys.encryption(&self.encryption).ok_or_else(not_for_us)?;
        let signing = in_force.keys.signing(&self.signing).ok_or_else(signing_key_missing)?;
        permitted(&in_force, &self.host, [encryption, signing])?;
        Ok(self.response)
    }
}

/// The host of a health certificate, as it is registered.
///
/// # Errors
/// `HealthCertificateException` when it was removed or disabled, has another key, its certificate's signer was revoked, or the
/// baseline that its measurements matched was disabled.
pub(super) fn registered<'s>(in_force: &'s Snapshot, host: &HealthClaims) -> Result<&'s Host, Refusal> {
    // Asked again after the HSMs answered, like the rest: a signer may have been revoked meanwhile.
    if !in_force.signers.trust(&host.signer) {
        return Err(Refusal::new(Code::HealthCertificate, "health certificate: its signer is not trusted any more"));
    }
    let healthy = match &host.baseline {
        Some(baseline) => in_force.baselines.allow(baseline, host.issued()),
        // In TPM mode who holds a host key proves nothing.
        None => in_force.config.attest.mode == AttestMode::HostKey,
    };
    if !healthy {
        let why =
            "health certificate: the baseline that its host matched is not enabled, or it names none; attest again";
        return Err(Refusal::new(Code::HealthCertificate, why));
    }
    let registered = in_force.hosts.by_name_and_key(&host.host_name, &host.host_key_sha256);
    registered.map(Arc::as_ref).ok_or_else(|| {
        Refusal::new(Code::HealthCertificate, "health certificate: its host is not registered with that key any more")
    })
}

/// Whether the host is registered and has the labels that both keys ask for.
///
/// # Errors
/// `HealthCertificateException`; for the labels `InvalidWrappingException`, like a key that is not held.
pub(super) fn permitted(in_force: &Snapshot, host: &HealthClaims, keys: [&Held; 2]) -> Result<(), Refusal> {
    let host = registered(in_force, host)?;
    if keys.iter().all(|key| key.labels.is_empty() || host.labels.have_all(&key.labels)) {
        return Ok(());
    }
    Err(Refusal::wrapping("the key of the wrapping for this service is limited to other hosts than this one"))
}
