//! What a node tells of itself. `docs/nodes.md` describes the keys.

use std::collections::BTreeSet;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::store::{Board, BoardError, Entry, State};

/// Folder of the records of all nodes that ever ran.
const RECORDS: &str = "v1/nodes/";
/// Folder of the nodes that run now: these keys disappear with a lease.
const ALIVE: &str = "v1/alive/";
/// The format version that this program writes and reads.
pub(super) const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeRecord {
    /// Format version.
    pub v: u32,
    /// The name: `server.node`.
    pub name: String,
    /// Version of claviger.
    pub version: String,
    /// When the node first had this name in etcd, seconds since 1970.
    pub joined: i64,
    /// When its daemon started.
    pub since: i64,
    /// When this was written, by the node's clock.
    pub written: i64,
    /// etcd's revision of the last change of the state that it has.
    pub revision: i64,
    /// Number of its HSMs.
    pub members: usize,
    /// Number of those that are up.
    pub members_up: usize,
    /// Number of keys that each HSM should have.
    pub keys: usize,
    /// Keys that HSMs which are up lack: `MEMBER: KEY`.
    pub missing: Vec<String>,
}

/// A node, and whether it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ListedNode {
    /// What the node has told.
    #[serde(flatten)]
    pub record: NodeRecord,
    /// Whether its daemon runs and reaches etcd.
    pub running: bool,
}

/// The key of a node's record.
#[must_use]
pub(crate) fn record_key(node: &str) -> String {
    format!("{RECORDS}{node}")
}

/// The key that exists while a node runs.
#[must_use]
pub(crate) fn alive_key(node: &str) -> String {
    format!("{ALIVE}{node}")
}

/// Parses a value.
///
/// # Errors
/// [`BoardError::BadValue`], also for a newer version.
pub(super) fn parse<T: DeserializeOwned>(entry: &Entry) -> Result<T, BoardError> {
    #[derive(Deserialize)]
    struct Version {
        v: u32,
    }
    let bad = |problem: String| BoardError::BadValue { key: entry.key.clone(), problem };
    let Version { v } = serde_json::from_slice(&entry.value).map_err(|error| bad(error.to_string()))?;
    if v != VERSION {
        return Err(bad(format!("it has version {v}, and this program knows version {VERSION}")));
    }
    serde_json::from_slice(&entry.value).map_err(|error| bad(error.to_string()))
}

/// Writes a value.
///
/// # Errors
/// It cannot be written as JSON.
pub(super) fn json(value: &impl Serialize) -> Result<String, BoardError> {
    serde_json::to_string(value).map_err(|error| BoardError::Call(error.to_string()))
}

/// All nodes by name. A record that cannot be read is left out and logged.
///
/// # Errors
/// etcd cannot be read.
pub(crate) async fn list(board: &Board) -> Result<Vec<ListedNode>, BoardError> {
    let alive = board.list(ALIVE).await?;
    let alive: BTreeSet<_> = alive.iter().filter_map(|entry| entry.key.strip_prefix(ALIVE)).collect();
    let mut nodes = Vec::new();
    for entry in board.list(RECORDS).await? {
        match parse::<NodeRecord>(&entry) {
            Ok(record) => nodes.push(ListedNode { running: alive.contains(&*record.name), record }),
            Err(error) => tracing::warn!(%error, "a node's record is left out"),
        }
    }
    Ok(nodes)
}

/// All nodes that share a state, by name; none if it is not in etcd. Blocks on etcd.
///
/// # Errors
/// etcd cannot be read.
pub(crate) fn list_of(state: &State) -> Result<Vec<ListedNode>, BoardError> {
    let Some(board) = state.board() else { return Ok(Vec::new()) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| BoardError::Unreachable(error.to_string()))?.block_on(list(&board))
}

/// The record of one node.
///
/// # Errors
/// etcd, or the record, cannot be read.
pub(super) async fn of(board: &Board, node: &str) -> Result<Option<NodeRecord>, BoardError> {
    board.get(&record_key(node)).await?.map(|entry| parse(&entry)).transpose()
}
