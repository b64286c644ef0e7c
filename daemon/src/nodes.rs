//! Several nodes that share a state in etcd: who they are, whose turn it is to make an attestation signer, the key of TPM
//! attestations, and what each has counted. Without etcd, none of this runs.

pub(crate) mod presence;
pub(crate) mod record;
pub(crate) mod state_key;
pub(crate) mod turn;
pub(crate) mod usage;

use std::sync::Arc;

use tokio::task::JoinHandle;

use crate::service::Service;
use crate::store::{Board, BoardError};

/// Starts the background work of a node. Nothing is started if the state is local.
#[must_use]
pub(crate) fn start(service: &Arc<Service>) -> Vec<JoinHandle<()>> {
    let Some(board) = service.board.clone() else { return Vec::new() };
    vec![
        tokio::spawn(presence::run(Arc::clone(service), board.clone())),
        tokio::spawn(state_key::run(Arc::clone(service), board.clone())),
        tokio::spawn(usage::run(Arc::clone(service), board)),
    ]
}

/// Deletes the record and the counts of a node that does not run any more.
///
/// # Errors
/// etcd cannot be written.
pub(crate) async fn forget(board: &Board, node: &str) -> Result<(), BoardError> {
    board.delete(&record::record_key(node)).await?;
    usage::forget(board, node).await
}

/// Tells the other nodes that this one stops.
pub(crate) async fn leave(service: &Service) {
    if let Some(board) = &service.board {
        presence::leave(board, &service.config.load().server.node()).await;
    }
}
