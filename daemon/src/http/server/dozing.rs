//! A connection that releases its buffers while its client sends nothing.
//!
//! hyper keeps 16 KiB of buffers for each HTTP/1.1 connection for as long as the connection exists. An idle
//! connection needs no buffers. So hyper's part is dropped, and created again when the next byte arrives.
//!
//! ```text
//!           first bytes                     stop, too idle
//!   Asleep ─────────────▶ Http1 ──┐    Asleep ──▶ Closing ──▶ end
//!      ▲    │              │      └──▶ end (hyper closes it)
//!      │    └──▶ Http2 ──▶ end
//!      └──── doze ─────────┘
//! ```

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use hyper::body::{Body, Incoming};
use hyper::server::conn::{http1, http2};
use hyper::service::HttpService;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::activity::{Activity, PREFACE, Protocol};

/// The error type that hyper allows for bodies.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The settings of hyper for the two protocols.
#[derive(Clone)]
pub(super) struct Builders {
    pub(super) http1: http1::Builder,
    pub(super) http2: http2::Builder<TokioExecutor>,
}

/// One connection. `I` transports the bytes, and `S` answers the requests.
pub(super) struct Dozing<'a, I, S>
where
    S: HttpService<Incoming>,
{
    builders: &'a Builders,
    activity: Arc<Activity>,
    state: State<I, S>,
}

type Stream<I> = TokioIo<Begun<I>>;

enum State<I, S>
where
    S: HttpService<Incoming>,
{
    /// The client has sent nothing, or too little to detect its protocol.
    Asleep(Begun<I>, S),
    Http1(Box<http1::Connection<Stream<I>, S>>),
    Http2(Pin<Box<http2::Connection<Stream<I>, S, TokioExecutor>>>),
    Closing(Begun<I>),
    Ended,
}

impl<'a, I, S, B> Dozing<'a, I, S>
where
    I: AsyncRead + AsyncWrite + Unpin,
    S: HttpService<Incoming, ResBody = B>,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    /// `activity` knows the protocol already, or detects it from the bytes that are read.
    pub(super) fn new(builders: &'a Builders, activity: Arc<Activity>, stream: I, service: S) -> Self {
        let state = State::Asleep(Begun { beginning: Bytes::new(), stream }, service);
        let mut connection = Self { builders, activity, state };
        if connection.activity.is_http2() {
            // In HTTP/2, the server sends its first frame without waiting for the client.
            connection.wake(Protocol::Http2);
        }
        connection
    }

    /// Serves requests. Ends when the connection is closed.
    ///
    /// # Errors
    /// The connection broke, or its client does not keep to the protocol.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        loop {
            let ended = match &mut self.state {
                State::Asleep(stream, _) => match ready!(listen(stream, &self.activity, cx)) {
                    Ok(Some(protocol)) => {
                        self.wake(protocol);
                        continue;
                    }
                    Ok(None) => Ok(()),
                    Err(error) => Err(error.into()),
                },
                State::Http1(connection) => ready!(Pin::new(connection).poll(cx)).map_err(Into::into),
                State::Http2(connection) => ready!(connection.as_mut().poll(cx)).map_err(Into::into),
                State::Closing(stream) => ready!(Pin::new(&mut stream.stream).poll_shutdown(cx)).map_err(Into::into),
                State::Ended => return Poll::Ready(Ok(())),
            };
            self.state = State::Ended;
            return Poll::Ready(ended);
        }
    }

    /// Returns whether hyper's part can be dropped once the connection has been idle for a while.
    pub(super) fn may_doze(&self) -> bool {
        matches!(self.state, State::Http1(_)) && self.activity.is_idle() && !self.activity.is_blocked()
    }

    /// Drops hyper's part if the connection is idle. The connection must be polled afterwards.
    pub(super) fn doze(&mut self) {
        if !self.may_doze() {
            return;
        }
        let State::Http1(connection) = std::mem::replace(&mut self.state, State::Ended) else { return };
        let parts = connection.into_parts();
        let mut stream = parts.io.into_inner();
        let begun = !parts.read_buf.is_empty();
        if begun {
            // The start of another request arrived together with the last one.
            self.activity.has_read(&parts.read_buf);
            let mut beginning = BytesMut::from(&parts.read_buf[..]);
            beginning.extend_from_slice(&stream.beginning);
            stream.beginning = beginning.freeze();
        }
        self.state = State::Asleep(stream, parts.service);
        if begun {
            self.wake(Protocol::Http1);
        }
    }

    /// Closes the connection after the accepted requests are answered.
    pub(super) fn graceful_shutdown(&mut self) {
        match &mut self.state {
            State::Http1(connection) => Pin::new(&mut **connection).graceful_shutdown(),
            State::Http2(connection) => connection.as_mut().graceful_shutdown(),
            State::Closing(_) | State::Ended => {}
            State::Asleep(..) => {
                if let State::Asleep(stream, _) = std::mem::replace(&mut self.state, State::Ended) {
                    self.state = State::Closing(stream);
                }
            }
        }
    }

    fn wake(&mut self, protocol: Protocol) {
        if let State::Asleep(stream, service) = std::mem::replace(&mut self.state, State::Ended) {
            let stream = TokioIo::new(stream);
            self.state = match protocol {
                Protocol::Http1 => State::Http1(Box::new(self.builders.http1.serve_connection(stream, service))),
                Protocol::Http2 => State::Http2(Box::pin(self.builders.http2.serve_connection(stream, service))),
            };
        }
    }
}

/// Reads until the protocol is known. `None` if the client ends the connection before that.
fn listen<I: AsyncRead + Unpin>(
    begun: &mut Begun<I>,
    activity: &Activity,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Option<Protocol>>> {
    loop {
        let mut bytes = [0; PREFACE.len()];
        let mut read = ReadBuf::new(&mut bytes);
        ready!(Pin::new(&mut begun.stream).poll_read(cx, &mut read))?;
        if read.filled().is_empty() {
            return Poll::Ready(Ok(None));
        }
        let mut beginning = BytesMut::from(&begun.beginning[..]);
        beginning.extend_from_slice(read.filled());
        begun.beginning = beginning.freeze();
        if let Some(protocol) = activity.protocol() {
            return Poll::Ready(Ok(Some(protocol)));
        }
    }
}

/// A stream whose first bytes were already read.
struct Begun<I> {
    beginning: Bytes,
    stream: I,
}

impl<I: AsyncRead + Unpin> AsyncRead for Begun<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.beginning.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let read = self.beginning.len().min(buf.remaining());
        buf.put_slice(&self.beginning[..read]);
        self.beginning.advance(read);
        if self.beginning.is_empty() {
            // Releases the memory of these bytes.
            self.beginning = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Begun<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
