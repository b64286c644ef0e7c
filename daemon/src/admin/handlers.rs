//! What is done for each command of an administrator.

mod baselines;
mod change;
mod hosts;
mod hsm;
mod keys;
mod nodes;
mod signers;
mod transfer;

use std::sync::Arc;

use claviger_hsm::standstill;
use claviger_process::throttle::Throttle;
use serde::Deserialize;
use serde_json::Value;

use self::change::{Change, FAILED};
use super::message::Command;
use crate::observe::audit::{Peer, SUCCESS};
use crate::service::Service;

/// Most characters of a command's name in the audit trail.
const LONGEST_NAME: usize = 64;

/// Answers a request. A change is recorded before it is made.
///
/// # Errors
/// A sentence for a person.
pub(crate) async fn handle(service: Arc<Service>, request: Value, peer: Peer) -> Result<Value, String> {
    let command = Command::deserialize(request).map_err(|e| format!("the daemon does not know this command: {e}"))?;
    let service = &service;
    match command {
        Command::AddHost { name, public_key, labels, if_absent } => {
            hosts::add(service, hosts::New { name, labels, if_absent }, &public_key, peer).await
        }
        Command::AddTpmHost { name, certificates, public_key, labels, if_absent } => {
            let new = hosts::New { name, labels, if_absent };
            hosts::add_tpm(service, new, &certificates, public_key.as_deref(), peer).await
        }
        Command::CheckHost { name } => baselines::check(service, name).await,
        Command::ListBaselines => baselines::list(service).await,
        Command::ShowBaseline { name } => baselines::show(service, name).await,
        Command::CaptureBaseline { name, host, at, pcrs, from_log } => {
            let source = baselines::Source { host, at, pcrs, from_log };
            baselines::capture(service, name, source, peer).await
        }
        Command::AddBaseline { name, pcrs, log } => baselines::add(service, name, &pcrs, log.as_deref(), peer).await,
        Command::EnableBaseline { name, enabled } => baselines::enable(service, name, enabled, peer).await,
        Command::RemoveBaseline { name } => baselines::remove(service, name, peer).await,
        Command::RemoveHost { name } => hosts::remove(service, name, peer).await,
        Command::EnableHost { name, enabled } => hosts::enable(service, name, enabled, peer).await,
        Command::LabelHost { name, add, remove } => hosts::label(service, name, add, remove, peer).await,
        Command::ListHosts => hosts::list(service).await,
        Command::ListKeys => keys::list(service).await,
        Command::GenerateKey { kind, bits, name, member } => {
            keys::generate(service, kind, bits, name, member, peer).await
        }
        Command::RequestCertificate { hsm_key, subject, dns_names } => {
            keys::request(service, &hsm_key, &subject, dns_names, peer).await
        }
        Command::SelfSign { hsm_key, subject, days } => keys::self_sign(service, &hsm_key, &subject, days, peer).await,
        Command::AddKey { kind, certificate, hsm_key, private_key, primary, trust_absent, labels } => {
            let new = keys::New { kind, certificate, hsm_key, private_key, primary, trust_absent, labels };
            keys::add(service, new, peer).await
        }
        Command::ListTokenKeys => keys::on_tokens(service).await,
        Command::DestroyKey { hsm_key, member } => keys::destroy(service, &hsm_key, member, peer).await,
        Command::SetPrimary { certificate, kind } => keys::set_primary(service, &certificate, kind, peer).await,
        Command::SetCommunications { certificate } => {
            keys::set_communications(service, certificate.as_deref(), peer).await
        }
        Command::EnableKey { certificate, kind, enabled } => {
            keys::enable(service, &certificate, kind, enabled, peer).await
        }
        Command::RemoveKey { certificate, kind, force } => keys::remove(service, &certificate, kind, force, peer).await,
        Command::LimitKey { certificate, kind, labels } => keys::limit(service, &certificate, kind, labels, peer).await,
        Command::Reload => reload(service, peer).await,
        Command::Doctor => {
            let findings = crate::checks::of_daemon(service).await;
            serde_json::to_value(findings).map_err(|e| e.to_string())
        }
        Command::ListSigners => signers::list(service).await,
        Command::RotateSigner => signers::rotate(service, peer).await,
        Command::RevokeSigner { certificate, force } => signers::revoke(service, &certificate, force, peer).await,
        Command::ListHsms => Ok(hsm::list(service)),
        Command::DrainHsm { name, force } => hsm::drain(service, &name, force, peer).await,
        Command::ResumeHsm { name } => hsm::resume(service, &name, peer).await,
        Command::ProbeHsm { name } => hsm::probe(service, &name).await,
        Command::ListNodes => nodes::list(service).await,
        Command::ForgetNode { name } => nodes::forget(service, name, peer).await,
        Command::AuditStatus => Ok(audit_status(service)),
        Command::Export => transfer::export(service, peer).await,
        Command::Import { document, dry_run, trust_absent, loosen } => {
            transfer::import(service, *document, dry_run, trust_absent, loosen, peer).await
        }
    }
}

/// Answers a request that changes nothing and asks nothing of the HSMs, by the word that its name ends in; refuses others.
///
/// # Errors
/// A sentence for a person.
pub(crate) async fn review(service: Arc<Service>, request: Value, peer: Peer) -> Result<Value, String> {
    let reads = |name: &str| [".list", ".show", ".status", ".check"].iter().any(|end| name.ends_with(end));
    if !request["command"].as_str().is_some_and(reads) {
        refused(&service, &request, peer).await;
        return Err("this socket only answers what changes nothing; use admin.sock for this".to_owned());
    }
    handle(service, request, peer).await
}

/// Has the daemon read its configuration again.
async fn reload(service: &Service, peer: Peer) -> Result<Value, String> {
    let change = Change::new("reload", peer);
    change.requested(service).await?;
    let reloaded = service.reloads.ask().await;
    change.done(service, if reloaded.is_ok() { SUCCESS } else { FAILED }).await;
    Ok(serde_json::json!({ "needs_restart": reloaded? }))
}

/// Records an attempt that is not allowed. One record a second, with the number of those that have none: an attempt costs
/// its user nothing.
async fn refused(service: &Service, request: &Value, peer: Peer) {
    static RECORDS: Throttle = Throttle::new();
    let Some(others) = RECORDS.due(standstill::now()) else { return };
    let command = request["command"].as_str().unwrap_or("no command");
    let command: String = command.chars().filter(|c| c.is_ascii_graphic()).take(LONGEST_NAME).collect();
    tracing::warn!(uid = peer.uid, command, others, "an attempt at review.sock to change something is refused");
    let mut change = Change::new("admin.refused", peer);
    let also = if others > 0 { format!(", and {others} attempts before it") } else { String::new() };
    change.attempt.change = Some(format!("{command} at review.sock{also}"));
    let _ = service.audit.administration(&change.attempt.entry("admin.refused", "refused")).await;
}

fn audit_status(service: &Service) -> Value {
    let head = service.audit.head();
    serde_json::json!({
        "file": service.config.load().server.audit_file(),
        "line": head.link.n,
        "hash": head.link.hex(),
        "checkpoint": head.checkpoint,
        "unsigned": head.unsigned(),
        "reserve_missing": head.reserve_missing,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use data_encoding::{BASE64, HEXLOWER};
    use serde_json::json;

    use crate::service::testing::{key, service, trail};
    use crate::store::{Kind, NewCertificate, State};

    const PEER: Peer = Peer { uid: 7, pid: Some(8) };

    #[tokio::test]
    async fn the_trail_says_who_changed_what_and_what_came_of_it() {
        let (_folder, service) = service();
        let hash = HEXLOWER.encode(&key().public().spki_sha256());
        let public = BASE64.encode(key().public().spki_der());
        let ask = async |request: Value| handle(service.clone(), request, PEER).await;
        let add = |name: &str| json!({"command": "hosts.add", "name": name, "public_key": public});
        let name = |command: &str, name: &str| json!({"command": command, "name": name});

        // What is refused as it stands leaves no trace, however long it is.
        assert!(ask(add(&"x".repeat(1000))).await.unwrap_err().len() < 200);
        assert!(ask(add("a b")).await.is_err());
        assert!(ask(name("hosts.remove", "a b")).await.is_err());
        assert!(ask(name("hsm.drain", "nobody")).await.is_err());
        assert!(trail(&service).is_empty());

        ask(add("node")).await.unwrap();
        assert!(ask(add("node")).await.is_err());
        ask(name("hosts.remove", "NODE")).await.unwrap();
        assert!(ask(name("hosts.remove", "node")).await.is_err());
        ask(json!({"command": "hsm.drain", "name": "gone", "force": true})).await.unwrap();
        let lines = trail(&service);
        let expected = [
            ("hosts.add", "node", Some(&hash), "requested"),
            ("hosts.add", "node", Some(&hash), "success"),
            ("hosts.add", "node", Some(&hash), "requested"),
            ("hosts.add", "node", Some(&hash), "failed"),
            ("hosts.remove", "NODE", None, "requested"),
            ("hosts.remove", "NODE", Some(&hash), "success"),
            ("hosts.remove", "node", None, "requested"),
            ("hosts.remove", "node", None, "failed"),
        ];
        for (line, (event, host, key, outcome)) in lines.iter().zip(expected) {
            let key = key.map_or(Value::Null, |key| json!(key));
            assert_eq!((&line["event"], &line["outcome"]), (&json!(event), &json!(outcome)), "{line}");
            assert_eq!((&line["host"], &line["key"]), (&json!(host), &key), "{line}");
        }
        for (line, outcome) in lines[expected.len()..].iter().zip(["requested", "success"]) {
            assert_eq!((&line["event"], &line["outcome"]), (&json!("hsm.drain"), &json!(outcome)), "{line}");
            assert_eq!((&line["host"], &line["hsm"]), (&Value::Null, &json!("gone")), "{line}");
        }
        assert_eq!(lines.len(), expected.len() + 2);
        for pair in lines.chunks(2) {
            assert_eq!(pair[0]["request"], pair[1]["request"]);
            assert_eq!(pair[0]["by"], json!({"uid": 7, "pid": 8}));
        }
    }

    #[tokio::test]
    async fn labels_and_standing_of_a_host_are_on_record() {
        let (_folder, service) = service();
        let ask = async |request: Value| handle(service.clone(), request, PEER).await;
        let public = BASE64.encode(key().public().spki_der());
        // Labels may be left out, as older programs do.
        ask(json!({"command": "hosts.add", "name": "node", "public_key": public})).await.unwrap();
        let labelled = ask(json!({"command": "hosts.label", "name": "node", "add": ["b", "a=1"]})).await.unwrap();
        assert_eq!(labelled["labels"], json!(["a=1", "b"]));
        assert!(ask(json!({"command": "hosts.label", "name": "node", "add": ["a b"]})).await.is_err());
        let fewer = ask(json!({"command": "hosts.label", "name": "NODE", "remove": ["b", "c"]})).await.unwrap();
        assert_eq!(fewer["labels"], json!(["a=1"]));
        assert!(service.registry.hosts().by_host_key(key().public().spki_der()).is_some());
        let disabled = ask(json!({"command": "hosts.enable", "name": "node", "enabled": false})).await.unwrap();
        assert_eq!(disabled["enabled"], json!(false));
        assert!(service.registry.hosts().by_host_key(key().public().spki_der()).is_none());
        let lines = trail(&service);
        let said: Vec<_> = lines.iter().map(|l| (l["event"].as_str().unwrap(), l["change"].as_str())).collect();
        let label = |change| ("hosts.label", Some(change));
        assert_eq!(said[2..4], [label("+a=1 +b"); 2]);
        assert_eq!(said[4..], [label("-b -c"), label("-b -c"), ("hosts.disable", None), ("hosts.disable", None)]);
    }

    #[tokio::test]
    async fn certificates_are_named_by_enough_of_their_thumbprint() {
        let (_folder, service) = service();
        let der = crate::service::testing::certificate();
        let add = |state: &mut State, kind| {
            let new = crate::store::NewCertificate { kind, der: &der, key_id: b"id", spki: b"spki", primary: false };
            state.add_certificate(&new, 1).map(|added| added.thumbprint)
        };
        let thumbprint = service.registry.with_state(|state| {
            add(state, Kind::Signing)?;
            add(state, Kind::Encryption)
        });
        let thumbprint = thumbprint.unwrap();
        let ask = async |certificate: &str, kind: Option<&str>| {
            let limit = json!({"command": "keys.limit", "certificate": certificate, "kind": kind, "labels": ["a"]});
            handle(service.clone(), limit, PEER).await
        };
        assert!(ask(&thumbprint[..7], None).await.unwrap_err().contains("first 8 digits"));
        assert!(ask("zzzzzzzz", None).await.unwrap_err().contains("first 8 digits"));
        assert!(ask(&thumbprint[..8], None).await.unwrap_err().contains("--kind"));
        assert!(ask(&"0".repeat(64), Some("signing")).await.unwrap_err().contains("no signing certificate"));
        let limited = ask(&thumbprint[..8].to_uppercase(), Some("signing")).await.unwrap();
        assert_eq!((&limited["kind"], &limited["labels"]), (&json!("signing"), &json!(["a"])));
        // One key, one limit.
        assert!(
            service.registry.with_state(|state| state.certificates()).unwrap().iter().all(|c| !c.labels.is_empty())
        );
        let lines = trail(&service);
        assert_eq!((lines.len(), &lines[1]["certificate"]), (2, &json!(thumbprint)));
        assert_eq!(lines[0]["change"], json!("hosts with a"));
    }

    #[tokio::test]
    async fn what_is_not_known_of_the_use_of_a_key_is_said_and_stops_no_change() {
        let (_folder, service) = service();
        let der = [(); 3].map(|()| crate::service::testing::certificate());
        let added = |at: usize, added: i64| {
            let (key_id, spki) = ([at as u8], [at as u8]);
            let new =
                NewCertificate { kind: Kind::Signing, der: &der[at], key_id: &key_id, spki: &spki, primary: false };
            service.registry.with_state(|state| state.add_certificate(&new, added)).unwrap().thumbprint
        };
        // The service's counts began when it was made, the first key is older than that, the others are not.
        let now = crate::sys::clock::unix_now();
        let [old, new, used] = [added(0, 1), added(1, now + 1), added(2, now + 1)];
        let ask = async |command: &str, certificate: &str, more: Value| {
            let mut request = json!({"command": command, "certificate": certificate});
            request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            handle(service.clone(), request, PEER).await
        };
        let warning = |answer: &Value| answer["warnings"][0].as_str().unwrap_or_default().to_owned();
        let [off, none] = [json!({"enabled": false}), json!({})];
        let disabled = ask("keys.enable", &old, off.clone()).await.unwrap();
        assert!(warning(&disabled).contains("is not known") && disabled["enabled"] == false, "{disabled}");
        assert!(disabled["counted_since"].is_i64(), "{disabled}");
        let refused = ask("keys.remove", &old, none.clone()).await.unwrap_err();
        assert!(refused.contains("is not known") && refused.contains("--force"), "{refused}");
        let removed = ask("keys.remove", &old, json!({"force": true})).await.unwrap();
        assert!(warning(&removed).contains("is not known"), "{removed}");
        service.usage.released(None, &[claviger_hsm::KeyRef::new(claviger_hsm::KeyId(vec![2]), &[])], now);
        let disabled = ask("keys.enable", &used, off.clone()).await.unwrap();
        assert!(warning(&disabled).starts_with("1 releases of the last 30 days"), "{disabled}");
        let disabled = ask("keys.enable", &new, off.clone()).await.unwrap();
        assert_eq!((&disabled["warnings"], &disabled["counted_since"]), (&json!([]), &Value::Null));

        // Counts that cannot be read.
        let file = rusqlite::Connection::open(service.config.load().server.state.join("usage.db")).unwrap();
        file.execute_batch("ALTER TABLE releases RENAME TO away").unwrap();
        for (command, more) in [
            ("keys.enable", json!({"enabled": true})),
            ("keys.set-primary", none.clone()),
            ("keys.limit", json!({"labels": ["a"]})),
        ] {
            let answer = ask(command, &used, more).await.unwrap();
            assert!(warning(&answer).contains("is not known"), "{command}: {answer}");
            assert_eq!(answer["releases"], Value::Null, "{command}: {answer}");
        }
        let standing = ask("keys.limit", &used, json!({"labels": ["b"]})).await.unwrap();
        assert_eq!(standing["labels"], json!(["b"]));
        let refused = ask("keys.remove", &new, none).await.unwrap_err();
        assert!(refused.contains("is not known") && refused.contains("--force"), "{refused}");
        assert_eq!(handle(service.clone(), json!({"command": "keys.list"}), PEER).await.unwrap()[0]["enabled"], true);
        let outcomes: Vec<_> = trail(&service).iter().map(|line| line["outcome"].clone()).collect();
        assert!(outcomes.chunks(2).all(|pair| pair == [json!("requested"), json!("success")]), "{outcomes:?}");
    }

    #[tokio::test]
    async fn an_imported_signer_whose_key_is_not_here_is_warned_of_and_never_issues() {
        let (_folder, service) = service();
        let now = crate::sys::clock::unix_now();
        let template = claviger_protocol::health::signer_template(key().public(), now - 1, now + 365 * 24 * 3600);
        let der = template.unwrap().to_be_signed().unwrap().sign_with(key()).unwrap();
        let thumbprint = HEXLOWER.encode(ring::digest::digest(&ring::digest::SHA256, &der).as_ref());
        let signer = json!({"certificate": BASE64.encode(&der), "hsm_key": "0a", "current": true});
        let document = json!({"version": 1, "created": now, "hosts": [], "certificates": [], "signers": [signer]});
        for dry_run in [true, false] {
            let request = json!({"command": "import", "document": document, "dry_run": dry_run});
            let answer = handle(service.clone(), request, PEER).await.unwrap();
            let warnings = answer["warnings"].as_array().unwrap();
            let warning = warnings[0].as_str().unwrap();
            assert_eq!((warnings.len(), &answer["applied"]), (1, &json!(!dry_run)));
            assert!(warning.contains(&thumbprint) && warning.contains("was not found in these HSMs"), "{warning}");
            assert!(warning.contains("whoever has its key makes health certificates"), "{warning}");
        }
        let signers = service.registry.with_state(|state| state.signers()).unwrap();
        assert!(signers.len() == 1 && !signers[0].current, "{signers:?}");
        assert!(signers[0].replaced.is_some_and(|replaced| replaced >= now), "trusted like one that was replaced now");
        assert_eq!(service.registry.signers().certificates().len(), 1);
    }
}
