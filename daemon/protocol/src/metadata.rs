//! The metadata document, from which a tenant builds a guardian's wrapping (protocol page, section 2.6).

use data_encoding::BASE64;
use ring::digest;

use crate::algorithm::SignatureAlgorithm;
use crate::c14n;
use crate::certificate::{Certificate, CertificateError};
use crate::protector::Signature;
use crate::rsa_key::RsaPublicKey;
use crate::skeleton::write_signature;
use crate::xml::{self, DSIG_NS, KPS_NS, Sequence, XmlError, write_base64};

const C14N: &str = "http://www.w3.org/2001/10/xml-exc-c14n#";
const ENVELOPED: &str = "http://www.w3.org/2000/09/xmldsig#enveloped-signature";
const SHA256: &str = "http://www.w3.org/2001/04/xmlenc#sha256";

/// The content that a guardian publishes about itself.
#[derive(Clone, Debug)]
pub struct GuardianInformation {
    /// The primary encryption certificate, DER.
    pub encryption_certificate: Vec<u8>,
    /// The primary signing certificate, DER.
    pub signing_certificate: Vec<u8>,
    /// The primary signing key's signature over `encryption_certificate`.
    pub encryption_certificate_signature: Signature,
    /// The primary signing key's signature over `signing_certificate`.
    pub signing_certificate_self_signature: Signature,
    /// The other enabled signing certificates, DER.
    pub other_signing_certificates: Vec<Vec<u8>>,
}

/// A metadata document before the communications key has signed it.
pub struct UnsignedMetadata {
    /// Content of the root element, canonical.
    content: String,
    /// `SignedInfo`, canonical.
    signed_info: String,
    communications_certificate: Vec<u8>,
}

impl GuardianInformation {
    /// Builds the part of the document that the XML signature covers. The key of `communications_certificate` (DER) has
    /// to sign it with RSASSA-PKCS1-v1_5 and SHA-256.
    #[must_use]
    pub fn unsigned(&self, communications_certificate: &[u8]) -> UnsignedMetadata {
        let mut content = "<GuardianInformation><Version>1</Version>".to_owned();
        write_base64("EncryptionCertificate", &self.encryption_certificate, &mut content);
        write_base64("SigningCertificate", &self.signing_certificate, &mut content);
        write_signature("EncryptionCertificateSignature", &self.encryption_certificate_signature, &mut content);
        write_signature("SigningCertificateSelfSignature", &self.signing_certificate_self_signature, &mut content);
        if !self.other_signing_certificates.is_empty() {
            content.push_str("<OtherSigningCertificates>");
            for certificate in &self.other_signing_certificates {
                write_base64("Certificate", certificate, &mut content);
            }
            content.push_str("</OtherSigningCertificates>");
        }
        content.push_str("</GuardianInformation>");
        // The reference covers the document without its signature.
        let covered = format!("<Metadata xmlns=\"{KPS_NS}\" Version=\"1\">{content}</Metadata>");
        let covered = digest::digest(&digest::SHA256, covered.as_bytes());
        let signed_info = format!(
            "<ds:SignedInfo xmlns:ds=\"{DSIG_NS}\"><ds:CanonicalizationMethod Algorithm=\"{C14N}\">\
             </ds:CanonicalizationMethod><ds:SignatureMethod Algorithm=\"{}\"></ds:SignatureMethod>\
             <ds:Reference URI=\"\"><ds:Transforms><ds:Transform Algorithm=\"{ENVELOPED}\"></ds:Transform>\
             <ds:Transform Algorithm=\"{C14N}\"></ds:Transform></ds:Transforms>\
             <ds:DigestMethod Algorithm=\"{SHA256}\"></ds:DigestMethod><ds:DigestValue>{}</ds:DigestValue>\
             </ds:Reference></ds:SignedInfo>",
            SignatureAlgorithm::DEFAULT.uri(),
            BASE64.encode(covered.as_ref())
        );
        UnsignedMetadata { content, signed_info, communications_certificate: communications_certificate.to_vec() }
    }
}

impl UnsignedMetadata {
    /// The bytes that the communications key signs.
    #[must_use]
    pub fn signed_octets(&self) -> &[u8] {
        self.signed_info.as_bytes()
    }

    /// Inserts the signature and returns the document.
    #[must_use]
    pub fn finish(&self, signature: &[u8]) -> Vec<u8> {
        // ds:Signature already declares the prefix.
        let signed_info = self.signed_info.replacen(&format!(" xmlns:ds=\"{DSIG_NS}\""), "", 1);
        format!(
            "<?xml version=\"1.0\" encoding=\"utf-8\"?><Metadata xmlns=\"{KPS_NS}\" Version=\"1\">{}\
             <ds:Signature xmlns:ds=\"{DSIG_NS}\">{signed_info}<ds:SignatureValue>{}</ds:SignatureValue><ds:KeyInfo>\
             <ds:X509Data><ds:X509Certificate>{}</ds:X509Certificate></ds:X509Data></ds:KeyInfo></ds:Signature></Metadata>",
            self.content,
            BASE64.encode(signature),
            BASE64.encode(&self.communications_certificate)
        )
        .into_bytes()
    }
}

/// Why a metadata document is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// The document does not have the expected structure.
    #[error("the metadata document cannot be read: {0}")]
    Document(#[from] XmlError),
    /// A certificate cannot be used.
    #[error("the {0} certificate of the metadata document cannot be used: {1}")]
    Certificate(&'static str, CertificateError),
    /// A signature is wrong, or its algorithm is not supported.
    #[error("the {0} of the metadata document is wrong")]
    Signature(&'static str),
}

/// A metadata document with valid signatures. It is only as trustworthy as its certificates: pin their thumbprints.
#[derive(Clone, Debug)]
pub struct Metadata {
    /// The content about the guardian.
    pub guardian: GuardianInformation,
    /// The key of the primary encryption certificate.
    pub encryption_key: RsaPublicKey,
    /// The certificate that signed the document.
    pub communications_certificate: Certificate,
}

impl Metadata {
    /// Parses a document and verifies its three signatures.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub fn parse(octets: &[u8]) -> Result<Self, MetadataError> {
        let text = xml::decode(octets)?;
        let document = xml::parse(&text)?;
        let root = xml::root(&document, KPS_NS, "Metadata")?;
        // The published schema allows further attributes and elements. The signature covers them; this code ignores
        // them.
        if xml::unsigned_int(xml::attribute(root, "Version")?, "Version")? != 1 {
            return Err(XmlError::new("the version of the metadata is not 1").into());
        }
        let elements = xml::child_elements(root)?;
        let [information, signature, ..] = elements.as_slice() else {
            return Err(XmlError::new("Metadata begins with GuardianInformation and a signature").into());
        };
        let guardian = read_information(*information)?;
        let communications_certificate = check_document(root, *signature)?;
        let signing =
            Certificate::parse(&guardian.signing_certificate).map_err(|e| MetadataError::Certificate("signing", e))?;
        let encryption = Certificate::parse(&guardian.encryption_certificate)
            .map_err(|e| MetadataError::Certificate("encryption", e))?;
        for (signature, covered, name) in [
            (
                &guardian.encryption_certificate_signature,
                &guardian.encryption_certificate,
                "signature of the encryption certificate",
            ),
            (
                &guardian.signing_certificate_self_signature,
                &guardian.signing_certificate,
                "self-signature of the signing certificate",
            ),
        ] {
            let right = signing.key().verify(signature.algorithm, covered, &signature.value);
            right.map_err(|_| MetadataError::Signature(name))?;
        }
        Ok(Self { guardian, encryption_key: encryption.key().clone(), communications_certificate })
    }
}

fn read_information(element: roxmltree::Node<'_, '_>) -> Result<GuardianInformation, MetadataError> {
    if !xml::is_named(element, KPS_NS, "GuardianInformation") {
        return Err(XmlError::new("GuardianInformation is missing").into());
    }
    xml::attributes(element, &[])?;
    let mut content = Sequence::of(element, KPS_NS)?;
    if xml::unsigned_int(&xml::text(content.required("Version")?)?, "Version")? != 1 {
        return Err(XmlError::new("the version of the guardian's information is not 1").into());
    }
    let encryption_certificate = xml::base64(content.required("EncryptionCertificate")?)?;
    let signing_certificate = xml::base64(content.required("SigningCertificate")?)?;
    let encryption_certificate_signature = signature(content.required("EncryptionCertificateSignature")?)?;
    let signing_certificate_self_signature = signature(content.required("SigningCertificateSelfSignature")?)?;
    let mut other_signing_certificates = Vec::new();
    if let Some(others) = content.optional("OtherSigningCertificates") {
        let mut others = Sequence::of(others, KPS_NS)?;
        while let Some(certificate) = others.optional("Certificate") {
            other_signing_certificates.push(xml::base64(certificate)?);
        }
        others.end()?;
    }
    content.end()?;
    Ok(GuardianInformation {
        encryption_certificate,
        signing_certificate,
        encryption_certificate_signature,
        signing_certificate_self_signature,
        other_signing_certificates,
    })
}

fn signature(element: roxmltree::Node<'_, '_>) -> Result<Signature, MetadataError> {
    crate::protector::read_signature(element)?
        .known_algorithm()
        .map_err(|_| MetadataError::Signature("signature algorithm"))
}

/// Verifies the XML signature `signature` of the document `root` and returns the certificate of its key. Only the
/// structure in the protocol is accepted: one reference, which covers the whole document.
fn check_document(
    root: roxmltree::Node<'_, '_>,
    signature: roxmltree::Node<'_, '_>,
) -> Result<Certificate, MetadataError> {
    if !xml::is_named(signature, DSIG_NS, "Signature") {
        return Err(XmlError::new("the signature of the document is missing").into());
    }
    let mut content = Sequence::of(signature, DSIG_NS)?;
    let signed_info = content.required("SignedInfo")?;
    let value = xml::base64(content.required("SignatureValue")?)?;
    let key_info = content.required("KeyInfo")?;
    content.end()?;
    let mut content = Sequence::of(key_info, DSIG_NS)?;
    let x509 = content.required("X509Data")?;
    content.end()?;
    let mut content = Sequence::of(x509, DSIG_NS)?;
    let certificate = xml::base64(content.required("X509Certificate")?)?;
    content.end()?;

    let mut content = Sequence::of(signed_info, DSIG_NS)?;
    algorithm(content.required("CanonicalizationMethod")?, C14N)?;
    algorithm(content.required("SignatureMethod")?, SignatureAlgorithm::DEFAULT.uri())?;
    let reference = content.required("Reference")?;
    content.end()?;
    let uri = xml::attribute(reference, "URI")?;
    let id = root.attribute("ID").filter(|id| !id.is_empty());
    let covers_the_document = uri.is_empty() || id.is_some_and(|id| uri.strip_prefix('#') == Some(id));
    if !covers_the_document {
        return Err(XmlError::new("the signature covers something else than the document").into());
    }
    let mut content = Sequence::of(reference, DSIG_NS)?;
    let transforms = content.required("Transforms")?;
    algorithm(content.required("DigestMethod")?, SHA256)?;
    let expected = xml::base64(content.required("DigestValue")?)?;
    content.end()?;
    let mut content = Sequence::of(transforms, DSIG_NS)?;
    algorithm(content.required("Transform")?, ENVELOPED)?;
    algorithm(content.required("Transform")?, C14N)?;
    content.end()?;

    let covered = c14n::element_without(root, signature)?;
    if digest::digest(&digest::SHA256, covered.as_bytes()).as_ref() != expected {
        return Err(MetadataError::Signature("digest"));
    }
    let certificate = Certificate::parse(&certificate).map_err(|e| MetadataError::Certificate("communications", e))?;
    let signed_info = c14n::element(signed_info)?;
    certificate
        .key()
        .verify(SignatureAlgorithm::DEFAULT, signed_info.as_bytes(), &value)
        .map_err(|_| MetadataError::Signature("signature"))?;
    Ok(certificate)
}

fn algorithm(element: roxmltree::Node<'_, '_>, expected: &str) -> Result<(), XmlError> {
    let found = xml::bare_algorithm(element)?;
    if found == expected { Ok(()) } else { Err(XmlError(format!("the algorithm {found} is not expected here"))) }
}
