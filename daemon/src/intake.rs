//! Taking in a request's body: within its room, and no more of it than its sender is trusted with so far.

use claviger_protocol::batch::{BatchRequest, MAX_BATCH_BODY};
use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::work::Work;

use crate::attempt::Attempt;
use crate::bodies::{NoRoom, Room};
use crate::metrics;
use crate::release::healthy_host;
use crate::server::{BodyError, Intake};
use crate::service::Service;

/// Largest body of a single request, in bytes, and of a batch whose health certificate was not found right yet.
pub const MAX_BODY: usize = 1024 * 1024;

/// Why bodies are refused in this module and where they are read; [`NoRoom::ALL`] has the other reasons.
const SLOW: &str = "slow";
const TOO_LARGE: &str = "too_large";
const UNPROVEN: &str = "unproven";

/// Every reason why a body may not be taken, by its name in the metrics.
#[must_use]
pub fn refusals() -> Vec<&'static str> {
    NoRoom::ALL.iter().map(|reason| reason.as_str()).chain([SLOW, TOO_LARGE, UNPROVEN]).collect()
}

/// Counts what [`read_body`](crate::server::read_body) found by itself.
pub(crate) fn count(error: BodyError) {
    match error {
        BodyError::TooLarge => metrics::body_refused(TOO_LARGE),
        BodyError::Timeout => metrics::body_refused(SLOW),
        BodyError::Broken | BodyError::NotTaken => {}
    }
}

/// The intake of one body.
pub(crate) struct Taking<'a> {
    room: &'a Room,
    /// Whose request it is, where it is a batch that nobody has answered for yet.
    unproven: Option<(&'a Service, &'a mut Attempt)>,
    most: u64,
    refusal: Option<Refusal>,
}

impl<'a> Taking<'a> {
    /// A body with one release, or an attestation.
    pub(crate) fn single(room: &'a Room) -> Self {
        Self { room, unproven: None, most: MAX_BODY as u64, refusal: None }
    }

    /// A batch.
    pub(crate) fn batch(room: &'a Room, service: &'a Service, attempt: &'a mut Attempt) -> Self {
        Self { unproven: Some((service, attempt)), most: MAX_BATCH_BODY as u64, ..Self::single(room) }
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

/// The refusal of a request for whose body there is no memory.
pub(crate) fn no_room() -> Refusal {
    Refusal::new(Code::ServiceUnavailable, "too many large requests at the same time; try again")
}

impl Intake for Taking<'_> {
    fn more(&mut self, received: u64, so_far: &[u8]) -> Result<u64, BodyError> {
        let most = self.most;
        if received > MAX_BODY as u64
            && received <= most
            && let Some((service, attempt)) = &mut self.unproven
        {
            // The certificate is the first element of a batch.
            let judged = match BatchRequest::peek_health_certificate(so_far) {
                Some(certificate) => healthy_host(service, &service.snapshot(), &certificate, attempt).map(drop),
                None => Err(Refusal::new(
                    Code::RequestTooLarge,
                    format!("the body is larger than {MAX_BODY} bytes and does not begin with a health certificate"),
                )),
            };
            if let Err(refusal) = judged {
                service.admission.charge_stranger(attempt, so_far.len(), Work::default());
                metrics::body_refused(UNPROVEN);
                self.refusal = Some(refusal);
                return Err(BodyError::NotTaken);
            }
            self.unproven = None;
        }
        // What is too large is thrown away, and takes no room.
        if received <= most && self.room.grow(received).is_err() {
            return Err(BodyError::NotTaken);
        }
        Ok(most)
    }
}
