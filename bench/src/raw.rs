//! The raw token: a bare PKCS#11 loop of pairs, each a decryption and a signature as in a release.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use claviger::config::Config;
use claviger::run::members::member;
use claviger_hsm::{Hash, KeyRef, MemberConfig, Oaep, RawSession, SignScheme};
use claviger_protocol::algorithm;
use claviger_protocol::rsa_key::RsaPublicKey;
use hdrhistogram::Histogram;

use crate::histogram::{nanoseconds, record};

/// The encryption of transport keys in protectors by owners.
pub const OAEP: Oaep = Oaep { hash: Hash::Sha1, mgf: Hash::Sha1 };
/// The signature scheme of protectors.
pub const SCHEME: SignScheme = SignScheme::Pkcs1(Hash::Sha256);

/// The input of the loop.
#[derive(Clone)]
pub struct Work {
    /// The members, configured as for the daemon.
    pub members: Vec<MemberConfig>,
    /// The decryption key.
    pub encryption: KeyRef,
    /// The signing key.
    pub signing: KeyRef,
    /// A ciphertext of 32 bytes for the decryption key.
    pub ciphertext: Vec<u8>,
}

/// The results of a round.
pub struct Round {
    /// Pairs per second of all sessions together.
    pub per_second: f64,
    /// Time of a pair, in nanoseconds.
    pub pairs: Histogram<u64>,
    /// Time of a decryption alone.
    pub decrypts: Histogram<u64>,
    /// Time of a signature alone.
    pub signs: Histogram<u64>,
}

impl Work {
    /// Takes the members of a configuration, with the ids and the public key.
    #[must_use]
    pub fn new(config: &Config, encryption: KeyRef, public: &RsaPublicKey, signing: KeyRef) -> Self {
        let members = config.hsm.iter().map(|hsm| member(&config.env, hsm, 1).unwrap()).collect();
        let ciphertext = public.encrypt_oaep(algorithm::Oaep::SHA1, &[0x5a; 32]).unwrap();
        Self { members, encryption, signing, ciphertext }
    }

    /// The same on the first member alone.
    #[must_use]
    pub fn only_first(&self) -> Self {
        let mut work = self.clone();
        work.members.truncate(1);
        work
    }

    /// Makes pairs on `sessions` sessions of each member for `time`, after a short start.
    #[must_use]
    pub fn round(&self, sessions: usize, time: Duration) -> Round {
        let (counting, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let threads: Vec<_> = (0..sessions)
            .flat_map(|_| &self.members)
            .map(|member| {
                let session = RawSession::open(member).unwrap();
                let (work, counting, stop) = (self.clone(), counting.clone(), stop.clone());
                std::thread::spawn(move || work.pairs(&session, &counting, &stop))
            })
            .collect();
        std::thread::sleep(crate::service::RAMP);
        let begun = Instant::now();
        counting.store(true, Ordering::Relaxed);
        std::thread::sleep(time);
        stop.store(true, Ordering::Relaxed);
        let took = begun.elapsed();
        let mut sum = Round { per_second: 0.0, pairs: nanoseconds(), decrypts: nanoseconds(), signs: nanoseconds() };
        for thread in threads {
            let (pairs, decrypts, signs) = thread.join().unwrap();
            sum.pairs.add(pairs).unwrap();
            sum.decrypts.add(decrypts).unwrap();
            sum.signs.add(signs).unwrap();
        }
        sum.per_second = sum.pairs.len() as f64 / took.as_secs_f64();
        sum
    }

    fn pairs(
        &self,
        session: &RawSession,
        counting: &AtomicBool,
        stop: &AtomicBool,
    ) -> (Histogram<u64>, Histogram<u64>, Histogram<u64>) {
        let (mut pairs, mut decrypts, mut signs) = (nanoseconds(), nanoseconds(), nanoseconds());
        while !stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            let plaintext = session.decrypt(&self.encryption, OAEP, &self.ciphertext).unwrap();
            let decrypted = begun.elapsed();
            let signature = session.sign(&self.signing, SCHEME, &plaintext).unwrap();
            let both = begun.elapsed();
            assert!(plaintext.len() == 32 && !signature.is_empty(), "the token gives nonsense");
            // Pairs that began before the round or ended after it are not counted.
            if counting.load(Ordering::Relaxed) && !stop.load(Ordering::Relaxed) {
                record(&mut pairs, both);
                record(&mut decrypts, decrypted);
                record(&mut signs, both - decrypted);
            }
        }
        (pairs, decrypts, signs)
    }
}
