//! Commands about the attestation signers: show, rotate, revoke.

use std::sync::Arc;

use serde_json::Value;

use super::change::{Change, FAILED, read, reply};
use crate::admin::message::signers::{Revoked, Rotated, Shown};
use crate::attest::signer_rotation::{self, current};
use crate::observe::audit::Peer;
use crate::observe::audit::SUCCESS;
use crate::service::Service;
use crate::store;
use crate::sys::clock::unix_now;

/// Minimum number of thumbprint digits that identify a signer.
const FEWEST_DIGITS: usize = 8;

pub(super) async fn list(service: &Arc<Service>) -> Result<Value, String> {
    let (signers, revoked) = read(service, |state| Ok((state.signers()?, state.revoked_signers()?))).await?;
    let all: Vec<Shown> = signers.into_iter().map(Shown::from).chain(revoked.into_iter().map(Shown::from)).collect();
    reply(all)
}

pub(super) async fn rotate(service: &Arc<Service>, peer: Peer) -> Result<Value, String> {
    let replaced = current(service);
    let current = make_new(service, peer).await?;
    reply(Rotated { current, replaced })
}

/// Creates a signer, with audit records; returns its thumbprint.
async fn make_new(service: &Arc<Service>, peer: Peer) -> Result<String, String> {
    let mut change = Change::new("signers.rotate", peer);
    let before = current(service);
    change.attempt.certificate.clone_from(&before);
    change.requested(service).await?;
    let made = signer_rotation::replace(service).await;
    let now = current(service).filter(|now| Some(now) != before.as_ref());
    if let Some(now) = &now {
        change.attempt.change = Some(format!("the attestation signer {now} issues"));
    }
    change.done(service, if made.is_ok() && now.is_some() { SUCCESS } else { FAILED }).await;
    made.map_err(|error| format!("no new attestation signer can be made: {error}"))?;
    now.ok_or_else(|| "no new attestation signer was made; see the daemon's log".to_owned())
}

pub(super) async fn revoke(service: &Arc<Service>, wanted: &str, force: bool, peer: Peer) -> Result<Value, String> {
    let signer = named(service, wanted).await?;
    let thumbprint = signer.thumbprint.clone();
    let mut warnings = Vec::new();
    let same_key = read(service, {
        let thumbprint = thumbprint.clone();
        move |state| state.signers_of_key(&thumbprint)
    })
    .await?;
    // Create the new signer first, so that hosts can attest again when their certificates are refused.
    let mut made = false;
    if same_key.iter().any(|signer| signer.current) {
        match make_new(service, peer).await {
            Ok(_) => made = true,
            Err(error) if force => warnings.push(format!("{error}; until one is made, no host can attest")),
            Err(error) => {
                return Err(format!(
                    "{error}. So {thumbprint} was not revoked: no host could attest. Its health certificates are still \
                     trusted; --force revokes it all the same"
                ));
            }
        }
    }
    let mut change = Change::new("signers.revoke", peer);
    change.attempt.certificate = Some(thumbprint.clone());
    let now = unix_now();
    let work = move |state: &mut store::State| state.revoke_signer(&thumbprint, force, now);
    let revoked = change
        .make(service, work, |attempt, revoked: &Vec<String>| {
            attempt.change = Some(format!("{} certificates of its key", revoked.len()));
        })
        .await?;
    let current = current(service);
    if current.is_none() {
        service.signer_missing.notify_one();
    }
    reply(Revoked { revoked, current, made, warnings })
}

/// Finds the signer by its thumbprint or an unambiguous prefix of it.
async fn named(service: &Arc<Service>, thumbprint: &str) -> Result<store::Signer, String> {
    let wanted = super::keys::digits(thumbprint);
    if wanted.len() < FEWEST_DIGITS || !wanted.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(format!("a signer is named by its thumbprint, or at least its first {FEWEST_DIGITS} digits"));
    }
    let (mut found, revoked) = read(service, |state| Ok((state.signers()?, state.revoked_signers()?))).await?;
    found.retain(|signer| signer.thumbprint.starts_with(&wanted));
    match found.len() {
        1 => Ok(found.swap_remove(0)),
        0 if revoked.iter().any(|signer| signer.thumbprint.starts_with(&wanted)) => {
            Err(format!("the attestation signer {wanted} is revoked already"))
        }
        0 => Err(format!("there is no attestation signer {wanted}; `claviger signers list` shows them")),
        _ => Err(format!("{wanted} is not one signer alone; give more digits")),
    }
}
