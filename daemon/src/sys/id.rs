//! Ids of requests.

use ring::rand::{SecureRandom, SystemRandom};

/// A request's id: 16 hexadecimal digits, as in the log, the audit trail and the answer's header.
#[must_use]
pub fn request_id() -> String {
    let mut octets = [0; 8];
    // Without randomness nothing else works either; an id of zeros does no harm.
    let _ = SystemRandom::new().fill(&mut octets);
    data_encoding::HEXLOWER.encode(&octets)
}
