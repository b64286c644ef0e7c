//! The last part of an attestation, common to both modes: a certificate signed in an HSM, confirmed or refused.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use claviger_hsm::HsmError;
use claviger_process::throttle::Throttle;
use claviger_protocol::attestation::{ErrorReply, HealthCertificateReply, PolicyReason};
use claviger_protocol::certificate::build::{BuildError, ToBeSigned};
use claviger_protocol::tpm::policy::Policy;
use data_encoding::BASE64;

use crate::admission::{Declined, Dropped};
use crate::registry::baselines::BaselineId;
use crate::registry::issued::IssuedFor;
use crate::registry::keys::Key;
use crate::request::Attempt;
use crate::service::Service;
use crate::signing;
use crate::store::Host;

/// The reply to a caller that exceeds a rate: an HTTP error, which says nothing about the host's health.
const TOO_MANY: ErrorReply = ErrorReply::Error { status: 429 };

/// A refused attestation.
#[derive(Clone, Debug)]
pub(crate) struct Refused {
    pub reply: ErrorReply,
    /// The reason, as a sentence for an administrator.
    pub message: String,
    /// Seconds after which the caller may retry, for 429 and 503, if known.
    pub retry_after: Option<u16>,
}

impl Refused {
    /// A refusal without `retry_after`.
    #[must_use]
    pub(crate) fn new(reply: ErrorReply, message: impl Into<String>) -> Self {
        Self { reply, message: message.into(), retry_after: None }
    }
}

impl From<Declined> for Refused {
    fn from(declined: Declined) -> Self {
        let refused = match declined.reason {
            Dropped::Rate => Self::new(TOO_MANY, "this host asks for more attestations than it may; try again"),
            Dropped::Address => Self::new(TOO_MANY, "too many requests from this address were refused; try again"),
            Dropped::Full | Dropped::Deadline | Dropped::Late | Dropped::Left => {
                Self::new(ErrorReply::Unavailable, "too many attestations are waiting; try again")
            }
        };
        Self { retry_after: Some(declined.retry_after), ..refused }
    }
}

/// Whether the sender's address is over its rate. If it is, a body of more than `large` bytes is not parsed.
///
/// # Errors
/// 429 for such a body.
pub(super) fn over_rate(
    service: &Service,
    body: &[u8],
    large: usize,
    attempt: &Attempt,
) -> Result<Option<Declined>, Refused> {
    match service.admission.stranger_may_ask(attempt).err() {
        Some(declined) if body.len() > large => Err(declined.attestation().into()),
        declined => Ok(declined),
    }
}

/// Health certificates for a host, with the facts that they rest on. The HSMs may have taken seconds, in which an
/// administrator may have removed the host or the baseline: the certificates leave only through [`Issued::confirm`], which is
/// called where the decision is recorded.
#[derive(Debug)]
pub(crate) struct Issued {
    reply: HealthCertificateReply,
    /// The certificates that have no line in the audit trail yet.
    unrecorded: Vec<IssuedFor>,
    host: Arc<Host>,
    /// Thumbprint of the attestation signer.
    signer: [u8; 32],
    /// The baseline that the host was judged by, if it attested by its TPM.
    baseline: Option<BaselineId>,
}

impl Issued {
    /// Certificates of host-key mode.
    pub(super) fn by_host_key(
        reply: HealthCertificateReply,
        unrecorded: Vec<IssuedFor>,
        host: Arc<Host>,
        signer: [u8; 32],
    ) -> Self {
        Self { reply, unrecorded, host, signer, baseline: None }
    }

    /// Certificates of TPM mode, which name a baseline. They are never handed out again, so none is listed as unrecorded.
    pub(super) fn measured(
        reply: HealthCertificateReply,
        host: Arc<Host>,
        signer: [u8; 32],
        baseline: BaselineId,
    ) -> Self {
        Self { reply, unrecorded: Vec::new(), host, signer, baseline: Some(baseline) }
    }

    /// Returns the reply if the host is still registered with this name and key, the signer is still trusted, and the baseline
    /// that the host was judged by is still enabled, and the state is known well enough; and with it the certificates that may
    /// be handed out again and have no line in the audit trail yet.
    ///
    /// # Errors
    /// The refusal of an attestation that arrived now.
    pub(crate) fn confirm(self, service: &Service) -> Result<(HealthCertificateReply, Vec<IssuedFor>), Refused> {
        if let Some(why) = service.registry.currency().why_expired() {
            return Err(Refused::new(ErrorReply::Unavailable, why));
        }
        if service.registry.hosts().by_name_and_key(&self.host.name, &self.host.spki_sha256).is_none() {
            return Err(Refused::new(
                ErrorReply::Unauthorized,
                "the host is not registered any more, or has another key",
            ));
        }
        if !service.registry.signers().trust(&self.signer) {
            return Err(unavailable());
        }
        if self.baseline.is_some_and(|baseline| !service.registry.baselines().is_enabled(&baseline)) {
            return Err(baseline_gone());
        }
        Ok((self.reply, self.unrecorded))
    }
}

/// The refusal when no HSM signs.
pub(super) fn unavailable() -> Refused {
    Refused::new(ErrorReply::Unavailable, "no HSM can sign now; try again")
}

/// The refusal of a host whose baseline was disabled or removed after the host was judged.
fn baseline_gone() -> Refused {
    let reason = BASE64.encode(&Policy::SecureBootSettings.guid());
    let reasons = vec![PolicyReason { result: false, reason }];
    Refused::new(ErrorReply::PolicyEvaluation { reasons }, "the baseline that the host matched is not enabled any more")
}

/// Has an HSM sign a certificate that was built for `host`.
///
/// # Errors
/// `UnavailableErrorReply` when no HSM signs; 500 when the certificate cannot be built.
pub(super) async fn signed(
    service: &Service,
    signer: &Key,
    built: Result<ToBeSigned, BuildError>,
    host: &str,
    attempt: &mut Attempt,
) -> Result<Bytes, Refused> {
    static NOT_BUILT: Throttle = Throttle::new();
    static NOT_SIGNED: Throttle = Throttle::new();
    let to_be_signed = built.map_err(|error| {
        if let Some(unsaid) = NOT_BUILT.due(Instant::now()) {
            tracing::error!(%error, host, unsaid, "a health certificate cannot be built");
        }
        Refused::new(ErrorReply::Error { status: 500 }, "the service failed to process the request; its log says why")
    })?;
    let signed = signing::sign(
        &service.cluster,
        &signer.id,
        signer.certificate.key(),
        to_be_signed.octets(),
        attempt.deadline(),
    )
    .await;
    let signed = signed.map_err(|error| {
        if matches!(error, HsmError::NoSuchKey) {
            service.signer_missing.notify_one();
        }
        if let Some(unsaid) = NOT_SIGNED.due(Instant::now()) {
            tracing::warn!(%error, unsaid, "no HSM signed a health certificate");
        }
        unavailable()
    })?;
    attempt.used(&signed.member);
    Ok(Bytes::from(to_be_signed.assemble(&signed.value)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::AttestMode;
    use crate::service::testing::{certificate, key, service_in};
    use crate::store::{HostKind, Labels, NewSigner};
    use claviger_protocol::certificate::Certificate;
    use claviger_protocol::tpm::pcr::{PcrSet, PcrValues};

    /// A service in TPM mode with the host `node`, the baseline `base` and a signer.
    fn stage() -> (tempfile::TempDir, Arc<Service>) {
        let folder = tempfile::tempdir().unwrap();
        let service = service_in(folder.path(), |config| config.attest.mode = AttestMode::Tpm);
        service.registry.with_state(|state| {
            let (der, spki) = (certificate(), key().public().spki_der());
            state.add_host_with(HostKind::EndorsementKey, "node", spki, &Labels::default(), 1).unwrap();
            state.add_signer(&NewSigner { der: &der, key_id: b"id", not_before: 1, not_after: 2 }, None, 1).unwrap();
        });
        add_baseline(&service, 100);
        (folder, service)
    }

    fn add_baseline(service: &Service, now: i64) {
        let mut values = PcrValues::default();
        PcrSet::ALWAYS.iter().for_each(|pcr| assert!(values.set(pcr, [7; 32])));
        service.registry.with_state(|state| state.add_baseline("base", &values, None, now).map(drop)).unwrap();
        service.registry.follow().unwrap();
    }

    /// Certificates for `node` that rest on what is in force now.
    fn issued(service: &Service) -> Issued {
        let in_force = service.snapshot();
        let host = in_force.hosts.by_endorsement_key(key().public().spki_der()).unwrap();
        let signer = in_force.signers.certificates().first().map(Certificate::thumbprint).unwrap();
        let baseline = in_force.baselines.identify("base").unwrap();
        Issued::measured(HealthCertificateReply { content: Vec::new() }, Arc::clone(host), signer, baseline)
    }

    fn change(service: &Service, work: impl FnOnce(&mut crate::store::State)) {
        service.registry.with_state(work);
        service.registry.follow().unwrap();
    }

    /// Asserts that a host is refused because it matches no enabled baseline.
    fn assert_matches_no_baseline(confirmed: Result<(HealthCertificateReply, Vec<IssuedFor>), Refused>) {
        let ErrorReply::PolicyEvaluation { reasons } = confirmed.unwrap_err().reply else { panic!("another refusal") };
        let guid = BASE64.encode(&Policy::SecureBootSettings.guid());
        assert_eq!(reasons, [PolicyReason { result: false, reason: guid }]);
    }

    #[test]
    fn nothing_leaves_when_the_baseline_was_disabled_meanwhile() {
        let (_folder, service) = stage();
        let (before, meanwhile) = (issued(&service), issued(&service));
        assert!(before.confirm(&service).is_ok());
        change(&service, |state| drop(state.enable_baseline("base", false).unwrap()));
        assert_matches_no_baseline(meanwhile.confirm(&service));
    }

    #[test]
    fn nothing_leaves_when_the_baseline_was_replaced_under_its_name_meanwhile() {
        let (_folder, service) = stage();
        let meanwhile = issued(&service);
        change(&service, |state| drop(state.remove_baseline("base", 150).unwrap()));
        add_baseline(&service, 200);
        assert_matches_no_baseline(meanwhile.confirm(&service));
        assert!(issued(&service).confirm(&service).is_ok(), "a host that was judged by the new one");
    }

    #[test]
    fn nothing_leaves_when_the_host_or_the_signer_is_gone() {
        let (_folder, service) = stage();
        let (first, second) = (issued(&service), issued(&service));
        let thumbprint = service.registry.signers().current_thumbprint().unwrap().to_owned();
        change(&service, |state| drop(state.revoke_signer(&thumbprint, true, 9).unwrap()));
        assert_eq!(first.confirm(&service).unwrap_err().reply, ErrorReply::Unavailable);
        change(&service, |state| drop(state.remove_host("node").unwrap()));
        assert_eq!(second.confirm(&service).unwrap_err().reply, ErrorReply::Unauthorized);
    }
}
