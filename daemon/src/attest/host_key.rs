//! Host-key attestation: a host proves that it has the key it was registered with, and gets its identity key certified.

use std::sync::Arc;

use claviger_hsm::HsmError;
use claviger_protocol::attestation::{ErrorReply, HealthCertificateReply, HostKeyRequest};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::health;
use data_encoding::HEXLOWER;

use crate::attempt::Attempt;
use crate::service::{Service, unix_now};
use crate::state::Host;

/// An attestation refused: the reply, and a sentence for a person.
pub type Refused = (ErrorReply, String);

/// Health certificates for a host, with the facts that they rest on. The HSMs may have taken seconds, in which an
/// administrator may have removed the host: the certificates leave only through [`Issued::confirm`], which is called where
/// the decision is recorded.
#[derive(Debug)]
pub struct Issued {
    reply: HealthCertificateReply,
    host: Arc<Host>,
    /// The thumbprint of the attestation signer.
    signer: [u8; 32],
}

impl Issued {
    /// The reply, if the host is still registered with this name and key, and the signer still trusted.
    ///
    /// # Errors
    /// What an attestation that arrived now would be refused with.
    pub fn confirm(self, service: &Service) -> Result<HealthCertificateReply, Refused> {
        if service.hosts.load().by_name_and_key(&self.host.name, &self.host.spki_sha256).is_none() {
            return Err(unauthorized());
        }
        if !service.signers.load().trust(&self.signer) {
            return Err(unavailable());
        }
        Ok(self.reply)
    }
}

fn unauthorized() -> Refused {
    (ErrorReply::Unauthorized, "the host key is not registered, or did not sign".to_owned())
}

fn unavailable() -> Refused {
    (ErrorReply::Unavailable, "no HSM can sign now; try again".to_owned())
}

/// Answers an `AttestationRequest` in host-key mode.
///
/// # Errors
/// `PayloadErrorReply` for what is wrong with the request, `UnauthorizedErrorReply` for an unknown key or a wrong
/// signature (the two look the same), `UnavailableErrorReply` when no HSM signs.
pub async fn attest(service: &Service, body: &[u8], attempt: &mut Attempt) -> Result<Issued, Refused> {
    let request = HostKeyRequest::parse(body).map_err(|e| (ErrorReply::Payload, e.to_string()))?;
    let deadline = attempt.started() + service.config.load().release.deadline();
    // First, with the key that the request brings: what takes time must not depend on whether that key is registered.
    let signed = request.verify_signature();
    let hosts = service.hosts.load();
    let host = hosts.by_key(request.host_key.spki_der());
    // Known from the key alone; the record says whose key was presented even when the signature is wrong.
    attempt.host = host.map(|host| host.name.clone());
    let (Some(host), Ok(())) = (host, signed) else {
        return Err(unauthorized());
    };

    attempt.known = true;
    let identity_key = HEXLOWER.encode(&request.identity_key.spki_sha256());
    attempt.identity_key = Some(identity_key);
    let signers = service.signers.load();
    let signer = signers.current().ok_or_else(unavailable)?;
    let mut content = Vec::with_capacity(request.requested.len());
    for result in request.requested {
        let issued = health::issue(
            &signer.certificate,
            &host.name,
            &request.host_key,
            &request.identity_key,
            result,
            unix_now(),
        );
        let to_be_signed = issued.map_err(|error| {
            tracing::error!(%error, host = host.name, "a health certificate cannot be built");
            (
                ErrorReply::Error { status: 500 },
                "the service failed to process the request; its log says why".to_owned(),
            )
        })?;
        let signed = service.sign(&signer.id, signer.certificate.key(), to_be_signed.octets(), deadline).await;
        let signed = signed.map_err(|error| {
            if matches!(error, HsmError::NoSuchKey(_)) {
                service.signer_missing.notify_one();
            }
            tracing::warn!(%error, "no HSM signed a health certificate");
            unavailable()
        })?;
        attempt.used(&signed.member);
        let certificate = to_be_signed.assemble(&signed.value);
        // Of two, the one that releases ask for comes first.
        if attempt.health_serial.is_none() {
            attempt.health_serial = Certificate::parse(&certificate).ok().map(|made| HEXLOWER.encode(made.serial()));
        }
        content.push((result, certificate));
    }
    Ok(Issued {
        reply: HealthCertificateReply { content },
        host: Arc::clone(host),
        signer: signer.certificate.thumbprint(),
    })
}
