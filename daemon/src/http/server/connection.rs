//! One connection, from its acceptance to its close.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use claviger_hsm::standstill;
use hyper::body::{Body, Incoming};
use hyper::header::{CONNECTION, HeaderValue};
use hyper::server::conn::{http1, http2};
use hyper::service::Service;
use hyper::{Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

use super::activity::{Activity, Answer, Cut, Due, InProgress, Reading, RequestInLine, Watched, unread};
use super::dozing::{BoxError, Builders, Dozing};
use super::limits::Limits;
use super::origin::{Origin, Peer};
use super::ration::{Account, Charged, Meter, Ration};
use super::slot::Slot;
use crate::request::{ClientCertificate, Network};
use crate::sys::places;
use crate::tls::SharedTls;

/// What the connections are told about a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Serving,
    /// Requests are taken until this time.
    Draining(Instant),
    /// Every connection ends now.
    Cut,
}

/// Largest header of a request, in bytes; also how much of a body is read, and of an answer is buffered, at once. Every
/// connection and every stream may take so much before anybody knows who is at its other end.
const BUFFER: usize = 16 * 1024;

/// Connections whose clients read so little that further requests wait, at most. What these requests have sent of their bodies
/// waits, too.
const CONGESTED: usize = 256;

/// How long a client has to catch up with reading when there are as many of these as there may be.
const CATCH_UP: Duration = Duration::from_secs(1);

/// Streams that a client may reset before their requests were looked at; beyond, the connection ends. hyper's own default,
/// named here because the bound matters.
const RESETS_UNSEEN: usize = 20;

/// The same for streams that are reset here, for what their client did wrong.
const RESETS_HERE: usize = 64;

/// Time for which a connection must be idle before its memory is released. It is shorter than most pauses of a client
/// that sends requests occasionally, and longer than the pauses of a busy client.
const DOZE: Duration = Duration::from_millis(200);

/// How soon to look again at bytes that the kernel has and the reactor has not reported.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// How long a client may take to read an answer that was sent before its request was read to the end.
const LINGER: Duration = Duration::from_secs(1);

/// How many bytes of such a request are read and thrown away.
const LINGER_OCTETS: u64 = 16 * 1024 * 1024;

/// What all connections of a listener have in common.
pub(super) struct Server<S> {
    limits: Limits,
    tls: Option<SharedTls>,
    builders: Builders,
    service: Arc<S>,
    phase: watch::Receiver<Phase>,
    congested: Arc<Semaphore>,
    ration: Arc<Ration>,
}

impl<S, B> Server<S>
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Send + Sync + 'static,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    pub(super) fn new(limits: Limits, tls: Option<SharedTls>, service: S, phase: watch::Receiver<Phase>) -> Self {
        let mut http1 = http1::Builder::new();
        http1
            .timer(TokioTimer::new())
            // hyper's own limit runs while a connection is idle, too; `Activity` tells the two apart.
            .header_read_timeout(None)
            // A client that has sent its request and closed its side still gets its answer.
            .half_close(true)
            .max_buf_size(BUFFER);
        let mut http2 = http2::Builder::new(TokioExecutor::new());
        http2
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.streams)
            .max_pending_accept_reset_streams(RESETS_UNSEEN)
            .max_local_error_reset_streams(RESETS_HERE)
            .max_header_list_size(BUFFER as u32)
            // Of an answer that is not read, no more than this is copied.
            .max_send_buf_size(BUFFER)
            // Batches are large, and hosts may be far away. A client may send so much that nobody asked for.
            .initial_stream_window_size(256 * 1024)
            .initial_connection_window_size(256 * 1024);
        let ration = Ration::new(limits.unproven_time_percent, limits.shortest());
        Self {
            limits,
            ration,
            tls,
            builders: Builders { http1, http2 },
            service: Arc::new(service),
            phase,
            congested: Arc::new(Semaphore::new(CONGESTED)),
        }
    }

    /// The processor time of all connections.
    #[cfg(test)]
    pub(super) fn ration(&self) -> &Ration {
        &self.ration
    }

    /// What is to be known of a connection that begins now.
    pub(super) fn activity(&self) -> Arc<Activity> {
        Activity::new(self.tls.is_some(), self.limits.streams)
    }

    /// Whether new connections of this address would have to wait for their turn.
    pub(super) fn is_in_debt(&self, peer: SocketAddr) -> bool {
        self.ration.is_in_debt(&Network::of(peer.ip()))
    }

    /// Charges an address for a connection that was accepted and is not served.
    pub(super) fn charge_for_accepting(&self, peer: SocketAddr) {
        Account::open(&self.ration, Network::of(peer.ip()));
    }

    /// Serves one connection until it is closed.
    pub(super) async fn serve(&self, stream: TcpStream, peer: SocketAddr, activity: Arc<Activity>, slot: &Slot) {
        // Answers are written whole: waiting for more to send would only delay them.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "TCP_NODELAY cannot be set");
        }
        let account = Account::open(&self.ration, Network::of(peer.ip()));
        let mut meter = Meter::new(account.clone(), activity.clone());
        let Some(tls) = &self.tls else {
            let (stream, returned) = Watched::new(stream, activity.clone());
            let client = Client { peer, certificate: None, account };
            if self.drive(stream, &activity, client, meter, slot).await {
                self.linger(returned.await.ok(), &activity).await;
            }
            return;
        };
        let acceptor = TlsAcceptor::from(Arc::clone(&tls.load().config));
        let (stream, returned) = Watched::new(stream, activity.clone());
        let mut stop = self.phase.clone();
        let mut handshake = pin!(acceptor.accept(stream));
        let shaken = {
            let handshake = poll_fn(|cx| meter.poll(cx, |cx| handshake.as_mut().poll(cx)));
            // What the client waits for its turns does not count in its time.
            let begun = standstill::now();
            let due = || begun + self.limits.header_timeout + account.waits();
            let mut handshake = pin!(standstill::timeout_by(due, handshake));
            let mut has_stayed = false;
            loop {
                tokio::select! {
                    biased;
                    shaken = &mut handshake => break shaken,
                    () = cut(&mut stop) => return,
                    reason = activity.told_to_close() => {
                        // What came too late for the server, and not for the client, was read by now. Once: a client that
                        // sends a byte now and then is not to stay for ever.
                        if reason == Cut::Room && !has_stayed && activity.has_read_within(places::GRACE) {
                            has_stayed = true;
                            slot.stay();
                            continue;
                        }
                        return slot.cut(reason);
                    }
                }
            }
        };
        let stream = match shaken {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return tracing::debug!(%peer, %error, "the TLS handshake failed"),
            Err(_) => {
                slot.cut(Cut::Header);
                return tracing::debug!(%peer, "the TLS handshake took too long");
            }
        };
        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        activity.handshake_done(http2);
        let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let certificate = shown.map(|certificate| Arc::new(ClientCertificate::read(certificate)));
        let client = Client { peer, certificate, account };
        if self.drive(stream, &activity, client, meter, slot).await {
            self.linger(returned.await.ok(), &activity).await;
        }
    }

    /// Drives hyper's connection, its time limits and its part of a stop. Returns whether hyper ended it, not we.
    async fn drive(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        activity: &Arc<Activity>,
        client: Client,
        mut meter: Meter,
        slot: &Slot,
    ) -> bool {
        enum Event {
            /// hyper is done with it.
            Ended(Result<(), BoxError>),
            /// No request is in progress, and the kernel has no unread bytes of one.
            Quiet,
            /// The connection's state, or the time limit for it, has changed.
            Changed,
            /// A time limit is reached.
            Time,
            /// The server told this connection to close.
            Told(Cut),
        }

        let mut phase = self.phase.clone();
        let peer = client.peer;
        let account = client.account.clone();
        let service = Watching {
            limits: self.limits.clone(),
            service: self.service.clone(),
            activity: activity.clone(),
            phase: phase.clone(),
            congested: self.congested.clone(),
            client,
            connection: slot.connection(),
        };
        let mut connection = Dozing::new(&self.builders, activity.clone(), stream, service);
        let mut timer = pin!(tokio::time::sleep(self.limits.header_timeout));
        // Set by a stop: until when requests are taken.
        let mut grace: Option<Instant> = None;
        // Whether it is to be closed at the next moment that it is quiet.
        let mut last_call = false;
        // When hyper was told to close it.
        let mut closing: Option<Instant> = None;
        loop {
            match *phase.borrow_and_update() {
                Phase::Serving => {}
                Phase::Draining(until) => grace = Some(until),
                Phase::Cut => return false,
            }
            if grace.is_some() && closing.is_none() && activity.is_http2() {
                // GOAWAY is safe at any time: HTTP/2 tells the client which requests were taken.
                connection.graceful_shutdown();
                closing = Some(clock());
            }
            if last_call && grace.is_none() && !activity.is_idle() {
                // It was to be closed for being idle, and no longer is.
                last_call = false;
                activity.ask_kernel(false);
            }
            let now = clock();
            let due = activity.due(&self.limits, now).0;
            let wake = match (closing, grace) {
                (Some(since), _) => self.closed_by(since, activity, now),
                (None, _) if last_call && activity.is_idle() => now + LOOK_AGAIN,
                (None, Some(grace)) if !last_call => due.min(grace),
                (None, _) => due,
            };
            let wake = match closing {
                None if connection.may_doze() => wake.min(activity.last_end() + DOZE),
                _ => wake,
            };
            // The timer's clock is the system's.
            timer.as_mut().reset(Instant::now() + wake.saturating_duration_since(now));

            // What decides whether a connection may be closed has to be seen at once.
            let at_once = last_call || grace.is_some();
            let mut poll = |connection: &mut Dozing<'_, _, _>, cx: &mut Context<'_>| match at_once {
                true => account.charged(|| connection.poll(cx)),
                false => meter.poll(cx, |cx| connection.poll(cx)),
            };
            let event = tokio::select! {
                biased;
                event = poll_fn(|cx| match poll(&mut connection, cx) {
                    Poll::Ready(ended) => Poll::Ready(Event::Ended(ended)),
                    Poll::Pending if closing.is_some() => Poll::Pending,
                    Poll::Pending if last_call && activity.is_quiet() => Poll::Ready(Event::Quiet),
                    Poll::Pending if grace.is_some() && activity.is_http2() => Poll::Ready(Event::Changed),
                    // A connection that is past its time is looked at again when the timer says so: what is due lies in the past,
                    // and would be found again and again without a pause.
                    Poll::Pending
                        if !(last_call && activity.is_idle()) && activity.due(&self.limits, now).0 < wake =>
                    {
                        Poll::Ready(Event::Changed)
                    }
                    Poll::Pending if connection.may_doze() && activity.last_end() + DOZE < wake => {
                        Poll::Ready(Event::Changed)
                    }
                    Poll::Pending => Poll::Pending,
                }) => event,
                Ok(()) = phase.changed() => Event::Changed,
                reason = activity.told_to_close() => Event::Told(reason),
                () = &mut timer => Event::Time,
            };
            match event {
                Event::Ended(ended) => {
                    if let Err(error) = ended {
                        tracing::debug!(%peer, %error, "the connection broke");
                    }
                    return true;
                }
                Event::Quiet => {
                    connection.graceful_shutdown();
                    closing = Some(clock());
                }
                Event::Changed => {}
                Event::Told(reason) => {
                    // While it waits for its turn, nothing is done for it, whatever it has sent.
                    if reason == Cut::Room && activity.in_line_since().is_none() {
                        // It may be the server that is behind: what the kernel has is asked for once more.
                        activity.ask_kernel(true);
                        let poll = poll_fn(|cx| Poll::Ready(account.charged(|| connection.poll(cx)).is_ready()));
                        let polled = poll.await;
                        let stays = !activity.may_be_closed() || activity.has_unread();
                        activity.ask_kernel(last_call);
                        if polled {
                            return true;
                        }
                        if stays {
                            slot.stay();
                            continue;
                        }
                    }
                    tracing::debug!(%peer, reason = reason.as_str(), "the connection is cut");
                    slot.cut(reason);
                    return false;
                }
                // Anything may have happened since the timer was set: only what is due now counts.
                Event::Time if let Some(since) = closing => {
                    let now = clock();
                    if self.closed_by(since, activity, now) <= now {
                        tracing::debug!(%peer, "the client did not let the connection end: cut");
                        return false;
                    }
                }
                Event::Time => {
                    let now = clock();
                    if connection.may_doze() && activity.last_end() + DOZE <= now {
                        connection.doze();
                    }
                    let (due, why) = activity.due(&self.limits, now);
                    match why {
                        Due::Header | Due::Stalled if due <= now => {
                            tracing::debug!(%peer, ?why, "the client took too long: cut");
                            slot.cut(if why == Due::Header { Cut::Header } else { Cut::Unread });
                            return false;
                        }
                        Due::Silent if due <= now => {
                            if !last_call {
                                slot.cut(Cut::Silent);
                            }
                            last_call = true;
                        }
                        Due::Idle if due <= now => last_call = true,
                        _ => {}
                    }
                    if grace.is_some_and(|grace| grace <= now) {
                        last_call = true;
                    }
                    if last_call {
                        activity.ask_kernel(true);
                    }
                }
            }
        }
    }

    /// When a connection that hyper was told to close at `since` has to be closed.
    fn closed_by(&self, since: Instant, activity: &Activity, now: Instant) -> Instant {
        if activity.is_idle() {
            since.max(activity.last_progress()) + self.limits.header_timeout
        } else {
            activity.due(&self.limits, now).0
        }
    }

    /// Lets the client read our last answer. Closing a socket with unread bytes in it resets the connection, and a
    /// reset makes the client's kernel throw away what we sent. A connection that has to make room does not linger.
    async fn linger(&self, stream: Option<TcpStream>, activity: &Activity) {
        let Some(mut stream) = stream else { return };
        let stopping = *self.phase.borrow() != Phase::Serving;
        if stopping && unread(&stream) == 0 {
            return;
        }
        let mut octets = Vec::with_capacity(16 * 1024);
        let mut left = LINGER_OCTETS;
        let dismissed = activity.is_dismissed();
        let discard = async {
            if dismissed {
                // It reads the answer beside its writing, or not at all.
                let _ = stream.shutdown().await;
                std::future::pending::<()>().await;
            }
            while left > 0 {
                octets.clear();
                match stream.read_buf(&mut octets).await {
                    Ok(0) | Err(_) => return,
                    Ok(read) => left = left.saturating_sub(read as u64),
                }
            }
        };
        tokio::select! {
            _ = standstill::timeout(LINGER, discard) => {}
            _ = activity.told_to_close() => {}
        }
    }
}

/// The clock of all time limits here.
fn clock() -> Instant {
    standstill::now().into()
}

/// Ends when every connection has to.
async fn cut(phase: &mut watch::Receiver<Phase>) {
    // An error means that the server is gone.
    let _ = phase.wait_for(|phase| *phase == Phase::Cut).await;
}

/// Who is at the other end of a connection.
#[derive(Clone)]
struct Client {
    peer: SocketAddr,
    certificate: Option<Arc<ClientCertificate>>,
    account: Arc<Account>,
}

/// The service as one connection sees it: what it is doing shows in the connection's activity.
struct Watching<S> {
    limits: Limits,
    service: Arc<S>,
    activity: Arc<Activity>,
    phase: watch::Receiver<Phase>,
    congested: Arc<Semaphore>,
    client: Client,
    connection: u64,
}

impl<S, B> Service<Request<Incoming>> for Watching<S>
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Send + Sync + 'static,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Answer<B>>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        let mut in_progress = InProgress::new(self.activity.clone());
        let activity = self.activity.clone();
        let (service, congested, phase) = (self.service.clone(), self.congested.clone(), self.phase.clone());
        let (client, connection, limits) = (self.client.clone(), self.connection, self.limits.clone());
        Box::pin(async move {
            if activity.reads_too_little() {
                // More answers would only take memory. Nor may too many connections come to this.
                match congested.try_acquire() {
                    Ok(_place) => activity.reads().await,
                    // A client that only reads slowly gets a moment before its requests are cut with the connection.
                    Err(_) if standstill::timeout(CATCH_UP, activity.reads()).await.is_err() => {
                        activity.cut(Cut::Unread);
                        std::future::pending::<()>().await;
                    }
                    Err(_) => {}
                }
            }
            let work = activity.room_to_work().await;
            in_progress.begin();
            let http1 = request.version() <= Version::HTTP_11;
            let account = client.account.clone();
            // A request of HTTP/1.1 was read within the turn that its connection waited for, and there is one at a time.
            if !http1 && !account.may_begin() {
                // Meanwhile nothing is done for it. A stop answers what was accepted before its time is up.
                let (_waits, _in_line) = (Reading::new(activity.clone()), RequestInLine::new(activity.clone()));
                let mut phase = phase.clone();
                tokio::select! {
                    () = account.turn_to_begin() => {}
                    _ = phase.wait_for(|phase| *phase != Phase::Serving) => {}
                }
            }
            request.extensions_mut().insert(Peer(client.peer));
            if let Some(certificate) = client.certificate {
                request.extensions_mut().insert(certificate);
            }
            request.extensions_mut().insert(Origin::new(connection, activity, client.account, work));
            // On the heap: as long as a request waits here, it is not to take what the work on it will.
            let answering = Box::pin(service.call(request));
            let mut response = match http1 {
                // The connection itself is charged, which does this work.
                true => answering.await?,
                false => Charged::new(answering, account).await?,
            };
            in_progress.answered();
            if http1 && *phase.borrow() != Phase::Serving {
                // hyper closes the connection after an answer that says so.
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok(response.map(|body| Answer::new(body, in_progress, &limits)))
        })
    }
}
