//! The records that are stored, as plain values. The rules that they obey are in the module of each kind.

use std::fmt;
use std::sync::Arc;

use claviger_protocol::tpm::pcr::PcrValues;
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};

use super::error::StateError;
use super::labels::Labels;

/// What a host attests with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostKind {
    /// A key of its own, in host-key mode.
    #[default]
    HostKey,
    /// The endorsement key of its TPM, in TPM mode. A host key never passes for one: its owner could sign anything.
    EndorsementKey,
}

impl HostKind {
    /// Its name in the state and for people.
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

/// A host that may attest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its name, unique without regard to case, as it was given.
    pub name: String,
    /// What it attests with.
    pub kind: HostKind,
    /// The public half of that key: DER SubjectPublicKeyInfo, unique.
    pub spki: Vec<u8>,
    /// SHA-256 of [`Host::spki`], 64 lower-case hexadecimal digits.
    pub spki_sha256: String,
    /// Whether it may attest and be given keys.
    pub enabled: bool,
    /// When it was added, seconds since 1970.
    pub added: i64,
    /// What is said of it; certificates may be limited to hosts of some labels.
    pub labels: Labels,
}

/// PCR values that hosts may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Baseline {
    /// Its name, unique without regard to case, as it was given.
    pub name: String,
    /// The values: at least those of PCRs 0, 4 and 7.
    pub values: PcrValues,
    /// The event log of the host that they were taken from.
    pub log: Option<Vec<u8>>,
    /// Whether hosts with these values are healthy.
    pub enabled: bool,
    /// When it was added, seconds since 1970. Health certificates from before do not mean this one.
    pub added: i64,
}

/// A baseline as [`Contents`] has it: logs may be large, and stay in the store.
#[derive(Clone, Debug)]
pub(super) struct KeptBaseline {
    /// Without its log.
    pub(super) baseline: Baseline,
    pub(super) log: KeptLog,
}

/// Where the log of a baseline is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum KeptLog {
    /// It has none.
    Absent,
    /// In the store.
    Stored,
    /// It is to be stored with the baseline.
    New(Arc<[u8]>),
}

impl From<Baseline> for KeptBaseline {
    fn from(mut baseline: Baseline) -> Self {
        let log = baseline.log.take().map_or(KeptLog::Absent, |log| KeptLog::New(log.into()));
        Self { baseline, log }
    }
}

/// What a key-protection certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It signs protectors.
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
    /// SHA-256 of [`Certificate::der`], 64 lower-case hexadecimal digits; names the certificate in commands.
    pub thumbprint: String,
    /// What it is for.
    pub kind: Kind,
    /// The certificate, DER.
    pub der: Vec<u8>,
    /// CKA_ID of its private key on every member.
    pub key_id: Vec<u8>,
    /// Its public key, DER SubjectPublicKeyInfo.
    pub spki: Vec<u8>,
    /// Whether new protectors use it; at most one of a kind is primary, and it is enabled.
    pub is_primary: bool,
    /// Whether protectors that name it are still served.
    pub enabled: bool,
    /// When it was added, seconds since 1970.
    pub added: i64,
    /// Whether it signs the metadata document, in place of the primary signing certificate; at most one does.
    pub is_communications: bool,
    /// A host needs all of these to be given what its key opens. The same for all certificates of a key.
    pub labels: Labels,
}

/// A key-protection certificate that is to be added, enabled.
#[derive(Clone, Copy, Debug)]
pub struct NewCertificate<'a> {
    /// What it is for.
    pub kind: Kind,
    /// The certificate, DER.
    pub der: &'a [u8],
    /// CKA_ID of its private key on every member.
    pub key_id: &'a [u8],
    /// Its public key, DER SubjectPublicKeyInfo.
    pub spki: &'a [u8],
    /// Whether it becomes the primary one of its kind, in place of the one that is.
    pub primary: bool,
}

/// A certificate that issues health certificates, or did.
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
    /// Whether it issues now; exactly one does once there is any.
    pub current: bool,
    /// When another one took its place, seconds since 1970; `None` for the current one.
    pub replaced: Option<i64>,
}

/// A certificate whose health certificates are refused, though they are in date.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevokedSigner {
    /// SHA-256 of its DER, 64 lower-case hexadecimal digits.
    pub thumbprint: String,
    /// SHA-256 of its public key (DER SubjectPublicKeyInfo), 64 lower-case hexadecimal digits: other certificates of that key
    /// are revoked, too.
    pub spki_sha256: String,
    /// End of its validity, seconds since 1970.
    pub not_after: i64,
    /// When it was revoked, seconds since 1970.
    pub revoked: i64,
}

/// A certificate that is to issue health certificates from now on.
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
