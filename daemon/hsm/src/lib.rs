//! Presents many PKCS#11 tokens as one. Each token is served by a process of its own.
//!
//! A [`Cluster`] is a set of tokens, its *members*, which hold the same RSA keys. The cluster sends every operation to a
//! member that can serve it. If the member fails for its own reasons, the cluster tries the operation on another member.
//!
//! From the outside in: [`cluster`](Cluster) picks a member, submits the operation and judges the reply (the table of
//! return codes is in `fault.rs`). A *member* is one token as the daemon sees it: its state, its queue, the operations in
//! flight. `link.rs` defines the frames between the daemon and the *worker*, the process that loads the vendor's library,
//! logs in and calls PKCS#11. The decisions are pure values in [`policy`], the only module that is built without the
//! feature `tokens`. `worker/ffi.rs` holds all unsafe code.

#![deny(unsafe_code)]

pub mod policy;

#[cfg(feature = "tokens")]
mod cluster;
#[cfg(feature = "tokens")]
mod code;
#[cfg(feature = "tokens")]
mod config;
#[cfg(feature = "tokens")]
mod error;
#[cfg(feature = "tokens")]
mod event;
#[cfg(feature = "tokens")]
mod fault;
#[cfg(feature = "tokens")]
mod identity;
#[cfg(feature = "tokens")]
mod job;
#[cfg(feature = "tokens")]
mod keys;
#[cfg(feature = "tokens")]
mod link;
#[cfg(feature = "tokens")]
mod member;
#[cfg(feature = "tokens")]
mod operation;
#[cfg(feature = "tokens")]
mod pin_tries;
#[cfg(all(test, feature = "tokens"))]
#[allow(clippy::unwrap_used)]
#[path = "../tests/suite/software_rsa.rs"]
mod software_rsa;
#[cfg(feature = "tokens")]
pub mod standstill;
#[cfg(feature = "tokens")]
pub mod worker;

#[cfg(feature = "tokens")]
pub use cluster::{Cluster, Done};
#[cfg(feature = "tokens")]
pub use code::{Function, ReturnCode};
#[cfg(feature = "tokens")]
pub use config::{CallTimeouts, MemberConfig, Pin, TokenRef};
#[cfg(feature = "tokens")]
pub use error::{Failure, HsmError, RV_CLASSES, WorkerFault};
#[cfg(feature = "tokens")]
pub use event::{Event, Observer};
#[cfg(feature = "tokens")]
pub use fault::{Fault, FaultOwner, SessionAction};
#[cfg(feature = "tokens")]
pub use identity::{Fingerprint, KeyId, KeyRef};
#[cfg(feature = "tokens")]
pub use job::{Check, KnownAnswerTest};
#[cfg(feature = "tokens")]
pub use keys::{Hash, KeyUsage, NewKey, Oaep, RsaPrivateParts, RsaPublic, SignScheme, TokenKey};
#[cfg(feature = "tokens")]
pub use member::{LastError, MemberState, MemberStatus, WorkerProgram};
#[cfg(feature = "tokens")]
pub use operation::Operation;
#[cfg(feature = "tokens")]
pub use pin_tries::PinTries;
pub use policy::failover::REJECTION_QUORUM;
#[cfg(feature = "tokens")]
pub use worker::{RawSession, init_token, set_env};
