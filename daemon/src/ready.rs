//! Whether the daemon can release keys: some member really decrypts and signs, with the primary keys.

use std::time::{Duration, Instant};

use claviger_hsm::{Hash, Oaep, SignScheme};
use claviger_protocol::algorithm::{self, SignatureAlgorithm};
use ring::digest;
use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::Mutex;

use crate::keys::Key;
use crate::routes::PROBE_TIMEOUT;
use crate::service::Service;

/// An answer is good for this long; many askers cost the HSMs one probe.
const FRESH: Duration = Duration::from_secs(1);

/// The last answer.
#[derive(Debug, Default)]
pub struct Readiness {
    last: Mutex<Option<(Instant, Result<String, String>)>>,
}

impl Readiness {
    /// The name of a member that just decrypted and signed, or why none did.
    ///
    /// # Errors
    /// A sentence for a person.
    pub async fn check(&self, service: &Service) -> Result<String, String> {
        // Held over the probe: who asks meanwhile waits for its answer instead of probing too.
        let mut last = self.last.lock().await;
        if let Some((at, answer)) = last.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            let _ = at;
            return answer.clone();
        }
        let answer = probe(service).await;
        *last = Some((Instant::now(), answer.clone()));
        answer
    }
}

/// Asks the members one after the other until one proves that it works.
async fn probe(service: &Service) -> Result<String, String> {
    let keys = service.keys.load();
    let (Some(encryption), Some(signing)) = keys.primary() else {
        return Err("there is no primary encryption or signing certificate".to_owned());
    };
    let mut why = Vec::new();
    for member in service.cluster.members() {
        match probe_member(service, &member.name, encryption, signing).await {
            Ok(()) => return Ok(member.name),
            Err(error) => why.push(format!("{}: {error}", member.name)),
        }
    }
    Err(why.join("; "))
}

/// One decryption and one signature on one member, both checked.
async fn probe_member(service: &Service, member: &str, encryption: &Key, signing: &Key) -> Result<(), String> {
    let deadline = Instant::now() + PROBE_TIMEOUT;
    let mut secret = [0; 32];
    SystemRandom::new().fill(&mut secret).map_err(|_| "no randomness".to_owned())?;
    let ciphertext = encryption.certificate.key().encrypt_oaep(algorithm::Oaep::SHA1, &secret);
    let ciphertext = ciphertext.map_err(|e| e.to_string())?;
    let oaep = Oaep { hash: Hash::Sha1, mgf: Hash::Sha1 };
    let decrypted = service.cluster.decrypt_on(member, &encryption.id, oaep, &ciphertext, deadline).await;
    if decrypted.map_err(|e| e.to_string())?.value.as_slice() != secret {
        return Err("it decrypts wrongly".to_owned());
    }
    let digest = digest::digest(&digest::SHA256, &secret);
    let scheme = SignScheme::Pkcs1(Hash::Sha256);
    let signature = service.cluster.sign_on(member, &signing.id, scheme, digest.as_ref(), deadline).await;
    let signature = signature.map_err(|e| e.to_string())?.value;
    let right = signing.certificate.key().verify(SignatureAlgorithm::DEFAULT, &secret, &signature);
    right.map_err(|_| "it signs wrongly".to_owned())
}
