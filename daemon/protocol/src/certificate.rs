//! X.509 certificates: read leniently, built in two phases.
//!
//! Reading judges one thing only, the strength of the key: what else a certificate must be depends on where it stands.
//! Building is split because the signature is made in an HSM, asynchronously: [`Template::to_be_signed`] gives the octets
//! to sign, [`ToBeSigned::assemble`] takes the signature.

use std::fmt;
use std::ops::{BitOr, Range};
use std::time::Duration;

use data_encoding::HEXLOWER;
use der::asn1::{Any, AnyRef, BitStringRef, Null, ObjectIdentifier, OctetString, PrintableString, SetOfVec, Uint};
use der::oid::AssociatedOid;
use der::{DateTime, Decode, Encode, Sequence, Tag};
use ring::rand::SecureRandom as _;
use x509_cert::attr::AttributeTypeAndValue;
use x509_cert::der::flagset::FlagSet;
use x509_cert::ext::{Extension, pkix};
use x509_cert::spki::AlgorithmIdentifier;
use x509_cert::time::{Time, Validity};
use x509_parser::certificate::X509CertificateParser;
use x509_parser::nom::Parser as _;
use x509_parser::signature_algorithm::RsaSsaPssParams;
use x509_parser::x509::{AlgorithmIdentifier as ParsedAlgorithm, X509Name};

use crate::algorithm::{SignatureAlgorithm, SignatureDigest};
use crate::input::{self, InputError};
use crate::pem;
use crate::rsa_key::{KeyError, RsaPrivateKey, RsaPublicKey, SignError, pem_decode, sha256};

const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");
const SERIAL_NUMBER: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.5");
const ORGANIZATIONAL_UNIT: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.11");
const EXTENSION_REQUEST: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.14");
const SHA256_WITH_RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11");

/// Why octets are not a certificate that may be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CertificateError {
    /// Not the DER (or PEM, where that is asked for) of an X.509 certificate.
    #[error("not an X.509 certificate")]
    NotX509,
    /// A certificate, and then something else.
    #[error("there are octets after the certificate")]
    TrailingOctets,
    /// The certificate's public key is not accepted.
    #[error("the certificate's key: {0}")]
    Key(#[from] KeyError),
}

/// Why an issuer's signature on a certificate is not accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CertificateSignatureError {
    /// Signed by another algorithm than RSA with SHA-256, SHA-384 or SHA-512 (PKCS#1 v1.5, or PSS with the same digest
    /// in MGF1 and a salt as long as the digest), or the certificate names two different ones.
    #[error("the certificate is not signed by an accepted algorithm")]
    Algorithm,
    /// The signature is not the issuer's over this certificate.
    #[error("the certificate's signature is wrong")]
    Signature,
}

/// Why a certificate cannot be built.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BuildError {
    /// An empty common name, or a serial number attribute with characters that PrintableString lacks.
    #[error("the name cannot stand in a certificate: {0}")]
    Name(&'static str),
    /// The serial number is zero or its top bit is set.
    #[error("the certificate's serial number must be positive and at most 127 bits long")]
    Serial,
    /// The times are reversed, before 1970 or after the year 9999.
    #[error("the certificate's validity is not a period that X.509 can express")]
    Validity,
    /// The system gave no random octets.
    #[error("no random octets")]
    Random,
    /// A part cannot be encoded; says which in the library's words.
    #[error("cannot encode the certificate: {0}")]
    Encoding(String),
}

impl From<der::Error> for BuildError {
    fn from(error: der::Error) -> Self {
        Self::Encoding(error.to_string())
    }
}

/// A set of key usages (RFC 5280, 4.2.1.3).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct KeyUsage(u16);

impl KeyUsage {
    /// Verifies signatures other than those on certificates.
    pub const DIGITAL_SIGNATURE: Self = Self(1 << 0);
    /// Encrypts keys.
    pub const KEY_ENCIPHERMENT: Self = Self(1 << 2);
    /// Encrypts data.
    pub const DATA_ENCIPHERMENT: Self = Self(1 << 3);
    /// Verifies signatures on certificates.
    pub const KEY_CERT_SIGN: Self = Self(1 << 5);

    /// Whether all of `other` are among these.
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

/// A certificate that was read: its octets and what the protocol asks about them. Its key is of accepted strength.
/// Nothing else is promised: it may have expired, and nobody checked who signed it.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate {
    der: Vec<u8>,
    to_be_signed: Range<usize>,
    signature: Range<usize>,
    /// `None`: not one of the accepted ones.
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
    /// Reads the DER of a certificate. Expired, self-signed, with unknown or malformed extensions: all are read.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn parse(der: &[u8]) -> Result<Self, CertificateError> {
        // Extensions are read below, the three that matter: a malformed one that nobody asks about is no obstacle.
        let (rest, parsed) = X509CertificateParser::new()
            .with_deep_parse_extensions(false)
            .parse(der)
            .map_err(|_| CertificateError::NotX509)?;
        if !rest.is_empty() {
            return Err(CertificateError::TrailingOctets);
        }
        // x509-parser takes any class of tag, and more elements than there should be, around what is signed. Nobody's
        // certificate needs that, and with it the same certificate could have many thumbprints.
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
            // RFC 5280 forbids an extension twice; which of the two was meant nobody knows, so neither counts.
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
            der: der.to_vec(),
        })
    }

    /// Reads one PEM block `CERTIFICATE`. Text around it is ignored. For files of administrators see [`crate::input`].
    ///
    /// # Errors
    /// [`CertificateError`]; [`CertificateError::TrailingOctets`] for a chain of several.
    pub fn from_pem(text: &str) -> Result<Self, CertificateError> {
        match pem_decode(text) {
            Ok(("CERTIFICATE", der)) => Self::parse(&der),
            Err(KeyError::TrailingOctets) => Err(CertificateError::TrailingOctets),
            _ => Err(CertificateError::NotX509),
        }
    }

    /// The one certificate of a file of an administrator, in any of the forms that [`input::certificate`] reads.
    ///
    /// # Errors
    /// [`InputError`].
    pub fn from_file(bytes: &[u8]) -> Result<Self, InputError> {
        input::certificate(bytes)
    }

    /// The certificate in PEM.
    #[must_use]
    pub fn to_pem(&self) -> String {
        std::mem::take(&mut *pem::encode("CERTIFICATE", &self.der))
    }

    /// The certificate's octets, as they were read.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.der
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

    /// The serial number, as its issuer wrote it.
    #[must_use]
    pub fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// The subject's (first) common name, if it has one that is a UTF-8, printable, numeric or IA5 string.
    #[must_use]
    pub fn common_name(&self) -> Option<&str> {
        self.common_name.as_deref()
    }

    /// The subject's (first) `serialNumber` attribute, 2.5.4.5; not to be taken for the certificate's serial number.
    #[must_use]
    pub fn subject_serial_number(&self) -> Option<&str> {
        self.subject_serial_number.as_deref()
    }

    /// The subject's (first) organizational unit, 2.5.4.11.
    #[must_use]
    pub fn organizational_unit(&self) -> Option<&str> {
        self.organizational_unit.as_deref()
    }

    /// Whether the certificate names all these usages. One without the extension names none.
    #[must_use]
    pub fn has_key_usage(&self, usage: KeyUsage) -> bool {
        self.key_usage.contains(usage)
    }

    /// Whether the certificate names this extended key usage, an object identifier in dotted form.
    #[must_use]
    pub fn has_extended_key_usage(&self, oid: &str) -> bool {
        ObjectIdentifier::new(oid).is_ok_and(|oid| self.extended_key_usages.contains(&oid))
    }

    /// The subject key identifier, if the certificate has one.
    #[must_use]
    pub fn subject_key_id(&self) -> Option<&[u8]> {
        self.subject_key_id.as_deref()
    }

    /// SHA-256 of the certificate's octets.
    #[must_use]
    pub fn thumbprint(&self) -> [u8; 32] {
        sha256(&self.der)
    }

    /// Checks the X.509 signature by the issuer's key, over the octets as they were read.
    ///
    /// # Errors
    /// [`CertificateSignatureError`]; SHA-1 is refused.
    pub fn verify_signed_by(&self, issuer: &RsaPublicKey) -> Result<(), CertificateSignatureError> {
        let algorithm = self.signature_algorithm.ok_or(CertificateSignatureError::Algorithm)?;
        issuer
            .verify(algorithm, self.part(&self.to_be_signed), self.part(&self.signature))
            .map_err(|_| CertificateSignatureError::Signature)
    }

    fn part(&self, range: &Range<usize>) -> &[u8] {
        // Every range was found inside these octets when they were read.
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

/// Where `part` lies in `whole`, of which it is a slice.
fn range_of(whole: &[u8], part: &[u8]) -> Option<Range<usize>> {
    let start = part.as_ptr().addr().checked_sub(whole.as_ptr().addr())?;
    let range = start..start.checked_add(part.len())?;
    (whole.get(range.clone())? == part).then_some(range)
}

fn attribute(name: &X509Name<'_>, oid: ObjectIdentifier) -> Option<String> {
    let found = name.iter_attributes().find(|attribute| attribute.attr_type().as_bytes() == oid.as_bytes())?;
    found.as_str().ok().map(str::to_owned)
}

/// The accepted algorithm that an X.509 AlgorithmIdentifier means.
fn signature_algorithm(identifier: &ParsedAlgorithm<'_>) -> Option<SignatureAlgorithm> {
    let oid = ObjectIdentifier::from_bytes(identifier.algorithm.as_bytes()).ok()?;
    // RFC 4055 wants NULL parameters and tells readers to take absent ones as well.
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

/// A subject's or issuer's name: a common name, and perhaps a `serialNumber` attribute and an organizational unit, in this
/// order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DistinguishedName {
    /// 2.5.4.3, written as a UTF-8 string; not empty.
    pub common_name: String,
    /// 2.5.4.5, written as a printable string.
    pub serial_number: Option<String>,
    /// 2.5.4.11, written as a UTF-8 string.
    pub organizational_unit: Option<String>,
}

impl DistinguishedName {
    /// A name of a common name only.
    #[must_use]
    pub fn new(common_name: impl Into<String>) -> Self {
        Self { common_name: common_name.into(), ..Self::default() }
    }

    /// The DER of the name.
    ///
    /// # Errors
    /// [`BuildError::Name`].
    pub fn to_der(&self) -> Result<Vec<u8>, BuildError> {
        if self.common_name.is_empty() {
            return Err(BuildError::Name("the common name is empty"));
        }
        let mut names = Vec::with_capacity(3);
        names.push(single(COMMON_NAME, Any::new(Tag::Utf8String, self.common_name.as_bytes())?)?);
        if let Some(serial) = &self.serial_number {
            let serial = PrintableString::new(serial)
                .map_err(|_| BuildError::Name("the serial number has characters that are not printable-string ones"))?;
            names.push(single(SERIAL_NUMBER, Any::encode_from(&serial)?)?);
        }
        if let Some(unit) = &self.organizational_unit {
            if unit.is_empty() {
                return Err(BuildError::Name("the organizational unit is empty"));
            }
            names.push(single(ORGANIZATIONAL_UNIT, Any::new(Tag::Utf8String, unit.as_bytes())?)?);
        }
        Ok(names.to_der()?)
    }
}

/// A relative distinguished name of one attribute.
fn single(oid: ObjectIdentifier, value: Any) -> Result<SetOfVec<AttributeTypeAndValue>, BuildError> {
    let mut set = SetOfVec::new();
    set.insert(AttributeTypeAndValue { oid, value })?;
    Ok(set)
}

/// What a certificate to be made shall say. It is signed with `sha256WithRSAEncryption`.
#[derive(Clone, Debug)]
pub struct Template {
    /// Whom it is about.
    pub subject: DistinguishedName,
    /// DER of the issuer's name, as it stands in the issuer's certificate; `None`: the subject itself (self-signed).
    pub issuer_der: Option<Vec<u8>>,
    /// The certified key.
    pub key: RsaPublicKey,
    /// Serial number, big-endian, positive with the top bit clear: see [`random_serial`].
    pub serial: [u8; 16],
    /// First second of the validity, unix time.
    pub not_before: i64,
    /// Last second of the validity, unix time.
    pub not_after: i64,
    /// Key usages, in a critical extension; an empty set leaves the extension out.
    pub key_usage: KeyUsage,
    /// Extended key usages as dotted object identifiers, in an extension that is not critical; none leaves it out.
    pub extended_key_usages: Vec<&'static str>,
    /// Basic constraints, critical: whether it is a CA's. `None` leaves the extension out.
    pub ca: Option<bool>,
    /// Subject key identifier, usually [`key_id`] of the key. `None` leaves the extension out.
    pub subject_key_id: Option<Vec<u8>>,
    /// Authority key identifier, the issuer's subject key identifier. `None` leaves the extension out.
    pub authority_key_id: Option<Vec<u8>>,
}

/// `TBSCertificate` (RFC 5280, 4.1), version 3.
#[derive(Sequence)]
struct TbsCertificate {
    #[asn1(context_specific = "0", tag_mode = "EXPLICIT")]
    version: u8,
    serial_number: Uint,
    signature: AlgorithmIdentifier<Any>,
    issuer: Any,
    validity: Validity,
    subject: Any,
    subject_public_key_info: Any,
    #[asn1(context_specific = "3", tag_mode = "EXPLICIT", optional = "true")]
    extensions: Option<Vec<Extension>>,
}

impl Template {
    /// The certificate without its signature.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn to_be_signed(&self) -> Result<ToBeSigned, BuildError> {
        if self.serial[0] & 0x80 != 0 || self.serial == [0; 16] {
            return Err(BuildError::Serial);
        }
        if self.not_before > self.not_after {
            return Err(BuildError::Validity);
        }
        let subject = self.subject.to_der()?;
        let extensions = self.extensions()?;
        let octets = TbsCertificate {
            version: 2,
            serial_number: Uint::new(&self.serial)?,
            signature: signing_algorithm()?,
            issuer: Any::from_der(self.issuer_der.as_deref().unwrap_or(&subject))?,
            validity: Validity::new(time(self.not_before)?, time(self.not_after)?),
            subject: Any::from_der(&subject)?,
            subject_public_key_info: Any::from_der(self.key.spki_der())?,
            extensions: (!extensions.is_empty()).then_some(extensions),
        }
        .to_der()?;
        Ok(ToBeSigned { octets, algorithm: signing_algorithm()?.to_der()? })
    }

    /// The same as a request to an issuer (PKCS#10, RFC 2986): name, key and, as an extension request, the extensions. Serial
    /// number, validity and issuer are for the issuer to say. It is signed by the key that is to be certified.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn to_be_requested(&self) -> Result<ToBeSigned, BuildError> {
        let subject = self.subject.to_der()?;
        let extensions = tlv(0x31, &[&self.extensions()?.to_der()?]);
        let attribute = tlv(0x30, &[&EXTENSION_REQUEST.to_der()?, &extensions]);
        let version = tlv(0x02, &[&[0]]);
        let octets = tlv(0x30, &[&version, &subject, self.key.spki_der(), &tlv(0xa0, &[&attribute])]);
        Ok(ToBeSigned { octets, algorithm: signing_algorithm()?.to_der()? })
    }

    fn extensions(&self) -> Result<Vec<Extension>, BuildError> {
        let mut extensions = Vec::new();
        if let Some(ca) = self.ca {
            let constraints = pkix::BasicConstraints { ca, path_len_constraint: None };
            extensions.push(extension(&constraints, true)?);
        }
        if self.key_usage != KeyUsage::default() {
            let usage = pkix::KeyUsage(FlagSet::new_truncated(self.key_usage.0));
            extensions.push(extension(&usage, true)?);
        }
        if !self.extended_key_usages.is_empty() {
            let usages = self.extended_key_usages.iter().map(|oid| ObjectIdentifier::new(oid));
            let usages = usages.collect::<Result<Vec<_>, _>>().map_err(der::Error::from)?;
            extensions.push(extension(&pkix::ExtendedKeyUsage(usages), false)?);
        }
        if let Some(id) = &self.subject_key_id {
            let id = pkix::SubjectKeyIdentifier(OctetString::new(id.as_slice())?);
            extensions.push(extension(&id, false)?);
        }
        if let Some(id) = &self.authority_key_id {
            let id = pkix::AuthorityKeyIdentifier {
                key_identifier: Some(OctetString::new(id.as_slice())?),
                ..Default::default()
            };
            extensions.push(extension(&id, false)?);
        }
        Ok(extensions)
    }
}

/// A certificate, or a request for one, without its signature.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ToBeSigned {
    octets: Vec<u8>,
    /// DER of the AlgorithmIdentifier of the signature.
    algorithm: Vec<u8>,
}

impl ToBeSigned {
    /// The octets that the issuer signs with RSASSA-PKCS1-v1_5 and SHA-256.
    #[must_use]
    pub fn octets(&self) -> &[u8] {
        &self.octets
    }

    /// The DER of the certificate with this signature. The signature is not checked.
    #[must_use]
    pub fn assemble(&self, signature: &[u8]) -> Vec<u8> {
        // A bit string's first octet counts the unused bits of its last.
        let signature = tlv(0x03, &[&[0], signature]);
        tlv(0x30, &[&self.octets, &self.algorithm, &signature])
    }

    /// The DER of the certificate, signed by a key in software.
    ///
    /// # Errors
    /// [`SignError`].
    pub fn sign_with(&self, issuer: &RsaPrivateKey) -> Result<Vec<u8>, SignError> {
        let signature = issuer.sign(SignatureAlgorithm::Pkcs1(SignatureDigest::Sha256), &self.octets)?;
        Ok(self.assemble(&signature))
    }
}

/// A certificate request (DER) in PEM.
#[must_use]
pub fn request_to_pem(der: &[u8]) -> String {
    std::mem::take(&mut *pem::encode("CERTIFICATE REQUEST", der))
}

/// A random serial number: 16 octets, positive, and 16 octets in its DER as well (the top bit is 0, the next is 1).
///
/// # Errors
/// [`BuildError::Random`].
pub fn random_serial() -> Result<[u8; 16], BuildError> {
    let mut serial = [0; 16];
    ring::rand::SystemRandom::new().fill(&mut serial).map_err(|_| BuildError::Random)?;
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(serial)
}

/// A key identifier: the first 20 octets of the SHA-256 of the SubjectPublicKeyInfo (in the manner of RFC 7093).
#[must_use]
pub fn key_id(key: &RsaPublicKey) -> [u8; 20] {
    let mut id = [0; 20];
    id.copy_from_slice(&key.spki_sha256()[..20]);
    id
}

fn signing_algorithm() -> Result<AlgorithmIdentifier<Any>, BuildError> {
    Ok(AlgorithmIdentifier { oid: SHA256_WITH_RSA, parameters: Some(Any::encode_from(&Null)?) })
}

fn extension<T: AssociatedOid + Encode>(value: &T, critical: bool) -> Result<Extension, BuildError> {
    Ok(Extension { extn_id: T::OID, critical, extn_value: OctetString::new(value.to_der()?)? })
}

/// UTCTime through 2049, then GeneralizedTime, as RFC 5280 wants.
fn time(unix: i64) -> Result<Time, BuildError> {
    let seconds = u64::try_from(unix).map_err(|_| BuildError::Validity)?;
    let date = DateTime::from_unix_duration(Duration::from_secs(seconds)).map_err(|_| BuildError::Validity)?;
    Ok(Time::from(date))
}

/// A DER element: tag, definite length, and the content, which is given in pieces. Unlike a general encoder it cannot fail.
pub(crate) fn tlv(tag: u8, content: &[&[u8]]) -> Vec<u8> {
    let length: usize = content.iter().map(|piece| piece.len()).sum();
    let mut out = Vec::with_capacity(length + 10);
    out.push(tag);
    if length < 0x80 {
        out.push(length as u8);
    } else {
        let octets = length.to_be_bytes();
        let zeros = octets.iter().take_while(|octet| **octet == 0).count();
        out.push(0x80 | (octets.len() - zeros) as u8);
        out.extend_from_slice(&octets[zeros..]);
    }
    for piece in content {
        out.extend_from_slice(piece);
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::rsa_key::testing::key;
    use x509_parser::prelude::FromDer as _;

    fn template() -> Template {
        Template {
            subject: DistinguishedName {
                common_name: "Näme".to_owned(),
                serial_number: Some("00ff".to_owned()),
                organizational_unit: Some("ünit".to_owned()),
            },
            issuer_der: None,
            key: key(0).public().clone(),
            serial: random_serial().unwrap(),
            not_before: 1_700_000_000,
            not_after: 1_700_000_100,
            key_usage: KeyUsage::KEY_ENCIPHERMENT | KeyUsage::DATA_ENCIPHERMENT,
            extended_key_usages: vec!["1.3.6.1.4.1.311.47.1.1"],
            ca: Some(false),
            subject_key_id: Some(key_id(key(0).public()).to_vec()),
            authority_key_id: None,
        }
    }

    #[test]
    fn what_is_built_is_read_back() {
        let template = template();
        let der = template.to_be_signed().unwrap().sign_with(key(0)).unwrap();
        let certificate = Certificate::parse(&der).unwrap();
        assert_eq!(certificate.der(), der);
        assert_eq!(certificate.key(), key(0).public());
        assert_eq!(certificate.common_name(), Some("Näme"));
        assert_eq!(certificate.subject_serial_number(), Some("00ff"));
        assert_eq!(certificate.organizational_unit(), Some("ünit"));
        assert_eq!(certificate.subject_der(), template.subject.to_der().unwrap());
        assert_eq!(certificate.issuer_der(), certificate.subject_der());
        assert_eq!((certificate.not_before(), certificate.not_after()), (1_700_000_000, 1_700_000_100));
        assert!(certificate.has_key_usage(KeyUsage::KEY_ENCIPHERMENT));
        assert!(certificate.has_key_usage(KeyUsage::KEY_ENCIPHERMENT | KeyUsage::DATA_ENCIPHERMENT));
        assert!(!certificate.has_key_usage(KeyUsage::KEY_ENCIPHERMENT | KeyUsage::DIGITAL_SIGNATURE));
        assert!(!certificate.has_key_usage(KeyUsage::KEY_CERT_SIGN));
        assert!(certificate.has_extended_key_usage("1.3.6.1.4.1.311.47.1.1"));
        assert!(!certificate.has_extended_key_usage("1.3.6.1.4.1.311.47.1"));
        assert!(!certificate.has_extended_key_usage("nonsense"));
        assert_eq!(certificate.subject_key_id(), Some(&key_id(key(0).public())[..]));
        assert_eq!(certificate.verify_signed_by(key(0).public()), Ok(()));
        assert_eq!(certificate.verify_signed_by(key(1).public()), Err(CertificateSignatureError::Signature));
        assert_eq!(Certificate::from_pem(&certificate.to_pem()).unwrap(), certificate);
        assert_eq!(&RsaPublicKey::from_any(&der).unwrap(), key(0).public());
    }

    #[test]
    fn one_without_extensions_has_no_usage() {
        let template = Template {
            key_usage: KeyUsage::default(),
            extended_key_usages: Vec::new(),
            ca: None,
            subject_key_id: None,
            ..template()
        };
        let der = template.to_be_signed().unwrap().sign_with(key(0)).unwrap();
        let certificate = Certificate::parse(&der).unwrap();
        assert!(!certificate.has_key_usage(KeyUsage::KEY_ENCIPHERMENT));
        assert!(!certificate.has_extended_key_usage("1.3.6.1.4.1.311.47.1.1"));
        assert_eq!(certificate.subject_key_id(), None);
    }

    #[test]
    fn an_extension_twice_does_not_count() {
        let mut template = template();
        template.key_usage = KeyUsage::default();
        let mut extensions = template.extensions().unwrap();
        let usage = pkix::KeyUsage(FlagSet::new_truncated(KeyUsage::KEY_ENCIPHERMENT.0));
        for twice in [false, true] {
            extensions.push(extension(&usage, true).unwrap());
            let tbs = TbsCertificate {
                version: 2,
                serial_number: Uint::new(&[1]).unwrap(),
                signature: signing_algorithm().unwrap(),
                issuer: Any::from_der(&template.subject.to_der().unwrap()).unwrap(),
                validity: Validity::new(time(0).unwrap(), time(1).unwrap()),
                subject: Any::from_der(&template.subject.to_der().unwrap()).unwrap(),
                subject_public_key_info: Any::from_der(key(0).public().spki_der()).unwrap(),
                extensions: Some(extensions.clone()),
            };
            let algorithm = signing_algorithm().unwrap().to_der().unwrap();
            let der = ToBeSigned { octets: tbs.to_der().unwrap(), algorithm }.assemble(b"no signature");
            let certificate = Certificate::parse(&der).unwrap();
            assert_eq!(certificate.has_key_usage(KeyUsage::KEY_ENCIPHERMENT), !twice);
        }
    }

    #[test]
    fn the_two_names_of_the_algorithm_must_agree() {
        let mut to_be_signed = template().to_be_signed().unwrap();
        to_be_signed.algorithm[12] += 1; // sha384WithRSAEncryption
        let signature = key(0).sign(SignatureAlgorithm::Pkcs1(SignatureDigest::Sha384), to_be_signed.octets()).unwrap();
        let certificate = Certificate::parse(&to_be_signed.assemble(&signature)).unwrap();
        assert_eq!(certificate.verify_signed_by(key(0).public()), Err(CertificateSignatureError::Algorithm));
    }

    #[test]
    fn what_is_not_a_certificate_is_refused() {
        let der = template().to_be_signed().unwrap().sign_with(key(0)).unwrap();
        assert_eq!(Certificate::parse(&[&der[..], &[0]].concat()), Err(CertificateError::TrailingOctets));
        for length in 0..der.len() {
            assert_eq!(Certificate::parse(&der[..length]), Err(CertificateError::NotX509));
        }
        assert_eq!(RsaPublicKey::from_any(&[&der[..], &[0]].concat()), Err(KeyError::TrailingOctets));
        let pem = Certificate::parse(&der).unwrap().to_pem();
        assert_eq!(Certificate::from_pem(&[&pem[..], &pem].concat()), Err(CertificateError::TrailingOctets));
        assert_eq!(Certificate::from_pem(&pem.replace("CERTIFICATE", "PUBLIC KEY")), Err(CertificateError::NotX509));
        assert_eq!(Certificate::from_pem(""), Err(CertificateError::NotX509));
    }

    #[test]
    fn what_cannot_be_a_certificate_is_not_built() {
        let refused = |change: &dyn Fn(&mut Template)| {
            let mut template = template();
            change(&mut template);
            template.to_be_signed().unwrap_err()
        };
        assert!(matches!(refused(&|t| t.subject.common_name.clear()), BuildError::Name(_)));
        assert!(matches!(refused(&|t| t.subject.serial_number = Some("a*b".to_owned())), BuildError::Name(_)));
        assert_eq!(refused(&|t| t.serial = [0; 16]), BuildError::Serial);
        assert_eq!(refused(&|t| t.serial = [0x80; 16]), BuildError::Serial);
        assert_eq!(refused(&|t| t.not_after = t.not_before - 1), BuildError::Validity);
        assert_eq!(refused(&|t| t.not_before = -1), BuildError::Validity);
        assert_eq!(refused(&|t| t.not_after = i64::MAX), BuildError::Validity);
        assert!(matches!(refused(&|t| t.extended_key_usages = vec!["x"]), BuildError::Encoding(_)));
        assert!(matches!(refused(&|t| t.issuer_der = Some(vec![0x30])), BuildError::Encoding(_)));
    }

    #[test]
    fn serials_are_positive_and_differ() {
        let serials: Vec<_> = (0..100).map(|_| random_serial().unwrap()).collect();
        assert!(serials.iter().all(|serial| serial[0] & 0xc0 == 0x40));
        assert!(serials.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn a_request_asks_for_what_the_template_says() {
        let template = template();
        let to_be_signed = template.to_be_requested().unwrap();
        let der = to_be_signed.sign_with(key(0)).unwrap();
        let (rest, parsed) = x509_parser::certification_request::X509CertificationRequest::from_der(&der).unwrap();
        assert!(rest.is_empty());
        assert_eq!(parsed.certification_request_info.raw, to_be_signed.octets());
        assert_eq!(parsed.certification_request_info.subject.as_raw(), template.subject.to_der().unwrap());
        assert_eq!(parsed.certification_request_info.subject_pki.raw, key(0).public().spki_der());
        let asked: Vec<_> = parsed.requested_extensions().unwrap().collect();
        assert_eq!(asked.len(), template.extensions().unwrap().len());
        let signature = &parsed.signature_value.data;
        key(0).public().verify(SignatureAlgorithm::DEFAULT, to_be_signed.octets(), signature).unwrap();
        assert!(request_to_pem(&der).starts_with("-----BEGIN CERTIFICATE REQUEST-----\n"));
    }

    #[test]
    fn lengths_are_minimal() {
        let length = |octets: usize| {
            let element = tlv(4, &[&vec![0; octets]]);
            element[1..element.len() - octets].to_vec()
        };
        assert_eq!(length(0), [0]);
        assert_eq!(length(127), [127]);
        assert_eq!(length(128), [0x81, 128]);
        assert_eq!(length(256), [0x82, 1, 0]);
        assert_eq!(length(65536), [0x83, 1, 0, 0]);
    }
}
