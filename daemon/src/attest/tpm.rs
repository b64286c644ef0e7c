//! Attestation by TPM: a host proves what it booted, and gets its identity key certified (protocol page, section 3.1).
//!
//! ```text
//!  host                                      service
//!   │ endorsement key, attestation key          │
//!   ├──────────────── step 1 ──────────────────►│ registered? keys as they must be?
//!   │◄─ credential, PCR selection, State ───────┤ nothing is remembered: State is sealed
//!   │ the TPM recovers the credential,          │
//!   │ and quotes PCRs for this session and key  │
//!   ├──────────────── step 2 ──────────────────►│ State, quote, PCR values, log, policies
//!   │◄─────────── health certificate ───────────┤ State is used up; sign in an HSM
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

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
use claviger_protocol::tpm::state::{LIFETIME_SECONDS, State, StateId, StateKey};
use claviger_protocol::work::Work;
use data_encoding::{BASE64, HEXLOWER};
use ring::error::Unspecified;

use super::evidence::Evidence;
use super::host_key::{Issued, Refused, signed, unavailable};
use crate::admission::HostAt;
use crate::attempt::Attempt;
use crate::metrics;
use crate::service::{Service, Snapshot, unix_now};
use crate::state::Host;
use crate::strangers;
use crate::throttle::Throttle;

/// Longest attestation in bytes that is read from an address over its rate. An honest one has its boot log in it.
const LARGE: usize = 64 * 1024;
/// Fewest used States at which those that are over are looked for.
const LEAST_PURGE: usize = 1_024;

/// What the service keeps of sessions: the key of their States, and which States have served a certificate.
#[derive(Debug)]
pub struct Sessions {
    key: StateKey,
    used: Mutex<Used>,
}

#[derive(Debug, Default)]
struct Used {
    /// When each State is over, in seconds since 1970.
    until: HashMap<StateId, i64>,
    /// At how many those that are over are removed.
    purge_at: usize,
}

/// A State in use: nobody else can use it. When this is dropped without [`Claim::spend`], others may again.
struct Claim<'a> {
    sessions: &'a Sessions,
    id: StateId,
    is_spent: bool,
}

impl Sessions {
    /// With a fresh key.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub fn new() -> Result<Self, Unspecified> {
        Ok(Self { key: StateKey::generate()?, used: Mutex::default() })
    }

    fn is_used(&self, id: &StateId) -> bool {
        self.used().until.contains_key(id)
    }

    /// Takes a State that is over after `ends` for use, if it is neither used nor in use.
    fn claim(&self, id: StateId, ends: i64, now: i64) -> Option<Claim<'_>> {
        let mut used = self.used();
        if used.until.contains_key(&id) {
            return None;
        }
        if used.until.len() >= used.purge_at.max(LEAST_PURGE) {
            used.until.retain(|_, ends| *ends >= now);
            used.purge_at = 2 * used.until.len();
        }
        used.until.insert(id, ends);
        Some(Claim { sessions: self, id, is_spent: false })
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim<'_> {
    /// Keeps the State used until it is over.
    fn spend(mut self) {
        self.is_spent = true;
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if !self.is_spent {
            self.sessions.used().until.remove(&self.id);
        }
    }
}

/// What a request that was not refused came to.
pub enum Progress {
    /// Step 1: the body of the reply.
    Continue(Vec<u8>),
    /// Step 2.
    Issued(Issued),
}

/// What the steps before the HSM came to.
enum Judged {
    Continue(Vec<u8>),
    Proven(Box<Proven>),
}

/// A host that proved what it booted.
struct Proven {
    host: Arc<Host>,
    endorsement_key: RsaPublicKey,
    identity_key: RsaPublicKey,
    requested: Vec<ResultType>,
    state: (StateId, i64),
    /// The baseline that it matches, or what it is refused with.
    outcome: Result<String, Refused>,
}

/// Answers an `AttestationRequest` in TPM mode.
///
/// # Errors
/// Those of the protocol page, section 3.1; `UnavailableErrorReply` when no HSM signs; 429 for a host or an address that asks
/// too fast.
pub async fn attest(service: &Service, body: &[u8], attempt: &mut Attempt) -> Result<Progress, Refused> {
    // As in host-key mode: from an address over its rate only what proves a registered host is served, and that is step 2.
    let over_rate = service.admission.stranger_may_ask(attempt).err();
    if let Some(declined) = over_rate.filter(|_| body.len() > LARGE) {
        return Err(declined.attestation().into());
    }
    let mut work = Work::default();
    let judged = strangers::aside(|| judge(service, body, &mut work, attempt)).await;
    let proven = match judged {
        Ok(Judged::Proven(proven)) => proven,
        Ok(Judged::Continue(reply)) => {
            // Anybody who knows an endorsement key may begin: the address pays for it.
            service.admission.charge_stranger(attempt, body.len(), work);
            let begun = Ok(Progress::Continue(reply));
            return over_rate.map_or(begun, |declined| Err(declined.attestation().into()));
        }
        Err(refused) => {
            service.admission.charge_stranger(attempt, body.len(), work);
            return Err(over_rate.map_or(refused, |declined| {
                attempt.host = None;
                declined.attestation().into()
            }));
        }
    };

    // Who asks is proven from here on, whatever else is wrong: that is for the host to pay for.
    attempt.known = true;
    attempt.identity_key = Some(HEXLOWER.encode(&proven.identity_key.spki_sha256()));
    let from = HostAt::new(&proven.host.name, attempt);
    let within_rate = service.admission.attestation_within_rate(&from);
    within_rate.inspect_err(|_| service.admission.charge_stranger(attempt, body.len(), work))?;
    let baseline = proven.outcome.clone()?;
    attempt.baseline = Some(baseline.clone());

    let (id, ends) = proven.state;
    let claim = service.tpm.claim(id, ends, unix_now()).ok_or_else(used_up)?;
    let content = issue(service, &proven, &baseline, &from, attempt).await?;
    claim.spend();
    Ok(Progress::Issued(content))
}

/// Both steps, as far as they need no HSM: in the page's order.
fn judge(service: &Service, body: &[u8], work: &mut Work, attempt: &mut Attempt) -> Result<Judged, Refused> {
    let request = TpmRequest::parse(body).map_err(|error| Refused::new(ErrorReply::Payload, error.to_string()))?;
    attempt.key = Some(HEXLOWER.encode(&request.endorsement_key.spki_sha256()));
    let in_force = service.snapshot();
    match &request.identity_key {
        None => begin(service, &in_force, &request, work, attempt).map(Judged::Continue),
        Some((identity_key, sent)) => {
            let proven = prove(service, &in_force, &request, (identity_key, sent.as_slice()), work, attempt)?;
            Ok(Judged::Proven(Box::new(proven)))
        }
    }
}

/// The registered host of the endorsement key in a request.
fn registered(in_force: &Snapshot, request: &TpmRequest, attempt: &mut Attempt) -> Result<Arc<Host>, Refused> {
    let host = in_force.hosts.by_endorsement_key(request.endorsement_key.spki_der());
    attempt.host = host.map(|host| host.name.clone());
    let host = host.filter(|host| in_force.may_act_as(&host.name, attempt));
    host.cloned().ok_or_else(|| unauthorized("the endorsement key is not registered"))
}

/// Step 1: a credential that only the TPM of this endorsement key and this attestation key can recover.
fn begin(
    service: &Service,
    in_force: &Snapshot,
    request: &TpmRequest,
    work: &mut Work,
    attempt: &mut Attempt,
) -> Result<Vec<u8>, Refused> {
    registered(in_force, request, attempt)?;
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
    let sealed = service.tpm.key.seal(&state).map_err(|error| internal(&error))?;
    Ok(continue_reply(&context::write(&[
        (Kind::State, &sealed),
        (Kind::IdObject, &protected.id_object),
        (Kind::EncryptedSecret, &protected.encrypted_secret),
        (Kind::PcrSelection, &selection.to_selection()),
    ])))
}

/// Step 2: what the host's TPM proves, and what the policies say of it.
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
    let (id, state) = service.tpm.key.open(evidence.state).map_err(|error| begin_again(error.to_string()))?;
    if state.ends < now {
        return Err(begin_again("the State is over"));
    }
    if service.tpm.is_used(&id) {
        return Err(used_up());
    }
    if state.session_id != request.session_id || state.endorsement_key != request.endorsement_key.spki_sha256() {
        return Err(begin_again("the State is of another session"));
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
        // From here on the quote is the host's own.
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
    let outcome = match verdict.baseline {
        Some(baseline) if verdict.failed.is_empty() => Ok(baseline.name.clone()),
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

/// Fresh certificates that name the baseline, signed in an HSM.
async fn issue(
    service: &Service,
    proven: &Proven,
    baseline: &str,
    from: &HostAt,
    attempt: &mut Attempt,
) -> Result<Issued, Refused> {
    let Proven { host, endorsement_key, identity_key, requested, .. } = proven;
    let signers = service.signers.load();
    let signer = signers.current().ok_or_else(unavailable)?;
    let _turn = service.admission.attestation_turn(from, attempt).await?;
    let mut content = Vec::with_capacity(requested.len());
    for result in requested {
        let now = unix_now();
        let built = health::issue_measured(
            &signer.certificate,
            &host.name,
            endorsement_key,
            baseline,
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
    Ok(Issued::measured(reply, Arc::clone(host), signer.certificate.thumbprint(), baseline.to_owned()))
}

/// The refusal that tells all policies that fail.
fn unhealthy(failed: &[Policy], attempt: &mut Attempt) -> Refused {
    static SAID: Throttle = Throttle::new();
    let names = failed.iter().map(|policy| policy.name()).collect::<Vec<_>>();
    if let Some(unsaid) = SAID.due(Instant::now()) {
        tracing::warn!(
            host = attempt.host,
            policies = names.join(" "),
            unsaid,
            "a host fails policies; claviger hosts check says why"
        );
    }
    let message = format!("policies fail: {}", names.join(", "));
    attempt.failed_policies = names;
    let reasons =
        failed.iter().map(|policy| PolicyReason { result: false, reason: BASE64.encode(&policy.guid()) }).collect();
    Refused::new(ErrorReply::PolicyEvaluation { reasons }, message)
}

/// The refusal of a host whose baseline is not enabled any more.
pub(super) fn baseline_gone() -> Refused {
    let reason = BASE64.encode(&Policy::SecureBootSettings.guid());
    let reasons = vec![PolicyReason { result: false, reason }];
    Refused::new(ErrorReply::PolicyEvaluation { reasons }, "the baseline that the host matched is not enabled any more")
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
    begin_again("the State has served a certificate")
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
    use crate::config::AttestMode;
    use crate::state::{HostKind, Labels};
    use claviger_protocol::attestation::tpm::second_request;
    use claviger_protocol::rsa_key::RsaPrivateKey;
    use claviger_protocol::tpm::log::Log;
    use claviger_protocol::tpm::pcr::PcrSet;
    use claviger_protocol::tpm::software::SoftwareTpm;

    #[test]
    fn a_state_serves_one_certificate() {
        let sessions = Sessions::new().unwrap();
        let (one, two) = ([1; 12], [2; 12]);
        let claim = sessions.claim(one, 120, 0).unwrap();
        assert!(sessions.is_used(&one) && sessions.claim(one, 120, 0).is_none(), "in use");
        drop(claim);
        assert!(!sessions.is_used(&one), "what came to nothing was not used");
        sessions.claim(one, 120, 0).unwrap().spend();
        assert!(sessions.is_used(&one) && sessions.claim(one, 120, 0).is_none());
        assert!(sessions.claim(two, 120, 0).is_some());
    }

    /// A service in TPM mode with a host whose TPM is in software; no HSM works for it.
    fn stage() -> (tempfile::TempDir, Arc<Service>, SoftwareTpm) {
        let folder = tempfile::tempdir().unwrap();
        let service = crate::service::testing::service_in(folder.path(), |config| config.attest.mode = AttestMode::Tpm);
        let mut tpm = SoftwareTpm::new(RsaPrivateKey::generate(2048).unwrap()).unwrap();
        // A boot without any event.
        PcrSet::ALWAYS.iter().for_each(|pcr| assert!(tpm.pcrs.set(pcr, [0; 32])));
        let spki = tpm.endorsement_key().public().spki_der().to_vec();
        service.with_state(|state| {
            state.add_host_with(HostKind::EndorsementKey, "node", &spki, &Labels::default(), 1).unwrap();
            state.add_baseline("base", &tpm.pcrs, None, 1).unwrap();
        });
        service.follow().unwrap();
        (folder, service, tpm)
    }

    /// A request of step 2 with a State that is over at this time.
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
        let sealed = service.tpm.key.seal(&state).unwrap();
        let pcr_values = tpm.pcrs.to_bytes();
        let evidence =
            evidence::Evidence { state: &sealed, quote: &quote, signature: &signature, pcr_values: &pcr_values, log };
        let wanted = [ResultType::EncryptionCertificate];
        second_request(session_id, &wanted, identity.spki_der(), identity.spki_der(), &evidence.to_context())
    }

    /// The shortest log that is one.
    fn empty_log() -> Vec<u8> {
        let spec = b"Spec ID Event03\0\0\0\0\0\0\x02\0\x02\x01\0\0\0\x0b\0\x20\0\0";
        [&[0, 0, 0, 0, 3, 0, 0, 0][..], &[0; 20], &(spec.len() as u32).to_le_bytes(), spec].concat()
    }

    async fn refused(service: &Service, body: &[u8]) -> ErrorReply {
        let mut attempt = Attempt::new("r".to_owned());
        attest(service, body, &mut attempt).await.err().unwrap().reply
    }

    #[tokio::test]
    async fn a_state_that_is_over_is_for_beginning_again() {
        let (_folder, service, tpm) = stage();
        let now = unix_now();
        let over = second(&service, &tpm, now - 1, &empty_log());
        assert_eq!(refused(&service, &over).await, ErrorReply::Rtpm { retryable: true });
        assert!(service.evidence.of("node").unwrap().is_none(), "nothing was proven in time");
        // What is not over is judged: Secure Boot is not on.
        let fresh = second(&service, &tpm, now + 60, &empty_log());
        let ErrorReply::PolicyEvaluation { reasons } = refused(&service, &fresh).await else { panic!() };
        assert_eq!(reasons.len(), 1);
        assert!(service.evidence.of("node").unwrap().is_some());
        // It was not used up by that, and is refused for the log when that is wrong.
        assert!(matches!(refused(&service, &fresh).await, ErrorReply::PolicyEvaluation { .. }));
        let no_log = second(&service, &tpm, now + 60, b"x");
        assert_eq!(refused(&service, &no_log).await, ErrorReply::TcgLogValidation);
    }

    #[tokio::test]
    async fn what_no_hsm_signs_uses_no_state_up() {
        let (_folder, service, mut tpm) = stage();
        // One event: Secure Boot is on.
        let guid = [0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0, 0xe0, 0x98, 0x03, 0x2b, 0x8c];
        let name: Vec<u8> = "SecureBoot".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let data = [&guid[..], &10_u64.to_le_bytes(), &1_u64.to_le_bytes(), &name, &[1]].concat();
        let measured = ring::digest::digest(&ring::digest::SHA256, &data);
        let event = [&[7, 0, 0, 0, 1, 0, 0, 0x80, 1, 0, 0, 0, 0x0b, 0][..], measured.as_ref(), &[0; 4]].concat();
        let log = [empty_log(), event].concat();
        tpm.pcrs.set(7, *Log::parse(&log).unwrap().replay().get(7).unwrap());
        service.with_state(|state| {
            state.remove_baseline("base").unwrap();
            state.add_baseline("base", &tpm.pcrs, None, 1).unwrap();
        });
        service.follow().unwrap();
        let body = second(&service, &tpm, unix_now() + 60, &log);
        for _ in 0..2 {
            assert_eq!(refused(&service, &body).await, ErrorReply::Unavailable);
        }
    }

    #[test]
    fn used_states_are_forgotten_when_they_are_over() {
        let sessions = Sessions::new().unwrap();
        for at in 0..20 * LEAST_PURGE {
            let mut id = [0; 12];
            id[..8].copy_from_slice(&at.to_le_bytes());
            let now = at as i64;
            sessions.claim(id, now + 120, now).unwrap().spend();
            assert!(sessions.used().until.len() <= LEAST_PURGE, "{at}");
        }
    }
}
