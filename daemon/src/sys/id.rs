//! Request ids.

use ring::rand::{SecureRandom, SystemRandom};

/// Creates a request id: 16 hexadecimal digits, which appear in the log, the audit trail and the reply's header.
#[must_use]
pub fn request_id() -> String {
    let mut octets = [0; 8];
    // Without randomness nothing else works; an id of zeros does no harm then.
    let _ = SystemRandom::new().fill(&mut octets);
    data_encoding::HEXLOWER.encode(&octets)
}
