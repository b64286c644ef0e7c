//! Reads certificates and keys for TLS from files, and explains failed handshakes.

use std::io;
use std::path::{Path, PathBuf};

use claviger_protocol::input::{Found, PrivateKey};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{AlertDescription, CertificateError, OtherError, RootCertStore};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::files::{self, FileError};

/// Reasons why a file of authorities is unusable.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The file is unreadable, or it holds no certificates.
    #[error(transparent)]
    File(#[from] FileError),
    /// One of the certificates is not usable as an authority. The whole file is an error: to skip the certificate would
    /// change the set of trusted authorities without notice.
    #[error("{}: {certificate}: {problem}; replace it or remove it from the file", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// The certificate: its number, line and subject.
        certificate: String,
        /// The problem with the certificate.
        problem: String,
    },
}

/// Reads the authorities of a file (PEM, DER or .p7b). All of its certificates become authorities; there must be at
/// least one. Blocks on the file.
///
/// # Errors
/// [`AuthorityError`].
pub fn authorities(path: &Path) -> Result<RootCertStore, AuthorityError> {
    let mut roots = RootCertStore::empty();
    for entry in files::read_certificates(path)? {
        let der = CertificateDer::from(entry.der);
        let subject = subject(&der).map_or_else(String::new, |subject| format!(", {subject}"));
        roots.add(der).map_err(|error| AuthorityError::Unusable {
            path: path.to_owned(),
            certificate: format!("{}{subject}", entry.place),
            problem: match error {
                rustls::Error::InvalidCertificate(error) => certificate_fault(&error).problem,
                error => error.to_string(),
            },
        })?;
    }
    Ok(roots)
}

/// Reads the certificates of a file in their order, at least one. Blocks on the file.
///
/// # Errors
/// Those of [`files::read_certificates`].
pub fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    Ok(files::read_certificates(path)?.into_iter().map(|entry| CertificateDer::from(entry.der)).collect())
}

/// Reads the private key of a file. Blocks on the file.
///
/// # Errors
/// Those of `files::read_private_key`.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, FileError> {
    let PrivateKey { found, bytes } = files::read_private_key(path)?;
    // rustls does not zeroise its copy. It keeps the copy as long as the configuration exists.
    let der = bytes.to_vec();
    Ok(match found {
        Found::Pkcs1PrivateKey => PrivateKeyDer::Pkcs1(der.into()),
        Found::EcPrivateKey => PrivateKeyDer::Sec1(der.into()),
        _ => PrivateKeyDer::Pkcs8(der.into()),
    })
}

/// The subject of a certificate, if the certificate can be parsed.
fn subject(der: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    // The text is shown on terminals and in logs.
    Some(certificate.subject().to_string().chars().filter(|c| !c.is_control()).take(200).collect())
}

/// The reason why there is no TLS connection with a server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct TlsFault {
    /// The cause, and what to do about it.
    pub problem: String,
    /// `true` if every attempt fails until the configuration of this client or of the server changes.
    pub lasting: bool,
}

impl TlsFault {
    /// Explains the error of a failed handshake. `identified` is `true` if this client has a certificate.
    #[must_use]
    pub fn of(error: &io::Error, identified: bool) -> Self {
        match tls_error(error) {
            Some(rustls::Error::InvalidCertificate(error)) => certificate_fault(error),
            Some(rustls::Error::AlertReceived(alert)) => alert_fault(*alert, identified),
            Some(rustls::Error::InvalidMessage(_)) => lasting(format!(
                "it does not answer in TLS ({error}); write http:// in the URL if it is served so there"
            )),
            Some(rustls::Error::PeerIncompatible(_)) => {
                lasting(format!("it has no TLS in common with this client: {error}"))
            }
            _ => passing(format!("the handshake failed: {error}; the server's log may say why")),
        }
    }
}

/// The rustls error inside an I/O error, if there is one.
pub(crate) fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|cause| cause.downcast_ref())
}

/// Explains an alert of the server. The alert may arrive after the handshake: in TLS 1.3 the server checks the client's
/// certificate when the handshake is already complete for the client.
fn alert_fault(alert: AlertDescription, identified: bool) -> TlsFault {
    use AlertDescription as Alert;
    match alert {
        Alert::CertificateRequired
        | Alert::BadCertificate
        | Alert::UnsupportedCertificate
        | Alert::CertificateRevoked
        | Alert::CertificateExpired
        | Alert::CertificateUnknown
        | Alert::UnknownCA
        | Alert::AccessDenied
        | Alert::DecryptError
            if identified =>
        {
            lasting(format!(
                "it does not accept this client's certificate ({alert:?}): use one with --client-certificate that is in date and \
                 comes from an authority which the server trusts for clients (server.tls.client_ca there)"
            ))
        }
        Alert::CertificateRequired | Alert::BadCertificate | Alert::CertificateUnknown | Alert::AccessDenied => {
            lasting(
                "it requires a certificate of its clients: use --client-certificate and --client-key, from an authority which the \
             server trusts for clients (server.tls.client_ca there)",
            )
        }
        Alert::HandshakeFailure | Alert::InsufficientSecurity | Alert::ProtocolVersion => lasting(format!(
            "it ended the handshake ({alert:?}): it has no TLS version and cipher in common with this client, or requires a \
             client certificate (--client-certificate, --client-key)"
        )),
        Alert::UnrecognisedName => {
            lasting("it does not serve the name in the URL (UnrecognisedName); use a URL with a name that it serves")
        }
        _ => passing(format!("it ended the handshake ({alert:?}); the server's log may say why")),
    }
}

fn passing(problem: impl Into<String>) -> TlsFault {
    TlsFault { problem: problem.into(), lasting: false }
}

fn lasting(problem: impl Into<String>) -> TlsFault {
    TlsFault { problem: problem.into(), lasting: true }
}

/// Explains what is wrong with the server's certificate.
fn certificate_fault(error: &CertificateError) -> TlsFault {
    use webpki::Error;
    let of_webpki = match error {
        CertificateError::Other(OtherError(cause)) => cause.downcast_ref::<Error>(),
        _ => None,
    };
    match (error, of_webpki) {
        // A bad signature means that an authority has the right name and another key, for example after its key was
        // changed.
        (CertificateError::UnknownIssuer | CertificateError::BadSignature, _) => lasting(
            "its certificate is none that --ca or --system-ca vouches for: name the authority that issued it with --ca, and see that \
             the server sends the certificates in between",
        ),
        (CertificateError::Expired | CertificateError::ExpiredContext { .. }, _) => {
            passing(format!("its certificate has expired ({error}); renew it, or set the clock of this machine"))
        }
        (CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }, _) => {
            passing(format!("its certificate is not valid yet ({error}); set the clocks"))
        }
        (CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }, _) => lasting(format!(
            "its certificate is for another name ({error}); use a URL with a name of the certificate, or give it this one as \
             subjectAltName"
        )),
        (CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. }, _) => lasting(format!(
            "its certificate is not for servers ({error}); have one issued with the extended key usage serverAuth"
        )),
        (CertificateError::BadEncoding, _) => {
            lasting("the certificate cannot be read, its encoding is damaged; issue it again")
        }
        (_, Some(Error::CaUsedAsEndEntity)) => lasting(
            "its certificate is that of a certificate authority (CA:TRUE), which no server may show; issue one for the server \
             (openssl req -x509 … -addext basicConstraints=critical,CA:FALSE)",
        ),
        (_, Some(Error::UnsupportedCertVersion)) => {
            lasting("the certificate is of X.509 version 1, without extensions; issue it again with a subjectAltName")
        }
        _ => lasting(format!("the certificate cannot be used: {error}")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::self_signed;
    use claviger_protocol::rsa_key::RsaPrivateKey;
    use std::fs;

    #[test]
    fn one_bad_authority_among_others_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        let good = self_signed("the good one", &RsaPrivateKey::generate(2048).unwrap());
        let found = |text: &[u8]| {
            fs::write(&file, text).unwrap();
            authorities(&file).map(|roots| roots.len()).map_err(|error| error.to_string())
        };
        let pem = good.to_pem();
        assert_eq!(found(pem.as_bytes()), Ok(1));
        assert_eq!(found(good.der()), Ok(1), "DER");
        assert_eq!(found(format!("\u{feff}{pem}\n{pem}").replace('\n', "\r\n").as_bytes()), Ok(2));
        let bad = pem.lines().nth(1).unwrap();
        let bad = format!("-----BEGIN CERTIFICATE-----\n{bad}\n-----END CERTIFICATE-----\n");
        let said = found(format!("{pem}{bad}{pem}").as_bytes()).unwrap_err();
        assert!(said.contains("ca.pem: certificate 2 of 3 (line ") && said.contains("remove it"), "{said}");
        let said = found(b"no certificate").unwrap_err();
        assert!(said.contains("text without a PEM block"), "{said}");
    }

    #[test]
    fn the_cause_of_a_failed_handshake_is_named() {
        let of = |error: rustls::Error, identified| {
            TlsFault::of(&io::Error::new(io::ErrorKind::InvalidData, error), identified)
        };
        let other = |error| CertificateError::Other(OtherError(std::sync::Arc::new(error)));
        for (error, words, lasting) in [
            (CertificateError::UnknownIssuer, "--ca or --system-ca vouches for", true),
            (CertificateError::BadSignature, "--ca or --system-ca vouches for", true),
            (CertificateError::Expired, "has expired", false),
            (CertificateError::NotValidForName, "for another name", true),
            (CertificateError::InvalidPurpose, "not for servers", true),
            (other(webpki::Error::CaUsedAsEndEntity), "certificate authority (CA:TRUE)", true),
            (other(webpki::Error::UnsupportedCertVersion), "version 1", true),
        ] {
            let fault = of(rustls::Error::InvalidCertificate(error), false);
            assert!(fault.problem.contains(words) && fault.lasting == lasting, "{fault:?}");
        }
        for (alert, identified, words, lasting) in [
            (AlertDescription::CertificateRequired, false, "requires a certificate of its clients", true),
            (AlertDescription::UnknownCA, true, "does not accept this client's certificate (UnknownCA)", true),
            (AlertDescription::HandshakeFailure, false, "no TLS version and cipher in common", true),
            (AlertDescription::InternalError, false, "it ended the handshake (InternalError)", false),
        ] {
            let fault = of(rustls::Error::AlertReceived(alert), identified);
            assert!(fault.problem.contains(words) && fault.lasting == lasting, "{fault:?}");
        }
        let fault = of(rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType), false);
        assert!(fault.problem.contains("does not answer in TLS") && fault.lasting, "{fault:?}");
        let fault = TlsFault::of(&io::ErrorKind::UnexpectedEof.into(), false);
        assert!(!fault.lasting, "{fault:?}");
    }
}
