//! What a guarded host says and understands.

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

/// What a host attests with.
pub enum HostProof {
    /// A host key.
    HostKey(Box<RsaPrivateKey>),
    /// A TPM in software, which booted [`boot_log`].
    Tpm(Box<SoftwareTpm>),
}

/// What a host attests with, and its identity key.
pub type HostKeys = (HostProof, Arc<RsaPrivateKey>);

/// The baseline of hosts with TPMs in software.
pub const BASELINE: &str = "loadgen";

/// What every host with a TPM booted, as its log tells.
#[must_use]
pub fn boot_log() -> Vec<u8> {
    short_boot("claviger-loadgen firmware", "claviger-loadgen kernel")
}

/// The PCRs of that boot that every baseline has: numbers, and values in hex.
///
/// # Errors
/// None, as long as the log can be read.
pub fn boot_pcrs() -> Result<BTreeMap<usize, String>, Failure> {
    let values = Log::parse(&boot_log())?.replay();
    let pcr = |pcr| Some((pcr, HEXLOWER.encode(values.get(pcr)?)));
    Ok(PcrSet::ALWAYS.iter().filter_map(pcr).collect())
}

impl HostProof {
    /// A TPM with this endorsement key that booted [`boot_log`].
    ///
    /// # Errors
    /// When the system has no randomness.
    pub fn tpm(endorsement_key: RsaPrivateKey) -> Result<Self, Failure> {
        let mut tpm = SoftwareTpm::new(endorsement_key).map_err(|_| "the system has no randomness")?;
        tpm.pcrs = Log::parse(&boot_log())?.replay();
        Ok(Self::Tpm(Box::new(tpm)))
    }
}

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

/// What hosts have certified.
const WANTED: ResultType = ResultType::EncryptionCertificate;

/// Both steps of attestation by TPM.
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

/// Posts an attestation.
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
        (Some(1), _) => "the service is in TPM mode: say --tpm",
        (Some(_), _) => "the service is not in TPM mode: leave out --tpm",
        (None, "PolicyEvaluationErrorReply") => {
            "is the baseline loadgen enabled there (claviger-loadgen prepare --tpm)?"
        }
        (None, _) => "is the host registered there (claviger-loadgen prepare), and is the service ready?",
    };
    Err(format!("attestation refused with {} {}: {message}; {advice}", reply.status.as_u16(), error.name).into())
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
pub fn error_code(reply: &Reply) -> String {
    let bare = |_| format!("Http{}", reply.status.as_u16());
    Refusal::parse(&reply.body).map_or_else(bare, |refusal| refusal.code.as_str().to_owned())
}
