//! One token as the daemon sees it.
//!
//! A member has a queue: calls wait for a *place*, the right to have one call at the member's worker. There are two places for
//! each session, so that a session finds its next call already in the socket. A call is one send; the task that reads the
//! worker's reports wakes the caller (`calls.rs`). What a reply is worth is decided in `judge.rs`. The member's life is one task
//! (`life.rs`); what changes its state from outside that task is in `control.rs`.
//! What a member is made of, with the invariants and the order of locks, is in `parts.rs`.

mod balance;
mod calls;
mod control;
mod conversation;
mod credibility;
mod gauges;
mod judge;
mod life;
mod outstanding;
mod parts;
mod places;
mod process;
mod state;
mod status;
mod usual_cost;

pub(crate) use calls::Outcome;
pub(crate) use outstanding::Limits;
pub(crate) use parts::{Member, Surroundings, launch};
pub use process::WorkerProgram;
pub use state::{LastError, MemberState};
pub use status::MemberStatus;
#[cfg(test)]
pub(crate) use {parts::HiddenVariables, process::Environment};
