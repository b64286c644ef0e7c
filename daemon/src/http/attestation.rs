//! Handles attestations: runs the configured mode, records the decision and builds the answer.

use std::time::Instant;

use claviger_process::throttle::Throttle;
use claviger_protocol::attestation::{ErrorReply, OperationMode};
use claviger_protocol::work::Work;

use super::answer::{Answer, JSON};
use super::intake::MAX_BODY;
use super::resource::Endpoint;
use crate::attest::issuing::{Issued, Refused};
use crate::attest::{host_key, tpm};
use crate::config::AttestMode;
use crate::observe::audit::{Decision, NOT_RECORDED, SUCCESS};
use crate::observe::metrics;
use crate::registry::issued::IssuedFor;
use crate::request::Attempt;
use crate::service::Service;
use crate::sys::clock::unix_now;

/// The current mode of attestation.
pub(super) fn mode(service: &Service) -> OperationMode {
    match service.config.load().attest.mode {
        AttestMode::HostKey => OperationMode::HostKey,
        AttestMode::Tpm => OperationMode::Tpm,
    }
}

/// The refusal of an attestation at an endpoint of another mode. The mode is checked before the payload, so the body
/// is not read.
pub(super) fn refused_unread(service: &Service, endpoint: Endpoint) -> Option<Refused> {
    let expected = mode(service);
    match (expected, endpoint) {
        (_, Endpoint::Roll(_) | Endpoint::RollBatch)
        | (OperationMode::HostKey, Endpoint::HostKeyAttest)
        | (OperationMode::Tpm, Endpoint::TpmAttest) => None,
        (OperationMode::Tpm, Endpoint::FirstTpmAttest) => {
            let message = "the Context of version 1.0 is not published; use /Attestation/v2.0/attest";
            Some(Refused::new(ErrorReply::Payload, message))
        }
        _ => {
            let what = if expected == OperationMode::Tpm { "TPMs" } else { "host keys" };
            let reply = ErrorReply::OperationMode { expected };
            Some(Refused::new(reply, format!("this service attests {what}")))
        }
    }
}

/// Refuses such an attestation, and charges its sender's address as if the body had been read.
pub(super) async fn refuse_unread(
    service: &Service,
    announced: Option<u64>,
    refused: Refused,
    attempt: &Attempt,
) -> Answer {
    let refused = service.admission.stranger_may_attest(attempt).map_or_else(Refused::from, |()| refused);
    let length = announced.and_then(|length| usize::try_from(length).ok()).unwrap_or(MAX_BODY);
    service.admission.charge_stranger(attempt, length.min(MAX_BODY), Work::default());
    finish(service, attempt, || Err(refused)).await
}

/// Handles an attestation in the configured mode: decides, records, counts and answers it.
pub(super) async fn attest(service: &Service, endpoint: Endpoint, body: &[u8], mut attempt: Attempt) -> Answer {
    let result = match endpoint {
        Endpoint::TpmAttest => match tpm::attest(service, body, &mut attempt).await {
            Ok(tpm::Progress::Issued(issued)) => Ok((issued, false)),
            Ok(tpm::Progress::Continue(reply)) => {
                // Nothing has been decided yet, and anyone can start an attestation, so it is neither recorded nor
                // counted.
                return Answer::ok(JSON, reply);
            }
            Err(refused) => Err(refused),
        },
        _ => host_key::attest(service, body, &mut attempt).await.map(|issued| (issued, true)),
    };
    let confirm = |(issued, may_repeat): (Issued, bool)| {
        let (reply, unrecorded) = issued.confirm(service)?;
        let repeated = may_repeat && unrecorded.is_empty();
        Ok(Granted { answer: Answer::ok(JSON, reply.to_json()), unrecorded, repeated })
    };
    finish(service, &attempt, || result.and_then(confirm)).await
}

/// A granted attestation.
struct Granted {
    answer: Answer,
    /// Its certificates that may be sent again and that the audit trail has not recorded yet.
    unrecorded: Vec<IssuedFor>,
    /// Whether the audit trail has recorded all of them.
    repeated: bool,
}

/// The decision on an attestation: confirmed, recorded, counted, answered.
async fn finish(service: &Service, attempt: &Attempt, confirmed: impl FnOnce() -> Result<Granted, Refused>) -> Answer {
    // As in the decision of a release, no completed change lies between the confirmation and the record.
    let deciding = service.registry.decisions().deciding();
    let result = confirmed();
    let outcome = result.as_ref().map_or_else(|refused| refused.reply.name(), |_| SUCCESS);
    let what = match &result {
        Ok(granted) if granted.repeated => Decision::Repeated,
        _ => Decision::of(result.as_ref().err().map(|refused| refused.reply.status()), attempt.known),
    };
    let mut entry = attempt.entry("attest", outcome);
    if result.is_err() {
        // The certificate may be for a host that is no longer registered.
        entry.health_serial = None;
    }
    let recorded = service.audit.decided(&entry, what, attempt.deadline());
    drop(deciding);
    let recorded = recorded.await;
    let (outcome, answer) = match result {
        _ if !recorded => {
            let reply = ErrorReply::Unavailable;
            entry.outcome = reply.name().to_owned();
            service.audit.count(&entry);
            (reply.name(), Answer::attestation_error(&reply, NOT_RECORDED))
        }
        Ok(Granted { answer, unrecorded, .. }) => {
            unrecorded.iter().for_each(|of| service.issued.recorded(of));
            note_identity(service, attempt);
            (SUCCESS, answer)
        }
        Err(Refused { reply, message, retry_after }) => {
            let answer = Answer::attestation_error(&reply, &message);
            (outcome, Answer { retry_after: retry_after.unwrap_or(answer.retry_after), ..answer })
        }
    };
    metrics::attestation(outcome, attempt.spent().total);
    answer.for_sender(attempt.known)
}

/// Refuses an attestation whose content was not read.
pub(super) async fn refuse(service: &Service, attempt: &Attempt, refused: Refused) -> Answer {
    finish(service, attempt, || Err(refused)).await
}

/// Records the certified identity key of a host, and logs if it differs from the previous one.
fn note_identity(service: &Service, attempt: &Attempt) {
    static SAID: Throttle = Throttle::new();
    let Some(host) = &attempt.host else { return };
    let before = service.usage.attested(host, attempt.identity_key.as_deref(), unix_now());
    if let Some(before) = before {
        metrics::identity_changed();
        if let Some(unsaid) = SAID.due(Instant::now()) {
            tracing::warn!(host, before, now = attempt.identity_key, unsaid, "a host's identity key has changed");
        }
    }
}

/// All possible outcomes of an attestation.
#[must_use]
pub(crate) fn outcomes() -> Vec<&'static str> {
    let refusals = [
        ErrorReply::Error { status: 500 },
        ErrorReply::Payload,
        ErrorReply::Unauthorized,
        ErrorReply::OperationMode { expected: OperationMode::HostKey },
        ErrorReply::PolicyEvaluation { reasons: Vec::new() },
        ErrorReply::Rtpm { retryable: false },
        ErrorReply::TcgLogValidation,
        ErrorReply::Unavailable,
    ];
    [SUCCESS].into_iter().chain(refusals.iter().map(ErrorReply::name)).collect()
}
