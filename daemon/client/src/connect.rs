//! Makes a connection that is ready for requests: name lookup, TCP, TLS, HTTP/1.1. Each step has its own deadline.

use std::error::Error;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::base_url::BaseUrl;
use crate::endpoint::Endpoint;
use crate::error::{ClientError, Step};
use crate::tls::{TlsSettings, trusting_nobody};
use crate::trust::{TlsFault, tls_error};

/// Longest time for the TCP connection, even if the request has more time left.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest time for the TLS handshake.
const TLS: Duration = Duration::from_secs(10);
/// Time to wait for the reason of a server that closed a connection without a reply.
const REASON: Duration = Duration::from_secs(1);

/// Longest time for each step of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Deadlines {
    /// Name lookup and TCP connection, for all addresses of the name together.
    pub connect: Duration,
    /// The TLS handshake.
    pub tls: Duration,
    /// From sending the request to the first byte of the reply.
    pub first_byte: Duration,
    /// From the first byte of the reply to the last.
    pub body: Duration,
    /// All steps together. Includes a second connection if the server had closed the first one.
    pub total: Duration,
}

impl Deadlines {
    /// Deadlines for a request that may take `total`. A server that does not accept connections is detected before
    /// `total` is over.
    #[must_use]
    pub fn within(total: Duration) -> Self {
        Self { connect: CONNECT.min(total), tls: TLS.min(total), ..Self::together(total) }
    }

    /// Sets only the deadline for all steps together.
    #[must_use]
    pub fn together(total: Duration) -> Self {
        Self { connect: total, tls: total, first_byte: total, body: total, total }
    }

    fn of(&self, step: Step) -> Duration {
        match step {
            Step::Connect => self.connect,
            Step::Tls => self.tls,
            Step::FirstByte => self.first_byte,
            Step::Body => self.body,
        }
    }
}

/// The time left for the steps of one request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    deadlines: Deadlines,
    begun: Instant,
}

impl Clock {
    pub(crate) fn start(deadlines: Deadlines) -> Self {
        Self { deadlines, begun: Instant::now() }
    }

    /// Runs a step until its own deadline or the deadline of the request, whichever is sooner.
    pub(crate) async fn step<T>(
        &self,
        server: &str,
        step: Step,
        work: impl Future<Output = T>,
    ) -> Result<T, ClientError> {
        let (own, total) = (self.deadlines.of(step), self.deadlines.total);
        let left = total.saturating_sub(self.begun.elapsed());
        let (time, limit) = if own < left { (own, own) } else { (left, total) };
        let late = |_| ClientError::Timeout { server: server.to_owned(), step, limit };
        tokio::time::timeout(time, work).await.map_err(late)
    }
}

/// A connection that carries one request at a time.
pub(crate) type Connection = SendRequest<Full<Bytes>>;

/// Makes connections to one server.
#[derive(Debug)]
pub(crate) struct Connector {
    authority: String,
    host: String,
    endpoint: Endpoint,
    tls: Option<Tls>,
}

struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
    /// `true` if the client shows a certificate when the server asks for one.
    identified: bool,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("name", &self.name).field("identified", &self.identified).finish_non_exhaustive()
    }
}

impl Connector {
    /// Makes a connector without connecting. Blocks on the files of `settings`.
    pub(crate) fn new(url: &BaseUrl, given: &str, settings: &TlsSettings) -> Result<Self, ClientError> {
        let tls = if url.secure {
            let config = settings.config()?.ok_or_else(|| ClientError::NoTrust { url: given.to_owned() })?;
            let name = ServerName::try_from(url.host.clone())
                .map_err(|error| ClientError::Url { url: given.to_owned(), problem: error.to_string() })?;
            Some(Tls { connector: TlsConnector::from(Arc::new(config)), name, identified: settings.has_identity() })
        } else {
            None
        };
        Ok(Self {
            authority: url.authority.clone(),
            host: url.host.clone(),
            endpoint: Endpoint::new(url.host.clone(), url.port),
            tls,
        })
    }

    /// Host and port of the server.
    pub(crate) fn authority(&self) -> &str {
        &self.authority
    }

    /// Makes a new connection.
    pub(crate) async fn connect(&self, clock: Clock) -> Result<Connection, ClientError> {
        let stream = self.tcp(clock).await?;
        match &self.tls {
            None => self.http(stream).await,
            Some(tls) => self.http(self.secured(tls, stream, clock).await?).await,
        }
    }

    async fn tcp(&self, clock: Clock) -> Result<TcpStream, ClientError> {
        let connecting = self.endpoint.connect(clock.deadlines.connect.min(clock.deadlines.total));
        let connected = clock.step(&self.authority, Step::Connect, connecting).await?;
        connected.map_err(|source| ClientError::Connect { server: self.authority.clone(), source })
    }

    async fn secured(&self, tls: &Tls, stream: TcpStream, clock: Clock) -> Result<TlsStream<TcpStream>, ClientError> {
        let handshake = tls.connector.connect(tls.name.clone(), stream);
        let secured = clock.step(&self.authority, Step::Tls, handshake).await?;
        secured.map_err(|error| self.no_tls(TlsFault::of(&error, tls.identified)))
    }

    async fn http(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Result<Connection, ClientError> {
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(&error))?;
        tokio::spawn(async move {
            // The request on this connection reports the same error.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a client's connection broke");
            }
        });
        Ok(sender)
    }

    fn no_tls(&self, fault: TlsFault) -> ClientError {
        ClientError::Tls { server: self.authority.clone(), fault }
    }

    /// Builds the error of a failed exchange. A TLS error is preferred, because it explains more than the HTTP error.
    pub(crate) fn broken(&self, error: &hyper::Error) -> ClientError {
        let io = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
        if let (Some(tls), Some(io)) = (&self.tls, io)
            && tls_error(io).is_some()
        {
            return self.no_tls(TlsFault::of(io, tls.identified));
        }
        // The text of a hyper error is short; its source explains more.
        let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
        ClientError::Broken { server: self.authority.clone(), problem: format!("{error}{cause}") }
    }

    /// Finds the reason why a server closed a new connection without a reply, if the configuration is the reason.
    /// Either the server speaks TLS and the URL does not say so, or the server rejected the client's certificate after
    /// the handshake and its alert was lost. Connects once more and sends no request.
    pub(crate) async fn reason(&self, clock: Clock) -> Option<ClientError> {
        let stream = self.tcp(clock).await.ok()?;
        match &self.tls {
            None => {
                let name = ServerName::try_from(self.host.clone()).ok()?;
                let connector = TlsConnector::from(Arc::new(trusting_nobody().ok()?));
                let refused = tokio::time::timeout(REASON, connector.connect(name, stream)).await.ok()?.err()?;
                let speaks = matches!(
                    tls_error(&refused),
                    Some(
                        rustls::Error::InvalidCertificate(_)
                            | rustls::Error::AlertReceived(_)
                            | rustls::Error::PeerIncompatible(_)
                    )
                );
                speaks.then(|| ClientError::SpeaksTls { server: self.authority.clone() })
            }
            Some(tls) => {
                let mut stream = match self.secured(tls, stream, clock).await {
                    Ok(stream) => stream,
                    Err(error @ ClientError::Tls { .. }) => return Some(error),
                    Err(_) => return None,
                };
                // A server that accepts the client sends nothing before it receives a request.
                let said = tokio::time::timeout(REASON, stream.read_u8()).await.ok()?.err()?;
                tls_error(&said)?;
                Some(self.no_tls(TlsFault::of(&said, tls.identified)))
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn the_sooner_of_two_deadlines_is_told() {
        let missed = async |deadlines: Deadlines| {
            let late = Clock::start(deadlines).step("server", Step::Connect, std::future::pending::<()>()).await;
            late.unwrap_err().to_string()
        };
        let all = Deadlines::within(60 * SECOND);
        assert_eq!((all.connect, all.tls, all.first_byte), (CONNECT, TLS, 60 * SECOND));
        assert_eq!(missed(all).await, "server did not accept a connection within 5s");
        let hasty = Deadlines::within(2 * SECOND);
        assert_eq!((hasty.connect, hasty.total), (2 * SECOND, 2 * SECOND));
        assert_eq!(missed(Deadlines { total: SECOND, ..all }).await, "server did not accept a connection within 1s");
    }
}
