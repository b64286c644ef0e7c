//! Reads the body of a request within limits.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use claviger_hsm::standstill;
use http_body_util::BodyExt;
use hyper::body::Body;

/// How many bytes beyond the limit are read and discarded. If the connection is closed while the client still writes,
/// the client gets a reset instead of the reply. So a body that is only a bit too long is read to its end.
const DISCARD: u64 = 16 * 1024 * 1024;

/// Most memory that is reserved for a body before any of it has arrived.
const AHEAD: u64 = 64 * 1024;

/// Why a request has no usable body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BodyError {
    /// The body has more bytes than the limit. The reply is 413.
    #[error("the request's body is too large")]
    TooLarge,
    /// The body did not arrive in time. The reply is 408.
    #[error("the request's body did not arrive in time")]
    Timeout,
    /// The client disconnected, or sent an invalid HTTP body. It may not read a reply.
    #[error("the request's body is broken")]
    Broken,
    /// The [`Intake`] rejected the rest of the body and has the reason.
    #[error("the request's body is not taken")]
    NotTaken,
}

/// The minimum speed of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pace {
    /// The whole body has to arrive within this time.
    pub within: Duration,
    /// Average speed in bytes per second; 0 is no limit.
    pub least: u64,
}

/// Time in which the speed of a body is not checked.
const GRACE: Duration = Duration::from_secs(5);

impl Pace {
    /// The time at which more than `received` bytes must have arrived.
    fn due(self, begun: Instant, received: u64) -> Instant {
        let end = begun + self.within;
        match received.saturating_mul(1000).checked_div(self.least) {
            Some(milliseconds) => end.min(begun + GRACE + Duration::from_millis(milliseconds)),
            None => end,
        }
    }
}

/// Decides how much of a body is accepted while it arrives.
pub(crate) trait Intake {
    /// Asks whether `received` bytes may be kept. `so_far` are the bytes that are already kept. Returns the limit of
    /// the body, which may change from call to call.
    ///
    /// # Errors
    /// [`BodyError`], usually [`BodyError::NotTaken`].
    fn more(&mut self, received: u64, so_far: &[u8]) -> Result<u64, BodyError>;

    /// How long the server has kept the client waiting so far, and is going to. That time counts in no limit of the client.
    fn kept_waiting(&self) -> Duration {
        Duration::ZERO
    }
}

/// Accepts bodies of up to this many bytes.
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct UpTo(pub u64);

#[cfg(test)]
impl Intake for UpTo {
    fn more(&mut self, _: u64, _: &[u8]) -> Result<u64, BodyError> {
        Ok(self.0)
    }
}

/// Reads a whole body of at most `most` bytes, or of at most the limit that `intake` returns.
///
/// A longer body is discarded to its end, up to 16 MiB more and within the same time, so that the client can read the
/// reply. If `Content-Length` announces more than that, the body is refused at once.
///
/// # Errors
/// [`BodyError`].
pub(crate) async fn read_body<B>(
    mut body: B,
    most: u64,
    pace: Pace,
    intake: &mut impl Intake,
) -> Result<Bytes, BodyError>
where
    B: Body<Data = Bytes> + Unpin,
{
    // Without a Content-Length, the size is unknown until the end.
    let announced = body.size_hint().exact().unwrap_or(0);
    if announced > most.saturating_add(DISCARD) {
        return Err(BodyError::TooLarge);
    }
    let (begun, kept_before) = (standstill::now(), intake.kept_waiting());
    let mut received = 0u64;
    let mut too_large = announced > most;
    let mut limit = most;
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    loop {
        // It moves when the client is kept waiting meanwhile.
        let due = || pace.due(begun, received) + intake.kept_waiting().saturating_sub(kept_before);
        let frame = standstill::timeout_by(due, body.frame()).await;
        let late = if too_large { BodyError::TooLarge } else { BodyError::Timeout };
        let Some(frame) = frame.map_err(|_| late)? else { break };
        // Trailers are ignored.
        let broken = if too_large { BodyError::TooLarge } else { BodyError::Broken };
        let Ok(data) = frame.map_err(|_| broken)?.into_data() else { continue };
        received += data.len() as u64;
        if !too_large {
            limit = intake.more(received, if whole.is_empty() { &first } else { &whole })?;
            too_large = received > limit;
        }
        if received > limit.saturating_add(DISCARD) {
            return Err(BodyError::TooLarge);
        }
        if too_large {
            whole = BytesMut::new();
            first = Bytes::new();
        } else if first.is_empty() && whole.is_empty() {
            // Most bodies arrive in one piece. Keep it without a copy.
            first = data;
        } else {
            if whole.is_empty() {
                whole.reserve(announced.min(AHEAD.max(received.saturating_mul(2))) as usize);
                whole.extend_from_slice(&std::mem::take(&mut first));
            }
            whole.extend_from_slice(&data);
        }
    }
    match (too_large, whole.is_empty()) {
        (true, _) => Err(BodyError::TooLarge),
        (false, true) => Ok(first),
        (false, false) => Ok(whole.freeze()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::Full;
    use hyper::body::{Frame, SizeHint};
    use std::collections::VecDeque;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    const WITHIN: Pace = Pace { within: Duration::from_millis(50), least: 0 };

    /// A body in pieces. `None` never arrives, an `Err` is a broken connection.
    struct Pieces {
        pieces: VecDeque<Option<Result<&'static [u8], ()>>>,
        announced: Option<u64>,
        taken: std::sync::Arc<std::sync::atomic::AtomicUsize>,
    }

    impl Body for Pieces {
        type Data = Bytes;
        type Error = ();

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ()>>> {
            self.taken.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            match self.pieces.pop_front() {
                None => Poll::Ready(None),
                Some(None) => {
                    self.pieces.push_front(None);
                    Poll::Pending
                }
                Some(Some(piece)) => Poll::Ready(Some(piece.map(|data| Frame::data(Bytes::from_static(data))))),
            }
        }

        fn size_hint(&self) -> SizeHint {
            self.announced.map_or_else(SizeHint::default, SizeHint::with_exact)
        }
    }

    async fn read(
        pieces: &[Option<Result<&'static [u8], ()>>],
        announced: Option<u64>,
    ) -> (Result<Bytes, BodyError>, usize) {
        let taken = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let pieces = Pieces { pieces: pieces.iter().copied().collect(), announced, taken: taken.clone() };
        let result = read_body(pieces, 10, WITHIN, &mut UpTo(10)).await;
        (result, taken.load(std::sync::atomic::Ordering::Relaxed))
    }

    #[tokio::test]
    async fn a_body_within_bounds_is_whole() {
        assert_eq!(read(&[], None).await.0, Ok(Bytes::new()));
        assert_eq!(read(&[Some(Ok(b"0123456789"))], None).await.0, Ok(Bytes::from("0123456789")));
        let pieces = [Some(Ok(&b"01"[..])), Some(Ok(b"")), Some(Ok(b"234")), Some(Ok(b"56789"))];
        assert_eq!(read(&pieces, None).await.0, Ok(Bytes::from("0123456789")));
        assert_eq!(read(&pieces, Some(10)).await.0, Ok(Bytes::from("0123456789")));
        // A single piece is passed on without a copy.
        let one = Bytes::from(vec![7; 10]);
        let same = read_body(Full::new(one.clone()), 10, WITHIN, &mut UpTo(10)).await.map(|body| body.as_ptr());
        assert_eq!(same, Ok(one.as_ptr()));
    }

    #[tokio::test]
    async fn what_is_too_large_is_discarded_to_its_end() {
        let pieces = [Some(Ok(&b"0123456789"[..])), Some(Ok(b"x")), Some(Ok(b"y"))];
        assert_eq!(read(&pieces, None).await, (Err(BodyError::TooLarge), 4));
        assert_eq!(read(&pieces, Some(12)).await, (Err(BodyError::TooLarge), 4));
        // The announced length is too large: no frame is read.
        assert_eq!(read(&pieces, Some(10 + DISCARD + 1)).await, (Err(BodyError::TooLarge), 0));
        static MIB: [u8; 1 << 20] = [0; 1 << 20];
        let endless = vec![Some(Ok(&MIB[..])); 20];
        assert_eq!(read(&endless, None).await, (Err(BodyError::TooLarge), 17));
        // It has the whole time, but no more.
        assert_eq!(read(&[Some(Ok(b"0123456789x")), None], None).await.0, Err(BodyError::TooLarge));
    }

    #[tokio::test]
    async fn what_does_not_come_is_told_apart() {
        assert_eq!(read(&[Some(Ok(b"0")), None], None).await.0, Err(BodyError::Timeout));
        assert_eq!(read(&[Some(Ok(b"0")), Some(Err(()))], None).await.0, Err(BodyError::Broken));
    }

    #[test]
    fn a_body_that_drips_is_cut_long_before_its_time_is_up() {
        let begun = Instant::now();
        let due = |least, received| {
            let pace = Pace { within: Duration::from_secs(100), least };
            pace.due(begun, received).duration_since(begun).as_secs()
        };
        assert_eq!([0, 1, 1_000_000].map(|received| due(0, received)), [100; 3]);
        // A fixed time for all bodies, plus the time for the received bytes.
        assert_eq!([0, 999, 10_000, 1_000_000].map(|received| due(1000, received)), [5, 5, 15, 100]);
    }

    #[tokio::test]
    async fn a_body_has_to_keep_its_pace() {
        let pieces =
            || Pieces { pieces: [Some(Ok(&b"x"[..])), None].into(), announced: None, taken: std::sync::Arc::default() };
        // This minimum speed is so low that the grace time does not matter.
        let pace = Pace { within: Duration::from_millis(50), least: 1 };
        assert_eq!(read_body(pieces(), 10, pace, &mut UpTo(10)).await, Err(BodyError::Timeout));
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_for_which_a_client_is_kept_waiting_is_no_part_of_its_own() {
        /// The connection of this body has waited for this long since another body, and waits again a moment later.
        struct Waits(Instant);
        const BEFORE: Duration = Duration::from_secs(100);
        const AGAIN: Duration = Duration::from_secs(5);
        impl Intake for Waits {
            fn more(&mut self, _: u64, _: &[u8]) -> Result<u64, BodyError> {
                Ok(10)
            }

            fn kept_waiting(&self) -> Duration {
                if standstill::since(self.0) < WITHIN.within / 2 { BEFORE } else { BEFORE + AGAIN }
            }
        }
        let body = Pieces { pieces: [Some(Ok(&b"x"[..])), None].into(), announced: None, taken: Default::default() };
        let begun = standstill::now();
        assert_eq!(read_body(body, 10, WITHIN, &mut Waits(begun)).await, Err(BodyError::Timeout));
        let took = standstill::since(begun);
        assert!(took >= WITHIN.within + AGAIN && took < WITHIN.within + AGAIN * 2, "{took:?}");
    }

    #[tokio::test]
    async fn an_intake_decides_as_the_body_arrives() {
        /// Inspects the beginning before it accepts more.
        struct Looks(Vec<(u64, Vec<u8>)>);
        impl Intake for Looks {
            fn more(&mut self, received: u64, so_far: &[u8]) -> Result<u64, BodyError> {
                self.0.push((received, so_far.to_vec()));
                if received > 4 && !so_far.starts_with(b"good") { Err(BodyError::NotTaken) } else { Ok(100) }
            }
        }
        let body = |pieces: &[&'static [u8]]| Pieces {
            pieces: pieces.iter().map(|piece| Some(Ok(*piece))).collect(),
            announced: None,
            taken: std::sync::Arc::default(),
        };
        let mut looks = Looks(Vec::new());
        let read = read_body(body(&[b"good", b"1", b"2"]), 100, WITHIN, &mut looks).await;
        assert_eq!(read, Ok(Bytes::from("good12")));
        assert_eq!(looks.0, [(4, b"".to_vec()), (5, b"good".to_vec()), (6, b"good1".to_vec())]);
        let read = read_body(body(&[b"bad!", b"1", b"2"]), 100, WITHIN, &mut Looks(Vec::new())).await;
        assert_eq!(read, Err(BodyError::NotTaken));
        // The current limit counts, not the maximum.
        assert_eq!(read_body(body(&[b"bad!", b"1"]), 100, WITHIN, &mut UpTo(4)).await, Err(BodyError::TooLarge));
    }
}
