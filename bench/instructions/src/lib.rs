//! The inputs of the counts, which are the same in every run and on every machine.
//!
//! `benches/release.rs` runs each part of a release, and complete ones, under valgrind. `fixture.json` contains an
//! owner, a guardian, a host, and a protector of the owner for the guardian. Its private keys are used only here.
//! `examples/fixture.rs` creates another fixture.
#![forbid(unsafe_code)]

use claviger_protocol::certificate::{Certificate, CertificateError};
use claviger_protocol::owner::Owner;
use claviger_protocol::protector::{TransportKey, transport_key};
use claviger_protocol::rsa_key::{KeyError, RsaPrivateKey};
use data_encoding::BASE64;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

const FILE: &str = include_str!("../fixture.json");

/// Bytes, in Base64 in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64.decode(text.as_bytes()).map(Self).map_err(serde::de::Error::custom)
    }
}

/// A private key (PKCS#8) and a certificate of it (DER).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pair {
    /// The private key.
    pub key: Bytes,
    /// The certificate.
    pub certificate: Bytes,
}

/// The two pairs of an owner, or of a guardian.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pairs {
    /// The pair that signs.
    pub signing: Pair,
    /// The pair that decrypts.
    pub encryption: Pair,
}

/// The whole fixture.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fixture {
    /// The owner of the protector.
    pub owner: Pairs,
    /// The service.
    pub guardian: Pairs,
    /// The service's attestation signer.
    pub signer: Pair,
    /// The private key with which the host is registered.
    pub host: Bytes,
    /// The private key to which the host's transport keys are encrypted.
    pub identity: Bytes,
    /// The owner's protector for itself and the guardian.
    pub protector: Bytes,
    /// The transport key in it.
    pub transport_key: Bytes,
    /// A health certificate (DER) of the host.
    pub health_certificate: Bytes,
    /// Time of its issue, in seconds since 1970.
    pub issued: i64,
}

/// Why a fixture cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FixtureError {
    /// The file does not have the form of [`Fixture`].
    #[error("fixture.json: {0}")]
    Json(#[from] serde_json::Error),
    /// A private key is invalid.
    #[error("fixture.json: {0}")]
    Key(#[from] KeyError),
    /// A certificate is invalid.
    #[error("fixture.json: {0}")]
    Certificate(#[from] CertificateError),
}

impl Pairs {
    /// Takes the pairs of an owner or a guardian.
    #[must_use]
    pub fn of(owner: &Owner) -> Self {
        let pair = |key: &RsaPrivateKey, certificate: &Certificate| Pair {
            key: Bytes(key.to_pkcs8_der().to_vec()),
            certificate: Bytes(certificate.der().to_vec()),
        };
        Self {
            signing: pair(&owner.signing_key, &owner.signing_certificate),
            encryption: pair(&owner.encryption_key, &owner.encryption_certificate),
        }
    }

    /// The owner with these keys.
    ///
    /// # Errors
    /// A key or a certificate cannot be parsed.
    pub fn owner(&self) -> Result<Owner, FixtureError> {
        Ok(Owner {
            signing_key: RsaPrivateKey::from_pkcs8_der(&self.signing.key.0)?,
            signing_certificate: Certificate::parse(&self.signing.certificate.0)?,
            encryption_key: RsaPrivateKey::from_pkcs8_der(&self.encryption.key.0)?,
            encryption_certificate: Certificate::parse(&self.encryption.certificate.0)?,
        })
    }
}

impl Fixture {
    /// The fixture in `fixture.json` at build time.
    ///
    /// # Errors
    /// The file is invalid.
    pub fn read() -> Result<Self, FixtureError> {
        Ok(serde_json::from_str(FILE)?)
    }

    /// The transport key that the guardian decrypts from the protector.
    #[must_use]
    pub fn transport_key(&self) -> Option<TransportKey> {
        transport_key(&self.transport_key.0)
    }
}
