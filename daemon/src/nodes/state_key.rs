//! The key that seals the States of TPM attestations, common to all nodes: a host may do the second step at another node
//! than the first.
//!
//! etcd holds the seed of the key, encrypted to the service's primary encryption key (RSA-OAEP), so only its HSMs open
//! it: a reader of etcd cannot open States. The seed has another length than a transport key, so neither can be taken for
//! the other. The seed is replaced after a week, and when the key that it is encrypted to is no longer in use.

use std::sync::Arc;
use std::time::Duration;

use claviger_hsm::{Hash, HsmError, Oaep, standstill};
use claviger_protocol::algorithm;
use claviger_protocol::tpm::state::{StateKey, StateSeed};
use data_encoding::{BASE64, HEXLOWER};
use serde::{Deserialize, Serialize};

use super::record::{VERSION, json, parse};
use crate::config::AttestMode;
use crate::service::Service;
use crate::signing::OWN_DEADLINE;
use crate::store::{Board, BoardError, Kind};
use crate::sys::clock::unix_now;

const KEY: &str = "v1/tpm-state-key";
/// How often etcd is asked for another seed.
const EVERY: Duration = Duration::from_secs(5);
/// Seconds after which a seed is replaced.
const WEEK: i64 = 7 * 24 * 3600;

/// The seed in etcd.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SealedSeed {
    v: u32,
    /// When it was made, seconds since 1970.
    made: i64,
    /// SHA-256 of the SubjectPublicKeyInfo of the key that it is encrypted to, hexadecimal.
    spki_sha256: String,
    /// The ciphertext, base64.
    seed: String,
}

/// Why this node does not have the common key.
#[derive(Debug, thiserror::Error)]
enum SharingError {
    #[error(transparent)]
    Board(#[from] BoardError),
    #[error("the HSMs: {0}")]
    Hsm(#[from] HsmError),
    #[error("there is no primary encryption certificate")]
    NoKey,
    #[error("nothing can be encrypted to the primary encryption key, or the system has no randomness")]
    NotMade,
}

/// Follows the common key while the daemon runs in TPM mode.
pub(super) async fn run(service: Arc<Service>, board: Board) {
    let (mut known, mut failing) = (None, false);
    loop {
        if service.config.load().attest.mode == AttestMode::Tpm {
            let shared = share(&service, &board, &mut known).await;
            if let Err(error) = &shared
                && !failing
            {
                tracing::warn!(
                    %error,
                    "the key of TPM attestations is not shared with the other nodes: a host has to do both steps at \
                     one node; trying again (this is logged once)"
                );
            }
            failing = shared.is_err();
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Takes the common key over, and makes one if there is none. `known` is the revision of the one in use.
async fn share(service: &Service, board: &Board, known: &mut Option<i64>) -> Result<(), SharingError> {
    loop {
        let found = board.get(KEY).await?;
        let revision = found.as_ref().map_or(0, |entry| entry.revision);
        if let Some(entry) = &found {
            let sealed: SealedSeed = parse(entry)?;
            // A clock that is wrong must not have it replaced again and again.
            let is_old = unix_now().saturating_sub(sealed.made) > WEEK;
            if !is_old && *known == Some(revision) {
                return Ok(());
            }
            if !is_old && let Some(key) = open(service, &sealed).await? {
                service.tpm.replace_key(key);
                *known = Some(revision);
                return Ok(());
            }
        }
        // If another node was faster, its seed is read next.
        board.put_if(KEY, json(&make(service)?)?, revision, None).await?;
    }
}

/// Decrypts a seed. `None`: its key is no longer in use, or this is no seed.
async fn open(service: &Service, sealed: &SealedSeed) -> Result<Option<StateKey>, SharingError> {
    let keys = Arc::clone(&service.registry.keys());
    let mut usable = keys.all().filter(|(kind, key)| {
        *kind == Kind::Encryption && HEXLOWER.encode(&key.certificate.key().spki_sha256()) == sealed.spki_sha256
    });
    let (Some((_, key)), Ok(ciphertext)) = (usable.next(), BASE64.decode(sealed.seed.as_bytes())) else {
        return Ok(None);
    };
    let oaep = Oaep { hash: Hash::Sha1, mgf: Hash::Sha1 };
    let deadline = standstill::now() + OWN_DEADLINE;
    match service.cluster.decrypt(&key.id, oaep, &ciphertext, deadline, None).await {
        Ok(done) => Ok(StateSeed::from_bytes(&done.value).and_then(|seed| StateKey::from_seed(&seed).ok())),
        Err(error) if error.is_data() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Makes a seed and encrypts it to the primary encryption key.
fn make(service: &Service) -> Result<SealedSeed, SharingError> {
    let keys = Arc::clone(&service.registry.keys());
    let (Some(primary), _) = keys.primary() else { return Err(SharingError::NoKey) };
    let public = primary.certificate.key();
    let seed = StateSeed::generate().map_err(|_| SharingError::NotMade)?;
    let sealed = public.encrypt_oaep(algorithm::Oaep::SHA1, seed.as_bytes()).map_err(|_| SharingError::NotMade)?;
    Ok(SealedSeed {
        v: VERSION,
        made: unix_now(),
        spki_sha256: HEXLOWER.encode(&public.spki_sha256()),
        seed: BASE64.encode(&sealed),
    })
}
