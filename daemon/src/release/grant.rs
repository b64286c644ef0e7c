//! The result of a release, and the check that host and keys still allow it.

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

/// The result of a successful release, with the facts about host and keys on which it depends.
///
/// The HSMs may have taken seconds, during which an administrator may have removed the host or disabled a key. The
/// response is available only through [`Grant::confirm`], which is called when the decision is recorded.
#[derive(Debug)]
pub struct Grant {
    pub(super) response: RollResponse,
    pub(super) host: Arc<HealthClaims>,
    /// The public keys of the service's two private keys that were used.
    pub(super) encryption: RsaPublicKey,
    pub(super) signing: RsaPublicKey,
    /// The number in the response that the host may start the machine without this service.
    pub(super) max_offline_unwraps: u32,
}

impl Grant {
    /// Returns the response if host, keys, the keys' labels and the settings still allow it, and the state is known well enough.
    ///
    /// # Errors
    /// The refusal that a new release would get now.
    pub fn confirm(self, service: &Service) -> Result<RollResponse, Refusal> {
        if let Some(why) = service.registry.currency().why_expired() {
            return Err(Refusal::new(Code::ServiceUnavailable, why));
        }
        let in_force = service.snapshot();
        let encryption = in_force.keys.encryption(&self.encryption).ok_or_else(not_for_us)?;
        let signing = in_force.keys.signing(&self.signing).ok_or_else(signing_key_missing)?;
        permitted(&in_force, &self.host, [encryption, signing])?;
        if self.max_offline_unwraps > in_force.config.release.max_offline_unwraps {
            let why = "the number of starts without this service was reduced; try again";
            return Err(Refusal::new(Code::ServiceUnavailable, why));
        }
        Ok(self.response)
    }
}

/// The registered host of a health certificate.
///
/// # Errors
/// `HealthCertificateException` if the host was removed or disabled or has another key, if its certificate's signer was
/// revoked, or if its baseline was disabled.
pub(super) fn registered<'s>(in_force: &'s Snapshot, host: &HealthClaims) -> Result<&'s Host, Refusal> {
    // This check also runs after the HSMs have answered: a signer may have been revoked in the meantime.
    if !in_force.signers.trust(&host.signer) {
        return Err(Refusal::new(Code::HealthCertificate, "health certificate: its signer is not trusted any more"));
    }
    let healthy = match &host.baseline {
        Some(baseline) => in_force.baselines.allow(baseline, host.issued()),
        // In TPM mode, a certificate without a baseline proves nothing.
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

/// Checks that the host is registered and has the labels that both keys require.
///
/// # Errors
/// `HealthCertificateException`; for missing labels `InvalidWrappingException`, as for an unknown key.
pub(super) fn permitted(in_force: &Snapshot, host: &HealthClaims, keys: [&Held; 2]) -> Result<(), Refusal> {
    let host = registered(in_force, host)?;
    if keys.iter().all(|key| key.labels.is_empty() || host.labels.have_all(&key.labels)) {
        return Ok(());
    }
    Err(Refusal::wrapping("the key of the wrapping for this service is limited to other hosts than this one"))
}
