//! Host-key attestation: a host proves that it has the key it was registered with, and its identity key is certified.

use std::sync::Arc;

use bytes::Bytes;
use claviger_protocol::attestation::{ErrorReply, HealthCertificateReply, HostKeyRequest};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::health::{self, ResultType};
use claviger_protocol::work::Work;
use data_encoding::HEXLOWER;

use super::issuing::{Issued, Refused, over_rate, signed, unavailable};
use crate::admission::strangers;
use crate::admission::{Admission, Declined, HostAt};
use crate::registry::issued::IssuedFor;
use crate::registry::keys::Key;
use crate::request::Attempt;
use crate::service::Service;
use crate::store::Host;
use crate::sys::clock::unix_now;

/// Largest attestation, in bytes, that is read from an address over its rate. An honest one has about 3,000.
pub(crate) const LARGE: usize = 16 * 1024;
/// Largest modulus, in bytes, of a host key whose signature is verified for an address over its rate.
const LONGEST_KEY: usize = 4096 / 8;

fn unauthorized() -> Refused {
    Refused::new(
        ErrorReply::Unauthorized,
        "the host key is not registered, its host is disabled, or the signature is wrong",
    )
}

/// Answers an `AttestationRequest` in host-key mode.
///
/// # Errors
/// `PayloadErrorReply` for a malformed request, `UnauthorizedErrorReply` for an unknown key, a disabled host or a wrong
/// signature (they look the same), `UnavailableErrorReply` when no HSM signs; 429 for a host or an address over its rate.
pub(crate) async fn attest(service: &Service, body: &[u8], attempt: &mut Attempt) -> Result<Issued, Refused> {
    // An address is over its rate when too many of its requests were refused. An attestation from it is still served if its
    // signature proves a registered host, so that no host pays for its neighbours. Every other one gets the same 429,
    // whatever is wrong with it.
    over_rate(service, body, LARGE, attempt)?;
    let turn = service.admission.strangers_turn(attempt, body).await.map_err(Declined::attestation)?;
    // Others of the address may have been refused meanwhile.
    let over_rate = over_rate(service, body, LARGE, attempt)?;
    let mut work = Work::default();
    let longest = if over_rate.is_some() { LONGEST_KEY } else { usize::MAX };
    let proved = strangers::in_place(|| proved(service, body, longest, &mut work, attempt));
    drop(turn);
    let (host, request) = proved.map_err(|refused| {
        service.admission.charge_stranger(attempt, body.len(), work);
        over_rate.map_or(refused, |declined| {
            attempt.host = None;
            declined.attestation().into()
        })
    })?;

    Admission::keep_body(attempt).map_err(Declined::attestation)?;
    attempt.known = true;
    attempt.identity_key = Some(HEXLOWER.encode(&request.identity_key.spki_sha256()));
    let from = HostAt::new(&host.name, attempt);
    // A request beyond the host's rate was verified, too, before it is refused here: that is charged to the address.
    let within_rate = service.admission.attestation_within_rate(&from);
    within_rate.inspect_err(|_| service.admission.charge_stranger(attempt, body.len(), work))?;

    let signers = service.registry.signers();
    let signer = signers.current().ok_or_else(unavailable)?;
    let thumbprint = signer.certificate.thumbprint();
    let mut turn = None;
    let mut content = Vec::with_capacity(request.requested.len());
    let mut unrecorded = Vec::new();
    for result in &request.requested {
        let of = IssuedFor::new(&thumbprint, &host, &request.identity_key, *result);
        let mut issued = service.issued.get(&of, unix_now());
        if issued.is_none() && turn.is_none() {
            turn = Some(service.admission.attestation_turn(&from, attempt, &request.identity_key.spki_sha256()).await?);
            // An earlier request may have been served with the same certificate while this one waited.
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
        // Of two certificates, the one that releases require comes first.
        if attempt.health_serial.is_none() {
            attempt.health_serial = Certificate::parse(&certificate).ok().map(|made| HEXLOWER.encode(made.serial()));
        }
        content.push((*result, certificate.to_vec()));
    }
    let reply = HealthCertificateReply { content };
    Ok(Issued::by_host_key(reply, unrecorded, host, thumbprint))
}

/// Returns the registered host that signed the request. A key with a modulus of more than `longest` bytes is refused.
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
    // Verified before the key is looked up, so that the time taken does not tell whether that key is registered.
    let signed = request.verify_signature();
    let in_force = service.snapshot();
    let host = in_force.hosts.by_host_key(request.host_key.spki_der());
    // Identified by the key alone: the record names the host whose key was presented even when the signature is wrong.
    attempt.host = host.map(|host| host.name.clone());
    match (host, signed) {
        (Some(host), Ok(())) if in_force.may_act_as(&host.name, attempt) => Ok((Arc::clone(host), request)),
        _ => Err(unauthorized()),
    }
}

/// Issues a certificate, signed in an HSM, and remembers it for repeated requests.
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
