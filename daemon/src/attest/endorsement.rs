//! Verification of endorsement key certificates: the chain from the key's certificate to a configured root of a TPM vendor.

use std::path::{Path, PathBuf};
use std::time::Duration;

use claviger_protocol::attestation::tpm::endorsement_key_of;
use claviger_protocol::certificate::Certificate;
use claviger_protocol::rsa_key::RsaPublicKey;
use rustls::pki_types::{CertificateDer, SignatureVerificationAlgorithm, UnixTime};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use claviger_client::files::{self, FileError};

/// The extended key usage of endorsement key certificates: `tcg-kp-EKCertificate`.
const EK_CERTIFICATE: &str = "2.23.133.8.1";
/// The same object identifier, DER without tag and length.
const EK_CERTIFICATE_DER: &[u8] = &[0x67, 0x81, 0x05, 0x08, 0x01];

/// The signature algorithms that TPM vendors use.
static ALGORITHMS: &[&dyn SignatureVerificationAlgorithm] = &[
    webpki::ring::ECDSA_P256_SHA256,
    webpki::ring::ECDSA_P256_SHA384,
    webpki::ring::ECDSA_P384_SHA256,
    webpki::ring::ECDSA_P384_SHA384,
    webpki::ring::RSA_PKCS1_2048_8192_SHA256,
    webpki::ring::RSA_PKCS1_2048_8192_SHA384,
    webpki::ring::RSA_PKCS1_2048_8192_SHA512,
    webpki::ring::RSA_PSS_2048_8192_SHA256_LEGACY_KEY,
    webpki::ring::RSA_PSS_2048_8192_SHA384_LEGACY_KEY,
    webpki::ring::RSA_PSS_2048_8192_SHA512_LEGACY_KEY,
];

/// Why an endorsement key certificate is rejected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EndorsementError {
    /// No roots are configured.
    #[error(
        "attest.vendor_roots names no folder, so no TPM maker is trusted; set it, or register the bare key with --ek-public FILE --trust-ek"
    )]
    NoRoots,
    /// The folder cannot be read.
    #[error("attest.vendor_roots {}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A file of the folder cannot be read.
    #[error("attest.vendor_roots: {0}")]
    File(#[from] FileError),
    /// The certificate is not an endorsement key certificate.
    #[error("this is no certificate of an endorsement key: {0}")]
    Certificate(String),
    /// No chain leads from the certificate to a root.
    #[error("no certificate in {} vouches for this endorsement key: {problem}", path.display())]
    Chain {
        /// The folder.
        path: PathBuf,
        /// The reason.
        problem: String,
    },
}

/// Returns the endorsement key in the first of these certificates (DER) if a chain leads from it to a certificate in the folder
/// `roots`. The other certificates are possible intermediates. Certificates have to be valid at `now`, in seconds since 1970.
/// Blocks on files.
///
/// # Errors
/// [`EndorsementError`].
pub(crate) fn vouched_for(
    certificates: &[Vec<u8>],
    roots: Option<&Path>,
    now: i64,
) -> Result<RsaPublicKey, EndorsementError> {
    let wrong = |problem: &str| EndorsementError::Certificate(problem.to_owned());
    let (leaf, others) = certificates.split_first().ok_or_else(|| wrong("the file holds none"))?;
    let parsed = Certificate::parse(leaf).map_err(|error| EndorsementError::Certificate(error.to_string()))?;
    if !parsed.has_extended_key_usage(EK_CERTIFICATE) {
        return Err(wrong("it lacks the extended key usage 2.23.133.8.1"));
    }
    let key = endorsement_key_of(leaf).map_err(|error| EndorsementError::Certificate(error.to_string()))?;
    let path = roots.ok_or(EndorsementError::NoRoots)?;
    let trusted = vendor_roots(path)?;
    let chain = |problem: String| EndorsementError::Chain { path: path.to_owned(), problem };
    if trusted.is_empty() {
        return Err(chain("it holds no certificates".to_owned()));
    }
    // A certificate that cannot be an anchor is skipped: the others do not depend on it.
    let anchors: Vec<_> = trusted.iter().filter_map(|der| anchor_from_trusted_cert(der).ok()).collect();
    let others: Vec<_> = others.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let leaf = CertificateDer::from(leaf.as_slice());
    let now = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(now).unwrap_or_default()));
    let leaf = EndEntityCert::try_from(&leaf).map_err(|error| chain(error.to_string()))?;
    let usage = KeyUsage::required_if_present(EK_CERTIFICATE_DER);
    leaf.verify_for_usage(ALGORITHMS, &anchors, &others, now, usage, None, None)
        .map_err(|error| chain(error.to_string()))?;
    Ok(key)
}

/// Reads all certificates in the files of a folder. Blocks on files.
///
/// # Errors
/// [`EndorsementError::Folder`], [`EndorsementError::File`].
pub(crate) fn vendor_roots(path: &Path) -> Result<Vec<CertificateDer<'static>>, EndorsementError> {
    let failed = |source| EndorsementError::Folder { path: path.to_owned(), source };
    let mut all = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        if file.is_file() {
            all.extend(files::read_certificates(&file)?.into_iter().map(|entry| CertificateDer::from(entry.der)));
        }
    }
    Ok(all)
}
