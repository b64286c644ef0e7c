//! Builds certificates in two phases, because an HSM makes the signature asynchronously: [`Template::to_be_signed`]
//! gives the bytes to sign, [`ToBeSigned::assemble`] adds the signature.

use std::fmt;
use std::time::Duration;

use der::asn1::{Any, Ia5String, Null, ObjectIdentifier, OctetString, PrintableString, SetOfVec, Uint};
use der::oid::AssociatedOid;
use der::{DateTime, Decode, Encode, Sequence, Tag};
use ring::rand::SecureRandom as _;
use x509_cert::attr::AttributeTypeAndValue;
use x509_cert::der::flagset::FlagSet;
use x509_cert::ext::{Extension, pkix};
use x509_cert::spki::AlgorithmIdentifier;
use x509_cert::time::{Time, Validity};

use super::{COMMON_NAME, KeyUsage, ORGANIZATIONAL_UNIT, SERIAL_NUMBER};
use crate::algorithm::{SignatureAlgorithm, SignatureDigest};
use crate::ber::tlv;
use crate::pem;
use crate::rsa_key::{RsaPrivateKey, RsaPublicKey, SignError};

const EXTENSION_REQUEST: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.14");
const SHA256_WITH_RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11");

/// Why a certificate cannot be built.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BuildError {
    /// The common name is empty, or the serial number attribute has characters that PrintableString lacks.
    #[error("the name cannot stand in a certificate: {0}")]
    Name(&'static str),
    /// The serial number is zero or its top bit is set.
    #[error("the certificate's serial number must be positive and at most 127 bits long")]
    Serial,
    /// The times are reversed, before 1970 or after the year 9999.
    #[error("the certificate's validity is not a period that X.509 can express")]
    Validity,
    /// The system has no randomness.
    #[error("no random octets")]
    Random,
    /// A part cannot be encoded; holds the library's message.
    #[error("cannot encode the certificate: {0}")]
    Encoding(String),
}

impl From<der::Error> for BuildError {
    fn from(error: der::Error) -> Self {
        Self::Encoding(error.to_string())
    }
}

/// The name of a subject or issuer: parts like country and organization, a common name, an optional `serialNumber`
/// attribute and an optional organizational unit, in this order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DistinguishedName {
    /// The parts above the common name, the outermost first.
    pub above: Vec<(NamePart, String)>,
    /// 2.5.4.3, written as a UTF-8 string; not empty.
    pub common_name: String,
    /// 2.5.4.5, written as a printable string.
    pub serial_number: Option<String>,
    /// 2.5.4.11, written as a UTF-8 string.
    pub organizational_unit: Option<String>,
}

impl DistinguishedName {
    /// A name with a common name only.
    #[must_use]
    pub fn new(common_name: impl Into<String>) -> Self {
        Self { common_name: common_name.into(), ..Self::default() }
    }

    /// Reads a name as people write it: `CN=…,OU=…,O=…,L=…,ST=…,C=…,DC=…` in any order, or a bare common name. A comma
    /// or a backslash in a value is preceded by a backslash.
    ///
    /// # Errors
    /// [`BuildError::Name`] for an unknown part, an empty value, or no common name.
    pub fn parse(text: &str) -> Result<Self, BuildError> {
        let parts = unescaped_parts(text);
        let is_name = parts.iter().all(|part| part.split_once('=').is_some_and(|(key, _)| NamePart::is_key(key)));
        if !is_name {
            return match parts.as_slice() {
                [common_name] if !common_name.contains('=') => Ok(Self::new(common_name.trim())),
                _ => Err(BuildError::Name("write it as a common name, or like CN=…,OU=…,O=…,L=…,ST=…,C=…,DC=…")),
            };
        }
        let mut name = Self::default();
        for part in &parts {
            let (key, value) = part.split_once('=').unwrap_or_default();
            let value = value.trim().to_owned();
            match NamePart::of_key(key) {
                _ if value.is_empty() => return Err(BuildError::Name("a part of the name is empty")),
                Some(part) => name.above.push((part, value)),
                None if name.common_name.is_empty() => name.common_name = value,
                None => return Err(BuildError::Name("there are two common names")),
            }
        }
        // Stable: several parts of one kind keep their order.
        name.above.sort_by_key(|(part, _)| *part);
        if name.common_name.is_empty() {
            return Err(BuildError::Name("the common name (CN=…) is missing"));
        }
        Ok(name)
    }

    /// The DER of the name.
    ///
    /// # Errors
    /// [`BuildError::Name`].
    pub fn to_der(&self) -> Result<Vec<u8>, BuildError> {
        if self.common_name.is_empty() {
            return Err(BuildError::Name("the common name is empty"));
        }
        let mut names = Vec::with_capacity(3 + self.above.len());
        for (part, value) in &self.above {
            names.push(single(part.oid(), part.encode(value)?)?);
        }
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

/// As [`DistinguishedName::parse`] reads it, without `serialNumber`.
impl fmt::Display for DistinguishedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let escaped = |value: &str| value.replace('\\', "\\\\").replace(',', "\\,");
        write!(f, "CN={}", escaped(&self.common_name))?;
        if let Some(unit) = &self.organizational_unit {
            write!(f, ",OU={}", escaped(unit))?;
        }
        self.above.iter().rev().try_for_each(|(part, value)| write!(f, ",{}={}", part.key(), escaped(value)))
    }
}

/// A part of a name above the common name, the outermost first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum NamePart {
    /// `C`, two letters.
    Country,
    /// `DC`.
    DomainComponent,
    /// `ST`.
    State,
    /// `L`.
    Locality,
    /// `O`.
    Organization,
    /// `OU`.
    OrganizationalUnit,
}

impl NamePart {
    fn of_key(key: &str) -> Option<Self> {
        match key.trim().to_ascii_uppercase().as_str() {
            "C" => Some(Self::Country),
            "DC" => Some(Self::DomainComponent),
            "ST" | "S" => Some(Self::State),
            "L" => Some(Self::Locality),
            "O" => Some(Self::Organization),
            "OU" => Some(Self::OrganizationalUnit),
            _ => None,
        }
    }

    fn key(self) -> &'static str {
        match self {
            Self::Country => "C",
            Self::DomainComponent => "DC",
            Self::State => "ST",
            Self::Locality => "L",
            Self::Organization => "O",
            Self::OrganizationalUnit => "OU",
        }
    }

    fn is_key(key: &str) -> bool {
        key.trim().eq_ignore_ascii_case("CN") || Self::of_key(key).is_some()
    }

    fn oid(self) -> ObjectIdentifier {
        ObjectIdentifier::new_unwrap(match self {
            Self::Country => "2.5.4.6",
            Self::DomainComponent => "0.9.2342.19200300.100.1.25",
            Self::State => "2.5.4.8",
            Self::Locality => "2.5.4.7",
            Self::Organization => "2.5.4.10",
            Self::OrganizationalUnit => "2.5.4.11",
        })
    }

    fn encode(self, value: &str) -> Result<Any, BuildError> {
        match self {
            Self::Country if value.len() == 2 => {
                let country = PrintableString::new(value).map_err(|_| BuildError::Name("a country has two letters"))?;
                Ok(Any::encode_from(&country)?)
            }
            Self::Country => Err(BuildError::Name("a country has two letters")),
            Self::DomainComponent => {
                let part = Ia5String::new(value).map_err(|_| BuildError::Name("a domain component is not ASCII"))?;
                Ok(Any::encode_from(&part)?)
            }
            _ => Ok(Any::new(Tag::Utf8String, value.as_bytes())?),
        }
    }
}

/// Splits at commas that no backslash precedes, and removes the backslashes.
fn unescaped_parts(text: &str) -> Vec<String> {
    let (mut parts, mut part, mut escaped) = (Vec::new(), String::new(), false);
    for c in text.chars() {
        match c {
            '\\' if !escaped => {
                escaped = true;
                continue;
            }
            ',' if !escaped => parts.push(std::mem::take(&mut part)),
            c => part.push(c),
        }
        escaped = false;
    }
    parts.push(part);
    parts
}

/// A relative distinguished name with one attribute.
fn single(oid: ObjectIdentifier, value: Any) -> Result<SetOfVec<AttributeTypeAndValue>, BuildError> {
    let mut set = SetOfVec::new();
    set.insert(AttributeTypeAndValue { oid, value })?;
    Ok(set)
}

/// The content of a certificate to build. The signature algorithm is `sha256WithRSAEncryption`.
#[derive(Clone, Debug)]
pub struct Template {
    /// Name of the certificate's subject.
    pub subject: DistinguishedName,
    /// DER of the issuer's name, exactly as in the issuer's certificate. `None`: self-signed.
    pub issuer_der: Option<Vec<u8>>,
    /// The certified key.
    pub key: RsaPublicKey,
    /// Serial number, big-endian, positive, top bit clear; see [`random_serial`].
    pub serial: [u8; 16],
    /// First second of the validity, unix time.
    pub not_before: i64,
    /// Last second of the validity, unix time.
    pub not_after: i64,
    /// Key usages, in a critical extension. Without usages there is no extension.
    pub key_usage: KeyUsage,
    /// Extended key usages as dotted object identifiers, in an extension that is not critical. Without usages there is
    /// no extension.
    pub extended_key_usages: Vec<&'static str>,
    /// Basic constraints, critical: whether the subject is a CA. `None`: no extension.
    pub ca: Option<bool>,
    /// Subject key identifier, usually [`key_id`] of the key. `None`: no extension.
    pub subject_key_id: Option<Vec<u8>>,
    /// Authority key identifier: the issuer's subject key identifier. `None`: no extension.
    pub authority_key_id: Option<Vec<u8>>,
    /// DNS names of the subject, in a subjectAltName extension. Without names there is no extension.
    pub dns_names: Vec<String>,
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

    /// The same content as a certificate request (PKCS#10, RFC 2986): name, key and requested extensions. The issuer
    /// decides serial number, validity and issuer name. The key to be certified signs the request.
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
        if !self.dns_names.is_empty() {
            let name = |name: &String| Ia5String::new(name).map(pkix::name::GeneralName::DnsName);
            let names = self.dns_names.iter().map(name).collect::<Result<Vec<_>, _>>();
            let names = names.map_err(|_| BuildError::Name("a DNS name has characters that are not ASCII"))?;
            extensions.push(extension(&pkix::SubjectAltName(names), false)?);
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

/// A certificate or certificate request without its signature.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ToBeSigned {
    octets: Vec<u8>,
    /// DER of the AlgorithmIdentifier of the signature.
    algorithm: Vec<u8>,
}

impl ToBeSigned {
    /// The bytes to sign with RSASSA-PKCS1-v1_5 and SHA-256.
    #[must_use]
    pub fn octets(&self) -> &[u8] {
        &self.octets
    }

    /// The DER of the certificate with this signature. The signature is not verified.
    #[must_use]
    pub fn assemble(&self, signature: &[u8]) -> Vec<u8> {
        // The first byte of a bit string is the number of unused bits in its last byte.
        let signature = tlv(0x03, &[&[0], signature]);
        tlv(0x30, &[&self.octets, &self.algorithm, &signature])
    }

    /// Signs with a private key in software and returns the certificate in DER.
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

/// A random positive serial number of 16 bytes. Its DER also has 16 bytes, because the top bit is 0 and the next bit is
/// 1.
///
/// # Errors
/// [`BuildError::Random`].
pub fn random_serial() -> Result<[u8; 16], BuildError> {
    let mut serial = [0; 16];
    ring::rand::SystemRandom::new().fill(&mut serial).map_err(|_| BuildError::Random)?;
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(serial)
}

/// A key identifier: the first 20 bytes of the SHA-256 of the SubjectPublicKeyInfo (like RFC 7093).
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

/// UTCTime up to 2049, then GeneralizedTime (RFC 5280).
fn time(unix: i64) -> Result<Time, BuildError> {
    let seconds = u64::try_from(unix).map_err(|_| BuildError::Validity)?;
    let date = DateTime::from_unix_duration(Duration::from_secs(seconds)).map_err(|_| BuildError::Validity)?;
    Ok(Time::from(date))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::certificate::{Certificate, CertificateError, CertificateSignatureError};
    use crate::rsa_key::KeyError;
    use crate::rsa_key::testing::key;
    use x509_parser::prelude::FromDer as _;

    fn template() -> Template {
        Template {
            subject: DistinguishedName {
                above: Vec::new(),
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
            dns_names: Vec::new(),
        }
    }

    #[test]
    fn a_name_is_read_as_people_write_it() {
        let parsed = DistinguishedName::parse("CN=HGS\\, north,O=Acme Ltd, C=de,OU=Keys").unwrap();
        assert_eq!(parsed.common_name, "HGS, north");
        let above: Vec<_> = parsed.above.iter().map(|(part, value)| (*part, value.as_str())).collect();
        assert_eq!(
            above,
            [(NamePart::Country, "de"), (NamePart::Organization, "Acme Ltd"), (NamePart::OrganizationalUnit, "Keys")]
        );
        assert!(parsed.to_der().is_ok());
        assert_eq!(parsed.to_string(), "CN=HGS\\, north,OU=Keys,O=Acme Ltd,C=de");
        assert_eq!(DistinguishedName::parse(&parsed.to_string()).unwrap(), parsed);
        assert_eq!(DistinguishedName::parse("HGS signing").unwrap(), DistinguishedName::new("HGS signing"));
        for wrong in ["O=Acme", "CN=a,CN=b", "CN=", "CN=a,X=b", "a,b", "X=b"] {
            assert!(DistinguishedName::parse(wrong).is_err(), "{wrong}");
        }
        assert!(DistinguishedName::parse("CN=a,C=Germany").unwrap().to_der().is_err());
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
}
