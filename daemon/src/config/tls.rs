//! `[server.tls]`: certificate and key of the server, and what clients have to show.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::disagreement::Disagreement;

/// `[server.tls]`: all files are PEM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "TlsSection", into = "TlsSection")]
pub struct Tls {
    /// The server's certificate, then the certificates that lead to a root, in one file.
    pub certificate: PathBuf,
    /// The certificate's private key (PKCS#8, PKCS#1 or SEC1).
    pub key: PathBuf,
    /// Which certificates clients have to show.
    pub clients: Clients,
}

/// Which certificates clients have to show.
#[derive(Clone, Debug, PartialEq)]
pub enum Clients {
    /// Clients are not asked for certificates.
    NotAsked,
    /// A client may show a certificate, which has to lead to one of the authorities in this file.
    Asked(PathBuf),
    /// A client has to show a certificate that leads to one of the authorities in this file.
    Required(PathBuf),
    /// The same, and the client acts only for the host that its certificate names.
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

    /// Whether a client acts only for the host that its certificate names.
    #[must_use]
    pub fn are_hosts(&self) -> bool {
        matches!(self, Self::Hosts(_))
    }
}

impl Tls {
    /// With this certificate and key, and clients that are not asked for certificates.
    pub fn new(certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Self { certificate: certificate.into(), key: key.into(), clients: Clients::NotAsked }
    }
}

/// The section as it is written.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TlsSection {
    /// The server's certificate, then the certificates that lead to a root, in one PEM file.
    certificate: PathBuf,
    /// The certificate's private key, PEM (PKCS#8, PKCS#1 or SEC1).
    key: PathBuf,
    /// The authorities of clients' certificates, PEM. A certificate that a client shows has to lead to one of them.
    /// Default: none, clients are not asked for certificates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    client_ca: Option<PathBuf>,
    /// Whether a client without a certificate is turned away; needs `client_ca`. Default: false.
    #[serde(default)]
    client_required: bool,
    /// Whether a client acts only for the host that its certificate names: a DNS name of its subjectAltName, or where it
    /// has none its CN, has to be the host's registered name, without regard to case. With any other health certificate or
    /// host key the client is refused. Needs `client_required`. Default: false.
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
