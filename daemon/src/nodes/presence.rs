//! Announces this node to the others while it runs.
//!
//! ```text
//!   Absent ──► Announced ⇄ (the record is written again when something has changed, and twice a minute)
//!     ▲   ╲        │ the lease has ended: no renewal reached etcd in time
//!     │    ╲       ▼
//!     │     ╲───► Absent
//!     └── Taken: another daemon runs under this name; tried again
//! ```

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use claviger_hsm::MemberState;
use tokio::time::Instant;

use super::record::{self, NodeRecord, VERSION, alive_key, json, record_key};
use crate::registry::keys::Key;
use crate::service::Service;
use crate::store::{Board, BoardError, Lease};
use crate::sys::clock::unix_now;
use crate::sys::id::request_id;

/// How often the lease is renewed, and the record compared.
const EVERY: Duration = Duration::from_secs(3);
/// Time after which a node that has stopped without a word counts as gone.
const LEASE: Duration = Duration::from_secs(12);
/// Time after which the record is written again though it has not changed: `written` tells the node's clock.
pub(crate) const REWRITTEN: Duration = Duration::from_secs(30);
/// How often the HSMs are asked for their keys.
const KEYS_EVERY: Duration = Duration::from_secs(60);
/// Time limit for the list of one HSM's keys.
const KEYS_WITHIN: Duration = Duration::from_secs(10);
/// Time limit for the last word to the other nodes.
const LEAVE: Duration = Duration::from_secs(2);

/// Tells this daemon from another one with its name.
static INSTANCE: LazyLock<String> = LazyLock::new(request_id);

/// Whether the other nodes know that this one runs.
enum Presence {
    Absent,
    Announced(Lease),
    /// Another daemon has this name.
    Taken,
}

/// Announces the node while the daemon runs.
pub(super) async fn run(service: Arc<Service>, board: Board) {
    let since = unix_now();
    let node = service.config.load().server.node();
    let mut presence = Presence::Absent;
    let mut written: Option<NodeRecord> = None;
    let (mut keys, mut asked) = ((0, Vec::new()), None::<Instant>);
    loop {
        presence = match step(&board, &node, presence).await {
            Ok(next) => next,
            // The lease may still run. If it has ended, the next renewal says so.
            Err((error, last)) => {
                tracing::debug!(%error, "the other nodes are not told of this one");
                last
            }
        };
        if let Presence::Announced(_) = presence {
            if asked.is_none_or(|asked| asked.elapsed() >= KEYS_EVERY) {
                keys = missing_keys(&service).await;
                asked = Some(Instant::now());
            }
            let told = tell(&service, &board, &node, since, &keys, &mut written).await;
            if let Err(error) = told {
                tracing::debug!(%error, "the node's record is not written");
            }
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Renews the lease, or begins one.
async fn step(board: &Board, node: &str, presence: Presence) -> Result<Presence, (BoardError, Presence)> {
    let was_taken = match presence {
        Presence::Announced(lease) => match renewed(board, node, lease).await {
            Ok(true) => return Ok(presence),
            Ok(false) => false,
            Err(error) => return Err((error, presence)),
        },
        Presence::Taken => true,
        Presence::Absent => false,
    };
    let claimed = board.claim(&alive_key(node), INSTANCE.clone(), LEASE).await;
    let begun = claimed.map_err(|error| (error, Presence::Absent))?.map_or(Presence::Taken, Presence::Announced);
    match (&begun, was_taken) {
        (Presence::Taken, false) => {
            tracing::warn!(
                node,
                "another daemon has been running under this node's name within the last {} seconds; \
                 if it goes on, set server.node to a name of its own",
                LEASE.as_secs()
            );
        }
        (Presence::Announced(_), true) => tracing::info!(node, "this node has its name for itself"),
        _ => {}
    }
    Ok(begun)
}

/// Renews the lease. Returns whether this daemon is still announced: somebody may have deleted its key.
async fn renewed(board: &Board, node: &str, lease: Lease) -> Result<bool, BoardError> {
    if !board.renew(lease).await? {
        return Ok(false);
    }
    let found = board.get(&alive_key(node)).await?;
    if found.is_some_and(|found| found.value == INSTANCE.as_bytes()) {
        return Ok(true);
    }
    board.release(lease).await?;
    Ok(false)
}

/// Writes the record if it has changed, or is old.
async fn tell(
    service: &Service,
    board: &Board,
    node: &str,
    since: i64,
    (keys, missing): &(usize, Vec<String>),
    written: &mut Option<NodeRecord>,
) -> Result<(), BoardError> {
    let joined = match &*written {
        Some(last) => last.joined,
        None => record::of(board, node).await?.map_or(since, |record| record.joined),
    };
    let members = service.cluster.members();
    let next = NodeRecord {
        v: VERSION,
        name: node.to_owned(),
        version: env!("CLAVIGER_VERSION").to_owned(),
        joined,
        since,
        written: unix_now(),
        revision: board.revision(),
        members: members.len(),
        members_up: members.iter().filter(|member| member.state == MemberState::Up).count(),
        keys: *keys,
        missing: missing.clone(),
    };
    let same = written.as_ref().is_some_and(|last| NodeRecord { written: last.written, ..next.clone() } == *last);
    // Also when the clock was put back.
    let is_old = written.as_ref().is_none_or(|last| last.written.abs_diff(next.written) >= REWRITTEN.as_secs());
    if !same || is_old {
        board.put(&record_key(node), json(&next)?, None).await?;
        *written = Some(next);
    }
    Ok(())
}

/// The number of keys that every HSM should have, and those that HSMs which are up lack.
async fn missing_keys(service: &Service) -> (usize, Vec<String>) {
    let keys = Arc::clone(&service.registry.keys());
    let signers = Arc::clone(&service.registry.signers());
    let mut wanted: Vec<(String, &Key)> =
        keys.all().map(|(kind, key)| (format!("the {} key {}", kind.as_str(), key.id.id), key)).collect();
    wanted.extend(signers.current().map(|key| (format!("the attestation signer's key {}", key.id.id), key)));
    wanted.sort_by(|one, other| one.0.cmp(&other.0));
    wanted.dedup_by(|one, other| one.0 == other.0);
    let mut missing = Vec::new();
    for member in service.cluster.members().into_iter().filter(|member| member.state == MemberState::Up) {
        let listed = tokio::time::timeout(KEYS_WITHIN, service.cluster.keys_on(&member.name, true)).await;
        let Ok(Ok(listed)) = listed else { continue };
        let lacks = wanted.iter().filter(|(_, key)| !listed.iter().any(|found| found.is(&key.id)));
        missing.extend(lacks.map(|(name, _)| format!("{}: {name}", member.name)));
    }
    (wanted.len(), missing)
}

/// Tells the other nodes that this one stops. If another daemon has its name, that one stays announced.
pub(super) async fn leave(board: &Board, node: &str) {
    let _ = tokio::time::timeout(LEAVE, board.delete_if(&alive_key(node), &INSTANCE)).await;
}
