//! The input of the protocol benches: a tenant's protector as a host sends it, made in software.

use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_tests::{Daemon, Lab, Options, block, roll_request};

/// A request with a protector for an owner and one guardian, and its parts.
pub struct Parts {
    /// The body of the request.
    pub request: Vec<u8>,
    /// The protector in it.
    pub protector: Vec<u8>,
    /// The owner's signing key.
    pub owner_key: RsaPrivateKey,
}

impl Parts {
    /// From a lab whose daemon runs until the host has attested.
    ///
    /// # Panics
    /// The lab cannot be created.
    #[must_use]
    pub fn new() -> Self {
        let (daemon, lab): (Daemon, Lab) = Lab::start(Options::default());
        let health = block(lab.host(daemon.client()).attest()).unwrap();
        let protector = lab.protector();
        Self { request: roll_request(&health, &protector), protector, owner_key: lab.owner().signing_key }
    }
}

impl Default for Parts {
    fn default() -> Self {
        Self::new()
    }
}
