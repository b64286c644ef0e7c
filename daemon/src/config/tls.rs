//! `[server.tls]`: the certificate and key of the server, and whether clients need a certificate.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::disagreement::Disagreement;

/// `[server.tls]`: all files are PEM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "TlsSection", into = "TlsSection")]
#[schemars(with = "TlsSection")]
pub struct Tls {
    /// The server's certificate, followed by the certificates up to a root, in one file.
    pub certificate: PathBuf,
    /// The certificate's private key (PKCS#8, PKCS#1 or SEC1).
    pub key: PathBuf,
    /// Whether clients need a certificate.
    pub clients: Clients,
}

/// Whether clients need a certificate.
#[derive(Clone, Debug, PartialEq)]
pub enum Clients {
    /// The server does not ask clients for a certificate.
    NotAsked,
    /// A client may send a certificate. If it does, the certificate must be issued under one of the authorities in
    /// this file.
    Asked(PathBuf),
    /// A client must send a certificate that is issued under one of the authorities in this file.
    Required(PathBuf),
    /// As [`Clients::Required`]. In addition, the client may only act for the host that its certificate names.
    Hosts(PathBuf),
}

impl Clients {
    /// The file of the authorities.
    #[must_use]
    pub fn authorities(&self) -> Option<&Path> {
        match self {
            Self::NotAsked => None,
            Self::Asked(file) | Self::Required(file) | Self::Hosts(file) => Some(file),
        }
    }

    pub(super) fn authorities_mut(&mut self) -> Option<&mut PathBuf> {
        match self {
            Self::NotAsked => None,
            Self::Asked(file) | Self::Required(file) | Self::Hosts(file) => Some(file),
        }
    }

    /// Returns `true` if a client may only act for the host that its certificate names.
    #[must_use]
    pub fn are_hosts(&self) -> bool {
        matches!(self, Self::Hosts(_))
    }
}

impl Tls {
    /// Uses this certificate and key, without client certificates.
    pub fn new(certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Self { certificate: certificate.into(), key: key.into(), clients: Clients::NotAsked }
    }
}

/// Certificate and key for TLS. All files are PEM.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TlsSection {
    /// The server's certificate and its chain, in one PEM file.
    certificate: PathBuf,
    /// The certificate's private key, PEM (PKCS#8, PKCS#1 or SEC1).
    key: PathBuf,
    /// CA certificates for clients, PEM. A client's certificate must have a chain to one of them. Default: none,
    /// clients need no certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    client_ca: Option<PathBuf>,
    /// Whether clients without a certificate are refused; needs `client_ca`. Default: false.
    #[serde(default)]
    client_required: bool,
    /// Whether a client may act only for the host in its certificate: a DNS name of the subjectAltName (or the CN, if
    /// there is no DNS name) must be the registered name of the host, ignoring case. With the health certificate or
    /// host key of another host, the client is refused. Needs `client_required`. Default: false.
    #[serde(default)]
    client_is_host: bool,
}

impl TryFrom<TlsSection> for Tls {
    type Error = Disagreement;

    fn try_from(section: TlsSection) -> Result<Self, Disagreement> {
        let TlsSection { certificate, key, client_ca, client_required, client_is_host } = section;
        let clients = match (client_ca, client_required, client_is_host) {
            (None, true, _) => {
                return Err(Disagreement {
                    key: "client_required",
                    problem: "clients are to show certificates, and nothing says whose".to_owned(),
                    advice: "name their authorities in server.tls.client_ca".to_owned(),
                });
            }
            (_, false, true) => {
                return Err(Disagreement {
                    key: "client_is_host",
                    problem: "clients are bound to hosts by their certificates, and need not show one".to_owned(),
                    advice: "set server.tls.client_required = true".to_owned(),
                });
            }
            (None, false, false) => Clients::NotAsked,
            (Some(ca), false, false) => Clients::Asked(ca),
            (Some(ca), true, false) => Clients::Required(ca),
            (Some(ca), true, true) => Clients::Hosts(ca),
        };
        Ok(Self { certificate, key, clients })
    }
}

impl From<Tls> for TlsSection {
    fn from(tls: Tls) -> Self {
        let Tls { certificate, key, clients } = tls;
        let client_required = matches!(clients, Clients::Required(_) | Clients::Hosts(_));
        let client_is_host = clients.are_hosts();
        let client_ca = clients.authorities().map(Path::to_owned);
        Self { certificate, key, client_ca, client_required, client_is_host }
    }
}
