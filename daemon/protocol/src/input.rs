//! Reads certificates and keys from files of administrators: PEM, DER, PKCS#7, and the other forms that Windows and
//! openssl write.
//!
//! Nothing is ignored silently: if a part of a file cannot be used, the error names it and says what to do.

use zeroize::Zeroizing;

use crate::ber::{Element, tag};
use crate::certificate::{Certificate, CertificateError};
use crate::pem::{self, Block, PemError, TextError};
use crate::rsa_key::{KeyError, RsaPrivateKey, RsaPublicKey};

const SIGNED_DATA: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02";

/// Why a file cannot be used. The message follows the file's name and says what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InputError {
    /// The file is empty.
    #[error("it is empty; give it its content again")]
    Empty,
    /// The file has to be text, and is not.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A PEM block is damaged.
    #[error(transparent)]
    Pem(#[from] PemError),
    /// The file holds another kind of thing.
    #[error("it is {}, and a {wanted} is needed; {}", found.name(), found.advice(*wanted))]
    Other {
        /// The content of the file.
        found: Found,
        /// The expected content.
        wanted: Wanted,
    },
    /// The file holds more than one.
    #[error("it holds {count} of them, and exactly one {wanted} is needed; remove the others from it")]
    Several {
        /// Number of items in the file.
        count: usize,
        /// The expected content.
        wanted: Wanted,
    },
    /// One of several certificates in the file cannot be parsed.
    #[error("{place}: {source}; remove it from the file, or get it again from where it came")]
    Certificate {
        /// The certificate's number, its line and, if it can be read, its subject.
        place: String,
        /// The reason.
        source: CertificateError,
    },
    /// The key, or the certificate's key, is not accepted.
    #[error("{0}")]
    Key(#[from] KeyError),
}

/// The content that a caller expects in a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// An X.509 certificate.
    Certificate,
    /// A public key, or a certificate of it.
    PublicKey,
    /// A private key that is not encrypted.
    PrivateKey,
}

impl std::fmt::Display for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Certificate => "certificate",
            Self::PublicKey => "public key or certificate",
            Self::PrivateKey => "private key",
        })
    }
}

/// The content of a file or of a PEM block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Found {
    Certificate,
    /// An OpenSSL `TRUSTED CERTIFICATE`: a certificate with a list of the purposes that it is trusted for.
    TrustedCertificate,
    CertificateRequest,
    RevocationList,
    PublicKey,
    Pkcs1PublicKey,
    PrivateKey,
    Pkcs1PrivateKey,
    EcPrivateKey,
    EncryptedPrivateKey,
    SshPublicKey,
    SshPrivateKey,
    Pkcs7,
    Pfx,
    JavaKeystore,
    /// A text without a PEM block.
    Text,
    /// A PEM block with another label.
    OtherPem,
    Unknown,
}

impl Found {
    fn of_label(label: &str) -> Self {
        match label {
            "CERTIFICATE" | "X509 CERTIFICATE" => Self::Certificate,
            "TRUSTED CERTIFICATE" => Self::TrustedCertificate,
            "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST" => Self::CertificateRequest,
            "X509 CRL" => Self::RevocationList,
            "PUBLIC KEY" => Self::PublicKey,
            "RSA PUBLIC KEY" => Self::Pkcs1PublicKey,
            "PRIVATE KEY" => Self::PrivateKey,
            "RSA PRIVATE KEY" => Self::Pkcs1PrivateKey,
            "EC PRIVATE KEY" => Self::EcPrivateKey,
            "ENCRYPTED PRIVATE KEY" => Self::EncryptedPrivateKey,
            "SSH2 PUBLIC KEY" => Self::SshPublicKey,
            "OPENSSH PRIVATE KEY" => Self::SshPrivateKey,
            "PKCS7" | "PKCS #7 SIGNED DATA" | "CMS" => Self::Pkcs7,
            _ => Self::OtherPem,
        }
    }

    /// Identifies bytes without PEM by their outermost structure.
    fn of_bytes(bytes: &[u8]) -> Self {
        use tag::{BIT_STRING, CONTEXT_0, INTEGER, OBJECT_IDENTIFIER, OCTET_STRING, SEQUENCE};
        if bytes.starts_with(b"\xfe\xed\xfe\xed") || bytes.starts_with(b"\xce\xce\xce\xce") {
            return Self::JavaKeystore;
        }
        let children =
            Element::parse(bytes).and_then(|outer| outer.expect(SEQUENCE)).and_then(|outer| outer.children());
        let Ok(children) = children else { return Self::Unknown };
        let tags: Vec<u8> = children.iter().map(|child| child.tag).collect();
        let inner = |at: usize| children[at].children().unwrap_or_default().iter().map(|child| child.tag).collect();
        match tags[..] {
            [INTEGER, SEQUENCE, ..] if children[0].content == [3] => Self::Pfx,
            [INTEGER, SEQUENCE, OCTET_STRING, ..] => Self::PrivateKey,
            [INTEGER, OCTET_STRING, ..] => Self::EcPrivateKey,
            [INTEGER, INTEGER] => Self::Pkcs1PublicKey,
            [INTEGER, INTEGER, INTEGER, ..] => Self::Pkcs1PrivateKey,
            [OBJECT_IDENTIFIER, CONTEXT_0] => Self::Pkcs7,
            [SEQUENCE, BIT_STRING] => Self::PublicKey,
            [SEQUENCE, OCTET_STRING] => Self::EncryptedPrivateKey,
            [SEQUENCE, SEQUENCE, BIT_STRING] => {
                let signed: Vec<u8> = inner(0);
                match signed[..] {
                    [INTEGER, SEQUENCE, SEQUENCE, CONTEXT_0] => Self::CertificateRequest,
                    [CONTEXT_0, ..] | [INTEGER, SEQUENCE, SEQUENCE, SEQUENCE, SEQUENCE, SEQUENCE] => Self::Certificate,
                    _ => Self::RevocationList,
                }
            }
            _ => Self::Unknown,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Certificate => "a certificate",
            Self::TrustedCertificate => "a TRUSTED CERTIFICATE, a form that only openssl knows",
            Self::CertificateRequest => "a certificate request",
            Self::RevocationList => "a revocation list",
            Self::PublicKey => "a public key",
            Self::Pkcs1PublicKey => "a public key in PKCS#1 form",
            Self::PrivateKey => "a private key",
            Self::Pkcs1PrivateKey => "an RSA private key in PKCS#1 form",
            Self::EcPrivateKey => "a private key for elliptic curves",
            Self::EncryptedPrivateKey => "a private key that is encrypted under a passphrase",
            Self::SshPublicKey => "a public key in a form of SSH",
            Self::SshPrivateKey => "a private key in OpenSSH's own form",
            Self::Pkcs7 => "a PKCS#7 file (.p7b) without certificates in it",
            Self::Pfx => "a PFX (PKCS#12)",
            Self::JavaKeystore => "a Java keystore in the old format (JKS)",
            Self::Text => "text without a PEM block (-----BEGIN …)",
            Self::OtherPem => "PEM, but nothing of this kind",
            Self::Unknown => "neither PEM nor DER",
        }
    }

    fn is_private(self) -> bool {
        matches!(
            self,
            Self::PrivateKey
                | Self::Pkcs1PrivateKey
                | Self::EcPrivateKey
                | Self::EncryptedPrivateKey
                | Self::SshPrivateKey
        )
    }

    fn advice(self, wanted: Wanted) -> &'static str {
        match (self, wanted) {
            (Self::EncryptedPrivateKey, Wanted::PrivateKey) => {
                "decrypt it into a file of its own: (umask 077; openssl pkey -in FILE -out NEW)"
            }
            (Self::Pkcs1PrivateKey, Wanted::PrivateKey) => {
                "convert it: (umask 077; openssl pkcs8 -topk8 -nocrypt -in FILE -out NEW)"
            }
            (Self::SshPrivateKey, Wanted::PrivateKey) => "convert a copy of it: ssh-keygen -p -m PKCS8 -N '' -f COPY",
            (Self::Pfx, Wanted::PrivateKey) => {
                "take its key out: (umask 077; openssl pkcs12 -in FILE -nocerts -nodes -out NEW)"
            }
            (kind, Wanted::PublicKey) if kind.is_private() => {
                "give its public half, which openssl pkey -in FILE -pubout writes; the private key stays where it is"
            }
            (kind, Wanted::Certificate) if kind.is_private() => {
                "give the certificate of that key; the private key stays where it is"
            }
            (Self::CertificateRequest, _) => "give what the authority makes of it: the certificate",
            (Self::TrustedCertificate, _) => "convert it: openssl x509 -in FILE -out NEW",
            (Self::PublicKey | Self::Pkcs1PublicKey, Wanted::Certificate) => "give the certificate of that key",
            (Self::SshPublicKey, _) => "convert it: ssh-keygen -e -m PKCS8 -f FILE",
            (Self::Pkcs7, _) => "export it again, with the certificate",
            (Self::Pfx, _) => "take its certificate out: openssl pkcs12 -in FILE -nokeys -clcerts -out NEW",
            (Self::JavaKeystore, _) => {
                "convert it: keytool -importkeystore -srckeystore FILE -destkeystore NEW -deststoretype pkcs12"
            }
            _ => "is it the right file?",
        }
    }
}

/// One certificate of a file, with its position in the file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The certificate in DER.
    pub der: Vec<u8>,
    /// Number and line of the certificate, for messages.
    pub place: String,
}

/// All certificates of a PEM, DER or PKCS#7 file; at least one. Other PEM blocks, such as keys, are skipped. The
/// certificates are not validated.
///
/// # Errors
/// [`InputError`]. If any `BEGIN CERTIFICATE` block cannot be read, the whole file is rejected.
pub fn certificates(bytes: &[u8]) -> Result<Vec<Entry>, InputError> {
    let wanted = Wanted::Certificate;
    let entries = |ders: Vec<(Vec<u8>, Option<usize>)>| {
        let count = ders.len();
        let place = |at: usize, line: Option<usize>| match line {
            Some(line) => format!("certificate {} of {count} (line {line})", at + 1),
            None => format!("certificate {} of {count}", at + 1),
        };
        ders.into_iter().enumerate().map(|(at, (der, line))| Entry { der, place: place(at, line) }).collect()
    };
    let found = match form(bytes)? {
        Form::Bytes(Found::Certificate) => return Ok(entries(vec![(bytes.to_vec(), None)])),
        Form::Bytes(Found::Pkcs7) => {
            let ders = pkcs7(bytes);
            if !ders.is_empty() {
                return Ok(entries(ders.into_iter().map(|der| (der, None)).collect()));
            }
            Found::Pkcs7
        }
        Form::Bytes(found) => found,
        Form::Pem(blocks) => {
            let mut ders = Vec::new();
            for block in &blocks {
                match Found::of_label(block.label) {
                    Found::Certificate => ders.push((block.bytes.to_vec(), Some(block.line))),
                    found @ Found::Pkcs7 => {
                        let inner = pkcs7(&block.bytes);
                        if inner.is_empty() {
                            return Err(InputError::Other { found, wanted });
                        }
                        ders.extend(inner.into_iter().map(|der| (der, Some(block.line))));
                    }
                    found @ Found::TrustedCertificate => return Err(InputError::Other { found, wanted }),
                    _ => {}
                }
            }
            if !ders.is_empty() {
                return Ok(entries(ders));
            }
            first(&blocks)
        }
    };
    Err(InputError::Other { found, wanted })
}

/// The one certificate of a file.
///
/// # Errors
/// [`InputError`].
pub fn certificate(bytes: &[u8]) -> Result<Certificate, InputError> {
    let entries = certificates(bytes)?;
    let [entry] = &entries[..] else {
        return Err(InputError::Several { count: entries.len(), wanted: Wanted::Certificate });
    };
    Certificate::parse(&entry.der).map_err(|error| match error {
        CertificateError::Key(key) => InputError::Key(key),
        source => InputError::Certificate { place: entry.place.clone(), source },
    })
}

/// The one public key of a file: SubjectPublicKeyInfo, PKCS#1, `RSA1` (BCRYPT), or the key of a certificate.
///
/// # Errors
/// [`InputError`].
pub fn public_key(bytes: &[u8]) -> Result<RsaPublicKey, InputError> {
    let wanted = Wanted::PublicKey;
    let read = |found: Found, bytes: &[u8]| match found {
        Found::PublicKey => Ok(RsaPublicKey::from_spki_der(bytes)?),
        Found::Pkcs1PublicKey => Ok(RsaPublicKey::from_pkcs1_der(bytes)?),
        Found::Certificate | Found::Pkcs7 => Ok(certificate(bytes)?.key().clone()),
        found => Err(InputError::Other { found, wanted }),
    };
    if bytes.starts_with(b"RSA1") {
        return Ok(RsaPublicKey::from_any(bytes)?);
    }
    match form(bytes)? {
        Form::Bytes(Found::Unknown) => match RsaPublicKey::from_any(bytes) {
            Err(KeyError::Format) => Err(InputError::Other { found: Found::Unknown, wanted }),
            other => Ok(other?),
        },
        Form::Bytes(found) => read(found, bytes),
        Form::Pem(blocks) => match &blocks[..] {
            [block] => read(Found::of_label(block.label), &block.bytes),
            _ => {
                let usable = |block: &&Block<'_>| {
                    matches!(
                        Found::of_label(block.label),
                        Found::PublicKey | Found::Pkcs1PublicKey | Found::Certificate | Found::Pkcs7
                    )
                };
                match blocks.iter().filter(usable).count() {
                    0 => Err(InputError::Other { found: first(&blocks), wanted }),
                    _ => Err(InputError::Several { count: blocks.len(), wanted }),
                }
            }
        },
    }
}

/// The one RSA private key of a PEM file, as unencrypted PKCS#8.
///
/// # Errors
/// [`InputError`].
pub fn rsa_private_key(bytes: &[u8]) -> Result<RsaPrivateKey, InputError> {
    let PrivateKey { found, bytes } = private_key(bytes)?;
    match found {
        Found::PrivateKey => Ok(RsaPrivateKey::from_pkcs8_der(&bytes)?),
        found => Err(InputError::Other { found, wanted: Wanted::PrivateKey }),
    }
}

/// A private key that was read from a file.
pub struct PrivateKey {
    /// The key's form: [`Found::PrivateKey`] (PKCS#8), [`Found::Pkcs1PrivateKey`] or [`Found::EcPrivateKey`].
    pub found: Found,
    /// The key in DER.
    pub bytes: Zeroizing<Vec<u8>>,
}

/// The one unencrypted private key of a file, of any algorithm, in PEM or DER. Certificates and parameters in the same
/// PEM file are skipped.
///
/// # Errors
/// [`InputError`].
pub fn private_key(bytes: &[u8]) -> Result<PrivateKey, InputError> {
    let wanted = Wanted::PrivateKey;
    let usable = |found: Found| matches!(found, Found::PrivateKey | Found::Pkcs1PrivateKey | Found::EcPrivateKey);
    match form(bytes)? {
        Form::Bytes(found) if usable(found) => Ok(PrivateKey { found, bytes: Zeroizing::new(bytes.to_vec()) }),
        Form::Bytes(found) => Err(InputError::Other { found, wanted }),
        Form::Pem(mut blocks) => {
            let kind = |block: &Block<'_>| {
                if block.encrypted { Found::EncryptedPrivateKey } else { Found::of_label(block.label) }
            };
            let other = first(&blocks);
            blocks.retain(|block| kind(block).is_private());
            match &mut blocks[..] {
                [] => Err(InputError::Other { found: other, wanted }),
                [block] if usable(kind(block)) => {
                    Ok(PrivateKey { found: kind(block), bytes: std::mem::take(&mut block.bytes) })
                }
                [block] => Err(InputError::Other { found: kind(block), wanted }),
                several => Err(InputError::Several { count: several.len(), wanted }),
            }
        }
    }
}

/// The certificates in a PKCS#7 `SignedData` structure; empty if the bytes are not such a structure.
#[must_use]
pub fn pkcs7(bytes: &[u8]) -> Vec<Vec<u8>> {
    let read = || {
        let info = Element::parse(bytes)?.expect(tag::SEQUENCE)?.children()?;
        let [kind, content] = info[..] else { return Ok(Vec::new()) };
        if kind.expect(tag::OBJECT_IDENTIFIER)?.content != SIGNED_DATA {
            return Ok(Vec::new());
        }
        let signed = content.expect(tag::CONTEXT_0)?.only_child()?.children()?;
        let Some(set) = signed.iter().find(|part| part.tag == tag::CONTEXT_0) else { return Ok(Vec::new()) };
        let certificates = set.children()?;
        Ok::<_, crate::ber::BerError>(certificates.iter().map(|certificate| certificate.raw.to_vec()).collect())
    };
    read().unwrap_or_default()
}

enum Form<'a> {
    Bytes(Found),
    Pem(Vec<Block<'a>>),
}

fn form(bytes: &[u8]) -> Result<Form<'_>, InputError> {
    if bytes.trim_ascii().is_empty() {
        return Err(InputError::Empty);
    }
    // A DER file of this size starts with 30 82. These bytes are neither UTF-8 nor UTF-16.
    let text = match pem::text(bytes) {
        Ok(text) => text,
        Err(TextError::NotUtf8 | TextError::Nul) if !contains(bytes, b"-----BEGIN ") => {
            return Ok(Form::Bytes(Found::of_bytes(bytes)));
        }
        // The text around the blocks has another encoding, or the file is damaged.
        Err(error) => return Err(error.into()),
    };
    let blocks = pem::blocks(text)?;
    if !blocks.is_empty() {
        return Ok(Form::Pem(blocks));
    }
    let ssh = ["ssh-", "---- BEGIN SSH2", "ecdsa-"].iter().any(|start| text.trim_start().starts_with(start));
    Ok(Form::Bytes(match Found::of_bytes(bytes) {
        _ if ssh => Found::SshPublicKey,
        // A small DER file can be valid text by chance.
        Found::Unknown => Found::Text,
        found => found,
    }))
}

fn contains(bytes: &[u8], pattern: &[u8]) -> bool {
    memchr::memmem::find(bytes, pattern).is_some()
}

/// Identifies a text that lacks the expected block, by its first block.
fn first(blocks: &[Block<'_>]) -> Found {
    blocks.first().map_or(Found::Text, |block| Found::of_label(block.label))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::ber::tlv;
    use crate::certificate::KeyUsage;
    use crate::certificate::build::{DistinguishedName, Template};
    use crate::pkcs7::certificates_only;
    use crate::rsa_key::testing::key;

    fn certificate_of(at: usize) -> Certificate {
        let template = Template {
            subject: DistinguishedName::new(format!("certificate {at}")),
            issuer_der: None,
            key: key(at).public().clone(),
            serial: [1; 16],
            not_before: 0,
            not_after: 1,
            key_usage: KeyUsage::default(),
            extended_key_usages: Vec::new(),
            ca: None,
            subject_key_id: None,
            authority_key_id: None,
            dns_names: Vec::new(),
        };
        Certificate::parse(&template.to_be_signed().unwrap().sign_with(key(at)).unwrap()).unwrap()
    }

    fn with_mark(text: &str) -> Vec<u8> {
        [b"\xef\xbb\xbf", text.replace('\n', "\r\n").as_bytes()].concat()
    }

    fn utf16(text: &str) -> Vec<u8> {
        [0xfeff].into_iter().chain(text.encode_utf16()).flat_map(u16::to_le_bytes).collect()
    }

    #[test]
    fn a_bundle_is_read_whole_or_refused() {
        let [one, two] = [0, 1].map(certificate_of);
        let both = [one.der(), two.der()];
        let text = one.to_pem() + &two.to_pem();
        let found = |bytes: &[u8]| certificates(bytes).unwrap().into_iter().map(|entry| entry.der).collect::<Vec<_>>();
        assert_eq!(found(text.as_bytes()), both);
        assert_eq!(found(&with_mark(&text)), both, "the mark does not hide the first one");
        let key_too = format!("{}{text}", *key(0).to_pkcs8_pem());
        assert_eq!(found(key_too.as_bytes()), both);
        assert_eq!(found(one.der()), [one.der()]);
        let mut sorted = both;
        sorted.sort_unstable();
        let p7b = certificates_only(&both);
        assert_eq!(found(&p7b), sorted);
        assert_eq!(found(pem::encode("PKCS7", &p7b).as_bytes()), sorted);
        let places: Vec<_> = certificates(text.as_bytes()).unwrap().into_iter().map(|entry| entry.place).collect();
        assert!(places[0] == "certificate 1 of 2 (line 1)" && places[1].starts_with("certificate 2 of 2 (line "));
        assert_eq!(certificates(&utf16(&text)), Err(InputError::Text(TextError::Utf16)));
        let damaged = text.replacen("-----BEGIN", "----BEGIN", 1);
        assert!(matches!(certificates(damaged.as_bytes()), Err(InputError::Pem(PemError::NoBegin { .. }))));
        assert_eq!(
            certificate(text.as_bytes()).unwrap_err(),
            InputError::Several { count: 2, wanted: Wanted::Certificate }
        );
        assert_eq!(certificate(&with_mark(&one.to_pem())).unwrap(), one);
    }

    #[test]
    fn every_form_of_a_public_key_is_read() {
        let (own, certificate) = (key(0).public(), certificate_of(0));
        let pkcs1 = Element::parse(own.spki_der()).unwrap().children().unwrap()[1].content[1..].to_vec();
        for bytes in [
            own.spki_der().to_vec(),
            own.to_pem().into_bytes(),
            with_mark(&own.to_pem()),
            own.to_bcrypt_blob(),
            pkcs1.clone(),
            pem::encode("RSA PUBLIC KEY", &pkcs1).as_bytes().to_vec(),
            certificate.der().to_vec(),
            with_mark(&certificate.to_pem()),
            certificates_only(&[certificate.der()]),
        ] {
            assert_eq!(&public_key(&bytes).unwrap(), own);
        }
        let small = tlv(0x30, &[&tlv(2, &[&[0x55; 100]]), &tlv(2, &[&[1, 0, 1]])]);
        assert_eq!(public_key(&small), Err(InputError::Key(KeyError::ModulusSize(799))));
    }

    #[test]
    fn what_is_something_else_is_named_with_what_to_do() {
        let secret = key(0);
        let (pem, der) = (secret.to_pkcs8_pem(), secret.to_pkcs8_der());
        let inner = Element::parse(der).unwrap().children().unwrap()[2].content.to_vec();
        let request = "-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n";
        let ssh = "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABgQ host\n";
        for (bytes, words) in [
            (pem.as_bytes(), "-pubout"),
            (der, "it is a private key, and a public key or certificate is needed"),
            (&inner, "-pubout"),
            (request.as_bytes(), "it is a certificate request"),
            (ssh.as_bytes(), "ssh-keygen -e -m PKCS8"),
            (&utf16(&secret.public().to_pem()), "UTF-16"),
            (b"\xfe\xed\xfe\xed\0\0\0\x02", "Java keystore"),
            (&tlv(0x30, &[&[2, 1, 3], &tlv(0x30, &[&[6, 1, 1]])]), "PFX (PKCS#12)"),
            (b"MIIBIjANBgkqhkiG9w0", "text without a PEM block"),
            (b"  \n", "it is empty"),
            (b"\x01\x02\x80", "neither PEM nor DER"),
        ] {
            let said = public_key(bytes).unwrap_err().to_string();
            assert!(said.contains(words), "{said}\nlacks\n{words}");
        }
        let sealed = pem::encode("ENCRYPTED PRIVATE KEY", b"x");
        let old = pem.replace("-----\nM", "-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: DES-EDE3-CBC,00\n\nM");
        let pkcs1 = pem::encode("RSA PRIVATE KEY", &inner);
        let certificate = certificate_of(0).to_pem();
        for (text, words) in [
            (&*sealed, "encrypted under a passphrase"),
            (&old, "openssl pkey -in FILE"),
            (&pkcs1, "openssl pkcs8 -topk8"),
            (&certificate, "it is a certificate, and a private key is needed"),
            (&format!("{}{}", *pem, *pem), "it holds 2"),
        ] {
            let said = rsa_private_key(text.as_bytes()).err().unwrap().to_string();
            assert!(said.contains(words), "{said}\nlacks\n{words}");
        }
        assert_eq!(rsa_private_key(&with_mark(&pem)).unwrap().public(), secret.public());
        assert_eq!(private_key(pkcs1.as_bytes()).unwrap().found, Found::Pkcs1PrivateKey);
    }
}
