//! The unit of own cost: an operation with an RSA-2048 public key.
//!
//! A release needs at least five of them, and on a slow or busy machine their time grows like that of the rest of the
//! daemon. So costs in this unit can be compared when costs in microseconds cannot.

use std::time::{Duration, Instant};

use claviger_protocol::rsa_key::{RsaPrivateKey, RsaPublicKey};
use claviger_tests::stats::median;

/// Operations that are timed together, so that reading the clock costs little in comparison.
const TOGETHER: u32 = 16;

/// A signature that is verified repeatedly with a prepared key, as in the daemon.
pub struct PublicOperation {
    key: RsaPublicKey,
    digest: [u8; 32],
    signature: Vec<u8>,
}

impl PublicOperation {
    /// Creates one with a fresh key.
    #[must_use]
    pub fn new() -> Self {
        let private = RsaPrivateKey::generate(2048).unwrap();
        let digest = [0x5a; 32];
        let signature = private.sign_digest(&digest).unwrap();
        Self { key: private.public().clone(), digest, signature }
    }

    /// The time of an operation in seconds: the median over `threads` threads that do nothing else for `time`.
    #[must_use]
    pub fn seconds(&self, threads: usize, time: Duration) -> f64 {
        let end = Instant::now() + time;
        let times: Vec<f64> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(|| self.until(end))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        median(&times)
    }

    fn until(&self, end: Instant) -> Vec<f64> {
        let mut times = Vec::new();
        loop {
            let begun = Instant::now();
            for _ in 0..TOGETHER {
                self.key.verify_digest(&self.digest, &self.signature).unwrap();
            }
            times.push((begun.elapsed() / TOGETHER).as_secs_f64());
            if Instant::now() >= end {
                return times;
            }
        }
    }
}

impl Default for PublicOperation {
    fn default() -> Self {
        Self::new()
    }
}
