//! Taking in a request's body: within its room, and no more of it than its sender is trusted with so far.

use claviger_protocol::batch::{BatchRequest, MAX_BATCH_BODY};
use claviger_protocol::error::{Code, Refusal};

use crate::admission::bodies::{NoRoom, Room};
use crate::admission::{Declined, HostAt};
use crate::attest::{host_key, tpm};
use crate::config::AttestMode;
use crate::http::body::{BodyError, Intake};
use crate::observe::metrics;
use crate::release::healthy_host;
use crate::request::Attempt;
use crate::service::Service;

/// Largest body of a single request, in bytes, and of a batch whose health certificate was not found right yet.
pub const MAX_BODY: usize = 1024 * 1024;

/// Most bytes of a batch that are taken from an address over its rate before a host is known to have sent it: the health
/// certificate is among the first 3,000.
const BEGINNING: u64 = 16 * 1024;

/// Why bodies are refused in this module and where they are read; [`NoRoom::ALL`] has the other reasons.
const SLOW: &str = "slow";
const TOO_LARGE: &str = "too_large";
const UNPROVEN: &str = "unproven";

/// Every reason why a body may not be taken, by its name in the metrics.
#[must_use]
pub fn refusals() -> Vec<&'static str> {
    NoRoom::ALL.iter().map(|reason| reason.as_str()).chain([SLOW, TOO_LARGE, UNPROVEN]).collect()
}

/// Counts what [`read_body`](crate::http::body::read_body) found by itself.
pub(crate) fn count(error: BodyError) {
    match error {
        BodyError::TooLarge => metrics::body_refused(TOO_LARGE),
        BodyError::Timeout => metrics::body_refused(SLOW),
        BodyError::Broken | BodyError::NotTaken => {}
    }
}

/// How many bytes of a refused body of this size are read in the end.
pub(crate) fn discarded(announced: u64) -> usize {
    usize::try_from(announced).unwrap_or(MAX_BATCH_BODY).min(MAX_BATCH_BODY)
}

/// The intake of one body.
pub(crate) struct Taking<'a> {
    room: &'a Room,
    /// What has to be known before more bytes are taken than these.
    condition: Option<(u64, Condition<'a>)>,
    most: u64,
    refusal: Option<Refusal>,
}

/// What has to be known before a large body is taken.
enum Condition<'a> {
    /// The health certificate at the beginning of a batch is right.
    Certificate(&'a Service, &'a mut Attempt),
    /// The sender's address may still send what no host answers for.
    Stranger(&'a Service, &'a Attempt),
}

impl<'a> Taking<'a> {
    /// A body with one release. The health certificate comes near its end, so it is read before anything can be said.
    pub(crate) fn single(room: &'a Room) -> Self {
        Self { room, condition: None, most: MAX_BODY as u64, refusal: None }
    }

    /// An attestation. An honest one is short: from an address over its rate no longer one is taken.
    pub(crate) fn attestation(room: &'a Room, service: &'a Service, attempt: &'a Attempt) -> Self {
        let small = match service.config.load().attest.mode {
            AttestMode::HostKey => host_key::LARGE as u64,
            AttestMode::Tpm => tpm::LARGE as u64,
        };
        Self { condition: Some((small, Condition::Stranger(service, attempt))), ..Self::single(room) }
    }

    /// A batch. From an address from which too much was refused its certificate is judged as soon as it has come.
    pub(crate) fn batch(room: &'a Room, service: &'a Service, attempt: &'a mut Attempt) -> Self {
        let unjudged = if service.admission.stranger_may_ask(attempt).is_ok() { MAX_BODY as u64 } else { BEGINNING };
        let condition = Some((unjudged, Condition::Certificate(service, attempt)));
        Self { condition, most: MAX_BATCH_BODY as u64, ..Self::single(room) }
    }

    /// Judges a body by the length that its header announces, before any of it is read.
    ///
    /// # Errors
    /// It is longer than its sender may send, whatever is in it.
    pub(crate) fn announced(&mut self, length: u64) -> Result<(), Refusal> {
        match self.condition.as_mut() {
            Some((unasked, condition @ Condition::Stranger(..))) if length > *unasked => {
                condition.holds(&[]).inspect_err(|_| metrics::body_refused(UNPROVEN))
            }
            _ => Ok(()),
        }
    }

    /// The most bytes that it may come to.
    pub(crate) fn most(&self) -> u64 {
        self.most
    }

    /// Why no more was taken, after [`BodyError::NotTaken`].
    pub(crate) fn refusal(self) -> Refusal {
        self.refusal.unwrap_or_else(no_room)
    }
}

impl Condition<'_> {
    /// # Errors
    /// What the request is refused with of which this is the beginning.
    fn holds(&mut self, beginning: &[u8]) -> Result<(), Refusal> {
        match self {
            // The certificate is the first element of a batch.
            Self::Certificate(service, attempt) => match BatchRequest::peek_health_certificate(beginning) {
                Some(certificate) => {
                    let host = healthy_host(service, &service.snapshot(), &certificate, attempt)?;
                    service.admission.outlook(&HostAt::new(&host.host_name, attempt), attempt)
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

/// The refusal of a request for whose body there is no memory.
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
        // What is too large is thrown away, and takes no room.
        if received <= most && self.room.grow(received).is_err() {
            return Err(BodyError::NotTaken);
        }
        Ok(most)
    }
}
