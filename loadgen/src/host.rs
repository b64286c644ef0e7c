//! The requests and replies of a guarded host.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use claviger_protocol::algorithm::{HostAlgorithms, KeyWrapping, Oaep, Sealing, SignatureAlgorithm};
use claviger_protocol::attestation;
use claviger_protocol::attestation::tpm::{first_request, parse_continue_reply, second_request};
use claviger_protocol::batch::BatchRequest;
use claviger_protocol::error::Refusal;
use claviger_protocol::health::ResultType;
use claviger_protocol::payload::{ApiVersion, Payload};
use claviger_protocol::request::{RollRequest, RollResponse};
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_protocol::tpm::context::{self, Context, Kind};
use claviger_protocol::tpm::credential::Protected;
use claviger_protocol::tpm::evidence::{Evidence, qualifying_data};
use claviger_protocol::tpm::log::{Log, short_boot};
use claviger_protocol::tpm::pcr::PcrSet;
use claviger_protocol::tpm::software::SoftwareTpm;
use data_encoding::HEXLOWER;
use ring::rand::{SecureRandom, SystemRandom};

use crate::Failure;
use crate::http::{Client, Reply};

/// The algorithms with which keys are encrypted to these hosts.
pub const ALGORITHMS: HostAlgorithms = HostAlgorithms {
    transfer: Oaep::SHA256,
    wrapping: KeyWrapping::Seal(Sealing::Aes256Gcm),
    transport: Sealing::Aes256Gcm,
};
/// The path of the metadata document.
pub const METADATA: &str = "/KeyProtection/service/metadata/2014-07/metadata.xml";
/// The path of a batch request.
const ROLL_BATCH: &str = "/KeyProtection/service/v2.0/RollTransportKeys";

/// The proof that a host attests with.
pub enum HostProof {
    /// A host key.
    HostKey(Box<RsaPrivateKey>),
    /// A software TPM that booted [`boot_log`].
    Tpm(Box<SoftwareTpm>),
}

/// The proof of a host, and its identity key.
pub type HostKeys = (HostProof, Arc<RsaPrivateKey>);

/// The name of the baseline of hosts with software TPMs.
pub const BASELINE: &str = "loadgen";

/// The event log of every host with a software TPM.
#[must_use]
pub fn boot_log() -> Vec<u8> {
    short_boot("claviger-loadgen firmware", "claviger-loadgen kernel")
}

/// The PCRs of that boot that a baseline contains: number, and value in hex.
///
/// # Errors
/// The log cannot be parsed.
pub fn boot_pcrs() -> Result<BTreeMap<usize, String>, Failure> {
    let values = Log::parse(&boot_log())?.replay();
    let pcr = |pcr| Some((pcr, HEXLOWER.encode(values.get(pcr)?)));
    Ok(PcrSet::ALWAYS.iter().filter_map(pcr).collect())
}

impl HostProof {
    /// Makes a TPM with this endorsement key that booted [`boot_log`].
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn tpm(endorsement_key: RsaPrivateKey) -> Result<Self, Failure> {
        let mut tpm = SoftwareTpm::new(endorsement_key).map_err(|_| "the system has no randomness")?;
        tpm.pcrs = Log::parse(&boot_log())?.replay();
        Ok(Self::Tpm(Box::new(tpm)))
    }
}

/// A host that has attested.
pub struct Host {
    /// The key that transport keys are encrypted to.
    pub identity: Arc<RsaPrivateKey>,
    /// The health certificate (DER).
    pub health_certificate: Vec<u8>,
}

impl Host {
    /// Attests as the registered host.
    ///
    /// # Errors
    /// The service refuses, or does not answer.
    pub async fn attest(client: &Client, proof: &HostProof, identity: Arc<RsaPrivateKey>) -> Result<Self, Failure> {
        let mut session = [0; 16];
        SystemRandom::new().fill(&mut session).map_err(|_| "the system has no randomness")?;
        let id = identity.public().spki_der();
        let reply = match proof {
            HostProof::HostKey(host_key) => {
                let host = host_key.public().spki_der();
                let signature = host_key.sign(SignatureAlgorithm::DEFAULT, &attestation::signed_octets(host, id))?;
                let request = attestation::host_key_request(session, &[WANTED], host, id, &signature);
                ask(client, "/Attestation/v2.0/hostkeyattest", request).await?
            }
            HostProof::Tpm(tpm) => by_tpm(client, tpm, session, id).await?,
        };
        let content = attestation::parse_health_certificate_reply(&reply.body)?;
        let certificate = content.into_iter().find(|(kind, _)| *kind == WANTED.number());
        let (_, health_certificate) = certificate.ok_or("attestation gave no encryption certificate")?;
        Ok(Self { identity, health_certificate })
    }

    /// The path and the body of a request for the keys of `protectors`: one protector, or a batch.
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

/// The result that a host requests when it attests.
const WANTED: ResultType = ResultType::EncryptionCertificate;

/// Runs both steps of attestation with a TPM.
async fn by_tpm(client: &Client, tpm: &SoftwareTpm, session: [u8; 16], identity: &[u8]) -> Result<Reply, Failure> {
    const PATH: &str = "/Attestation/v2.0/attest";
    let endorsement_key = tpm.endorsement_key().public().spki_der();
    let context = context::write(&[(Kind::AkPublic, tpm.ak_public())]);
    let reply = ask(client, PATH, first_request(session, &[WANTED], endorsement_key, &context)).await?;
    let received = parse_continue_reply(&reply.body)?;
    let received = Context::parse(&received)?;
    let kinds = [Kind::State, Kind::IdObject, Kind::EncryptedSecret, Kind::PcrSelection];
    let [state, id_object, secret, selection] = received.exactly(kinds)?;
    let credential = tpm.activate(&Protected { id_object: id_object.to_vec(), encrypted_secret: secret.to_vec() })?;
    let nonce = qualifying_data(&credential, &session, identity);
    let quoted = tpm.quote_of(&nonce, PcrSet::from_selection(selection)?);
    let (quote, signature, values) = quoted.map_err(|_| "the system has no randomness")?;
    let evidence =
        Evidence { state, quote: &quote, signature: &signature, pcr_values: &values.to_bytes(), log: &boot_log() };
    ask(client, PATH, second_request(session, &[WANTED], endorsement_key, identity, &evidence.to_context())).await
}

/// Posts an attestation request.
///
/// # Errors
/// The service refuses, or does not answer.
async fn ask(client: &Client, path: &str, request: Vec<u8>) -> Result<Reply, Failure> {
    let reply = client.post(path, "application/json", request).await?;
    if reply.status == 200 {
        return Ok(reply);
    }
    let error = attestation::parse_error_reply(&reply.body)?;
    let message = error.message.unwrap_or_default();
    let advice = match (error.expected_operation_mode, error.name.as_str()) {
        (Some(1), _) => "the service is in TPM mode: use --tpm",
        (Some(_), _) => "the service is not in TPM mode: leave out --tpm",
        (None, "PolicyEvaluationErrorReply") => {
            "is the baseline loadgen enabled there (claviger-loadgen prepare --tpm)?"
        }
        (None, _) => "is the host registered there (claviger-loadgen prepare), and is the service ready?",
    };
    Err(format!("attestation refused with {} {}: {message}; {advice}", reply.status.as_u16(), error.name).into())
}

/// Decrypts both transport keys of a reply with the host's identity key.
///
/// # Errors
/// A sentence that describes the problem.
pub fn open(response: &RollResponse, identity: &RsaPrivateKey) -> Result<Payload, String> {
    let transfer_key = identity.decrypt_oaep(ALGORITHMS.transfer, &response.keys.transfer_key);
    let transfer_key = transfer_key.map_err(|_| "the transfer key does not decrypt".to_owned())?;
    let keys = response.keys.open(&transfer_key, ALGORITHMS.wrapping, ALGORITHMS.transport);
    keys.map_err(|_| "the transport keys do not decrypt".to_owned())
}

/// The code under which a refusal is counted. If the body is not an error of the protocol, the code is the status.
#[must_use]
pub(crate) fn error_code(reply: &Reply) -> String {
    let bare = |_| format!("Http{}", reply.status.as_u16());
    Refusal::parse(&reply.body).map_or_else(bare, |refusal| refusal.code.as_str().to_owned())
}
