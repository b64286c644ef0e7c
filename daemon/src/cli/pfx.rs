//! Reads PKCS#12 (RFC 7292): a private key and its certificate in one password-protected file, in DER or BER, as
//! Windows, OpenSSL, Java and NSS write it.
//!
//! All layers are parsed here. Existing libraries read only DER and report most unsupported features with the same
//! error; this parser names the part that it cannot read.

mod crypt;
mod error;

use claviger_protocol::ber::{BerError, Element, tag};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::input::{self, InputError};
use claviger_protocol::rsa_key::RsaPrivateKey;
use zeroize::Zeroizing;

use self::crypt::{Opener, dotted};
use self::error::damaged;

pub use self::error::PfxError;

const DATA: &str = "1.2.840.113549.1.7.1";
const SIGNED_DATA: &str = "1.2.840.113549.1.7.2";
const ENVELOPED_DATA: &str = "1.2.840.113549.1.7.3";
const ENCRYPTED_DATA: &str = "1.2.840.113549.1.7.6";

const KEY_BAG: &str = "1.2.840.113549.1.12.10.1.1";
const SHROUDED_KEY_BAG: &str = "1.2.840.113549.1.12.10.1.2";
const CERTIFICATE_BAG: &str = "1.2.840.113549.1.12.10.1.3";
const NESTED_BAG: &str = "1.2.840.113549.1.12.10.1.6";
const X509_CERTIFICATE: &str = "1.2.840.113549.1.9.22.1";

/// Deepest nesting of bags. Usual files nest them at most once.
const MAX_NESTING: usize = 4;

/// Decrypts a file with `password`: returns its only private key and the certificate of that key. Other certificates
/// (the chain to a root) are ignored.
///
/// # Errors
/// [`PfxError`] names the problem. It suggests a wrong password only if that is a possible cause.
pub fn open(file: &[u8], password: &str) -> Result<(RsaPrivateKey, Certificate), PfxError> {
    let (pfx, content) = outer(file)?;
    let opener = Opener::new(password, pfx.get(2).is_some());
    if let Some(mac) = pfx.get(2) {
        opener.check_mac(*mac, &content)?;
    }
    let part = "the list of its parts";
    let damaged = damaged(part);
    let safes = Element::parse(&content).and_then(|safes| safes.expect(tag::SEQUENCE)?.children()).map_err(&damaged)?;
    let mut bags = Bags::default();
    for safe in safes {
        let (kind, content) = content_info(safe).map_err(&damaged)?;
        let contents = match kind.as_str() {
            DATA => content.octet_string().map_err(&damaged)?,
            ENCRYPTED_DATA => encrypted(content, &opener)?,
            ENVELOPED_DATA => {
                return Err(unsupported(part, "a certificate of its reader instead of a password", &kind));
            }
            _ => return Err(unsupported(part, "a kind of content", &kind)),
        };
        bags.read(&contents, &opener, MAX_NESTING)?;
    }
    bags.pair()
}

/// The elements of the outermost structure, and the bytes that the MAC covers.
fn outer(file: &[u8]) -> Result<(Vec<Element<'_>>, Zeroizing<Vec<u8>>), PfxError> {
    let part = "its outermost structure";
    let outer = match Element::parse(file) {
        Ok(outer) if outer.tag == tag::SEQUENCE => outer,
        // The file starts like a PFX and may be truncated.
        Err(source @ (BerError::CutOff | BerError::Trailing)) if file.first() == Some(&tag::SEQUENCE) => {
            return Err(PfxError::Damaged { part, source });
        }
        _ => return Err(other(file)),
    };
    let children = outer.children().map_err(damaged(part))?;
    let [version, info, ..] = children[..] else { return Err(other(file)) };
    if version.number() != Ok(3) || info.tag != tag::SEQUENCE || children.len() > 3 {
        return Err(other(file));
    }
    let (kind, content) = content_info(info).map_err(damaged(part))?;
    match kind.as_str() {
        DATA => Ok((children, content.octet_string().map_err(damaged(part))?)),
        SIGNED_DATA => Err(unsupported(part, "a signature instead of a password", &kind)),
        _ => Err(unsupported(part, "a kind of content", &kind)),
    }
}

/// Identifies a file that is not a PFX.
fn other(file: &[u8]) -> PfxError {
    PfxError::Other(match input::private_key(file) {
        Ok(_) => {
            "it holds a private key by itself; put it and its certificate into one: openssl pkcs12 -export -inkey KEY \
                  -in CERTIFICATE -out NEW"
                .to_owned()
        }
        Err(error @ (InputError::Other { .. } | InputError::Empty | InputError::Text(_) | InputError::Pem(_))) => {
            error.to_string()
        }
        Err(_) => "is it the right file?".to_owned(),
    })
}

fn unsupported(part: &'static str, what: &str, oid: &str) -> PfxError {
    PfxError::Unsupported { part, name: format!("{what} ({oid})") }
}

/// Splits a `ContentInfo` into its type and the element inside its `[0]`.
fn content_info(info: Element<'_>) -> Result<(String, Element<'_>), BerError> {
    let [kind, content] = info.expect(tag::SEQUENCE)?.children()?[..] else { return Err(BerError::Structure) };
    Ok((dotted(kind)?, content.expect(tag::CONTEXT_0)?.only_child()?))
}

/// Decrypts an `EncryptedData`.
fn encrypted(content: Element<'_>, opener: &Opener<'_>) -> Result<Zeroizing<Vec<u8>>, PfxError> {
    let part = "its encrypted part";
    let read = || {
        let [_, info, ..] = content.expect(tag::SEQUENCE)?.children()?[..] else { return Err(BerError::Structure) };
        let [_, algorithm, sealed] = info.expect(tag::SEQUENCE)?.children()?[..] else {
            return Err(BerError::Structure);
        };
        // An implicit tag replaces the OCTET STRING tag. The string may be in pieces.
        if !matches!(sealed.tag, tag::CONTEXT_0 | tag::CONTEXT_0_PRIMITIVE) {
            return Err(BerError::Structure);
        }
        Ok((algorithm, sealed.octet_string()?))
    };
    let (algorithm, sealed) = read().map_err(damaged(part))?;
    opener.decrypt(part, algorithm, &sealed)
}

/// The collected content of the bags.
#[derive(Default)]
struct Bags {
    /// PKCS#8.
    keys: Vec<Zeroizing<Vec<u8>>>,
    certificates: Vec<Vec<u8>>,
}

impl Bags {
    /// Parses a `SafeContents`.
    fn read(&mut self, contents: &[u8], opener: &Opener<'_>, nesting: usize) -> Result<(), PfxError> {
        let damaged = damaged("one of its bags");
        let bags =
            Element::parse(contents).and_then(|bags| bags.expect(tag::SEQUENCE)?.children()).map_err(&damaged)?;
        for bag in bags {
            let (kind, value) = Self::bag(bag).map_err(&damaged)?;
            match kind.as_str() {
                KEY_BAG => self.keys.push(value.to_der().map_err(&damaged)?),
                SHROUDED_KEY_BAG => {
                    let [algorithm, sealed] = value.children().map_err(&damaged)?[..] else {
                        return Err(damaged(BerError::Structure));
                    };
                    let sealed = sealed.octet_string().map_err(&damaged)?;
                    let key = opener.decrypt("its private key", algorithm, &sealed)?;
                    let key = Element::parse(&key).and_then(|key| key.to_der()).map_err(&damaged)?;
                    self.keys.push(key);
                }
                CERTIFICATE_BAG => self.certificates.extend(Self::certificate(value).map_err(&damaged)?),
                NESTED_BAG => {
                    let nesting = nesting.checked_sub(1).ok_or_else(|| damaged(BerError::TooDeep))?;
                    self.read(value.raw, opener, nesting)?;
                }
                // Revocation lists, other secrets, and vendors' own types.
                _ => {}
            }
        }
        Ok(())
    }

    fn bag(bag: Element<'_>) -> Result<(String, Element<'_>), BerError> {
        let [kind, value, ..] = bag.expect(tag::SEQUENCE)?.children()?[..] else { return Err(BerError::Structure) };
        Ok((dotted(kind)?, value.expect(tag::CONTEXT_0)?.only_child()?))
    }

    fn certificate(value: Element<'_>) -> Result<Option<Vec<u8>>, BerError> {
        let (kind, certificate) = content_info(value)?;
        Ok(if kind == X509_CERTIFICATE { Some(certificate.octet_string()?.to_vec()) } else { None })
    }

    /// The only key, and its certificate.
    fn pair(self) -> Result<(RsaPrivateKey, Certificate), PfxError> {
        let [key] = &self.keys[..] else { return Err(PfxError::Keys(self.keys.len())) };
        let key = RsaPrivateKey::from_pkcs8_der(key).map_err(PfxError::Key)?;
        let mut unreadable = 0;
        for der in &self.certificates {
            match Certificate::parse(der) {
                Ok(certificate) if certificate.key() == key.public() => return Ok((key, certificate)),
                Ok(_) => {}
                Err(_) => unreadable += 1,
            }
        }
        Err(PfxError::NoCertificate { found: self.certificates.len(), unreadable })
    }
}

#[cfg(test)]
mod tests;
