//! Attestation by TPM (protocol page, section 3.1): the structures that a host and this service exchange, and the
//! checks of them.
//!
//! The parsers are bounded: they check each length before use, never allocate by a number from a host, and never panic.
//! TPM structures are big-endian (TCG, TPM 2.0 Part 2); Contexts and event logs are little-endian.
//!
//! | what | module |
//! |---|---|
//! | the envelope of both steps | [`context`] |
//! | the attestation key, its name and its signature | [`public`], [`signature`] |
//! | the credential that only one TPM can recover | [`credential`] |
//! | the session data that the service seals and the host carries from step 1 to step 2 | [`state`] |
//! | the quote and the PCRs that it covers | [`quote`], [`pcr`] |
//! | the log of what was booted, and its replay | [`log`] |
//! | policies and baselines | [`policy`] |
//! | the differences between two boots | [`compare`] |
//! | step 2 as a whole | [`evidence`] |
//! | a software TPM for load generators and tests | [`software`] |

pub mod compare;
pub mod context;
pub mod credential;
pub mod evidence;
pub mod log;
pub mod pcr;
pub mod policy;
pub mod public;
pub mod quote;
mod reader;
pub mod signature;
pub mod software;
pub mod state;

/// `TPM_ALG_ID` values (TPM 2.0 Part 2, table 9).
pub(crate) mod algorithm {
    pub(crate) const RSA: u16 = 0x0001;
    pub(crate) const SHA1: u16 = 0x0004;
    pub(crate) const SHA256: u16 = 0x000b;
    pub(crate) const SHA384: u16 = 0x000c;
    pub(crate) const SHA512: u16 = 0x000d;
    pub(crate) const NULL: u16 = 0x0010;
    pub(crate) const SM3_256: u16 = 0x0012;
    pub(crate) const RSASSA: u16 = 0x0014;
    pub(crate) const ECDSA: u16 = 0x0018;
    pub(crate) const ECC: u16 = 0x0023;
}

/// `TPM_ECC_NIST_P256`.
pub(crate) const NIST_P256: u16 = 0x0003;

/// The bytes do not have the expected structure.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);
