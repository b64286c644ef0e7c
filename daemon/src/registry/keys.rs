//! The key-protection certificates: the enabled keys, the primary ones, and the metadata document.

use std::collections::HashMap;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use bytes::Bytes;
use claviger_hsm::{Cluster, Hash, HsmError, KeyId, KeyRef, KnownAnswerTest, Oaep, SignScheme, standstill};
use claviger_protocol::algorithm::{self, SignatureAlgorithm};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::metadata::GuardianInformation;
use claviger_protocol::protector::Signature;
use claviger_protocol::rsa_key::RsaPublicKey;
use data_encoding::HEXLOWER;
use metrics::SharedString;
use ring::digest;
use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use crate::signing::{self, OWN_DEADLINE, signed_by};
use crate::store::{self, Kind, Labels};

/// Pause before another attempt to sign the metadata document after no HSM signed it. During an outage, requests for it
/// must not queue for one failure after the other.
const FAILURE_HOLDS: Duration = Duration::from_secs(1);

/// The extended key usage of key-protection certificates: `id-kp-serverAuth`, as the reference service requires.
pub(crate) const SERVER_AUTHENTICATION: &str = "1.3.6.1.5.5.7.3.1";

/// The key lengths that can be generated.
pub(crate) const RSA_BITS: [u32; 3] = [2048, 3072, 4096];

/// Time before its expiry in seconds from which a certificate is reported.
pub(crate) const EXPIRES_SOON: i64 = 30 * 24 * 3600;

/// The name of a certificate (DER) in the metrics: the first 8 digits of its thumbprint, as in the commands.
#[must_use]
pub fn short_name(der: &[u8]) -> String {
    HEXLOWER.encode(digest::digest(&digest::SHA256, der).as_ref().split_at(4).0)
}

/// A snapshot of the enabled certificates. Keys are found by SubjectPublicKeyInfo, so a certificate that was renewed
/// with the same key continues to work.
#[derive(Debug, Default)]
pub struct Keys {
    /// Key: SubjectPublicKeyInfo (DER), as in `signing`.
    encryption: HashMap<Vec<u8>, Held>,
    signing: HashMap<Vec<u8>, Held>,
    primary_encryption: Option<Key>,
    primary_signing: Option<Key>,
    /// Signs the metadata document; `None`: the primary signing certificate signs it.
    communications: Option<Key>,
    /// The primary ones first.
    all: Vec<(Kind, Key)>,
    other_signing: Vec<Vec<u8>>,
    /// The records from which this snapshot was made.
    rows: Vec<store::Certificate>,
    /// Locked while it is being signed: concurrent requests wait for the result instead of using the HSMs as well.
    metadata: Mutex<Metadata>,
    /// Set once it is signed.
    signed: OnceLock<Bytes>,
}

/// An enabled private key.
#[derive(Clone, Debug)]
pub struct Held {
    /// The private key.
    pub id: KeyRef,
    /// The labels that a host needs for this key.
    pub labels: Labels,
    /// Metrics name of its first certificate.
    pub certificate: SharedString,
}

/// State of signing the metadata document.
#[derive(Debug, Default)]
enum Metadata {
    #[default]
    Untried,
    /// No HSM signed it at this time.
    Failed(Instant),
}

/// A certificate and its private key in the HSMs.
#[derive(Clone, Debug)]
pub struct Key {
    /// The certificate.
    pub certificate: Certificate,
    /// The private key.
    pub id: KeyRef,
}

/// The private key with this `CKA_ID` and this public key.
#[must_use]
pub fn key_ref(id: &[u8], public: &RsaPublicKey) -> KeyRef {
    KeyRef::new(KeyId(id.to_vec()), public.modulus())
}

impl Key {
    /// A certificate and its private key with this `CKA_ID`.
    #[must_use]
    pub fn new(certificate: Certificate, id: &[u8]) -> Self {
        let id = key_ref(id, certificate.key());
        Self { certificate, id }
    }

    /// The known-answer test for this key that every HSM must pass. `None` if the system has no randomness, or the key is too
    /// small to encrypt a secret to it.
    pub(crate) fn known_answer(&self, kind: Kind) -> Option<KnownAnswerTest> {
        match kind {
            Kind::Encryption => self.known_decryption(algorithm::Oaep::SHA1),
            Kind::Signing => self.known_signature(),
        }
    }

    /// The known-answer tests for this key in each way in which it is used, beginning with the one that every HSM must pass.
    fn known_answers(&self, kind: Kind) -> Vec<KnownAnswerTest> {
        let others = algorithm::Oaep::all().filter(|oaep| kind == Kind::Encryption && *oaep != algorithm::Oaep::SHA1);
        self.known_answer(kind).into_iter().chain(others.filter_map(|oaep| self.known_decryption(oaep))).collect()
    }

    fn known_decryption(&self, oaep: algorithm::Oaep) -> Option<KnownAnswerTest> {
        let secret = secret()?;
        let ciphertext = self.certificate.key().encrypt_oaep(oaep, &secret).ok()?;
        KnownAnswerTest::decrypt(&self.id, pkcs11_oaep(oaep), &ciphertext, secret).ok()
    }

    fn known_signature(&self) -> Option<KnownAnswerTest> {
        let digest = digest::digest(&digest::SHA256, &secret()?);
        let scheme = SignScheme::Pkcs1(Hash::Sha256);
        let public = self.certificate.key();
        KnownAnswerTest::sign(&self.id, scheme, digest.as_ref(), signed_by(public, digest)).ok()
    }
}

fn secret() -> Option<Zeroizing<Vec<u8>>> {
    let mut secret = Zeroizing::new(vec![0; 32]);
    SystemRandom::new().fill(&mut secret).ok()?;
    Some(secret)
}

/// The OAEP parameters as the HSMs take them.
pub(crate) fn pkcs11_oaep(oaep: algorithm::Oaep) -> Oaep {
    let hash = |digest| match digest {
        algorithm::Digest::Sha1 => Hash::Sha1,
        algorithm::Digest::Sha256 => Hash::Sha256,
        algorithm::Digest::Sha384 => Hash::Sha384,
        algorithm::Digest::Sha512 => Hash::Sha512,
    };
    Oaep { hash: hash(oaep.digest), mgf: hash(oaep.mgf) }
}

impl Keys {
    /// Reads the certificates of the state. Invalid ones are skipped.
    #[must_use]
    pub fn new(certificates: Vec<store::Certificate>) -> Self {
        let mut keys = Self::default();
        for entry in certificates.iter().filter(|c| c.enabled) {
            let Ok(certificate) = Certificate::parse(&entry.der) else { continue };
            let id = key_ref(&entry.key_id, certificate.key());
            let by_key = match entry.kind {
                Kind::Encryption => &mut keys.encryption,
                Kind::Signing => &mut keys.signing,
            };
            let held = by_key.entry(certificate.key().spki_der().to_vec()).or_insert_with(|| Held {
                id: id.clone(),
                labels: Labels::default(),
                certificate: short_name(certificate.der()).into(),
            });
            // A key may have several certificates; the restrictions of all of them apply.
            held.labels = held.labels.with(&entry.labels);
            if entry.is_communications {
                keys.communications = Some(Key { certificate: certificate.clone(), id: id.clone() });
            }
            let key = (entry.kind, Key { certificate: certificate.clone(), id: id.clone() });
            keys.all.insert(if entry.is_primary { 0 } else { keys.all.len() }, key);
            match (entry.kind, entry.is_primary) {
                (Kind::Encryption, true) => keys.primary_encryption = Some(Key { certificate, id }),
                (Kind::Signing, true) => keys.primary_signing = Some(Key { certificate, id }),
                (Kind::Signing, false) => keys.other_signing.push(entry.der.clone()),
                (Kind::Encryption, false) => {}
            }
        }
        keys.rows = certificates;
        keys
    }

    /// Whether [`Keys::new`] would give the same for `certificates`.
    #[must_use]
    pub fn are_of(&self, certificates: &[store::Certificate]) -> bool {
        self.rows == certificates
    }

    /// The private key for decryption that belongs to `public`.
    #[must_use]
    pub fn encryption(&self, public: &RsaPublicKey) -> Option<&Held> {
        self.encryption.get(public.spki_der())
    }

    /// The private keys for decryption.
    pub fn decryption_keys(&self) -> impl Iterator<Item = &Held> {
        self.encryption.values()
    }

    /// The private key for signatures that belongs to `public`.
    #[must_use]
    pub fn signing(&self, public: &RsaPublicKey) -> Option<&Held> {
        self.signing.get(public.spki_der())
    }

    /// The certificates for new protectors: encryption, signing.
    #[must_use]
    pub fn primary(&self) -> (Option<&Key>, Option<&Key>) {
        (self.primary_encryption.as_ref(), self.primary_signing.as_ref())
    }

    /// The enabled certificates, primary ones first.
    pub fn certificates(&self) -> impl Iterator<Item = (Kind, &Certificate)> {
        self.all.iter().map(|(kind, key)| (*kind, &key.certificate))
    }

    /// The enabled certificates with their private keys, primary ones first.
    pub(crate) fn all(&self) -> impl Iterator<Item = (Kind, &Key)> {
        self.all.iter().map(|(kind, key)| (*kind, key))
    }

    /// The known-answer tests for all keys, primary keys first.
    #[must_use]
    pub fn known_answers(&self) -> Vec<KnownAnswerTest> {
        self.all.iter().flat_map(|(kind, key)| key.known_answers(*kind)).collect()
    }

    /// The metadata document, if it is already signed.
    #[must_use]
    pub fn signed_metadata(&self) -> Option<Bytes> {
        self.signed.get().cloned()
    }

    /// The metadata document. Its three signatures are made once after each change of the certificates. After a
    /// failure, there is a pause before the next attempt.
    ///
    /// # Errors
    /// 500 if there is no primary certificate, 503 if no HSM signs.
    pub async fn metadata(&self, cluster: &Cluster) -> Result<Bytes, Refusal> {
        let missing = |kind| Refusal::new(Code::Internal, format!("Primary {kind} Certificate not found"));
        let encryption = self.primary_encryption.as_ref().ok_or_else(|| missing("Encryption"))?;
        let signing = self.primary_signing.as_ref().ok_or_else(|| missing("Signing"))?;
        let unavailable = || Refusal::new(Code::ServiceUnavailable, "no HSM can sign now; try again");
        let mut metadata = self.metadata.lock().await;
        if let Some(document) = self.signed_metadata() {
            return Ok(document);
        }
        match &*metadata {
            Metadata::Failed(at) if standstill::since(*at) < FAILURE_HOLDS => return Err(unavailable()),
            Metadata::Failed(_) | Metadata::Untried => {}
        }
        match self.sign_metadata(cluster, encryption, signing).await {
            Ok(document) => Ok(self.signed.get_or_init(|| document).clone()),
            Err(error) => {
                tracing::warn!(%error, "the metadata document cannot be signed");
                *metadata = Metadata::Failed(standstill::now());
                Err(unavailable())
            }
        }
    }

    async fn sign_metadata(&self, cluster: &Cluster, encryption: &Key, signing: &Key) -> Result<Bytes, HsmError> {
        let deadline = standstill::now() + OWN_DEADLINE;
        let sign_by = async |key: &Key, octets: &[u8]| {
            let value = signing::sign(cluster, &key.id, key.certificate.key(), octets, deadline).await?.value;
            Ok::<_, HsmError>(Signature { algorithm: SignatureAlgorithm::DEFAULT, parameters: None, value })
        };
        let sign = async |octets: &[u8]| sign_by(signing, octets).await;
        let information = GuardianInformation {
            encryption_certificate: encryption.certificate.der().to_vec(),
            signing_certificate: signing.certificate.der().to_vec(),
            encryption_certificate_signature: sign(encryption.certificate.der()).await?,
            signing_certificate_self_signature: sign(signing.certificate.der()).await?,
            other_signing_certificates: self.other_signing.clone(),
        };
        let communications = self.communications.as_ref().unwrap_or(signing);
        let unsigned = information.unsigned(communications.certificate.der());
        let signature = sign_by(communications, unsigned.signed_octets()).await?.value;
        Ok(unsigned.finish(&signature).into())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_use_a_key_has_a_known_answer() {
        let certificate = Certificate::parse(&crate::service::testing::certificate()).unwrap();
        let key = Key::new(certificate, b"id");
        let told = |tests: Vec<KnownAnswerTest>| tests.iter().map(|test| format!("{test:?}")).collect::<Vec<_>>();
        let mut decryptions = told(key.known_answers(Kind::Encryption));
        assert!(
            decryptions[0].contains("Oaep { hash: Sha1, mgf: Sha1 }"),
            "every HSM must pass this one: {decryptions:?}"
        );
        decryptions.sort_unstable();
        decryptions.dedup();
        assert_eq!(decryptions.len(), algorithm::Oaep::all().count());
        assert_eq!(told(key.known_answers(Kind::Signing)).len(), 1);
    }

    #[tokio::test]
    async fn in_an_outage_the_first_failure_answers_all() {
        let (_folder, service) = crate::service::testing::service();
        let der = crate::service::testing::certificate();
        let row = |kind| store::Certificate {
            thumbprint: String::new(),
            kind,
            der: der.clone(),
            key_id: b"id".to_vec(),
            spki: b"spki".to_vec(),
            is_primary: true,
            enabled: true,
            added: 1,
            is_communications: false,
            labels: Labels::default(),
        };
        let keys = Keys::new(vec![row(Kind::Encryption), row(Kind::Signing)]);
        let failed = async || {
            assert_eq!(keys.metadata(&service.cluster).await.unwrap_err().code, Code::ServiceUnavailable);
            let Metadata::Failed(at) = *keys.metadata.lock().await else { panic!("signed") };
            at
        };
        let first = failed().await;
        assert_eq!(failed().await, first, "tried again at once");
        *keys.metadata.lock().await = Metadata::Failed(first.checked_sub(FAILURE_HOLDS).unwrap());
        assert!(failed().await > first, "never tried again");
    }
}
