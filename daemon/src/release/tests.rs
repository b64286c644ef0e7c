//! Releases with software keys: order of the checks, snapshot, charges, records.

#![allow(clippy::unwrap_used)]

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use claviger_hsm::{REJECTION_QUORUM, standstill};
use claviger_protocol::algorithm::{OAEP_MGF1P, Oaep, SignatureAlgorithm};
use claviger_protocol::build::{Unsigned, fresh_transport_key};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::payload::ApiVersion;
use claviger_protocol::protector::{Protector, TransportKey, Wrapping};
use claviger_protocol::request::{RollRequest, RollResponse};
use data_encoding::{BASE64, HEXLOWER};
use tempfile::TempDir;

use super::testing::{HOST, Incident, MEMBER, Operation, Stage, guardian};
use super::{Grant, decide, outcomes, roll};
use crate::admission::HostAt;
use crate::config::Config;
use crate::request::Attempt;
use crate::service::Service;
use crate::store::{Kind, Labels, State, StateError};
use crate::sys::clock::unix_now;

mod charges;
mod order;
mod records;
mod snapshot;
mod stock;
mod times;

/// Address of the host's requests.
const ADDRESS: &str = "192.0.2.1";

fn stage() -> (TempDir, Stage) {
    stage_with(|_| {})
}

fn stage_with(configure: impl FnOnce(&mut Config)) -> (TempDir, Stage) {
    let folder = folder();
    let stage = Stage::new(folder.path(), |config| {
        config.audit.reserve_mib = 0;
        configure(config);
    });
    (folder, stage)
}

/// A temporary folder, in memory if possible: hundreds of services are opened, and each syncs its state.
fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn attempt() -> Attempt {
    let address: IpAddr = ADDRESS.parse().unwrap();
    Attempt::new(crate::sys::id::request_id()).sent_from(Some(address))
}

/// The host at the address of [`attempt`].
fn host() -> HostAt {
    HostAt::new(HOST, &attempt())
}

/// Takes so many tokens that none comes back while a test runs. The host's rate must be 1.
fn exhaust_rate(service: &Service) {
    service.admission.charge_decryptions(&host(), usize::MAX);
}

/// Runs a release without its decision.
async fn asked(stage: &Stage, body: &[u8], attempt: &mut Attempt) -> Result<Grant, Refusal> {
    roll(&stage.service, &stage.hsm, ApiVersion::V2, body, attempt).await
}

/// Runs a release from request to reply.
async fn released(stage: &Stage, body: &[u8]) -> Result<RollResponse, Refusal> {
    let mut attempt = attempt();
    let result = asked(stage, body, &mut attempt).await;
    decide(&stage.service, ApiVersion::V2, &attempt, result).await
}

/// Makes a change as an administrator; it is in effect when this returns.
fn change<T>(service: &Service, work: impl FnOnce(&mut State) -> Result<T, StateError>) {
    service.registry.with_state(work).unwrap();
    service.registry.follow().unwrap();
}

fn configure(service: &Service, work: impl FnOnce(&mut Config)) {
    let mut config = Config::clone(&service.config.load());
    work(&mut config);
    service.config.store(Arc::new(config));
}

fn thumbprint(certificate: &Certificate) -> String {
    HEXLOWER.encode(&certificate.thumbprint())
}

/// Something that an administrator may withdraw or restore during a release.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Withdrawal {
    Host,
    EncryptionKey,
    SigningKey,
    Label,
    Signer,
}

impl Withdrawal {
    const ALL: [Self; 5] = [Self::Host, Self::EncryptionKey, Self::SigningKey, Self::Label, Self::Signer];

    fn code(self) -> Code {
        match self {
            Self::Host | Self::Signer => Code::HealthCertificate,
            Self::EncryptionKey | Self::SigningKey | Self::Label => Code::InvalidWrapping,
        }
    }

    /// Withdraws or restores it.
    fn set(self, service: &Service, withdrawn: bool) {
        let guardian = guardian();
        let (encryption, signing) =
            (thumbprint(&guardian.encryption_certificate), thumbprint(&guardian.signing_certificate));
        let labels: Labels = if withdrawn { "site=x".parse().unwrap() } else { Labels::default() };
        match self {
            Self::Host => change(service, |state| state.enable_host(HOST, !withdrawn)),
            Self::EncryptionKey => {
                change(service, |state| state.enable_certificate(Kind::Encryption, &encryption, !withdrawn));
            }
            Self::SigningKey => {
                change(service, |state| state.enable_certificate(Kind::Signing, &signing, !withdrawn));
            }
            Self::Label => {
                change(service, |state| state.limit_certificate(Kind::Encryption, &encryption, &labels));
            }
            Self::Signer if withdrawn => change(service, |state| {
                let signer = state.signers()?.remove(0).thumbprint;
                state.revoke_signer(&signer, true, unix_now())
            }),
            Self::Signer => unreachable!("a signer that was revoked never comes back"),
        }
    }
}

/// A protector with these wrappings, signed by the owner. `cipher` changes the guardian's ciphertext.
fn signed_by_owner(
    stage: &Stage,
    wrappings: &[Wrapping],
    key: &TransportKey,
    cipher: impl FnOnce(&[u8]) -> Vec<u8>,
    badly: bool,
) -> Vec<u8> {
    let (owner, algorithm) = (stage.owner(), SignatureAlgorithm::DEFAULT);
    let recipients = [owner, stage.guardian()].map(|party| party.encryption_key.public());
    let unsigned = Unsigned::new(wrappings, recipients, key, 0).unwrap();
    let draft = Protector::parse(&unsigned.finish(1, algorithm, vec![1]).unwrap()).unwrap();
    let right = &draft.wrappings[1].cipher_value;
    let (old, new) = (BASE64.encode(right), BASE64.encode(&cipher(right)));
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap().replace(&old, &new).into_bytes();
    let mut signature = owner.signing_key.sign(algorithm, &text(&unsigned.signed_octets())).unwrap();
    signature[9] ^= u8::from(badly);
    text(&unsigned.finish(1, algorithm, signature).unwrap())
}

/// A ciphertext that does not decrypt.
fn garbled(cipher: &[u8]) -> Vec<u8> {
    let mut cipher = cipher.to_vec();
    cipher[100] ^= 4;
    cipher
}

/// A ciphertext that decrypts to a key with which nothing was signed.
fn another_key(stage: &Stage) -> Vec<u8> {
    let key = fresh_transport_key().unwrap();
    stage.guardian().encryption_key.public().encrypt_oaep(Oaep::SHA1, &key[..]).unwrap()
}

/// A protector in which only the transport key is wrong.
fn with_wrong_key(stage: &Stage) -> Vec<u8> {
    let (file, key) = stage.owner().create(&[stage.metadata()]).unwrap();
    let wrappings = Protector::parse(&file).unwrap().wrappings;
    signed_by_owner(stage, &wrappings, &key, |_| another_key(stage), false)
}

#[tokio::test]
async fn a_release_gives_the_host_both_keys_and_its_parties_a_new_protector() {
    let (_folder, stage) = stage();
    let (protector, ingress) = stage.owner().create(&[stage.metadata()]).unwrap();
    let response = released(&stage, &stage.request(&protector).to_xml()).await.unwrap();
    let keys = stage.open(&response);
    assert_eq!(*keys.ingress, *ingress);
    assert_ne!(*keys.egress, *ingress);
    for party in [stage.owner(), stage.guardian()] {
        assert_eq!(*party.open(&response.egress_protector).unwrap(), *keys.egress);
    }
    let (before, after) =
        (Protector::parse(&protector).unwrap(), Protector::parse(&response.egress_protector).unwrap());
    assert_eq!(after.wrappings[after.guardian].id, 2, "this service's wrapping");
    for (before, after) in before.wrappings.iter().zip(&after.wrappings) {
        assert_eq!(before.signing_certificate, after.signing_certificate);
        assert_eq!(before.encryption_certificate, after.encryption_certificate);
    }
    assert_eq!([Operation::Decrypt, Operation::Sign].map(|kind| stage.hsm.asked(kind)), [1, 1]);
    // The next release starts with the protector from the last one.
    let second = released(&stage, &stage.request(&response.egress_protector).to_xml()).await.unwrap();
    assert_eq!(*stage.open(&second).ingress, *keys.egress);
}

#[tokio::test]
async fn what_an_hsm_gets_wrong_never_leaves() {
    let (_folder, stage) = stage();
    let (protector, ingress) = stage.owner().create(&[stage.metadata()]).unwrap();
    let request = stage.request(&protector).to_xml();
    for operation in [Operation::Decrypt, Operation::Sign] {
        for incident in [Incident::IsWrong, Incident::Fails] {
            stage.hsm.plan(operation, incident);
            let refusal = released(&stage, &request).await.unwrap_err();
            assert_eq!(refusal.code, Code::ServiceUnavailable, "{operation:?}");
        }
    }
    let response = released(&stage, &request).await.unwrap();
    assert_eq!(*stage.open(&response).ingress, *ingress);
}
