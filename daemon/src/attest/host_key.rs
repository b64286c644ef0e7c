//! Host-key attestation: a host proves that it has the key it was registered with, and gets its identity key certified.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use claviger_hsm::HsmError;
use claviger_protocol::attestation::{ErrorReply, HealthCertificateReply, HostKeyRequest};
use claviger_protocol::certificate::{BuildError, Certificate, ToBeSigned};
use claviger_protocol::health::{self, ResultType};
use claviger_protocol::work::Work;
use data_encoding::HEXLOWER;

use super::issued::IssuedFor;
use crate::admission::{Declined, Dropped, HostAt};
use crate::attempt::Attempt;
use crate::keys::Key;
use crate::service::{Service, unix_now};
use crate::state::Host;
use crate::strangers;
use crate::throttle::Throttle;

/// An attestation refused.
#[derive(Clone, Debug)]
pub struct Refused {
    /// The reply.
    pub reply: ErrorReply,
    /// A sentence for a person.
    pub message: String,
    /// In how many seconds the caller may come again, where that is known; for 429 and 503.
    pub retry_after: Option<u16>,
}

impl Refused {
    /// With a reply, and a sentence for a person.
    #[must_use]
    pub fn new(reply: ErrorReply, message: impl Into<String>) -> Self {
        Self { reply, message: message.into(), retry_after: None }
    }
}

impl From<Declined> for Refused {
    fn from(declined: Declined) -> Self {
        let refused = match declined.reason {
            Dropped::Rate => Self::new(TOO_MANY, "this host asks for more attestations than it may; try again"),
            Dropped::Address => Self::new(TOO_MANY, "too many requests from this address were refused; try again"),
            Dropped::Full | Dropped::Deadline | Dropped::Late | Dropped::Left => {
                Self::new(ErrorReply::Unavailable, "too many attestations wait for an HSM; try again")
            }
        };
        Self { retry_after: Some(declined.retry_after), ..refused }
    }
}

/// Longest attestation in bytes that is read from an address over its rate. An honest one has some 3,000.
const LARGE: usize = 16 * 1024;
/// Longest host key in bytes with which a signature is verified for such an address.
const LONGEST_KEY: usize = 4096 / 8;

/// A rate is exceeded: an error that is about HTTP, and not about the host's health.
const TOO_MANY: ErrorReply = ErrorReply::Error { status: 429 };

/// Health certificates for a host, with the facts that they rest on. The HSMs may have taken seconds, in which an
/// administrator may have removed the host: the certificates leave only through [`Issued::confirm`], which is called where
/// the decision is recorded.
#[derive(Debug)]
pub struct Issued {
    reply: HealthCertificateReply,
    /// Those of the certificates that the audit trail does not tell of yet.
    unrecorded: Vec<IssuedFor>,
    host: Arc<Host>,
    /// The thumbprint of the attestation signer.
    signer: [u8; 32],
    /// The baseline that the certificates name, where the host attested by its TPM.
    baseline: Option<String>,
}

impl Issued {
    /// Certificates that name a baseline; the audit trail tells of none of them yet.
    pub(super) fn measured(reply: HealthCertificateReply, host: Arc<Host>, signer: [u8; 32], baseline: String) -> Self {
        Self { reply, unrecorded: Vec::new(), host, signer, baseline: Some(baseline) }
    }

    /// The reply, if the host is still registered with this name and key, the signer still trusted, and the baseline enabled;
    /// with those of its certificates that the audit trail does not tell of yet and may be asked for again.
    ///
    /// # Errors
    /// What an attestation that arrived now would be refused with.
    pub fn confirm(self, service: &Service) -> Result<(HealthCertificateReply, Vec<IssuedFor>), Refused> {
        if service.hosts.load().by_name_and_key(&self.host.name, &self.host.spki_sha256).is_none() {
            return Err(unauthorized());
        }
        if !service.signers.load().trust(&self.signer) {
            return Err(unavailable());
        }
        if self.baseline.is_some_and(|baseline| !service.baselines.load().allow(&baseline, unix_now())) {
            return Err(super::tpm::baseline_gone());
        }
        Ok((self.reply, self.unrecorded))
    }
}

fn unauthorized() -> Refused {
    Refused::new(ErrorReply::Unauthorized, "the host key is not registered, or did not sign")
}

pub(super) fn unavailable() -> Refused {
    Refused::new(ErrorReply::Unavailable, "no HSM can sign now; try again")
}

/// Answers an `AttestationRequest` in host-key mode.
///
/// # Errors
/// `PayloadErrorReply` for what is wrong with the request, `UnauthorizedErrorReply` for an unknown key or a wrong
/// signature (the two look the same), `UnavailableErrorReply` when no HSM signs; 429 for a host or an address that asks too
/// fast.
pub async fn attest(service: &Service, body: &[u8], attempt: &mut Attempt) -> Result<Issued, Refused> {
    // An address is over its rate when too much that came from it was refused. Attestations from there are still served if
    // their signature proves a registered host, so that no host pays for its neighbours. All others get the same 429,
    // whatever is wrong with them.
    let over_rate = service.admission.stranger_may_ask(attempt).err();
    if let Some(declined) = over_rate.filter(|_| body.len() > LARGE) {
        return Err(declined.attestation().into());
    }
    let mut work = Work::default();
    let longest = if over_rate.is_some() { LONGEST_KEY } else { usize::MAX };
    let proved = strangers::aside(|| proved(service, body, longest, &mut work, attempt)).await;
    let (host, request) = proved.map_err(|refused| {
        service.admission.charge_stranger(attempt, body.len(), work);
        over_rate.map_or(refused, |declined| {
            attempt.host = None;
            declined.attestation().into()
        })
    })?;

    attempt.known = true;
    attempt.identity_key = Some(HEXLOWER.encode(&request.identity_key.spki_sha256()));
    let from = HostAt::new(&host.name, attempt);
    // Also what a host sends beyond its rate is checked before it is refused: its address pays for that.
    let within_rate = service.admission.attestation_within_rate(&from);
    within_rate.inspect_err(|_| service.admission.charge_stranger(attempt, body.len(), work))?;

    let signers = service.signers.load();
    let signer = signers.current().ok_or_else(unavailable)?;
    let thumbprint = signer.certificate.thumbprint();
    let mut turn = None;
    let mut content = Vec::with_capacity(request.requested.len());
    let mut unrecorded = Vec::new();
    for result in &request.requested {
        let of = IssuedFor::new(&thumbprint, &host, &request.identity_key, *result);
        let mut issued = service.issued.get(&of, unix_now());
        if issued.is_none() && turn.is_none() {
            turn = Some(service.admission.attestation_turn(&from, attempt).await?);
            // A request for the same certificate may have been ahead of this one.
            issued = service.issued.get(&of, unix_now());
        }
        let certificate = match issued {
            Some(again) => {
                if !again.is_recorded {
                    unrecorded.push(of);
                }
                again.certificate
            }
            None => {
                unrecorded.push(of);
                issue(service, signer, &host, &request, *result, of, attempt).await?
            }
        };
        // Of two, the one that releases ask for comes first.
        if attempt.health_serial.is_none() {
            attempt.health_serial = Certificate::parse(&certificate).ok().map(|made| HEXLOWER.encode(made.serial()));
        }
        content.push((*result, certificate.to_vec()));
    }
    let reply = HealthCertificateReply { content };
    Ok(Issued { reply, unrecorded, host, signer: thumbprint, baseline: None })
}

/// The registered host that a request comes from, as its signature proves, with a key of at most `longest` bytes.
///
/// # Errors
/// `PayloadErrorReply`, `UnauthorizedErrorReply`.
fn proved(
    service: &Service,
    body: &[u8],
    longest: usize,
    work: &mut Work,
    attempt: &mut Attempt,
) -> Result<(Arc<Host>, HostKeyRequest), Refused> {
    let request = HostKeyRequest::parse(body).map_err(|error| Refused::new(ErrorReply::Payload, error.to_string()))?;
    if request.host_key.modulus_len() > longest {
        return Err(unauthorized());
    }
    work.add(&request.host_key);
    // First, with the key that the request brings: what takes time must not depend on whether that key is registered.
    let signed = request.verify_signature();
    let in_force = service.snapshot();
    let host = in_force.hosts.by_host_key(request.host_key.spki_der());
    // Known from the key alone; the record says whose key was presented even when the signature is wrong.
    attempt.host = host.map(|host| host.name.clone());
    match (host, signed) {
        (Some(host), Ok(())) if in_force.may_act_as(&host.name, attempt) => Ok((Arc::clone(host), request)),
        _ => Err(unauthorized()),
    }
}

/// A fresh certificate, signed in an HSM.
///
/// # Errors
/// `UnavailableErrorReply` when no HSM signs.
async fn issue(
    service: &Service,
    signer: &Key,
    host: &Host,
    request: &HostKeyRequest,
    result: ResultType,
    of: IssuedFor,
    attempt: &mut Attempt,
) -> Result<Bytes, Refused> {
    let now = unix_now();
    let built = health::issue(&signer.certificate, &host.name, &request.host_key, &request.identity_key, result, now);
    let certificate = signed(service, signer, built, &host.name, attempt).await?;
    service.issued.remember(of, certificate.clone(), now);
    Ok(certificate)
}

/// A certificate that was built for `host`, signed in an HSM.
///
/// # Errors
/// `UnavailableErrorReply` when no HSM signs.
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
    let signed = service.sign(&signer.id, signer.certificate.key(), to_be_signed.octets(), attempt.deadline()).await;
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
