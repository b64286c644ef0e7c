//! Accepts the body of a request within its memory, and only as much of it as its sender is trusted with so far.

use std::time::Duration;

use claviger_protocol::batch::{BatchRequest, MAX_BATCH_BODY};
use claviger_protocol::error::{Code, Refusal};

use crate::admission::bodies::{NoRoom, Room};
use crate::admission::{Declined, HostAt};
use crate::attest::{host_key, tpm};
use crate::config::AttestMode;
use crate::http::body::{BodyError, Intake};
use crate::http::server::Origin;
use crate::observe::metrics;
use crate::release::healthy_host;
use crate::request::Attempt;
use crate::service::Service;

/// Largest body of a single request in bytes, and of a batch until its health certificate has been verified.
pub(crate) const MAX_BODY: usize = 1024 * 1024;

/// Bytes of a batch that are accepted from an address over its rate before the health certificate has identified a
/// host. The health certificate is within the first 3,000 bytes.
const BEGINNING: u64 = 16 * 1024;

/// The reason for slow bodies in the metrics. [`NoRoom::ALL`] has the other reasons.
const SLOW: &str = "slow";
const TOO_LARGE: &str = "too_large";
const UNPROVEN: &str = "unproven";

/// All reasons for refusing a body, by their names in the metrics.
#[must_use]
pub(crate) fn refusals() -> Vec<&'static str> {
    NoRoom::ALL.iter().map(|reason| reason.as_str()).chain([SLOW, TOO_LARGE, UNPROVEN]).collect()
}

/// Counts an error that [`read_body`](crate::http::body::read_body) detected.
pub(crate) fn count(error: BodyError) {
    match error {
        BodyError::TooLarge => metrics::body_refused(TOO_LARGE),
        BodyError::Timeout => metrics::body_refused(SLOW),
        BodyError::Broken | BodyError::NotTaken => {}
    }
}

/// How many bytes of a refused body of this size are read in total.
pub(crate) fn discarded(announced: u64) -> usize {
    usize::try_from(announced).unwrap_or(MAX_BATCH_BODY).min(MAX_BATCH_BODY)
}

/// The intake of one body.
pub(crate) struct Taking<'a> {
    room: &'a Room,
    /// The condition for accepting more than this many bytes.
    condition: Option<(u64, Condition<'a>)>,
    most: u64,
    refusal: Option<Refusal>,
    /// The connection that it comes on.
    origin: Option<&'a Origin>,
}

/// The condition for accepting a large body.
enum Condition<'a> {
    /// The health certificate at the beginning of a batch is valid.
    Certificate(&'a Service, &'a mut Attempt),
    /// The sender's address is within its rate for requests of unknown senders.
    Stranger(&'a Service, &'a Attempt),
}

impl<'a> Taking<'a> {
    /// The body of a single release. The health certificate is near its end, so the body is read before it can be
    /// checked.
    pub(crate) fn single(room: &'a Room) -> Self {
        Self { room, condition: None, most: MAX_BODY as u64, refusal: None, origin: None }
    }

    /// The same for a body that comes on this connection.
    pub(crate) fn sent_on(self, origin: Option<&'a Origin>) -> Self {
        Self { origin, ..self }
    }

    /// An attestation. A usual one is short; from an address over its rate, longer ones are refused.
    pub(crate) fn attestation(room: &'a Room, service: &'a Service, attempt: &'a Attempt) -> Self {
        let small = match service.config.load().attest.mode {
            AttestMode::HostKey => host_key::LARGE as u64,
            AttestMode::Tpm => tpm::LARGE as u64,
        };
        Self { condition: Some((small, Condition::Stranger(service, attempt))), ..Self::single(room) }
    }

    /// A batch. From an address over its rate, the health certificate is checked as soon as it has arrived.
    pub(crate) fn batch(room: &'a Room, service: &'a Service, attempt: &'a mut Attempt) -> Self {
        let unjudged = if service.admission.stranger_may_ask(attempt).is_ok() { MAX_BODY as u64 } else { BEGINNING };
        let condition = Some((unjudged, Condition::Certificate(service, attempt)));
        Self { condition, most: MAX_BATCH_BODY as u64, ..Self::single(room) }
    }

    /// Checks a body by its announced length, before it is read.
    ///
    /// # Errors
    /// The length exceeds what this sender may send.
    pub(crate) fn announced(&mut self, length: u64) -> Result<(), Refusal> {
        match self.condition.as_mut() {
            Some((unasked, condition @ Condition::Stranger(..))) if length > *unasked => {
                condition.holds(&[]).inspect_err(|_| metrics::body_refused(UNPROVEN))
            }
            _ => Ok(()),
        }
    }

    /// The largest possible limit of the body.
    pub(crate) fn most(&self) -> u64 {
        self.most
    }

    /// The reason after [`BodyError::NotTaken`].
    pub(crate) fn refusal(self) -> Refusal {
        self.refusal.unwrap_or_else(no_room)
    }
}

impl Condition<'_> {
    /// # Errors
    /// The refusal of the request, judged by its beginning.
    fn holds(&mut self, beginning: &[u8]) -> Result<(), Refusal> {
        match self {
            // The certificate is the first element of a batch.
            Self::Certificate(service, attempt) => match BatchRequest::peek_health_certificate(beginning) {
                Some(certificate) => {
                    let host = healthy_host(service, &service.snapshot(), &certificate, attempt)?;
                    service.admission.outlook(&HostAt::new(&host.host_name, attempt), attempt, beginning)
                }
                None => {
                    service.admission.stranger_may_ask(attempt).map_err(Declined::release)?;
                    let what = "bytes and does not begin with a health certificate";
                    Err(Refusal::new(Code::RequestTooLarge, format!("the body is larger than {MAX_BODY} {what}")))
                }
            },
            Self::Stranger(service, attempt) => {
                service.admission.stranger_may_attest(attempt).map_err(Declined::refusal)
            }
        }
    }
}

/// The refusal if there is no memory for the body.
pub(crate) fn no_room() -> Refusal {
    Refusal::new(Code::ServiceUnavailable, "too many large requests at the same time; try again")
}

impl Intake for Taking<'_> {
    fn more(&mut self, received: u64, so_far: &[u8]) -> Result<u64, BodyError> {
        let most = self.most;
        if received <= most
            && let Some((_, mut condition)) = self.condition.take_if(|(unasked, _)| received > *unasked)
            && let Err(refusal) = condition.holds(so_far)
        {
            metrics::body_refused(UNPROVEN);
            self.refusal = Some(refusal);
            return Err(BodyError::NotTaken);
        }
        // Bytes beyond the limit are discarded and need no memory.
        if received <= most && self.room.grow(received).is_err() {
            return Err(BodyError::NotTaken);
        }
        Ok(most)
    }

    fn kept_waiting(&self) -> Duration {
        self.origin.map_or(Duration::ZERO, Origin::waits)
    }
}
