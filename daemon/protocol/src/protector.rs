//! A strict parser for key protectors (protocol page, section 2.2; step 3 of a release).
//!
//! The order of checks is: first the whole structure, then all algorithms, then signatures and decryption. An error
//! about the structure after a decryption would be an oracle.

use std::collections::HashSet;

use data_encoding::HEXLOWER_PERMISSIVE;
use roxmltree::Node;

use crate::algorithm::{Digest, HKDF, HMAC_SHA256, OAEP_11, OAEP_MGF1P, Oaep, SignatureAlgorithm, unsupported};
use crate::c14n;
use crate::error::{Code, Refusal};
use crate::xml::{self, DSIG_NS, KPS_NS, Sequence, XmlError};

pub use crate::transport_key::{TRANSPORT_KEY_LEN, TransportKey, transport_key};

/// Largest protector file, in bytes.
pub const MAX_PROTECTOR: usize = 512 * 1024;
/// Most wrappings in a protector.
pub const MAX_WRAPPINGS: usize = 64;
/// Longest salt of a key derivation, in bytes.
const MAX_SALT: usize = 1024;

const XENC11_NS: &str = "http://www.w3.org/2009/xmlenc11#";
pub(crate) const HKDF_NS: &str = "http://www.w3.org/2021/04/xmldsig-more#";

/// A parsed protector: structure and algorithms are valid; nothing else is checked yet.
#[derive(Clone, Debug)]
pub struct Protector {
    /// Number of times that a host may unwrap offline. No signature covers this number.
    pub max_offline_unwraps: u32,
    /// At least one wrapping, with unique Ids, in document order.
    pub wrappings: Vec<Wrapping>,
    /// Proves that the writer of the wrappings knew the transport key.
    pub transport_key_signature: TransportKeySignature,
    /// Index of the wrapping whose signing key made [`Protector::guardian_signature`].
    pub guardian: usize,
    /// The last writer's signature over the wrappings.
    pub guardian_signature: Signature,
    /// The bytes that both signatures cover: the `Wrappings` element in exclusive canonical form.
    pub signed_octets: Vec<u8>,
}

/// The transport key, encrypted for one party, and the certificates of that party.
#[derive(Clone, Debug)]
pub struct Wrapping {
    /// Identifies the wrapping within its protector.
    pub id: u32,
    /// DER, not verified.
    pub signing_certificate: Vec<u8>,
    /// Id of the wrapping whose signing key vouches for this signing certificate. The owner's wrapping names itself.
    pub parent: u32,
    /// The parent's signature over `signing_certificate`.
    pub signing_certificate_signature: Signature,
    /// DER, not verified.
    pub encryption_certificate: Vec<u8>,
    /// This wrapping's signature over `encryption_certificate`.
    pub encryption_certificate_signature: Signature,
    /// The encryption algorithm of `cipher_value`.
    pub encryption: Encryption,
    /// The transport key, encrypted to the encryption certificate's key.
    pub cipher_value: Vec<u8>,
}

/// The encryption algorithm of a wrapping, in a form that can be written back unchanged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Encryption {
    /// The two digests.
    pub oaep: Oaep,
    /// Whether the URI is from XML Encryption 1.1.
    pub version_11: bool,
}

/// A signature value and its algorithm.
#[derive(Clone, Debug)]
pub struct Signature {
    /// How it was made.
    pub algorithm: SignatureAlgorithm,
    /// The content of `Parameters` as canonical XML, for a place where `K` is the default namespace. It has no meaning,
    /// but a certificate's signature keeps it.
    pub parameters: Option<String>,
    /// The signature's bytes.
    pub value: Vec<u8>,
}

/// HMAC-SHA-256 with a key that HKDF derives from the transport key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TransportKeySignature {
    /// How the key is derived.
    pub derivation: Hkdf,
    /// The HMAC.
    pub value: Vec<u8>,
}

/// HKDF-SHA-256 (RFC 5869) with an output of 32 bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hkdf {
    /// 1 to 1024 bytes.
    pub salt: Vec<u8>,
    /// May be empty.
    pub info: Vec<u8>,
}

impl Protector {
    /// Parses a protector file: step 3 of a release, including the check of algorithms.
    ///
    /// # Errors
    /// `InvalidProtectorException` for the shape, then `UnsupportedAlgorithmException`.
    pub fn parse(file: &[u8]) -> Result<Self, Refusal> {
        if file.len() > MAX_PROTECTOR {
            return Err(Refusal::protector(format!("the protector is larger than {MAX_PROTECTOR} octets")));
        }
        let text = xml::decode(file).map_err(|e| bad(&e))?;
        let document = xml::parse(&text).map_err(|e| bad(&e))?;
        let root = xml::root(&document, KPS_NS, "Protector").map_err(|e| bad(&e))?;
        let draft = Draft::read(root).map_err(|e| bad(&e))?;
        draft.known_algorithms()
    }
}

fn bad(e: &XmlError) -> Refusal {
    Refusal::protector(format!("protector: {e}"))
}

/// A protector with a valid structure, before its algorithms are checked.
struct Draft<'a> {
    max_offline_unwraps: u32,
    wrappings: Vec<DraftWrapping<'a>>,
    derivation: Algorithm<'a>,
    transport_key_signature: Signed<'a>,
    guardian: usize,
    guardian_signature: Signed<'a>,
    signed_octets: String,
}

struct DraftWrapping<'a> {
    id: u32,
    signing_certificate: Vec<u8>,
    parent: u32,
    signing_certificate_signature: Signed<'a>,
    encryption_certificate: Vec<u8>,
    encryption_certificate_signature: Signed<'a>,
    encryption: Algorithm<'a>,
    cipher_value: Vec<u8>,
}

/// A `Signature` element.
pub(crate) struct Signed<'a> {
    uri: &'a str,
    parameters: Option<String>,
    value: Vec<u8>,
}

/// The URI of an algorithm, and its parameters.
struct Algorithm<'a> {
    uri: &'a str,
    parameters: Option<Node<'a, 'a>>,
}

impl<'a> Draft<'a> {
    fn read(root: Node<'a, 'a>) -> Result<Self, XmlError> {
        xml::attributes(root, &["MaxOfflineUnwraps"])?;
        let max_offline_unwraps = match root.attribute("MaxOfflineUnwraps") {
            Some(value) => xml::unsigned_int(value, "MaxOfflineUnwraps")?,
            None => 0,
        };
        let mut content = Sequence::of(root, KPS_NS)?;
        let wrappings_element = content.required("Wrappings")?;
        let transport_key_signature = content.required("TransportKeySignature")?;
        let guardian_signature = content.required("GuardianSignature")?;
        content.end()?;

        // Canonicalise first: it stops at a size bound, which then also limits the stored signature parameters.
        let signed_octets = c14n::element(wrappings_element)?;
        let wrappings = read_wrappings(wrappings_element)?;
        xml::attributes(transport_key_signature, &[])?;
        let mut content = Sequence::of(transport_key_signature, KPS_NS)?;
        let method = content.required("KeyDerivationMethod")?;
        let transport_key_signature = read_signature(content.required("Signature")?)?;
        content.end()?;
        let mut content = Sequence::of(method, KPS_NS)?;
        let derivation = read_algorithm(method, &mut content)?;
        content.end()?;

        xml::attributes(guardian_signature, &["WrappingId"])?;
        let id = xml::unsigned_int(xml::attribute(guardian_signature, "WrappingId")?, "WrappingId")?;
        let mut content = Sequence::of(guardian_signature, KPS_NS)?;
        let guardian_signature = read_signature(content.required("Signature")?)?;
        content.end()?;

        let mut ids = HashSet::new();
        if let Some(twice) = wrappings.iter().find(|w| !ids.insert(w.id)) {
            return Err(XmlError(format!("two wrappings have the Id {}", twice.id)));
        }
        let guardian = wrappings.iter().position(|w| w.id == id);
        let guardian =
            guardian.ok_or_else(|| XmlError::new("GuardianSignature names no wrapping of this protector"))?;
        Ok(Self {
            max_offline_unwraps,
            wrappings,
            derivation,
            transport_key_signature,
            guardian,
            guardian_signature,
            signed_octets,
        })
    }

    fn known_algorithms(self) -> Result<Protector, Refusal> {
        let wrappings = self.wrappings.into_iter().map(DraftWrapping::known_algorithms).collect::<Result<_, _>>()?;
        let derivation = hkdf(&self.derivation)?;
        if self.transport_key_signature.uri != HMAC_SHA256 {
            return Err(unsupported(self.transport_key_signature.uri));
        }
        Ok(Protector {
            max_offline_unwraps: self.max_offline_unwraps,
            wrappings,
            transport_key_signature: TransportKeySignature { derivation, value: self.transport_key_signature.value },
            guardian: self.guardian,
            guardian_signature: self.guardian_signature.known_algorithm()?,
            signed_octets: self.signed_octets.into_bytes(),
        })
    }
}

impl DraftWrapping<'_> {
    fn known_algorithms(self) -> Result<Wrapping, Refusal> {
        Ok(Wrapping {
            id: self.id,
            signing_certificate: self.signing_certificate,
            parent: self.parent,
            signing_certificate_signature: self.signing_certificate_signature.known_algorithm()?,
            encryption_certificate: self.encryption_certificate,
            encryption_certificate_signature: self.encryption_certificate_signature.known_algorithm()?,
            encryption: encryption(&self.encryption)?,
            cipher_value: self.cipher_value,
        })
    }
}

impl Signed<'_> {
    pub(crate) fn known_algorithm(self) -> Result<Signature, Refusal> {
        let algorithm = SignatureAlgorithm::from_uri(self.uri)?;
        Ok(Signature { algorithm, parameters: self.parameters, value: self.value })
    }
}

fn read_wrappings<'a>(element: Node<'a, 'a>) -> Result<Vec<DraftWrapping<'a>>, XmlError> {
    xml::attributes(element, &[])?;
    let mut content = Sequence::of(element, KPS_NS)?;
    let mut wrappings = vec![read_wrapping(content.required("Wrapping")?)?];
    while let Some(wrapping) = content.optional("Wrapping") {
        if wrappings.len() == MAX_WRAPPINGS {
            return Err(XmlError(format!("more than {MAX_WRAPPINGS} wrappings")));
        }
        wrappings.push(read_wrapping(wrapping)?);
    }
    content.end()?;
    Ok(wrappings)
}

fn read_wrapping<'a>(element: Node<'a, 'a>) -> Result<DraftWrapping<'a>, XmlError> {
    xml::attributes(element, &[])?;
    let mut content = Sequence::of(element, KPS_NS)?;
    let id = content.required("Id")?;
    xml::attributes(id, &[])?;
    let id = xml::unsigned_int(&xml::text(id)?, "Id")?;
    let signing_certificate = xml::base64(content.required("SigningCertificate")?)?;
    let vouched = content.required("SigningCertificateSignature")?;
    xml::attributes(vouched, &["ParentWrappingId"])?;
    let parent = xml::unsigned_int(xml::attribute(vouched, "ParentWrappingId")?, "ParentWrappingId")?;
    let signing_certificate_signature = only_signature(vouched)?;
    let encryption_certificate = xml::base64(content.required("EncryptionCertificate")?)?;
    let vouched = content.required("EncryptionCertificateSignature")?;
    xml::attributes(vouched, &[])?;
    let encryption_certificate_signature = only_signature(vouched)?;
    let transport_key = content.required("TransportKey")?;
    content.end()?;

    xml::attributes(transport_key, &[])?;
    let mut content = Sequence::of(transport_key, KPS_NS)?;
    let data = content.required("EncryptedData")?;
    content.end()?;
    let mut content = Sequence::of(data, KPS_NS)?;
    let encryption = read_algorithm(data, &mut content)?;
    let cipher_value = xml::base64(content.required("CipherValue")?)?;
    content.end()?;
    Ok(DraftWrapping {
        id,
        signing_certificate,
        parent,
        signing_certificate_signature,
        encryption_certificate,
        encryption_certificate_signature,
        encryption,
        cipher_value,
    })
}

/// The single `Signature` in an element.
fn only_signature<'a>(element: Node<'a, 'a>) -> Result<Signed<'a>, XmlError> {
    let mut content = Sequence::of(element, KPS_NS)?;
    let signature = read_signature(content.required("Signature")?)?;
    content.end()?;
    Ok(signature)
}

pub(crate) fn read_signature<'a>(element: Node<'a, 'a>) -> Result<Signed<'a>, XmlError> {
    let mut content = Sequence::of(element, KPS_NS)?;
    let algorithm = read_algorithm(element, &mut content)?;
    let value = xml::base64(content.required("SignatureValue")?)?;
    content.end()?;
    let parameters = match algorithm.parameters {
        Some(node) => {
            let mut inside = String::new();
            for child in xml::child_elements(node)? {
                inside.push_str(&c14n::element_within(child, KPS_NS)?);
                if inside.len() > c14n::MAX_OCTETS {
                    return Err(XmlError::new("the parameters of a signature are too large"));
                }
            }
            Some(inside)
        }
        None => None,
    };
    Ok(Signed { uri: algorithm.uri, parameters, value })
}

/// The `Algorithm` attribute of `element`, and `Parameters` at the beginning of its content.
fn read_algorithm<'a>(element: Node<'a, 'a>, content: &mut Sequence<'a, 'a>) -> Result<Algorithm<'a>, XmlError> {
    xml::attributes(element, &["Algorithm"])?;
    let uri = xml::token(xml::attribute(element, "Algorithm")?);
    let parameters = content.optional("Parameters");
    if let Some(node) = parameters {
        xml::attributes(node, &[])?;
        xml::child_elements(node)?;
    }
    Ok(Algorithm { uri, parameters })
}

fn bad_parameters(uri: &str, why: impl std::fmt::Display) -> Refusal {
    Refusal::new(Code::UnsupportedAlgorithm, format!("the parameters of {uri} are not supported here: {why}"))
}

/// The OAEP variant that encrypts the transport key.
fn encryption(algorithm: &Algorithm<'_>) -> Result<Encryption, Refusal> {
    match (algorithm.uri, algorithm.parameters) {
        (OAEP_MGF1P, None) => Ok(Encryption { oaep: Oaep::SHA1, version_11: false }),
        (OAEP_MGF1P, Some(_)) => Err(bad_parameters(OAEP_MGF1P, "it has none")),
        (OAEP_11, None) => Ok(Encryption { oaep: Oaep::SHA1, version_11: true }),
        (OAEP_11, Some(parameters)) => Ok(Encryption { oaep: oaep_parameters(parameters)?, version_11: true }),
        (uri, _) => Err(unsupported(uri)),
    }
}

fn oaep_parameters(parameters: Node<'_, '_>) -> Result<Oaep, Refusal> {
    let wrong = |e: XmlError| bad_parameters(OAEP_11, e);
    let (mut digest, mut mgf) = (None, None);
    for element in xml::child_elements(parameters).map_err(wrong)? {
        if xml::is_named(element, DSIG_NS, "DigestMethod") && digest.is_none() {
            digest = Some(Digest::from_uri(xml::bare_algorithm(element).map_err(wrong)?)?);
        } else if xml::is_named(element, XENC11_NS, "MGF") && mgf.is_none() {
            mgf = Some(Digest::from_mgf_uri(xml::bare_algorithm(element).map_err(wrong)?)?);
        } else {
            return Err(bad_parameters(OAEP_11, format!("unexpected {}", xml::local(element))));
        }
    }
    Ok(Oaep { digest: digest.unwrap_or(Digest::Sha1), mgf: mgf.unwrap_or(Digest::Sha1) })
}

fn hkdf(algorithm: &Algorithm<'_>) -> Result<Hkdf, Refusal> {
    if algorithm.uri != HKDF {
        return Err(unsupported(algorithm.uri));
    }
    let parameters = algorithm.parameters.ok_or_else(|| bad_parameters(HKDF, "HKDFParams is missing"))?;
    hkdf_parameters(parameters).map_err(|e| bad_parameters(HKDF, e))
}

fn hkdf_parameters(parameters: Node<'_, '_>) -> Result<Hkdf, XmlError> {
    let mut content = Sequence::of(parameters, HKDF_NS)?;
    let params = content.required("HKDFParams")?;
    content.end()?;
    xml::attributes(params, &[])?;
    let mut content = Sequence::of(params, HKDF_NS)?;
    let prf = xml::bare_algorithm(content.required("PRF")?)?;
    let salt = hex(content.required("Salt")?)?;
    let info = content.optional("Info").map(hex).transpose()?.unwrap_or_default();
    let length = content.required("KeyLength")?;
    content.end()?;
    xml::attributes(length, &[])?;
    if prf != HMAC_SHA256 {
        return Err(XmlError(format!("the PRF {prf}")));
    }
    if salt.is_empty() || salt.len() > MAX_SALT {
        return Err(XmlError(format!("the salt has to have 1 to {MAX_SALT} octets")));
    }
    if xml::unsigned_int(&xml::text(length)?, "KeyLength")? as usize != TRANSPORT_KEY_LEN {
        return Err(XmlError(format!("KeyLength has to be {TRANSPORT_KEY_LEN}")));
    }
    Ok(Hkdf { salt, info })
}

/// Decodes an `xs:hexBinary`, upper or lower case.
fn hex(element: Node<'_, '_>) -> Result<Vec<u8>, XmlError> {
    xml::attributes(element, &[])?;
    let text = xml::text(element)?;
    let decoded = HEXLOWER_PERMISSIVE.decode(xml::token(&text).as_bytes());
    decoded.map_err(|_| XmlError(format!("{} is not hexadecimal", xml::local(element))))
}
