//! A guarded host, as the service sees one: attests with its host key or by its TPM, then exchanges protectors for keys.
//!
//! [`Host`] asks one server. [`crate::failover`] asks several, as [`crate::retry`] says; [`crate::host_files`] is what a host
//! keeps on disk.

use std::sync::Arc;

use claviger_protocol::algorithm::{HostAlgorithms, KeyWrapping, Oaep, Sealing, SignatureAlgorithm};
use claviger_protocol::attestation::tpm::{first_request, parse_continue_reply, second_request};
use claviger_protocol::attestation::{self, ReceivedError};
use claviger_protocol::error::Refusal;
use claviger_protocol::health::ResultType;
use claviger_protocol::payload::{ApiVersion, Payload};
use claviger_protocol::protector::{Protector, TransportKey};
use claviger_protocol::request::{RollRequest, RollResponse};
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_protocol::verify::{self, KnownCertificates};
use ring::rand::{SecureRandom, SystemRandom};

use crate::http::{Client, ClientError, Reply};
use crate::tpm::{Session, TpmError, TpmPlace};

/// Where hosts attest, by what they attest with.
const HOST_KEY_ATTEST: &str = "/Attestation/v2.0/hostkeyattest";
const TPM_ATTEST: &str = "/Attestation/v2.0/attest";

/// What a host attests with.
#[derive(Clone)]
pub enum Proof {
    /// The key that it is registered with.
    HostKey(Arc<RsaPrivateKey>),
    /// Its TPM, whose endorsement key it is registered with.
    Tpm(TpmPlace),
}

impl From<RsaPrivateKey> for Proof {
    fn from(key: RsaPrivateKey) -> Self {
        Self::HostKey(Arc::new(key))
    }
}

impl From<Arc<RsaPrivateKey>> for Proof {
    fn from(key: Arc<RsaPrivateKey>) -> Self {
        Self::HostKey(key)
    }
}

/// A host with its two keys.
pub struct Host {
    client: Client,
    proof: Proof,
    /// What its health certificates are made over, and keys are encrypted to.
    identity_key: Arc<RsaPrivateKey>,
}

/// Why a host did not get what it asked for.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There was no answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Attestation refused.
    #[error("attestation refused with {status} {}: {}", reply.name, reply.message.as_deref().unwrap_or("no message"))]
    Attestation {
        /// The HTTP status.
        status: u16,
        /// What the service said.
        reply: ReceivedError,
        /// In how many seconds the host may come again, if the service said so.
        retry_after: Option<u16>,
    },
    /// The release was refused.
    #[error("release refused with {status} {refusal}")]
    Release {
        /// The HTTP status.
        status: u16,
        /// What the service said.
        refusal: Refusal,
    },
    /// An error that is none of the protocol's: what answers may be something between the host and the service.
    #[error("{server} answered with status {status} and no error of the protocol; is it the service's URL?")]
    Status {
        /// Who answered.
        server: String,
        /// The HTTP status.
        status: u16,
        /// In how many seconds the host may come again, if that was said.
        retry_after: Option<u16>,
    },
    /// An answer that cannot be understood, keys that do not open, or that are not the protectors'.
    #[error("the answer is not right: {0}")]
    Answer(String),
    /// The host's own keys do not work.
    #[error("the host's keys: {0}")]
    Key(String),
    /// The host's TPM does not work, or its event log cannot be read.
    #[error(transparent)]
    Tpm(#[from] TpmError),
}

/// What a host keeps of a release.
pub struct Unwrapped {
    /// Both transport keys.
    pub keys: Payload,
    /// The protector to show next time.
    pub egress_protector: Vec<u8>,
}

impl Host {
    /// A host that talks to the service behind `client`.
    #[must_use]
    pub fn new(client: Client, proof: impl Into<Proof>, identity_key: Arc<RsaPrivateKey>) -> Self {
        Self { client, proof: proof.into(), identity_key }
    }

    /// Which server it asks: for messages.
    #[must_use]
    pub fn server(&self) -> &str {
        self.client.server()
    }

    /// Proves to be the registered host and gets a health certificate (DER).
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn attest(&self) -> Result<Vec<u8>, HostError> {
        let mut session = [0; 16];
        SystemRandom::new().fill(&mut session).map_err(|_| HostError::Key("no randomness".to_owned()))?;
        let reply = match &self.proof {
            Proof::HostKey(key) => self.attest_with(key, session).await?,
            Proof::Tpm(place) => self.attest_by(place.clone(), session).await?,
        };
        let content = attestation::parse_health_certificate_reply(&reply.body).map_err(unreadable)?;
        let certificate = content.into_iter().find(|(kind, _)| *kind == ResultType::EncryptionCertificate.number());
        Ok(certificate.ok_or_else(|| HostError::Answer("no encryption certificate".to_owned()))?.1)
    }

    async fn attest_with(&self, key: &RsaPrivateKey, session: [u8; 16]) -> Result<Reply, HostError> {
        let (host, identity) = (key.public().spki_der(), self.identity_key.public().spki_der());
        let signature = key
            .sign(SignatureAlgorithm::DEFAULT, &attestation::signed_octets(host, identity))
            .map_err(|e| HostError::Key(e.to_string()))?;
        let request = attestation::host_key_request(session, &WANTED, host, identity, &signature);
        self.post_attestation(HOST_KEY_ATTEST, request).await
    }

    /// Both steps. What the TPM does takes its time, on a thread that may block.
    async fn attest_by(&self, place: TpmPlace, session: [u8; 16]) -> Result<Reply, HostError> {
        let blocked = |e: tokio::task::JoinError| HostError::Answer(e.to_string());
        let begun = tokio::task::spawn_blocking(|| Session::begin(place)).await.map_err(blocked)??;
        let request = first_request(session, &WANTED, begun.endorsement.content(), &begun.first_context());
        let mut held = DropBlocking(Some(begun));
        let reply = self.post_attestation(TPM_ATTEST, request).await?;
        let received = parse_continue_reply(&reply.body).map_err(unreadable)?;

        let identity = self.identity_key.public().spki_der().to_vec();
        let answer = tokio::task::spawn_blocking(move || {
            let Some(mut begun) = held.0.take() else {
                return Err(TpmError::Answer("the session with the TPM has ended".to_owned()));
            };
            let context = begun.second_context(&received, &session, &identity)?;
            Ok(second_request(session, &WANTED, begun.endorsement.content(), &identity, &context))
        });
        let request = answer.await.map_err(blocked)??;
        self.post_attestation(TPM_ATTEST, request).await
    }

    /// Posts a request for attestation; an error reply is an error.
    async fn post_attestation(&self, path: &str, request: Vec<u8>) -> Result<Reply, HostError> {
        let reply = self.client.post(path, "application/json", request).await?;
        if reply.status == 200 {
            return Ok(reply);
        }
        let (status, retry_after) = (reply.status.as_u16(), reply.retry_after());
        let error = attestation::parse_error_reply(&reply.body).map_err(|_| self.foreign(&reply))?;
        Err(HostError::Attestation { status, reply: error, retry_after })
    }

    /// Exchanges a protector for its transport key and a fresh protector, and checks that the keys are those of the two.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn roll(
        &self,
        api: ApiVersion,
        health_certificate: &[u8],
        protector: &[u8],
    ) -> Result<Unwrapped, HostError> {
        let algorithms = HostAlgorithms {
            transfer: Oaep::SHA256,
            wrapping: KeyWrapping::Seal(Sealing::Aes256Gcm),
            transport: Sealing::Aes256Gcm,
        };
        let request = RollRequest {
            ingress_protector: protector.to_vec(),
            health_certificate: health_certificate.to_vec(),
            algorithms,
        };
        let path = format!("/KeyProtection/service/{}/RollTransportKey", api.as_str());
        let reply = self.client.post(&path, "application/xml", request.to_xml()).await?;
        let unreadable = |e: claviger_protocol::xml::XmlError| HostError::Answer(e.to_string());
        if reply.status != 200 {
            let mut refusal = Refusal::parse(&reply.body).map_err(|_| self.foreign(&reply))?;
            refusal.retry_after = reply.retry_after();
            return Err(HostError::Release { status: reply.status.as_u16(), refusal });
        }
        let response = RollResponse::parse(&reply.body).map_err(unreadable)?;
        // Opening is work for a processor, not for the thread that drives connections.
        let (identity_key, ingress) = (self.identity_key.clone(), request.ingress_protector);
        let opened = tokio::task::spawn_blocking(move || {
            let transfer_key = identity_key.decrypt_oaep(algorithms.transfer, &response.keys.transfer_key);
            let transfer_key = transfer_key.map_err(|e| HostError::Answer(e.to_string()))?;
            let keys = response.keys.open(&transfer_key, algorithms.wrapping, algorithms.transport);
            let keys = keys.map_err(|e| HostError::Answer(e.to_string()))?;
            prove(&ingress, &keys.ingress, &response.egress_protector, &keys.egress).map_err(HostError::Answer)?;
            Ok(Unwrapped { keys, egress_protector: response.egress_protector })
        });
        opened.await.map_err(|e| HostError::Answer(e.to_string()))?
    }

    fn foreign(&self, reply: &Reply) -> HostError {
        let (server, status) = (self.server().to_owned(), reply.status.as_u16());
        HostError::Status { server, status, retry_after: reply.retry_after() }
    }
}

/// Holds a value whose drop blocks, and drops it on a thread that may block: also when the future that holds it ends early.
struct DropBlocking<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> Drop for DropBlocking<T> {
    fn drop(&mut self) {
        let Some(value) = self.0.take() else { return };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || drop(value));
        }
    }
}

/// What a host asks for when it attests.
const WANTED: [ResultType; 1] = [ResultType::EncryptionCertificate];

fn unreadable(error: attestation::ReplyError) -> HostError {
    HostError::Answer(error.to_string())
}

/// Checks that each key made its protector's transport-key signature, that whoever may open the old protector may open the
/// new one, and that this was signed by one of them. A host that stored anything else might have lost the machine's secrets.
fn prove(ingress: &[u8], ingress_key: &TransportKey, egress: &[u8], egress_key: &TransportKey) -> Result<(), String> {
    let ingress = Protector::parse(ingress).map_err(|e| format!("the protector that was sent: {e}"))?;
    if !ingress.transport_key_signature.verify(ingress_key, &ingress.signed_octets) {
        return Err("the ingress key is not that of the protector that was sent".to_owned());
    }
    let egress = Protector::parse(egress).and_then(|egress| verify::verify(egress, &KnownCertificates::default()));
    let egress = egress.map_err(|e| format!("the new protector: {e}"))?.protector;
    if !egress.transport_key_signature.verify(egress_key, &egress.signed_octets) {
        return Err("the egress key is not that of the new protector".to_owned());
    }
    let same = ingress.wrappings.len() == egress.wrappings.len()
        && ingress.wrappings.iter().zip(&egress.wrappings).all(|(old, new)| {
            (old.id, &old.signing_certificate, &old.encryption_certificate)
                == (new.id, &new.signing_certificate, &new.encryption_certificate)
        });
    if same { Ok(()) } else { Err("the new protector is for others than the one that was sent".to_owned()) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::mpsc;
    use std::thread::{self, ThreadId};

    use super::*;

    /// Reports the thread that drops it.
    struct Reports(mpsc::Sender<ThreadId>);

    impl Drop for Reports {
        fn drop(&mut self) {
            self.0.send(thread::current().id()).unwrap();
        }
    }

    #[tokio::test]
    async fn a_session_that_is_given_up_ends_on_a_thread_that_may_block() {
        let (sender, dropped) = mpsc::channel();
        let held = DropBlocking(Some(Reports(sender)));
        let waiting = async move {
            let _held = held;
            std::future::pending::<()>().await;
        };
        assert!(tokio::time::timeout(std::time::Duration::from_millis(1), waiting).await.is_err());
        let dropped = tokio::task::spawn_blocking(move || dropped.recv()).await.unwrap().unwrap();
        assert_ne!(dropped, thread::current().id());
    }
}
