//! Settings of the connection to etcd.

use std::path::{Path, PathBuf};
use std::time::Duration;

use claviger_client::files;
use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};

use crate::config::{Config, Link};

/// Time limit of one call before another endpoint is tried.
pub(super) const CALL: Duration = Duration::from_secs(3);

/// Largest file with a key or a password, in bytes.
const LONGEST_FILE: usize = 64 * 1024;

/// Settings of the connection to etcd.
#[derive(Clone, Debug)]
pub struct EtcdSettings {
    /// URLs of its members: `https://…`, or `http://…` on loopback only.
    pub endpoints: Vec<String>,
    /// Prefix of all keys.
    pub prefix: String,
    /// CA certificates for the members (PEM).
    pub ca: Option<PathBuf>,
    /// This node's certificate and private key (PEM).
    pub identity: Option<(PathBuf, PathBuf)>,
    /// A user, and the file with its password.
    pub user: Option<(String, PathBuf)>,
    /// Name of this node.
    pub node: String,
    /// How long nodes serve without etcd.
    pub max_staleness: Duration,
}

/// Why there is no connection.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{endpoint}: {problem}")]
pub(super) struct Unreachable {
    pub(super) endpoint: String,
    pub(super) problem: String,
}

impl EtcdSettings {
    /// The settings of a daemon; `None`: its state is in its state folder.
    #[must_use]
    pub fn of(config: &Config) -> Option<Self> {
        let etcd = config.etcd.as_ref()?;
        let (ca, identity) = match etcd.link.clone() {
            Link::Loopback => (None, None),
            Link::Tls { ca, identity } => (Some(ca), identity),
        };
        Some(Self {
            endpoints: etcd.endpoints.clone(),
            prefix: etcd.prefix.clone(),
            ca,
            identity,
            user: etcd.login.clone(),
            node: config.server.node(),
            max_staleness: etcd.max_staleness(),
        })
    }

    /// Connects to one endpoint. The files are read each time, because certificates and passwords change while the
    /// daemon runs.
    ///
    /// # Errors
    /// [`Unreachable`].
    pub(super) async fn connect(&self, endpoint: &str) -> Result<Client, Unreachable> {
        let failed = |problem: String| Unreachable { endpoint: endpoint.to_owned(), problem };
        let secret = |path: &Path| files::read_secret(path, LONGEST_FILE).map_err(|error| failed(error.to_string()));
        // The server rejects pings that come more often than every five seconds.
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CALL)
            .with_keep_alive(Duration::from_secs(6), Duration::from_secs(3))
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if endpoint.starts_with("https://") {
            let mut tls = TlsOptions::new();
            if let Some(ca) = &self.ca {
                tls = tls.ca_certificate(Certificate::from_pem(read(ca).map_err(failed)?));
            }
            if let Some((certificate, key)) = &self.identity {
                tls = tls.identity(Identity::from_pem(read(certificate).map_err(failed)?, secret(key)?));
            }
            options = options.with_tls(tls);
        }
        if let Some((user, file)) = &self.user {
            let password = secret(file)?;
            let text = std::str::from_utf8(&password).map_err(|_| failed("the password is not UTF-8".to_owned()))?;
            options = options.with_user(user, text.trim_end_matches(['\r', '\n']));
        }
        let client = tokio::time::timeout(CALL, Client::connect([endpoint], Some(options))).await;
        client
            .map_err(|_| failed(format!("no answer in {} seconds", CALL.as_secs())))?
            .map_err(|error| failed(reason(&error)))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// An error with its causes, which its own text omits.
pub(super) fn reason(error: &etcd_client::Error) -> String {
    use std::error::Error;
    let (mut text, mut cause) = (
        match error {
            etcd_client::Error::GRpcStatus(status) => status.message().to_owned(),
            other => other.to_string(),
        },
        match error {
            etcd_client::Error::GRpcStatus(status) => status.source(),
            etcd_client::Error::TransportError(error) => error.source(),
            other => other.source(),
        },
    );
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
