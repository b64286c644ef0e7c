//! What is going on on one connection: requests in progress, octets that no request has claimed, when it last moved.
//!
//! hyper does not tell whether a request is half read or a connection really idle, and a stop that drops nothing depends
//! on just that. So the socket reports octets, and the service and the answers' bodies report requests.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Limits;

/// What an HTTP/2 client sends first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Values of [`Activity::protocol`]; smaller ones count how many octets of the preface were seen.
const HTTP1: u8 = 254;
const HTTP2: u8 = 255;

/// The record of one connection. Times are microseconds since `epoch`, plus one; zero is "not".
#[derive(Debug)]
pub(super) struct Activity {
    epoch: Instant,
    /// Requests that the service is working on.
    in_service: AtomicUsize,
    /// These, and requests whose answers are being sent.
    in_progress: AtomicUsize,
    /// When the first octet came that no request has claimed (HTTP/1 only).
    head_since: AtomicU64,
    /// When the last request ended, or the connection began.
    last_end: AtomicU64,
    /// When octets were last written.
    last_write: AtomicU64,
    protocol: AtomicU8,
    /// Whether a read that finds nothing shall ask the kernel whether that is so.
    ask_kernel: AtomicBool,
    /// What the kernel said: octets wait that the reactor has not reported yet.
    unread: AtomicBool,
}

/// What a connection's time limit is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// The service works on a request, and has time limits of its own: nothing is due, look again.
    Nothing,
    /// There was no request for too long.
    Idle,
    /// A request's header takes too long.
    Header,
    /// The client takes no octet of its answer.
    Stalled,
}

impl Activity {
    /// `http2`: what was agreed during the TLS handshake; `None` to find out from the first octets.
    pub(super) fn new(http2: Option<bool>) -> Arc<Self> {
        let protocol = match http2 {
            None => 0,
            Some(false) => HTTP1,
            Some(true) => HTTP2,
        };
        Arc::new(Self {
            epoch: Instant::now(),
            in_service: AtomicUsize::new(0),
            in_progress: AtomicUsize::new(0),
            head_since: AtomicU64::new(0),
            last_end: AtomicU64::new(1),
            last_write: AtomicU64::new(1),
            protocol: AtomicU8::new(protocol),
            ask_kernel: AtomicBool::new(false),
            unread: AtomicBool::new(false),
        })
    }

    /// The TLS handshake is over: its octets are no request's.
    pub(super) fn handshake_done(&self, http2: bool) {
        self.protocol.store(if http2 { HTTP2 } else { HTTP1 }, Ordering::Relaxed);
        self.head_since.store(0, Ordering::Relaxed);
        self.last_end.store(self.now(), Ordering::Relaxed);
    }

    pub(super) fn is_http2(&self) -> bool {
        self.protocol.load(Ordering::Relaxed) == HTTP2
    }

    /// No request is in progress, nor has one begun to arrive.
    pub(super) fn is_idle(&self) -> bool {
        self.in_progress.load(Ordering::Acquire) == 0 && self.head_since.load(Ordering::Relaxed) == 0
    }

    /// It is idle and, as far as the kernel was asked, nothing waits to be read.
    pub(super) fn is_quiet(&self) -> bool {
        self.is_idle() && !self.unread.load(Ordering::Relaxed)
    }

    /// From now on, let [`Activity::is_quiet`] be the kernel's word.
    pub(super) fn ask_kernel(&self, ask: bool) {
        self.ask_kernel.store(ask, Ordering::Relaxed);
        self.unread.store(false, Ordering::Relaxed);
    }

    /// When the connection's time is up if nothing happens until then, and why.
    pub(super) fn due(&self, limits: &Limits, now: Instant) -> (Instant, Due) {
        let head_since = self.head_since.load(Ordering::Relaxed);
        if self.in_service.load(Ordering::Acquire) > 0 {
            (now + limits.idle_timeout, Due::Nothing)
        } else if self.in_progress.load(Ordering::Acquire) > 0 {
            (self.at(&self.last_write) + limits.idle_timeout, Due::Stalled)
        } else if head_since > 0 {
            (self.at(&self.head_since) + limits.header_timeout, Due::Header)
        } else {
            (self.at(&self.last_end) + limits.idle_timeout, Due::Idle)
        }
    }

    /// When something last moved.
    pub(super) fn last_progress(&self) -> Instant {
        self.at(&self.last_end).max(self.at(&self.last_write))
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_micros()).unwrap_or(u64::MAX - 1) + 1
    }

    fn at(&self, time: &AtomicU64) -> Instant {
        self.epoch + Duration::from_micros(time.load(Ordering::Relaxed).saturating_sub(1))
    }

    fn has_read(&self, octets: &[u8]) {
        let seen = self.protocol.load(Ordering::Relaxed);
        if usize::from(seen) < PREFACE.len() {
            let rest = &PREFACE[usize::from(seen)..];
            let compared = rest.len().min(octets.len());
            let protocol = if rest[..compared] != octets[..compared] {
                HTTP1
            } else if compared == rest.len() {
                HTTP2
            } else {
                // Both are shorter than the preface.
                seen + compared as u8
            };
            self.protocol.store(protocol, Ordering::Relaxed);
        }
        if self.is_http2() {
            // Frames other than requests come and go; hyper limits those of requests by itself.
            self.head_since.store(0, Ordering::Relaxed);
        } else {
            let now = self.now();
            let _ = self.head_since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

/// One request in progress, from its header's last octet until its answer was handed to hyper whole.
#[derive(Debug)]
pub(super) struct InProgress {
    activity: Arc<Activity>,
    in_service: bool,
}

impl InProgress {
    pub(super) fn new(activity: Arc<Activity>) -> Self {
        activity.in_progress.fetch_add(1, Ordering::AcqRel);
        activity.in_service.fetch_add(1, Ordering::AcqRel);
        activity.head_since.store(0, Ordering::Relaxed);
        Self { activity, in_service: true }
    }

    /// The service has answered: from here the client is waited for.
    pub(super) fn answered(&mut self) {
        if std::mem::take(&mut self.in_service) {
            self.activity.last_write.store(self.activity.now(), Ordering::Relaxed);
            self.activity.in_service.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        self.answered();
        // What was read in the meantime was this request's body. hyper has not sent the answer's last octet yet, so a
        // client that waits for it cannot have begun another request.
        self.activity.head_since.store(0, Ordering::Relaxed);
        self.activity.last_end.store(self.activity.now(), Ordering::Relaxed);
        self.activity.in_progress.fetch_sub(1, Ordering::AcqRel);
    }
}

/// An answer's body that keeps its request in progress.
#[derive(Debug)]
pub(super) struct Answer<B> {
    pub(super) body: B,
    pub(super) _request: InProgress,
}

impl<B: Body<Data = Bytes> + Unpin> Body for Answer<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A TCP stream that reports what is read and written, and comes back when it is dropped.
#[derive(Debug)]
pub(super) struct Watched {
    /// `Some` until dropped.
    stream: Option<TcpStream>,
    activity: Arc<Activity>,
    eof: bool,
    back: Option<oneshot::Sender<TcpStream>>,
}

impl Watched {
    /// The receiver gets the stream when whoever reads and writes it is done, unless the client has ended it by then.
    pub(super) fn new(stream: TcpStream, activity: Arc<Activity>) -> (Self, oneshot::Receiver<TcpStream>) {
        let (back, returned) = oneshot::channel();
        (Self { stream: Some(stream), activity, eof: false, back: Some(back) }, returned)
    }

    fn stream(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn wrote(&self, written: usize) -> usize {
        if written > 0 {
            self.activity.last_write.store(self.activity.now(), Ordering::Relaxed);
        }
        written
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let (Some(stream), Some(back), false) = (self.stream.take(), self.back.take(), self.eof) {
            // Nobody may be waiting for it: then it is closed here.
            let _ = back.send(stream);
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        match self.stream()?.poll_read(cx, buf) {
            Poll::Pending => {
                if self.activity.ask_kernel.load(Ordering::Relaxed) {
                    let waiting = unread(self.stream()?.get_mut());
                    self.activity.unread.store(waiting > 0, Ordering::Relaxed);
                }
                Poll::Pending
            }
            Poll::Ready(result) => {
                result?;
                match &buf.filled()[before..] {
                    [] => self.eof = true,
                    octets => self.activity.has_read(octets),
                }
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(self.stream()?.poll_write(cx, buf))?;
        Poll::Ready(Ok(self.wrote(written)))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(self.stream()?.poll_write_vectored(cx, bufs))?;
        Poll::Ready(Ok(self.wrote(written)))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_shutdown(cx)
    }
}

/// How many octets the kernel holds that were not read yet. An error counts as none: the next read will tell.
pub(super) fn unread(stream: &TcpStream) -> u64 {
    rustix::io::ioctl_fionread(stream).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preface_is_recognised_in_any_pieces() {
        for piece in 1..=PREFACE.len() {
            let activity = Activity::new(None);
            for octets in PREFACE.chunks(piece) {
                assert!(!activity.is_http2());
                activity.has_read(octets);
                assert_eq!(activity.is_idle(), activity.is_http2());
            }
            assert!(activity.is_http2());
        }
        let activity = Activity::new(None);
        activity.has_read(b"P");
        activity.has_read(b"OST / HTTP/1.1");
        activity.has_read(PREFACE);
        assert!(!activity.is_http2() && !activity.is_idle());
    }

    #[test]
    fn time_limits_follow_the_request() {
        let limits = Limits {
            header_timeout: Duration::from_secs(100),
            idle_timeout: Duration::from_secs(1000),
            ..Limits::default()
        };
        let activity = Activity::new(None);
        // All that happens here happens within a few seconds; limits are counted from what happened last, not from `now`.
        let later = Instant::now() + Duration::from_secs(500);
        let due = |expected: u64, why: Due| {
            let (at, due) = activity.due(&limits, later);
            let expected = activity.epoch + Duration::from_secs(expected);
            assert!(due == why && at >= expected && at < expected + Duration::from_secs(60), "{due:?} is not {why:?}");
        };
        due(1000, Due::Idle);
        activity.has_read(b"POST / HTTP/1.1\r\n\r\n");
        due(100, Due::Header);
        let mut request = InProgress::new(activity.clone());
        due(500 + 1000, Due::Nothing);
        activity.has_read(b"body");
        due(500 + 1000, Due::Nothing);
        request.answered();
        due(1000, Due::Stalled);
        assert!(!activity.is_idle());
        drop(request);
        assert!(activity.is_idle());
        due(1000, Due::Idle);
    }
}
