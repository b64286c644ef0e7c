//! Errors of requests that got no reply.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::endpoint::{ConnectError, Lack};
use crate::files::FileError;
use crate::trust::{AuthorityError, TlsFault};

/// A step of a request. Each step has its own deadline.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// The name lookup, and the TCP connection to one of the addresses.
    Connect,
    /// The TLS handshake.
    Tls,
    /// From sending the request to the first byte of the reply.
    FirstByte,
    /// From the first byte of the reply to the last.
    Body,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "did not accept a connection",
            Self::Tls => "did not finish the TLS handshake",
            Self::FirstByte => "did not answer",
            Self::Body => "did not finish its answer",
        })
    }
}

/// Reasons why a request got no reply.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The URL is invalid.
    #[error("{url:?} cannot be used: {problem}; write it like http://host:8080")]
    Url {
        /// The URL as given by the caller.
        url: String,
        /// The problem with the URL.
        problem: String,
    },
    /// The URL asks for TLS, and no certificate authority is trusted.
    #[error("{url} uses TLS, and no certificate authority is trusted: use --ca FILE or --system-ca")]
    NoTrust {
        /// The URL as given by the caller.
        url: String,
    },
    /// The file of trusted certificates is unusable.
    #[error("--ca: {0}")]
    Ca(#[from] AuthorityError),
    /// The trust store of this machine is unusable.
    #[error(
        "--system-ca: this machine has no certificate authorities that can be used{problem}; install the package ca-certificates, or use --ca FILE"
    )]
    SystemCa {
        /// The errors while loading, after a colon. Empty if there were none.
        problem: String,
    },
    /// The client's certificate cannot be read.
    #[error("--client-certificate: {0}")]
    Certificate(#[source] FileError),
    /// The client's private key cannot be read.
    #[error("--client-key: {0}")]
    Key(#[source] FileError),
    /// The client's certificate and private key do not work together.
    #[error("--client-certificate {} and --client-key {} cannot be used together: {problem}", certificate.display(), key.display())]
    Identity {
        /// The file with the certificate.
        certificate: PathBuf,
        /// The file with the private key.
        key: PathBuf,
        /// The problem with the pair.
        problem: String,
    },
    /// The TLS configuration is invalid.
    #[error("TLS cannot be set up: {0}")]
    Setup(#[source] rustls::Error),
    /// The server's certificate is not trusted, the server rejects this client, or the server does not speak TLS.
    #[error("no TLS with {server}: {fault}")]
    Tls {
        /// Host and port.
        server: String,
        /// The cause, and what to do about it.
        fault: TlsFault,
    },
    /// The URL says `http`, but the server speaks TLS.
    #[error("{server} speaks TLS there: write https:// in the URL")]
    SpeaksTls {
        /// Host and port.
        server: String,
    },
    /// The connection to the server failed.
    #[error("no connection to {server}: {source}; does it run there?")]
    Connect {
        /// Host and port.
        server: String,
        /// The error of each address of the host.
        source: ConnectError,
    },
    /// A step did not finish in time.
    #[error("{server} {step} within {limit:?}")]
    Timeout {
        /// Host and port.
        server: String,
        /// The step that did not finish.
        step: Step,
        /// The deadline that was missed: either that of the step or that of the whole request.
        limit: Duration,
    },
    /// The server closed the connection, or it does not speak HTTP.
    #[error("{server} did not answer: {problem}")]
    Broken {
        /// Host and port.
        server: String,
        /// What happened on the connection.
        problem: String,
    },
    /// The reply is longer than the limit.
    #[error("the answer of {server} is longer than {limit} bytes")]
    TooLarge {
        /// Host and port.
        server: String,
        /// The limit, in bytes.
        limit: usize,
    },
}

impl ClientError {
    /// The local resource that ran out, if that is why there is no connection.
    #[must_use]
    pub fn lack(&self) -> Option<Lack> {
        match self {
            Self::Connect { source, .. } => source.lack(),
            _ => None,
        }
    }
}
