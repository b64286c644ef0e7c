//! The server's TLS configuration, from PEM files. It can be replaced while connections are open: existing connections
//! keep their parameters, new connections use the new configuration. Sessions of the old configuration are not resumed,
//! so every client has to present a certificate that the new one accepts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use claviger_client::files::FileError;
use claviger_client::trust::{self, AuthorityError};
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use x509_parser::prelude::{FromDer, X509Certificate, X509Version};

use crate::config::{Clients, Tls};
use crate::registry::keys::short_name;

/// The configuration for new connections, which can be replaced at any time.
pub type SharedTls = Arc<ArcSwap<ServerTls>>;

/// A TLS configuration.
#[derive(Clone, Debug)]
pub struct ServerTls {
    /// The configuration of rustls.
    pub config: Arc<ServerConfig>,
    /// The first 8 digits of the server certificate's thumbprint.
    pub certificate: String,
    /// Start of its validity, in seconds since 1970.
    pub not_before: i64,
    /// End of its validity, in seconds since 1970.
    pub not_after: i64,
    /// Reasons why hosts would not accept it.
    pub doubts: Vec<Doubt>,
}

/// A reason why hosts would not accept the server's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    /// The problem.
    pub what: String,
    /// The remedy.
    pub todo: &'static str,
}

impl ServerTls {
    /// Logs the reasons why hosts would not accept the certificate.
    pub fn warn(&self) {
        for Doubt { what, todo } in &self.doubts {
            tracing::warn!(certificate = self.certificate, "the server's certificate for TLS: {what}; {todo}");
        }
    }
}

/// Why TLS cannot be configured.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or is invalid, or other users can read a secret file.
    #[error("TLS: {0}")]
    File(#[from] FileError),
    /// The server's certificate cannot be used.
    #[error("TLS: {}: the first certificate cannot be used: {problem}; issue it again, for this server and with a subjectAltName", path.display())]
    Certificate {
        /// Path of the file.
        path: PathBuf,
        /// The problem.
        problem: String,
    },
    /// The key does not belong to the certificate.
    #[error(
        "TLS: the certificate in {} and the key in {} cannot be used together: the key is that of another certificate; give \
         both from the same request", certificate.display(), key.display()
    )]
    Mismatch {
        /// Path of the certificate file.
        certificate: PathBuf,
        /// Path of the key file.
        key: PathBuf,
    },
    /// Certificate and key cannot be used for another reason.
    #[error("TLS: the certificate in {} and the key in {} cannot be used: {source}", certificate.display(), key.display())]
    Pair {
        /// Path of the certificate file.
        certificate: PathBuf,
        /// Path of the key file.
        key: PathBuf,
        /// The error of rustls.
        source: rustls::Error,
    },
    /// The CA certificates for clients cannot be used.
    #[error("clients' certificates cannot be checked: {0}")]
    Authorities(#[from] AuthorityError),
    /// rustls cannot use the CA certificates.
    #[error("clients' certificates cannot be checked with {}: {source}", path.display())]
    Verifier {
        /// Path of the file.
        path: PathBuf,
        /// The error of rustls.
        source: VerifierBuilderError,
    },
}

/// Builds a configuration for TLS 1.2 and 1.3 with HTTP/2 and HTTP/1.1. Clients need certificates if the settings say
/// so. Blocks on the files.
///
/// # Errors
/// [`TlsError`] names the file.
pub fn tls_config(settings: &Tls) -> Result<ServerTls, TlsError> {
    let Tls { certificate, key, clients } = settings;
    let chain = trust::chain(certificate)?;
    let (name, (not_before, not_after)) = leaf(certificate, &chain)?;
    let doubts = doubts(&chain);
    let private = trust::private_key(key)?;
    let pair = |source| {
        let (certificate, key) = (certificate.to_owned(), key.to_owned());
        match source {
            rustls::Error::InconsistentKeys(_) => TlsError::Mismatch { certificate, key },
            source => TlsError::Pair { certificate, key, source },
        }
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    // Name the provider explicitly: the process-wide default may be missing or different.
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(pair)?;
    let builder = match clients {
        Clients::NotAsked => builder.with_no_client_auth(),
        Clients::Asked(path) | Clients::Required(path) | Clients::Hosts(path) => {
            let roots = Arc::new(trust::authorities(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
            let verifier = match clients {
                Clients::Asked(_) => verifier.allow_unauthenticated(),
                _ => verifier,
            };
            let verifier = verifier.build().map_err(|source| TlsError::Verifier { path: path.to_owned(), source })?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(chain, private).map_err(pair)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(ServerTls { config: Arc::new(config), certificate: name, not_before, not_after, doubts })
}

/// The metrics name and the validity of the first certificate of a chain.
fn leaf(path: &Path, chain: &[CertificateDer<'_>]) -> Result<(String, (i64, i64)), TlsError> {
    let fault = |problem: String| TlsError::Certificate { path: path.to_owned(), problem };
    let der = chain.first().ok_or_else(|| fault("there is none".to_owned()))?;
    let (_, leaf) = X509Certificate::from_der(der).map_err(|error| fault(error.to_string()))?;
    // rustls would report this with a less helpful error.
    if leaf.version() != X509Version::V3 {
        return Err(fault("it is of X.509 version 1, without extensions, which is not accepted".to_owned()));
    }
    let validity = leaf.validity();
    Ok((short_name(der), (validity.not_before.timestamp(), validity.not_after.timestamp())))
}

/// Reasons why hosts would not accept a certificate that the server itself can use.
fn doubts(chain: &[CertificateDer<'_>]) -> Vec<Doubt> {
    let Some((_, leaf)) = chain.first().and_then(|der| X509Certificate::from_der(der).ok()) else { return Vec::new() };
    let mut doubts = Vec::new();
    let mut doubt = |what: &str, todo| doubts.push(Doubt { what: what.to_owned(), todo });
    if leaf.is_ca() {
        doubt(
            "it is that of a certificate authority (CA:TRUE), which no host accepts from a server",
            "issue one for the server (openssl req -x509 … -addext basicConstraints=critical,CA:FALSE)",
        );
    }
    if !matches!(leaf.subject_alternative_name(), Ok(Some(_))) {
        doubt(
            "it has no subjectAltName, and hosts look for the server's name nowhere else",
            "issue it again, with one",
        );
    }
    if let Ok(Some(usage)) = leaf.extended_key_usage()
        && !usage.value.server_auth
        && !usage.value.any
    {
        doubt("it is not for servers: its extended key usages lack serverAuth", "issue it again, with serverAuth");
    }
    if let Some((_, next)) = chain.get(1).and_then(|der| X509Certificate::from_der(der).ok())
        && next.subject() != leaf.issuer()
    {
        let what = format!("the certificate after it is not its issuer's ({}) but {}", leaf.issuer(), next.subject());
        let what: String = what.chars().filter(|c| !c.is_control()).collect();
        doubt(&what, "put the server's own certificate first in the file, then its issuer's");
    }
    doubts
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;

    struct Files(tempfile::TempDir);

    impl Files {
        fn openssl(&self, arguments: &str) {
            let output =
                Command::new("openssl").args(arguments.split(' ')).current_dir(self.0.path()).output().unwrap();
            assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        }

        /// Creates a self-signed certificate NAME.pem of key.pem.
        fn certificate(&self, name: &str, options: &str) {
            self.openssl(&format!("req -x509 -key key.pem -days 30 -subj /CN=localhost -out {name}.pem {options}"));
        }

        fn settings(&self, certificate: &str, key: &str) -> Tls {
            let [certificate, key] = [certificate, key].map(|name| self.0.path().join(name));
            Tls::new(certificate, key)
        }

        fn doubts(&self, name: &str) -> Vec<String> {
            let served = tls_config(&self.settings(name, "key.pem")).unwrap();
            served.doubts.into_iter().map(|doubt| doubt.what).collect()
        }

        fn refused(&self, certificate: &str, key: &str) -> String {
            tls_config(&self.settings(certificate, key)).unwrap_err().to_string()
        }
    }

    const SERVER: &str = "-addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE";

    fn files() -> Files {
        let files = Files(tempfile::tempdir().unwrap());
        files.openssl("genpkey -quiet -algorithm RSA -out key.pem");
        files.certificate("good", SERVER);
        files
    }

    #[test]
    fn certificates_that_no_host_accepts_are_served_and_doubted() {
        let files = files();
        assert_eq!(files.doubts("good.pem"), Vec::<String>::new());
        files.certificate("ca", "-addext subjectAltName=IP:127.0.0.1");
        assert!(files.doubts("ca.pem")[0].contains("certificate authority (CA:TRUE)"));
        files.certificate("nameless", "-addext basicConstraints=critical,CA:FALSE");
        assert!(files.doubts("nameless.pem")[0].contains("no subjectAltName"));
        files.certificate("client", &format!("{SERVER} -addext extendedKeyUsage=clientAuth"));
        assert!(files.doubts("client.pem")[0].contains("lack serverAuth"));
        files.openssl("req -new -key key.pem -subj /CN=old -out old.csr");
        files.openssl("x509 -req -in old.csr -signkey key.pem -days 30 -out old.pem");
        let both = ["good.pem", "old.pem"].map(|name| fs::read_to_string(files.0.path().join(name)).unwrap());
        fs::write(files.0.path().join("both.pem"), both.concat()).unwrap();
        assert!(files.doubts("both.pem")[0].contains("is not its issuer's (CN=localhost) but CN=old"));
    }

    #[test]
    fn files_are_read_as_other_programs_write_them_or_the_cause_is_named() {
        let files = files();
        files.openssl("pkcs8 -topk8 -in key.pem -passout pass:secret -out sealed.pem");
        files.openssl("rsa -in key.pem -traditional -aes256 -passout pass:secret -out old.pem");
        files.openssl("rsa -in key.pem -traditional -out pkcs1.pem");
        files.openssl("pkey -in key.pem -outform DER -out key.der");
        files.openssl("x509 -in good.pem -outform DER -out good.der");
        files.openssl("req -new -key key.pem -subj /CN=x -out request.pem");
        files.openssl("x509 -req -in request.pem -signkey key.pem -days 30 -out old.crt");
        files.openssl("genpkey -quiet -algorithm RSA -out other.pem");
        files.openssl("pkcs12 -export -inkey key.pem -in good.pem -passout pass:secret -out both.pfx");
        let path = |name: &str| files.0.path().join(name);
        let text = |name: &str| fs::read_to_string(path(name)).unwrap();
        let marked = format!("\u{feff}{}{}", text("good.pem"), text("key.pem")).replace('\n', "\r\n");
        fs::write(path("all.pem"), marked).unwrap();
        for name in ["all.pem", "key.der"] {
            fs::set_permissions(path(name), fs::Permissions::from_mode(0o600)).unwrap();
        }
        for (certificate, key) in
            [("all.pem", "all.pem"), ("good.der", "key.der"), ("good.pem", "pkcs1.pem"), ("good.pem", "key.pem")]
        {
            assert_eq!(files.settings(certificate, key).certificate, path(certificate));
            tls_config(&files.settings(certificate, key)).unwrap_or_else(|e| panic!("{certificate} {key}: {e}"));
        }
        for (certificate, key, words) in [
            ("good.pem", "sealed.pem", "encrypted under a passphrase, and a private key is needed; decrypt it"),
            ("good.pem", "old.pem", "encrypted under a passphrase"),
            ("good.pem", "good.pem", "it is a certificate, and a private key is needed"),
            ("good.pem", "both.pfx", "openssl pkcs12 -in FILE -nocerts -nodes"),
            ("request.pem", "key.pem", "it is a certificate request"),
            ("old.crt", "key.pem", "X.509 version 1"),
            ("good.pem", "other.pem", "other.pem cannot be used together: the key is that of another"),
            ("key.pem", "key.pem", "give the certificate of that key"),
            ("both.pfx", "key.pem", "openssl pkcs12 -in FILE -nokeys"),
            ("none.pem", "key.pem", "none.pem: No such file"),
        ] {
            // Certificates are not secret, but keys are.
            for name in [certificate, key] {
                let _ = fs::set_permissions(path(name), fs::Permissions::from_mode(0o600));
            }
            let said = files.refused(certificate, key);
            assert!(said.contains(words), "{said}\nlacks\n{words}");
        }
        fs::set_permissions(path("key.pem"), fs::Permissions::from_mode(0o644)).unwrap();
        let said = files.refused("good.pem", "key.pem");
        assert!(said.contains("others may read") && said.contains("chmod 600"), "{said}");
    }
}
