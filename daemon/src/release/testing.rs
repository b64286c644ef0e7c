//! Releases without an HSM, for unit tests and benches: software keys that really decrypt and sign, a service with a
//! registered host, and a tenant.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

mod null_hsm;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use claviger_hsm::{Check, Done, KeyRef, standstill};
use claviger_process::lock::lock;
use claviger_protocol::algorithm::{HostAlgorithms, KeyWrapping, Oaep, Sealing};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::health::{self, ResultType, signer_template};
use claviger_protocol::metadata::Metadata;
use claviger_protocol::owner::Owner;
use claviger_protocol::payload::Payload;
use claviger_protocol::request::{RollRequest, RollResponse};
use claviger_protocol::rsa_key::{RsaPrivateKey, RsaPublicKey};
use zeroize::Zeroizing;

pub use self::null_hsm::NullHsm;
use super::hsm::{DecryptError, Hsm, Unavailable};
use crate::config::Config;
use crate::lab::self_signed;
use crate::registry::keys::key_ref;
use crate::service::{self, Service};
use crate::store::{Kind, Labels, NewCertificate, NewSigner};
use crate::sys::clock::unix_now;

/// Name of the registered host.
pub const HOST: &str = "node-1";
/// Member name that the software keys report.
pub const MEMBER: &str = "software";
/// The algorithms that the host requests.
pub const ALGORITHMS: HostAlgorithms = HostAlgorithms {
    transfer: Oaep::SHA256,
    wrapping: KeyWrapping::Seal(Sealing::Aes256Gcm),
    transport: Sealing::Aes256Gcm,
};

/// An operation of the trait [`Hsm`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// [`Hsm::decrypt`].
    Decrypt,
    /// [`Hsm::sign`].
    Sign,
}

/// An incident in an operation that would otherwise succeed.
pub enum Incident {
    /// The operation fails as if no member were up.
    Fails,
    /// The result has one wrong bit.
    IsWrong,
    /// The operation takes this long on tokio's clock; if its deadline passes first, it fails then.
    Takes(Duration),
    /// This function runs before the operation returns.
    Meanwhile(Box<dyn FnOnce() + Send>),
}

impl Incident {
    /// Runs `happens` during the operation.
    pub fn meanwhile(happens: impl FnOnce() + Send + 'static) -> Self {
        Self::Meanwhile(Box::new(happens))
    }
}

/// Software private keys in place of the cluster.
#[derive(Clone)]
pub struct SoftwareHsm(Arc<Inner>);

struct Inner {
    keys: HashMap<KeyRef, RsaPrivateKey>,
    decryptions: Desk,
    signatures: Desk,
    idle: AtomicUsize,
}

/// One kind of operation.
#[derive(Default)]
struct Desk {
    planned: Mutex<VecDeque<Incident>>,
    asked: AtomicUsize,
}

impl fmt::Debug for SoftwareHsm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftwareHsm").field("keys", &self.0.keys.keys()).finish_non_exhaustive()
    }
}

impl SoftwareHsm {
    /// Creates an HSM with these keys.
    #[must_use]
    pub fn new(keys: impl IntoIterator<Item = (KeyRef, RsaPrivateKey)>) -> Self {
        let keys = keys.into_iter().collect();
        Self(Arc::new(Inner {
            keys,
            decryptions: Desk::default(),
            signatures: Desk::default(),
            idle: AtomicUsize::new(4),
        }))
    }

    /// Plans an incident for the next operation of this kind without one.
    pub fn plan(&self, operation: Operation, incident: Incident) {
        lock(&self.desk(operation).planned).push_back(incident);
    }

    /// How often this kind of operation was requested.
    #[must_use]
    pub fn asked(&self, operation: Operation) -> usize {
        self.desk(operation).asked.load(Ordering::Relaxed)
    }

    /// Sets the number of idle sessions; initially 4.
    pub fn set_idle(&self, sessions: usize) {
        self.0.idle.store(sessions, Ordering::Relaxed);
    }

    fn desk(&self, operation: Operation) -> &Desk {
        match operation {
            Operation::Decrypt => &self.0.decryptions,
            Operation::Sign => &self.0.signatures,
        }
    }

    async fn work(
        &self,
        operation: Operation,
        key: &KeyRef,
        deadline: Instant,
        check: Check,
        work: impl FnOnce(&RsaPrivateKey) -> Option<Zeroizing<Vec<u8>>>,
    ) -> Result<Done<Zeroizing<Vec<u8>>>, DecryptError> {
        let desk = self.desk(operation);
        desk.asked.fetch_add(1, Ordering::Relaxed);
        let incident = lock(&desk.planned).pop_front();
        let key = self.0.keys.get(key).ok_or_else(|| unavailable("there is no such key"))?;
        let mut is_wrong = false;
        match incident {
            Some(Incident::Fails) => return Err(unavailable("the failure that was planned").into()),
            Some(Incident::IsWrong) => is_wrong = true,
            Some(Incident::Takes(time)) => {
                let slept = standstill::timeout_at(deadline, tokio::time::sleep(time)).await;
                slept.map_err(|_| unavailable("deadline passed"))?;
            }
            Some(Incident::Meanwhile(happens)) => happens(),
            None => {}
        }
        let mut value = work(key).ok_or(DecryptError::Rejected)?;
        value[0] ^= u8::from(is_wrong);
        match check(&value) {
            true => Ok(done(value)),
            // A cluster would find that its member is at fault.
            false if is_wrong => Err(unavailable("the HSM gives wrong answers").into()),
            false => Err(DecryptError::Rejected),
        }
    }
}

fn done<T>(value: T) -> Done<T> {
    Done { value, member: MEMBER.into(), retries: 0 }
}

fn unavailable(why: &'static str) -> Unavailable {
    Unavailable(why.into())
}

impl Hsm for SoftwareHsm {
    async fn decrypt(
        &self,
        key: &KeyRef,
        oaep: Oaep,
        ciphertext: &[u8],
        deadline: Instant,
        check: Check,
    ) -> Result<Done<Zeroizing<Vec<u8>>>, DecryptError> {
        let decrypt = |key: &RsaPrivateKey| key.decrypt_oaep(oaep, ciphertext).ok();
        self.work(Operation::Decrypt, key, deadline, check, decrypt).await
    }

    async fn sign(
        &self,
        key: &KeyRef,
        digest: &[u8],
        deadline: Instant,
        check: Check,
    ) -> Result<Done<Vec<u8>>, Unavailable> {
        let sign = |key: &RsaPrivateKey| key.sign_digest(digest).ok().map(Zeroizing::new);
        let signed = self.work(Operation::Sign, key, deadline, check, sign).await;
        signed.map(|mut signed| done(std::mem::take(&mut *signed.value))).map_err(|error| match error {
            DecryptError::Unavailable(error) => error,
            DecryptError::Rejected => unavailable("the signature is wrong"),
        })
    }

    fn idle(&self) -> usize {
        self.0.idle.load(Ordering::Relaxed)
    }
}

/// The key pairs of all parties, with 2048 bits.
pub struct Parties {
    owner: Owner,
    /// The service's two keys and their certificates. The type `Owner` fits, because a guardian has the same kinds of
    /// keys.
    guardian: Owner,
    signer: RsaPrivateKey,
    signer_certificate: Certificate,
    host: RsaPrivateKey,
    identity: RsaPrivateKey,
}

/// The private keys of the service's attestation signer and of the host.
pub struct OtherKeys {
    /// Signs health certificates.
    pub signer: RsaPrivateKey,
    /// The key that the host is registered with.
    pub host: RsaPrivateKey,
    /// The transport keys are encrypted to this key.
    pub identity: RsaPrivateKey,
}

impl Parties {
    /// Uses these keys, with a certificate of the signer that is valid for a day.
    #[must_use]
    pub fn new(owner: Owner, guardian: Owner, keys: OtherKeys) -> Self {
        let OtherKeys { signer, host, identity } = keys;
        let template = signer_template(signer.public(), unix_now() - 300, unix_now() + 24 * 3600).unwrap();
        let der = template.to_be_signed().unwrap().sign_with(&signer).unwrap();
        let signer_certificate = Certificate::parse(&der).unwrap();
        Self { owner, guardian, signer, signer_certificate, host, identity }
    }

    /// Generates all keys.
    #[must_use]
    pub fn generate() -> Self {
        let keys = OtherKeys { signer: generate(), host: generate(), identity: generate() };
        Self::new(pairs("tenant"), pairs("guardian"), keys)
    }
}

/// The parties of the unit tests, generated once per process.
static PARTIES: LazyLock<Parties> = LazyLock::new(Parties::generate);

/// The keys of the service of [`Stage::new`].
#[must_use]
pub fn guardian() -> &'static Owner {
    &PARTIES.guardian
}

/// Generates a key.
#[must_use]
pub fn generate() -> RsaPrivateKey {
    RsaPrivateKey::generate(2048).unwrap()
}

/// Generates two key pairs with self-signed certificates of this name.
#[must_use]
pub fn pairs(name: &str) -> Owner {
    let [(signing_key, signing_certificate), (encryption_key, encryption_certificate)] =
        ["signing", "encryption"].map(|role| {
            let key = generate();
            let certificate = self_signed(&format!("{name} {role}"), &key).unwrap();
            (key, certificate)
        });
    Owner { signing_key, signing_certificate, encryption_key, encryption_certificate }
}

fn key_id(key: &RsaPublicKey) -> Vec<u8> {
    key.spki_sha256()[..20].to_vec()
}

/// A service with one registered host, and the software keys that it uses.
pub struct Stage {
    /// The service. Its cluster is never started.
    pub service: Arc<Service>,
    /// The software keys that its releases use.
    pub hsm: SoftwareHsm,
    parties: &'static Parties,
}

impl Stage {
    /// Creates a service with its state in `folder` and these changes to the default settings.
    #[must_use]
    pub fn new(folder: &Path, configure: impl FnOnce(&mut Config)) -> Self {
        Self::of(&PARTIES, folder, configure)
    }

    /// The same with these keys.
    #[must_use]
    pub fn of(parties: &'static Parties, folder: &Path, configure: impl FnOnce(&mut Config)) -> Self {
        let service = service::testing::service_in(folder, configure);
        let Parties { guardian, signer_certificate, host, .. } = parties;
        let keys = [
            (Kind::Signing, &guardian.signing_key, &guardian.signing_certificate),
            (Kind::Encryption, &guardian.encryption_key, &guardian.encryption_certificate),
        ];
        service.registry.with_state(|state| {
            for (kind, key, certificate) in keys {
                let (key_id, spki) = (&key_id(key.public()), key.public().spki_der());
                // Not primary, because tests disable the certificates and primary ones cannot be disabled. Only
                // metadata needs primary certificates, and it is not requested.
                let new = NewCertificate { kind, der: certificate.der(), key_id, spki, primary: false };
                state.add_certificate(&new, unix_now()).unwrap();
            }
            let new = NewSigner {
                der: signer_certificate.der(),
                key_id: &key_id(signer_certificate.key()),
                not_before: signer_certificate.not_before(),
                not_after: signer_certificate.not_after(),
            };
            state.add_signer(&new, None, unix_now()).unwrap();
            state.add_host(HOST, host.public().spki_der(), &Labels::default(), unix_now()).unwrap();
        });
        service.registry.follow().unwrap();
        let hsm = SoftwareHsm::new(keys.map(|(_, key, _)| {
            let copy = RsaPrivateKey::from_pkcs8_der(key.to_pkcs8_der()).unwrap();
            (key_ref(&key_id(key.public()), key.public()), copy)
        }));
        Self { service, hsm, parties }
    }

    /// The tenant whose protectors this service serves.
    #[must_use]
    pub fn owner(&self) -> &'static Owner {
        &self.parties.owner
    }

    /// The service's own keys, in the type of a tenant's keys.
    #[must_use]
    pub fn guardian(&self) -> &'static Owner {
        &self.parties.guardian
    }

    /// The content of the service's metadata document.
    #[must_use]
    pub fn metadata(&self) -> Metadata {
        Metadata::parse(&self.guardian().metadata().unwrap()).unwrap()
    }

    /// Creates a protector of the tenant for this service.
    #[must_use]
    pub fn protector(&self) -> Vec<u8> {
        self.owner().create(&[self.metadata()]).unwrap().0
    }

    /// Creates a health certificate (DER) for the registered host, issued at `now`.
    #[must_use]
    pub fn health_certificate(&self, now: i64) -> Vec<u8> {
        self.health_certificate_of(ResultType::EncryptionCertificate, now)
    }

    /// The same for another kind of certificate.
    #[must_use]
    pub fn health_certificate_of(&self, content: ResultType, now: i64) -> Vec<u8> {
        let Parties { signer, signer_certificate, host, identity, .. } = self.parties;
        let issued = health::issue(signer_certificate, HOST, host.public(), identity.public(), content, now);
        issued.unwrap().sign_with(signer).unwrap()
    }

    /// Like [`Stage::health_certificate`], with a baseline.
    #[must_use]
    pub fn measured_certificate(&self, baseline: &str, now: i64) -> Vec<u8> {
        let Parties { signer, signer_certificate, host, identity, .. } = self.parties;
        let (host, identity) = (host.public(), identity.public());
        let content = ResultType::EncryptionCertificate;
        let issued = health::issue_measured(signer_certificate, HOST, host, baseline, identity, content, now);
        issued.unwrap().sign_with(signer).unwrap()
    }

    /// The request of the registered host for this protector.
    #[must_use]
    pub fn request(&self, protector: &[u8]) -> RollRequest {
        RollRequest {
            ingress_protector: protector.to_vec(),
            health_certificate: self.health_certificate(unix_now()),
            algorithms: ALGORITHMS,
        }
    }

    /// Decrypts the keys of a response as the registered host.
    #[must_use]
    pub fn open(&self, response: &RollResponse) -> Payload {
        let transfer_key =
            self.parties.identity.decrypt_oaep(ALGORITHMS.transfer, &response.keys.transfer_key).unwrap();
        response.keys.open(&transfer_key, ALGORITHMS.wrapping, ALGORITHMS.transport).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use claviger_protocol::build::fresh_transport_key;
    use ring::digest;

    fn always() -> Check {
        Arc::new(|_| true)
    }

    fn never() -> Check {
        Arc::new(|_| false)
    }

    #[tokio::test(start_paused = true)]
    async fn software_keys_decrypt_sign_and_fail_as_planned() {
        let key = RsaPrivateKey::from_pkcs8_der(PARTIES.guardian.signing_key.to_pkcs8_der()).unwrap();
        let public = key.public().clone();
        let id = key_ref(b"id", &public);
        let hsm = SoftwareHsm::new([(id.clone(), key)]);
        let secret = fresh_transport_key().unwrap();
        let begun = standstill::now();
        let deadline = begun + Duration::from_secs(5);
        for oaep in [Oaep::SHA1, Oaep::SHA256] {
            let ciphertext = public.encrypt_oaep(oaep, &secret[..]).unwrap();
            let decrypted = hsm.decrypt(&id, oaep, &ciphertext, deadline, always()).await.unwrap();
            assert_eq!(decrypted.value[..], secret[..]);
            assert!(matches!(
                hsm.decrypt(&id, oaep, &ciphertext, deadline, never()).await,
                Err(DecryptError::Rejected)
            ));
            assert!(matches!(
                hsm.decrypt(&id, oaep, &ciphertext[1..], deadline, always()).await,
                Err(DecryptError::Rejected)
            ));
        }
        assert_eq!((hsm.asked(Operation::Decrypt), hsm.asked(Operation::Sign)), (6, 0));

        let digest = digest::digest(&digest::SHA256, b"message");
        let right = crate::signing::signed_by(&public, digest);
        let sign = async |id: &KeyRef| hsm.sign(id, digest.as_ref(), deadline, right.clone()).await;
        let signature = sign(&id).await.unwrap().value;
        assert!(public.verify_digest(digest.as_ref(), &signature).is_ok());
        let failed = async || sign(&id).await.map(|done| done.value).unwrap_err().to_string();
        hsm.plan(Operation::Sign, Incident::Fails);
        hsm.plan(Operation::Sign, Incident::IsWrong);
        assert_eq!(failed().await, "the failure that was planned");
        assert_eq!(failed().await, "the HSM gives wrong answers");
        hsm.plan(Operation::Sign, Incident::Takes(Duration::from_secs(4)));
        assert!(sign(&id).await.is_ok());
        assert_eq!(standstill::since(begun), Duration::from_secs(4));
        hsm.plan(Operation::Sign, Incident::Takes(Duration::from_secs(4)));
        assert_eq!(failed().await, "deadline passed");
        assert_eq!(standstill::since(begun), Duration::from_secs(5));
        assert!(sign(&key_ref(b"other", &public)).await.is_err());
        assert!(sign(&id).await.is_ok(), "an incident happens once");
    }
}
