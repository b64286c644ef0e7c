//! The key-protection certificates: which keys serve, which are primary, and the metadata document made of them.

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

/// How long nobody tries again to sign the metadata document after no HSM did: in an outage, requests for it must not wait
/// in line for one failure after the other.
const FAILURE_HOLDS: Duration = Duration::from_secs(1);

/// What key-protection certificates are for besides their key usage: `id-kp-serverAuth`, as the reference service demands.
pub(crate) const SERVER_AUTHENTICATION: &str = "1.3.6.1.5.5.7.3.1";

/// The lengths of RSA keys that are made.
pub(crate) const RSA_BITS: [u32; 3] = [2048, 3072, 4096];

/// How long before its end a certificate is worth a word, in seconds.
pub(crate) const EXPIRES_SOON: i64 = 30 * 24 * 3600;

/// What a certificate (DER) is called in the metrics: the first 8 digits of its thumbprint, as in the commands.
#[must_use]
pub fn short_name(der: &[u8]) -> String {
    HEXLOWER.encode(digest::digest(&digest::SHA256, der).as_ref().split_at(4).0)
}

/// A snapshot of the enabled certificates. Keys are found by SubjectPublicKeyInfo, so that a certificate that was
/// renewed with the same key goes on working.
#[derive(Debug, Default)]
pub struct Keys {
    /// By SubjectPublicKeyInfo (DER), like `signing`.
    encryption: HashMap<Vec<u8>, Held>,
    signing: HashMap<Vec<u8>, Held>,
    primary_encryption: Option<Key>,
    primary_signing: Option<Key>,
    /// Signs the metadata document; `None`: the primary signing one does.
    communications: Option<Key>,
    /// With the primary ones first.
    all: Vec<(Kind, Key)>,
    other_signing: Vec<Vec<u8>>,
    /// What this was read from.
    rows: Vec<store::Certificate>,
    /// Locked while it is signed: who comes meanwhile waits for the outcome instead of asking the HSMs, too.
    metadata: Mutex<Metadata>,
    /// Once it is signed.
    signed: OnceLock<Bytes>,
}

/// A private key that serves.
#[derive(Clone, Debug)]
pub struct Held {
    /// The private key.
    pub id: KeyRef,
    /// A host needs all of these to be given what the key opens.
    pub labels: Labels,
    /// Its first certificate, as it is called in the metrics.
    pub certificate: SharedString,
}

/// How far the metadata document was tried.
#[derive(Debug, Default)]
enum Metadata {
    #[default]
    Untried,
    /// No HSM signed it, at this time.
    Failed(Instant),
}

/// A certificate, and where its private key is.
#[derive(Clone, Debug)]
pub struct Key {
    /// The certificate.
    pub certificate: Certificate,
    /// The private key.
    pub id: KeyRef,
}

/// The private key of this `CKA_ID` whose other half is `public`.
#[must_use]
pub fn key_ref(id: &[u8], public: &RsaPublicKey) -> KeyRef {
    KeyRef::new(KeyId(id.to_vec()), public.modulus())
}

impl Key {
    /// A certificate, and the private key of this `CKA_ID` that is its own.
    #[must_use]
    pub fn new(certificate: Certificate, id: &[u8]) -> Self {
        let id = key_ref(id, certificate.key());
        Self { certificate, id }
    }

    /// An operation with this key whose right result is known. `None` when there is no randomness, or the key is too small
    /// to encrypt a secret to.
    pub(crate) fn known_answer(&self, kind: Kind) -> Option<KnownAnswerTest> {
        let mut secret = Zeroizing::new(vec![0; 32]);
        SystemRandom::new().fill(&mut secret).ok()?;
        let public = self.certificate.key();
        let known = match kind {
            Kind::Encryption => {
                let ciphertext = public.encrypt_oaep(algorithm::Oaep::SHA1, &secret).ok()?;
                let oaep = Oaep { hash: Hash::Sha1, mgf: Hash::Sha1 };
                KnownAnswerTest::decrypt(&self.id, oaep, &ciphertext, secret)
            }
            Kind::Signing => {
                let digest = digest::digest(&digest::SHA256, &secret);
                let scheme = SignScheme::Pkcs1(Hash::Sha256);
                KnownAnswerTest::sign(&self.id, scheme, digest.as_ref(), signed_by(public, digest))
            }
        };
        known.ok()
    }
}

impl Keys {
    /// Reads the certificates of the state; those that cannot be read are left out.
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
            // A key is one key, however many certificates it has: each of their limits holds.
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

    /// Whether this is what [`Keys::new`] would make of `certificates`.
    #[must_use]
    pub fn are_of(&self, certificates: &[store::Certificate]) -> bool {
        self.rows == certificates
    }

    /// The private key that decrypts what was encrypted to `public`.
    #[must_use]
    pub fn encryption(&self, public: &RsaPublicKey) -> Option<&Held> {
        self.encryption.get(public.spki_der())
    }

    /// The private keys that decrypt.
    pub fn decryption_keys(&self) -> impl Iterator<Item = &Held> {
        self.encryption.values()
    }

    /// The private key that signs what `public` verifies.
    #[must_use]
    pub fn signing(&self, public: &RsaPublicKey) -> Option<&Held> {
        self.signing.get(public.spki_der())
    }

    /// The certificates that new protectors use: encryption, signing.
    #[must_use]
    pub fn primary(&self) -> (Option<&Key>, Option<&Key>) {
        (self.primary_encryption.as_ref(), self.primary_signing.as_ref())
    }

    /// The enabled certificates, the primary ones first.
    pub fn certificates(&self) -> impl Iterator<Item = (Kind, &Certificate)> {
        self.all.iter().map(|(kind, key)| (*kind, &key.certificate))
    }

    /// For each key an operation whose right result is known, the primary ones first: what the HSMs are judged by.
    #[must_use]
    pub fn known_answers(&self) -> Vec<KnownAnswerTest> {
        self.all.iter().filter_map(|(kind, key)| key.known_answer(*kind)).collect()
    }

    /// The metadata document, if it is signed already.
    #[must_use]
    pub fn signed_metadata(&self) -> Option<Bytes> {
        self.signed.get().cloned()
    }

    /// The metadata document. Its three signatures are made once for each change of the certificates, and after a failure
    /// not before a moment has passed.
    ///
    /// # Errors
    /// 500 when there is no primary certificate, 503 when no HSM signs.
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
