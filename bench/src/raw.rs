//! The raw token: a bare PKCS#11 loop of pairs, one decryption and one signature as in a release.

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

/// How the transport keys of the protectors that owners make are encrypted.
pub const OAEP: Oaep = Oaep { hash: Hash::Sha1, mgf: Hash::Sha1 };
/// How protectors are signed.
pub const SCHEME: SignScheme = SignScheme::Pkcs1(Hash::Sha256);

/// What the loop works with.
#[derive(Clone)]
pub struct Work {
    /// The members, as the daemon is configured with them.
    pub members: Vec<MemberConfig>,
    /// The key that decrypts.
    pub encryption: KeyRef,
    /// The key that signs.
    pub signing: KeyRef,
    /// Of 32 bytes, for the key that decrypts.
    pub ciphertext: Vec<u8>,
}

/// What a round of the loop came to.
pub struct Round {
    /// Pairs in a second, of all sessions together.
    pub per_second: f64,
    /// How long a pair took, in nanoseconds.
    pub pairs: Histogram<u64>,
    /// A decryption alone.
    pub decrypts: Histogram<u64>,
    /// A signature alone.
    pub signs: Histogram<u64>,
}

impl Work {
    /// Of a configuration, with the ids and the public half of its keys.
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

    /// Pairs on `sessions` sessions of each member for as long as `time`, after a moment for all to begin.
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
            // Those that end after the time are not counted, nor are those that began before it.
            if counting.load(Ordering::Relaxed) && !stop.load(Ordering::Relaxed) {
                record(&mut pairs, both);
                record(&mut decrypts, decrypted);
                record(&mut signs, both - decrypted);
            }
        }
        (pairs, decrypts, signs)
    }
}
