//! Handlers of the commands for key-protection certificates.

mod import;
mod new_key;
mod spare_keys;
mod token_keys;

use std::sync::Arc;

use claviger_hsm::{KeyId, KeyRef};
use claviger_protocol::certificate::{Certificate, KeyUsage};
use claviger_protocol::rsa_key::RsaPublicKey;
use data_encoding::{BASE64, HEXLOWER};
use serde_json::{Value, json};

use self::import::{import, imported_id, private_key};
pub(super) use self::new_key::{generate, request, self_sign};
pub(super) use self::spare_keys::{destroy, on_tokens};
pub(super) use self::token_keys::{digits, on_all_members};
use self::token_keys::{find, key_id};
use super::change::{Change, FAILED, outcome, read};
use crate::admin::message::Secret;
use crate::nodes::usage;
use crate::observe::audit::Peer;
use crate::registry::keys::SERVER_AUTHENTICATION;
use crate::service::Service;
use crate::store::usage_counts::{DAYS, Releases};
use crate::store::{self, Kind, Labels, NewCertificate, State};
use crate::sys::clock::unix_now;

/// Minimum number of thumbprint digits that identify a certificate.
const FEWEST_DIGITS: usize = 8;

/// The parameters of a request to add a certificate.
pub(super) struct New {
    pub(super) kind: Kind,
    pub(super) certificate: String,
    pub(super) hsm_key: Option<String>,
    pub(super) private_key: Option<Secret>,
    pub(super) primary: bool,
    pub(super) trust_absent: bool,
    /// Restricts the key to hosts with these labels; `None` leaves its restriction as it is.
    pub(super) labels: Option<Labels>,
}

pub(super) async fn list(service: &Arc<Service>) -> Result<Value, String> {
    let certificates = read(service, |state| state.certificates()).await?;
    let used = releases(service).await;
    Ok(certificates.iter().map(|entry| certificate(entry, used.as_ref().ok())).collect())
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
    let limited = new.labels.as_ref().map_or(String::new(), |labels| format!(", hosts with {labels}"));
    change.attempt.change = Some(format!("{} certificate{with}{limited}", new.kind));
    let id = match (&new.private_key, &new.hsm_key) {
        (Some(secret), None) => {
            let key = private_key(secret, &certificate)?;
            // Record the request before the tokens are changed.
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
        let certificate = NewCertificate { kind, der: &der, key_id: &id.0, spki: &spki, primary };
        match &new.labels {
            Some(labels) => state.add_limited_certificate(&certificate, labels, now),
            None => state.add_certificate(&certificate, now),
        }
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
        // The certificate is disabled anyway.
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
    // A primary certificate is refused for that reason first.
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

/// Checks that a certificate fits its kind, and returns warnings for the administrator.
///
/// # Errors
/// Why the certificate cannot be used.
pub(super) fn judge(certificate: &Certificate, kind: Kind) -> Result<Vec<String>, String> {
    let (usage, name) = match kind {
        Kind::Signing => (KeyUsage::DIGITAL_SIGNATURE, "digitalSignature"),
        Kind::Encryption => (KeyUsage::DATA_ENCIPHERMENT, "dataEncipherment"),
    };
    if !certificate.has_key_usage(usage) {
        return Err(format!("the certificate lacks the key usage {name}, which {kind} certificates need"));
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

/// Finds the certificate by its thumbprint or an unambiguous prefix of it.
async fn named(service: &Arc<Service>, thumbprint: &str, kind: Option<Kind>) -> Result<store::Certificate, String> {
    let wanted = digits(thumbprint);
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

/// A change of one certificate.
fn about(event: &'static str, entry: &store::Certificate, peer: Peer) -> Change {
    let mut change = Change::new(event, peer);
    change.attempt.certificate = Some(entry.thumbprint.clone());
    change.attempt.change = Some(entry.kind.to_string());
    change
}

/// Describes the releases that would be refused without a certificate, judged by recent releases.
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
    let counted = usage::releases(service).await.map_err(|error| error.to_string());
    counted.inspect_err(|error| tracing::warn!(error, "the usage counts of keys cannot be read"))
}

/// The reply to a completed change. Errors while collecting the details of the certificate do not fail the change.
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
    // Only in a damaged state is the public key invalid; then no key is counted.
    let public = RsaPublicKey::from_spki_der(&entry.spki);
    KeyRef::new(KeyId(entry.key_id.clone()), public.as_ref().map_or(&[], RsaPublicKey::modulus))
}

/// A certificate for people and programs. If the usage counts are unknown, they are omitted.
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
    use claviger_protocol::certificate::build::{DistinguishedName, Template, random_serial};

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
            dns_names: Vec::new(),
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
}
