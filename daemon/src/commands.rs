//! What an administrator can ask of a running daemon, through its socket.

use std::sync::Arc;

use claviger_hsm::MemberStatus;
use claviger_protocol::rsa_key::RsaPublicKey;
use data_encoding::BASE64;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::admin::Peer;
use crate::attempt::Attempt;
use crate::service::{Service, request_id, unix, unix_now};
use crate::state::Kind;

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
            record(&service, "hosts.add", &name, peer).await?;
            let host = service.change(move |state| state.add_host(&name, key.spki_der(), now)).await?;
            Ok(json!({"name": host.name, "key": host.spki_sha256}))
        }
        Command::RemoveHost { name } => {
            record(&service, "hosts.remove", &name, peer).await?;
            let host = service.change(move |state| state.remove_host(&name)).await?;
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
        Command::DrainHsm { name } => drain(&service, &name, true, peer).await,
        Command::ResumeHsm { name } => drain(&service, &name, false, peer).await,
        Command::ProbeHsm { name } => {
            known(&service, &name)?;
            let took = service.cluster.probe(&name).await.map_err(|e| format!("{name} does not work: {e}"))?;
            Ok(json!({"name": name, "seconds": took.as_secs_f64()}))
        }
    }
}

async fn drain(service: &Service, name: &str, drain: bool, peer: Peer) -> Result<Value, String> {
    known(service, name)?;
    record(service, if drain { "hsm.drain" } else { "hsm.resume" }, name, peer).await?;
    service.cluster.drain(name, drain).map(|status| member(&status)).map_err(|e| e.to_string())
}

fn known(service: &Service, name: &str) -> Result<(), String> {
    let found = service.config.hsm.iter().any(|hsm| hsm.name == name);
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
        "hsm_key": data_encoding::HEXLOWER.encode(&entry.key_id),
        "usage": match entry.kind { Kind::Signing => "sign", Kind::Encryption => "decrypt" },
    })
}

async fn read<T: Send + 'static>(
    service: &Arc<Service>,
    work: impl FnOnce(&crate::state::State) -> Result<T, crate::state::StateError> + Send + 'static,
) -> Result<T, String> {
    let service = Arc::clone(service);
    let read = tokio::task::spawn_blocking(move || service.with_state(work));
    read.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
}

/// Writes the audit line of a change.
async fn record(service: &Service, event: &str, name: &str, peer: Peer) -> Result<(), String> {
    let mut attempt = Attempt::new(request_id());
    attempt.host = Some(name.to_owned());
    tracing::info!(event, name, uid = peer.uid, request = attempt.request, "an administrator's change");
    if service.record(&attempt.entry(event, "requested")).await {
        Ok(())
    } else {
        Err("the change cannot be recorded in the audit trail, so it was not made; see the daemon's log".to_owned())
    }
}
