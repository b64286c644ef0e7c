//! Commands about the nodes that share the state: list, forget.

use std::sync::Arc;

use serde_json::{Value, json};

use super::change::{Change, FAILED, reply};
use crate::nodes::{forget as forget_node, record};
use crate::observe::audit::{Peer, SUCCESS};
use crate::service::Service;
use crate::store::Board;

fn board(service: &Service) -> Result<&Board, String> {
    let alone = "the state is on this machine, so there are no other nodes; [etcd] in the configuration shares it";
    service.board.as_ref().ok_or_else(|| alone.to_owned())
}

pub(super) async fn list(service: &Arc<Service>) -> Result<Value, String> {
    let nodes = record::list(board(service)?).await.map_err(|error| error.to_string())?;
    reply(nodes)
}

pub(super) async fn forget(service: &Arc<Service>, name: String, peer: Peer) -> Result<Value, String> {
    let board = board(service)?;
    let nodes = record::list(board).await.map_err(|error| error.to_string())?;
    let Some(node) = nodes.iter().find(|node| node.record.name == name) else {
        return Err(format!("no node is called {name:?}; `claviger nodes list` shows them"));
    };
    if node.running {
        return Err(format!("the node {name} runs; stop its daemon first"));
    }
    let mut change = Change::new("nodes.forget", peer);
    change.attempt.change = Some(format!("the node {name} is forgotten"));
    change.requested(service).await?;
    let forgotten = forget_node(board, &name).await;
    change.done(service, if forgotten.is_ok() { SUCCESS } else { FAILED }).await;
    forgotten.map_err(|error| error.to_string())?;
    Ok(json!({"name": name}))
}
