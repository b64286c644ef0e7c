//! Requests that are not let in: why, and when their callers may come again.

use std::time::Duration;

use claviger_protocol::error::{Code, Refusal};

use crate::observe::metrics;

/// Maximum time that a caller is told to wait before its next attempt, in seconds. The minimum is one second.
pub(super) const LONGEST: u64 = 30;

/// Why a request was not let in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dropped {
    /// The queue was full, and its host's line the longest.
    Full,
    /// Its deadline passed.
    Deadline,
    /// It would not have been done within its deadline.
    Late,
    /// Its host asks too fast.
    Rate,
    /// Too much that came from its address was refused, and it does not come from a known host.
    Address,
    /// Its caller went away.
    Left,
}

impl Dropped {
    /// Every reason.
    pub const ALL: [Self; 6] = [Self::Full, Self::Deadline, Self::Late, Self::Rate, Self::Address, Self::Left];

    /// Its name in the metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Deadline => "deadline",
            Self::Late => "late",
            Self::Rate => "rate",
            Self::Address => "address",
            Self::Left => "left",
        }
    }
}

/// A request that was not let in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Declined {
    /// Why.
    pub reason: Dropped,
    /// In how many seconds its caller may come again.
    pub retry_after: u16,
}

impl Declined {
    pub(super) fn rate(reason: Dropped, wait: Duration) -> Self {
        Self { reason, retry_after: whole_seconds(wait) }
    }

    /// The body of the request gave way for others.
    pub(super) fn no_memory() -> Self {
        Self { reason: Dropped::Full, retry_after: 1 }
    }

    /// The refusal of a release. Counts it.
    #[must_use]
    pub fn release(self) -> Refusal {
        metrics::queue_dropped(self.reason.as_str());
        self.refusal()
    }

    /// What its caller is told. Counts nothing.
    pub(crate) fn refusal(self) -> Refusal {
        let (code, message) = match self.reason {
            Dropped::Rate => (Code::TooManyRequests, "this host asks for more releases than it may; try again"),
            Dropped::Address => (Code::TooManyRequests, "too many requests from this address were refused; try again"),
            Dropped::Full => (Code::ServiceUnavailable, "too many releases are waiting; try again"),
            Dropped::Deadline | Dropped::Late => {
                (Code::ServiceUnavailable, "the service is too busy to do the release in time; try again")
            }
            Dropped::Left => (Code::ServiceUnavailable, "the caller went away before it was its turn"),
        };
        Refusal::new(code, message).retry_after(self.retry_after)
    }

    /// The same for an attestation. Counts it.
    #[must_use]
    pub fn attestation(self) -> Self {
        metrics::attestation_dropped(self.reason.as_str());
        self
    }
}

/// A time as `Retry-After` tells it.
pub(super) fn whole_seconds(time: Duration) -> u16 {
    let seconds = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    seconds.clamp(1, LONGEST) as u16
}
