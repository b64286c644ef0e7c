//! What happens at the tokens, for counters and histograms.

use std::sync::Arc;
use std::time::Duration;

use crate::operation::Operation;

/// Something that happened at a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event<'a> {
    /// `C_Login` was called.
    Login,
    /// A session searched the token for all its RSA private keys.
    KeySearch,
    /// A session for operations came up. (The one that holds the login is not counted.)
    SessionOpened,
    /// A session for operations ended.
    SessionClosed,
    /// The member went down for a fault.
    Closed,
    /// A call hangs; the worker process will be killed.
    Stuck,
    /// An operation that failed here was taken to another member, out of the retry budget.
    Retry,
    /// Another member did what had failed here, or had been sent away.
    FailedOver {
        /// That member.
        to: &'a str,
    },
    /// A plaintext or a signature was wrong, and the member is to blame.
    WrongAnswer,
    /// A fresh worker process initialised the member's module after a fault.
    ModuleRenewed,
    /// A call came back.
    Call {
        /// What was asked for.
        op: Operation,
        /// One of [`RV_CLASSES`](crate::RV_CLASSES).
        rv: &'static str,
        /// How long the token took, without any time spent in queues.
        took: Duration,
    },
    /// An operation was answered, well or not.
    Answered {
        /// What was asked for.
        op: Operation,
        /// How long that took since it was submitted to the member, with all queueing.
        took: Duration,
    },
    /// The daemon read replies of the member's worker.
    Batch {
        /// How many at one wake-up.
        jobs: usize,
    },
}

/// Is told, with the member's name, what happens at the tokens. Called on runtime threads: it has to be quick.
pub type Observer = Arc<dyn Fn(&str, Event<'_>) + Send + Sync>;
