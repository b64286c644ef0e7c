//! Attestations: the one of the configured mode, its decision and its answer.

use std::time::Instant;

use claviger_protocol::attestation::{ErrorReply, OperationMode};
use claviger_protocol::work::Work;

use super::answer::{Answer, JSON};
use super::intake::MAX_BODY;
use super::resource::Endpoint;
use crate::attest::issuing::Refused;
use crate::attest::{host_key, tpm};
use crate::config::AttestMode;
use crate::observe::audit::{Decision, NOT_RECORDED, SUCCESS};
use crate::observe::log_throttle::Throttle;
use crate::observe::metrics;
use crate::registry::issued::IssuedFor;
use crate::request::Attempt;
use crate::service::Service;
use crate::sys::clock::unix_now;

/// How hosts are to prove themselves now.
pub(super) fn mode(service: &Service) -> OperationMode {
    match service.config.load().attest.mode {
        AttestMode::HostKey => OperationMode::HostKey,
        AttestMode::Tpm => OperationMode::Tpm,
    }
}

/// What an attestation is refused with whatever its body says: its endpoint is not that of the configured mode. The mode is
/// judged before the payload, so the body is not read.
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

/// Refuses such an attestation. It is charged to its sender's address like a body that was read.
pub(super) async fn refuse_unread(
    service: &Service,
    announced: Option<u64>,
    refused: Refused,
    attempt: &Attempt,
) -> Answer {
    let refused = service.admission.stranger_may_attest(attempt).map_or_else(Refused::from, |()| refused);
    let length = announced.and_then(|length| usize::try_from(length).ok()).unwrap_or(MAX_BODY);
    service.admission.charge_stranger(attempt, length.min(MAX_BODY), Work::default());
    finish(service, attempt, Err(refused)).await
}

/// An attestation in the configured mode: decided, recorded, counted, answered.
pub(super) async fn attest(service: &Service, endpoint: Endpoint, body: &[u8], mut attempt: Attempt) -> Answer {
    let result = match endpoint {
        Endpoint::TpmAttest => match tpm::attest(service, body, &mut attempt).await {
            Ok(tpm::Progress::Issued(issued)) => Ok((issued, false)),
            Ok(tpm::Progress::Continue(reply)) => {
                // Nothing was decided yet, and anybody may begin: it is neither recorded nor counted as an attestation.
                return Answer::ok(JSON, reply);
            }
            Err(refused) => Err(refused),
        },
        _ => host_key::attest(service, body, &mut attempt).await.map(|issued| (issued, true)),
    };
    // Nothing is awaited between this and the record, as in `decide`.
    let granted = result.and_then(|(issued, may_repeat)| {
        let (reply, unrecorded) = issued.confirm(service)?;
        let repeated = may_repeat && unrecorded.is_empty();
        Ok(Granted { answer: Answer::ok(JSON, reply.to_json()), unrecorded, repeated })
    });
    finish(service, &attempt, granted).await
}

/// An attestation that is granted.
struct Granted {
    answer: Answer,
    /// Those of its certificates that may be asked for again, and that the audit trail does not tell of yet.
    unrecorded: Vec<IssuedFor>,
    /// Whether the audit trail tells of all of them.
    repeated: bool,
}

/// The decision on an attestation: recorded, counted, answered.
async fn finish(service: &Service, attempt: &Attempt, result: Result<Granted, Refused>) -> Answer {
    let outcome = result.as_ref().map_or_else(|refused| refused.reply.name(), |_| SUCCESS);
    let what = match &result {
        Ok(granted) if granted.repeated => Decision::Repeated,
        _ => Decision::of(result.as_ref().err().map(|refused| refused.reply.status()), attempt.known),
    };
    let mut entry = attempt.entry("attest", outcome);
    if result.is_err() {
        // It may have been issued for a host that is not registered any more.
        entry.health_serial = None;
    }
    let recorded = service.audit.decided(&entry, what, attempt.deadline()).await;
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

/// Refuses an attestation of which nothing was read.
pub(super) async fn refuse(service: &Service, attempt: &Attempt, refused: Refused) -> Answer {
    finish(service, attempt, Err(refused)).await
}

/// Remembers which identity key a host got certified, and says when it is another one than before.
fn note_identity(service: &Service, attempt: &Attempt) {
    static SAID: Throttle = Throttle::new();
    let Some(host) = &attempt.host else { return };
    let before = service.usage.attested(host, attempt.identity_key.as_deref(), unix_now());
    if let Some(before) = before {
        metrics::identity_changed();
        if let Some(unsaid) = SAID.due(Instant::now()) {
            tracing::warn!(
                host,
                before,
                now = attempt.identity_key,
                unsaid,
                "a host has another identity key than before"
            );
        }
    }
}

/// Every outcome an attestation can have.
#[must_use]
pub fn outcomes() -> Vec<&'static str> {
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
