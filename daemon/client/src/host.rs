//! The client side of a guarded host. The host attests with its host key or its TPM, then exchanges protectors for
//! keys.
//!
//! [`Host`] asks one server. [`crate::failover`] asks several servers, by the rules of [`crate::retry`].
//! [`crate::host_files`] has the files that a host keeps on disk.

use std::sync::Arc;

use claviger_protocol::algorithm::{HostAlgorithms, KeyWrapping, Oaep, Sealing, SignatureAlgorithm};
use claviger_protocol::attestation::tpm::{first_request, parse_continue_reply, second_request};
use claviger_protocol::attestation::{self, ReceivedError};
use claviger_protocol::batch::{self, BatchRequest};
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

/// Paths for attestation, by the kind of proof.
const HOST_KEY_ATTEST: &str = "/Attestation/v2.0/hostkeyattest";
const TPM_ATTEST: &str = "/Attestation/v2.0/attest";

/// The proof that a host attests with.
#[derive(Clone)]
pub enum Proof {
    /// The host key, which is registered with the service.
    HostKey(Arc<RsaPrivateKey>),
    /// The TPM, whose endorsement key is registered with the service.
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

/// A host with its proof and its identity key.
pub struct Host {
    client: Client,
    proof: Proof,
    /// Health certificates certify this key, and the service encrypts transport keys to it.
    identity_key: Arc<RsaPrivateKey>,
}

/// Reasons why a host did not get a health certificate or keys.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The request got no reply.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The service refused the attestation.
    #[error("attestation refused with {status} {}: {}", reply.name, reply.message.as_deref().unwrap_or("no message"))]
    Attestation {
        /// The HTTP status.
        status: u16,
        /// The error in the body of the reply.
        reply: ReceivedError,
        /// Seconds until the host may try again, if the service says so.
        retry_after: Option<u16>,
    },
    /// The service refused the release.
    #[error("release refused with {status} {refusal}")]
    Release {
        /// The HTTP status.
        status: u16,
        /// The error in the body of the reply.
        refusal: Refusal,
    },
    /// The body of the reply is not an error of the protocol. The reply may come from a proxy between the host and the
    /// service.
    #[error("{server} answered with status {status} and no error of the protocol; is it the service's URL?")]
    Status {
        /// The server that was asked.
        server: String,
        /// The HTTP status.
        status: u16,
        /// Seconds until the host may try again, if the reply says so.
        retry_after: Option<u16>,
    },
    /// The reply cannot be parsed, the keys cannot be decrypted, or the keys do not belong to the protectors.
    #[error("the answer is not right: {0}")]
    Answer(String),
    /// The host's own keys do not work.
    #[error("the host's keys: {0}")]
    Key(String),
    /// The TPM of the host does not work, or its event log cannot be read.
    #[error(transparent)]
    Tpm(#[from] TpmError),
}

/// The result of a release.
pub struct Unwrapped {
    /// Both transport keys.
    pub keys: Payload,
    /// The new protector, to be used for the next release.
    pub egress_protector: Vec<u8>,
}

impl Host {
    /// Makes a host that asks the server of `client`.
    #[must_use]
    pub fn new(client: Client, proof: impl Into<Proof>, identity_key: Arc<RsaPrivateKey>) -> Self {
        Self { client, proof: proof.into(), identity_key }
    }

    /// The host and port of the server, for messages.
    #[must_use]
    pub fn server(&self) -> &str {
        self.client.server()
    }

    /// Attests as the registered host and returns a health certificate (DER).
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn attest(&self) -> Result<Vec<u8>, HostError> {
        let mut session = [0; 16];
        SystemRandom::new()
            .fill(&mut session)
            .map_err(|_| HostError::Key("the system has no randomness".to_owned()))?;
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

    /// Runs both steps of attestation with a TPM. The TPM is slow, so its work runs on a blocking thread.
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

    /// Posts an attestation request. An error reply becomes an error.
    async fn post_attestation(&self, path: &str, request: Vec<u8>) -> Result<Reply, HostError> {
        let reply = self.client.post(path, "application/json", request).await?;
        if reply.status == 200 {
            return Ok(reply);
        }
        let (status, retry_after) = (reply.status.as_u16(), reply.retry_after());
        let error = attestation::parse_error_reply(&reply.body).map_err(|_| self.foreign(&reply))?;
        Err(HostError::Attestation { status, reply: error, retry_after })
    }

    /// Exchanges a protector for its transport key and a new protector. Checks that both keys belong to their
    /// protectors.
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn roll(
        &self,
        api: ApiVersion,
        health_certificate: &[u8],
        protector: &[u8],
    ) -> Result<Unwrapped, HostError> {
        let request = RollRequest {
            ingress_protector: protector.to_vec(),
            health_certificate: health_certificate.to_vec(),
            algorithms: ALGORITHMS,
        };
        let path = format!("/KeyProtection/service/{}/RollTransportKey", api.as_str());
        let reply = self.client.post(&path, "application/xml", request.to_xml()).await?;
        if reply.status != 200 {
            return Err(self.refused(&reply));
        }
        let response = RollResponse::parse(&reply.body).map_err(|e| HostError::Answer(e.to_string()))?;
        self.open(vec![(request.ingress_protector, Ok(response))]).await?.remove(0)
    }

    /// Exchanges many protectors in one request. A refused protector does not affect the others.
    ///
    /// # Errors
    /// See [`HostError`]. A service that knows no batches answers with 404.
    pub async fn roll_batch(
        &self,
        health_certificate: &[u8],
        protectors: &[Vec<u8>],
    ) -> Result<Vec<Result<Unwrapped, HostError>>, HostError> {
        let request = BatchRequest {
            health_certificate: health_certificate.to_vec(),
            algorithms: ALGORITHMS,
            ingress_protectors: protectors.to_vec(),
        };
        let reply = self.client.post(ROLL_BATCH, "application/xml", request.to_xml()).await?;
        if reply.status != 200 {
            return Err(self.refused(&reply));
        }
        let results = batch::parse_results(&reply.body).map_err(|e| HostError::Answer(e.to_string()))?;
        if results.len() != protectors.len() {
            let text = format!("{} protectors were sent, and {} answers came", protectors.len(), results.len());
            return Err(HostError::Answer(text));
        }
        self.open(request.ingress_protectors.into_iter().zip(results).collect()).await
    }

    /// Opens what came for each protector that was sent. Opening is work for a processor, not for the thread that drives
    /// connections.
    async fn open(
        &self,
        exchanges: Vec<(Vec<u8>, Result<RollResponse, Refusal>)>,
    ) -> Result<Vec<Result<Unwrapped, HostError>>, HostError> {
        let identity_key = self.identity_key.clone();
        let one = move |(ingress, result): (Vec<u8>, Result<RollResponse, Refusal>)| match result {
            Ok(response) => open(&identity_key, &ingress, response),
            Err(refusal) => Err(HostError::Release { status: refusal.code.status(), refusal }),
        };
        let opened = tokio::task::spawn_blocking(move || exchanges.into_iter().map(one).collect());
        opened.await.map_err(|e| HostError::Answer(e.to_string()))
    }

    /// What a release that failed says.
    fn refused(&self, reply: &Reply) -> HostError {
        match Refusal::parse(&reply.body) {
            Ok(mut refusal) => {
                refusal.retry_after = reply.retry_after();
                HostError::Release { status: reply.status.as_u16(), refusal }
            }
            Err(_) => self.foreign(reply),
        }
    }

    fn foreign(&self, reply: &Reply) -> HostError {
        let (server, status) = (self.server().to_owned(), reply.status.as_u16());
        HostError::Status { server, status, retry_after: reply.retry_after() }
    }
}

/// Holds a value whose drop blocks, and drops it on a blocking thread. This also holds if the future that owns the
/// value is cancelled.
struct DropBlocking<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> Drop for DropBlocking<T> {
    fn drop(&mut self) {
        let Some(value) = self.0.take() else { return };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || drop(value));
        }
    }
}

/// Where many protectors are exchanged at once.
const ROLL_BATCH: &str = "/KeyProtection/service/v2.0/RollTransportKeys";

/// How keys travel to this host.
const ALGORITHMS: HostAlgorithms = HostAlgorithms {
    transfer: Oaep::SHA256,
    wrapping: KeyWrapping::Seal(Sealing::Aes256Gcm),
    transport: Sealing::Aes256Gcm,
};

/// Returns the keys of a reply, after the check that they belong to the ingress protector and to the egress protector.
fn open(identity_key: &RsaPrivateKey, ingress: &[u8], response: RollResponse) -> Result<Unwrapped, HostError> {
    let transfer_key = identity_key.decrypt_oaep(ALGORITHMS.transfer, &response.keys.transfer_key);
    let transfer_key = transfer_key.map_err(|e| HostError::Answer(e.to_string()))?;
    let keys = response.keys.open(&transfer_key, ALGORITHMS.wrapping, ALGORITHMS.transport);
    let keys = keys.map_err(|e| HostError::Answer(e.to_string()))?;
    prove(ingress, &keys.ingress, &response.egress_protector, &keys.egress).map_err(HostError::Answer)?;
    Ok(Unwrapped { keys, egress_protector: response.egress_protector })
}

/// What a host asks for when it attests.
const WANTED: [ResultType; 1] = [ResultType::EncryptionCertificate];

fn unreadable(error: attestation::ReplyError) -> HostError {
    HostError::Answer(error.to_string())
}

/// Checks that each key made the transport-key signature of its protector, that every guardian of the old protector is
/// a guardian of the new one, and that one of them signed the new protector. A host that stored any other protector
/// could lose the secrets of the virtual machine.
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

    /// Sends the id of the thread that drops it.
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
