//! Shared parts of the tests: keys, parties with certificates, a protector writer that is independent of the crate's
//! own, and external tools for comparison.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, missing_docs)]

use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use claviger_protocol::algorithm::{Digest, Oaep, SignatureAlgorithm};
use claviger_protocol::certificate::build::{DistinguishedName, Template};
use claviger_protocol::certificate::{Certificate, KeyUsage};
use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::metadata::{GuardianInformation, Metadata};
use claviger_protocol::owner::Owner;
use claviger_protocol::protector::{Protector, Signature, TransportKey};
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_protocol::verify::{KnownCertificates, Verified, verify};
use claviger_protocol::work::Work;
use claviger_protocol::wrapping_set::{Ingress, KnownSets};
use data_encoding::{BASE64, HEXLOWER};
use ring::{hkdf, hmac};

pub const K: &str = "http://schemas.microsoft.com/kps/2014/07";
pub const S: &str = "http://schemas.microsoft.com/kps/2014/07/service";
pub const DS: &str = "http://www.w3.org/2000/09/xmldsig#";
pub const MGF1P: &str = "http://www.w3.org/2001/04/xmlenc#rsa-oaep-mgf1p";
pub const OAEP_11: &str = "http://www.w3.org/2009/xmlenc11#rsa-oaep";
pub const HKDF: &str = "http://www.w3.org/2021/04/xmldsig-more#hkdf";
pub const HKDF_NS: &str = "http://www.w3.org/2021/04/xmldsig-more#";
pub const HMAC: &str = "http://www.w3.org/2001/04/xmldsig-more#hmac-sha256";
pub const RSA_SHA256: &str = "http://www.w3.org/2001/04/xmldsig-more#rsa-sha256";

/// Runs a tool. `Err` holds its output if it fails.
pub fn run(directory: &Path, tool: &str, arguments: &[&str]) -> Result<Vec<u8>, String> {
    let package = match tool {
        "xmllint" => "libxml2-utils",
        other => other,
    };
    let output = match Command::new(tool).args(arguments).current_dir(directory).output() {
        Ok(output) => output,
        Err(e) if e.kind() == ErrorKind::NotFound => panic!("{tool} is missing: install the package {package}"),
        Err(e) => panic!("{tool} cannot be run: {e}"),
    };
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
    }
}

/// The exclusive canonical form by `xmllint`. The document must not contain comments, which xmllint keeps.
pub fn xmllint_c14n(document: &[u8]) -> Result<Vec<u8>, String> {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("document.xml"), document).unwrap();
    run(directory.path(), "xmllint", &["--nonet", "--exc-c14n", "document.xml"])
}

/// A small, fast, deterministic random number generator.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from((self.next() >> 11) % end as u64).unwrap()
    }
}

/// Keys with 2048 bits, generated on first use.
pub fn key(index: usize) -> &'static RsaPrivateKey {
    static KEYS: [OnceLock<RsaPrivateKey>; 12] = [const { OnceLock::new() }; 12];
    KEYS[index].get_or_init(|| RsaPrivateKey::generate(2048).unwrap())
}

/// A self-signed certificate of [`key`], DER.
pub fn certificate(index: usize) -> &'static [u8] {
    static CERTIFICATES: [OnceLock<Vec<u8>>; 12] = [const { OnceLock::new() }; 12];
    CERTIFICATES[index].get_or_init(|| {
        let mut serial = [0x41; 16];
        serial[15] = u8::try_from(index).unwrap();
        let template = Template {
            subject: DistinguishedName::new(format!("party {index}")),
            issuer_der: None,
            key: key(index).public().clone(),
            serial,
            not_before: 1_700_000_000,
            not_after: 2_100_000_000,
            key_usage: KeyUsage::default(),
            extended_key_usages: Vec::new(),
            ca: None,
            subject_key_id: None,
            authority_key_id: None,
            dns_names: Vec::new(),
        };
        template.to_be_signed().unwrap().sign_with(key(index)).unwrap()
    })
}

/// The signing key of a party; party 0 is the owner.
pub fn signing(party: usize) -> &'static RsaPrivateKey {
    key(2 * party)
}

/// The encryption key of a party.
pub fn encryption(party: usize) -> &'static RsaPrivateKey {
    key(2 * party + 1)
}

pub fn signing_certificate(party: usize) -> &'static [u8] {
    certificate(2 * party)
}

pub fn encryption_certificate(party: usize) -> &'static [u8] {
    certificate(2 * party + 1)
}

/// Party 0 as an `Owner`.
pub fn owner() -> Owner {
    owner_of(0)
}

pub fn owner_of(party: usize) -> Owner {
    let copy = |key: &RsaPrivateKey| RsaPrivateKey::from_pkcs8_der(key.to_pkcs8_der()).unwrap();
    Owner {
        signing_key: copy(signing(party)),
        signing_certificate: Certificate::parse(signing_certificate(party)).unwrap(),
        encryption_key: copy(encryption(party)),
        encryption_certificate: Certificate::parse(encryption_certificate(party)).unwrap(),
    }
}

/// Index of the key and certificate that sign metadata.
pub const COMMUNICATIONS: usize = 10;

pub fn signature(key: &RsaPrivateKey, algorithm: SignatureAlgorithm, octets: &[u8]) -> Signature {
    Signature { algorithm, parameters: None, value: key.sign(algorithm, octets).unwrap() }
}

pub fn information(party: usize) -> GuardianInformation {
    let sign = |octets: &[u8]| signature(signing(party), SignatureAlgorithm::DEFAULT, octets);
    GuardianInformation {
        encryption_certificate: encryption_certificate(party).to_vec(),
        signing_certificate: signing_certificate(party).to_vec(),
        encryption_certificate_signature: sign(encryption_certificate(party)),
        signing_certificate_self_signature: sign(signing_certificate(party)),
        other_signing_certificates: Vec::new(),
    }
}

pub fn metadata_file(information: &GuardianInformation) -> Vec<u8> {
    let unsigned = information.unsigned(certificate(COMMUNICATIONS));
    unsigned.finish(&key(COMMUNICATIONS).sign(SignatureAlgorithm::DEFAULT, unsigned.signed_octets()).unwrap())
}

pub fn metadata(party: usize) -> Metadata {
    Metadata::parse(&metadata_file(&information(party))).unwrap()
}

/// The formatting of a document.
#[derive(Clone)]
pub struct Style {
    /// Text before the root.
    pub head: &'static str,
    /// Prefix of every K element, including its colon.
    pub prefix: &'static str,
    /// Separator between elements; spaces follow for each level.
    pub line: &'static str,
    pub quote: char,
    /// Changes the formatting of a value.
    pub value: fn(&str) -> String,
}

pub const PLAIN: Style = Style { head: "", prefix: "", line: "", quote: '"', value: str::to_owned };

impl Style {
    pub fn attribute(&self, name: &str, value: &str) -> String {
        format!(" {name}={q}{value}{q}", q = self.quote)
    }

    pub fn element(&self, depth: usize, name: &str, attributes: &[(&str, &str)], content: &str) -> String {
        let attributes: String = attributes.iter().map(|(n, v)| self.attribute(n, v)).collect();
        let p = self.prefix;
        let close =
            if content.starts_with(self.line) && !self.line.is_empty() { self.indent(depth) } else { String::new() };
        format!("{}<{p}{name}{attributes}>{content}{close}</{p}{name}>", self.indent(depth))
    }

    fn indent(&self, depth: usize) -> String {
        if self.line.is_empty() { String::new() } else { format!("{}{}", self.line, "  ".repeat(depth)) }
    }

    pub fn base64(&self, depth: usize, name: &str, octets: &[u8]) -> String {
        self.element(depth, name, &[], &(self.value)(&BASE64.encode(octets)))
    }
}

/// One wrapping of a [`Draft`].
#[derive(Clone)]
pub struct Part {
    pub id: String,
    pub parent: String,
    pub party: usize,
    /// The party that signs the signing certificate.
    pub parent_party: usize,
    pub algorithm: SignatureAlgorithm,
    /// The content of `Parameters` of the signing certificate's signature.
    pub parameters: Option<String>,
    /// The OAEP parameters that encrypt the transport key …
    pub oaep: Oaep,
    /// … and the URI in the document.
    pub oaep_uri: &'static str,
    pub oaep_parameters: Option<String>,
}

/// A protector that is written as text, without the crate's own builder.
#[derive(Clone)]
pub struct Draft {
    pub parts: Vec<Part>,
    pub guardian: String,
    pub guardian_party: usize,
    pub algorithm: SignatureAlgorithm,
    pub guardian_parameters: Option<String>,
    pub key: [u8; 32],
    pub salt: Vec<u8>,
    pub info: Vec<u8>,
    pub hkdf_uri: &'static str,
    /// The content of the derivation's `Parameters`; `None` omits the element.
    pub hkdf_parameters: Option<String>,
    /// Attributes of the root, in addition to the declaration of K.
    pub root: String,
    pub style: Style,
}

pub fn hkdf_params(prf: &str, content: &str) -> String {
    format!("<h:HKDFParams xmlns:h=\"{HKDF_NS}\"><h:PRF Algorithm=\"{prf}\"/>{content}</h:HKDFParams>")
}

impl Draft {
    /// The owner (Id 1) and its guardians.
    pub fn new(parties: usize) -> Self {
        let parts = (0..parties).map(|party| Part {
            id: (party + 1).to_string(),
            parent: "1".to_owned(),
            party,
            parent_party: 0,
            algorithm: SignatureAlgorithm::DEFAULT,
            parameters: None,
            oaep: Oaep::SHA1,
            oaep_uri: MGF1P,
            oaep_parameters: None,
        });
        let salt = vec![0x5a; 32];
        let content = format!("<h:Salt>{}</h:Salt><h:KeyLength>32</h:KeyLength>", HEXLOWER.encode(&salt));
        Self {
            parts: parts.collect(),
            guardian: "1".to_owned(),
            guardian_party: 0,
            algorithm: SignatureAlgorithm::DEFAULT,
            guardian_parameters: None,
            key: [0x42; 32],
            salt,
            info: Vec::new(),
            hkdf_uri: HKDF,
            hkdf_parameters: Some(hkdf_params(HMAC, &content)),
            root: String::new(),
            style: PLAIN,
        }
    }

    /// Writes the element `Wrappings`.
    pub fn wrappings(&self) -> String {
        let s = &self.style;
        let parts: String = self.parts.iter().map(|part| part.text(s, &self.key)).collect();
        s.element(1, "Wrappings", &[], &parts)
    }

    /// The document with placeholders for the two signature values.
    pub fn text(&self) -> String {
        self.text_with(&self.wrappings())
    }

    pub fn text_with(&self, wrappings: &str) -> String {
        let s = &self.style;
        let parameters = |depth, inside: &Option<String>| match inside {
            Some(inside) => s.element(depth, "Parameters", &[], inside),
            None => String::new(),
        };
        let derivation =
            s.element(2, "KeyDerivationMethod", &[("Algorithm", self.hkdf_uri)], &parameters(3, &self.hkdf_parameters));
        let hmac = s.element(2, "Signature", &[("Algorithm", HMAC)], &s.element(3, "SignatureValue", &[], "@HMAC@"));
        let transport = s.element(1, "TransportKeySignature", &[], &(derivation + &hmac));
        let value = parameters(3, &self.guardian_parameters) + &s.element(3, "SignatureValue", &[], "@GUARDIAN@");
        let guardian = s.element(2, "Signature", &[("Algorithm", self.algorithm.uri())], &value);
        let guardian = s.element(1, "GuardianSignature", &[("WrappingId", &self.guardian)], &guardian);
        let (p, declared) = (s.prefix, s.prefix.trim_end_matches(':'));
        let declaration = if declared.is_empty() { "xmlns".to_owned() } else { format!("xmlns:{declared}") };
        let root = format!("{}{}", s.attribute(&declaration, K), self.root);
        format!("{}<{p}Protector{root}>{wrappings}{transport}{guardian}{}</{p}Protector>", s.head, s.line)
    }

    /// The document with invalid values in place of the signatures.
    pub fn unsigned(&self) -> String {
        unsigned(&self.text())
    }

    /// The finished, signed protector.
    pub fn build(&self) -> Vec<u8> {
        self.sign(&self.text())
    }

    /// Replaces the placeholders of a text by signatures over the content that the crate computes.
    pub fn sign(&self, text: &str) -> Vec<u8> {
        let octets =
            Protector::parse(unsigned(text).as_bytes()).unwrap_or_else(|e| panic!("{e}: {text}")).signed_octets;
        self.sign_octets(text, &octets)
    }

    pub fn sign_octets(&self, text: &str, octets: &[u8]) -> Vec<u8> {
        let hmac = hmac_of(&self.key, &self.salt, &self.info, octets);
        let guardian = signing(self.guardian_party).sign(self.algorithm, octets).unwrap();
        let value = |octets: &[u8]| (self.style.value)(&BASE64.encode(octets));
        text.replace("@HMAC@", &value(&hmac)).replace("@GUARDIAN@", &value(&guardian)).into_bytes()
    }
}

/// Replaces the placeholders of a text by invalid signature values.
pub fn unsigned(text: &str) -> String {
    text.replace("@HMAC@", "AAAA").replace("@GUARDIAN@", "AAAA")
}

/// HMAC-SHA-256 with a key that HKDF-SHA-256 derives.
pub fn hmac_of(key: &[u8], salt: &[u8], info: &[u8], octets: &[u8]) -> Vec<u8> {
    let info = [info];
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(key);
    let mut okm = [0; 32];
    prk.expand(&info, hkdf::HKDF_SHA256).unwrap().fill(&mut okm).unwrap();
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &okm), octets).as_ref().to_vec()
}

impl Part {
    fn text(&self, s: &Style, key: &[u8]) -> String {
        let signature = |depth, by: &RsaPrivateKey, octets: &[u8], parameters: &Option<String>| {
            let parameters = match parameters {
                Some(inside) => s.element(depth + 1, "Parameters", &[], inside),
                None => String::new(),
            };
            let value = s.base64(depth + 1, "SignatureValue", &by.sign(self.algorithm, octets).unwrap());
            s.element(depth, "Signature", &[("Algorithm", self.algorithm.uri())], &(parameters + &value))
        };
        let certificate = signing_certificate(self.party);
        let vouched = signature(4, signing(self.parent_party), certificate, &self.parameters);
        let encryption_signature = signature(4, signing(self.party), encryption_certificate(self.party), &None);
        let parameters = match &self.oaep_parameters {
            Some(inside) => s.element(5, "Parameters", &[], inside),
            None => String::new(),
        };
        let cipher = encryption(self.party).public().encrypt_oaep(self.oaep, key).unwrap();
        let data = parameters + &s.base64(5, "CipherValue", &cipher);
        let data = s.element(4, "EncryptedData", &[("Algorithm", self.oaep_uri)], &data);
        let content = [
            s.element(3, "Id", &[], &(s.value)(&self.id)),
            s.base64(3, "SigningCertificate", certificate),
            s.element(3, "SigningCertificateSignature", &[("ParentWrappingId", &self.parent)], &vouched),
            s.base64(3, "EncryptionCertificate", encryption_certificate(self.party)),
            s.element(3, "EncryptionCertificateSignature", &[], &encryption_signature),
            s.element(3, "TransportKey", &[], &data),
        ];
        s.element(2, "Wrapping", &[], &content.concat())
    }
}

pub fn oaep_parameters(oaep: Oaep) -> String {
    format!(
        "<d:DigestMethod xmlns:d=\"{DS}\" Algorithm=\"{}\"/>\
         <MGF xmlns=\"http://www.w3.org/2009/xmlenc11#\" Algorithm=\"{}\"></MGF>",
        oaep.digest.uri(),
        oaep.mgf.mgf_uri()
    )
}

pub fn every_oaep() -> impl Iterator<Item = Oaep> {
    Digest::ALL.into_iter().flat_map(|digest| Digest::ALL.into_iter().map(move |mgf| Oaep { digest, mgf }))
}

/// Shared by all tests of a program, so that every changed protector meets tables that know the unchanged one.
static KNOWN: std::sync::LazyLock<KnownCertificates> = std::sync::LazyLock::new(|| KnownCertificates::new(1000));

/// The wrapping sets, shared in the same way.
static SETS: std::sync::LazyLock<KnownSets> = std::sync::LazyLock::new(|| KnownSets::new(1000));

/// Runs steps 3 to 5 as a release does, on the full path and on the fast path, which must agree.
pub fn accept(file: &[u8]) -> Result<Verified, Refusal> {
    let verified = Protector::parse(file).and_then(|protector| verify(protector, &KNOWN));
    let read = SETS.read(file, &sha256(file), &mut Work::default());
    same_answer(&verified, &read);
    if let Ok(ingress) = read {
        SETS.remember(&ingress.set);
        let again = SETS.read(file, &sha256(file), &mut Work::default());
        same_answer(&verified, &again);
    }
    verified
}

/// Panics if the two paths gave different results.
pub fn same_answer(verified: &Result<Verified, Refusal>, read: &Result<Ingress, Refusal>) {
    match (verified, read) {
        (Err(one), Err(other)) => assert_eq!(one, other),
        (Ok(verified), Ok(ingress)) => {
            let protector = &verified.protector;
            assert_eq!(protector.signed_octets, ingress.signed_octets);
            assert_eq!(protector.transport_key_signature, ingress.transport_key_signature);
            let owner = &verified.parties[verified.owner];
            assert_eq!(&**owner, ingress.set.owner());
            assert_eq!(protector.wrappings.len(), ingress.set.wrappings().len());
            assert_eq!(protector.wrappings.len(), ingress.cipher_values.len());
            for (at, wrapping) in protector.wrappings.iter().enumerate() {
                let known = &ingress.set.wrappings()[at];
                assert_eq!((wrapping.id, wrapping.encryption.oaep), (known.id, known.oaep()));
                assert_eq!(verified.parties[at], known.party);
                assert_eq!(wrapping.cipher_value, ingress.cipher_values[at]);
            }
        }
        (verified, read) => {
            panic!("the full path says {:?}, the other {:?}", verified.as_ref().err(), read.as_ref().err())
        }
    }
}

pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    ring::digest::digest(&ring::digest::SHA256, bytes).as_ref().try_into().unwrap()
}

/// Step 7 with a key in software: decryption, then verification of the transport-key signature.
pub fn open(verified: &Verified, party: usize) -> Result<TransportKey, &'static str> {
    let at =
        verified.parties.iter().position(|p| p.encryption.key() == encryption(party).public()).ok_or("not for it")?;
    let wrapping = &verified.protector.wrappings[at];
    let plain = encryption(party).decrypt_oaep(wrapping.encryption.oaep, &wrapping.cipher_value);
    let plain = plain.map_err(|_| "decryption")?;
    let mut key = TransportKey::default();
    if plain.len() != key.len() {
        return Err("length");
    }
    key.copy_from_slice(&plain);
    let right = verified.protector.transport_key_signature.verify(&key, &verified.protector.signed_octets);
    if right { Ok(key) } else { Err("transport-key signature") }
}

/// The code of the refusal of step 3 alone, for documents whose signatures would give the same code.
pub fn shape(file: &[u8]) -> Option<Code> {
    Protector::parse(file).err().map(|e| e.code)
}

/// The code of the refusal of any step.
pub fn code(file: &[u8]) -> Option<Code> {
    accept(file).err().map(|e| e.code)
}

/// Cuts `from` … `to` (both included) out of a text.
pub fn between<'t>(text: &'t str, from: &str, to: &str) -> &'t str {
    let start = text.find(from).unwrap_or_else(|| panic!("no {from}"));
    let end = text[start..].find(to).unwrap_or_else(|| panic!("no {to}")) + to.len();
    &text[start..start + end]
}
