//! Decides which of several servers to ask next, and when. The caller passes in the time and the random numbers, so the
//! decision does no I/O.

use std::time::{Duration, Instant};

use crate::host::HostError;
use crate::http::ClientError;

/// Longest pause after the first failure of a server. The pause is a random part of this; the limit doubles with each
/// failure in a row, see [`pause`].
const FIRST_REST: Duration = Duration::from_millis(200);
/// The doubling stops here.
const LONGEST_REST: Duration = Duration::from_secs(10);

/// The pause after a failure: the time that the server asked for (`Retry-After`), and a random part of a limit. `failures` is
/// the number of failures before this one in a row, `luck` a uniform random number from 0 to 1. A server that asks for a time
/// spreads its callers itself, so the limit doubles with each failure only where it asked for none.
#[must_use]
pub fn pause(asked: Option<Duration>, failures: u32, luck: f64) -> Duration {
    let longest = match asked {
        Some(_) => FIRST_REST,
        None => FIRST_REST.saturating_mul(2u32.saturating_pow(failures)).min(LONGEST_REST),
    };
    asked.unwrap_or_default() + longest.mul_f64(luck.clamp(0.0, 1.0))
}

/// What an error means for the next attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The same request would fail again, on this server and on others.
    Lasting,
    /// This server cannot serve now, or its reply is wrong; another server may serve. Holds the `Retry-After` of the
    /// server.
    Server(Option<Duration>),
    /// The host asks too often, and every server would refuse it. Holds the time that the host must wait.
    Host(Option<Duration>),
    /// This server cannot serve until an administrator changes its configuration; another server may serve.
    Unusable,
}

impl HostError {
    /// Classifies the error: is another attempt useful, and at which server?
    #[must_use]
    pub fn fault(&self) -> Fault {
        let (status, retry_after) = match self {
            Self::Client(ClientError::Tls { fault, .. }) if fault.lasting => return Fault::Unusable,
            Self::Client(ClientError::SpeaksTls { .. }) => return Fault::Unusable,
            // Another server may have a valid certificate, or give a correct reply.
            Self::Client(
                ClientError::Connect { .. }
                | ClientError::Tls { .. }
                | ClientError::Timeout { .. }
                | ClientError::Broken { .. }
                | ClientError::TooLarge { .. },
            )
            | Self::Answer(_) => return Fault::Server(None),
            // The service itself marks the errors that may pass. An error that names another mode means that the client
            // could switch its mode; this client supports only one.
            Self::Attestation { reply, .. } if !reply.retryable || reply.expected_operation_mode.is_some() => {
                return Fault::Lasting;
            }
            Self::Attestation { status: 429, retry_after, .. } => (429, retry_after),
            Self::Attestation { retry_after, .. } => (503, retry_after),
            Self::Release { status, refusal } => (*status, &refusal.retry_after),
            Self::Status { status, retry_after, .. } => (*status, retry_after),
            Self::Client(_) | Self::Key(_) | Self::Tpm(_) => return Fault::Lasting,
        };
        let rest = retry_after.map(|seconds| Duration::from_secs(seconds.into()));
        match status {
            429 => Fault::Host(rest),
            408 | 500.. => Fault::Server(rest),
            _ => Fault::Lasting,
        }
    }
}

/// The next thing to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Ask this server.
    Ask(usize),
    /// Every server is pausing: wait for this time.
    Wait(Duration),
    /// The time is over, or would be over before any server may be asked again.
    GiveUp,
}

/// Several servers in order of preference, and the deadline for asking them.
#[derive(Clone, Debug)]
pub struct Fallback {
    servers: Vec<Server>,
    /// The server that replied last. It is asked first from then on.
    preferred: usize,
    deadline: Instant,
}

#[derive(Clone, Copy, Debug, Default)]
struct Server {
    rests_until: Option<Instant>,
    failures: u32,
    /// `true` if the server must not be asked again.
    unusable: bool,
}

impl Fallback {
    /// Makes the state for this many servers. No server is asked after `deadline`.
    #[must_use]
    pub fn new(servers: usize, deadline: Instant) -> Self {
        Self { servers: vec![Server::default(); servers], preferred: 0, deadline }
    }

    /// The time left at `now`.
    #[must_use]
    pub fn left(&self, now: Instant) -> Duration {
        self.deadline.saturating_duration_since(now)
    }

    /// Decides what to do at `now`.
    #[must_use]
    pub fn next(&self, now: Instant) -> Step {
        if now >= self.deadline {
            return Step::GiveUp;
        }
        let count = self.servers.len();
        let rest = |at: usize| {
            self.servers[at].rests_until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
        };
        let usable = |at: &usize| !self.servers[*at].unusable;
        let mut order = (0..count).map(|step| (self.preferred + step) % count).filter(usable);
        if let Some(ready) = order.find(|at| rest(*at).is_zero()) {
            return Step::Ask(ready);
        }
        match (0..count).filter(usable).map(rest).min() {
            Some(shortest) if shortest < self.left(now) => Step::Wait(shortest),
            _ => Step::GiveUp,
        }
    }

    /// Records that the server replied. A refusal is also a reply.
    pub fn answered(&mut self, server: usize) {
        self.preferred = server;
        self.servers[server] = Server::default();
    }

    /// Records that the server failed at `now`. `luck` is a uniform random number from 0 to 1; it spreads out the next
    /// attempts of hosts that failed at the same time.
    pub fn failed(&mut self, server: usize, fault: Fault, now: Instant, luck: f64) {
        let asked = match fault {
            Fault::Lasting => return,
            Fault::Unusable => {
                self.servers[server].unusable = true;
                return;
            }
            Fault::Server(asked) | Fault::Host(asked) => asked,
        };
        let failures = self.servers[server].failures;
        let until = Some(now + pause(asked, failures, luck));
        self.servers[server] = Server { rests_until: until, failures: failures + 1, unusable: false };
        if matches!(fault, Fault::Host(_)) {
            for other in &mut self.servers {
                other.rests_until = other.rests_until.max(until);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::trust::TlsFault;
    use claviger_protocol::attestation::ReceivedError;
    use claviger_protocol::error::{Code, Refusal};

    const SECOND: Duration = Duration::from_secs(1);
    const MINUTE: Duration = Duration::from_secs(60);

    fn start(servers: usize) -> (Fallback, Instant) {
        let now = Instant::now();
        (Fallback::new(servers, now + MINUTE), now)
    }

    #[test]
    fn the_next_server_is_asked_at_once_and_the_one_that_answered_first_from_then_on() {
        let (mut fallback, now) = start(3);
        assert_eq!(fallback.next(now), Step::Ask(0));
        fallback.failed(0, Fault::Server(None), now, 1.0);
        assert_eq!(fallback.next(now), Step::Ask(1));
        fallback.failed(1, Fault::Server(None), now, 1.0);
        assert_eq!(fallback.next(now), Step::Ask(2));
        fallback.answered(2);
        assert_eq!(fallback.next(now + MINUTE / 2), Step::Ask(2));
        fallback.failed(2, Fault::Server(None), now + MINUTE / 2, 1.0);
        assert_eq!(fallback.next(now + MINUTE / 2), Step::Ask(0), "round the corner");
    }

    #[test]
    fn rests_double_up_to_a_bound_and_are_drawn_from_their_whole_length() {
        let (mut fallback, now) = start(1);
        for milliseconds in [200, 400, 800, 1600, 3200, 6400, 10_000, 10_000] {
            fallback.failed(0, Fault::Server(None), now, 1.0);
            assert_eq!(fallback.next(now), Step::Wait(Duration::from_millis(milliseconds)));
        }
        fallback.failed(0, Fault::Server(None), now, 0.5);
        assert_eq!(fallback.next(now), Step::Wait(LONGEST_REST / 2));
        assert_eq!(fallback.next(now + LONGEST_REST / 2), Step::Ask(0));
        fallback.failed(0, Fault::Server(None), now, 0.0);
        assert_eq!(fallback.next(now), Step::Ask(0));
        fallback.answered(0);
        fallback.failed(0, Fault::Server(None), now, 1.0);
        assert_eq!(fallback.next(now), Step::Wait(FIRST_REST), "an answer ends the row of failures");
    }

    #[test]
    fn what_a_server_asks_for_is_kept_whatever_the_dice_say() {
        let (mut fallback, now) = start(2);
        fallback.failed(0, Fault::Server(Some(7 * SECOND)), now, 0.0);
        assert_eq!(fallback.next(now), Step::Ask(1), "the other one did not ask for it");
        fallback.failed(1, Fault::Server(Some(3 * SECOND)), now, 1.0);
        assert_eq!(fallback.next(now), Step::Wait(3 * SECOND + FIRST_REST));
        assert_eq!(fallback.next(now + 4 * SECOND), Step::Ask(1));
        for _ in 0..10 {
            fallback.failed(1, Fault::Server(Some(3 * SECOND)), now, 1.0);
            assert_eq!(
                fallback.next(now),
                Step::Wait(3 * SECOND + FIRST_REST),
                "no more is added however often it asks"
            );
        }
    }

    #[test]
    fn a_host_that_asks_too_often_does_not_ask_elsewhere() {
        let (mut fallback, now) = start(2);
        fallback.failed(0, Fault::Host(Some(2 * SECOND)), now, 0.0);
        assert_eq!(fallback.next(now), Step::Wait(2 * SECOND));
    }

    #[test]
    fn nobody_waits_for_what_comes_too_late() {
        let (mut fallback, now) = start(2);
        fallback.failed(0, Fault::Server(Some(MINUTE)), now, 0.0);
        assert_eq!(fallback.next(now), Step::Ask(1));
        fallback.failed(1, Fault::Server(Some(2 * MINUTE)), now, 0.0);
        assert_eq!(fallback.next(now), Step::GiveUp);
        let (fallback, now) = start(1);
        assert_eq!(fallback.next(now + MINUTE), Step::GiveUp);
        assert_eq!((fallback.left(now), fallback.left(now + MINUTE * 2)), (MINUTE, Duration::ZERO));
    }

    #[test]
    fn errors_say_whether_to_ask_again() {
        let release = |code: Code, retry_after| HostError::Release {
            status: code.status(),
            refusal: Refusal { retry_after, ..Refusal::new(code, "") },
        };
        let attestation = |status, retryable| HostError::Attestation {
            status,
            reply: ReceivedError {
                name: String::new(),
                retryable,
                message: None,
                expected_operation_mode: None,
                reasons: Vec::new(),
            },
            retry_after: Some(2),
        };
        let mut other_mode = attestation(409, true);
        if let HostError::Attestation { reply, .. } = &mut other_mode {
            reply.expected_operation_mode = Some(1);
        }
        let foreign = |status| HostError::Status { server: String::new(), status, retry_after: None };
        let tls = |lasting| {
            let fault = TlsFault { problem: String::new(), lasting };
            HostError::Client(ClientError::Tls { server: String::new(), fault })
        };
        let broken = ClientError::Broken { server: String::new(), problem: String::new() };
        for (error, fault) in [
            (release(Code::InvalidProtector, Some(1)), Fault::Lasting),
            (release(Code::HealthCertificate, None), Fault::Lasting),
            (release(Code::ServiceUnavailable, Some(9)), Fault::Server(Some(9 * SECOND))),
            (release(Code::Internal, None), Fault::Server(None)),
            (release(Code::TooManyRequests, Some(4)), Fault::Host(Some(4 * SECOND))),
            (attestation(403, false), Fault::Lasting),
            (attestation(503, false), Fault::Lasting),
            (attestation(503, true), Fault::Server(Some(2 * SECOND))),
            (attestation(429, true), Fault::Host(Some(2 * SECOND))),
            (other_mode, Fault::Lasting),
            (foreign(502), Fault::Server(None)),
            (foreign(404), Fault::Lasting),
            (HostError::Client(broken), Fault::Server(None)),
            (HostError::Client(ClientError::TooLarge { server: String::new(), limit: 1 }), Fault::Server(None)),
            (HostError::Client(ClientError::SpeaksTls { server: String::new() }), Fault::Unusable),
            (tls(true), Fault::Unusable),
            (tls(false), Fault::Server(None)),
            (HostError::Answer(String::new()), Fault::Server(None)),
            (HostError::Key(String::new()), Fault::Lasting),
        ] {
            assert_eq!(error.fault(), fault, "{error:?}");
        }
    }

    #[test]
    fn a_server_that_cannot_be_used_is_not_asked_again_and_others_are() {
        let now = Instant::now();
        let mut fallback = Fallback::new(2, now + Duration::from_secs(60));
        assert_eq!(fallback.next(now), Step::Ask(0));
        fallback.failed(0, Fault::Unusable, now, 0.5);
        assert_eq!(fallback.next(now), Step::Ask(1));
        fallback.failed(1, Fault::Server(None), now, 0.5);
        assert!(matches!(fallback.next(now), Step::Wait(_)), "only the other one is waited for");
        fallback.failed(1, Fault::Unusable, now, 0.5);
        assert_eq!(fallback.next(now), Step::GiveUp, "no time is spent on servers that will not serve");
    }
}
