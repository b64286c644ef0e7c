//! An HTTP/1.1 client of one server: connections are kept and used again, plain or TLS.

use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use claviger_client::{ConnectError, Endpoint, Lack};
use claviger_protocol::input;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER};
use hyper::{HeaderMap, Method, Request, Uri};
use hyper_util::rt::TokioIo;
use rustix::process::{Resource, getrlimit};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

/// Largest answer that is read, in octets: 256 items of a batch, with room.
const REPLY_LIMIT: usize = 64 * 1024 * 1024;

/// A server's answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Its status.
    pub status: u16,
    /// What `Retry-After` says, where it says seconds.
    pub retry_after: Option<Duration>,
    /// Its whole body.
    pub body: Bytes,
}

/// Why there is no answer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoReply {
    /// No connection, or no TLS on it.
    #[error("no connection to {server}: {problem}; does it run there?")]
    Connect {
        /// Host and port.
        server: String,
        /// What happened.
        problem: String,
    },
    /// This machine or process has no more of something: the server has no part in it.
    #[error("{}", lack_text(*.0))]
    Lack(Lack),
    /// The time was up.
    #[error("{server} did not answer within {timeout:?}")]
    Timeout {
        /// Host and port.
        server: String,
        /// What it had.
        timeout: Duration,
    },
    /// The connection ended without a whole answer.
    #[error("{server} did not answer: {problem}")]
    Broken {
        /// Host and port.
        server: String,
        /// What happened.
        problem: String,
    },
}

impl NoReply {
    /// How it is counted among errors.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Connect { .. } => "NoConnection",
            Self::Lack(lack) => lack_code(*lack),
            Self::Timeout { .. } => "Timeout",
            Self::Broken { .. } => "BrokenConnection",
        }
    }
}

/// What the load generator itself has no more of: its code, and what to do about it.
pub(crate) fn lack_code(lack: Lack) -> &'static str {
    match lack {
        Lack::Files => "OutOfFiles",
        Lack::Ports => "OutOfPorts",
    }
}

/// The same in a sentence.
pub(crate) fn lack_text(lack: Lack) -> String {
    match lack {
        Lack::Files => {
            let limit = getrlimit(Resource::Nofile).current.map_or("no limit".to_owned(), |limit| limit.to_string());
            format!("the load generator has no more open files (its limit is {limit}); raise it with ulimit -n")
        }
        Lack::Ports => "the load generator's machine has no more local ports or socket memory for connections to this \
             server; widen net.ipv4.ip_local_port_range, ask from several machines, or lower --in-flight"
            .to_owned(),
    }
}

/// Why a URL or a trust anchor cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The URL.
    #[error("{url:?} cannot be used: {problem}; write it like http://host:8080")]
    Url {
        /// As it was given.
        url: String,
        /// What is wrong with it.
        problem: String,
    },
    /// TLS needs to know whom to trust.
    #[error("{0} speaks TLS; say with --ca FILE which certificate authority (PEM) to trust")]
    NoCa(String),
    /// The file of trusted certificates.
    #[error("{file}: no certificate to trust: {problem}; give --ca a PEM file")]
    Ca {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
}

type Sender = SendRequest<Full<Bytes>>;

/// A client of one server. Any number of requests may run at the same time, each on a connection of its own.
///
/// A request on a kept connection that ends before the first octet of an answer is sent once more on a new one: a server
/// may close what is idle at any time.
pub struct Client {
    authority: String,
    endpoint: Endpoint,
    /// Goes before every path: empty, or starts with a slash and ends without one.
    prefix: String,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    timeout: Duration,
    idle: Mutex<Vec<Sender>>,
}

enum Failed {
    /// Without an answer's first octet.
    Unanswered(NoReply),
    Answered(NoReply),
}

impl Client {
    /// A client of the server at `url`, that trusts the certificates in `ca`. Nothing is sent yet. Blocks on the file.
    ///
    /// # Errors
    /// [`TargetError`].
    pub fn new(url: &str, ca: Option<&Path>, timeout: Duration) -> Result<Self, TargetError> {
        let bad = |problem: String| TargetError::Url { url: url.to_owned(), problem };
        let uri: Uri = url.parse().map_err(|error: hyper::http::uri::InvalidUri| bad(error.to_string()))?;
        let secure = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad("it starts with neither http:// nor https://".to_owned())),
        };
        let authority = uri.authority().ok_or_else(|| bad("it names no host".to_owned()))?;
        if authority.host().is_empty() || authority.as_str().contains('@') || uri.query().is_some() {
            return Err(bad("it has a user or a query, or no host".to_owned()));
        }
        // An IPv6 address stands in brackets only inside a URL.
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let tls = match (secure, ca) {
            (false, _) => None,
            (true, None) => return Err(TargetError::NoCa(url.to_owned())),
            (true, Some(ca)) => {
                let name = ServerName::try_from(host.clone()).map_err(|error| bad(error.to_string()))?;
                Some((TlsConnector::from(Arc::new(trusting(ca)?)), name))
            }
        };
        Ok(Self {
            authority: authority.to_string(),
            endpoint: Endpoint::new(host, authority.port_u16().unwrap_or(if secure { 443 } else { 80 })),
            prefix: uri.path().trim_end_matches('/').to_owned(),
            tls,
            timeout,
            idle: Mutex::new(Vec::new()),
        })
    }

    /// Asks for `path`, which starts with a slash.
    ///
    /// # Errors
    /// [`NoReply`].
    pub async fn get(&self, path: &str) -> Result<Reply, NoReply> {
        self.request(Method::GET, path, None, Bytes::new()).await
    }

    /// Sends `body` to `path`, which starts with a slash.
    ///
    /// # Errors
    /// [`NoReply`].
    pub async fn post(&self, path: &str, content_type: &'static str, body: Bytes) -> Result<Reply, NoReply> {
        self.request(Method::POST, path, Some(content_type), body).await
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&'static str>,
        body: Bytes,
    ) -> Result<Reply, NoReply> {
        let begun = Instant::now();
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        let target = format!("{}{path}", self.prefix);
        *request.uri_mut() = target.parse().map_err(|_| self.broken(&format!("{target:?} is no path")))?;
        let authority = HeaderValue::from_str(&self.authority).map_err(|error| self.broken(&error))?;
        request.headers_mut().insert(HOST, authority);
        if let Some(content_type) = content_type {
            request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        }
        let exchange = async {
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
        tokio::time::timeout_at((begun + self.timeout).into(), exchange)
            .await
            .unwrap_or_else(|_| Err(NoReply::Timeout { server: self.authority.clone(), timeout: self.timeout }))
    }

    async fn connect(&self) -> Result<Sender, NoReply> {
        let failed = |problem: String| NoReply::Connect { server: self.authority.clone(), problem };
        let stream = self.endpoint.connect(self.timeout).await.map_err(|error: ConnectError| match error.lack() {
            Some(lack) => NoReply::Lack(lack),
            None => failed(error.to_string()),
        })?;
        match &self.tls {
            None => self.shake_hands(stream).await,
            Some((tls, name)) => {
                let stream = tls.connect(name.clone(), stream).await;
                self.shake_hands(stream.map_err(|error| failed(error.to_string()))?).await
            }
        }
    }

    async fn shake_hands(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Result<Sender, NoReply> {
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(&error))?;
        // What goes wrong on it shows in the exchange, too.
        tokio::spawn(async move { connection.await.ok() });
        Ok(sender)
    }

    async fn exchange(&self, mut sender: Sender, request: Request<Full<Bytes>>) -> Result<Reply, Failed> {
        let unanswered = |error: hyper::Error| Failed::Unanswered(self.broken(&error));
        sender.ready().await.map_err(unanswered)?;
        let (head, body) = sender.send_request(request).await.map_err(unanswered)?.into_parts();
        let body = Limited::new(body, REPLY_LIMIT).collect().await;
        let body = body.map_err(|error| Failed::Answered(self.broken(&error)))?.to_bytes();
        self.keep(sender);
        Ok(Reply { status: head.status.as_u16(), retry_after: retry_after(&head.headers), body })
    }

    fn broken(&self, error: &dyn ToText) -> NoReply {
        NoReply::Broken { server: self.authority.clone(), problem: error.to_text() }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Sender>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> Option<Sender> {
        let mut idle = self.idle();
        // The latest first: it is the least likely to have been closed.
        std::iter::from_fn(|| idle.pop()).find(|sender| !sender.is_closed())
    }

    fn keep(&self, sender: Sender) {
        if !sender.is_closed() {
            self.idle().push(sender);
        }
    }
}

/// An error's text with its cause: hyper's own is terse.
trait ToText {
    fn to_text(&self) -> String;
}

impl ToText for String {
    fn to_text(&self) -> String {
        self.clone()
    }
}

impl ToText for hyper::Error {
    fn to_text(&self) -> String {
        self.source().map_or_else(|| self.to_string(), |cause| format!("{self}: {cause}"))
    }
}

impl ToText for hyper::header::InvalidHeaderValue {
    fn to_text(&self) -> String {
        self.to_string()
    }
}

impl ToText for Box<dyn Error + Send + Sync> {
    fn to_text(&self) -> String {
        self.to_string()
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

fn trusting(ca: &Path) -> Result<ClientConfig, TargetError> {
    let bad = |problem: String| TargetError::Ca { file: ca.display().to_string(), problem };
    let file = std::fs::read(ca).map_err(|error| bad(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    for entry in input::certificates(&file).map_err(|error| bad(error.to_string()))? {
        let added = roots.add(CertificateDer::from(entry.der));
        added.map_err(|error| bad(format!("{}: {error}; remove it from the file", entry.place)))?;
    }
    // The provider is named: the process-wide default may be missing, or another one.
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().map_err(|error| bad(error.to_string()))?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_cannot_be_used_is_explained() {
        for (url, expected) in [
            ("host:80", "write it like http://host:8080"),
            ("ftp://host", "starts with neither http:// nor https://"),
            ("http://user@host", "it has a user"),
            ("https://host", "say with --ca FILE"),
        ] {
            let message = Client::new(url, None, Duration::from_secs(1)).err().unwrap().to_string();
            assert!(message.contains(expected), "{url}: {message}");
        }
        let message = Client::new("https://host", Some(Path::new("/nowhere.pem")), Duration::from_secs(1));
        assert!(message.err().unwrap().to_string().contains("give --ca a PEM file"));
    }
}
