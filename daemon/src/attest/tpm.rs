//! Attestation by TPM: a host proves what it booted, and its identity key is certified (protocol page, section 3.1).
//!
//! ```text
//!  host                                      service
//!   │ endorsement key, attestation key          │
//!   ├──────────────── step 1 ──────────────────►│ host registered? keys acceptable?
//!   │◄─ credential, PCR selection, State ───────┤ keeps nothing: State is sealed
//!   │ the TPM recovers the credential,          │
//!   │ and quotes PCRs for this session and key  │
//!   ├──────────────── step 2 ──────────────────►│ State, quote, PCR values, log, policies
//!   │◄─────────── health certificate ───────────┤ State is marked used; an HSM signs
//! ```

use std::sync::Arc;
use std::time::Instant;

use claviger_process::throttle::Throttle;
use claviger_protocol::attestation::tpm::{TpmRequest, continue_reply};
use claviger_protocol::attestation::{ErrorReply, HealthCertificateReply, PolicyReason};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::health::{self, ResultType};
use claviger_protocol::rsa_key::RsaPublicKey;
use claviger_protocol::tpm::Malformed;
use claviger_protocol::tpm::context::{self, Context, Kind};
use claviger_protocol::tpm::credential;
use claviger_protocol::tpm::evidence::{self, EvidenceError};
use claviger_protocol::tpm::policy::{self, Policy};
use claviger_protocol::tpm::public::AttestationKey;
use claviger_protocol::tpm::state::{LIFETIME_SECONDS, State, StateId};
use claviger_protocol::work::Work;
use data_encoding::{BASE64, HEXLOWER};

use super::issuing::{Issued, Refused, over_rate, signed, unavailable};
use crate::admission::strangers;
use crate::admission::{Admission, Declined, HostAt};
use crate::observe::metrics;
use crate::registry::baselines::BaselineId;
use crate::registry::snapshot::Snapshot;
use crate::request::Attempt;
use crate::service::Service;
use crate::store::Host;
use crate::store::evidence::Evidence;
use crate::sys::clock::unix_now;

/// Largest step 2, in bytes, that is read from an address over its rate; most of it is the boot log.
pub(crate) const LARGE: usize = 256 * 1024;
/// Largest step 1, in bytes, that is served from the bucket of the host that it names. An honest one has about 3,000.
const LARGE_FIRST_STEP: usize = 16 * 1024;

/// The result of a request that was not refused.
pub(crate) enum Progress {
    /// The body of the reply to step 1.
    Continue(Vec<u8>),
    /// The certificates of step 2.
    Issued(Issued),
}

/// The result of [`judge`].
enum Judged {
    /// The body of the reply to step 1, and the host whose endorsement key the request names. Nothing proves that this host
    /// sent it.
    Continue(Vec<u8>, Arc<Host>),
    /// A step 2 whose quote proves its host.
    Proven(Box<Proven>),
}

/// A host that proved its TPM.
struct Proven {
    host: Arc<Host>,
    endorsement_key: RsaPublicKey,
    identity_key: RsaPublicKey,
    requested: Vec<ResultType>,
    /// The State, and when it expires.
    state: (StateId, i64),
    /// The baseline that the host matches, or the refusal.
    outcome: Result<BaselineId, Refused>,
}

/// Answers an `AttestationRequest` in TPM mode.
///
/// # Errors
/// Those of the protocol page, section 3.1; `UnavailableErrorReply` when no HSM signs; 429 for a host or an address over its
/// rate.
pub(crate) async fn attest(service: &Service, body: &[u8], attempt: &mut Attempt) -> Result<Progress, Refused> {
    // As in host-key mode, step 2 from an address over its rate is served if it proves a registered host. Step 1 proves
    // nothing, so each registered host has a bucket for it at each address.
    over_rate(service, body, LARGE, attempt)?;
    let turn = service.admission.strangers_turn(attempt, body).await.map_err(Declined::attestation)?;
    // Others of the address may have been refused meanwhile.
    let over_rate = over_rate(service, body, LARGE, attempt)?;
    let mut work = Work::default();
    let judged = strangers::in_place(|| judge(service, body, &mut work, attempt));
    drop(turn);
    let proven = match judged {
        Ok(Judged::Proven(proven)) => proven,
        Ok(Judged::Continue(reply, host)) => {
            let from = HostAt::new(&host.name, attempt);
            if body.len() > LARGE_FIRST_STEP || !service.admission.may_begin(&from) {
                service.admission.charge_stranger(attempt, body.len(), work);
                if let Some(declined) = over_rate {
                    attempt.host = None;
                    return Err(declined.attestation().into());
                }
            }
            return Ok(Progress::Continue(reply));
        }
        Err(refused) => {
            service.admission.charge_stranger(attempt, body.len(), work);
            return Err(over_rate.map_or(refused, |declined| {
                attempt.host = None;
                declined.attestation().into()
            }));
        }
    };

    Admission::keep_body(attempt).map_err(Declined::attestation)?;
    // From here on the sender is proven to be the host: the request is charged to the host, whatever else is wrong.
    attempt.known = true;
    attempt.identity_key = Some(HEXLOWER.encode(&proven.identity_key.spki_sha256()));
    let from = HostAt::new(&proven.host.name, attempt);
    let within_rate = service.admission.attestation_within_rate(&from);
    within_rate.inspect_err(|_| service.admission.charge_stranger(attempt, body.len(), work))?;
    let baseline = proven.outcome.clone()?;
    attempt.baseline = Some(baseline.name.clone());

    let (id, ends) = proven.state;
    let claim = service.tpm.claim(id, ends, unix_now()).ok_or_else(used_up)?;
    let content = issue(service, &proven, &baseline, &from, attempt).await?;
    claim.spend();
    Ok(Progress::Issued(content))
}

/// Judges both steps in the order of the protocol page, up to the part that needs an HSM.
fn judge(service: &Service, body: &[u8], work: &mut Work, attempt: &mut Attempt) -> Result<Judged, Refused> {
    let request = TpmRequest::parse(body).map_err(|error| Refused::new(ErrorReply::Payload, error.to_string()))?;
    attempt.key = Some(HEXLOWER.encode(&request.endorsement_key.spki_sha256()));
    let in_force = service.snapshot();
    match &request.identity_key {
        None => begin(service, &in_force, &request, work, attempt).map(|(reply, host)| Judged::Continue(reply, host)),
        Some((identity_key, sent)) => {
            let proven = prove(service, &in_force, &request, (identity_key, sent.as_slice()), work, attempt)?;
            Ok(Judged::Proven(Box::new(proven)))
        }
    }
}

/// Returns the registered host of the endorsement key in a request.
fn registered(in_force: &Snapshot, request: &TpmRequest, attempt: &mut Attempt) -> Result<Arc<Host>, Refused> {
    let host = in_force.hosts.by_endorsement_key(request.endorsement_key.spki_der());
    attempt.host = host.map(|host| host.name.clone());
    let host = host.filter(|host| in_force.may_act_as(&host.name, attempt));
    host.cloned().ok_or_else(|| unauthorized("the endorsement key is not registered"))
}

/// Step 1: makes a credential that only the TPM with this endorsement key and this attestation key can recover.
fn begin(
    service: &Service,
    in_force: &Snapshot,
    request: &TpmRequest,
    work: &mut Work,
    attempt: &mut Attempt,
) -> Result<(Vec<u8>, Arc<Host>), Refused> {
    let host = registered(in_force, request, attempt)?;
    let [ak_public] = request.context().and_then(|context| context.exactly([Kind::AkPublic])).map_err(rtpm)?;
    let attestation_key = AttestationKey::parse(ak_public).map_err(rtpm)?;

    work.add(&request.endorsement_key);
    let selection = in_force.baselines.selection();
    let credential = credential::fresh().map_err(|error| internal(&error))?;
    let protected = credential::protect(&request.endorsement_key, attestation_key.name(), &credential)
        .map_err(|error| internal(&error))?;
    let state = State {
        ends: unix_now().saturating_add(LIFETIME_SECONDS),
        session_id: request.session_id,
        endorsement_key: request.endorsement_key.spki_sha256(),
        credential,
        selection,
        ak_public: ak_public.to_vec(),
    };
    let sealed = service.tpm.seal(&state).map_err(|error| internal(&error))?;
    let reply = continue_reply(&context::write(&[
        (Kind::State, &sealed),
        (Kind::IdObject, &protected.id_object),
        (Kind::EncryptedSecret, &protected.encrypted_secret),
        (Kind::PcrSelection, &selection.to_selection()),
    ]));
    Ok((reply, host))
}

/// Step 2: checks what the host's TPM proves, and judges it by the policies.
fn prove(
    service: &Service,
    in_force: &Snapshot,
    request: &TpmRequest,
    (identity_key, sent): (&RsaPublicKey, &[u8]),
    work: &mut Work,
    attempt: &mut Attempt,
) -> Result<Proven, Refused> {
    let context = Context::parse(&request.context).map_err(rtpm)?;
    let evidence = evidence::Evidence::of(&context).map_err(rtpm)?;
    let now = unix_now();
    let (id, state) = service.tpm.open(evidence.state).map_err(|error| begin_again(error.to_string()))?;
    if state.ends < now {
        return Err(begin_again("the State has expired"));
    }
    if service.tpm.is_used(&id) {
        return Err(used_up());
    }
    if state.session_id != request.session_id || state.endorsement_key != request.endorsement_key.spki_sha256() {
        return Err(begin_again("the State belongs to another session"));
    }
    let host = registered(in_force, request, attempt)?;

    work.add(&request.endorsement_key);
    let proven = |outcome| Proven {
        host: Arc::clone(&host),
        endorsement_key: request.endorsement_key.clone(),
        identity_key: identity_key.clone(),
        requested: request.requested.clone(),
        state: (id, state.ends),
        outcome,
    };
    let facts = match evidence::check(&evidence, &state, sent) {
        Ok(facts) => facts,
        Err(error @ EvidenceError::Quote(_)) => return Err(unauthorized(error.to_string())),
        // Any other error comes after the quote was found to be the host's own.
        Err(error) => {
            let reply = match error {
                EvidenceError::Log(_) => ErrorReply::TcgLogValidation,
                _ => ErrorReply::Rtpm { retryable: false },
            };
            return Ok(proven(Err(Refused::new(reply, error.to_string()))));
        }
    };
    let verdict = policy::judge(&facts.log, &facts.values, facts.restart_count, in_force.baselines.enabled());
    for policy in Policy::ALL {
        metrics::attestation_policy(policy.name(), !verdict.failed.contains(&policy));
    }
    let baseline = verdict.baseline.and_then(|baseline| in_force.baselines.identify(&baseline.name));
    let outcome = match baseline {
        Some(baseline) if verdict.failed.is_empty() => Ok(baseline),
        _ => Err(unhealthy(&verdict.failed, attempt)),
    };
    service.evidence.keep(
        &host.name,
        Evidence {
            at: now,
            endorsement_key: host.spki_sha256.clone(),
            values: facts.values,
            log: evidence.log.to_vec(),
            restart_count: facts.restart_count,
        },
    );
    Ok(proven(outcome))
}

/// Issues certificates that name the baseline, signed in an HSM.
async fn issue(
    service: &Service,
    proven: &Proven,
    baseline: &BaselineId,
    from: &HostAt,
    attempt: &mut Attempt,
) -> Result<Issued, Refused> {
    let Proven { host, endorsement_key, identity_key, requested, .. } = proven;
    let signers = service.registry.signers();
    let signer = signers.current().ok_or_else(unavailable)?;
    let _turn = service.admission.attestation_turn(from, attempt, &identity_key.spki_sha256()).await?;
    let mut content = Vec::with_capacity(requested.len());
    for result in requested {
        let now = unix_now();
        let built = health::issue_measured(
            &signer.certificate,
            &host.name,
            endorsement_key,
            &baseline.name,
            identity_key,
            *result,
            now,
        );
        let certificate = signed(service, signer, built, &host.name, attempt).await?;
        if attempt.health_serial.is_none() {
            attempt.health_serial = Certificate::parse(&certificate).ok().map(|made| HEXLOWER.encode(made.serial()));
        }
        content.push((*result, certificate.to_vec()));
    }
    let reply = HealthCertificateReply { content };
    Ok(Issued::measured(reply, Arc::clone(host), signer.certificate.thumbprint(), baseline.clone()))
}

/// The refusal that names every policy that fails.
fn unhealthy(failed: &[Policy], attempt: &mut Attempt) -> Refused {
    static SAID: Throttle = Throttle::new();
    let names = failed.iter().map(|policy| policy.name()).collect::<Vec<_>>();
    if let Some(unsaid) = SAID.due(Instant::now()) {
        tracing::warn!(
            host = attempt.host,
            policies = names.join(" "),
            unsaid,
            "a host fails policies; claviger hosts check shows the reasons"
        );
    }
    let message = format!("policies fail: {}", names.join(", "));
    attempt.failed_policies = names;
    let reasons =
        failed.iter().map(|policy| PolicyReason { result: false, reason: BASE64.encode(&policy.guid()) }).collect();
    Refused::new(ErrorReply::PolicyEvaluation { reasons }, message)
}

fn unauthorized(message: impl Into<String>) -> Refused {
    Refused::new(ErrorReply::Unauthorized, message)
}

fn rtpm(Malformed(why): Malformed) -> Refused {
    Refused::new(ErrorReply::Rtpm { retryable: false }, why)
}

fn begin_again(why: impl Into<String>) -> Refused {
    Refused::new(ErrorReply::Rtpm { retryable: true }, why)
}

fn used_up() -> Refused {
    begin_again("the State is used, or has expired")
}

fn internal(error: &dyn std::fmt::Display) -> Refused {
    static SAID: Throttle = Throttle::new();
    if let Some(unsaid) = SAID.due(Instant::now()) {
        tracing::error!(%error, unsaid, "an attestation cannot be answered");
    }
    Refused::new(ErrorReply::Error { status: 500 }, "the service failed to process the request; its log says why")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::{AttestMode, Config};
    use crate::store::{HostKind, Labels};
    use claviger_protocol::attestation::tpm::{first_request, second_request};
    use claviger_protocol::rsa_key::RsaPrivateKey;
    use claviger_protocol::tpm::log::Log;
    use claviger_protocol::tpm::pcr::PcrSet;
    use claviger_protocol::tpm::software::SoftwareTpm;

    /// A service in TPM mode with a host whose TPM is in software; no HSM works for it.
    fn stage() -> (tempfile::TempDir, Arc<Service>, SoftwareTpm) {
        stage_with(|_| {})
    }

    fn stage_with(configure: impl FnOnce(&mut Config)) -> (tempfile::TempDir, Arc<Service>, SoftwareTpm) {
        let folder = tempfile::tempdir().unwrap();
        let service = crate::service::testing::service_in(folder.path(), |config| {
            config.attest.mode = AttestMode::Tpm;
            configure(config);
        });
        let mut tpm = SoftwareTpm::new(RsaPrivateKey::generate(2048).unwrap()).unwrap();
        // A boot without any event.
        PcrSet::ALWAYS.iter().for_each(|pcr| assert!(tpm.pcrs.set(pcr, [0; 32])));
        let spki = tpm.endorsement_key().public().spki_der().to_vec();
        service.registry.with_state(|state| {
            state.add_host_with(HostKind::EndorsementKey, "node", &spki, &Labels::default(), 1).unwrap();
            state.add_baseline("base", &tpm.pcrs, None, 1).unwrap();
        });
        service.registry.follow().unwrap();
        (folder, service, tpm)
    }

    /// A request of step 1.
    fn first(tpm: &SoftwareTpm) -> Vec<u8> {
        let context = context::write(&[(Kind::AkPublic, tpm.ak_public())]);
        let wanted = [ResultType::EncryptionCertificate];
        first_request([5; 16], &wanted, tpm.endorsement_key().public().spki_der(), &context)
    }

    /// A request of step 2 with a State that expires after `ends`.
    fn second(service: &Service, tpm: &SoftwareTpm, ends: i64, log: &[u8]) -> Vec<u8> {
        let (session_id, identity) = ([5; 16], tpm.endorsement_key().public());
        let state = State {
            ends,
            session_id,
            endorsement_key: identity.spki_sha256(),
            credential: credential::fresh().unwrap(),
            selection: PcrSet::ALWAYS,
            ak_public: tpm.ak_public().to_vec(),
        };
        let data = evidence::qualifying_data(&state.credential, &session_id, identity.spki_der());
        let (quote, signature) = tpm.quote(&data).unwrap();
        let sealed = service.tpm.seal(&state).unwrap();
        let pcr_values = tpm.pcrs.to_bytes();
        let evidence =
            evidence::Evidence { state: &sealed, quote: &quote, signature: &signature, pcr_values: &pcr_values, log };
        let wanted = [ResultType::EncryptionCertificate];
        second_request(session_id, &wanted, identity.spki_der(), identity.spki_der(), &evidence.to_context())
    }

    /// A log whose only event says that Secure Boot is on. The TPM's PCR 7 becomes what it replays to, and the baseline `base`
    /// has the TPM's values.
    fn secure_boot(service: &Service, tpm: &mut SoftwareTpm) -> Vec<u8> {
        let guid = [0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0, 0xe0, 0x98, 0x03, 0x2b, 0x8c];
        let name: Vec<u8> = "SecureBoot".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let data = [&guid[..], &10_u64.to_le_bytes(), &1_u64.to_le_bytes(), &name, &[1]].concat();
        let measured = ring::digest::digest(&ring::digest::SHA256, &data);
        let event = [&[7, 0, 0, 0, 1, 0, 0, 0x80, 1, 0, 0, 0, 0x0b, 0][..], measured.as_ref(), &[0; 4]].concat();
        let log = [empty_log(), event].concat();
        tpm.pcrs.set(7, *Log::parse(&log).unwrap().replay().get(7).unwrap());
        replace_baseline(service, tpm, 1);
        log
    }

    /// Removes the baseline `base` and adds one of that name with the TPM's values.
    fn replace_baseline(service: &Service, tpm: &SoftwareTpm, now: i64) {
        service.registry.with_state(|state| {
            // Long enough ago that its name is free.
            state.remove_baseline("base", now - 60).unwrap();
            state.add_baseline("base", &tpm.pcrs, None, now).unwrap();
        });
        service.registry.follow().unwrap();
    }

    /// The shortest well-formed log.
    fn empty_log() -> Vec<u8> {
        let spec = b"Spec ID Event03\0\0\0\0\0\0\x02\0\x02\x01\0\0\0\x0b\0\x20\0\0";
        [&[0, 0, 0, 0, 3, 0, 0, 0][..], &[0; 20], &(spec.len() as u32).to_le_bytes(), spec].concat()
    }

    async fn refused(service: &Service, body: &[u8]) -> ErrorReply {
        let mut attempt = Attempt::new("r".to_owned());
        attest(service, body, &mut attempt).await.err().unwrap().reply
    }

    #[tokio::test]
    async fn an_expired_state_is_refused_as_retryable() {
        let (_folder, service, tpm) = stage();
        let now = unix_now();
        let over = second(&service, &tpm, now - 1, &empty_log());
        assert_eq!(refused(&service, &over).await, ErrorReply::Rtpm { retryable: true });
        assert!(service.evidence.of("node").unwrap().is_none(), "nothing was proven in time");
        // A State that has not expired is judged: Secure Boot is not on.
        let fresh = second(&service, &tpm, now + 60, &empty_log());
        let ErrorReply::PolicyEvaluation { reasons } = refused(&service, &fresh).await else { panic!() };
        assert_eq!(reasons.len(), 1);
        assert!(service.evidence.of("node").unwrap().is_some());
        // A refused State stays unused. A wrong log is refused.
        assert!(matches!(refused(&service, &fresh).await, ErrorReply::PolicyEvaluation { .. }));
        let no_log = second(&service, &tpm, now + 60, b"x");
        assert_eq!(refused(&service, &no_log).await, ErrorReply::TcgLogValidation);
    }

    #[tokio::test]
    async fn a_state_stays_unused_when_no_hsm_signs() {
        let (_folder, service, mut tpm) = stage();
        let log = secure_boot(&service, &mut tpm);
        let body = second(&service, &tpm, unix_now() + 60, &log);
        for _ in 0..2 {
            assert_eq!(refused(&service, &body).await, ErrorReply::Unavailable);
        }
    }
    #[tokio::test]
    async fn a_host_is_bound_to_the_baseline_that_it_was_judged_by() {
        let (_folder, service, mut tpm) = stage();
        let log = secure_boot(&service, &mut tpm);
        let body = second(&service, &tpm, unix_now() + 60, &log);
        let mut attempt = Attempt::new("r".to_owned());
        let judged = judge(&service, &body, &mut Work::default(), &mut attempt).unwrap();
        let Judged::Proven(proven) = judged else { panic!("step 2") };
        let baseline = proven.outcome.unwrap();
        assert!(service.registry.baselines().is_enabled(&baseline));
        // While the host waits for an HSM, its baseline is replaced under its name.
        replace_baseline(&service, &tpm, 2);
        assert!(service.registry.baselines().allow("base", unix_now()), "another one of that name is enabled");
        assert!(!service.registry.baselines().is_enabled(&baseline));
    }

    #[tokio::test]
    async fn no_host_pays_for_the_strangers_at_its_address() {
        let (_folder, service, tpm) = stage_with(|config| {
            (config.server.stranger_rate, config.server.stranger_burst) = (1, 1);
            (config.attest.host_rate, config.attest.host_burst) = (1, 2);
        });
        let sent_from = |address: &str| Attempt::new("r".to_owned()).sent_from(Some(address.parse().unwrap()));
        let here = || sent_from("192.0.2.1");
        let charged = || service.admission.charged(&HostAt::new("node", &here()))[2];
        let too_many = ErrorReply::Error { status: 429 };

        // Within the address's rate a first step for a registered host costs the address nothing, a stranger's does.
        assert!(matches!(attest(&service, &first(&tpm), &mut here()).await, Ok(Progress::Continue(_))));
        assert_eq!(charged(), 0);
        let stranger = SoftwareTpm::new(RsaPrivateKey::generate(2048).unwrap()).unwrap();
        let refused = attest(&service, &first(&stranger), &mut here()).await.err().unwrap();
        assert_eq!(refused.reply, ErrorReply::Unauthorized);
        assert!(charged() > 0);

        // Strangers bring the address over its rate. The host begins all the same, within a bucket of its own.
        service.admission.charge_stranger(&here(), 100 * 16 * 1024, Work::default());
        let owed = charged();
        assert!(matches!(attest(&service, &first(&tpm), &mut here()).await, Ok(Progress::Continue(_))));
        assert!(charged() <= owed);
        assert_eq!(attest(&service, &first(&stranger), &mut here()).await.err().unwrap().reply, too_many);
        let mut attempt = here();
        let mut refused = None;
        for _ in 0..100 {
            attempt = here();
            refused = attest(&service, &first(&tpm), &mut attempt).await.err();
            if refused.is_some() {
                break;
            }
        }
        assert_eq!(refused.unwrap().reply, too_many, "beyond its bucket");
        assert_eq!(attempt.host, None);
        assert!(attest(&service, &first(&tpm), &mut sent_from("192.0.2.2")).await.is_ok(), "another address");

        // The host's second step is judged, also with a log of 100 KiB.
        let long = [&[0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0x0b, 0][..], &[0; 32], &102_400_u32.to_le_bytes()].concat();
        let log = [empty_log(), long, vec![0; 102_400]].concat();
        let body = second(&service, &tpm, unix_now() + 60, &log);
        let refused = attest(&service, &body, &mut here()).await.err().unwrap();
        assert!(matches!(refused.reply, ErrorReply::PolicyEvaluation { .. }), "{refused:?}");
    }
}
