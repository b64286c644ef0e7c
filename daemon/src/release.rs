//! One release, from request to reply. Reads like section 2.1 of the protocol page.
//!
//! What fails first decides the answer. The private keys work in the HSMs, and the two operations a release needs there
//! do not depend on each other and run at the same time: decrypt the ingress key, and sign the egress protector that was
//! freshly built beside it. Where the stock has a ready-made egress protector, the second operation was done before, while
//! sessions were idle. Only when the ingress key proved right does anything leave this function, and then as a [`Grant`].
//!
//! A release goes by one snapshot of the settings and the registry from its start to its end. What an administrator
//! withdraws meanwhile is found when the decision is recorded: a grant leaves only if it still holds then.

pub mod batch;
mod decision;
mod egress;
mod grant;
pub mod hsm;
mod ours;
pub mod stocker;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger_hsm::{Check, REJECTION_QUORUM, standstill};
use claviger_protocol::algorithm::HostAlgorithms;
use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::health::HealthClaims;
use claviger_protocol::payload::{ApiVersion, Payload};
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
use crate::admission::strangers::{self, LARGE, apart_if_large};
use crate::admission::{Declined, HostAt};
use crate::observe::log_throttle::Throttle;
use crate::registry::snapshot::Snapshot;
use crate::request::Attempt;
use crate::service::Service;
use crate::stock::{Basis, Taken};
use crate::sys::clock::unix_now;

/// A refusal in a secret step leaves at a multiple of this after the request's arrival, so that its time tells nothing
/// of the step that failed. Honest callers do not meet it.
const REFUSAL_GRID: Duration = Duration::from_millis(25);

/// What a release works with.
pub struct Release<'a, H> {
    service: &'a Service,
    hsm: &'a H,
    api: ApiVersion,
    in_force: Snapshot,
}

impl<'a, H: Hsm> Release<'a, H> {
    /// A release that begins now, whose decryptions and signatures are made by `hsm`. Its settings say until when `attempt`
    /// is answered.
    pub fn begin(service: &'a Service, hsm: &'a H, api: ApiVersion, attempt: &mut Attempt) -> Self {
        let in_force = service.snapshot();
        attempt.answer_within(in_force.config.release.deadline());
        Self::with(service, hsm, api, in_force)
    }

    /// A part of a release that has begun with this snapshot.
    #[must_use]
    pub fn with(service: &'a Service, hsm: &'a H, api: ApiVersion, in_force: Snapshot) -> Self {
        Self { service, hsm, api, in_force }
    }

    /// The settings and the registry that it goes by.
    #[must_use]
    pub fn in_force(&self) -> &Snapshot {
        &self.in_force
    }
}

/// Releases the transport keys of one protector to one host.
///
/// # Errors
/// The refusals of the protocol page, section 2.1; `TooManyRequestsException` when the host asks too
/// fast; `ServiceUnavailableException` when the service is too busy, or no HSM could serve in time.
pub async fn roll<H: Hsm>(
    service: &Service,
    hsm: &H,
    api: ApiVersion,
    body: &[u8],
    attempt: &mut Attempt,
) -> Result<Grant, Refusal> {
    let release = Release::begin(service, hsm, api, attempt);
    let sender = fast_reject(&release, body, RollRequest::peek_health_certificate, attempt)?;

    // 1. The request is schema-valid and its three algorithms are known.
    let request = sender.aside(body.len(), || RollRequest::parse(body)).await;
    let request = request.inspect_err(|_| sender.charge(service, body.len(), attempt))?;
    let protector = (&*request.ingress_protector, attempt.protector(&request.ingress_protector));

    // 2. The health certificate is valid.
    let host = healthy_host(service, &release.in_force, &request.health_certificate, attempt);
    let host = host.inspect_err(|_| sender.charge(service, body.len(), attempt))?;

    // Its host is within its rate, and it is its turn. It is until this function ends.
    let asked = standstill::now();
    let admitted = service.admission.admit(&HostAt::new(&host.host_name, attempt), attempt).await;
    attempt.waited_for_turn(asked);
    let _permit = admitted?;

    roll_protector(&release, &host, request.algorithms, protector, attempt).await
}

/// Steps 3 to 9: one protector of a host that proved its health. The protector comes with its SHA-256.
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

    // A batch may have waited for its items before this one.
    if standstill::now() >= deadline {
        return Err(Refusal::new(Code::ServiceUnavailable, "the service is too busy now; try again"));
    }
    let from = HostAt::new(&host.host_name, attempt);
    let mut work = Work::default();
    let judged = judge(release, host, protector, &mut work, attempt);
    let (ingress, ours) = judged.inspect_err(|_| service.admission.failed_early(&from, size, work))?;
    // What is encrypted for the new protector counts, too.
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

    // 8. An egress protector with a fresh key: a ready-made one where the stock has it. Else, at the same time: write one and
    //    sign it in an HSM.
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

    // In this order: the decryption is under way while the egress protector is written.
    let asked = standstill::now();
    let (decrypted, made) = tokio::join!(decrypted, made);
    attempt.waited_for_hsms(asked);
    let charge = |decryptions| service.admission.charge_decryptions(&from, decryptions);
    // What was decrypted for a protector that cannot be written is to be paid for, too.
    let made = made.inspect_err(|_: &Refusal| charge(REJECTION_QUORUM - 1))?;
    let ingress_key = match decrypted {
        Ok(done) => {
            attempt.used(&done.member);
            transport_key(&done.value).ok_or_else(Refusal::internal)?
        }
        Err(DecryptError::Rejected) => {
            // It was decrypted again and again before it was refused.
            charge(REJECTION_QUORUM - 1);
            let refusal = refuse_on_the_grid(attempt.started()).await;
            // The time on record ends on the grid, too.
            attempt.waited_for_hsms(asked);
            return Err(refusal);
        }
        Err(DecryptError::Unavailable(error)) => return Err(unavailable(&error, "decrypt")),
    };
    let made = made.transpose().map_err(|error| unavailable(&error, "sign"))?;
    // From here on the ready-made one belongs to this release.
    let egress = made.or_else(|| ready.and_then(Taken::give_out)).ok_or_else(Refusal::internal)?;
    attempt.used(egress.member());
    let (egress_protector, sha256) = egress.write()?;
    attempt.egress(sha256);
    // The host brings it next time, to this service as a rule.
    service.sets.know_file(sha256);
    service.stock.asked(&ingress.set, 1.0, in_force.config.release.stock_bytes());

    // 9. Both keys are encrypted to the host.
    let keys = Payload { ingress: ingress_key, egress: egress.into_key(), max_offline_unwraps };
    let keys = keys.seal(*api, &host.key, algorithms)?;
    Ok(Grant {
        response: RollResponse { egress_protector, keys },
        host: Arc::clone(host),
        encryption: wrapping.party.encryption.key().clone(),
        signing: wrapping.party.signing.key().clone(),
    })
}

/// Steps 3 to 6: all that can be said about a protector from public facts alone, before anything is decrypted.
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
    // 3. The protector is schema-valid within the limits, and its algorithms are known. 4. and 5. The guardian signature is
    // right, and every wrapping. All of it at little cost where the wrapping set is known.
    let ingress = apart_if_large(protector.len(), || service.sets.read(protector, &sha256, work))?;
    attempt.owner = Some(HEXLOWER.encode(&ingress.set.owner().signing.thumbprint()));

    // 6. One wrapping is for this service, and its keys are for this host.
    let ours = Ours::find(&ingress.set, &in_force.keys)?;
    permitted(in_force, host, [ours.decryption_key, ours.signing_key])?;
    attempt.guardian_key = Some(HEXLOWER.encode(&ours.of(&ingress.set).party.encryption.thumbprint()));
    apart_if_large(protector.len(), || service.sets.remember(&ingress.set));
    Ok((Arc::new(ingress), ours))
}

/// Step 2: who asks, if it is a registered host that proved its health.
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

/// Who sent a request, as far as that can be said at little cost before the request is read.
#[derive(Debug)]
pub(crate) enum Sender {
    /// The host whose health certificate the request seems to bring; that was found right before.
    Host(Arc<HealthClaims>),
    /// Only the address is known.
    Stranger,
}

impl Sender {
    /// Does what takes long when the input of so many bytes is large, apart from the other requests. Strangers have a
    /// share of the processors.
    pub(crate) async fn aside<T>(&self, bytes: usize, work: impl FnOnce() -> T) -> T {
        match self {
            Self::Stranger if bytes > LARGE => strangers::aside(work).await,
            _ => apart_if_large(bytes, work),
        }
    }

    /// Charges a request of so many bytes that is refused before steps 1 and 2 show who sent it.
    pub(crate) fn charge(&self, service: &Service, bytes: usize, attempt: &Attempt) {
        match self {
            Self::Host(host) => service.admission.failed_unread(&HostAt::new(&host.host_name, attempt), bytes),
            Self::Stranger => service.admission.charge_stranger(attempt, bytes, Work::default()),
        }
    }
}

/// Fast path under load: refuses what [`admission`](crate::admission) would refuse after step 2, at a fraction of the cost,
/// because refusing must not take from what gets done. `peek` finds the health certificate. Only a host whose health
/// certificate was found right before is known at this point; any other request goes on.
///
/// An address from which too much was refused is served as far as a health certificate proves a host, so that no host pays
/// for its neighbours behind a NAT or a load balancer.
///
/// # Errors
/// `TooManyRequestsException`, `ServiceUnavailableException` for a host that would not be let in;
/// `TooManyRequestsException` for an address from which too much was refused, where no host is known to have sent the request.
pub(crate) fn fast_reject<H: Hsm>(
    release: &Release<'_, H>,
    body: &[u8],
    peek: impl FnOnce(&[u8]) -> Option<Vec<u8>>,
    attempt: &mut Attempt,
) -> Result<Sender, Refusal> {
    let Release { service, in_force, .. } = release;
    let stranger = service.admission.stranger_may_ask(attempt);
    // Reading a large body costs more than looking into it.
    if stranger.is_ok() && !service.admission.is_pressed() && body.len() <= LARGE {
        return Ok(Sender::Stranger);
    }
    let signers = in_force.signers.certificates();
    let claims = peek(body).and_then(|certificate| match stranger {
        Ok(()) => service.health.known(&certificate, signers, unix_now()),
        Err(_) => service.health.check(&certificate, signers, unix_now()).ok(),
    });
    let is_host = |claims: &Arc<HealthClaims>| {
        registered(in_force, claims).is_ok() && in_force.may_act_as(&claims.host_name, attempt)
    };
    let Some(host) = claims.filter(is_host) else {
        return stranger.map(|()| Sender::Stranger).map_err(Declined::release);
    };
    let outlook = service.admission.outlook(&HostAt::new(&host.host_name, attempt), attempt);
    outlook.inspect_err(|_| {
        attempt.health(&host);
        attempt.known = true;
    })?;
    Ok(Sender::Host(host))
}

/// Step 7: an ingress key is right when the protector's own signature says so.
///
/// The cluster asks this of whatever a member decrypted. A ciphertext that does not decrypt and a key whose signature is
/// wrong go the same way there: known-good operations show that the member is not to blame, others are asked, and
/// then the same refusal is given.
fn proved_by_its_signature(ingress: &Arc<Ingress>) -> Check {
    let ingress = Arc::clone(ingress);
    Arc::new(move |octets| {
        let proves = |key| ingress.transport_key_signature.verify(&key, &ingress.signed_octets);
        transport_key(octets).is_some_and(proves)
    })
}

/// The refusal of a secret step, at the next point of the grid.
async fn refuse_on_the_grid(started: Instant) -> Refusal {
    let passed = standstill::since(started).as_micros() / REFUSAL_GRID.as_micros();
    let points = u32::try_from(passed + 1).unwrap_or(u32::MAX);
    standstill::sleep_until(started + REFUSAL_GRID * points).await;
    Refusal::protector("the transport key of the wrapping for this service is not right")
}

/// 503: the fault is on this side, and a second try may well succeed.
fn unavailable(error: &Unavailable, operation: &str) -> Refusal {
    static SAID: Throttle = Throttle::new();
    if let Some(unsaid) = SAID.due(Instant::now()) {
        tracing::warn!(%error, operation, unsaid, "no HSM served a release");
    }
    Refusal::new(Code::ServiceUnavailable, "no HSM can serve the request now; try again")
}
