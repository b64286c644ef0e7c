//! What a guarded host says and understands.

use std::sync::Arc;

use bytes::Bytes;
use claviger_protocol::algorithm::{HostAlgorithms, KeyWrapping, Oaep, Sealing, SignatureAlgorithm};
use claviger_protocol::attestation;
use claviger_protocol::batch::BatchRequest;
use claviger_protocol::error::Refusal;
use claviger_protocol::health::ResultType;
use claviger_protocol::payload::{ApiVersion, Payload};
use claviger_protocol::request::{RollRequest, RollResponse};
use claviger_protocol::rsa_key::RsaPrivateKey;
use ring::rand::{SecureRandom, SystemRandom};

use crate::Failure;
use crate::http::Client;

/// How keys shall travel to the hosts here.
pub const ALGORITHMS: HostAlgorithms = HostAlgorithms {
    transfer: Oaep::SHA256,
    wrapping: KeyWrapping::Seal(Sealing::Aes256Gcm),
    transport: Sealing::Aes256Gcm,
};
/// The path of the metadata document.
pub const METADATA: &str = "/KeyProtection/service/metadata/2014-07/metadata.xml";
/// The path of a batch.
const ROLL_BATCH: &str = "/KeyProtection/service/v2.0/RollTransportKeys";

/// A host that proved its health.
pub struct Host {
    /// What keys are encrypted to.
    pub identity: Arc<RsaPrivateKey>,
    /// DER.
    pub health_certificate: Vec<u8>,
}

impl Host {
    /// Proves to be the registered host.
    ///
    /// # Errors
    /// The service refuses, or does not answer.
    pub async fn attest(
        client: &Client,
        host_key: &RsaPrivateKey,
        identity: Arc<RsaPrivateKey>,
    ) -> Result<Self, Failure> {
        let mut session = [0; 16];
        SystemRandom::new().fill(&mut session).map_err(|_| "the system has no randomness")?;
        let (host, id) = (host_key.public().spki_der(), identity.public().spki_der());
        let signature = host_key.sign(SignatureAlgorithm::DEFAULT, &attestation::signed_octets(host, id))?;
        let wanted = ResultType::EncryptionCertificate;
        let request = attestation::host_key_request(session, &[wanted], host, id, &signature);
        let reply = client.post("/Attestation/v2.0/hostkeyattest", "application/json", request.into()).await?;
        if reply.status != 200 {
            let error = attestation::parse_error_reply(&reply.body)?;
            let message = error.message.unwrap_or_default();
            return Err(format!(
                "attestation refused with {} {}: {message}; is the host registered there (claviger-loadgen prepare), and is \
                 the service ready?",
                reply.status, error.name
            )
            .into());
        }
        let content = attestation::parse_health_certificate_reply(&reply.body)?;
        let certificate = content.into_iter().find(|(kind, _)| *kind == wanted.number());
        let (_, health_certificate) = certificate.ok_or("attestation gave no encryption certificate")?;
        Ok(Self { identity, health_certificate })
    }

    /// The path and the body that ask for these protectors' keys: one, or a batch.
    #[must_use]
    pub fn request(&self, api: ApiVersion, batch: bool, protectors: &[Arc<Vec<u8>>]) -> (String, Bytes) {
        let health_certificate = self.health_certificate.clone();
        match protectors {
            [protector] if !batch => {
                let request =
                    RollRequest { ingress_protector: protector.to_vec(), health_certificate, algorithms: ALGORITHMS };
                (format!("/KeyProtection/service/{}/RollTransportKey", api.as_str()), request.to_xml().into())
            }
            _ => {
                let ingress_protectors = protectors.iter().map(|protector| protector.to_vec()).collect();
                let request = BatchRequest { health_certificate, algorithms: ALGORITHMS, ingress_protectors };
                (ROLL_BATCH.to_owned(), request.to_xml().into())
            }
        }
    }
}

/// Both transport keys of an answer, as only the host with this identity key can read them.
///
/// # Errors
/// A sentence.
pub fn open(response: &RollResponse, identity: &RsaPrivateKey) -> Result<Payload, String> {
    let transfer_key = identity.decrypt_oaep(ALGORITHMS.transfer, &response.keys.transfer_key);
    let transfer_key = transfer_key.map_err(|_| "the transfer key does not decrypt".to_owned())?;
    let keys = response.keys.open(&transfer_key, ALGORITHMS.wrapping, ALGORITHMS.transport);
    keys.map_err(|_| "the transport keys do not decrypt".to_owned())
}

/// How a refusal is counted: its code, or the bare status where the body is none of the protocol's.
#[must_use]
pub fn error_code(status: u16, body: &[u8]) -> String {
    Refusal::parse(body).map_or_else(|_| format!("Http{status}"), |refusal| refusal.code.as_str().to_owned())
}
