//! What each node has counted, for all: how often keys were used, and when hosts were last served.
//!
//! A node writes its own counts, and adds those of the others to them when it is asked. Counts of another node are at most
//! `KEYS_EVERY` old, times of hosts `HOSTS_EVERY`.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use claviger_hsm::standstill;
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};

use super::record::{self, VERSION, json, parse};
use crate::service::Service;
use crate::store::usage_counts::{Releases, Seen, Usage};
use crate::store::{Board, BoardError};
use crate::sys::clock::unix_now;

/// How often a node writes its counts of keys.
const KEYS_EVERY: Duration = Duration::from_secs(30);
/// How often a node writes the times of its hosts.
const HOSTS_EVERY: Duration = Duration::from_secs(600);
/// Folders of the counts.
const KEYS: &str = "v1/usage/keys/";
const HOSTS: &str = "v1/usage/hosts/";
/// Values over which the hosts of a node are spread, so that each is small.
const PARTS: usize = 16;
/// Seconds within which a node that joins begins to count. Such a node has used no key before.
const JOINING: i64 = 300;

/// The counts of one node.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyCounts {
    v: u32,
    node: String,
    /// When the node joined, seconds since 1970.
    joined: i64,
    /// When it began to count, if that is less than 30 days ago.
    since: Option<i64>,
    /// Releases of the last 30 days by the key's name, hexadecimal.
    keys: BTreeMap<String, u64>,
}

/// Times of a part of the hosts of one node, seconds since 1970: the last attestation, and the last release.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HostTimes {
    v: u32,
    node: String,
    hosts: BTreeMap<String, (Option<i64>, Option<i64>)>,
}

/// Why the counts of all nodes are not known.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CountsError {
    /// The own counts cannot be read.
    #[error(transparent)]
    Own(#[from] rusqlite::Error),
    /// Those of other nodes cannot be read.
    #[error("the counts of the other nodes: {0}")]
    Others(#[from] BoardError),
    /// A task failed.
    #[error(transparent)]
    Task(#[from] tokio::task::JoinError),
}

/// Writes the counts of this node while the daemon runs.
pub(super) async fn run(service: Arc<Service>, board: Board) {
    let mut written = HashMap::new();
    let mut hosts_due = standstill::now();
    loop {
        tokio::time::sleep(KEYS_EVERY).await;
        let with_hosts = standstill::now() >= hosts_due;
        match publish(&service, &board, with_hosts, &mut written).await {
            Ok(()) if with_hosts => hosts_due = standstill::now() + HOSTS_EVERY,
            Ok(()) => {}
            Err(error) => tracing::debug!(%error, "the counts of this node are not written for the others"),
        }
    }
}

/// Writes what has changed since the last time. `written` has the last value of each key.
async fn publish(
    service: &Arc<Service>,
    board: &Board,
    with_hosts: bool,
    written: &mut HashMap<String, String>,
) -> Result<(), CountsError> {
    let node = service.config.load().server.node();
    // Only a node that the others know has counts.
    let Some(known) = record::of(board, &node).await? else { return Ok(()) };
    let releases = own(service, Usage::releases).await?;
    let keys = releases.by_key().map(|(name, count)| (HEXLOWER.encode(name), count)).collect();
    let counts = KeyCounts { v: VERSION, node: node.clone(), joined: known.joined, since: releases.since, keys };
    let mut values = vec![(format!("{KEYS}{node}"), json(&counts)?)];
    if with_hosts {
        let mut parts: [BTreeMap<_, _>; PARTS] = std::array::from_fn(|_| BTreeMap::new());
        for (name, seen) in own(service, Usage::hosts).await? {
            let part = name.bytes().fold(0_usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into())) % PARTS;
            parts[part].insert(name, (seen.attestation, seen.release));
        }
        for (part, hosts) in parts.into_iter().enumerate() {
            let times = HostTimes { v: VERSION, node: node.clone(), hosts };
            values.push((format!("{HOSTS}{node}/{part}"), json(&times)?));
        }
    }
    for (key, value) in values {
        if written.get(&key) != Some(&value) {
            board.put(&key, value.clone(), None).await?;
            written.insert(key, value);
        }
    }
    Ok(())
}

/// What this node has counted, as `read` reads it from its file.
async fn own<T: Send + 'static>(
    service: &Arc<Service>,
    read: fn(&Usage, i64) -> rusqlite::Result<T>,
) -> Result<T, CountsError> {
    let service = Arc::clone(service);
    Ok(tokio::task::spawn_blocking(move || read(&service.usage, unix_now())).await??)
}

/// When a node's counts begin to be complete. A node that began to count when it joined has counted everything.
fn complete_since(joined: i64, since: Option<i64>) -> Option<i64> {
    since.filter(|since| (since - joined).abs() > JOINING)
}

/// Releases of the last 30 days by all nodes.
///
/// # Errors
/// See [`CountsError`].
pub(crate) async fn releases(service: &Arc<Service>) -> Result<Releases, CountsError> {
    let mut all = own(service, Usage::releases).await?;
    let Some(board) = &service.board else { return Ok(all) };
    let node = service.config.load().server.node();
    if let Some(known) = record::of(board, &node).await? {
        all.since = complete_since(known.joined, all.since);
    }
    for entry in board.list(KEYS).await? {
        let counts: KeyCounts = parse(&entry)?;
        if counts.node != node {
            let keys =
                counts.keys.iter().filter_map(|(name, count)| Some((HEXLOWER.decode(name.as_bytes()).ok()?, *count)));
            all.add(keys, complete_since(counts.joined, counts.since));
        }
    }
    Ok(all)
}

/// When hosts were last served by any node, by name in lower case; by this node if etcd cannot be reached.
///
/// # Errors
/// See [`CountsError`].
pub(crate) async fn hosts(service: &Arc<Service>) -> Result<HashMap<String, Seen>, CountsError> {
    let mut all = own(service, Usage::hosts).await?;
    let Some(board) = &service.board else { return Ok(all) };
    let node = service.config.load().server.node();
    let others = board.list(HOSTS).await.unwrap_or_else(|error| {
        tracing::warn!(%error, "when other nodes served hosts is not known");
        Vec::new()
    });
    for entry in others {
        let times: HostTimes = parse(&entry)?;
        if times.node == node {
            continue;
        }
        for (name, (attestation, release)) in times.hosts {
            let seen: &mut Seen = all.entry(name).or_default();
            seen.attestation = seen.attestation.max(attestation);
            seen.release = seen.release.max(release);
        }
    }
    Ok(all)
}

/// Deletes what is known of a node that is gone.
///
/// # Errors
/// etcd cannot be written.
pub(crate) async fn forget(board: &Board, node: &str) -> Result<(), BoardError> {
    board.delete(&format!("{KEYS}{node}")).await?;
    for part in 0..PARTS {
        board.delete(&format!("{HOSTS}{node}/{part}")).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_counts_since_it_joined_has_counted_everything() {
        assert_eq!(complete_since(1_000, None), None);
        assert_eq!(complete_since(1_000, Some(1_010)), None);
        assert_eq!(complete_since(1_000, Some(999)), None);
        assert_eq!(complete_since(1_000, Some(5_000)), Some(5_000), "its counts were lost after it had joined");
        assert_eq!(complete_since(5_000, Some(1_000)), Some(1_000), "it had a state of its own before");
    }
}
