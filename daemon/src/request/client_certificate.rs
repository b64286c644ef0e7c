//! Whom a client's certificate names, where TLS asks for one.

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// The certificate that a client showed in its TLS handshake. It leads to one of the configured authorities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    names: Vec<String>,
}

impl ClientCertificate {
    /// Reads the names of a certificate; it has none where they cannot be read.
    #[must_use]
    pub fn read(der: &CertificateDer<'_>) -> Self {
        let names = X509Certificate::from_der(der).map(|(_, certificate)| names(&certificate));
        Self { names: names.unwrap_or_default() }
    }

    /// Whether it names the host that is registered as `name`, without regard to case. A wildcard is a name like any other.
    #[must_use]
    pub fn is_for(&self, name: &str) -> bool {
        self.names.iter().any(|known| known.eq_ignore_ascii_case(name))
    }
}

/// The DNS names of the subjectAltName; only where there are none, the CN, if it is the only one.
fn names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let Ok(alternative) = certificate.subject_alternative_name() else { return Vec::new() };
    let mut names = Vec::new();
    for name in alternative.iter().flat_map(|extension| &extension.value.general_names) {
        if let GeneralName::DNSName(name) = name {
            names.push((*name).to_owned());
        }
    }
    if names.is_empty() {
        let mut common = certificate.subject().iter_common_name();
        if let (Some(Ok(name)), None) = (common.next().map(|name| name.as_str()), common.next()) {
            names.push(name.to_owned());
        }
    }
    names
}
