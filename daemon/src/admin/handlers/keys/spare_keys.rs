//! The keys on the tokens beside those that certificates name: what each key is for, and how a key that nothing needs
//! is destroyed.

use std::collections::BTreeMap;
use std::sync::Arc;

use claviger_hsm::{Fingerprint, HsmError, KeyId, KeyRef, TokenKey, standstill};
use claviger_protocol::certificate::Certificate;
use serde_json::{Value, json};

use super::token_keys::{PATIENCE, key_id};
use crate::admin::handlers::change::{Change, FAILED, read};
use crate::admin::handlers::hsm;
use crate::observe::audit::{Peer, SUCCESS};
use crate::service::Service;

/// A key as its token shows it: id, and public key if the token reveals it.
type Identity = (Option<Vec<u8>>, Option<Fingerprint>);

/// What each private key is needed for, by its public key and by its id.
struct Needs(Vec<(Vec<u8>, Fingerprint, String)>);

impl Needs {
    async fn of(service: &Arc<Service>) -> Result<Self, String> {
        let (certificates, signers) = read(service, |state| Ok((state.certificates()?, state.signers()?))).await?;
        let mut needs = Vec::new();
        let mut need = |id: &[u8], der: &[u8], what: String| {
            if let Ok(certificate) = Certificate::parse(der) {
                needs.push((id.to_vec(), Fingerprint::of_modulus(certificate.key().modulus()), what));
            }
        };
        for of in &certificates {
            need(&of.key_id, &of.der, format!("{} certificate {}", of.kind, of.thumbprint));
        }
        for of in &signers {
            need(&of.key_id, &of.der, format!("attestation signer {}", of.thumbprint));
        }
        Ok(Self(needs))
    }

    /// What needs this key. A token that hides the public key of a key shows only its id.
    fn need(&self, key: &TokenKey) -> Vec<&str> {
        let is_it = |id: &[u8], public: Fingerprint| match key.fingerprint {
            Some(shown) => shown == public,
            None => key.id.as_ref().is_some_and(|shown| shown.0 == id),
        };
        self.0.iter().filter(|(id, public, _)| is_it(id, *public)).map(|(.., what)| what.as_str()).collect()
    }
}

/// Lists the private keys on all tokens. A key that several members hold is one row.
pub(in crate::admin::handlers) async fn on_tokens(service: &Arc<Service>) -> Result<Value, String> {
    let needs = Needs::of(service).await?;
    let mut rows: BTreeMap<Identity, (TokenKey, Vec<String>)> = BTreeMap::new();
    let mut warnings = Vec::new();
    for hsm in &service.config.load_full().hsm {
        match standstill::timeout(PATIENCE, service.cluster.keys_on(&hsm.name, true)).await {
            Ok(Ok(keys)) => {
                for key in keys {
                    let identity = (key.id.as_ref().map(|id| id.0.clone()), key.fingerprint);
                    rows.entry(identity).or_insert((key, Vec::new())).1.push(hsm.name.clone());
                }
            }
            Ok(Err(error)) => warnings.push(format!("{} does not answer: {error}", hsm.name)),
            Err(_) => warnings.push(format!("{} does not answer in time", hsm.name)),
        }
    }
    let rows = rows.into_values().map(|(key, members)| {
        json!({
            "hsm_key": key.id.as_ref().map(ToString::to_string),
            "name": key.label,
            "bits": key.public.as_ref().map(|public| public.n.len() * 8),
            "usage": match (key.signs, key.decrypts) {
                (true, true) => "sign, decrypt",
                (true, false) => "sign",
                (false, true) => "decrypt",
                (false, false) => "none",
            },
            "members": members,
            "needed_by": needs.need(&key),
        })
    });
    Ok(json!({ "keys": rows.collect::<Vec<_>>(), "warnings": warnings }))
}

/// Destroys a key that no certificate and no attestation signer needs.
pub(in crate::admin::handlers) async fn destroy(
    service: &Arc<Service>,
    hsm_key: &str,
    member: Option<String>,
    peer: Peer,
) -> Result<Value, String> {
    let id = key_id(hsm_key)?;
    if let Some(member) = &member {
        hsm::known(service, member)?;
    }
    let needs = Needs::of(service).await?;
    let mut holders: Vec<(String, KeyRef)> = Vec::new();
    for hsm in &service.config.load_full().hsm {
        if member.as_ref().is_some_and(|member| *member != hsm.name) {
            continue;
        }
        let keys = standstill::timeout(PATIENCE, service.cluster.keys_on(&hsm.name, true)).await;
        // On a member that cannot be asked the key would stay unseen.
        let keys = keys.map_err(|_| format!("{} does not answer in time; nothing was destroyed", hsm.name))?;
        let keys = keys.map_err(|error| format!("{} does not answer: {error}; nothing was destroyed", hsm.name))?;
        if let Some(key) = spare(&keys, &id, &needs)? {
            holders.push((hsm.name.clone(), key));
        }
    }
    if holders.is_empty() {
        return Err(format!("no HSM has a key {id}; `claviger keys list --hsm` shows all"));
    }
    let mut change = Change::new("keys.destroy", peer);
    let members: Vec<&str> = holders.iter().map(|(name, _)| name.as_str()).collect();
    change.attempt.change = Some(format!("key {id} on {}", members.join(", ")));
    change.requested(service).await?;
    let mut failed = Vec::new();
    for (name, key) in &holders {
        match service.cluster.destroy(name, key).await.map_err(|failure| failure.error) {
            Ok(()) | Err(HsmError::NoSuchKey) => {}
            Err(error) => failed.push(format!("{name} ({error})")),
        }
    }
    change.done(service, if failed.is_empty() { SUCCESS } else { FAILED }).await;
    if failed.is_empty() {
        return Ok(json!({ "hsm_key": id.to_string(), "members": members }));
    }
    Err(format!("the key {id} was not destroyed on {}; the same command tries again", failed.join(", ")))
}

/// The key with this id, if nothing needs it and the id means one key.
fn spare(keys: &[TokenKey], id: &KeyId, needs: &Needs) -> Result<Option<KeyRef>, String> {
    let of_id: Vec<&TokenKey> = keys.iter().filter(|key| key.has_id(id)).collect();
    let Some(first) = of_id.first() else { return Ok(None) };
    if let Some(need) = of_id.iter().flat_map(|key| needs.need(key)).next() {
        return Err(format!("the key {id} is needed by the {need}; remove that first, if it is to go"));
    }
    if of_id.iter().any(|key| key.fingerprint != first.fingerprint) {
        return Err(format!("several keys have the id {id}; use the vendor's tool to remove the one you mean"));
    }
    match &first.public {
        Some(public) => Ok(Some(KeyRef::new(id.clone(), &public.n))),
        None => Err(format!("the token does not tell the public key of {id}; use the vendor's tool to remove it")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use claviger_hsm::RsaPublic;

    fn key(id: &[u8], modulus: u8) -> TokenKey {
        TokenKey {
            id: Some(KeyId(id.to_vec())),
            label: "x".to_owned(),
            public: Some(RsaPublic { n: vec![modulus; 4], e: vec![3] }),
            decrypts: true,
            signs: true,
            always_authenticate: false,
            fingerprint: Some(Fingerprint::of_modulus(&[modulus; 4])),
        }
    }

    #[test]
    fn only_a_key_that_nothing_needs_and_whose_id_means_one_key_is_spare() {
        let id = KeyId(b"a".to_vec());
        let needs = Needs(vec![(b"a".to_vec(), Fingerprint::of_modulus(&[7; 4]), "signing certificate 5f".to_owned())]);
        assert!(spare(&[], &id, &needs).unwrap().is_none());
        assert!(spare(&[key(b"b", 7)], &id, &needs).unwrap().is_none());
        assert!(spare(&[key(b"a", 7)], &id, &needs).unwrap_err().contains("needed by the signing certificate 5f"));
        assert_eq!(spare(&[key(b"a", 8)], &id, &needs).unwrap().unwrap().id, id);
        assert!(spare(&[key(b"a", 8), key(b"a", 9)], &id, &needs).unwrap_err().contains("several keys"));
        let hidden = TokenKey { public: None, fingerprint: None, ..key(b"a", 8) };
        assert!(spare(std::slice::from_ref(&hidden), &id, &needs).unwrap_err().contains("needed by"));
        assert!(spare(&[hidden], &id, &Needs(Vec::new())).unwrap_err().contains("vendor's tool"));
    }
}
