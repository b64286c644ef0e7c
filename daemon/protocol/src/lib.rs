//! The wire protocol of Claviger: [MS-KPS] (key protection) and [MS-HGSA] (attestation).
//!
//! Everything here is pure: octets, keys and the time go in, values come out. There is no I/O, no clock and no HSM, so
//! that every step of a release can be tested by itself. The steps, in the order a release takes them:
//!
//! | step | module |
//! |---|---|
//! | read the request and its algorithms | [`request`], [`batch`], [`algorithm`] |
//! | judge the health certificate | [`health`] |
//! | read the protector, canonical octets included | [`protector`], [`xml`], [`c14n`] |
//! | check signatures and the chain of wrappings | [`verify`] |
//! | the same for a protector whose wrappings are known | [`wrapping_set`] |
//! | make the egress protector | [`build`] |
//! | encrypt both keys to the host | [`payload`] |
//!
//! [`input`] reads the files that administrators hand over, with [`pem`] and [`ber`]. [`owner`] is the tenant's side, [`metadata`] what a tenant builds a guardian's wrapping from, [`describe`] what people
//! are told of a protector, [`attestation`] how a host gets its health certificate, [`tpm`] what its TPM adds to that, and [`error`] what a refusal looks
//! like.
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
