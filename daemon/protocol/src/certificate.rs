//! A lenient reader for X.509 certificates. [`build`] creates certificates.
//!
//! The only requirement here is a strong key. All other requirements depend on the use of the certificate.

pub mod build;

use std::fmt;
use std::ops::{BitOr, Range};

use data_encoding::HEXLOWER;
use der::asn1::{AnyRef, BitStringRef, ObjectIdentifier};
use der::oid::AssociatedOid;
use der::{Decode, Sequence};
use x509_cert::ext::pkix;
use x509_cert::spki::AlgorithmIdentifier;
use x509_parser::certificate::X509CertificateParser;
use x509_parser::nom::Parser as _;
use x509_parser::signature_algorithm::RsaSsaPssParams;
use x509_parser::x509::{AlgorithmIdentifier as ParsedAlgorithm, X509Name};

use crate::algorithm::{SignatureAlgorithm, SignatureDigest};
use crate::hash::sha256;
use crate::pem::{self, NotOneBlock};
use crate::rsa_key::{KeyError, RsaPublicKey};

const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");
const SERIAL_NUMBER: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.5");
const ORGANIZATIONAL_UNIT: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.11");

/// Why bytes are not an accepted certificate.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CertificateError {
    /// The bytes are not the DER (or PEM, if PEM is expected) of an X.509 certificate.
    #[error("not an X.509 certificate")]
    NotX509,
    /// Bytes follow the certificate.
    #[error("there are octets after the certificate")]
    TrailingOctets,
    /// The certificate's public key is not accepted.
    #[error("the certificate's key: {0}")]
    Key(#[from] KeyError),
}

/// Why an issuer's signature on a certificate is rejected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CertificateSignatureError {
    /// The algorithm is not RSA with SHA-256, SHA-384 or SHA-512 (PKCS#1 v1.5, or PSS with the same digest in MGF1 and
    /// a salt of the digest's length), or the certificate names two different algorithms.
    #[error("the certificate is not signed by an accepted algorithm")]
    Algorithm,
    /// The signature is not the issuer's signature over this certificate.
    #[error("the certificate's signature is wrong")]
    Signature,
}

/// A set of key usages (RFC 5280, 4.2.1.3).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct KeyUsage(u16);

impl KeyUsage {
    /// For signatures other than those on certificates.
    pub const DIGITAL_SIGNATURE: Self = Self(1 << 0);
    /// For encrypting keys.
    pub const KEY_ENCIPHERMENT: Self = Self(1 << 2);
    /// For encrypting data.
    pub const DATA_ENCIPHERMENT: Self = Self(1 << 3);
    /// For signatures on certificates.
    pub(crate) const KEY_CERT_SIGN: Self = Self(1 << 5);

    /// Whether this set contains all of `other`.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for KeyUsage {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for KeyUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyUsage({:#b})", self.0)
    }
}

/// `Certificate` (RFC 5280, 4.1).
#[derive(Sequence)]
struct Outer<'a> {
    to_be_signed: AnyRef<'a>,
    algorithm: AlgorithmIdentifier<AnyRef<'a>>,
    signature: BitStringRef<'a>,
}

/// A parsed certificate: its bytes and the fields that the protocol uses. Its key is strong enough. Nothing else is
/// checked: it may have expired, and its signature is not verified.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate {
    der: Vec<u8>,
    thumbprint: [u8; 32],
    to_be_signed: Range<usize>,
    signature: Range<usize>,
    /// `None`: the algorithm is not accepted.
    signature_algorithm: Option<SignatureAlgorithm>,
    key: RsaPublicKey,
    subject: Range<usize>,
    issuer: Range<usize>,
    not_before: i64,
    not_after: i64,
    serial: Vec<u8>,
    common_name: Option<String>,
    subject_serial_number: Option<String>,
    organizational_unit: Option<String>,
    key_usage: KeyUsage,
    extended_key_usages: Vec<ObjectIdentifier>,
    subject_key_id: Option<Vec<u8>>,
}

impl Certificate {
    /// Parses the DER of a certificate. Expired and self-signed certificates are accepted, and so are unknown or
    /// malformed extensions.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn parse(der: &[u8]) -> Result<Self, CertificateError> {
        // Three extensions matter, and they are parsed below. A malformed extension of another kind is not an error.
        let (rest, parsed) = X509CertificateParser::new()
            .with_deep_parse_extensions(false)
            .parse(der)
            .map_err(|_| CertificateError::NotX509)?;
        if !rest.is_empty() {
            return Err(CertificateError::TrailingOctets);
        }
        // x509-parser accepts any tag class, and additional elements, around the signed part. Real certificates do not
        // have them, and accepting them would give one certificate many thumbprints.
        let outer = Outer::from_der(der).map_err(|_| CertificateError::NotX509)?;
        if outer.signature.unused_bits() != 0 {
            return Err(CertificateError::NotX509);
        }
        let place = |part: &[u8]| range_of(der, part).ok_or(CertificateError::NotX509);
        let subject_public_key = parsed.public_key().raw;
        let signature_algorithm = if parsed.signature_algorithm == parsed.tbs_certificate.signature {
            signature_algorithm(&parsed.signature_algorithm)
        } else {
            None
        };
        let extension = |oid: ObjectIdentifier| {
            let mut found = parsed.extensions().iter().filter(|extension| extension.oid.as_bytes() == oid.as_bytes());
            // RFC 5280 forbids duplicate extensions. If an extension occurs twice, ignore both.
            found.next().filter(|_| found.next().is_none()).map(|extension| extension.value)
        };
        let key_usage = extension(pkix::KeyUsage::OID).and_then(|value| pkix::KeyUsage::from_der(value).ok());
        let extended =
            extension(pkix::ExtendedKeyUsage::OID).and_then(|value| pkix::ExtendedKeyUsage::from_der(value).ok());
        let key_id = extension(pkix::SubjectKeyIdentifier::OID)
            .and_then(|value| pkix::SubjectKeyIdentifier::from_der(value).ok());
        Ok(Self {
            to_be_signed: place(parsed.tbs_certificate.as_ref())?,
            signature: place(&parsed.signature_value.data)?,
            signature_algorithm,
            key: RsaPublicKey::from_spki_der(subject_public_key)?,
            subject: place(parsed.subject().as_raw())?,
            issuer: place(parsed.issuer().as_raw())?,
            not_before: parsed.validity().not_before.timestamp(),
            not_after: parsed.validity().not_after.timestamp(),
            serial: parsed.raw_serial().to_vec(),
            common_name: attribute(parsed.subject(), COMMON_NAME),
            subject_serial_number: attribute(parsed.subject(), SERIAL_NUMBER),
            organizational_unit: attribute(parsed.subject(), ORGANIZATIONAL_UNIT),
            key_usage: key_usage.map_or(KeyUsage::default(), |usage| KeyUsage(usage.0.bits())),
            extended_key_usages: extended.map_or_else(Vec::new, |usages| usages.0),
            subject_key_id: key_id.map(|id| id.0.into_bytes().into_vec()),
            thumbprint: sha256(der),
            der: der.to_vec(),
        })
    }

    /// Reads one PEM block `CERTIFICATE`. Text around it is ignored. For files from administrators use
    /// [`crate::input`].
    ///
    /// # Errors
    /// [`CertificateError`]; [`CertificateError::TrailingOctets`] for a chain of certificates.
    pub fn from_pem(text: &str) -> Result<Self, CertificateError> {
        match pem::only_block(text) {
            Ok(("CERTIFICATE", der)) => Self::parse(&der),
            Err(NotOneBlock::Several) => Err(CertificateError::TrailingOctets),
            _ => Err(CertificateError::NotX509),
        }
    }

    /// The certificate as PEM.
    #[must_use]
    pub fn to_pem(&self) -> String {
        std::mem::take(&mut *pem::encode("CERTIFICATE", &self.der))
    }

    /// The certificate's bytes, unchanged.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Bytes of memory that it takes with its key, but for some short texts.
    pub(crate) fn memory(&self) -> usize {
        size_of::<Self>() + self.der.len() + self.key.memory()
    }

    /// The certified key.
    #[must_use]
    pub fn key(&self) -> &RsaPublicKey {
        &self.key
    }

    /// DER of the subject's name.
    #[must_use]
    pub fn subject_der(&self) -> &[u8] {
        self.part(&self.subject)
    }

    /// DER of the issuer's name.
    #[must_use]
    pub fn issuer_der(&self) -> &[u8] {
        self.part(&self.issuer)
    }

    /// First second of the validity, unix time.
    #[must_use]
    pub fn not_before(&self) -> i64 {
        self.not_before
    }

    /// Last second of the validity, unix time.
    #[must_use]
    pub fn not_after(&self) -> i64 {
        self.not_after
    }

    /// The serial number, as the issuer wrote it.
    #[must_use]
    pub fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// The subject's first common name, if it is a UTF-8, printable, numeric or IA5 string.
    #[must_use]
    pub fn common_name(&self) -> Option<&str> {
        self.common_name.as_deref()
    }

    /// The subject's first `serialNumber` attribute, 2.5.4.5. Not the certificate's serial number.
    #[must_use]
    pub fn subject_serial_number(&self) -> Option<&str> {
        self.subject_serial_number.as_deref()
    }

    /// The subject's first organizational unit, 2.5.4.11.
    #[must_use]
    pub fn organizational_unit(&self) -> Option<&str> {
        self.organizational_unit.as_deref()
    }

    /// Whether the certificate has all these key usages. Without the extension it has none.
    #[must_use]
    pub fn has_key_usage(&self, usage: KeyUsage) -> bool {
        self.key_usage.contains(usage)
    }

    /// Whether the certificate has this extended key usage, an object identifier in dotted form.
    #[must_use]
    pub fn has_extended_key_usage(&self, oid: &str) -> bool {
        ObjectIdentifier::new(oid).is_ok_and(|oid| self.extended_key_usages.contains(&oid))
    }

    /// The subject key identifier, if the certificate has one.
    #[must_use]
    pub fn subject_key_id(&self) -> Option<&[u8]> {
        self.subject_key_id.as_deref()
    }

    /// SHA-256 of the certificate's bytes.
    #[must_use]
    pub fn thumbprint(&self) -> [u8; 32] {
        self.thumbprint
    }

    /// Verifies the X.509 signature with the issuer's key, over the bytes as they were read.
    ///
    /// # Errors
    /// [`CertificateSignatureError`]. SHA-1 is rejected.
    pub fn verify_signed_by(&self, issuer: &RsaPublicKey) -> Result<(), CertificateSignatureError> {
        let algorithm = self.signature_algorithm.ok_or(CertificateSignatureError::Algorithm)?;
        issuer
            .verify(algorithm, self.part(&self.to_be_signed), self.part(&self.signature))
            .map_err(|_| CertificateSignatureError::Signature)
    }

    fn part(&self, range: &Range<usize>) -> &[u8] {
        // The parser found every range inside these bytes.
        self.der.get(range.clone()).unwrap_or_default()
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("common_name", &self.common_name)
            .field("thumbprint", &HEXLOWER.encode(&self.thumbprint()))
            .finish_non_exhaustive()
    }
}

/// The position of `part` in `whole`. `part` must be a slice of `whole`.
fn range_of(whole: &[u8], part: &[u8]) -> Option<Range<usize>> {
    let start = part.as_ptr().addr().checked_sub(whole.as_ptr().addr())?;
    let range = start..start.checked_add(part.len())?;
    (whole.get(range.clone())? == part).then_some(range)
}

fn attribute(name: &X509Name<'_>, oid: ObjectIdentifier) -> Option<String> {
    let found = name.iter_attributes().find(|attribute| attribute.attr_type().as_bytes() == oid.as_bytes())?;
    found.as_str().ok().map(str::to_owned)
}

/// The accepted algorithm of an X.509 AlgorithmIdentifier.
fn signature_algorithm(identifier: &ParsedAlgorithm<'_>) -> Option<SignatureAlgorithm> {
    let oid = ObjectIdentifier::from_bytes(identifier.algorithm.as_bytes()).ok()?;
    // RFC 4055 requires NULL parameters, and requires readers to accept absent ones as well.
    let no_parameters =
        identifier.parameters.as_ref().is_none_or(|any| any.tag() == x509_parser::der_parser::asn1_rs::Tag::Null);
    match oid.to_string().as_str() {
        "1.2.840.113549.1.1.11" if no_parameters => Some(SignatureAlgorithm::Pkcs1(SignatureDigest::Sha256)),
        "1.2.840.113549.1.1.12" if no_parameters => Some(SignatureAlgorithm::Pkcs1(SignatureDigest::Sha384)),
        "1.2.840.113549.1.1.13" if no_parameters => Some(SignatureAlgorithm::Pkcs1(SignatureDigest::Sha512)),
        "1.2.840.113549.1.1.10" => {
            let parameters = RsaSsaPssParams::try_from(identifier.parameters.as_ref()?).ok()?;
            let mask = parameters.mask_gen_algorithm().ok()?;
            let digest_oid = parameters.hash_algorithm_oid();
            let (digest, length) = match digest_oid.to_id_string().as_str() {
                "2.16.840.1.101.3.4.2.1" => (SignatureDigest::Sha256, 32),
                "2.16.840.1.101.3.4.2.2" => (SignatureDigest::Sha384, 48),
                "2.16.840.1.101.3.4.2.3" => (SignatureDigest::Sha512, 64),
                _ => return None,
            };
            let matching = mask.mgf.to_id_string() == "1.2.840.113549.1.1.8"
                && mask.hash == *digest_oid
                && parameters.salt_length() == length
                && parameters.trailer_field() == 1;
            matching.then_some(SignatureAlgorithm::Pss(digest))
        }
        _ => None,
    }
}
