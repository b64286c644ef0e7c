//! Imports a private key into the tokens.

use std::sync::Arc;

use claviger_hsm::{Failure, HsmError, KeyId, KeyUsage, MemberState, NewKey};
use claviger_protocol::certificate::Certificate;
use claviger_protocol::rsa_key::{RsaPrivateKey, RsaPublicKey};
use data_encoding::BASE64;
use ring::digest;
use zeroize::Zeroizing;

use crate::admin::message::Secret;
use crate::service::Service;
use crate::signing::private_parts;
use crate::store::Kind;

/// The private key that was sent with a certificate.
pub(super) fn private_key(secret: &Secret, certificate: &Certificate) -> Result<RsaPrivateKey, String> {
    let der = BASE64.decode(secret.expose().as_bytes()).map(Zeroizing::new);
    let der = der.map_err(|_| "the private key is not base64".to_owned())?;
    let key = RsaPrivateKey::from_pkcs8_der(&der).map_err(|e| format!("the private key cannot be used: {e}"))?;
    if key.public().spki_der() != certificate.key().spki_der() {
        return Err("the private key is not the certificate's".to_owned());
    }
    Ok(key)
}

/// Imports a private key into all members. Members that already have it are skipped.
pub(super) async fn import(
    service: &Arc<Service>,
    kind: Kind,
    key: &RsaPrivateKey,
    certificate: &Certificate,
    trust_absent: bool,
) -> Result<(), String> {
    let id = imported_id(kind, key.public());
    let usage = match kind {
        Kind::Signing => KeyUsage::Sign,
        Kind::Encryption => KeyUsage::Decrypt,
    };
    let label: String = certificate.common_name().unwrap_or("claviger").chars().take(64).collect();
    let bits = u32::try_from(key.public().modulus_len() * 8).unwrap_or(u32::MAX);
    let spec = NewKey { id: id.clone(), label, bits, usage };
    // A member that is not up would only delay the command.
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

/// The CKA_ID of an imported key. It depends on the kind, so that a key can be imported for both kinds.
pub(super) fn imported_id(kind: Kind, public: &RsaPublicKey) -> KeyId {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(kind.as_str().as_bytes());
    context.update(public.spki_der());
    KeyId(context.finish().as_ref()[..20].to_vec())
}
