//! Several protectors in one request (protocol page, section 2.7; an extension of this project).

use memchr::{memchr, memmem};

use crate::algorithm::HostAlgorithms;
use crate::error::Refusal;
use crate::request::{AlgorithmUris, PEEKED, RollResponse, peeked};
use crate::xml::{self, SERVICE_NS, Sequence, XmlError, write_base64};

/// Largest body, in bytes.
pub const MAX_BATCH_BODY: usize = 16 * 1024 * 1024;
/// Most protectors of one request.
pub const MAX_ITEMS: usize = 256;

/// A `RollTransportKeysRequest` whose structure and algorithms are valid.
#[derive(Clone, Debug)]
pub struct BatchRequest {
    /// DER, not verified yet. The certificate applies to all items.
    pub health_certificate: Vec<u8>,
    /// The algorithms that encrypt the keys to the host.
    pub algorithms: HostAlgorithms,
    /// 1 to 256 protector files.
    pub ingress_protectors: Vec<Vec<u8>>,
}

/// Health certificate, algorithms, protectors.
type Parts = (Vec<u8>, AlgorithmUris, Vec<Vec<u8>>);

impl BatchRequest {
    /// Reads a request body.
    ///
    /// # Errors
    /// `InvalidRequestException` for the shape, then `UnsupportedAlgorithmException`.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        let bad = |e: XmlError| Refusal::request(format!("request: {e}"));
        let text = xml::decode(body).map_err(bad)?;
        let document = xml::parse(&text).map_err(bad)?;
        let (health_certificate, uris, ingress_protectors) = Self::read(&document).map_err(bad)?;
        Ok(Self { health_certificate, algorithms: uris.known()?, ingress_protectors })
    }

    /// Finds the probable health certificate of a batch from the beginning of the body: the content of the first
    /// element of that name. Like
    /// [`RollRequest::peek_health_certificate`](crate::request::RollRequest::peek_health_certificate), the result is a
    /// guess at the sender; never use it for a decision that has to be right.
    #[must_use]
    pub fn peek_health_certificate(beginning: &[u8]) -> Option<Vec<u8>> {
        // The form is "<HealthCertificate>…</", possibly with a prefix. Real clients write it at the very beginning.
        let beginning = &beginning[..beginning.len().min(PEEKED)];
        let name = memmem::find(beginning, b"HealthCertificate>")?;
        let content = &beginning[name + b"HealthCertificate>".len()..];
        let end = memchr(b'<', content)?;
        peeked(&content[..end])
    }

    fn read(document: &roxmltree::Document<'_>) -> Result<Parts, XmlError> {
        let root = xml::root(document, SERVICE_NS, "RollTransportKeysRequest")?;
        xml::attributes(root, &[])?;
        let mut content = Sequence::of(root, SERVICE_NS)?;
        let health_certificate = xml::base64(content.required("HealthCertificate")?)?;
        let uris = AlgorithmUris::read(&mut content)?;
        let mut protectors = vec![xml::base64(content.required("IngressProtector")?)?];
        while let Some(item) = content.optional("IngressProtector") {
            if protectors.len() == MAX_ITEMS {
                return Err(XmlError::new(format!("more than {MAX_ITEMS} protectors")));
            }
            protectors.push(xml::base64(item)?);
        }
        content.end()?;
        Ok((health_certificate, uris, protectors))
    }

    /// The request body.
    #[must_use]
    pub fn to_xml(&self) -> Vec<u8> {
        let mut out =
            format!("<?xml version=\"1.0\" encoding=\"utf-8\"?><RollTransportKeysRequest xmlns=\"{SERVICE_NS}\">");
        write_base64("HealthCertificate", &self.health_certificate, &mut out);
        self.algorithms.write(&mut out);
        for protector in &self.ingress_protectors {
            write_base64("IngressProtector", protector, &mut out);
        }
        out.push_str("</RollTransportKeysRequest>");
        out.into_bytes()
    }
}

/// The result of each item, in the order of the request.
pub type BatchResults = Vec<Result<RollResponse, Refusal>>;

/// The body of a response with status 200.
#[must_use]
pub fn to_xml(results: &[Result<RollResponse, Refusal>]) -> Vec<u8> {
    let mut out =
        format!("<?xml version=\"1.0\" encoding=\"utf-8\"?><RollTransportKeysResponse xmlns=\"{SERVICE_NS}\">");
    for result in results {
        match result {
            Ok(response) => {
                out.push_str("<RollTransportKeyResponse>");
                response.write_content(&mut out);
                out.push_str("</RollTransportKeyResponse>");
            }
            Err(refusal) => {
                out.push_str("<Error>");
                refusal.write_content(&mut out);
                out.push_str("</Error>");
            }
        }
    }
    out.push_str("</RollTransportKeysResponse>");
    out.into_bytes()
}

/// Parses a reply, for hosts.
///
/// # Errors
/// The document is not such a reply.
pub fn parse_results(body: &[u8]) -> Result<BatchResults, XmlError> {
    let text = xml::decode(body)?;
    let document = xml::parse(&text)?;
    let root = xml::root(&document, SERVICE_NS, "RollTransportKeysResponse")?;
    let item = |element| {
        if xml::is_named(element, SERVICE_NS, "RollTransportKeyResponse") {
            RollResponse::read(element).map(Ok)
        } else if xml::is_named(element, SERVICE_NS, "Error") {
            Refusal::read(element).map(Err)
        } else {
            Err(XmlError::new(format!("unexpected {}", xml::local(element))))
        }
    };
    xml::child_elements(root)?.into_iter().map(item).collect()
}
