//! The stored records as plain values. The module of each kind has its rules.

use std::fmt;
use std::sync::Arc;

use claviger_protocol::tpm::pcr::PcrValues;
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};

use super::error::StateError;
use super::labels::Labels;

/// The kind of key with which a host attests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostKind {
    /// A host key, in host-key mode.
    #[default]
    HostKey,
    /// The endorsement key of its TPM, in TPM mode. A host key must never be accepted as one, because its owner could
    /// sign anything.
    EndorsementKey,
}

impl HostKind {
    /// The kind's name in the state and in output.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::HostKey => "host-key",
            Self::EndorsementKey => "endorsement-key",
        }
    }
}

impl fmt::Display for HostKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A registered host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Name as given; unique, ignoring case.
    pub name: String,
    /// Kind of its key.
    pub kind: HostKind,
    /// Its public key: DER SubjectPublicKeyInfo, unique.
    pub spki: Vec<u8>,
    /// SHA-256 of [`Host::spki`], 64 lower-case hexadecimal digits.
    pub spki_sha256: String,
    /// Whether it may attest and get keys.
    pub enabled: bool,
    /// Time of its registration, seconds since 1970.
    pub added: i64,
    /// Its labels, to which keys can be restricted.
    pub labels: Labels,
}

/// Accepted PCR values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Baseline {
    /// Name as given; unique, ignoring case.
    pub name: String,
    /// The PCR values; at least those of PCRs 0, 4 and 7.
    pub values: PcrValues,
    /// The event log of the host from which the values were taken.
    pub log: Option<Vec<u8>>,
    /// Whether hosts with these values are accepted.
    pub enabled: bool,
    /// Time at which it was added, seconds since 1970. Earlier health certificates do not belong to this baseline.
    pub added: i64,
}

/// A baseline that was removed. Health certificates that name it may still be in use, so its name is reserved for a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RemovedBaseline {
    /// Its name as given.
    pub(super) name: String,
    /// Its PCR values. A baseline with the same values may have its name at once.
    pub(super) values: PcrValues,
    /// Time at which it was added, seconds since 1970.
    pub(super) added: i64,
    /// Time of its removal, seconds since 1970.
    pub(super) removed: i64,
    /// Earliest time at which a baseline with other values may have its name, by the store in which it was removed.
    pub(super) reserved_until: i64,
}

/// A baseline in [`Contents`]. Logs may be large, so they stay in the store.
#[derive(Clone, Debug)]
pub(super) struct KeptBaseline {
    /// Without its log.
    pub(super) baseline: Baseline,
    pub(super) log: KeptLog,
}

/// Location of a baseline's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum KeptLog {
    /// There is no log.
    Absent,
    /// The log is in the store.
    Stored,
    /// The log will be stored with the baseline.
    New(Arc<[u8]>),
}

impl From<Baseline> for KeptBaseline {
    fn from(mut baseline: Baseline) -> Self {
        let log = baseline.log.take().map_or(KeptLog::Absent, |log| KeptLog::New(log.into()));
        Self { baseline, log }
    }
}

/// The purpose of a key-protection certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Signs protectors.
    Signing,
    /// Transport keys are encrypted to it.
    Encryption,
}

impl Kind {
    /// `signing` or `encryption`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Signing => "signing",
            Self::Encryption => "encryption",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Kind {
    type Err = StateError;

    fn from_str(text: &str) -> Result<Self, StateError> {
        match text {
            "signing" => Ok(Self::Signing),
            "encryption" => Ok(Self::Encryption),
            _ => Err(StateError::Invalid(format!(
                "{text:?} is no kind of certificate; use \"signing\" or \"encryption\""
            ))),
        }
    }
}

/// A key-protection certificate whose private key is in the HSMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// SHA-256 of [`Certificate::der`], 64 lower-case hexadecimal digits; identifies the certificate in commands.
    pub thumbprint: String,
    /// Its purpose.
    pub kind: Kind,
    /// The certificate, DER.
    pub der: Vec<u8>,
    /// CKA_ID of its private key on every member.
    pub key_id: Vec<u8>,
    /// Its public key, DER SubjectPublicKeyInfo.
    pub spki: Vec<u8>,
    /// Whether new protectors use it. At most one certificate of a kind is primary, and it is enabled.
    pub is_primary: bool,
    /// Whether protectors with this certificate are served.
    pub enabled: bool,
    /// Time at which it was added, seconds since 1970.
    pub added: i64,
    /// Whether it signs the metadata document in place of the primary signing certificate; at most one does.
    pub is_communications: bool,
    /// The labels that a host needs for its key. The same for all certificates of a key.
    pub labels: Labels,
}

/// A key-protection certificate to add, enabled.
#[derive(Clone, Copy, Debug)]
pub struct NewCertificate<'a> {
    /// Its purpose.
    pub kind: Kind,
    /// The certificate, DER.
    pub der: &'a [u8],
    /// CKA_ID of its private key on every member.
    pub key_id: &'a [u8],
    /// Its public key, DER SubjectPublicKeyInfo.
    pub spki: &'a [u8],
    /// Whether it becomes the primary certificate of its kind.
    pub primary: bool,
}

/// A certificate that issues, or has issued, health certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signer {
    /// SHA-256 of [`Signer::der`], 64 lower-case hexadecimal digits.
    pub thumbprint: String,
    /// The certificate, DER.
    pub der: Vec<u8>,
    /// CKA_ID of its private key on every member.
    pub key_id: Vec<u8>,
    /// Start of its validity, seconds since 1970.
    pub not_before: i64,
    /// End of its validity, seconds since 1970.
    pub not_after: i64,
    /// Whether it is the current signer. There is exactly one once a signer exists.
    pub current: bool,
    /// Time at which another signer replaced it, seconds since 1970; `None` for the current one.
    pub replaced: Option<i64>,
}

/// A signer whose unexpired health certificates are rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevokedSigner {
    /// SHA-256 of its DER, 64 lower-case hexadecimal digits.
    pub thumbprint: String,
    /// SHA-256 of its public key (DER SubjectPublicKeyInfo), 64 lower-case hexadecimal digits. Other certificates of
    /// this key are revoked as well.
    pub spki_sha256: String,
    /// End of its validity, seconds since 1970.
    pub not_after: i64,
    /// Time of the revocation, seconds since 1970.
    pub revoked: i64,
}

/// The new current signer.
#[derive(Clone, Copy, Debug)]
pub struct NewSigner<'a> {
    /// The certificate, DER.
    pub der: &'a [u8],
    /// CKA_ID of its private key on every member.
    pub key_id: &'a [u8],
    /// Start of its validity, seconds since 1970.
    pub not_before: i64,
    /// End of its validity, seconds since 1970.
    pub not_after: i64,
}

/// A thumbprint: SHA-256, 64 lower-case hexadecimal digits.
pub(super) fn sha256_hex(bytes: &[u8]) -> String {
    HEXLOWER.encode(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref())
}
