//! The algorithms of the protocol and the URIs that name them (protocol page, section 2.3).

use crate::error::{Code, Refusal};

const RSA_PKCS1_256: &str = "http://www.w3.org/2001/04/xmldsig-more#rsa-sha256";
const RSA_PKCS1_384: &str = "http://www.w3.org/2001/04/xmldsig-more#rsa-sha384";
const RSA_PKCS1_512: &str = "http://www.w3.org/2001/04/xmldsig-more#rsa-sha512";
const RSA_PSS_256: &str = "http://www.w3.org/2007/05/xmldsig-more#sha256-rsa-MGF1";
const RSA_PSS_384: &str = "http://www.w3.org/2007/05/xmldsig-more#sha384-rsa-MGF1";
const RSA_PSS_512: &str = "http://www.w3.org/2007/05/xmldsig-more#sha512-rsa-MGF1";
/// RSA-OAEP with SHA-1 and MGF1-SHA-1 (XML Encryption 1.0).
pub const OAEP_MGF1P: &str = "http://www.w3.org/2001/04/xmlenc#rsa-oaep-mgf1p";
/// RSA-OAEP with selectable digests (XML Encryption 1.1).
pub const OAEP_11: &str = "http://www.w3.org/2009/xmlenc11#rsa-oaep";
const AES256_GCM: &str = "http://www.w3.org/2009/xmlenc11#aes256-gcm";
const AES128_GCM: &str = "http://www.w3.org/2009/xmlenc11#aes128-gcm";
const KW_AES256: &str = "http://www.w3.org/2001/04/xmlenc#kw-aes256";
/// HKDF (RFC 5869) for key derivation.
pub const HKDF: &str = "http://www.w3.org/2021/04/xmldsig-more#hkdf";
/// HMAC-SHA-256: for the transport-key signature, and inside HKDF.
pub const HMAC_SHA256: &str = "http://www.w3.org/2001/04/xmldsig-more#hmac-sha256";

/// Longest part of an unsupported URI that a refusal quotes, in characters.
const MAX_NAMED: usize = 500;

/// The refusal of an unsupported algorithm. The message quotes the URI.
pub(crate) fn unsupported(uri: &str) -> Refusal {
    // A URI can be as long as the document, so the quotation is limited.
    let named: String = uri.chars().take(MAX_NAMED).collect();
    Refusal::new(Code::UnsupportedAlgorithm, format!("the algorithm {named} is not supported here"))
}

/// A hash function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Digest {
    /// SHA-1 (in OAEP only).
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl Digest {
    /// All digests, for tables and tests.
    pub const ALL: [Self; 4] = [Self::Sha1, Self::Sha256, Self::Sha384, Self::Sha512];

    /// The URI of `ds:DigestMethod`.
    #[must_use]
    pub fn uri(self) -> &'static str {
        match self {
            Self::Sha1 => "http://www.w3.org/2000/09/xmldsig#sha1",
            Self::Sha256 => "http://www.w3.org/2001/04/xmlenc#sha256",
            Self::Sha384 => "http://www.w3.org/2001/04/xmldsig-more#sha384",
            Self::Sha512 => "http://www.w3.org/2001/04/xmlenc#sha512",
        }
    }

    /// The URI of `xenc11:MGF`.
    #[must_use]
    pub fn mgf_uri(self) -> &'static str {
        match self {
            Self::Sha1 => "http://www.w3.org/2009/xmlenc11#mgf1sha1",
            Self::Sha256 => "http://www.w3.org/2009/xmlenc11#mgf1sha256",
            Self::Sha384 => "http://www.w3.org/2009/xmlenc11#mgf1sha384",
            Self::Sha512 => "http://www.w3.org/2009/xmlenc11#mgf1sha512",
        }
    }

    pub(crate) fn from_uri(uri: &str) -> Result<Self, Refusal> {
        Self::ALL.into_iter().find(|d| d.uri() == uri).ok_or_else(|| unsupported(uri))
    }

    pub(crate) fn from_mgf_uri(uri: &str) -> Result<Self, Refusal> {
        Self::ALL.into_iter().find(|d| d.mgf_uri() == uri).ok_or_else(|| unsupported(uri))
    }
}

/// A digest that signatures may use.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SignatureDigest {
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

/// An RSA signature algorithm.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SignatureAlgorithm {
    /// RSASSA-PKCS1-v1_5.
    Pkcs1(SignatureDigest),
    /// RSASSA-PSS: MGF1 with the same digest; the salt has the digest's length.
    Pss(SignatureDigest),
}

impl SignatureAlgorithm {
    /// The algorithm of this service's signatures.
    pub const DEFAULT: Self = Self::Pkcs1(SignatureDigest::Sha256);

    /// All algorithms, for tables and tests.
    pub const ALL: [Self; 6] = [
        Self::Pkcs1(SignatureDigest::Sha256),
        Self::Pkcs1(SignatureDigest::Sha384),
        Self::Pkcs1(SignatureDigest::Sha512),
        Self::Pss(SignatureDigest::Sha256),
        Self::Pss(SignatureDigest::Sha384),
        Self::Pss(SignatureDigest::Sha512),
    ];

    /// The algorithm's URI.
    #[must_use]
    pub fn uri(self) -> &'static str {
        match self {
            Self::Pkcs1(SignatureDigest::Sha256) => RSA_PKCS1_256,
            Self::Pkcs1(SignatureDigest::Sha384) => RSA_PKCS1_384,
            Self::Pkcs1(SignatureDigest::Sha512) => RSA_PKCS1_512,
            Self::Pss(SignatureDigest::Sha256) => RSA_PSS_256,
            Self::Pss(SignatureDigest::Sha384) => RSA_PSS_384,
            Self::Pss(SignatureDigest::Sha512) => RSA_PSS_512,
        }
    }

    pub(crate) fn from_uri(uri: &str) -> Result<Self, Refusal> {
        Self::ALL.into_iter().find(|a| a.uri() == uri).ok_or_else(|| unsupported(uri))
    }
}

/// The two digests of RSA-OAEP; the label is empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Oaep {
    /// Digest of the label.
    pub digest: Digest,
    /// Digest of MGF1.
    pub mgf: Digest,
}

impl Oaep {
    /// SHA-1 with MGF1-SHA-1.
    pub const SHA1: Self = Self { digest: Digest::Sha1, mgf: Digest::Sha1 };
    /// SHA-256 with MGF1-SHA-256.
    pub const SHA256: Self = Self { digest: Digest::Sha256, mgf: Digest::Sha256 };

    /// All parameters that a protector may name.
    pub fn all() -> impl Iterator<Item = Self> {
        Digest::ALL.into_iter().flat_map(|digest| Digest::ALL.into_iter().map(move |mgf| Self { digest, mgf }))
    }

    /// The algorithm of a request's URI, which has no parameters.
    ///
    /// # Errors
    /// `UnsupportedAlgorithmException`.
    pub(crate) fn from_request_uri(uri: &str) -> Result<Self, Refusal> {
        match uri {
            OAEP_MGF1P => Ok(Self::SHA1),
            OAEP_11 => Ok(Self::SHA256),
            _ => Err(unsupported(uri)),
        }
    }
}

/// Encrypts the transport keys with the wrapping key: AES-GCM. The bytes are IV (12) ‖ ciphertext ‖ tag (16).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Sealing {
    /// AES-128-GCM.
    Aes128Gcm,
    /// AES-256-GCM.
    Aes256Gcm,
}

impl Sealing {
    /// The algorithm's URI.
    #[must_use]
    pub fn uri(self) -> &'static str {
        match self {
            Self::Aes128Gcm => AES128_GCM,
            Self::Aes256Gcm => AES256_GCM,
        }
    }

    /// Length of the key, in bytes.
    #[must_use]
    pub(crate) fn key_len(self) -> usize {
        match self {
            Self::Aes128Gcm => 16,
            Self::Aes256Gcm => 32,
        }
    }

    /// The algorithm that `uri` names.
    ///
    /// # Errors
    /// `UnsupportedAlgorithmException`.
    pub(crate) fn from_uri(uri: &str) -> Result<Self, Refusal> {
        match uri {
            AES128_GCM => Ok(Self::Aes128Gcm),
            AES256_GCM => Ok(Self::Aes256Gcm),
            _ => Err(unsupported(uri)),
        }
    }
}

/// Encrypts the wrapping key with the transfer key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum KeyWrapping {
    /// AES-GCM.
    Seal(Sealing),
    /// AES-256 key wrap (RFC 3394).
    Aes256Kw,
}

impl KeyWrapping {
    /// The algorithm's URI.
    #[must_use]
    pub fn uri(self) -> &'static str {
        match self {
            Self::Seal(sealing) => sealing.uri(),
            Self::Aes256Kw => KW_AES256,
        }
    }

    /// Length of the key, in bytes.
    #[must_use]
    pub(crate) fn key_len(self) -> usize {
        match self {
            Self::Seal(sealing) => sealing.key_len(),
            Self::Aes256Kw => 32,
        }
    }

    /// The algorithm that `uri` names.
    ///
    /// # Errors
    /// `UnsupportedAlgorithmException`.
    pub(crate) fn from_uri(uri: &str) -> Result<Self, Refusal> {
        if uri == KW_AES256 { Ok(Self::Aes256Kw) } else { Sealing::from_uri(uri).map(Self::Seal) }
    }
}

/// The three algorithms that a host requests.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HostAlgorithms {
    /// Encrypts the transfer key to the health certificate's key. The URI implies the digests.
    pub transfer: Oaep,
    /// Encrypts the wrapping key with the transfer key.
    pub wrapping: KeyWrapping,
    /// Encrypts the transport keys with the wrapping key.
    pub transport: Sealing,
}
