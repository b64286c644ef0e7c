//! Why a request has no answer.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::endpoint::{ConnectError, Lack};
use crate::files::FileError;
use crate::trust::{AuthorityError, TlsFault};

/// A step of a request. Each has a deadline of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Looking the name up, and the TCP connection to one of its addresses.
    Connect,
    /// The TLS handshake.
    Tls,
    /// From the request to the first byte of the answer.
    FirstByte,
    /// From the first byte of the answer to its last.
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
    /// The URL asks for TLS, and nothing says whom to trust.
    #[error("{url} asks for TLS, which needs to know whom to trust: say --ca FILE or --system-ca")]
    NoTrust {
        /// The URL as it was given.
        url: String,
    },
    /// The file of trusted certificates cannot be used.
    #[error("--ca: {0}")]
    Ca(#[from] AuthorityError),
    /// The machine's own trust store cannot be used.
    #[error(
        "--system-ca: this machine has no certificate authorities that can be used{problem}; install its package of them (ca-certificates), or give --ca FILE"
    )]
    SystemCa {
        /// What went wrong, after a colon; empty where there are none.
        problem: String,
    },
    /// The client's certificate cannot be read.
    #[error("--client-certificate: {0}")]
    Certificate(#[source] FileError),
    /// The client's private key cannot be read.
    #[error("--client-key: {0}")]
    Key(#[source] FileError),
    /// The client's certificate and private key cannot be used together.
    #[error("--client-certificate {} and --client-key {} cannot be used together: {problem}", certificate.display(), key.display())]
    Identity {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// TLS cannot be set up.
    #[error("TLS cannot be set up: {0}")]
    Setup(#[source] rustls::Error),
    /// The server did not prove itself, does not accept this client, or does not speak TLS.
    #[error("no TLS with {server}: {fault}")]
    Tls {
        /// Host and port.
        server: String,
        /// What is wrong, and what to do.
        fault: TlsFault,
    },
    /// The URL says `http`, and the server speaks TLS.
    #[error("{server} speaks TLS there: write https:// in the URL")]
    SpeaksTls {
        /// Host and port.
        server: String,
    },
    /// No connection to the server.
    #[error("no connection to {server}: {source}; does it run there?")]
    Connect {
        /// Host and port.
        server: String,
        /// Why, for each address of the host.
        source: ConnectError,
    },
    /// The time of a step was up.
    #[error("{server} {step} within {limit:?}")]
    Timeout {
        /// Host and port.
        server: String,
        /// Which step was not done.
        step: Step,
        /// The deadline that was missed: the step's own, or that of the whole request.
        limit: Duration,
    },
    /// The server closed the connection, or does not speak HTTP.
    #[error("{server} did not answer: {problem}")]
    Broken {
        /// Host and port.
        server: String,
        /// What happened.
        problem: String,
    },
    /// The answer is longer than what is read.
    #[error("the answer of {server} is longer than {limit} bytes")]
    TooLarge {
        /// Host and port.
        server: String,
        /// How many bytes it may have.
        limit: usize,
    },
}

impl ClientError {
    /// What this machine or process lacked, if that is why there is no connection.
    #[must_use]
    pub fn lack(&self) -> Option<Lack> {
        match self {
            Self::Connect { source, .. } => source.lack(),
            _ => None,
        }
    }
}
