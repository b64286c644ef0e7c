//! The HTTP/1.1 client of hosts, tenants, the load generator and tests, with or without TLS.
//!
//! The client keeps idle connections in a small pool of its own. The pool never opens a connection while it takes an
//! idle one, so a caller that measures time knows what a request waited for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use claviger_process::lock::lock;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER};
use hyper::{HeaderMap, Method, Request, StatusCode};

use crate::base_url::BaseUrl;
use crate::connect::{Clock, Connection, Connector};
use crate::error::Step;

pub use crate::connect::Deadlines;
pub use crate::error::ClientError;
pub use crate::tls::TlsSettings;

/// Longest time for a request and its reply, unless [`Client::with_deadlines`] sets another.
pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Largest reply in bytes, unless [`Client::reading`] sets another limit.
pub const REPLY_LIMIT: usize = 32 * 1024 * 1024;

/// Most idle connections in the pool, unless [`Client::keeping`] sets another limit.
const KEPT: usize = 64;

/// The reply of a server.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The status. Every status is a valid reply here, including errors.
    pub status: StatusCode,
    /// The header fields.
    pub headers: HeaderMap,
    /// The whole body.
    pub body: Bytes,
}

impl Reply {
    /// The seconds of the `Retry-After` header. The protocol does not use the other form, a date.
    #[must_use]
    pub fn retry_after(&self) -> Option<u16> {
        self.headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()
    }
}

/// A client of one server. Many requests may run at the same time, each on its own connection.
///
/// If a request on an idle connection ends without a reply, the client sends it once more on a new connection, because
/// a server may close idle connections at any time. So a request may arrive twice. This is safe for everything that the
/// daemon serves over HTTP.
#[derive(Debug)]
pub struct Client {
    connector: Connector,
    /// Prefix of every path.
    prefix: String,
    deadlines: Deadlines,
    /// Largest reply, in bytes.
    reply_limit: usize,
    /// Most connections in `idle`.
    keeps: usize,
    idle: Mutex<Vec<Connection>>,
    /// `true` if the server has replied once, or the reason for its silence was looked up. The reason is looked up only
    /// once.
    known: AtomicBool,
}

/// An exchange that failed.
enum Failed {
    /// No byte of the reply arrived.
    Unanswered(ClientError),
    Answered(ClientError),
}

impl From<Failed> for ClientError {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Unanswered(error) | Failed::Answered(error) => error,
        }
    }
}

impl Client {
    /// Makes a client of the server at `base_url`, such as `http://127.0.0.1:8080`. Sends no request yet.
    ///
    /// # Errors
    /// [`ClientError::Url`]; [`ClientError::NoTrust`] for `https://`.
    pub fn new(base_url: &str) -> Result<Self, ClientError> {
        Self::with_tls(base_url, &TlsSettings::default())
    }

    /// Makes a client that also supports `https://`. The server's certificate must come from an authority in
    /// `settings`; no other authority is trusted. Blocks on files.
    ///
    /// # Errors
    /// [`ClientError`]: the URL or a file in `settings` is unusable.
    pub fn with_tls(base_url: &str, settings: &TlsSettings) -> Result<Self, ClientError> {
        let url = BaseUrl::parse(base_url)?;
        Ok(Self {
            connector: Connector::new(&url, base_url, settings)?,
            prefix: url.prefix,
            deadlines: Deadlines::within(DEFAULT_TIMEOUT),
            reply_limit: REPLY_LIMIT,
            keeps: KEPT,
            idle: Mutex::new(Vec::new()),
            known: AtomicBool::new(false),
        })
    }

    /// Limits the time of every request, from the connection to the last byte of the reply. The steps get the limits of
    /// [`Deadlines::within`].
    #[must_use]
    pub fn with_timeout(self, total: Duration) -> Self {
        self.with_deadlines(Deadlines::within(total))
    }

    /// Sets the limit of each step of a request.
    #[must_use]
    pub fn with_deadlines(mut self, deadlines: Deadlines) -> Self {
        self.deadlines = deadlines;
        self
    }

    /// Sets the largest reply, in bytes.
    #[must_use]
    pub fn reading(mut self, bytes: usize) -> Self {
        self.reply_limit = bytes;
        self
    }

    /// Sets the most idle connections that are kept open.
    #[must_use]
    pub fn keeping(mut self, connections: usize) -> Self {
        self.keeps = connections;
        self
    }

    /// The host of the server, and its port if the URL names one. Used in messages.
    #[must_use]
    pub fn server(&self) -> &str {
        self.connector.authority()
    }

    /// Sends a GET request. `path` starts with a slash and may have a query.
    ///
    /// # Errors
    /// [`ClientError`] if there is no reply.
    pub async fn get(&self, path: &str) -> Result<Reply, ClientError> {
        self.request(Method::GET, path, None, Bytes::new()).await
    }

    /// Posts `body` to `path`, which starts with a slash.
    ///
    /// # Errors
    /// [`ClientError`] if there is no reply.
    pub async fn post(&self, path: &str, content_type: &str, body: impl Into<Bytes>) -> Result<Reply, ClientError> {
        self.request(Method::POST, path, Some(content_type), body.into()).await
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: Bytes,
    ) -> Result<Reply, ClientError> {
        let clock = Clock::start(self.deadlines);
        let request = self.written(method, path, content_type, body)?;
        // This is outside the `if let`, because a scrutinee would hold the lock for the whole body.
        let kept = self.kept();
        if let Some(connection) = kept {
            match self.exchange(connection, request.clone(), clock).await {
                Err(Failed::Unanswered(_)) => {}
                done => return Ok(done?),
            }
        }
        let connection = self.connector.connect(clock).await?;
        match self.exchange(connection, request, clock).await {
            Ok(reply) => {
                self.known.store(true, Ordering::Relaxed);
                Ok(reply)
            }
            Err(Failed::Unanswered(error @ ClientError::Broken { .. }))
                if !self.known.swap(true, Ordering::Relaxed) =>
            {
                Err(self.connector.reason(clock).await.unwrap_or(error))
            }
            Err(failed) => Err(failed.into()),
        }
    }

    fn written(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, ClientError> {
        let target = format!("{}{path}", self.prefix);
        let bad = |problem: String| ClientError::Url { url: format!("http://{}{target}", self.server()), problem };
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = target.parse().map_err(|error: hyper::http::uri::InvalidUri| bad(error.to_string()))?;
        let value = |text: &str| HeaderValue::from_str(text).map_err(|error| bad(error.to_string()));
        request.headers_mut().insert(HOST, value(self.server())?);
        if let Some(content_type) = content_type {
            request.headers_mut().insert(CONTENT_TYPE, value(content_type)?);
        }
        Ok(request)
    }

    async fn exchange(
        &self,
        mut connection: Connection,
        request: Request<Full<Bytes>>,
        clock: Clock,
    ) -> Result<Reply, Failed> {
        let sent = async {
            connection.ready().await?;
            connection.send_request(request).await
        };
        let answered = clock.step(self.server(), Step::FirstByte, sent).await.map_err(Failed::Answered)?;
        let unanswered = |error: hyper::Error| Failed::Unanswered(self.connector.broken(&error));
        let (head, body) = answered.map_err(unanswered)?.into_parts();
        let body = Limited::new(body, self.reply_limit).collect();
        let body = clock.step(self.server(), Step::Body, body).await.map_err(Failed::Answered)?;
        let body = body.map_err(|error| {
            let server = self.server().to_owned();
            Failed::Answered(if error.is::<LengthLimitError>() {
                ClientError::TooLarge { server, limit: self.reply_limit }
            } else {
                ClientError::Broken { server, problem: "its answer broke off".to_owned() }
            })
        })?;
        self.keep(connection);
        Ok(Reply { status: head.status, headers: head.headers, body: body.to_bytes() })
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        lock(&self.idle)
    }

    fn kept(&self) -> Option<Connection> {
        let mut idle = self.idle();
        // The newest connection comes first: the server is least likely to have closed it.
        std::iter::from_fn(|| idle.pop()).find(|connection| !connection.is_closed())
    }

    fn keep(&self, connection: Connection) {
        let mut idle = self.idle();
        if idle.len() < self.keeps && !connection.is_closed() {
            idle.push(connection);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::self_signed;
    use claviger_protocol::rsa_key::RsaPrivateKey;
    use hyper::body::Incoming;
    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper::{Response, Version};
    use std::convert::Infallible;
    use std::net::SocketAddr;
    use std::path::Path;

    use hyper_util::rt::{TokioIo, TokioTimer};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// Replies with what it received: method, path, content type and body, and the port of the client.
    async fn echo(port: u16, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        assert_eq!(request.version(), Version::HTTP_11);
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let answer = match head.uri.path() {
            "/large" => Bytes::from(vec![0; REPLY_LIMIT + 1]),
            "/slow" => {
                tokio::time::sleep(Duration::from_secs(5)).await;
                Bytes::new()
            }
            _ => {
                let header = |name| head.headers.get(name).map_or("-", |value: &HeaderValue| value.to_str().unwrap());
                let text = format!("{} {} {} ", head.method, head.uri, header("content-type"));
                [text.as_bytes(), &body].concat().into()
            }
        };
        let mut response = Response::new(Full::new(answer));
        *response.status_mut() = StatusCode::IM_A_TEAPOT;
        response.headers_mut().insert("x-port", port.into());
        Ok(response)
    }

    /// Starts a server that closes connections after `idle` without a request.
    async fn start(idle: Duration) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, peer) = listener.accept().await.unwrap();
                let mut http = http1::Builder::new();
                http.timer(TokioTimer::new()).header_read_timeout(idle);
                let service = service_fn(move |request| echo(peer.port(), request));
                tokio::spawn(http.serve_connection(TokioIo::new(stream), service));
            }
        });
        address
    }

    fn port(reply: &Reply) -> &HeaderValue {
        &reply.headers["x-port"]
    }

    #[tokio::test]
    async fn requests_are_answered_on_a_connection_that_is_kept() {
        let address = start(DEFAULT_TIMEOUT).await;
        let client = Client::new(&format!("http://localhost:{}/base/", address.port())).unwrap();
        let first = client.post("/path?query", "text/plain", "body").await.unwrap();
        assert_eq!(first.status, StatusCode::IM_A_TEAPOT);
        assert_eq!(first.body, "POST /base/path?query text/plain body");
        let second = client.get("/").await.unwrap();
        assert_eq!(second.body, "GET /base/ - ");
        assert_eq!(port(&first), port(&second), "another connection");
        // Two requests at the same time need two connections.
        let (one, two) = tokio::join!(client.get("/"), client.get("/"));
        assert_ne!(port(&one.unwrap()), port(&two.unwrap()));
    }

    #[tokio::test]
    async fn a_kept_connection_that_the_server_closed_is_no_error() {
        let address = start(Duration::from_millis(100)).await;
        let client = Client::new(&format!("http://{address}")).unwrap();
        let first = client.get("/").await.unwrap();
        for pause in [100, 101, 102, 300] {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            client.post("/", "text/plain", "again").await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_ne!(port(&first), port(&client.get("/").await.unwrap()));
    }

    /// Starts a server that reads what arrives, sends `said`, and keeps every connection open.
    async fn stuck(said: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let mut open = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.read_u8().await.unwrap();
                stream.write_all(said).await.unwrap();
                open.push(stream);
            }
        });
        address
    }

    #[tokio::test]
    async fn each_step_has_its_deadline() {
        let ca = RsaPrivateKey::generate(2048).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        std::fs::write(&file, self_signed("ca", &ca).to_pem()).unwrap();
        let (short, long) = (Duration::from_millis(200), Duration::from_secs(600));
        let deadlines = Deadlines::together(long);
        let silent = stuck(b"").await;
        let begun = stuck(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbegun").await;
        for (url, deadlines, step, words) in [
            (
                format!("https://{silent}"),
                Deadlines { tls: short, ..deadlines },
                Step::Tls,
                "did not finish the TLS handshake",
            ),
            (
                format!("http://{silent}"),
                Deadlines { first_byte: short, ..deadlines },
                Step::FirstByte,
                "did not answer",
            ),
            (
                format!("http://{begun}"),
                Deadlines { body: short, ..deadlines },
                Step::Body,
                "did not finish its answer",
            ),
            // The deadline of the whole request applies if it is sooner.
            (format!("http://{silent}"), Deadlines { total: short, ..deadlines }, Step::FirstByte, "did not answer"),
        ] {
            let client = Client::with_tls(&url, &TlsSettings::trusting(&file)).unwrap().with_deadlines(deadlines);
            let error = client.get("/").await.unwrap_err();
            let said = error.to_string();
            assert!(matches!(error, ClientError::Timeout { step: missed, .. } if missed == step), "{said}");
            assert!(said.ends_with(&format!("{words} within 200ms")), "{said}");
        }
    }

    #[tokio::test]
    async fn a_client_certificate_is_read_whole_or_explained() {
        let folder = tempfile::tempdir().unwrap();
        let [ca, own, key, other] = ["ca.pem", "own.pem", "own.key", "other.key"].map(|name| folder.path().join(name));
        let keys = [0, 1].map(|_| RsaPrivateKey::generate(2048).unwrap());
        std::fs::write(&ca, self_signed("ca", &keys[0]).to_pem()).unwrap();
        std::fs::write(&own, self_signed("own", &keys[0]).to_pem()).unwrap();
        for (file, of) in [(&key, &keys[0]), (&other, &keys[1])] {
            crate::files::write(file, of.to_pkcs8_pem().as_bytes(), crate::files::Existing::Keep).unwrap();
        }
        let made = |certificate: &Path, key: &Path| {
            let settings = TlsSettings::trusting(&ca).showing(certificate, key);
            Client::with_tls("https://host", &settings).map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(made(&own, &key), Ok(()));
        for (certificate, key, words) in [
            (&key, &key, "--client-certificate: "),
            (&own, &own, "--client-key: "),
            (&own, &other, "cannot be used together: the key is not that of the certificate"),
        ] {
            let said = made(certificate, key).unwrap_err();
            assert!(said.contains(words), "{said}");
        }
    }

    #[tokio::test]
    async fn failures_say_what_to_do() {
        let untrusting = Client::new("https://host").unwrap_err().to_string();
        assert!(untrusting.contains("use --ca FILE or --system-ca"), "{untrusting}");
        let nowhere = Client::with_tls("https://host", &TlsSettings::trusting("/nowhere.pem")).unwrap_err().to_string();
        assert!(nowhere.starts_with("--ca: /nowhere.pem: No such file"), "{nowhere}");
        let address = start(DEFAULT_TIMEOUT).await;
        let client = Client::new(&format!("http://{address}")).unwrap().with_timeout(Duration::from_millis(300));
        let message = client.get("/slow").await.unwrap_err().to_string();
        assert_eq!(message, format!("{address} did not answer within 300ms"));
        let client = client.with_timeout(DEFAULT_TIMEOUT);
        assert!(matches!(client.get("/large").await, Err(ClientError::TooLarge { .. })));
        assert!(matches!(client.get("no slash").await, Err(ClientError::Url { .. })));
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let free = nobody.local_addr().unwrap();
        drop(nobody);
        let message = Client::new(&format!("http://{free}")).unwrap().get("/").await.unwrap_err().to_string();
        assert!(message.starts_with(&format!("no connection to {free}: ")), "{message}");
    }
}
