//! Creates keys in an HSM, and requests for their certificates.

use std::sync::Arc;
use std::time::Duration;

use claviger_hsm::{HsmError, KeyId, KeyRef, KeyUsage as HsmKeyUsage, MemberState, NewKey, standstill};
use claviger_protocol::certificate::build::{DistinguishedName, Template, random_serial, request_to_pem};
use claviger_protocol::certificate::{Certificate, KeyUsage};
use claviger_protocol::rsa_key::RsaPublicKey;
use data_encoding::HEXLOWER;
use ring::rand::{SecureRandom, SystemRandom};
use serde_json::{Value, json};

use super::token_keys::{key_id, lacking, public_of, sentence};
use crate::admin::handlers::change::{Change, FAILED};
use crate::admin::handlers::hsm;
use crate::observe::audit::{Peer, SUCCESS};
use crate::registry::keys::{RSA_BITS, SERVER_AUTHENTICATION, key_ref};
use crate::service::Service;
use crate::signing::{self, OWN_DEADLINE};
use crate::store::Kind;
use crate::sys::clock::unix_now;

/// Outcomes in the audit trail beside success and failure: the key was made, and not all members have it; the HSM did not
/// say in time whether it made the key.
const INCOMPLETE: &str = "incomplete";
const UNKNOWN: &str = "unknown";

/// Time limit for the vendor's replication of a key that one member generated, and the interval of the checks.
const REPLICATION: Duration = Duration::from_secs(20);
const ASK_EVERY: Duration = Duration::from_secs(1);

pub(in crate::admin::handlers) async fn generate(
    service: &Arc<Service>,
    kind: Kind,
    bits: u32,
    name: Option<String>,
    member: Option<String>,
    peer: Peer,
) -> Result<Value, String> {
    if !RSA_BITS.contains(&bits) {
        return Err("an RSA key has 2048, 3072 or 4096 bits".to_owned());
    }
    if let Some(member) = &member {
        hsm::known(service, member)?;
    }
    let label = name.unwrap_or_else(|| format!("claviger {kind}"));
    if !(1..=64).contains(&label.len()) || label.chars().any(char::is_control) {
        return Err("the key's name has 1 to 64 characters and no control characters".to_owned());
    }
    let up = service.cluster.members().into_iter().find(|member| member.state == MemberState::Up);
    let on = member.clone().or(up.map(|member| member.name)).ok_or("no HSM is up to make a key in")?;
    let mut id = [0; 20];
    SystemRandom::new().fill(&mut id).map_err(|_| "no randomness".to_owned())?;
    let id = KeyId(id.to_vec());
    let mut change = Change::new("keys.generate", peer);
    change.attempt.used(&on);
    change.attempt.change = Some(format!("{kind} key {id} of {bits} bits"));
    change.requested(service).await?;
    // A decryption key must also sign: the certificate request proves possession of the key with a signature.
    let usage = match kind {
        Kind::Signing => HsmKeyUsage::Sign,
        Kind::Encryption => HsmKeyUsage::Both,
    };
    let spec = NewKey { id: id.clone(), label, bits, usage };
    let made = match service.cluster.generate_rsa(&on, spec).await {
        Ok(made) => made,
        Err(failure) => {
            // A call that was given up may still end with a key.
            let outcome = if is_given_up(&failure.error) { UNKNOWN } else { FAILED };
            change.done(service, outcome).await;
            let unknown = "; whether the key was made is not known, `claviger keys list --hsm` will show it";
            let hint = if outcome == UNKNOWN { unknown } else { "" };
            return Err(format!("{on} made no key: {failure}{hint}"));
        }
    };
    let public = match RsaPublicKey::from_components(&made.n, &made.e) {
        Ok(public) => public,
        Err(error) => {
            change.done(service, FAILED).await;
            return Err(format!("{on} made a bad key: {error}"));
        }
    };

    let until = standstill::now() + REPLICATION;
    let key = key_ref(&id.0, &public);
    let mut missing = lacking(service, &key).await;
    while member.is_none() && !missing.is_empty() && standstill::now() < until {
        tokio::time::sleep(ASK_EVERY).await;
        missing = lacking(service, &key).await;
    }
    let is_incomplete = member.is_none() && !missing.is_empty();
    change.done(service, if is_incomplete { INCOMPLETE } else { SUCCESS }).await;
    if is_incomplete {
        return Err(format!(
            "the key {id} was made on {on}, but not all members show it: {}. A key that an HSM made cannot be copied by \
             claviger: replicate it with the vendor's tools and use it as --hsm-key {id}, or bring a key from outside with \
             claviger keys add --pfx. To make one on a single member anyway, use --member",
            sentence(&missing)
        ));
    }
    Ok(json!({
        "hsm_key": id.to_string(),
        "kind": kind,
        "bits": bits,
        "member": on,
        "public_key": public.to_pem(),
        "lacking": missing.iter().map(|lack| &lack.member).collect::<Vec<_>>(),
    }))
}

pub(in crate::admin::handlers) async fn request(
    service: &Arc<Service>,
    hsm_key: &str,
    subject: &str,
    dns_names: Vec<String>,
    peer: Peer,
) -> Result<Value, String> {
    let id = key_id(hsm_key)?;
    if let Some(wrong) = dns_names.iter().find(|name| !is_dns_name(name)) {
        return Err(format!("{wrong:?} is not a DNS name"));
    }
    let template = Template { dns_names, ..template(service, &id, subject, 0).await? };
    let unsigned = template.to_be_requested().map_err(|e| e.to_string())?;
    let der = unsigned.assemble(
        &signed(service, "keys.csr", &key_ref(&id.0, &template.key), &template.key, unsigned.octets(), peer).await?,
    );
    Ok(json!({"hsm_key": id.to_string(), "pem": request_to_pem(&der)}))
}

pub(in crate::admin::handlers) async fn self_sign(
    service: &Arc<Service>,
    hsm_key: &str,
    subject: &str,
    days: u32,
    peer: Peer,
) -> Result<Value, String> {
    let id = key_id(hsm_key)?;
    let template = template(service, &id, subject, days).await?;
    let unsigned = template.to_be_signed().map_err(|e| e.to_string())?;
    let der = unsigned.assemble(
        &signed(service, "keys.self-sign", &key_ref(&id.0, &template.key), &template.key, unsigned.octets(), peer)
            .await?,
    );
    let made = Certificate::parse(&der).map_err(|e| e.to_string())?;
    Ok(json!({"hsm_key": id.to_string(), "pem": made.to_pem(), "thumbprint": HEXLOWER.encode(&made.thumbprint())}))
}

/// Whether the call may still have an effect at the token.
fn is_given_up(error: &HsmError) -> bool {
    matches!(error, HsmError::Hung(_) | HsmError::Deadline | HsmError::Worker(_))
}

/// Letters, digits and hyphens between dots; the first label may be `*`.
fn is_dns_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    name.len() <= 253 && name.strip_prefix("*.").unwrap_or(name).split('.').all(label)
}

/// The template of a certificate for a key that a member has.
async fn template(service: &Arc<Service>, id: &KeyId, subject: &str, days: u32) -> Result<Template, String> {
    let key = public_of(service, id).await?;
    if subject.len() > 1024 || subject.chars().any(char::is_control) {
        return Err("a name has at most 1024 bytes and no control characters".to_owned());
    }
    let subject = DistinguishedName::parse(subject).map_err(|e| e.to_string())?;
    if subject.common_name.len() > 64 {
        return Err("a common name has at most 64 bytes".to_owned());
    }
    let now = unix_now();
    Ok(Template {
        subject,
        issuer_der: None,
        key,
        serial: random_serial().map_err(|e| e.to_string())?,
        not_before: now - 300,
        not_after: now + i64::from(days) * 24 * 3600,
        key_usage: KeyUsage::DIGITAL_SIGNATURE | KeyUsage::DATA_ENCIPHERMENT,
        extended_key_usages: vec![SERVER_AUTHENTICATION],
        ca: None,
        subject_key_id: None,
        authority_key_id: None,
        dns_names: Vec::new(),
    })
}

/// Makes a signature that an administrator requested, with audit records like a change.
async fn signed(
    service: &Arc<Service>,
    event: &'static str,
    key: &KeyRef,
    public: &RsaPublicKey,
    octets: &[u8],
    peer: Peer,
) -> Result<Vec<u8>, String> {
    let mut change = Change::new(event, peer);
    let id = &key.id;
    change.attempt.change = Some(format!("key {id}"));
    change.requested(service).await?;
    let signed = signing::sign(&service.cluster, key, public, octets, standstill::now() + OWN_DEADLINE).await;
    if let Ok(done) = &signed {
        change.attempt.used(&done.member);
    }
    change.done(service, if signed.is_ok() { SUCCESS } else { FAILED }).await;
    signed.map(|done| done.value).map_err(|error| {
        format!("the key {id} does not sign: {error}; a key that may only decrypt cannot prove that it is there")
    })
}
