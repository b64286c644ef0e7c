//! The key-protection certificates, and the keys behind them.

use std::sync::Arc;
use std::time::Duration;

use claviger_hsm::{
    Failure, Fingerprint, HsmError, KeyId, KeyRef, KeyUsage as HsmKeyUsage, MemberState, NewKey, TokenKey, standstill,
};
use claviger_protocol::certificate::build::{DistinguishedName, Template, random_serial, request_to_pem};
use claviger_protocol::certificate::{Certificate, KeyUsage};
use claviger_protocol::rsa_key::{RsaPrivateKey, RsaPublicKey};
use data_encoding::{BASE64, HEXLOWER, HEXLOWER_PERMISSIVE};
use ring::digest;
use ring::rand::{SecureRandom, SystemRandom};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::change::{Change, FAILED, outcome, read};
use super::hsm;
use crate::admin::message::Secret;
use crate::observe::audit::Peer;
use crate::registry::keys::{Key, RSA_BITS, SERVER_AUTHENTICATION, key_ref};
use crate::service::Service;
use crate::signing::{self, OWN_DEADLINE, private_parts};
use crate::store::usage_counts::{DAYS, Releases};
use crate::store::{self, Kind, Labels, NewCertificate, State};
use crate::sys::clock::unix_now;

/// How long a member has to say whether it has a key.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long the members' vendor has to replicate a key that was made on one of them, and how often they are asked.
const REPLICATION: Duration = Duration::from_secs(20);
const ASK_EVERY: Duration = Duration::from_secs(1);

/// Fewest digits of a thumbprint that name a certificate.
const FEWEST_DIGITS: usize = 8;

/// The parameters of a request to add a certificate.
pub(super) struct New {
    pub(super) kind: Kind,
    pub(super) certificate: String,
    pub(super) hsm_key: Option<String>,
    pub(super) private_key: Option<Secret>,
    pub(super) primary: bool,
    pub(super) trust_absent: bool,
}

pub(super) async fn list(service: &Arc<Service>) -> Result<Value, String> {
    let certificates = read(service, |state| state.certificates()).await?;
    let used = releases(service).await;
    Ok(certificates.iter().map(|entry| certificate(entry, used.as_ref().ok())).collect())
}

pub(super) async fn generate(
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
    // One that decrypts also signs: whoever asks for a certificate has to prove that he has the key.
    let usage = match kind {
        Kind::Signing => HsmKeyUsage::Sign,
        Kind::Encryption => HsmKeyUsage::Both,
    };
    let spec = NewKey { id: id.clone(), label, bits, usage };
    let made = service.cluster.generate_rsa(&on, spec).await;
    change.done(service, if made.is_ok() { crate::observe::audit::SUCCESS } else { FAILED }).await;
    let made = made.map_err(|error| format!("{on} made no key: {error}"))?;
    let public = RsaPublicKey::from_components(&made.n, &made.e).map_err(|e| format!("{on} made a bad key: {e}"))?;

    let until = standstill::now() + REPLICATION;
    let key = key_ref(&id.0, &public);
    let mut lacking = lacking(service, &key).await;
    while member.is_none() && !lacking.is_empty() && standstill::now() < until {
        tokio::time::sleep(ASK_EVERY).await;
        lacking = self::lacking(service, &key).await;
    }
    if member.is_none() && !lacking.is_empty() {
        return Err(format!(
            "the key {id} was made on {on}, but not all members show it: {}. A key that an HSM made cannot be copied by \
             claviger: replicate it with the vendor's tools and use it as --hsm-key {id}, or bring a key from outside with \
             claviger keys add --pfx. To make one on a single member anyway, name it with --member",
            sentence(&lacking)
        ));
    }
    Ok(json!({
        "hsm_key": id.to_string(),
        "kind": kind,
        "bits": bits,
        "member": on,
        "public_key": public.to_pem(),
        "lacking": lacking.iter().map(|lack| &lack.member).collect::<Vec<_>>(),
    }))
}

pub(super) async fn request(
    service: &Arc<Service>,
    hsm_key: &str,
    subject: String,
    peer: Peer,
) -> Result<Value, String> {
    let id = key_id(hsm_key)?;
    let template = template(service, &id, subject, 0).await?;
    let unsigned = template.to_be_requested().map_err(|e| e.to_string())?;
    let der = unsigned.assemble(
        &signed(service, "keys.csr", &key_ref(&id.0, &template.key), &template.key, unsigned.octets(), peer).await?,
    );
    Ok(json!({"hsm_key": id.to_string(), "pem": request_to_pem(&der)}))
}

pub(super) async fn self_sign(
    service: &Arc<Service>,
    hsm_key: &str,
    subject: String,
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

pub(super) async fn add(service: &Arc<Service>, new: New, peer: Peer) -> Result<Value, String> {
    let octets = BASE64.decode(new.certificate.as_bytes()).map_err(|_| "the certificate is not base64".to_owned())?;
    let certificate = Certificate::from_file(&octets).map_err(|e| format!("this certificate cannot be used: {e}"))?;
    let mut warnings = judge(&certificate, new.kind)?;
    let mut change = Change::new("keys.add", peer);
    change.attempt.certificate = Some(HEXLOWER.encode(&certificate.thumbprint()));
    let with = match (&new.private_key, new.primary) {
        (None, false) => "",
        (None, true) => ", primary",
        (Some(_), false) => ", key imported",
        (Some(_), true) => ", key imported, primary",
    };
    change.attempt.change = Some(format!("{} certificate{with}", new.kind));
    let id = match (&new.private_key, &new.hsm_key) {
        (Some(secret), None) => {
            let key = private_key(secret, &certificate)?;
            // Before the tokens are changed.
            change.requested(service).await?;
            if let Err(error) = import(service, new.kind, &key, &certificate, new.trust_absent).await {
                change.done(service, FAILED).await;
                return Err(error);
            }
            imported_id(new.kind, certificate.key())
        }
        (Some(_), Some(_)) => {
            return Err("a key that is imported gets its id from itself; leave --hsm-key out".to_owned());
        }
        (None, Some(hsm_key)) => key_id(hsm_key)?,
        (None, None) => find(service, new.kind, certificate.key()).await?,
    };
    let on_tokens = on_all_members(service, new.kind, &id.0, &certificate, new.trust_absent).await;
    if new.private_key.is_some() && on_tokens.is_err() {
        change.done(service, FAILED).await;
    }
    warnings.extend(on_tokens?);
    if new.private_key.is_none() {
        change.requested(service).await?;
    }
    let (kind, primary, now) = (new.kind, new.primary, unix_now());
    let (der, spki) = (certificate.der().to_vec(), certificate.key().spki_der().to_vec());
    let work = move |state: &mut State| {
        state.add_certificate(&NewCertificate { kind, der: &der, key_id: &id.0, spki: &spki, primary }, now)
    };
    let added = service.registry.change(work).await;
    change.done(service, outcome(&added)).await;
    Ok(done(service, &added.map_err(|e| e.to_string())?, warnings).await)
}

pub(super) async fn set_primary(
    service: &Arc<Service>,
    certificate: &str,
    kind: Option<Kind>,
    peer: Peer,
) -> Result<Value, String> {
    let entry = named(service, certificate, kind).await?;
    let of = entry.clone();
    let work = move |state: &mut State| state.set_primary(of.kind, &of.thumbprint);
    about("keys.set-primary", &entry, peer).make(service, work, |_, ()| ()).await?;
    Ok(done(service, &store::Certificate { is_primary: true, ..entry }, Vec::new()).await)
}

pub(super) async fn set_communications(
    service: &Arc<Service>,
    certificate: Option<&str>,
    peer: Peer,
) -> Result<Value, String> {
    let entry = match certificate {
        Some(certificate) => Some(named(service, certificate, Some(Kind::Signing)).await?),
        None => None,
    };
    let mut change = Change::new("keys.set-communications", peer);
    change.attempt.certificate = entry.as_ref().map(|entry| entry.thumbprint.clone());
    let thumbprint = entry.as_ref().map(|entry| entry.thumbprint.clone());
    let work = move |state: &mut State| state.set_communications(thumbprint.as_deref());
    change.make(service, work, |_, ()| ()).await?;
    match entry {
        Some(entry) => Ok(done(service, &store::Certificate { is_communications: true, ..entry }, Vec::new()).await),
        None => Ok(json!({"thumbprint": null})),
    }
}

pub(super) async fn enable(
    service: &Arc<Service>,
    certificate: &str,
    kind: Option<Kind>,
    enabled: bool,
    peer: Peer,
) -> Result<Value, String> {
    let entry = named(service, certificate, kind).await?;
    let of = entry.clone();
    let work = move |state: &mut State| state.enable_certificate(of.kind, &of.thumbprint, enabled);
    let event = if enabled { "keys.enable" } else { "keys.disable" };
    about(event, &entry, peer).make(service, work, |_, ()| ()).await?;
    let warning = if enabled {
        None
    } else {
        // It is disabled all the same.
        let unknown = |error| Some(format!("what is not released without it is not known: {error}"));
        missed(service, &entry).await.unwrap_or_else(unknown)
    };
    Ok(done(service, &store::Certificate { enabled, ..entry }, warning.into_iter().collect()).await)
}

pub(super) async fn remove(
    service: &Arc<Service>,
    certificate: &str,
    kind: Option<Kind>,
    force: bool,
    peer: Peer,
) -> Result<Value, String> {
    let entry = named(service, certificate, kind).await?;
    let missed = missed(service, &entry).await?;
    // The primary one is refused for that reason, whatever else there is to say.
    if let Some(missed) = missed.as_ref().filter(|_| !force && !entry.is_primary && !entry.is_communications) {
        return Err(format!("{missed}; it was not removed. If it is to go all the same: --force"));
    }
    let of = entry.clone();
    let work = move |state: &mut State| state.remove_certificate(of.kind, &of.thumbprint);
    about("keys.remove", &entry, peer).make(service, work, |_, ()| ()).await?;
    Ok(done(service, &entry, missed.into_iter().collect()).await)
}

pub(super) async fn limit(
    service: &Arc<Service>,
    certificate: &str,
    kind: Option<Kind>,
    labels: Labels,
    peer: Peer,
) -> Result<Value, String> {
    let entry = named(service, certificate, kind).await?;
    let mut change = about("keys.limit", &entry, peer);
    change.attempt.change =
        Some(if labels.is_empty() { "no limit".to_owned() } else { format!("hosts with {labels}") });
    let (of, limited) = (entry.clone(), labels.clone());
    let work = move |state: &mut State| state.limit_certificate(of.kind, &of.thumbprint, &limited);
    change.make(service, work, |_, _| ()).await?;
    Ok(done(service, &store::Certificate { labels, ..entry }, Vec::new()).await)
}

/// What of a certificate is wrong for its use, and what an administrator should know of it.
///
/// # Errors
/// What is wrong.
pub(super) fn judge(certificate: &Certificate, kind: Kind) -> Result<Vec<String>, String> {
    let (usage, name) = match kind {
        Kind::Signing => (KeyUsage::DIGITAL_SIGNATURE, "digitalSignature"),
        Kind::Encryption => (KeyUsage::DATA_ENCIPHERMENT, "dataEncipherment"),
    };
    if !certificate.has_key_usage(usage) {
        return Err(format!("the certificate lacks the key usage {name}, which a {kind} certificate needs"));
    }
    let mut warnings = Vec::new();
    if certificate.not_after() < unix_now() {
        warnings.push("the certificate has expired; it serves all the same, but guardians may refuse it".to_owned());
    } else if certificate.not_before() > unix_now() {
        warnings.push("the certificate is not valid yet; it serves all the same".to_owned());
    }
    if !certificate.has_extended_key_usage(SERVER_AUTHENTICATION) {
        warnings.push("the certificate lacks the extended key usage serverAuth, which others may expect".to_owned());
    }
    Ok(warnings)
}

/// Refuses a key that is not on every member, or is another one there, or does not do what certificates of this kind need.
///
/// # Errors
/// What is wrong; otherwise what could not be found out.
pub(super) async fn on_all_members(
    service: &Arc<Service>,
    kind: Kind,
    id: &[u8],
    certificate: &Certificate,
    trust_absent: bool,
) -> Result<Vec<String>, String> {
    let key = Key::new(certificate.clone(), id);
    let id = &key.id.id;
    let lacking = lacking(service, &key.id).await;
    let (absent, wrong): (Vec<_>, Vec<_>) = lacking.into_iter().partition(|lack| lack.absent);
    if !wrong.is_empty() {
        return Err(format!(
            "the certificate's key {id} is not on every member: {}. Keys are replicated with the vendor's tools, or brought \
             in with claviger keys add --pfx",
            sentence(&wrong)
        ));
    }
    if !absent.is_empty() && !trust_absent {
        return Err(format!(
            "whether the key {id} is on every member cannot be found out: {}. Try again when they answer; --trust-absent \
             takes them to have it",
            sentence(&absent)
        ));
    }
    prove(service, kind, &key).await?;
    Ok(absent.iter().map(|lack| format!("not checked: {} {}", lack.member, lack.what)).collect())
}

/// Has the key do, on each member that is up, what it is for: a member may have it without the right to use it.
async fn prove(service: &Arc<Service>, kind: Kind, key: &Key) -> Result<(), String> {
    let does = match kind {
        Kind::Signing => "sign",
        Kind::Encryption => "decrypt",
    };
    let id = &key.id.id;
    let known = key.known_answer(kind).ok_or_else(|| format!("nothing can be tried with the key {id}"))?;
    let mut members = service.cluster.members();
    members.retain(|member| member.state == MemberState::Up);
    if members.is_empty() {
        return Err(format!("no HSM is up to try the key {id} on"));
    }
    for member in members {
        let proved = service.cluster.self_test(&member.name, &known).await;
        proved.map_err(|error| format!("the key {id} does not {does} on {}: {error}", member.name))?;
    }
    Ok(())
}

/// A member that does not show a key.
struct Lack {
    member: String,
    what: String,
    /// Whether it could not be asked.
    absent: bool,
}

fn sentence(lacking: &[Lack]) -> String {
    lacking.iter().map(|lack| format!("{} {}", lack.member, lack.what)).collect::<Vec<_>>().join(", ")
}

/// Which members do not show this key. Each token is searched: another program may have made the key a moment ago.
async fn lacking(service: &Arc<Service>, key: &KeyRef) -> Vec<Lack> {
    let mut lacking = Vec::new();
    for hsm in &service.config.load_full().hsm {
        let lack = |what: String, absent| Some(Lack { member: hsm.name.clone(), what, absent });
        let lack = match standstill::timeout(PATIENCE, service.cluster.keys_on(&hsm.name, true)).await {
            Ok(Ok(keys)) => what_is_missing(&keys, key).and_then(|what| lack(what, false)),
            Ok(Err(error)) => lack(format!("does not answer: {error}"), true),
            Err(_) => lack("does not answer in time".to_owned(), true),
        };
        lacking.extend(lack);
    }
    lacking
}

/// What keeps a token with these keys from using the one that is meant; `None`: nothing.
fn what_is_missing(keys: &[TokenKey], wanted: &KeyRef) -> Option<String> {
    let of_id = || keys.iter().filter(|key| key.has_id(&wanted.id));
    // A key of which the token tells no modulus proves itself by what it does.
    if of_id().any(|key| key.is(wanted) || key.fingerprint.is_none()) {
        return None;
    }
    let same = keys.iter().find(|key| key.fingerprint == Some(wanted.public));
    Some(match same {
        Some(TokenKey { id: Some(id), .. }) => format!("has the key, but with the CKA_ID {id}"),
        Some(TokenKey { label, .. }) => {
            format!("has the key (label {label:?}), but without a CKA_ID, by which keys are used")
        }
        None if of_id().next().is_some() => "has another key of that id".to_owned(),
        None => "shows no such key".to_owned(),
    })
}

/// The id of the key that a certificate is over, looked for on the members.
async fn find(service: &Arc<Service>, kind: Kind, public: &RsaPublicKey) -> Result<KeyId, String> {
    let mut nameless = None;
    for hsm in &service.config.load_full().hsm {
        let keys = standstill::timeout(PATIENCE, service.cluster.keys_on(&hsm.name, true)).await;
        let Ok(Ok(keys)) = keys else { continue };
        match choose(&keys, kind, public) {
            Found::One(id) => return Ok(id),
            Found::Several(ids) => {
                return Err(format!(
                    "the certificate's key is there several times; choose one with --hsm-key: {}",
                    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
                ));
            }
            Found::Nameless(label) => nameless = Some((hsm.name.clone(), label)),
            Found::Nothing => {}
        }
    }
    Err(match nameless {
        Some((member, label)) => format!(
            "{member} has the certificate's key (label {label:?}), but without a CKA_ID, by which keys are used: give it one \
             with the vendor's tool or with pkcs11-tool --set-id"
        ),
        None => "no HSM that answers has the certificate's key; bring it in with --pfx, or name it with --hsm-key"
            .to_owned(),
    })
}

/// Where a certificate's key is on a token.
#[derive(Debug, PartialEq)]
enum Found {
    One(KeyId),
    Several(Vec<KeyId>),
    /// It has no `CKA_ID`, but this label.
    Nameless(String),
    Nothing,
}

/// The id of a certificate's key among those of a token. One key may be there with several ids, as when it was imported for
/// both kinds: the one that may do what the kind needs is meant.
fn choose(keys: &[TokenKey], kind: Kind, public: &RsaPublicKey) -> Found {
    let wanted = Fingerprint::of_modulus(public.modulus());
    let same: Vec<_> = keys.iter().filter(|key| key.fingerprint == Some(wanted)).collect();
    let ids = |able: &dyn Fn(&TokenKey) -> bool| {
        let mut ids: Vec<_> = same.iter().filter(|key| able(key)).filter_map(|key| key.id.clone()).collect();
        ids.dedup();
        ids
    };
    let all = ids(&|_| true);
    let imported = imported_id(kind, public);
    if all.contains(&imported) {
        return Found::One(imported);
    }
    let able = ids(&|key| match kind {
        Kind::Signing => key.signs,
        Kind::Encryption => key.decrypts,
    });
    match (able.as_slice(), all.as_slice(), same.as_slice()) {
        ([id], ..) | ([], [id], _) => Found::One(id.clone()),
        ([], [], [key, ..]) => Found::Nameless(key.label.clone()),
        ([], [], []) => Found::Nothing,
        _ => Found::Several(all),
    }
}

/// The private key that came with a certificate.
fn private_key(secret: &Secret, certificate: &Certificate) -> Result<RsaPrivateKey, String> {
    let der = BASE64.decode(secret.expose().as_bytes()).map(Zeroizing::new);
    let der = der.map_err(|_| "the private key is not base64".to_owned())?;
    let key = RsaPrivateKey::from_pkcs8_der(&der).map_err(|e| format!("the private key cannot be used: {e}"))?;
    if key.public().spki_der() != certificate.key().spki_der() {
        return Err("the private key is not the certificate's".to_owned());
    }
    Ok(key)
}

/// Brings a private key onto all members. One that has it already is left as it is.
async fn import(
    service: &Arc<Service>,
    kind: Kind,
    key: &RsaPrivateKey,
    certificate: &Certificate,
    trust_absent: bool,
) -> Result<(), String> {
    let id = imported_id(kind, key.public());
    let usage = match kind {
        Kind::Signing => HsmKeyUsage::Sign,
        Kind::Encryption => HsmKeyUsage::Decrypt,
    };
    let label: String = certificate.common_name().unwrap_or("claviger").chars().take(64).collect();
    let bits = u32::try_from(key.public().modulus_len() * 8).unwrap_or(u32::MAX);
    let spec = NewKey { id: id.clone(), label, bits, usage };
    // One that does not serve now would keep the administrator waiting for nothing.
    let serves = |state| matches!(state, MemberState::Up | MemberState::Draining | MemberState::Drained);
    let (members, absent): (Vec<_>, Vec<_>) = service.cluster.members().into_iter().partition(|m| serves(m.state));
    if !absent.is_empty() && !trust_absent {
        let absent: Vec<_> =
            absent.iter().map(|member| format!("{} is {}", member.name, member.state.name())).collect();
        return Err(format!("the key was brought to no member: {}; try again when all serve", absent.join(", ")));
    }
    let mut failed = Vec::new();
    for hsm in &members {
        match service.cluster.import_rsa(&hsm.name, spec.clone(), private_parts(key)).await {
            Ok(()) | Err(Failure { error: HsmError::KeyExists, .. }) => {}
            Err(error) => failed.push(format!("{} ({error})", hsm.name)),
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(format!(
        "the key {id} was not taken by {}; the others keep it, and the same command goes on where this one stopped",
        failed.join(", ")
    ))
}

/// CKA_ID of a key that was imported. One for each kind, so that a key may be there for both.
fn imported_id(kind: Kind, public: &RsaPublicKey) -> KeyId {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(kind.as_str().as_bytes());
    context.update(public.spki_der());
    KeyId(context.finish().as_ref()[..20].to_vec())
}

fn key_id(hexadecimal: &str) -> Result<KeyId, String> {
    match HEXLOWER_PERMISSIVE.decode(hexadecimal.as_bytes()) {
        Ok(id) if (1..=255).contains(&id.len()) => Ok(KeyId(id)),
        _ => Err("the id of a key in the HSMs is hexadecimal, two digits for each octet".to_owned()),
    }
}

/// The public key of the one key with this id. A request that names only the id cannot say which of several is meant.
fn only_of_id(keys: &[TokenKey], id: &KeyId) -> Result<Option<RsaPublicKey>, String> {
    let of_id: Vec<_> = keys.iter().filter(|key| key.has_id(id)).collect();
    let Some(first) = of_id.first() else { return Ok(None) };
    if of_id.iter().any(|key| key.fingerprint != first.fingerprint) {
        let labels: Vec<_> = of_id.iter().map(|key| format!("{:?}", key.label)).collect();
        return Err(format!(
            "several keys have the CKA_ID {id} (labels {}), so that it does not say which is meant; give the key an id of its \
             own with the vendor's tool",
            labels.join(", ")
        ));
    }
    let public = of_id.iter().find_map(|key| key.public.as_ref());
    let public = public.ok_or_else(|| format!("the token does not tell the public key of {id}"))?;
    RsaPublicKey::from_components(&public.n, &public.e).map(Some).map_err(|e| format!("the key {id}: {e}"))
}

/// A template for a certificate of a key that some member has.
async fn template(service: &Arc<Service>, id: &KeyId, subject: String, days: u32) -> Result<Template, String> {
    let mut found = None;
    for hsm in &service.config.load_full().hsm {
        let keys = standstill::timeout(PATIENCE, service.cluster.keys_on(&hsm.name, true)).await;
        let Ok(Ok(keys)) = keys else { continue };
        found = only_of_id(&keys, id)?;
        if found.is_some() {
            break;
        }
    }
    let key = found.ok_or_else(|| format!("no HSM that answers has a key {id}"))?;
    if subject.len() > 64 || subject.chars().any(char::is_control) {
        return Err("a common name has at most 64 octets and no control characters".to_owned());
    }
    let now = unix_now();
    Ok(Template {
        subject: DistinguishedName::new(subject),
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
    })
}

/// A signature that an administrator asked for, recorded like a change.
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
    change.done(service, if signed.is_ok() { crate::observe::audit::SUCCESS } else { FAILED }).await;
    signed.map(|done| done.value).map_err(|error| {
        format!("the key {id} does not sign: {error}; a key that may only decrypt cannot prove that it is there")
    })
}

/// The one certificate that a thumbprint, or the beginning of one, means.
async fn named(service: &Arc<Service>, thumbprint: &str, kind: Option<Kind>) -> Result<store::Certificate, String> {
    let wanted = thumbprint.to_ascii_lowercase();
    if wanted.len() < FEWEST_DIGITS || !wanted.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(format!("a certificate is named by its thumbprint, or at least its first {FEWEST_DIGITS} digits"));
    }
    let mut found = read(service, |state| state.certificates()).await?;
    found.retain(|entry| entry.thumbprint.starts_with(&wanted) && kind.is_none_or(|kind| entry.kind == kind));
    match found.len() {
        1 => Ok(found.swap_remove(0)),
        0 => {
            let kind = kind.map_or(String::new(), |kind| format!(" {kind}"));
            Err(format!("there is no{kind} certificate {wanted}; `claviger keys list` shows them"))
        }
        _ => Err(format!("{wanted} is not one certificate alone; give more digits, or --kind")),
    }
}

/// A change that is about one certificate.
fn about(event: &'static str, entry: &store::Certificate, peer: Peer) -> Change {
    let mut change = Change::new(event, peer);
    change.attempt.certificate = Some(entry.thumbprint.clone());
    change.attempt.change = Some(entry.kind.to_string());
    change
}

/// What is not released any more without a certificate, judged by what was released not long ago.
async fn missed(service: &Arc<Service>, entry: &store::Certificate) -> Result<Option<String>, String> {
    let (kind, spki, thumbprint) = (entry.kind, entry.spki.clone(), entry.thumbprint.clone());
    let others = read(service, |state| state.certificates()).await?;
    if others.iter().any(|c| c.kind == kind && c.spki == spki && c.thumbprint != thumbprint && c.enabled) {
        return Ok(None);
    }
    let without = "its protectors are not released without it";
    let used = match releases(service).await {
        Ok(used) => used,
        Err(error) => return Ok(Some(format!("how many releases used its key is not known ({error}), and {without}"))),
    };
    let count = used.of(&key_of(entry));
    if !used.are_all_since(entry.added) {
        return Ok(Some(format!(
            "how many releases of the last {DAYS} days used its key is not known: they are counted for less than that, and \
             {count} have used it since; {without}"
        )));
    }
    Ok((count > 0).then(|| format!("{count} releases of the last {DAYS} days used its key, and {without}")))
}

async fn releases(service: &Arc<Service>) -> Result<Releases, String> {
    let of = Arc::clone(service);
    let counted = tokio::task::spawn_blocking(move || of.usage.releases(unix_now())).await;
    let counted = counted.map_err(|e| e.to_string()).and_then(|counted| counted.map_err(|e| e.to_string()));
    counted.inspect_err(|error| tracing::warn!(error, "how much keys are used cannot be read"))
}

/// The answer to a change that was made: whatever else cannot be said of the certificate is no failure of the change.
async fn done(service: &Arc<Service>, entry: &store::Certificate, mut warnings: Vec<String>) -> Value {
    let used = releases(service).await;
    if let Err(error) = &used
        && warnings.is_empty()
    {
        warnings.push(format!("how many releases used its key is not known: {error}"));
    }
    let mut value = certificate(entry, used.as_ref().ok());
    value["warnings"] = json!(warnings);
    value
}

/// The private key of a certificate.
fn key_of(entry: &store::Certificate) -> KeyRef {
    // Only a state that was damaged has a public key that is none; no key is counted for that.
    let public = RsaPublicKey::from_spki_der(&entry.spki);
    KeyRef::new(KeyId(entry.key_id.clone()), public.as_ref().map_or(&[], RsaPublicKey::modulus))
}

/// A certificate for people and machines. Where it is not known how much keys are used, nothing is said of it.
fn certificate(entry: &store::Certificate, used: Option<&Releases>) -> Value {
    let parsed = Certificate::parse(&entry.der).ok();
    json!({
        "kind": entry.kind.as_str(),
        "thumbprint": entry.thumbprint,
        "subject": parsed.as_ref().and_then(|c| c.common_name()),
        "bits": parsed.as_ref().map(|c| c.key().modulus_len() * 8),
        "not_after": parsed.as_ref().map(|c| c.not_after()),
        "primary": entry.is_primary,
        "communications": entry.is_communications,
        "enabled": entry.enabled,
        "labels": entry.labels,
        "releases": used.map(|used| used.of(&key_of(entry))),
        "counted_since": used.filter(|used| !used.are_all_since(entry.added)).and_then(|used| used.since),
        "hsm_key": HEXLOWER.encode(&entry.key_id),
        "usage": match entry.kind { Kind::Signing => "sign", Kind::Encryption => "decrypt" },
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::service::testing;
    use claviger_hsm::RsaPublic;

    fn token_key(id: &[u8], label: &str, public: Option<&RsaPublicKey>, signs: bool) -> TokenKey {
        TokenKey {
            id: (!id.is_empty()).then(|| KeyId(id.to_vec())),
            label: label.to_owned(),
            public: public.map(|key| RsaPublic { n: key.modulus().to_vec(), e: key.exponent().to_vec() }),
            decrypts: !signs,
            signs,
            always_authenticate: false,
            fingerprint: public.map(|key| Fingerprint::of_modulus(key.modulus())),
        }
    }

    #[test]
    fn a_certificates_key_is_found_by_its_public_key() {
        let (ours, other) = (testing::key().public(), RsaPrivateKey::generate(2048).unwrap());
        let found = |keys: &[TokenKey], kind| choose(keys, kind, ours);
        let one = |id: &[u8]| Found::One(KeyId(id.to_vec()));
        let stranger = token_key(b"a", "x", Some(other.public()), true);
        assert_eq!(found(std::slice::from_ref(&stranger), Kind::Signing), Found::Nothing);
        let same_id = token_key(b"a", "y", Some(ours), true);
        assert_eq!(found(&[stranger, same_id.clone()], Kind::Signing), one(b"a"));
        // It is there twice: the one that may do what is needed.
        let decrypts = token_key(b"b", "z", Some(ours), false);
        assert_eq!(found(&[same_id.clone(), decrypts.clone()], Kind::Signing), one(b"a"));
        assert_eq!(found(&[same_id.clone(), decrypts], Kind::Encryption), one(b"b"));
        let again = token_key(b"c", "z", Some(ours), true);
        let several = Found::Several(vec![KeyId(b"a".to_vec()), KeyId(b"c".to_vec())]);
        assert_eq!(found(&[same_id.clone(), again.clone()], Kind::Signing), several);
        let imported = TokenKey { id: Some(imported_id(Kind::Signing, ours)), ..again };
        assert_eq!(found(&[same_id, imported.clone()], Kind::Signing), Found::One(imported.id.unwrap()));
        let nameless = token_key(b"", "forgotten", Some(ours), true);
        assert_eq!(found(&[nameless], Kind::Signing), Found::Nameless("forgotten".to_owned()));
    }

    #[test]
    fn what_a_member_lacks_is_said() {
        let (ours, other) = (testing::key().public(), RsaPrivateKey::generate(2048).unwrap());
        let wanted = key_ref(b"a", ours);
        let missing = |keys: &[TokenKey]| what_is_missing(keys, &wanted).unwrap_or_default();
        let stranger = token_key(b"a", "x", Some(other.public()), true);
        assert_eq!(missing(&[stranger.clone(), token_key(b"a", "x", Some(ours), true)]), "");
        assert_eq!(missing(&[stranger.clone(), token_key(b"a", "x", None, true)]), "", "it proves itself");
        assert_eq!(missing(&[]), "shows no such key");
        assert_eq!(missing(std::slice::from_ref(&stranger)), "has another key of that id");
        assert_eq!(
            missing(&[stranger.clone(), token_key(b"b", "x", Some(ours), true)]),
            "has the key, but with the CKA_ID 62"
        );
        assert!(missing(&[stranger, token_key(b"", "x", Some(ours), true)]).contains("without a CKA_ID"));
    }

    #[test]
    fn an_id_that_means_two_keys_names_none() {
        let (ours, other) = (testing::key().public(), RsaPrivateKey::generate(2048).unwrap());
        let id = KeyId(b"a".to_vec());
        let [one, two] = [ours, other.public()].map(|key| token_key(b"a", "x", Some(key), true));
        assert_eq!(only_of_id(&[], &id), Ok(None));
        assert_eq!(only_of_id(&[one.clone(), one.clone()], &id), Ok(Some(ours.clone())));
        assert!(only_of_id(&[one, two], &id).unwrap_err().contains("several keys have the CKA_ID 61"));
        assert!(only_of_id(&[token_key(b"a", "x", None, true)], &id).is_err());
    }

    fn template() -> Template {
        Template {
            subject: DistinguishedName::new("x"),
            issuer_der: None,
            key: testing::key().public().clone(),
            serial: random_serial().unwrap(),
            not_before: 1,
            not_after: unix_now() + 1000,
            key_usage: KeyUsage::DIGITAL_SIGNATURE,
            extended_key_usages: vec![SERVER_AUTHENTICATION],
            ca: None,
            subject_key_id: None,
            authority_key_id: None,
        }
    }

    #[test]
    fn usage_decides_and_expiry_only_warns() {
        let made = |template: Template| {
            Certificate::parse(&template.to_be_signed().unwrap().sign_with(testing::key()).unwrap()).unwrap()
        };
        assert!(judge(&made(template()), Kind::Signing).unwrap().is_empty());
        assert!(judge(&made(template()), Kind::Encryption).unwrap_err().contains("dataEncipherment"));
        let encryption = Template { key_usage: KeyUsage::DATA_ENCIPHERMENT, ..template() };
        assert!(judge(&made(encryption.clone()), Kind::Encryption).unwrap().is_empty());
        assert!(judge(&made(encryption), Kind::Signing).unwrap_err().contains("digitalSignature"));
        let expired = Template { not_after: 2, extended_key_usages: Vec::new(), ..template() };
        let warnings = judge(&made(expired), Kind::Signing).unwrap();
        assert!(warnings[0].contains("has expired") && warnings[1].contains("serverAuth"), "{warnings:?}");
    }

    #[test]
    fn keys_are_named_by_what_they_are() {
        let public = testing::key().public();
        assert_ne!(imported_id(Kind::Signing, public), imported_id(Kind::Encryption, public));
        assert_eq!(key_id("0A0b").unwrap(), KeyId(vec![10, 11]));
        for wrong in ["", "0", "xy", &"00".repeat(256)] {
            assert!(key_id(wrong).is_err(), "{wrong}");
        }
    }
}
