//! PKCS#11 tokens for a server.
//!
//! A [`Cluster`] is a set of tokens, its *members*, that hold the same RSA keys. It opens sessions, logs in once for each
//! token, looks keys up once for each session, and sends every operation to a member that can serve it; what failed for a
//! member's own reasons is tried elsewhere.
//!
//! From the outside in: [`cluster`](Cluster) picks a member, submits the job and judges what came back (the table is in
//! `fault.rs`); a member has a queue and pools sessions; a session works on an OS thread of its own (`worker.rs`), because
//! PKCS#11 calls block; a module is one vendor library, loaded and initialised once. The supervisor finds what hangs and
//! brings back what was closed. What it decides by is in [`policy`], which is all there is of this crate without its feature
//! `tokens`. `ffi.rs` holds all unsafe code there is.

#![deny(unsafe_code)]

pub mod policy;

#[cfg(feature = "tokens")]
mod bare;
#[cfg(feature = "tokens")]
mod clock;
#[cfg(feature = "tokens")]
mod cluster;
#[cfg(feature = "tokens")]
mod config;
#[cfg(feature = "tokens")]
mod discovery;
#[cfg(feature = "tokens")]
mod error;
#[cfg(feature = "tokens")]
mod fault;
#[cfg(feature = "tokens")]
#[allow(unsafe_code)]
mod ffi;
#[cfg(feature = "tokens")]
mod identity;
#[cfg(feature = "tokens")]
mod key_table;
#[cfg(feature = "tokens")]
mod keys;
#[cfg(feature = "tokens")]
mod module;
#[cfg(feature = "tokens")]
mod oaep;
#[cfg(feature = "tokens")]
mod pin_tries;
#[cfg(feature = "tokens")]
mod request;
#[cfg(feature = "tokens")]
mod session;
#[cfg(feature = "tokens")]
pub mod standstill;
#[cfg(feature = "tokens")]
mod usual_cost;
#[cfg(feature = "tokens")]
mod worker;

#[cfg(feature = "tokens")]
pub use bare::Bare;
#[cfg(feature = "tokens")]
pub use cluster::{Cluster, Done, LastError, MemberState, MemberStatus};
#[cfg(feature = "tokens")]
pub use config::{MemberConfig, Patience, Pin, TokenRef};
#[cfg(feature = "tokens")]
pub use error::{HsmError, RV_CLASSES};
#[cfg(feature = "tokens")]
pub use fault::{Fate, Fault, Whose};
#[cfg(feature = "tokens")]
pub use ffi::set_env;
#[cfg(feature = "tokens")]
pub use identity::{Fingerprint, KeyRef};
#[cfg(feature = "tokens")]
pub use key_table::TokenKey;
#[cfg(feature = "tokens")]
pub use keys::{Hash, KeyId, KeyUsage, NewKey, Oaep, RsaPrivateParts, RsaPublic, SignScheme};
#[cfg(feature = "tokens")]
pub use module::init_token;
#[cfg(feature = "tokens")]
pub use pin_tries::PinTries;
pub use policy::failover::REJECTION_QUORUM;
#[cfg(feature = "tokens")]
pub use request::{Check, KnownGood};

use std::sync::Arc;
use std::time::Duration;

/// Something that happened at a token, for counters and histograms.
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
    /// The member was closed for a fault.
    Closed,
    /// A call hangs, and its thread was given up.
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
    /// The member's module was finalised and initialised again.
    ModuleRenewed,
    /// A call came back.
    Call {
        /// What was asked for: `decrypt`, `sign`, `random`, `keys`, `generate`, `import`, `probe`, or `open`
        /// for a session.
        op: &'static str,
        /// One of [`RV_CLASSES`].
        rv: &'static str,
        /// How long the token took, without any time spent in queues.
        took: Duration,
    },
    /// A session has worked off what was asked for, well or not.
    Answered {
        /// As in `Call`.
        op: &'static str,
        /// How long that took since it was submitted to the member, with all queueing.
        took: Duration,
    },
    /// A session took jobs from its member's queue.
    Batch {
        /// How many at once.
        jobs: usize,
    },
}

/// Is told, with the member's name, what happens at the tokens. Called from session threads: it has to be quick.
pub type Observer = Arc<dyn Fn(&str, Event<'_>) + Send + Sync>;
