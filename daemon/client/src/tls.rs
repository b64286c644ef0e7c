//! The TLS configuration of a client: trusted authorities and the client's own certificate.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};

use crate::error::ClientError;
use crate::trust;

/// TLS settings, as every command that asks a service takes them. They have no effect on `http://`.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct TlsSettings {
    /// Certificate authorities to trust for https (PEM, DER or .p7b)
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Trust the certificate authorities of this machine for https, besides those of --ca
    #[arg(long)]
    pub system_ca: bool,
    /// Certificate to show where the service asks for one (PEM, DER or .p7b), followed by those between it and its authority
    #[arg(long, value_name = "FILE", requires = "client_key")]
    pub client_certificate: Option<PathBuf>,
    /// Private key of --client-certificate, readable by its owner alone
    #[arg(long, value_name = "FILE", requires = "client_certificate")]
    pub client_key: Option<PathBuf>,
}

impl TlsSettings {
    /// Trusts the authorities of a file, and shows no client certificate.
    #[must_use]
    pub fn trusting(ca: impl Into<PathBuf>) -> Self {
        Self { ca: Some(ca.into()), ..Self::default() }
    }

    /// Shows this certificate if the service asks for one.
    #[must_use]
    pub fn showing(self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Self { client_certificate: Some(certificate.into()), client_key: Some(key.into()), ..self }
    }

    /// The paths of certificate and key, if both are given.
    fn identity(&self) -> Option<(&Path, &Path)> {
        self.client_certificate.as_deref().zip(self.client_key.as_deref())
    }

    /// `true` if the client shows a certificate when the service asks for one.
    pub(crate) fn has_identity(&self) -> bool {
        self.identity().is_some()
    }

    /// Builds a configuration for TLS 1.2 and 1.3 that trusts the configured authorities; `None` if no authority is
    /// trusted. Blocks on files.
    ///
    /// # Errors
    /// [`ClientError`] names the option and the file.
    pub(crate) fn config(&self) -> Result<Option<ClientConfig>, ClientError> {
        if self.ca.is_none() && !self.system_ca {
            return Ok(None);
        }
        let mut roots = match &self.ca {
            Some(ca) => trust::authorities(ca)?,
            None => RootCertStore::empty(),
        };
        if self.system_ca {
            add_system_authorities(&mut roots)?;
        }
        let builder = builder()?.with_root_certificates(roots);
        let mut config = match self.identity() {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = trust::chain(certificate).map_err(ClientError::Certificate)?;
                let private = trust::private_key(key).map_err(ClientError::Key)?;
                let unfit = |error: rustls::Error| ClientError::Identity {
                    certificate: certificate.to_owned(),
                    key: key.to_owned(),
                    problem: match error {
                        rustls::Error::InconsistentKeys(_) => "the key is not that of the certificate".to_owned(),
                        error => error.to_string(),
                    },
                };
                builder.with_client_auth_cert(chain, private).map_err(unfit)?
            }
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Some(config))
    }
}

/// Builds a configuration that trusts no authority. Every handshake with it ends after the server has shown its
/// certificate.
pub(crate) fn trusting_nobody() -> Result<ClientConfig, ClientError> {
    Ok(builder()?.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

fn builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, ClientError> {
    // The provider is set explicitly, because the process-wide default may be missing or different.
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(ClientError::Setup)
}

/// Adds the authorities that the system trusts: those of `SSL_CERT_FILE` and `SSL_CERT_DIR`, or those in the usual
/// places of the distribution. Unusable certificates among them are skipped, as other programs do.
fn add_system_authorities(roots: &mut RootCertStore) -> Result<(), ClientError> {
    let found = rustls_native_certs::load_native_certs();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added > 0 {
        return Ok(());
    }
    let problem = found.errors.first().map_or_else(String::new, |error| format!(": {error}"));
    Err(ClientError::SystemCa { problem })
}
