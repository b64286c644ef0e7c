//! Describes the content of a protector for people, as far as it can be read, even if a service would refuse it.
//!
//! Nothing is decided here. The description continues where [`Protector::parse`] stops, and says for each signature
//! whether it is valid. [`Description::verdict`] is the result that a service would reach.

use roxmltree::Node;

use crate::c14n;
use crate::certificate::Certificate;
use crate::error::Refusal;
use crate::protector::{MAX_PROTECTOR, MAX_WRAPPINGS, Protector, read_signature};
use crate::verify::{KnownCertificates, verify};
use crate::xml::{self, KPS_NS};

/// The description of a protector.
#[derive(Debug)]
pub struct Description {
    /// The refusal that a service would give before any decryption, if any.
    pub verdict: Result<(), Refusal>,
    /// Whether the file is a `Protector`. If not, only the verdict is meaningful.
    pub readable: bool,
    /// Number of offline unwraps; `None`: not a number.
    pub max_offline_unwraps: Option<u32>,
    /// The wrappings in document order, at most [`MAX_WRAPPINGS`].
    pub wrappings: Vec<DescribedWrapping>,
    /// Number of further wrappings.
    pub wrappings_left_out: usize,
    /// URI of the key derivation of the transport-key signature.
    pub key_derivation: Option<String>,
    /// URI of the transport-key signature. Verifying it needs the transport key.
    pub transport_key_signature: Option<String>,
    /// Id of the wrapping that claims the guardian signature.
    pub guardian: Option<u32>,
    /// The guardian signature: the last writer's signature over the wrappings.
    pub guardian_signature: DescribedSignature,
}

/// The description of a wrapping.
#[derive(Debug)]
pub struct DescribedWrapping {
    /// The wrapping's Id.
    pub id: Option<u32>,
    /// Id of the wrapping that vouches for this signing certificate. The owner's wrapping names itself.
    pub parent: Option<u32>,
    /// The signing certificate, or why it cannot be read.
    pub signing: Result<Certificate, String>,
    /// The parent's signature over the signing certificate.
    pub signing_signature: DescribedSignature,
    /// The encryption certificate, or why it cannot be read.
    pub encryption: Result<Certificate, String>,
    /// This wrapping's signature over the encryption certificate.
    pub encryption_signature: DescribedSignature,
    /// URI of the encryption of the transport key.
    pub algorithm: Option<String>,
}

impl DescribedWrapping {
    /// Whether the wrapping claims to be the owner's.
    #[must_use]
    pub fn is_owner(&self) -> bool {
        self.id.is_some() && self.id == self.parent
    }
}

/// The description of a signature.
#[derive(Debug)]
pub struct DescribedSignature {
    /// URI of the signature algorithm.
    pub algorithm: Option<String>,
    /// The result of its verification.
    pub state: SignatureState,
}

/// The result of verifying a signature.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SignatureState {
    /// The signature is valid.
    Holds,
    /// The signature is wrong.
    Wrong,
    /// The signature cannot be verified, for this reason.
    Unchecked(String),
}

/// Describes `file`. Takes at most as long as verifying the file twice.
#[must_use]
pub fn describe(file: &[u8]) -> Description {
    let mut description = Description {
        verdict: Protector::parse(file).and_then(|p| verify(p, &KnownCertificates::default())).map(drop),
        readable: false,
        max_offline_unwraps: None,
        wrappings: Vec::new(),
        wrappings_left_out: 0,
        key_derivation: None,
        transport_key_signature: None,
        guardian: None,
        guardian_signature: unchecked(None, "there is none"),
    };
    // The verdict names the problem of a file that ends here.
    if file.len() > MAX_PROTECTOR {
        return description;
    }
    let Ok(text) = xml::decode(file) else { return description };
    let Ok(document) = xml::parse(&text) else { return description };
    if let Ok(root) = xml::root(&document, KPS_NS, "Protector") {
        description.readable = true;
        description.read(root);
    }
    description
}

/// The content of a wrapping before any signature is verified.
struct Found<'a> {
    id: Option<u32>,
    parent: Option<u32>,
    signing: Result<Certificate, String>,
    signing_der: Vec<u8>,
    signing_signature: Option<Node<'a, 'a>>,
    encryption: Result<Certificate, String>,
    encryption_der: Vec<u8>,
    encryption_signature: Option<Node<'a, 'a>>,
    algorithm: Option<String>,
}

impl Description {
    fn read<'a>(&mut self, root: Node<'a, 'a>) {
        self.max_offline_unwraps = match root.attribute("MaxOfflineUnwraps") {
            Some(value) => xml::unsigned_int(value, "MaxOfflineUnwraps").ok(),
            None => Some(0),
        };
        let wrappings = child(root, "Wrappings");
        let elements = || wrappings.into_iter().flat_map(|w| children(w, "Wrapping"));
        let found: Vec<Found<'a>> = elements().take(MAX_WRAPPINGS).map(Found::read).collect();
        self.wrappings_left_out = elements().count() - found.len();

        let transport = child(root, "TransportKeySignature");
        self.key_derivation = transport.and_then(|t| algorithm(child(t, "KeyDerivationMethod")?));
        self.transport_key_signature = transport.and_then(|t| algorithm(child(t, "Signature")?));

        let signer = child(root, "GuardianSignature");
        self.guardian = signer.and_then(|s| number(s.attribute("WrappingId")?));
        let octets = wrappings.and_then(|w| c14n::element(w).ok()).unwrap_or_default();
        self.guardian_signature = check(
            signer.and_then(|s| child(s, "Signature")),
            key_of(&found, self.guardian, "the wrapping that it names"),
            octets.as_bytes(),
        );
        for wrapping in &found {
            let parent = key_of(&found, wrapping.parent, "its parent");
            let own = wrapping.signing.as_ref().map_err(|_| "the signing certificate cannot be used".to_owned());
            self.wrappings.push(DescribedWrapping {
                id: wrapping.id,
                parent: wrapping.parent,
                signing: wrapping.signing.clone(),
                signing_signature: check(wrapping.signing_signature, parent, &wrapping.signing_der),
                encryption: wrapping.encryption.clone(),
                encryption_signature: check(wrapping.encryption_signature, own, &wrapping.encryption_der),
                algorithm: wrapping.algorithm.clone(),
            });
        }
    }
}

impl<'a> Found<'a> {
    fn read(element: Node<'a, 'a>) -> Self {
        let vouched = child(element, "SigningCertificateSignature");
        let (signing, signing_der) = certificate(element, "SigningCertificate");
        let (encryption, encryption_der) = certificate(element, "EncryptionCertificate");
        let signature = |of: Option<Node<'a, 'a>>| child(of?, "Signature");
        let data = child(element, "TransportKey").and_then(|key| child(key, "EncryptedData"));
        Self {
            id: child(element, "Id").and_then(|id| number(&xml::text(id).ok()?)),
            parent: vouched.and_then(|v| number(v.attribute("ParentWrappingId")?)),
            signing,
            signing_der,
            signing_signature: signature(vouched),
            encryption,
            encryption_der,
            encryption_signature: signature(child(element, "EncryptionCertificateSignature")),
            algorithm: data.and_then(algorithm),
        }
    }
}

/// The signing certificate of the wrapping with this Id.
fn key_of<'f>(found: &'f [Found<'_>], id: Option<u32>, who: &str) -> Result<&'f Certificate, String> {
    let mut those = found.iter().filter(|wrapping| id.is_some() && wrapping.id == id);
    match (those.next(), those.next()) {
        (Some(one), None) => {
            one.signing.as_ref().map_err(|_| format!("the signing certificate of {who} cannot be used"))
        }
        (Some(_), Some(_)) => Err(format!("two wrappings have the Id of {who}")),
        (None, _) => Err(format!("{who} is not in this protector")),
    }
}

fn check(signature: Option<Node<'_, '_>>, signer: Result<&Certificate, String>, octets: &[u8]) -> DescribedSignature {
    let Some(element) = signature else { return unchecked(None, "there is none") };
    let algorithm = algorithm(element);
    let read = match read_signature_of(element) {
        Ok(read) => read,
        Err(why) => return unchecked(algorithm, &why),
    };
    match signer {
        Err(why) => unchecked(algorithm, &why),
        Ok(signer) => {
            let right = signer.key().verify(read.algorithm, octets, &read.value).is_ok();
            DescribedSignature { algorithm, state: if right { SignatureState::Holds } else { SignatureState::Wrong } }
        }
    }
}

fn read_signature_of(element: Node<'_, '_>) -> Result<crate::protector::Signature, String> {
    read_signature(element).map_err(|e| e.to_string())?.known_algorithm().map_err(|refusal| refusal.message)
}

fn unchecked(algorithm: Option<String>, why: &str) -> DescribedSignature {
    DescribedSignature { algorithm, state: SignatureState::Unchecked(why.to_owned()) }
}

/// A certificate, or why it cannot be read; and the bytes that its signature covers.
fn certificate(wrapping: Node<'_, '_>, name: &str) -> (Result<Certificate, String>, Vec<u8>) {
    let Some(element) = child(wrapping, name) else { return (Err(format!("{name} is missing")), Vec::new()) };
    match xml::base64(element) {
        Ok(der) => (Certificate::parse(&der).map_err(|e| e.to_string()), der),
        Err(e) => (Err(e.to_string()), Vec::new()),
    }
}

fn children<'a, 'i>(parent: Node<'a, 'i>, name: &'static str) -> impl Iterator<Item = Node<'a, 'i>> {
    parent.children().filter(move |node| xml::is_named(*node, KPS_NS, name))
}

fn child<'a, 'i>(parent: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    parent.children().find(|node| xml::is_named(*node, KPS_NS, name))
}

fn algorithm(element: Node<'_, '_>) -> Option<String> {
    element.attribute("Algorithm").map(|uri| xml::token(uri).to_owned())
}

fn number(text: &str) -> Option<u32> {
    xml::unsigned_int(text, "a number").ok()
}
