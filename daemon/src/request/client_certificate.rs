//! The names in a client's TLS certificate.

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// The client's certificate in the TLS handshake. Its chain leads to a configured CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    names: Vec<String>,
}

impl ClientCertificate {
    /// Reads the names of a certificate; if they cannot be parsed, there are none.
    #[must_use]
    pub fn read(der: &CertificateDer<'_>) -> Self {
        let names = X509Certificate::from_der(der).map(|(_, certificate)| names(&certificate));
        Self { names: names.unwrap_or_default() }
    }

    /// Whether it names the host that is registered as `name`, ignoring case. A wildcard has no special meaning.
    #[must_use]
    pub fn is_for(&self, name: &str) -> bool {
        self.names.iter().any(|known| known.eq_ignore_ascii_case(name))
    }
}

/// The DNS names of the subjectAltName. If there are none: the CN, if there is exactly one.
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
