//! Commands about the registered hosts.

use std::sync::Arc;

use claviger_protocol::attestation::tpm::endorsement_key_of;
use claviger_protocol::rsa_key::RsaPublicKey;
use data_encoding::{BASE64, HEXLOWER};
use serde_json::{Value, json};

use super::change::{Change, read};
use crate::attest::endorsement;
use crate::nodes::usage;
use crate::observe::audit::Peer;
use crate::request::Attempt;
use crate::service::Service;
use crate::store::usage_counts::Seen;
use crate::store::{Host, HostKind, Labels, State};
use crate::sys::clock::unix_now;

/// A host to register.
pub(super) struct New {
    pub(super) name: String,
    pub(super) labels: Labels,
    /// Whether a host that is registered already with this key is no error.
    pub(super) if_absent: bool,
}

pub(super) async fn add(service: &Arc<Service>, new: New, public_key: &str, peer: Peer) -> Result<Value, String> {
    let key = BASE64.decode(public_key.as_bytes()).map_err(|_| "the key is not base64".to_owned())?;
    let key = RsaPublicKey::from_file(&key).map_err(|e| format!("this is no host key that can be used: {e}"))?;
    if let Some(known) = registered(service, &new, HostKind::HostKey, key.spki_der()).await? {
        return Ok(known);
    }
    let New { name, labels, .. } = new;
    let mut change = Change::of_host("hosts.add", &name, peer)?;
    change.attempt.key = Some(HEXLOWER.encode(&key.spki_sha256()));
    change.attempt.change = (!labels.is_empty()).then(|| format!("labels {labels}"));
    let now = unix_now();
    let work = move |state: &mut State| state.add_host(&name, key.spki_der(), &labels, now);
    Ok(host(&change.make(service, work, |_, _| ()).await?, Seen::default()))
}

pub(super) async fn add_tpm(
    service: &Arc<Service>,
    new: New,
    certificates: &[String],
    public_key: Option<&str>,
    peer: Peer,
) -> Result<Value, String> {
    let bytes = |base64: &str| BASE64.decode(base64.as_bytes()).map_err(|_| "the key is not base64".to_owned());
    let (key, vouched) = match (certificates, public_key) {
        ([], Some(key)) => {
            let key = endorsement_key_of(&bytes(key)?);
            (key.map_err(|e| format!("this is no endorsement key that can be used: {e}"))?, "by the administrator")
        }
        ([_, ..], None) => {
            let certificates = certificates.iter().map(|der| bytes(der)).collect::<Result<Vec<_>, _>>()?;
            let roots = service.config.load().attest.vendor_roots.clone();
            let now = unix_now();
            let judged = move || endorsement::vouched_for(&certificates, roots.as_deref(), now);
            let judged = tokio::task::spawn_blocking(judged).await.map_err(|e| e.to_string())?;
            (judged.map_err(|e| e.to_string())?, "by its maker")
        }
        _ => return Err("either the endorsement key's certificate is needed, or the bare key".to_owned()),
    };
    if let Some(known) = registered(service, &new, HostKind::EndorsementKey, key.spki_der()).await? {
        return Ok(known);
    }
    let New { name, labels, .. } = new;
    let mut change = Change::of_host("hosts.add-tpm", &name, peer)?;
    change.attempt.key = Some(HEXLOWER.encode(&key.spki_sha256()));
    let labelled = if labels.is_empty() { String::new() } else { format!("; labels {labels}") };
    change.attempt.change = Some(format!("endorsement key vouched for {vouched}{labelled}"));
    let now = unix_now();
    let kind = HostKind::EndorsementKey;
    let work = move |state: &mut State| state.add_host_with(kind, &name, key.spki_der(), &labels, now);
    Ok(host(&change.make(service, work, |_, _| ()).await?, Seen::default()))
}

/// The registered host with this name, kind and key, if the administrator said that it may exist.
async fn registered(service: &Arc<Service>, new: &New, kind: HostKind, spki: &[u8]) -> Result<Option<Value>, String> {
    if !new.if_absent {
        return Ok(None);
    }
    let hosts = read(service, |state| state.hosts()).await?;
    let Some(known) = hosts.into_iter().find(|known| known.name.eq_ignore_ascii_case(&new.name)) else {
        return Ok(None);
    };
    if (known.kind, known.spki.as_slice()) != (kind, spki) {
        return Err(format!("the host {} is registered with another key; nothing was changed", known.name));
    }
    if !known.labels.have_all(&new.labels) {
        return Err(format!(
            "the host {} is registered without all of these labels; nothing was changed; claviger hosts label adds labels",
            known.name
        ));
    }
    let mut reply = host(&known, Seen::default());
    reply["was_registered"] = true.into();
    Ok(Some(reply))
}

pub(super) async fn remove(service: &Arc<Service>, name: String, peer: Peer) -> Result<Value, String> {
    let change = Change::of_host("hosts.remove", &name, peer)?;
    let removed = change
        .make(
            service,
            move |state| state.remove_host(&name),
            |attempt, host| attempt.key = Some(host.spki_sha256.clone()),
        )
        .await?;
    let (of, name) = (Arc::clone(service), removed.name.clone());
    let forgotten = tokio::task::spawn_blocking(move || {
        of.usage.forget_host(&name)?;
        of.evidence.forget(&name)
    });
    let forgotten = forgotten.await;
    if !matches!(forgotten, Ok(Ok(()))) {
        tracing::warn!(host = removed.name, "stored data of a removed host cannot be deleted");
    }
    Ok(host(&removed, Seen::default()))
}

pub(super) async fn enable(service: &Arc<Service>, name: String, enabled: bool, peer: Peer) -> Result<Value, String> {
    let change = Change::of_host(if enabled { "hosts.enable" } else { "hosts.disable" }, &name, peer)?;
    let work = move |state: &mut State| state.enable_host(&name, enabled);
    Ok(host(&change.make(service, work, note_key).await?, Seen::default()))
}

pub(super) async fn label(
    service: &Arc<Service>,
    name: String,
    add: Labels,
    remove: Labels,
    peer: Peer,
) -> Result<Value, String> {
    let mut change = Change::of_host("hosts.label", &name, peer)?;
    let signed = |sign: char, labels: &Labels| {
        Vec::from(labels.clone()).into_iter().map(move |label| format!("{sign}{label}")).collect::<Vec<_>>()
    };
    change.attempt.change = Some([signed('+', &add), signed('-', &remove)].concat().join(" "));
    let work = move |state: &mut State| state.label_host(&name, |labels| labels.with(&add).without(&remove));
    Ok(host(&change.make(service, work, note_key).await?, Seen::default()))
}

pub(super) async fn list(service: &Arc<Service>) -> Result<Value, String> {
    let hosts = read(service, |state| state.hosts()).await?;
    let seen = usage::hosts(service).await;
    let seen = seen.map_err(|e| format!("when hosts were last served cannot be read: {e}"))?;
    let of = |host: &Host| {
        let seen = seen.get(&host.name.to_ascii_lowercase()).copied().unwrap_or_default();
        // Another node may still tell of a host that had this name before.
        let since = |at: Option<i64>| at.filter(|at| *at >= host.added);
        Seen { attestation: since(seen.attestation), release: since(seen.release) }
    };
    Ok(hosts.iter().map(|entry| host(entry, of(entry))).collect())
}

fn note_key(attempt: &mut Attempt, host: &Host) {
    attempt.key = Some(host.spki_sha256.clone());
}

fn host(host: &Host, seen: Seen) -> Value {
    json!({
        "name": host.name,
        "key": host.spki_sha256,
        "kind": host.kind,
        "enabled": host.enabled,
        "added": host.added,
        "labels": host.labels,
        "last_attestation": seen.attestation,
        "last_release": seen.release,
    })
}
