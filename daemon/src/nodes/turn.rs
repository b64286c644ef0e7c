//! Turns: work that one node at a time may do.
//!
//! A turn is a key in etcd that exists at most once and disappears with its lease. It saves work that several nodes would
//! begin at the same time. It is not what keeps the state right: that is the transaction in which the work ends, which
//! only one node can win.

use std::time::Duration;

use crate::store::{Board, BoardError, Lease};

/// The right to do some work. It ends by [`Turn::end`], or with its time.
#[derive(Debug)]
pub(crate) struct Turn {
    board: Board,
    lease: Lease,
}

impl Turn {
    /// Takes the turn for `work`, for this time at most. `None`: another node has it.
    ///
    /// # Errors
    /// etcd cannot be reached.
    pub(crate) async fn take(
        board: &Board,
        work: &str,
        node: &str,
        time: Duration,
    ) -> Result<Option<Self>, BoardError> {
        let lease = board.claim(&format!("v1/turns/{work}"), node.to_owned(), time).await?;
        Ok(lease.map(|lease| Self { board: board.clone(), lease }))
    }

    /// Gives the turn to other nodes.
    pub(crate) async fn end(self) {
        if let Err(error) = self.board.release(self.lease).await {
            tracing::debug!(%error, "a turn is not given back; it ends by itself");
        }
    }
}
