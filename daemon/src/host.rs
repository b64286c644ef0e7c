//! A guarded host, as the service sees one: attests with its host key, then exchanges protectors for keys.

use std::sync::Arc;

use claviger_protocol::algorithm::{HostAlgorithms, KeyWrapping, Oaep, Sealing, SignatureAlgorithm};
use claviger_protocol::attestation::{self, ReceivedError};
use claviger_protocol::error::Refusal;
use claviger_protocol::health::ResultType;
use claviger_protocol::payload::{ApiVersion, Payload};
use claviger_protocol::request::{RollRequest, RollResponse};
use claviger_protocol::rsa_key::RsaPrivateKey;
use ring::rand::{SecureRandom, SystemRandom};

use crate::client::{Client, ClientError};

/// A host with its two keys.
pub struct Host {
    client: Client,
    /// What it is registered with.
    host_key: RsaPrivateKey,
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
    },
    /// The release was refused.
    #[error("release refused with {status} {refusal}")]
    Release {
        /// The HTTP status.
        status: u16,
        /// What the service said.
        refusal: Refusal,
    },
    /// An answer that cannot be understood, or keys that do not open.
    #[error("the answer is not right: {0}")]
    Answer(String),
    /// The host's own keys do not work.
    #[error("the host's keys: {0}")]
    Key(String),
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
    pub fn new(client: Client, host_key: RsaPrivateKey, identity_key: Arc<RsaPrivateKey>) -> Self {
        Self { client, host_key, identity_key }
    }

    /// Proves to be the registered host and gets a health certificate (DER).
    ///
    /// # Errors
    /// See [`HostError`].
    pub async fn attest(&self) -> Result<Vec<u8>, HostError> {
        let mut session = [0; 16];
        SystemRandom::new().fill(&mut session).map_err(|_| HostError::Key("no randomness".to_owned()))?;
        let (host, identity) = (self.host_key.public().spki_der(), self.identity_key.public().spki_der());
        let signature = self
            .host_key
            .sign(SignatureAlgorithm::DEFAULT, &attestation::signed_octets(host, identity))
            .map_err(|e| HostError::Key(e.to_string()))?;
        let request =
            attestation::host_key_request(session, &[ResultType::EncryptionCertificate], host, identity, &signature);
        let reply = self.client.post("/Attestation/v2.0/hostkeyattest", "application/json", request).await?;
        let unreadable = |e: attestation::ReplyError| HostError::Answer(e.to_string());
        if reply.status != 200 {
            let status = reply.status.as_u16();
            let reply = attestation::parse_error_reply(&reply.body).map_err(unreadable)?;
            return Err(HostError::Attestation { status, reply });
        }
        let content = attestation::parse_health_certificate_reply(&reply.body).map_err(unreadable)?;
        let certificate = content.into_iter().find(|(kind, _)| *kind == ResultType::EncryptionCertificate.number());
        Ok(certificate.ok_or_else(|| HostError::Answer("no encryption certificate".to_owned()))?.1)
    }

    /// Exchanges a protector for its transport key and a fresh protector.
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
            let status = reply.status.as_u16();
            return Err(HostError::Release { status, refusal: Refusal::parse(&reply.body).map_err(unreadable)? });
        }
        let response = RollResponse::parse(&reply.body).map_err(unreadable)?;
        // Opening is work for a processor, not for the thread that drives connections.
        let identity_key = self.identity_key.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let transfer_key = identity_key.decrypt_oaep(algorithms.transfer, &response.keys.transfer_key);
            let transfer_key = transfer_key.map_err(|e| HostError::Answer(e.to_string()))?;
            let keys = response.keys.open(&transfer_key, algorithms.wrapping, algorithms.transport);
            let keys = keys.map_err(|e| HostError::Answer(e.to_string()))?;
            Ok(Unwrapped { keys, egress_protector: response.egress_protector })
        });
        opened.await.map_err(|e| HostError::Answer(e.to_string()))?
    }
}
