//! Reading a request's body within bounds.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Body;

/// How many octets beyond the limit are read and thrown away. A client that is still writing when we answer and close
/// gets a reset instead of our answer, so a body that is only somewhat too long is read to its end.
const DISCARD: u64 = 16 * 1024 * 1024;

/// Most memory that is set aside for a body before any of it has come.
const AHEAD: u64 = 64 * 1024;

/// Why a request has no body to work with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// It has more octets than the limit. Answer 413.
    #[error("the request's body is too large")]
    TooLarge,
    /// It did not come to its end in time. Answer 408.
    #[error("the request's body did not arrive in time")]
    Timeout,
    /// The client went away, or sent what is no HTTP body. Nobody may be there to read an answer.
    #[error("the request's body is broken")]
    Broken,
}

/// Reads a whole body of at most `limit` octets within `timeout`.
///
/// A longer body is discarded to its end, up to 16 MiB more and within the same time, so that the client gets to read the
/// answer; one whose `Content-Length` announces more than that is refused at once.
///
/// # Errors
/// [`BodyError`].
pub async fn read_body<B>(mut body: B, limit: usize, timeout: Duration) -> Result<Bytes, BodyError>
where
    B: Body<Data = Bytes> + Unpin,
{
    let limit = limit as u64;
    // Without a Content-Length there is no exact size before the end.
    let announced = body.size_hint().exact().unwrap_or(0);
    if announced > limit.saturating_add(DISCARD) {
        return Err(BodyError::TooLarge);
    }
    let mut received = 0u64;
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    let read = async {
        while let Some(frame) = body.frame().await {
            // Trailers mean nothing here.
            let Ok(data) = frame.map_err(|_| BodyError::Broken)?.into_data() else { continue };
            received += data.len() as u64;
            if received > limit.saturating_add(DISCARD) {
                return Err(BodyError::TooLarge);
            }
            if received > limit || announced > limit {
                whole = BytesMut::new();
                first = Bytes::new();
            } else if first.is_empty() && whole.is_empty() {
                // Most bodies come in one piece, which then need not be copied.
                first = data;
            } else {
                if whole.is_empty() {
                    whole.reserve(announced.min(AHEAD.max(received.saturating_mul(2))) as usize);
                    whole.extend_from_slice(&std::mem::take(&mut first));
                }
                whole.extend_from_slice(&data);
            }
        }
        Ok(())
    };
    let result = tokio::time::timeout(timeout, read).await;
    match result {
        _ if received > limit || announced > limit => Err(BodyError::TooLarge),
        Err(_) => Err(BodyError::Timeout),
        Ok(Err(error)) => Err(error),
        Ok(Ok(())) if whole.is_empty() => Ok(first),
        Ok(Ok(())) => Ok(whole.freeze()),
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

    /// A body in pieces; `None` never comes, an `Err` is a broken connection.
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
        let result = read_body(pieces, 10, Duration::from_millis(50)).await;
        (result, taken.load(std::sync::atomic::Ordering::Relaxed))
    }

    #[tokio::test]
    async fn a_body_within_bounds_is_whole() {
        assert_eq!(read(&[], None).await.0, Ok(Bytes::new()));
        assert_eq!(read(&[Some(Ok(b"0123456789"))], None).await.0, Ok(Bytes::from("0123456789")));
        let pieces = [Some(Ok(&b"01"[..])), Some(Ok(b"")), Some(Ok(b"234")), Some(Ok(b"56789"))];
        assert_eq!(read(&pieces, None).await.0, Ok(Bytes::from("0123456789")));
        assert_eq!(read(&pieces, Some(10)).await.0, Ok(Bytes::from("0123456789")));
        // One piece is handed on, not copied.
        let one = Bytes::from(vec![7; 10]);
        let same = read_body(Full::new(one.clone()), 10, Duration::from_secs(1)).await.map(|body| body.as_ptr());
        assert_eq!(same, Ok(one.as_ptr()));
    }

    #[tokio::test]
    async fn what_is_too_large_is_discarded_to_its_end() {
        let pieces = [Some(Ok(&b"0123456789"[..])), Some(Ok(b"x")), Some(Ok(b"y"))];
        assert_eq!(read(&pieces, None).await, (Err(BodyError::TooLarge), 4));
        assert_eq!(read(&pieces, Some(12)).await, (Err(BodyError::TooLarge), 4));
        // Announced beyond all bounds: not a frame is read.
        assert_eq!(read(&pieces, Some(10 + DISCARD + 1)).await, (Err(BodyError::TooLarge), 0));
        static MIB: [u8; 1 << 20] = [0; 1 << 20];
        let endless = vec![Some(Ok(&MIB[..])); 20];
        assert_eq!(read(&endless, None).await, (Err(BodyError::TooLarge), 17));
        // It has the whole time, but not more.
        assert_eq!(read(&[Some(Ok(b"0123456789x")), None], None).await.0, Err(BodyError::TooLarge));
    }

    #[tokio::test]
    async fn what_does_not_come_is_told_apart() {
        assert_eq!(read(&[Some(Ok(b"0")), None], None).await.0, Err(BodyError::Timeout));
        assert_eq!(read(&[Some(Ok(b"0")), Some(Err(()))], None).await.0, Err(BodyError::Broken));
    }
}
