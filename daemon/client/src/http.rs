//! A small HTTP/1.1 client for our own command line, plain or over TLS.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::{HeaderMap, Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use crate::endpoint::{ConnectError, Endpoint};
use crate::trust::{self, AuthorityError, TlsFault};

/// Largest answer that is read, in octets.
pub const REPLY_LIMIT: usize = 32 * 1024 * 1024;

/// How long a request and its answer may take, unless [`Client::with_timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Most connections that are kept open while idle.
const KEPT: usize = 64;

/// A server's answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Its status. Every status is an answer, none is an error here.
    pub status: StatusCode,
    /// Its header fields.
    pub headers: HeaderMap,
    /// Its whole body.
    pub body: Bytes,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The URL cannot be used.
    #[error("{url:?} cannot be used: {problem}; write it like http://host:8080")]
    Url {
        /// The URL as it was given.
        url: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The file of trusted certificates cannot be used.
    #[error("--ca: {0}")]
    Ca(#[from] AuthorityError),
    /// TLS cannot be set up.
    #[error("TLS cannot be set up: {0}")]
    Setup(rustls::Error),
    /// The server did not prove itself, or does not speak TLS.
    #[error("no TLS with {server}: {fault}")]
    Tls {
        /// Host and port.
        server: String,
        /// What is wrong, and what to do.
        fault: TlsFault,
    },
    /// No connection to the server.
    #[error("no connection to {server}: {source}; does it run there?")]
    Connect {
        /// Host and port.
        server: String,
        /// Why, for each address of the host.
        source: ConnectError,
    },
    /// The time was up.
    #[error("{server} did not answer within {timeout:?}")]
    Timeout {
        /// Host and port.
        server: String,
        /// What it had.
        timeout: Duration,
    },
    /// The server closed the connection, or does not speak HTTP.
    #[error("{server} did not answer: {problem}")]
    Broken {
        /// Host and port.
        server: String,
        /// What happened.
        problem: String,
    },
    /// The answer is longer than [`REPLY_LIMIT`].
    #[error("the answer of {server} is longer than {REPLY_LIMIT} octets")]
    TooLarge {
        /// Host and port.
        server: String,
    },
}

/// A client of one server. Requests may run at the same time; connections are kept and used again.
///
/// A request on a kept connection that ends without an answer is sent once more on a new one: the server may close what
/// is idle at any time. So it may arrive twice, which nothing that this daemon serves over HTTP minds.
#[derive(Debug)]
pub struct Client {
    /// For `Host` and for messages.
    authority: String,
    endpoint: Endpoint,
    /// Goes before every path: empty, or starts with a slash and ends without one.
    prefix: String,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    timeout: Duration,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

/// An exchange that failed.
enum Failed {
    /// Without an answer's first octet.
    Unanswered(ClientError),
    Answered(ClientError),
}

impl Client {
    /// A client of the server at `base_url`, such as `http://127.0.0.1:8080`. Nothing is sent yet.
    ///
    /// # Errors
    /// [`ClientError::Url`].
    pub fn new(base_url: &str) -> Result<Self, ClientError> {
        Self::trusting(base_url, None)
    }

    /// The same, also for `https://`, where the server has to prove itself to the certificates in `ca` (PEM): there is
    /// no other trust. Blocks on the file.
    ///
    /// # Errors
    /// [`ClientError::Url`], [`ClientError::Ca`].
    pub fn trusting(base_url: &str, ca: Option<&Path>) -> Result<Self, ClientError> {
        let bad = |problem: &str| ClientError::Url { url: base_url.to_owned(), problem: problem.to_owned() };
        let uri: Uri = base_url.parse().map_err(|error: hyper::http::uri::InvalidUri| bad(&error.to_string()))?;
        let secure = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad("it starts with neither http:// nor https://")),
        };
        if uri.query().is_some() {
            return Err(bad("it has a query"));
        }
        let authority = uri.authority().ok_or_else(|| bad("it names no host"))?;
        let host = authority.host();
        if host.is_empty() || authority.as_str().contains('@') {
            return Err(bad("it names no host, or a user"));
        }
        // An IPv6 address stands in brackets only inside a URL.
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let tls = match (secure, ca) {
            (false, _) => None,
            (true, None) => return Err(bad("TLS needs to know whom to trust: say --ca FILE")),
            (true, Some(ca)) => {
                let name = ServerName::try_from(host.clone()).map_err(|error| bad(&error.to_string()))?;
                Some((Arc::new(tls_config(ca)?), name))
            }
        };
        Ok(Self {
            authority: authority.to_string(),
            endpoint: Endpoint::new(host, authority.port_u16().unwrap_or(if secure { 443 } else { 80 })),
            prefix: uri.path().trim_end_matches('/').to_owned(),
            tls,
            timeout: DEFAULT_TIMEOUT,
            idle: Mutex::new(Vec::new()),
        })
    }

    /// Gives every request, from the connection to the answer's last octet, this much time.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The server's host, and its port if the URL names one: for messages.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.authority
    }

    /// Asks for `path` (with its query), which starts with a slash.
    ///
    /// # Errors
    /// [`ClientError`], when there is no answer.
    pub async fn get(&self, path: &str) -> Result<Reply, ClientError> {
        self.request(Method::GET, path, None, Bytes::new()).await
    }

    /// Sends `body` to `path`, which starts with a slash.
    ///
    /// # Errors
    /// [`ClientError`], when there is no answer.
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
        let target = format!("{}{path}", self.prefix);
        let bad = |problem: String| ClientError::Url { url: format!("http://{}{target}", self.authority), problem };
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = target.parse().map_err(|error: hyper::http::uri::InvalidUri| bad(error.to_string()))?;
        let value = |text: &str| HeaderValue::from_str(text).map_err(|error| bad(error.to_string()));
        request.headers_mut().insert(HOST, value(&self.authority)?);
        if let Some(content_type) = content_type {
            request.headers_mut().insert(CONTENT_TYPE, value(content_type)?);
        }
        let exchange = async {
            // Taken outside of `if let`, whose scrutinee would keep the lock for its whole body.
            let kept = self.kept();
            if let Some(sender) = kept {
                match self.exchange(sender, request.clone()).await {
                    Err(Failed::Unanswered(_)) => {}
                    Ok(reply) => return Ok(reply),
                    Err(Failed::Answered(error)) => return Err(error),
                }
            }
            match self.exchange(self.connect().await?, request).await {
                Ok(reply) => Ok(reply),
                Err(Failed::Unanswered(error) | Failed::Answered(error)) => Err(error),
            }
        };
        tokio::time::timeout(self.timeout, exchange)
            .await
            .unwrap_or_else(|_| Err(ClientError::Timeout { server: self.authority.clone(), timeout: self.timeout }))
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let failed = |source| ClientError::Connect { server: self.authority.clone(), source };
        let stream = self.endpoint.connect(self.timeout).await.map_err(failed)?;
        match &self.tls {
            None => self.shake_hands(stream).await,
            Some((tls, name)) => {
                let untrusted =
                    |error| ClientError::Tls { server: self.authority.clone(), fault: TlsFault::from(error) };
                let stream = TlsConnector::from(tls.clone()).connect(name.clone(), stream).await;
                self.shake_hands(stream.map_err(untrusted)?).await
            }
        }
    }

    async fn shake_hands(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(&error))?;
        tokio::spawn(async move {
            // What goes wrong shows in the exchange, too.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a client's connection broke");
            }
        });
        Ok(sender)
    }

    async fn exchange(
        &self,
        mut sender: SendRequest<Full<Bytes>>,
        request: Request<Full<Bytes>>,
    ) -> Result<Reply, Failed> {
        let unanswered = |error: hyper::Error| Failed::Unanswered(self.broken(&error));
        sender.ready().await.map_err(unanswered)?;
        let (head, body) = sender.send_request(request).await.map_err(unanswered)?.into_parts();
        let body = Limited::new(body, REPLY_LIMIT).collect().await.map_err(|error| {
            let server = self.authority.clone();
            Failed::Answered(if error.is::<LengthLimitError>() {
                ClientError::TooLarge { server }
            } else {
                ClientError::Broken { server, problem: "its answer broke off".to_owned() }
            })
        })?;
        let body = body.to_bytes();
        self.keep(sender);
        Ok(Reply { status: head.status, headers: head.headers, body })
    }

    fn broken(&self, error: &hyper::Error) -> ClientError {
        // hyper's own text is terse; the cause says more.
        let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
        ClientError::Broken { server: self.authority.clone(), problem: format!("{error}{cause}") }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<SendRequest<Full<Bytes>>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut idle = self.idle();
        // The latest first: it is the least likely to have been closed.
        std::iter::from_fn(|| idle.pop()).find(|sender| !sender.is_closed())
    }

    fn keep(&self, sender: SendRequest<Full<Bytes>>) {
        let mut idle = self.idle();
        if idle.len() < KEPT && !sender.is_closed() {
            idle.push(sender);
        }
    }
}

/// TLS 1.2 and 1.3 with servers that the certificates in `ca` vouch for.
fn tls_config(ca: &Path) -> Result<ClientConfig, ClientError> {
    let roots = trust::authorities(ca)?;
    // The provider is named: the process-wide default may be missing, or another one.
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().map_err(ClientError::Setup)?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use hyper::body::Incoming;
    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper::{Response, Version};
    use std::convert::Infallible;
    use std::net::SocketAddr;

    use hyper_util::rt::TokioTimer;
    use tokio::net::TcpListener;

    /// Answers with what it saw: method, path, type and body, and the client's port.
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

    /// A server that closes connections which are idle for so long.
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
        // Two at a time need two connections.
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

    #[tokio::test]
    async fn failures_say_what_to_do() {
        for (url, expected) in [
            ("https://host", "say --ca FILE"),
            ("ftp://host", "neither http:// nor https://"),
            ("host:80", "write it like http://host:8080"),
            ("http://", "write it like"),
            ("http://user@host", "names no host, or a user"),
        ] {
            let message = Client::new(url).unwrap_err().to_string();
            assert!(message.contains(expected), "{url}: {message}");
        }
        let nowhere = Client::trusting("https://host", Some(Path::new("/nowhere.pem"))).unwrap_err().to_string();
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
