//! Events at the tokens, for counters and histograms.

use std::sync::Arc;
use std::time::Duration;

use crate::operation::Operation;

/// An event at a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event<'a> {
    /// `C_Login` was called.
    Login,
    /// A session searched the token for all its RSA private keys.
    KeySearch,
    /// A session for operations was opened. The session that holds the login is not counted.
    SessionOpened,
    /// A session for operations was closed.
    SessionClosed,
    /// A fault took the member down.
    Down,
    /// A call hangs; its worker process will be killed.
    Stuck,
    /// An operation that failed at this member was retried at another one, at the cost of the retry budget.
    Retry,
    /// Another member completed an operation that had failed at this member or that this member had turned away.
    FailedOver {
        /// Name of the member that completed the operation.
        to: &'a str,
    },
    /// The member gave a wrong plaintext or signature and is at fault.
    WrongAnswer,
    /// A fresh worker process initialised the member's module after a fault.
    ModuleRenewed,
    /// A call returned.
    Call {
        /// The kind of operation.
        op: Operation,
        /// Class of the return code, one of [`RV_CLASSES`](crate::RV_CLASSES).
        rv: &'static str,
        /// Time at the token, without time in queues.
        took: Duration,
    },
    /// An operation at a member ended, with or without success.
    Answered {
        /// The kind of operation.
        op: Operation,
        /// Time from the submission to the member until the answer, queueing included.
        took: Duration,
    },
    /// The daemon read replies of the member's worker.
    Batch {
        /// Number of replies in one wake-up.
        jobs: usize,
    },
}

/// Callback for events; its first argument is the member's name. It runs on runtime threads, so it must return quickly.
pub type Observer = Arc<dyn Fn(&str, Event<'_>) + Send + Sync>;
