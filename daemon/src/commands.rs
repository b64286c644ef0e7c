//! What an administrator can ask of a running daemon, through its socket.

use std::sync::Arc;

use claviger_protocol::rsa_key::RsaPublicKey;
use data_encoding::BASE64;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::admin::Peer;
use crate::attempt::Attempt;
use crate::service::{Service, request_id, unix_now};
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
    }
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
