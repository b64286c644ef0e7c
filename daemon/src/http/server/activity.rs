//! What is going on on one connection: requests in progress, bytes that no request has claimed, when it last moved.
//!
//! hyper does not tell whether a request is half read or a connection really idle, and a stop that drops nothing depends
//! on just that. So the socket reports bytes, and the service and the answers' bodies report requests.

use std::collections::BTreeSet;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use claviger_hsm::standstill;
use claviger_process::lock::lock;
use hyper::body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant;

use super::limits::Limits;
use crate::sys::places::Guest;

/// What an HTTP/2 client sends first.
pub(super) const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The protocol of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Http1,
    Http2,
}

/// Values of the field `protocol` of [`Activity`]. Smaller values count the received bytes of the preface.
const HTTP1: u8 = 254;
const HTTP2: u8 = 255;

/// Maximum number of unread reply bytes on an HTTP/2 connection. Above it, further requests of the connection wait. It is what
/// a client with the usual window reads in two rounds. HTTP/1.1 has one reply at a time.
const UNREAD: usize = 128 * 1024;

/// What an answer counts as at least: with it hyper keeps a stream and a task.
const LEAST_ANSWER: usize = 4 * 1024;

/// An answer is handed to hyper in parts of so many bytes, a frame of HTTP/2: when hyper lets go of one, the client has taken it.
const PART: usize = 16 * 1024;

/// Requests of a connection that were given up by their client, beyond those that it let be answered, before the connection
/// is closed: a client that resets what it asks for costs more than it pays.
const ABANDONED: usize = 256;

/// The end of an answer that may take as long as its client likes, in microseconds: centuries.
const FOR_EVER: u64 = 1 << 53;

/// The record of one connection. Times are microseconds since `epoch`, plus one; zero is "not".
#[derive(Debug)]
pub(super) struct Activity {
    epoch: Instant,
    /// Requests that the service is working on.
    in_service: AtomicUsize,
    /// Of these, the ones whose bodies are still arriving.
    reading: AtomicUsize,
    /// When the first of these began.
    reading_since: AtomicU64,
    /// Requests in service, those whose answers are being sent, and those that wait for answers to be read.
    in_progress: AtomicUsize,
    /// Whether no request has come yet.
    fresh: AtomicBool,
    /// Whether the server has looked for bytes of its client.
    looked: AtomicBool,
    /// When bytes last came.
    last_read: AtomicU64,
    /// Requests that were answered, and that were given up before.
    answered: AtomicUsize,
    abandoned: AtomicUsize,
    /// Bytes of answers that were not sent yet (HTTP/2 only), and who waits for fewer.
    unread_answers: AtomicUsize,
    answers_read: Notify,
    /// Room for requests that are worked on, whether their client still waits for them or not.
    work: Arc<Semaphore>,
    /// Why it has to be closed, and who is told.
    cut: AtomicU8,
    told: Notify,
    /// When the first octet came that no request has claimed (HTTP/1 only).
    head_since: AtomicU64,
    /// When the last request ended, or the connection began.
    last_end: AtomicU64,
    /// When the client last took a part of an answer, or was to take the first one. Other bytes that are written, such as the
    /// answers to its PING frames, do not count.
    last_taken: AtomicU64,
    unsent: Mutex<Unsent>,
    /// Whether the client must read before more can be written.
    blocked: AtomicBool,
    protocol: AtomicU8,
    /// Whether a read that finds nothing shall ask the kernel whether that is so.
    ask_kernel: AtomicBool,
    /// What the kernel said: bytes wait that the reactor has not reported yet.
    unread: AtomicBool,
    /// The connection's socket, while it is read and written.
    socket: Mutex<Option<TcpStream>>,
    /// Since when it has waited for its turn to be worked for; 0 if it does not.
    in_line_since: AtomicU64,
    /// Requests of HTTP/2 that wait for a turn of their connection, and since when there are any.
    requests_in_line: AtomicUsize,
    requests_in_line_since: AtomicU64,
    /// When it last came to its turn, or to its place.
    turn_since: AtomicU64,
    /// Whether what the client still sends is not worth reading, so that it gets to read the last answer.
    dismissed: AtomicBool,
}

/// Why a connection is closed before its client wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// It waited for its client for longer than all others, and its place is needed.
    Room = 1,
    /// Its address has too many connections; also said of one that was not taken at all.
    Address,
    /// No request came in time.
    Silent,
    /// A request's header took too long.
    Header,
    /// The client does not read its answers.
    Unread,
    /// The client gives up most of what it asks for.
    Resets,
}

impl Cut {
    /// Every reason.
    pub(crate) const ALL: [Self; 6] =
        [Self::Room, Self::Address, Self::Silent, Self::Header, Self::Unread, Self::Resets];

    /// Its name in the metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Room => "room",
            Self::Address => "address",
            Self::Silent => "silent",
            Self::Header => "header",
            Self::Unread => "unread",
            Self::Resets => "resets",
        }
    }
}

/// What a connection's time limit is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// The service works on a request, and has time limits of its own: nothing is due, look again.
    Nothing,
    /// There was no request for too long.
    Idle,
    /// There was never a request, for as long as a header may take.
    Silent,
    /// A request's header takes too long.
    Header,
    /// The client takes no octet of its answer.
    Stalled,
}

impl Activity {
    /// `tls`: the protocol is agreed during the handshake, not found out from the first bytes. At most `requests` requests
    /// are worked on at a time.
    pub(super) fn new(tls: bool, requests: u32) -> Arc<Self> {
        let protocol = if tls { HTTP1 } else { 0 };
        Arc::new(Self {
            epoch: standstill::now().into(),
            in_service: AtomicUsize::new(0),
            reading: AtomicUsize::new(0),
            reading_since: AtomicU64::new(1),
            in_progress: AtomicUsize::new(0),
            fresh: AtomicBool::new(true),
            looked: AtomicBool::new(false),
            last_read: AtomicU64::new(0),
            answered: AtomicUsize::new(0),
            abandoned: AtomicUsize::new(0),
            unread_answers: AtomicUsize::new(0),
            answers_read: Notify::new(),
            work: Arc::new(Semaphore::new(requests as usize)),
            cut: AtomicU8::new(0),
            told: Notify::new(),
            head_since: AtomicU64::new(0),
            last_end: AtomicU64::new(1),
            last_taken: AtomicU64::new(1),
            unsent: Mutex::default(),
            blocked: AtomicBool::new(false),
            protocol: AtomicU8::new(protocol),
            ask_kernel: AtomicBool::new(false),
            unread: AtomicBool::new(false),
            socket: Mutex::new(None),
            in_line_since: AtomicU64::new(0),
            requests_in_line: AtomicUsize::new(0),
            requests_in_line_since: AtomicU64::new(1),
            turn_since: AtomicU64::new(1),
            dismissed: AtomicBool::new(false),
        })
    }

    fn socket(&self) -> MutexGuard<'_, Option<TcpStream>> {
        lock(&self.socket)
    }

    /// Whether the client has closed its side of the connection, as far as the reactor has reported: it sends nothing more, and
    /// may or may not read an answer.
    pub(super) fn client_has_closed(&self) -> bool {
        let socket = self.socket();
        let Some(stream) = &*socket else { return true };
        let ready = std::pin::pin!(stream.ready(Interest::READABLE));
        match ready.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(ready)) => ready.is_read_closed(),
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        }
    }

    /// Says whether it waits for its turn to be worked for.
    pub(super) fn wait_for_turn(&self, waits: bool) {
        let now = self.now();
        if !waits {
            self.turn_since.store(now, Ordering::Release);
        }
        self.in_line_since.store(if waits { now } else { 0 }, Ordering::Release);
    }

    fn waits_for_turn(&self) -> bool {
        self.in_line_since.load(Ordering::Acquire) > 0 || self.requests_in_line.load(Ordering::Acquire) > 0
    }

    /// Whether the service works on a request.
    fn is_worked_for(&self) -> bool {
        self.in_service.load(Ordering::Acquire) > self.reading.load(Ordering::Acquire)
    }

    /// Since when it has waited for its turn, while the service works on nothing for it.
    pub(super) fn in_line_since(&self) -> Option<Instant> {
        let since = match self.in_line_since.load(Ordering::Acquire) {
            0 => &self.requests_in_line_since,
            _ => &self.in_line_since,
        };
        (self.waits_for_turn() && !self.is_worked_for()).then(|| self.at(since))
    }

    /// Says whether what the client still sends after an answer is not worth reading.
    pub(super) fn dismiss(&self, dismissed: bool) {
        self.dismissed.store(dismissed, Ordering::Relaxed);
    }

    /// Whether what the client still sends is not worth reading.
    pub(super) fn is_dismissed(&self) -> bool {
        self.dismissed.load(Ordering::Relaxed)
    }

    /// The TLS handshake is over: its bytes are no request's.
    pub(super) fn handshake_done(&self, http2: bool) {
        self.protocol.store(if http2 { HTTP2 } else { HTTP1 }, Ordering::Relaxed);
        self.head_since.store(0, Ordering::Relaxed);
        self.last_end.store(self.now(), Ordering::Relaxed);
    }

    pub(super) fn is_http2(&self) -> bool {
        self.protocol() == Some(Protocol::Http2)
    }

    /// The client's protocol, if it is known.
    pub(super) fn protocol(&self) -> Option<Protocol> {
        match self.protocol.load(Ordering::Relaxed) {
            HTTP1 => Some(Protocol::Http1),
            HTTP2 => Some(Protocol::Http2),
            _ => None,
        }
    }

    /// Returns whether data waits to be written until the client reads.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked.load(Ordering::Relaxed)
    }

    /// When the last request ended, or the connection began.
    pub(super) fn last_end(&self) -> Instant {
        self.at(&self.last_end)
    }

    /// No request is in progress, nor has one begun to arrive.
    pub(super) fn is_idle(&self) -> bool {
        self.in_progress.load(Ordering::Acquire) == 0 && self.head_since.load(Ordering::Relaxed) == 0
    }

    /// It is idle and, as far as the kernel was asked, nothing waits to be read.
    pub(super) fn is_quiet(&self) -> bool {
        self.is_idle() && !self.unread.load(Ordering::Relaxed)
    }

    /// Whether something waits to be read, as far as the kernel was asked.
    pub(super) fn has_unread(&self) -> bool {
        self.unread.load(Ordering::Relaxed)
    }

    /// From now on, let [`Activity::is_quiet`] be the kernel's word.
    pub(super) fn ask_kernel(&self, ask: bool) {
        self.ask_kernel.store(ask, Ordering::Relaxed);
        self.unread.store(false, Ordering::Relaxed);
    }

    /// When the connection's time is up if nothing happens until then, and why.
    pub(super) fn due(&self, limits: &Limits, now: Instant) -> (Instant, Due) {
        let due = self.due_next(limits, now);
        let unsent = lock(&self.unsent).first().map(|end| self.time(end));
        // The other requests of a connection, whatever becomes of them, win no time for an answer that is not read.
        unsent.filter(|end| *end < due.0).map_or(due, |end| (end, Due::Stalled))
    }

    fn due_next(&self, limits: &Limits, now: Instant) -> (Instant, Due) {
        let head_since = self.head_since.load(Ordering::Relaxed);
        if self.in_service.load(Ordering::Acquire) > 0 {
            (now + limits.idle_timeout, Due::Nothing)
        } else if self.in_progress.load(Ordering::Acquire) > 0 {
            (self.at(&self.last_taken) + limits.idle_timeout, Due::Stalled)
        } else if head_since > 0 {
            (self.at(&self.head_since) + limits.header_timeout, Due::Header)
        } else if self.fresh.load(Ordering::Relaxed) {
            (self.at(&self.last_end) + limits.header_timeout.min(limits.idle_timeout), Due::Silent)
        } else {
            (self.at(&self.last_end) + limits.idle_timeout, Due::Idle)
        }
    }

    /// When something last moved.
    pub(super) fn last_progress(&self) -> Instant {
        self.at(&self.last_end).max(self.at(&self.last_taken))
    }

    /// Since when the service has had nothing to do for it but wait for its client.
    fn waiting_since(&self) -> Option<Instant> {
        // A server that is behind has new connections that it has not looked at.
        let is_new = !self.looked.load(Ordering::Relaxed);
        if is_new || self.is_worked_for() || self.waits_for_turn() {
            return None;
        }
        let since = if self.reading.load(Ordering::Acquire) > 0 {
            &self.reading_since
        } else if self.in_progress.load(Ordering::Acquire) > 0 {
            &self.last_taken
        } else if self.head_since.load(Ordering::Relaxed) > 0 {
            &self.head_since
        } else {
            &self.last_end
        };
        // Before its turn it was not the client that was waited for.
        Some(self.at(since).max(self.at(&self.turn_since)))
    }

    /// Closes the connection. A reason that was given before stands.
    pub(super) fn cut(&self, reason: Cut) {
        let _ = self.cut.compare_exchange(0, reason as u8, Ordering::AcqRel, Ordering::Relaxed);
        self.told.notify_one();
    }

    /// Ends when the connection has to be closed.
    pub(super) async fn told_to_close(&self) -> Cut {
        loop {
            self.told.notified().await;
            let reason = self.cut.swap(0, Ordering::AcqRel);
            if let Some(reason) = Cut::ALL.into_iter().find(|known| *known as u8 == reason) {
                return reason;
            }
        }
    }

    /// Whether it has been told to close and has not looked yet.
    #[cfg(test)]
    pub(super) fn is_told_to_close(&self) -> bool {
        self.cut.load(Ordering::Acquire) > 0
    }

    /// Whether bytes have come within a time.
    pub(super) fn has_read_within(&self, time: Duration) -> bool {
        let last = self.last_read.load(Ordering::Relaxed);
        last > 0 && self.time(last) + time > self.time(self.now())
    }

    /// The server looks for bytes of its client.
    pub(super) fn look(&self) {
        self.looked.store(true, Ordering::Relaxed);
    }

    /// Whether it may be closed to make room.
    pub(super) fn may_be_closed(&self) -> bool {
        self.waiting_since().is_some()
    }

    /// Room to work on one more request; waits for it.
    pub(super) async fn room_to_work(&self) -> Option<OwnedSemaphorePermit> {
        // It is never closed.
        Arc::clone(&self.work).acquire_owned().await.ok()
    }

    /// Whether so many answers are unread that no more should be made.
    pub(super) fn reads_too_little(&self) -> bool {
        self.unread_answers.load(Ordering::Acquire) >= UNREAD
    }

    /// Ends when few enough answers are unread.
    pub(super) async fn reads(&self) {
        loop {
            let read = self.answers_read.notified();
            let mut read = std::pin::pin!(read);
            read.as_mut().enable();
            if !self.reads_too_little() {
                return;
            }
            read.await;
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(standstill::since(self.epoch.into_std()).as_micros()).unwrap_or(u64::MAX - 1) + 1
    }

    fn at(&self, time: &AtomicU64) -> Instant {
        self.time(time.load(Ordering::Relaxed))
    }

    fn time(&self, time: u64) -> Instant {
        self.epoch + Duration::from_micros(time.saturating_sub(1))
    }

    /// Bytes have arrived.
    pub(super) fn has_read(&self, octets: &[u8]) {
        let now = self.now();
        self.last_read.store(now, Ordering::Relaxed);
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
            let _ = self.head_since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

impl Guest for Arc<Activity> {
    fn waiting_since(&self) -> Option<std::time::Instant> {
        Activity::waiting_since(self).map(Instant::into_std)
    }

    fn in_line_since(&self) -> Option<std::time::Instant> {
        Activity::in_line_since(self).map(Instant::into_std)
    }

    fn ask_to_leave(&self) {
        self.cut(Cut::Room);
    }
}

/// A body that is being read: meanwhile it is the client that is waited for.
#[derive(Debug)]
pub(super) struct Reading(Arc<Activity>);

impl Reading {
    pub(super) fn new(activity: Arc<Activity>) -> Self {
        if activity.reading.fetch_add(1, Ordering::AcqRel) == 0 {
            activity.reading_since.store(activity.now(), Ordering::Relaxed);
        }
        Self(activity)
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.reading.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A request of HTTP/2 that waits for a turn of its connection.
#[derive(Debug)]
pub(super) struct RequestInLine(Arc<Activity>);

impl RequestInLine {
    pub(super) fn new(activity: Arc<Activity>) -> Self {
        if activity.requests_in_line.fetch_add(1, Ordering::AcqRel) == 0 {
            activity.requests_in_line_since.store(activity.now(), Ordering::Relaxed);
        }
        Self(activity)
    }
}

impl Drop for RequestInLine {
    fn drop(&mut self) {
        if self.0.requests_in_line.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.turn_since.store(self.0.now(), Ordering::Release);
        }
    }
}

/// One request in progress, from its header's last octet until its answer was handed to hyper whole.
#[derive(Debug)]
pub(super) struct InProgress {
    activity: Arc<Activity>,
    in_service: bool,
    was_answered: bool,
}

impl InProgress {
    /// The request has come; the service does not work on it yet.
    pub(super) fn new(activity: Arc<Activity>) -> Self {
        if activity.in_progress.fetch_add(1, Ordering::AcqRel) == 0 {
            // From here, what was written before says nothing about how long the client has been waited for.
            activity.last_taken.store(activity.now(), Ordering::Relaxed);
        }
        activity.fresh.store(false, Ordering::Relaxed);
        activity.head_since.store(0, Ordering::Relaxed);
        Self { activity, in_service: false, was_answered: false }
    }

    /// The service begins with it.
    pub(super) fn begin(&mut self) {
        self.in_service = true;
        self.activity.in_service.fetch_add(1, Ordering::AcqRel);
    }

    /// The service has answered: from here the client is waited for.
    pub(super) fn answered(&mut self) {
        self.was_answered = true;
        self.activity.answered.fetch_add(1, Ordering::Relaxed);
        self.end_service();
    }

    fn end_service(&mut self) {
        if std::mem::take(&mut self.in_service) {
            self.activity.last_taken.store(self.activity.now(), Ordering::Relaxed);
            self.activity.in_service.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        self.end_service();
        if !self.was_answered && self.activity.is_http2() {
            let abandoned = self.activity.abandoned.fetch_add(1, Ordering::Relaxed) + 1;
            if abandoned > ABANDONED + self.activity.answered.load(Ordering::Relaxed) {
                self.activity.cut(Cut::Resets);
            }
        }
        // What was read in the meantime was this request's body. hyper has not sent the answer's last octet yet, so a
        // client that waits for it cannot have begun another request.
        self.activity.head_since.store(0, Ordering::Relaxed);
        self.activity.last_end.store(self.activity.now(), Ordering::Relaxed);
        self.activity.in_progress.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The answers of a connection that were not sent to their ends.
#[derive(Debug, Default)]
struct Unsent {
    /// When each of them has to be, with its number.
    ends: BTreeSet<(u64, u64)>,
    bytes: u64,
    answers: u64,
}

impl Unsent {
    /// Adds an answer, which has to be sent in `idle_timeout` and the time that all of them take at `rate` bytes a second.
    fn add(&mut self, length: u64, now: u64, idle_timeout: Duration, rate: u64) -> (u64, u64) {
        self.bytes += length;
        self.answers += 1;
        let idle_timeout = u64::try_from(idle_timeout.as_micros()).unwrap_or(u64::MAX);
        let end = match self.bytes.saturating_mul(1_000_000).checked_div(rate) {
            Some(at_this_rate) => now.saturating_add(idle_timeout).saturating_add(at_this_rate),
            None => FOR_EVER,
        };
        self.ends.insert((end.min(FOR_EVER), self.answers));
        (end.min(FOR_EVER), self.answers)
    }

    fn remove(&mut self, end: (u64, u64), length: u64) {
        self.ends.remove(&end);
        self.bytes -= length;
    }

    fn first(&self) -> Option<u64> {
        self.ends.first().map(|(end, _)| *end)
    }
}

/// The entry of an answer until all its parts were sent, or are not going to be.
#[derive(Debug)]
struct Sending {
    activity: Arc<Activity>,
    end: (u64, u64),
    length: u64,
}

impl Sending {
    fn new(activity: &Arc<Activity>, length: u64, limits: &Limits) -> Arc<Self> {
        let end = lock(&activity.unsent).add(length, activity.now(), limits.idle_timeout, limits.body_rate);
        Arc::new(Self { activity: activity.clone(), end, length })
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        lock(&self.activity.unsent).remove(self.end, self.length);
    }
}

/// A part of an answer that was not sent yet. hyper lets go of it when it is.
struct Unread {
    part: Bytes,
    counted: usize,
    answer: Arc<Sending>,
}

impl Unread {
    fn bytes(part: Bytes, answer: &Arc<Sending>) -> Bytes {
        let counted = part.len().max(LEAST_ANSWER);
        answer.activity.unread_answers.fetch_add(counted, Ordering::AcqRel);
        Bytes::from_owner(Self { part, counted, answer: answer.clone() })
    }
}

impl AsRef<[u8]> for Unread {
    fn as_ref(&self) -> &[u8] {
        &self.part
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let activity = &self.answer.activity;
        activity.last_taken.store(activity.now(), Ordering::Relaxed);
        activity.unread_answers.fetch_sub(self.counted, Ordering::AcqRel);
        activity.answers_read.notify_waiters();
    }
}

/// An answer's body, in parts, that keeps its request in progress.
#[derive(Debug)]
pub(super) struct Answer<B> {
    body: B,
    /// What is left of a frame of the body.
    rest: Bytes,
    sending: Arc<Sending>,
    _request: InProgress,
}

impl<B: Body<Data = Bytes>> Answer<B> {
    pub(super) fn new(body: B, request: InProgress, limits: &Limits) -> Self {
        let sending = Sending::new(&request.activity, body.size_hint().lower(), limits);
        Self { body, rest: Bytes::new(), sending, _request: request }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Answer<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.rest.is_empty() {
            let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(cx)) else { return Poll::Ready(None) };
            match frame?.into_data() {
                Ok(data) => self.rest = data,
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        }
        let part = self.rest.len().min(PART);
        let part = self.rest.split_to(part);
        Poll::Ready(Some(Ok(Frame::data(Unread::bytes(part, &self.sending)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (body, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut hint = SizeHint::new();
        hint.set_lower(body.lower() + rest);
        if let Some(upper) = body.upper() {
            hint.set_upper(upper + rest);
        }
        hint
    }
}

/// A TCP stream that reports what is read and written, and comes back when it is dropped. The stream itself is kept with the
/// connection's activity, where others may look at it.
#[derive(Debug)]
pub(super) struct Watched {
    activity: Arc<Activity>,
    eof: bool,
    back: Option<oneshot::Sender<TcpStream>>,
}

impl Watched {
    /// The receiver gets the stream when whoever reads and writes it is done, unless the client has ended it by then.
    pub(super) fn new(stream: TcpStream, activity: Arc<Activity>) -> (Self, oneshot::Receiver<TcpStream>) {
        let (back, returned) = oneshot::channel();
        *activity.socket() = Some(stream);
        (Self { activity, eof: false, back: Some(back) }, returned)
    }

    fn with<T>(&self, work: impl FnOnce(Pin<&mut TcpStream>) -> Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match &mut *self.activity.socket() {
            Some(stream) => work(Pin::new(stream)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn wrote(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.activity.blocked.store(written.is_pending(), Ordering::Relaxed);
        written
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let stream = self.activity.socket().take();
        if let (Some(stream), Some(back), false) = (stream, self.back.take(), self.eof) {
            // Nobody may be waiting for it: then it is closed here.
            let _ = back.send(stream);
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        self.activity.look();
        match self.with(|stream| stream.poll_read(cx, buf)) {
            Poll::Pending => {
                if self.activity.ask_kernel.load(Ordering::Relaxed) {
                    let waiting = self.activity.socket().as_ref().map_or(0, unread);
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
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.wrote(self.with(|stream| stream.poll_write(cx, buf)))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.wrote(self.with(|stream| stream.poll_write_vectored(cx, bufs)))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_shutdown(cx))
    }
}

/// How many bytes the kernel holds that were not read yet. An error counts as none: the next read will tell.
pub(super) fn unread(stream: &TcpStream) -> u64 {
    rustix::io::ioctl_fionread(stream).unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_preface_is_recognised_in_any_pieces() {
        for piece in 1..=PREFACE.len() {
            let activity = Activity::new(false, 8);
            for octets in PREFACE.chunks(piece) {
                assert!(!activity.is_http2());
                activity.has_read(octets);
                assert_eq!(activity.is_idle(), activity.is_http2());
            }
            assert!(activity.is_http2());
        }
        let activity = Activity::new(false, 8);
        activity.has_read(b"P");
        activity.has_read(b"OST / HTTP/1.1");
        activity.has_read(&PREFACE);
        assert!(!activity.is_http2() && !activity.is_idle());
    }

    #[test]
    fn time_limits_follow_the_request() {
        let limits = Limits {
            header_timeout: Duration::from_secs(100),
            idle_timeout: Duration::from_secs(1000),
            ..Limits::default()
        };
        let activity = Activity::new(false, 8);
        // All that happens here happens within a few seconds; limits are counted from what happened last, not from `now`.
        let later = Instant::now() + Duration::from_secs(500);
        let due = |expected: u64, why: Due| {
            let (at, due) = activity.due(&limits, later);
            let expected = activity.epoch + Duration::from_secs(expected);
            assert!(due == why && at >= expected && at < expected + Duration::from_secs(60), "{due:?} is not {why:?}");
        };
        // A connection that says nothing has as long as a header may take.
        due(100, Due::Silent);
        activity.has_read(b"POST / HTTP/1.1\r\n\r\n");
        due(100, Due::Header);
        let mut request = InProgress::new(activity.clone());
        due(1000, Due::Stalled);
        request.begin();
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

    #[test]
    fn a_connection_waits_for_its_client_unless_the_service_works() {
        let activity = Activity::new(false, 8);
        assert!(!activity.may_be_closed(), "the server has not looked at it");
        activity.look();
        assert!(activity.may_be_closed());
        activity.has_read(b"POST / HTTP/1.1\r\n\r\n");
        assert!(activity.may_be_closed());
        let mut request = InProgress::new(activity.clone());
        request.begin();
        assert!(!activity.may_be_closed());
        let reading = Reading::new(activity.clone());
        let since = activity.waiting_since();
        assert!(since.is_some());
        // Another request of the same client is worked on.
        let mut other = InProgress::new(activity.clone());
        other.begin();
        assert!(!activity.may_be_closed());
        other.answered();
        assert_eq!(activity.waiting_since(), since);
        drop((reading, other));
        assert!(!activity.may_be_closed());
        request.answered();
        assert!(activity.may_be_closed());
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_connection_waited_for_its_turn_is_no_wait_for_its_client() {
        let activity = Activity::new(false, 8);
        activity.look();
        activity.has_read(b"POST / HTTP/1.1\r\n");
        activity.wait_for_turn(true);
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(Activity::waiting_since(&activity), None);
        activity.wait_for_turn(false);
        // It has the moment that every newcomer has.
        assert_eq!(Activity::waiting_since(&activity), Some(Instant::now()), "it has no time of its own");
        // The same for requests of HTTP/2, which wait apart from their connection.
        let mut request = InProgress::new(activity.clone());
        request.begin();
        let waits = (Reading::new(activity.clone()), RequestInLine::new(activity.clone()));
        let begun = Instant::now();
        tokio::time::advance(Duration::from_secs(5)).await;
        let state = || (Activity::waiting_since(&activity), Activity::in_line_since(&activity));
        assert_eq!(state(), (None, Some(begun)));
        drop(waits);
        assert_eq!(state(), (None, None), "it is worked for");
        request.answered();
        assert_eq!(state(), (Some(Instant::now()), None));
    }

    #[tokio::test]
    async fn answers_that_are_not_read_are_counted_until_they_are_sent() {
        let activity = Activity::new(false, 8);
        let answer = Sending::new(&activity, 5, &Limits::default());
        let mut parts: Vec<_> = (0..100).map(|_| Unread::bytes(Bytes::from_static(b"small"), &answer)).collect();
        assert!(activity.reads_too_little());
        let waiting = tokio::spawn({
            let activity = activity.clone();
            async move { activity.reads().await }
        });
        tokio::task::yield_now().await;
        parts.truncate(UNREAD / LEAST_ANSWER);
        tokio::task::yield_now().await;
        assert!(activity.reads_too_little() && !waiting.is_finished());
        assert_eq!(parts.pop().unwrap(), "small");
        waiting.await.unwrap();
        drop(parts);
        assert_eq!(activity.unread_answers.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_client_that_gives_up_all_it_asks_for_is_cut() {
        let activity = Activity::new(false, 8);
        activity.has_read(&PREFACE);
        for _ in 0..10 {
            InProgress::new(activity.clone()).answered();
        }
        for _ in 0..ABANDONED + 10 {
            drop(InProgress::new(activity.clone()));
        }
        assert_eq!(activity.cut.load(Ordering::Relaxed), 0);
        drop(InProgress::new(activity.clone()));
        assert_eq!(activity.told_to_close().await, Cut::Resets);
    }
}
