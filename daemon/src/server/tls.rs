//! The server's TLS configuration, from PEM files. A new one is swapped in while connections are open: they go on as they
//! were agreed, and those that come later get the new one. Sessions of the old one are not resumed: whoever was let in by it
//! has to show a certificate that the new one accepts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::config::Tls;
use crate::keys::short_name;

/// What new connections are served with; it can be changed at any time.
pub type SharedTls = Arc<ArcSwap<ServerTls>>;

/// What connections are encrypted with.
#[derive(Clone, Debug)]
pub struct ServerTls {
    /// For rustls.
    pub config: Arc<ServerConfig>,
    /// The first 8 digits of the thumbprint of the server's certificate.
    pub certificate: String,
    /// When it ends, in seconds since 1970.
    pub not_after: i64,
}

/// Why there is no TLS to serve with.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{} cannot be read: {source}; check the path and who may read it", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A file has not what it should have.
    #[error("{} holds no {wanted} in PEM ({problem})", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        wanted: &'static str,
        /// What was found instead.
        problem: String,
    },
    /// Certificate and key cannot be used, most often because they do not belong together.
    #[error("the certificate in {} and the key in {} cannot be used together: {source}", certificate.display(), key.display())]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What rustls says.
        source: rustls::Error,
    },
    /// The authorities of clients' certificates cannot be used.
    #[error("clients' certificates cannot be checked with {}: {problem}", path.display())]
    Authorities {
        /// The file.
        path: PathBuf,
        /// What rustls says.
        problem: String,
    },
}

/// TLS 1.2 and 1.3 with HTTP/2 and HTTP/1.1; clients show certificates where the settings say so. Blocks on the files.
///
/// # Errors
/// [`TlsError`] names the file.
pub fn tls_config(settings: &Tls) -> Result<ServerTls, TlsError> {
    let Tls { certificate, key, client_ca, client_required } = settings;
    let chain = certificates(certificate)?;
    let (name, not_after) = leaf(certificate, &chain)?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| unusable(key, "private key", error))?;
    let pair = |source| TlsError::Pair { certificate: certificate.to_owned(), key: key.to_owned(), source };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    // The provider is named: the process-wide default may be missing, or another one.
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(pair)?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let fault = |problem| TlsError::Authorities { path: path.to_owned(), problem };
            let mut roots = RootCertStore::empty();
            for authority in certificates(path)? {
                roots.add(authority).map_err(|error| fault(error.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            let verifier = if *client_required { verifier } else { verifier.allow_unauthenticated() };
            builder.with_client_cert_verifier(verifier.build().map_err(|error| fault(error.to_string()))?)
        }
    };
    let mut config = builder.with_single_cert(chain, private).map_err(pair)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(ServerTls { config: Arc::new(config), certificate: name, not_after })
}

/// The name in the metrics, and the end, of a chain's first certificate.
fn leaf(path: &Path, chain: &[CertificateDer<'_>]) -> Result<(String, i64), TlsError> {
    let fault = |problem: String| TlsError::Content { path: path.to_owned(), wanted: "certificate", problem };
    let der = chain.first().ok_or_else(|| fault("it is empty".to_owned()))?;
    let (_, leaf) = X509Certificate::from_der(der).map_err(|error| fault(error.to_string()))?;
    Ok((short_name(der), leaf.validity().not_after.timestamp()))
}

/// The certificates of a PEM file, at least one.
///
/// # Errors
/// [`TlsError`] names the file.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let found = found.map_err(|error| unusable(path, "certificate", error))?;
    if found.is_empty() { Err(unusable(path, "certificate", pem::Error::NoItemsFound)) } else { Ok(found) }
}

fn unusable(path: &Path, wanted: &'static str, error: pem::Error) -> TlsError {
    match error {
        pem::Error::Io(source) => TlsError::Read { path: path.to_owned(), source },
        error => TlsError::Content { path: path.to_owned(), wanted, problem: error.to_string() },
    }
}
