//! Skeletons: the fixed text of a protector, without the values that differ between two protectors with the same
//! wrappings.
//!
//! All machines of one owner with the same guardians share every byte of `Wrappings` except the `CipherValue`s. This
//! crate writes a protector as
//!
//! ```text
//! <?xml …?><Protector xmlns="K" MaxOfflineUnwraps="n"><Wrappings>    head
//! <Wrapping>…<CipherValue> ◊ </CipherValue>…</Wrapping></Wrappings>  body: fixed bytes around a hole for each wrapping
//! <TransportKeySignature>…</GuardianSignature></Protector>           tail: fixed bytes around five values
//! ```
//!
//! Both signatures cover `<Wrappings xmlns="K">` and the body. All text is written in canonical form.

use std::fmt;
use std::ops::Range;
use std::sync::{LazyLock, OnceLock};

use data_encoding::{BASE64, HEXLOWER};
use ring::digest;

use crate::algorithm::{Digest, HKDF, HMAC_SHA256, OAEP_11, OAEP_MGF1P, SignatureAlgorithm};
use crate::plain::{Rest, plain_base64};
use crate::protector::{
    Encryption, HKDF_NS, Hkdf, MAX_PROTECTOR, Signature, TRANSPORT_KEY_LEN, TransportKeySignature, Wrapping,
};
use crate::xml::{DSIG_NS, KPS_NS, write_base64};

const DECLARATION: &str = "<?xml version=\"1.0\" encoding=\"utf-8\"?><Protector xmlns=\"";
const UNWRAPS: &str = "\" MaxOfflineUnwraps=\"";
const WRAPPINGS: &str = "\"><Wrappings>";
const HOLE: &str = "<CipherValue>";
/// Start tag of the signed element. Inside a document, the root declares the default namespace; the signed form stands
/// alone and declares it itself.
static SIGNED_HEAD: LazyLock<String> = LazyLock::new(|| format!("<Wrappings xmlns=\"{KPS_NS}\">"));

/// The fixed text after the body.
struct Tail {
    before_salt: String,
    before_mac: String,
    before_guardian: &'static str,
    before_algorithm: &'static str,
    before_signature: &'static str,
    end: &'static str,
}

static TAIL: LazyLock<Tail> = LazyLock::new(|| Tail {
    before_salt: format!(
        "<TransportKeySignature><KeyDerivationMethod Algorithm=\"{HKDF}\"><Parameters>\
         <h:HKDFParams xmlns:h=\"{HKDF_NS}\"><h:PRF Algorithm=\"{HMAC_SHA256}\"></h:PRF><h:Salt>"
    ),
    before_mac: format!(
        "</h:Salt><h:KeyLength>{TRANSPORT_KEY_LEN}</h:KeyLength></h:HKDFParams></Parameters></KeyDerivationMethod>\
         <Signature Algorithm=\"{HMAC_SHA256}\"><SignatureValue>"
    ),
    before_guardian: "</SignatureValue></Signature></TransportKeySignature><GuardianSignature WrappingId=\"",
    before_algorithm: "\"><Signature Algorithm=\"",
    before_signature: "\"><SignatureValue>",
    end: "</SignatureValue></Signature></GuardianSignature></Protector>",
});

/// Bytes before a hole that serve as the key of a skeleton. They include the end of the signature over an encryption
/// certificate, for any encryption parameters.
const SAMPLE: usize = 512;
/// Bytes of the salts that this crate writes.
const SALT: usize = 32;

/// The body without the values of its holes.
#[derive(Debug)]
pub(crate) struct Skeleton {
    body: String,
    /// Positions of the holes, in ascending order.
    holes: Vec<usize>,
    /// Hash state after the signed text up to the first hole.
    signed_prefix: Prefix,
    /// Hash state after a file without offline unwraps, up to the first hole.
    file_prefix: Prefix,
}

/// Hash state after bytes with which many messages begin.
#[derive(Default)]
struct Prefix(OnceLock<digest::Context>);

impl Prefix {
    /// Returns the hash state after `parts`, which must be the same in every call.
    fn after(&self, parts: [&str; 2]) -> digest::Context {
        let begin = || {
            let mut context = digest::Context::new(&digest::SHA256);
            parts.iter().for_each(|part| context.update(part.as_bytes()));
            context
        };
        self.0.get_or_init(begin).clone()
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prefix").finish_non_exhaustive()
    }
}

/// The values of a protector that matches a known skeleton.
pub(crate) struct Values<'f> {
    /// Base64, not decoded.
    pub(crate) ciphers: Vec<&'f [u8]>,
    pub(crate) transport_key_signature: TransportKeySignature,
    /// Id of the wrapping whose key made the guardian signature.
    pub(crate) guardian: u32,
    pub(crate) guardian_signature: Signature,
    /// Position of the body in the file.
    pub(crate) body: Range<usize>,
}

impl Skeleton {
    pub(crate) fn of(wrappings: &[Wrapping]) -> Self {
        let mut body = String::with_capacity(4096 * wrappings.len());
        let holes = wrappings.iter().map(|wrapping| write_wrapping(wrapping, &mut body)).collect();
        body.push_str("</Wrappings>");
        Self { body, holes, signed_prefix: Prefix::default(), file_prefix: Prefix::default() }
    }

    /// The fixed bytes of the body, without values.
    pub(crate) fn body(&self) -> &str {
        &self.body
    }

    /// Number of holes.
    pub(crate) fn holes(&self) -> usize {
        self.holes.len()
    }

    /// The body in pieces: fixed bytes and base64 values of the holes, alternating.
    fn pieces<'s>(&'s self, ciphers: &'s Ciphers) -> impl Iterator<Item = &'s str> {
        let starts = std::iter::once(0).chain(self.holes.iter().copied());
        let ends = self.holes.iter().copied().chain([self.body.len()]);
        let fixed = starts.zip(ends).map(|(start, end)| &self.body[start..end]);
        fixed.zip(ciphers.values().chain([""])).flat_map(|(fixed, value)| [fixed, value])
    }

    /// Length of the bytes that both signatures cover.
    pub(crate) fn signed_len(&self, ciphers: &Ciphers) -> usize {
        SIGNED_HEAD.len() + self.body.len() + ciphers.text.len()
    }

    /// The bytes that both signatures cover, in pieces.
    pub(crate) fn signed<'s>(&'s self, ciphers: &'s Ciphers) -> impl Iterator<Item = &'s str> {
        std::iter::once(SIGNED_HEAD.as_str()).chain(self.pieces(ciphers))
    }

    /// SHA-256 of the bytes that both signatures cover.
    pub(crate) fn signed_sha256(&self, ciphers: &Ciphers) -> digest::Digest {
        let mut context = self.signed_so_far();
        self.pieces(ciphers).skip(1).for_each(|piece| context.update(piece.as_bytes()));
        context.finish()
    }

    /// The same SHA-256 for a body that was received.
    pub(crate) fn signed_sha256_of(&self, body: &[u8]) -> digest::Digest {
        let mut context = self.signed_so_far();
        context.update(body.get(self.first_hole()..).unwrap_or_default());
        context.finish()
    }

    /// The bytes that both signatures cover, for this body.
    pub(crate) fn signed_octets_of(&self, body: &[u8]) -> Vec<u8> {
        [SIGNED_HEAD.as_bytes(), body].concat()
    }

    fn first_hole(&self) -> usize {
        self.holes.first().copied().unwrap_or_default()
    }

    /// The body up to the first hole.
    fn beginning(&self) -> &str {
        &self.body[..self.first_hole()]
    }

    fn signed_so_far(&self) -> digest::Context {
        self.signed_prefix.after([&SIGNED_HEAD, self.beginning()])
    }

    /// SHA-256 of a file that this skeleton wrote.
    pub(crate) fn file_sha256(&self, file: &[u8], max_offline_unwraps: u32) -> digest::Digest {
        if max_offline_unwraps > 0 {
            return digest::digest(&digest::SHA256, file);
        }
        let head = head(0);
        let mut context = self.file_prefix.after([&head, self.beginning()]);
        context.update(file.get(head.len() + self.first_hole()..).unwrap_or_default());
        context.finish()
    }

    /// Writes the protector file.
    pub(crate) fn write(
        &self,
        max_offline_unwraps: u32,
        ciphers: &Ciphers,
        transport_key_signature: &TransportKeySignature,
        guardian: u32,
        guardian_signature: &Signature,
    ) -> Vec<u8> {
        let signature_len = BASE64.encode_len(guardian_signature.value.len());
        let mut out = String::with_capacity(self.signed_len(ciphers) + signature_len + 1536);
        out.push_str(&head(max_offline_unwraps));
        self.pieces(ciphers).for_each(|piece| out.push_str(piece));
        write_tail(transport_key_signature, guardian, guardian_signature, &mut out);
        out.into_bytes()
    }

    /// Writes a file without content: each signature is a placeholder.
    pub(crate) fn write_placeholder(&self, ciphers: &Ciphers, guardian: u32) -> Vec<u8> {
        let derivation = Hkdf { salt: vec![0; SALT], info: Vec::new() };
        let signature = Signature { algorithm: SignatureAlgorithm::DEFAULT, parameters: None, value: vec![0] };
        self.write(0, ciphers, &TransportKeySignature { derivation, value: vec![0] }, guardian, &signature)
    }

    /// Returns the values of `file` if all other bytes equal this skeleton with the head and tail that this crate
    /// writes. A full parse would return the same values. Returns `None` for every other file, valid or not; only a
    /// full parse can judge such a file.
    pub(crate) fn read<'f>(&self, file: &'f [u8]) -> Option<Values<'f>> {
        // No other check here limits the size of the values.
        if file.len() > MAX_PROTECTOR {
            return None;
        }
        let mut rest = Rest::new(file);
        rest.literal(DECLARATION)?;
        rest.literal(KPS_NS)?;
        if rest.literal(UNWRAPS).is_some() {
            number(rest.until(b'"')?)?;
        }
        rest.literal(WRAPPINGS)?;
        let start = rest.at();
        let (mut from, mut ciphers) = (0, Vec::with_capacity(self.holes.len()));
        for hole in &self.holes {
            rest.literal(&self.body[from..*hole])?;
            ciphers.push(rest.until(b'<')?);
            from = *hole;
        }
        rest.literal(&self.body[from..])?;
        let body = start..rest.at();
        rest.literal(&TAIL.before_salt)?;
        let salt = HEXLOWER.decode(rest.until(b'<')?).ok().filter(|salt| salt.len() == SALT)?;
        rest.literal(&TAIL.before_mac)?;
        let mac = plain_base64(rest.until(b'<')?)?;
        rest.literal(TAIL.before_guardian)?;
        let guardian = number(rest.until(b'"')?)?;
        rest.literal(TAIL.before_algorithm)?;
        let uri = rest.text_until(b'"')?;
        let algorithm = SignatureAlgorithm::from_uri(uri).ok()?;
        rest.literal(TAIL.before_signature)?;
        let signature = plain_base64(rest.until(b'<')?)?;
        rest.literal(TAIL.end)?;
        rest.end()?;
        Some(Values {
            ciphers,
            transport_key_signature: TransportKeySignature { derivation: Hkdf { salt, info: Vec::new() }, value: mac },
            guardian,
            guardian_signature: Signature { algorithm, parameters: None, value: signature },
            body,
        })
    }
}

/// The keys by which the skeleton of a document is found: the bytes before each hole.
pub(crate) fn samples(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    memchr::memmem::find_iter(text, HOLE).map(|at| &text[at.saturating_sub(SAMPLE)..at])
}

/// Parses a number in the form that this crate writes: digits without a leading 0.
fn number(digits: &[u8]) -> Option<u32> {
    let (b'1'..=b'9', true) = (digits.first()?, digits.iter().all(u8::is_ascii_digit)) else { return None };
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// The encrypted values of all holes, in base64.
#[derive(Debug)]
pub(crate) struct Ciphers {
    text: String,
    /// End position of each value.
    ends: Vec<usize>,
}

impl Ciphers {
    pub(crate) fn with_capacity(count: usize) -> Self {
        Self { text: String::with_capacity(count * BASE64.encode_len(256)), ends: Vec::with_capacity(count) }
    }

    pub(crate) fn push(&mut self, cipher_value: &[u8]) {
        BASE64.encode_append(cipher_value, &mut self.text);
        self.ends.push(self.text.len());
    }

    fn values(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.text[start..*end])
    }

    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Memory use in bytes.
    pub(crate) fn size(&self) -> usize {
        self.text.capacity() + self.ends.capacity() * size_of::<usize>()
    }
}

fn head(max_offline_unwraps: u32) -> String {
    let mut head = String::with_capacity(256);
    head.push_str(DECLARATION);
    head.push_str(KPS_NS);
    if max_offline_unwraps > 0 {
        head.push_str(&format!("{UNWRAPS}{max_offline_unwraps}"));
    }
    head.push_str(WRAPPINGS);
    head
}

/// Writes the text after the body. The derivation has no `info`, so none is written.
fn write_tail(signature: &TransportKeySignature, guardian: u32, by: &Signature, out: &mut String) {
    out.push_str(&TAIL.before_salt);
    HEXLOWER.encode_append(&signature.derivation.salt, out);
    out.push_str(&TAIL.before_mac);
    BASE64.encode_append(&signature.value, out);
    out.push_str(TAIL.before_guardian);
    out.push_str(&guardian.to_string());
    out.push_str(TAIL.before_algorithm);
    out.push_str(by.algorithm.uri());
    out.push_str(TAIL.before_signature);
    BASE64.encode_append(&by.value, out);
    out.push_str(TAIL.end);
}

/// Writes a wrapping and returns the position of its hole.
fn write_wrapping(wrapping: &Wrapping, out: &mut String) -> usize {
    out.push_str(&format!("<Wrapping><Id>{}</Id>", wrapping.id));
    write_base64("SigningCertificate", &wrapping.signing_certificate, out);
    out.push_str(&format!("<SigningCertificateSignature ParentWrappingId=\"{}\">", wrapping.parent));
    write_signature("Signature", &wrapping.signing_certificate_signature, out);
    out.push_str("</SigningCertificateSignature>");
    write_base64("EncryptionCertificate", &wrapping.encryption_certificate, out);
    out.push_str("<EncryptionCertificateSignature>");
    write_signature("Signature", &wrapping.encryption_certificate_signature, out);
    out.push_str("</EncryptionCertificateSignature><TransportKey>");
    write_encryption(&wrapping.encryption, out);
    out.push_str(HOLE);
    let hole = out.len();
    out.push_str("</CipherValue></EncryptedData></TransportKey></Wrapping>");
    hole
}

/// Writes the start of `EncryptedData`, up to its `Parameters`. With XML Encryption 1.1, both digests are written unless
/// both are SHA-1: absent digests mean SHA-1.
fn write_encryption(encryption: &Encryption, out: &mut String) {
    if !encryption.version_11 {
        out.push_str(&format!("<EncryptedData Algorithm=\"{OAEP_MGF1P}\">"));
        return;
    }
    out.push_str(&format!("<EncryptedData Algorithm=\"{OAEP_11}\">"));
    let oaep = encryption.oaep;
    if (oaep.digest, oaep.mgf) != (Digest::Sha1, Digest::Sha1) {
        out.push_str(&format!(
            "<Parameters><ds:DigestMethod xmlns:ds=\"{DSIG_NS}\" Algorithm=\"{}\"></ds:DigestMethod>\
             <xenc11:MGF xmlns:xenc11=\"http://www.w3.org/2009/xmlenc11#\" Algorithm=\"{}\"></xenc11:MGF></Parameters>",
            oaep.digest.uri(),
            oaep.mgf.mgf_uri()
        ));
    }
}

/// Writes a `Signature_T` as the element `element`.
pub(crate) fn write_signature(element: &str, signature: &Signature, out: &mut String) {
    out.push_str(&format!("<{element} Algorithm=\"{}\">", signature.algorithm.uri()));
    if let Some(parameters) = &signature.parameters {
        out.push_str("<Parameters>");
        out.push_str(parameters);
        out.push_str("</Parameters>");
    }
    write_base64("SignatureValue", &signature.value, out);
    out.push_str(&format!("</{element}>"));
}
