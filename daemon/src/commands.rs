//! What an administrator can ask of a running daemon, through its socket.

use std::sync::Arc;

use claviger_hsm::MemberStatus;
use claviger_protocol::rsa_key::RsaPublicKey;
use data_encoding::{BASE64, HEXLOWER};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::admin::Peer;
use crate::attempt::Attempt;
use crate::routes::SUCCESS;
use crate::service::{ChangeError, Service, request_id, unix, unix_now};
use crate::state::{Kind, State, StateError, check_host_name};

/// A request to a running daemon.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", deny_unknown_fields)]
pub enum Command {
    /// Registers a host.
    #[serde(rename = "hosts.add")]
    AddHost {
        /// Its name.
        name: String,
        /// Its public key as it stood in the file: SPKI, certificate or RSA1 blob, DER or PEM; base64.
        public_key: String,
    },
    /// Removes a host, which stops its releases at once.
    #[serde(rename = "hosts.remove")]
    RemoveHost {
        /// Its name.
        name: String,
    },
    /// All registered hosts.
    #[serde(rename = "hosts.list")]
    ListHosts,
    /// All key-protection certificates.
    #[serde(rename = "keys.list")]
    ListKeys,
    /// How the HSMs are.
    #[serde(rename = "hsm.list")]
    ListHsms,
    /// Lets a member finish what it has and gives it nothing new.
    #[serde(rename = "hsm.drain")]
    DrainHsm {
        /// Its name.
        name: String,
    },
    /// Takes a drained member back into service.
    #[serde(rename = "hsm.resume")]
    ResumeHsm {
        /// Its name.
        name: String,
    },
    /// Has every member use every registered key, and says what is wrong.
    #[serde(rename = "doctor")]
    Doctor,
    /// Has a member do operations whose right result is known.
    #[serde(rename = "hsm.probe")]
    ProbeHsm {
        /// Its name.
        name: String,
    },
}

/// Answers a request. A change is recorded before it is made.
///
/// # Errors
/// A sentence for a person.
pub async fn handle(service: Arc<Service>, request: Value, peer: Peer) -> Result<Value, String> {
    let command = Command::deserialize(request).map_err(|e| format!("the daemon does not know this command: {e}"))?;
    let now = unix_now();
    match command {
        Command::AddHost { name, public_key } => {
            let key = BASE64.decode(public_key.as_bytes()).map_err(|_| "the key is not base64".to_owned())?;
            let key =
                RsaPublicKey::from_file(&key).map_err(|e| format!("this is no host key that can be used: {e}"))?;
            let mut change = Change::of_host("hosts.add", &name, peer)?;
            change.attempt.key = Some(HEXLOWER.encode(&key.spki_sha256()));
            change.requested(&service).await?;
            let added = service.change(move |state| state.add_host(&name, key.spki_der(), now)).await;
            change.done(&service, outcome(&added)).await;
            let host = added.map_err(|e| e.to_string())?;
            Ok(json!({"name": host.name, "key": host.spki_sha256}))
        }
        Command::RemoveHost { name } => {
            let mut change = Change::of_host("hosts.remove", &name, peer)?;
            change.requested(&service).await?;
            let removed = service.change(move |state| state.remove_host(&name)).await;
            change.attempt.key = removed.as_ref().ok().map(|host| host.spki_sha256.clone());
            change.done(&service, outcome(&removed)).await;
            let host = removed.map_err(|e| e.to_string())?;
            Ok(json!({"name": host.name, "key": host.spki_sha256}))
        }
        Command::ListHosts => {
            let hosts = read(&service, |state| state.hosts()).await?;
            let host = |h: crate::state::Host| json!({"name": h.name, "key": h.spki_sha256, "enabled": h.enabled, "added": h.added});
            Ok(hosts.into_iter().map(host).collect())
        }
        Command::ListKeys => {
            let certificates = read(&service, |state| state.certificates()).await?;
            Ok(certificates.into_iter().map(|c| certificate(&c)).collect())
        }
        Command::ListHsms => Ok(service.cluster.members().iter().map(member).collect()),
        Command::Doctor => {
            let findings = crate::doctor::of_daemon(&service).await;
            serde_json::to_value(findings).map_err(|e| e.to_string())
        }
        Command::DrainHsm { name } => drain(&service, &name, true, peer).await,
        Command::ResumeHsm { name } => drain(&service, &name, false, peer).await,
        Command::ProbeHsm { name } => {
            known(&service, &name)?;
            let took = service.cluster.probe(&name).await.map_err(|e| format!("{name} does not work: {e}"))?;
            Ok(json!({"name": name, "seconds": took.as_secs_f64()}))
        }
    }
}

/// Answers a request that changes nothing and asks nothing of the HSMs, by the word that its name ends in; refuses others.
///
/// # Errors
/// A sentence for a person.
pub async fn review(service: Arc<Service>, request: Value, peer: Peer) -> Result<Value, String> {
    let reads = |name: &str| [".list", ".show", ".status"].iter().any(|end| name.ends_with(end));
    if !request["command"].as_str().is_some_and(reads) {
        return Err("this socket only answers what changes nothing; use admin.sock for this".to_owned());
    }
    handle(service, request, peer).await
}

async fn drain(service: &Service, name: &str, drain: bool, peer: Peer) -> Result<Value, String> {
    known(service, name)?;
    let mut change = Change::new(if drain { "hsm.drain" } else { "hsm.resume" }, peer);
    change.attempt.used(name);
    change.requested(service).await?;
    let drained = service.cluster.drain(name, drain);
    change.done(service, if drained.is_ok() { SUCCESS } else { FAILED }).await;
    drained.map(|status| member(&status)).map_err(|e| e.to_string())
}

fn known(service: &Service, name: &str) -> Result<(), String> {
    let found = service.config.load().hsm.iter().any(|hsm| hsm.name == name);
    if found { Ok(()) } else { Err(format!("no HSM is called {name}; `claviger hsm list` shows them")) }
}

fn member(status: &MemberStatus) -> Value {
    json!({
        "name": status.name,
        "token": status.token,
        "state": status.state.name(),
        "since": unix(status.since),
        "priority": status.priority,
        "weight": status.weight,
        "latency_seconds": status.latency.as_secs_f64(),
        "in_flight": status.in_flight,
        "waiting": status.waiting,
        "sessions": {
            "open": status.sessions_open,
            "wanted": status.sessions_wanted,
            "busy": status.sessions_busy,
            "stuck": status.sessions_stuck,
        },
        "closings": status.closings,
        "last_error": status.last_error.as_ref().map(|error| &error.text),
        "last_error_at": status.last_error.as_ref().map(|error| unix(error.at)),
    })
}

fn certificate(entry: &crate::state::Certificate) -> Value {
    let parsed = claviger_protocol::certificate::Certificate::parse(&entry.der).ok();
    json!({
        "kind": entry.kind.as_str(),
        "thumbprint": entry.thumbprint,
        "subject": parsed.as_ref().and_then(|c| c.common_name()),
        "bits": parsed.as_ref().map(|c| c.key().modulus_len() * 8),
        "not_after": parsed.as_ref().map(|c| c.not_after()),
        "primary": entry.is_primary,
        "enabled": entry.enabled,
        "hsm_key": HEXLOWER.encode(&entry.key_id),
        "usage": match entry.kind { Kind::Signing => "sign", Kind::Encryption => "decrypt" },
    })
}

async fn read<T: Send + 'static>(
    service: &Arc<Service>,
    work: impl FnOnce(&mut State) -> Result<T, StateError> + Send + 'static,
) -> Result<T, String> {
    let service = Arc::clone(service);
    let read = tokio::task::spawn_blocking(move || service.with_state(work));
    read.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
}

/// A change that an administrator asked for, in the audit trail: a line before it is made, and one with its outcome.
struct Change {
    event: &'static str,
    attempt: Attempt,
}

impl Change {
    fn new(event: &'static str, peer: Peer) -> Self {
        let mut attempt = Attempt::new(request_id());
        attempt.by = Some(peer);
        Self { event, attempt }
    }

    /// Of a host. What cannot name one is refused here, so that it does not get into the trail.
    fn of_host(event: &'static str, name: &str, peer: Peer) -> Result<Self, String> {
        check_host_name(name).map_err(|e| e.to_string())?;
        let mut change = Self::new(event, peer);
        change.attempt.host = Some(name.to_owned());
        Ok(change)
    }

    async fn requested(&self, service: &Service) -> Result<(), String> {
        let entry = self.attempt.entry(self.event, "requested");
        let by = self.attempt.by.map(|peer| peer.uid);
        tracing::info!(
            event = self.event,
            host = entry.host,
            hsm = entry.hsm,
            by,
            request = entry.request,
            "an administrator's change"
        );
        if service.record(&entry).await {
            Ok(())
        } else {
            Err("the change cannot be recorded in the audit trail, so it was not made; see the daemon's log".to_owned())
        }
    }

    /// What is made or refused stays so; when that cannot be recorded, the trail itself complains in the log.
    async fn done(&self, service: &Service, outcome: &str) {
        tracing::info!(
            event = self.event,
            outcome,
            request = self.attempt.request,
            "an administrator's change is done"
        );
        let _ = service.record(&self.attempt.entry(self.event, outcome)).await;
    }
}

/// What the trail says of a change that was not made.
const FAILED: &str = "failed";

fn outcome<T>(result: &Result<T, ChangeError>) -> &'static str {
    match result {
        Ok(_) => SUCCESS,
        Err(ChangeError::NoEffectYet(_)) => "stored",
        Err(_) => FAILED,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::service::testing::{key, service, trail};

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
        ask(name("hsm.drain", "gone")).await.unwrap();
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
}
