//! Requests and replies of the key-protection service (protocol page, section 2.1).

use data_encoding::BASE64;
use memchr::{memmem, memrchr};

use crate::algorithm::{HostAlgorithms, KeyWrapping, OAEP_11, OAEP_MGF1P, Oaep, Sealing};
use crate::error::{Code, Refusal};
use crate::payload::EncryptedKeys;
use crate::plain::{Rest, plain_base64};
use crate::xml::{self, SERVICE_NS, Sequence, XmlError, write_base64};

/// The beginning of a request that this crate writes.
const HEAD: &str = "<?xml version=\"1.0\" encoding=\"utf-8\"?>\
    <RollTransportKeyRequest xmlns=\"http://schemas.microsoft.com/kps/2014/07/service\">";

/// A `RollTransportKeyRequest` whose structure and algorithms are valid (step 1 of a release).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RollRequest {
    /// The protector file.
    pub ingress_protector: Vec<u8>,
    /// DER, not verified.
    pub health_certificate: Vec<u8>,
    /// The algorithms that encrypt the keys to the host.
    pub algorithms: HostAlgorithms,
}

/// Longest base64 text of a peeked health certificate, in bytes; also the part of a batch that is searched for it.
pub(crate) const PEEKED: usize = 64 * 1024;

/// The content of a peeked element, if it looks like a certificate.
pub(crate) fn peeked(content: &[u8]) -> Option<Vec<u8>> {
    // Some clients break long lines.
    let base64: Vec<u8> = content.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    BASE64.decode(&base64).ok().filter(|der| !der.is_empty())
}

impl RollRequest {
    /// Reads a request body.
    ///
    /// # Errors
    /// `InvalidRequestException` for the shape, then `UnsupportedAlgorithmException`.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        match Self::parse_plain(body) {
            Some(request) => Ok(request),
            None => Self::parse_in_full(body),
        }
    }

    /// The same without an XML parser: succeeds only if the body equals the output of [`RollRequest::to_xml`] byte for
    /// byte outside of its five values. Returns `None` for every other body, valid or not.
    #[must_use]
    pub fn parse_plain(body: &[u8]) -> Option<Self> {
        let mut rest = Rest::new(body);
        rest.literal(HEAD)?;
        rest.literal("<IngressProtector>")?;
        let ingress_protector = plain_base64(rest.until(b'<')?)?;
        rest.literal("</IngressProtector><HealthCertificate>")?;
        let health_certificate = plain_base64(rest.until(b'<')?)?;
        rest.literal("</HealthCertificate><TransferKeyEncryptionAlgorithm>")?;
        let transfer = Oaep::from_request_uri(rest.text_until(b'<')?).ok()?;
        rest.literal("</TransferKeyEncryptionAlgorithm><WrappingKeyEncryptionAlgorithm>")?;
        let wrapping = KeyWrapping::from_uri(rest.text_until(b'<')?).ok()?;
        rest.literal("</WrappingKeyEncryptionAlgorithm><TransportKeysEncryptionAlgorithm>")?;
        let transport = Sealing::from_uri(rest.text_until(b'<')?).ok()?;
        rest.literal("</TransportKeysEncryptionAlgorithm></RollTransportKeyRequest>")?;
        rest.end()?;
        Some(Self {
            ingress_protector,
            health_certificate,
            algorithms: HostAlgorithms { transfer, wrapping, transport },
        })
    }

    /// The same for any body, with an XML parser.
    ///
    /// # Errors
    /// As [`RollRequest::parse`].
    pub fn parse_in_full(body: &[u8]) -> Result<Self, Refusal> {
        let bad = |e: XmlError| Refusal::request(format!("request: {e}"));
        let text = xml::decode(body).map_err(bad)?;
        let document = xml::parse(&text).map_err(bad)?;
        let (ingress_protector, health_certificate, uris) = Self::read(&document).map_err(bad)?;
        Ok(Self { ingress_protector, health_certificate, algorithms: uris.known()? })
    }

    /// Finds the probable health certificate of a body that was not parsed yet: the content of the last element of that
    /// name, in its usual form. Very cheap. The result is a guess at the sender; never use it for a decision that has
    /// to be right.
    #[must_use]
    pub fn peek_health_certificate(body: &[u8]) -> Option<Vec<u8>> {
        // The form is "…</HealthCertificate>", possibly with a prefix.
        let name = memmem::rfind(body, b"HealthCertificate>")?;
        let end = memrchr(b'<', &body[..name])?;
        let begin = memrchr(b'>', &body[..end])? + 1;
        if end - begin > PEEKED { None } else { peeked(&body[begin..end]) }
    }

    fn read(document: &roxmltree::Document<'_>) -> Result<(Vec<u8>, Vec<u8>, AlgorithmUris), XmlError> {
        let root = xml::root(document, SERVICE_NS, "RollTransportKeyRequest")?;
        xml::attributes(root, &[])?;
        let mut content = Sequence::of(root, SERVICE_NS)?;
        let ingress_protector = xml::base64(content.required("IngressProtector")?)?;
        let health_certificate = xml::base64(content.required("HealthCertificate")?)?;
        let uris = AlgorithmUris::read(&mut content)?;
        content.end()?;
        Ok((ingress_protector, health_certificate, uris))
    }

    /// The request body.
    #[must_use]
    pub fn to_xml(&self) -> Vec<u8> {
        let mut out = HEAD.to_owned();
        write_base64("IngressProtector", &self.ingress_protector, &mut out);
        write_base64("HealthCertificate", &self.health_certificate, &mut out);
        self.algorithms.write(&mut out);
        out.push_str("</RollTransportKeyRequest>");
        out.into_bytes()
    }
}

/// The URIs of the three algorithms, before they are checked. Errors in the structure of the request are reported
/// before unsupported algorithms.
pub(crate) struct AlgorithmUris {
    transfer: String,
    wrapping: String,
    transport: String,
}

impl AlgorithmUris {
    pub(crate) fn read(content: &mut Sequence<'_, '_>) -> Result<Self, XmlError> {
        Ok(Self {
            transfer: uri(content.required("TransferKeyEncryptionAlgorithm")?)?,
            wrapping: uri(content.required("WrappingKeyEncryptionAlgorithm")?)?,
            transport: uri(content.required("TransportKeysEncryptionAlgorithm")?)?,
        })
    }

    pub(crate) fn known(&self) -> Result<HostAlgorithms, Refusal> {
        Ok(HostAlgorithms {
            transfer: Oaep::from_request_uri(&self.transfer)?,
            wrapping: KeyWrapping::from_uri(&self.wrapping)?,
            transport: Sealing::from_uri(&self.transport)?,
        })
    }
}

impl HostAlgorithms {
    /// Writes the three elements of a request.
    pub(crate) fn write(self, out: &mut String) {
        let transfer = if self.transfer == Oaep::SHA1 { OAEP_MGF1P } else { OAEP_11 };
        out.push_str(&format!(
            "<TransferKeyEncryptionAlgorithm>{transfer}</TransferKeyEncryptionAlgorithm>\
             <WrappingKeyEncryptionAlgorithm>{}</WrappingKeyEncryptionAlgorithm>\
             <TransportKeysEncryptionAlgorithm>{}</TransportKeysEncryptionAlgorithm>",
            self.wrapping.uri(),
            self.transport.uri()
        ));
    }
}

/// Reads an `xs:anyURI`, which may not be empty.
fn uri(element: roxmltree::Node<'_, '_>) -> Result<String, XmlError> {
    xml::attributes(element, &[])?;
    let text = xml::text(element)?;
    match xml::token(&text) {
        "" => Err(XmlError(format!("{} is empty", xml::local(element)))),
        uri => Ok(uri.to_owned()),
    }
}

/// A `RollTransportKeyResponse`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RollResponse {
    /// The new protector file.
    pub egress_protector: Vec<u8>,
    /// Both transport keys, encrypted to the host.
    pub keys: EncryptedKeys,
}

impl RollResponse {
    /// The body of a response with status 200.
    #[must_use]
    pub fn to_xml(&self) -> Vec<u8> {
        let size = BASE64.encode_len(self.egress_protector.len()) + 2048;
        let mut out = String::with_capacity(size);
        out.push_str("<?xml version=\"1.0\" encoding=\"utf-8\"?><RollTransportKeyResponse xmlns=\"");
        out.push_str(SERVICE_NS);
        out.push_str("\">");
        self.write_content(&mut out);
        out.push_str("</RollTransportKeyResponse>");
        out.into_bytes()
    }

    /// The content of the element.
    pub(crate) fn write_content(&self, out: &mut String) {
        write_base64("EgressProtector", &self.egress_protector, out);
        write_base64("EncryptedTransferKey", &self.keys.transfer_key, out);
        write_base64("EncryptedWrappingKey", &self.keys.wrapping_key, out);
        write_base64("EncryptedTransportKeys", &self.keys.transport_keys, out);
    }

    /// Parses a reply, for hosts.
    ///
    /// # Errors
    /// The document is not such a reply.
    pub fn parse(body: &[u8]) -> Result<Self, XmlError> {
        let text = xml::decode(body)?;
        let document = xml::parse(&text)?;
        Self::read(xml::root(&document, SERVICE_NS, "RollTransportKeyResponse")?)
    }

    pub(crate) fn read(element: roxmltree::Node<'_, '_>) -> Result<Self, XmlError> {
        let mut content = Sequence::of(element, SERVICE_NS)?;
        let egress_protector = xml::base64(content.required("EgressProtector")?)?;
        let keys = EncryptedKeys {
            transfer_key: xml::base64(content.required("EncryptedTransferKey")?)?,
            wrapping_key: xml::base64(content.required("EncryptedWrappingKey")?)?,
            transport_keys: xml::base64(content.required("EncryptedTransportKeys")?)?,
        };
        content.end()?;
        Ok(Self { egress_protector, keys })
    }
}

impl Refusal {
    /// Parses an `Error` body, for hosts.
    ///
    /// # Errors
    /// The document is not an error, or its code is not defined by the protocol.
    pub fn parse(body: &[u8]) -> Result<Self, XmlError> {
        let text = xml::decode(body)?;
        let document = xml::parse(&text)?;
        Self::read(xml::root(&document, SERVICE_NS, "Error")?)
    }

    pub(crate) fn read(element: roxmltree::Node<'_, '_>) -> Result<Self, XmlError> {
        let mut content = Sequence::of(element, SERVICE_NS)?;
        let code = xml::text(content.required("Code")?)?;
        let message = xml::text(content.required("Message")?)?;
        content.end()?;
        let known = Code::ALL.into_iter().find(|c| c.as_str() == code);
        let code = known.ok_or_else(|| XmlError(format!("unknown code {code}")))?;
        Ok(Self::new(code, message))
    }
}
