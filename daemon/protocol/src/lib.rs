//! The wire protocol of Claviger: [MS-KPS] (key protection) and [MS-HGSA] (attestation).
//!
//! All functions are pure: they take bytes, keys and the time, and return values. There is no I/O, no clock and no HSM,
//! so each step of a release can be tested alone. The steps of a release, in order:
//!
//! | step | module |
//! |---|---|
//! | read the request and its algorithms | [`request`], [`batch`], [`algorithm`] |
//! | judge the health certificate | [`health`] |
//! | read the protector and its canonical bytes | [`protector`], [`xml`], [`c14n`] |
//! | check signatures and the chain of wrappings | [`verify`] |
//! | read a protector whose wrapping set is known | [`wrapping_set`] |
//! | make the egress protector | [`build`] |
//! | encrypt both keys to the host | [`payload`] |
//!
//! [`input`] reads files from administrators, with [`pem`] and [`ber`]. [`owner`] holds the tenant's operations.
//! [`metadata`] is the document from which a tenant builds a guardian's wrapping. [`describe`] describes a protector
//! for people. [`attestation`] is the exchange in which a host gets its health certificate, and [`tpm`] the part of it
//! that uses the host's TPM. [`error`] defines refusals.
#![forbid(unsafe_code)]

pub mod algorithm;
pub mod attestation;
pub mod batch;
pub mod ber;
pub mod build;
pub mod c14n;
pub mod certificate;
pub mod describe;
mod encoding;
pub mod error;
mod hash;
pub mod health;
pub mod input;
mod key_file;
pub mod metadata;
mod oaep;
pub mod owner;
pub mod payload;
pub mod pem;
pub mod pkcs7;
mod plain;
pub mod protector;
mod random;
mod recent;
pub mod request;
pub mod rsa_key;
mod skeleton;
pub mod tpm;
mod transport_key;
pub mod verify;
pub mod work;
pub mod wrapping_set;
pub mod xml;
