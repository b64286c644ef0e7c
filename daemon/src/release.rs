//! One release, from request to reply. The code follows section 2.1 of the protocol page.
//!
//! The first failure decides the reply. The private keys are in the HSMs. A release needs two operations there, which
//! run at the same time because they do not depend on each other: the decryption of the ingress key, and the signature
//! over a fresh egress protector. If the stock has a ready-made egress protector, its signature was made earlier, while
//! sessions were idle. A result leaves this function only after the ingress key was verified, as a [`Grant`].
//!
//! A release uses one snapshot of settings and registry from start to end. Changes in the meantime matter when the
//! decision is recorded: a grant is sent only if it is still valid then.

pub(crate) mod batch;
mod decision;
mod egress;
mod grant;
pub mod hsm;
mod ours;
pub(crate) mod stocker;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger_hsm::{Check, REJECTION_QUORUM, standstill};
use claviger_process::throttle::Throttle;
use claviger_protocol::algorithm::HostAlgorithms;
use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::health::HealthClaims;
use claviger_protocol::payload::{ApiVersion, HostKeys, Payload};
use claviger_protocol::protector::transport_key;
use claviger_protocol::request::{RollRequest, RollResponse};
use claviger_protocol::work::Work;
use claviger_protocol::wrapping_set::Ingress;
use data_encoding::HEXLOWER;

pub use self::decision::{decide, outcomes};
pub use self::grant::Grant;
use self::grant::{permitted, registered};
use self::hsm::{DecryptError, Hsm, Unavailable};
use self::ours::Ours;
use crate::admission::strangers::{LARGE, apart_if_large};
use crate::admission::{Admission, Declined, HostAt};
use crate::registry::snapshot::Snapshot;
use crate::request::Attempt;
use crate::service::Service;
use crate::stock::{Basis, Taken};
use crate::sys::clock::unix_now;

/// A refusal in a secret step is sent at a multiple of this time after the request's arrival, so that its timing does
/// not reveal which step failed. Correct clients do not get such refusals.
const REFUSAL_GRID: Duration = Duration::from_millis(25);

/// The context of a release.
pub struct Release<'a, H> {
    service: &'a Service,
    hsm: &'a H,
    api: ApiVersion,
    in_force: Snapshot,
}

impl<'a, H: Hsm> Release<'a, H> {
    /// Starts a release; `hsm` makes its decryptions and signatures. The current settings determine the deadline of
    /// `attempt`.
    pub fn begin(service: &'a Service, hsm: &'a H, api: ApiVersion, attempt: &mut Attempt) -> Self {
        let in_force = service.snapshot();
        attempt.answer_within(in_force.config.release.deadline());
        Self::with(service, hsm, api, in_force)
    }

    /// Continues a release that started with this snapshot.
    #[must_use]
    pub fn with(service: &'a Service, hsm: &'a H, api: ApiVersion, in_force: Snapshot) -> Self {
        Self { service, hsm, api, in_force }
    }

    /// The settings and the registry of this release.
    #[must_use]
    pub fn in_force(&self) -> &Snapshot {
        &self.in_force
    }
}

/// Releases the transport keys of one protector to one host.
///
/// # Errors
/// The refusals of the protocol page, section 2.1; `TooManyRequestsException` if the host exceeds its rate;
/// `ServiceUnavailableException` if the service is too busy or no HSM could serve in time.
pub async fn roll<H: Hsm>(
    service: &Service,
    hsm: &H,
    api: ApiVersion,
    body: &[u8],
    attempt: &mut Attempt,
) -> Result<Grant, Refusal> {
    let release = Release::begin(service, hsm, api, attempt);
    let sender = fast_reject(&release, body, RollRequest::peek_health_certificate, attempt)?;

    // 1. The request follows the schema and its three algorithms are supported.
    let request = sender.read(service, body, RollRequest::parse, attempt).await?;
    let protector = (&*request.ingress_protector, attempt.protector(&request.ingress_protector));

    // 2. The health certificate is valid.
    let host = healthy_host(service, &release.in_force, &request.health_certificate, attempt);
    let host = host.inspect_err(|_| sender.charge(service, body.len(), attempt))?;

    // The host is within its rate, and it is its turn. The permit is held until this function ends.
    let asked = standstill::now();
    let admitted = service.admission.admit(&HostAt::new(&host.host_name, attempt), attempt, body).await;
    attempt.waited_for_turn(asked);
    let _permit = admitted?;

    roll_protector(&release, &host, request.algorithms, protector, attempt).await
}

/// Steps 3 to 9 for one protector of a host that has proved its health. The protector's SHA-256 is passed along.
///
/// # Errors
/// See [`roll`].
pub async fn roll_protector<H: Hsm>(
    release: &Release<'_, H>,
    host: &Arc<HealthClaims>,
    algorithms: HostAlgorithms,
    protector: (&[u8], [u8; 32]),
    attempt: &mut Attempt,
) -> Result<Grant, Refusal> {
    let Release { service, hsm, api, in_force } = release;
    let (deadline, size) = (attempt.deadline(), protector.0.len());

    // In a batch, this item may have waited for earlier ones.
    if standstill::now() >= deadline {
        return Err(Refusal::new(Code::ServiceUnavailable, "the service is too busy now; try again"));
    }
    let from = HostAt::new(&host.host_name, attempt);
    let mut work = Work::default();
    let judged = judge(release, host, protector, &mut work, attempt);
    let (ingress, ours) = judged.inspect_err(|_| service.admission.failed_early(&from, size, work))?;
    // Also charge for the encryptions of the new protector.
    ingress.set.wrappings().iter().for_each(|wrapping| work.add(wrapping.party.encryption.key()));
    service.admission.charge(&from, size, work);
    attempt.keys = vec![ours.decryption_key.id.clone(), ours.signing_key.id.clone()];
    attempt.certificate_used = Some(ours.decryption_key.certificate.clone());
    let wrapping = ours.of(&ingress.set);

    // 7. In an HSM: decrypt the ingress key. The stock makes way until this release ends.
    let _running = service.stock.release_begins();
    let decrypted = hsm.decrypt(
        &ours.decryption_key.id,
        wrapping.oaep(),
        &ingress.cipher_values[ours.at],
        deadline,
        proved_by_its_signature(&ingress),
    );

    // 8. An egress protector with a fresh key: take one from the stock. If there is none, write one and have an HSM sign
    //    it, at the same time as step 7.
    let max_offline_unwraps = in_force.config.release.max_offline_unwraps;
    let ready = service.stock.take(&ingress.set, Basis::new(&in_force.keys, &in_force.config));
    let made = async {
        match &ready {
            Some(_) => Ok(None),
            None => egress::make(*hsm, &ingress.set, wrapping, &ours.signing_key.id, max_offline_unwraps, deadline)
                .await
                .map(Some),
        }
    };

    // In this order, the decryption is in progress while the egress protector is written, and both operations are in
    // progress while the keys are made that encrypt the reply to the host.
    let asked = standstill::now();
    let host_keys = async { HostKeys::fresh(&host.key, algorithms) };
    let (decrypted, made, host_keys) = tokio::join!(decrypted, made, host_keys);
    attempt.waited_for_hsms(asked);
    let charge = |decryptions| service.admission.charge_decryptions(&from, decryptions);
    // Charge for the decryption even if the new protector cannot be written.
    let made = made.inspect_err(|_: &Refusal| charge(REJECTION_QUORUM - 1))?;
    let ingress_key = match decrypted {
        Ok(done) => {
            attempt.used(&done.member);
            transport_key(&done.value).ok_or_else(Refusal::internal)?
        }
        Err(DecryptError::Rejected) => {
            // Several members decrypted it before it was refused.
            charge(REJECTION_QUORUM - 1);
            let refusal = refuse_on_the_grid(attempt.started()).await;
            // The recorded time also ends on the grid.
            attempt.waited_for_hsms(asked);
            return Err(refusal);
        }
        Err(DecryptError::Unavailable(error)) => return Err(unavailable(&error, "decrypt")),
    };
    let made = made.transpose().map_err(|error| unavailable(&error, "sign"))?;
    // From here on, the ready-made protector belongs to this release.
    let egress = made.or_else(|| ready.and_then(Taken::give_out)).ok_or_else(Refusal::internal)?;
    attempt.used(egress.member());
    let (egress_protector, sha256) = egress.write()?;
    attempt.egress(sha256);
    // The host will send this protector next time, usually to this service.
    service.sets.know_file(sha256);
    service.stock.asked(&ingress.set, 1.0, in_force.config.release.stock_bytes());

    // 9. Encrypt both keys to the host.
    let keys = Payload { ingress: ingress_key, egress: egress.into_key(), max_offline_unwraps };
    let keys = keys.seal(*api, host_keys?)?;
    Ok(Grant {
        response: RollResponse { egress_protector, keys },
        host: Arc::clone(host),
        encryption: wrapping.party.encryption.key().clone(),
        signing: wrapping.party.signing.key().clone(),
        max_offline_unwraps,
    })
}

/// Steps 3 to 6: all checks of a protector that use only public data, before any decryption.
///
/// # Errors
/// See [`roll`].
fn judge<'r, H: Hsm>(
    release: &'r Release<'_, H>,
    host: &HealthClaims,
    (protector, sha256): (&[u8], [u8; 32]),
    work: &mut Work,
    attempt: &mut Attempt,
) -> Result<(Arc<Ingress>, Ours<'r>), Refusal> {
    let Release { service, in_force, .. } = release;
    // 3. The protector follows the schema within the limits, and its algorithms are supported. 4. and 5. The guardian
    // signature and all wrappings are valid. This is cheap if the wrapping set is known.
    let ingress = apart_if_large(protector.len(), || service.sets.read(protector, &sha256, work))?;
    attempt.owner = Some(HEXLOWER.encode(&ingress.set.owner().signing.thumbprint()));

    // 6. One wrapping is for this service, and this host may use its keys.
    let ours = Ours::find(&ingress.set, &in_force.keys)?;
    permitted(in_force, host, [ours.decryption_key, ours.signing_key])?;
    attempt.guardian_key = Some(HEXLOWER.encode(&ours.of(&ingress.set).party.encryption.thumbprint()));
    apart_if_large(protector.len(), || service.sets.remember(&ingress.set));
    Ok((Arc::new(ingress), ours))
}

/// Step 2: identifies the sender by its health certificate and checks that the host is registered.
///
/// # Errors
/// `HealthCertificateException`.
pub fn healthy_host(
    service: &Service,
    in_force: &Snapshot,
    health_certificate: &[u8],
    attempt: &mut Attempt,
) -> Result<Arc<HealthClaims>, Refusal> {
    let refused = |why: String| Refusal::new(Code::HealthCertificate, why);
    let claims = service
        .health
        .check(health_certificate, in_force.signers.certificates(), unix_now())
        .map_err(|e| refused(format!("health certificate: {e}")))?;
    attempt.health(&claims);
    registered(in_force, &claims)?;
    if !in_force.may_act_as(&claims.host_name, attempt) {
        return Err(refused(
            "health certificate: it is not that of the host which the client certificate names".to_owned(),
        ));
    }
    attempt.known = true;
    Ok(claims)
}

/// The sender of a request, as far as it is known before the request is parsed.
#[derive(Debug)]
pub(crate) enum Sender {
    /// The host of the health certificate in the request; that certificate was verified earlier.
    Host(Arc<HealthClaims>),
    /// Only the address is known.
    Stranger,
}

impl Sender {
    /// Parses a request, a large one apart from other requests. Unknown senders of large ones take turns at a part of the
    /// processors, and their bodies give way meanwhile.
    ///
    /// # Errors
    /// Those of `parse`, which are charged; `ServiceUnavailableException` if there is no turn in time, or no memory any more;
    /// `TooManyRequestsException` if the address has gone over its rate meanwhile.
    pub(crate) async fn read<'b, T>(
        &self,
        service: &Service,
        body: &'b [u8],
        parse: impl FnOnce(&'b [u8]) -> Result<T, Refusal>,
        attempt: &Attempt,
    ) -> Result<T, Refusal> {
        let _turn = match self {
            Self::Stranger if body.len() > LARGE => {
                let turn = service.admission.strangers_turn(attempt, body).await.map_err(Declined::release)?;
                service.admission.stranger_may_ask(attempt).map_err(Declined::release)?;
                Some(turn)
            }
            _ => None,
        };
        let request = apart_if_large(body.len(), || parse(body));
        let request = request.inspect_err(|_| self.charge(service, body.len(), attempt))?;
        Admission::keep_body(attempt).map_err(Declined::release)?;
        Ok(request)
    }

    /// Charges a request of `bytes` bytes that was refused before steps 1 and 2 identified its sender.
    pub(crate) fn charge(&self, service: &Service, bytes: usize, attempt: &Attempt) {
        match self {
            Self::Host(host) => service.admission.failed_unread(&HostAt::new(&host.host_name, attempt), bytes),
            Self::Stranger => service.admission.charge_stranger(attempt, bytes, Work::default()),
        }
    }
}

/// Fast path under load: rejects requests that [`admission`](crate::admission) would refuse after step 2, at a fraction
/// of the cost, so that refusals do not slow down other work. `peek` finds the health certificate. Of small requests, only
/// a host whose health certificate was verified earlier is recognised here; every other request continues.
///
/// If too many requests from an address were refused, only requests with a valid health certificate are served, so that
/// hosts behind the same NAT or load balancer do not suffer.
///
/// # Errors
/// `TooManyRequestsException` or `ServiceUnavailableException` for a host that would not be admitted;
/// `TooManyRequestsException` for an address over its rate if the request is not from a known host.
pub(crate) fn fast_reject<H: Hsm>(
    release: &Release<'_, H>,
    body: &[u8],
    peek: impl FnOnce(&[u8]) -> Option<Vec<u8>>,
    attempt: &mut Attempt,
) -> Result<Sender, Refusal> {
    let Release { service, in_force, .. } = release;
    let stranger = service.admission.stranger_may_ask(attempt);
    // Parsing a large body costs more than peeking into it.
    if stranger.is_ok() && !service.admission.is_pressed() && body.len() <= LARGE {
        return Ok(Sender::Stranger);
    }
    let signers = in_force.signers.certificates();
    let claims = peek(body).and_then(|certificate| match stranger {
        Ok(()) if body.len() <= LARGE => service.health.known(&certificate, signers, unix_now()),
        // A large request of a host does not wait for its turn among those of strangers.
        _ => service.health.check(&certificate, signers, unix_now()).ok(),
    });
    let is_host = |claims: &Arc<HealthClaims>| {
        registered(in_force, claims).is_ok() && in_force.may_act_as(&claims.host_name, attempt)
    };
    let Some(host) = claims.filter(is_host) else {
        return stranger.map(|()| Sender::Stranger).map_err(Declined::release);
    };
    let outlook = service.admission.outlook(&HostAt::new(&host.host_name, attempt), attempt, body);
    outlook.inspect_err(|_| {
        attempt.health(&host);
        attempt.known = true;
    })?;
    Ok(Sender::Host(host))
}

/// Step 7: an ingress key is right if the protector's transport-key signature is valid under it.
///
/// The cluster calls this check for every plaintext. A ciphertext that does not decrypt and a key with a wrong
/// signature are treated in the same way: known-answer tests show whether the member is at fault, other members are
/// asked, and then the same refusal is returned.
fn proved_by_its_signature(ingress: &Arc<Ingress>) -> Check {
    let ingress = Arc::clone(ingress);
    Arc::new(move |octets| {
        let proves = |key| ingress.transport_key_signature.verify(&key, &ingress.signed_octets);
        transport_key(octets).is_some_and(proves)
    })
}

/// Waits for the next point of the grid, and returns the refusal of a secret step.
async fn refuse_on_the_grid(started: Instant) -> Refusal {
    let passed = standstill::since(started).as_micros() / REFUSAL_GRID.as_micros();
    let points = u32::try_from(passed + 1).unwrap_or(u32::MAX);
    standstill::sleep_until(started + REFUSAL_GRID * points).await;
    Refusal::protector("the transport key of the wrapping for this service is not right")
}

/// 503: the fault is on the server's side, and a retry may succeed.
fn unavailable(error: &Unavailable, operation: &str) -> Refusal {
    static SAID: Throttle = Throttle::new();
    if let Some(unsaid) = SAID.due(Instant::now()) {
        tracing::warn!(%error, operation, unsaid, "no HSM served a release");
    }
    Refusal::new(Code::ServiceUnavailable, "no HSM can serve the request now; try again")
}
