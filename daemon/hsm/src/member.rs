//! One token as the daemon sees it.
//!
//! A member has a queue: calls wait for a *place*, the right to have one call at the member's worker. There are two places
//! for each session, so that a session finds its next call already in the socket. A call is one send; the task that reads
//! the worker's reports wakes the caller (`calls.rs`). `judge.rs` decides whether a result is right and who is at fault;
//! `exam.rs` has the known-answer tests for that.
//! One task runs the member's life (`life.rs`); `control.rs` has the state changes that come from outside that task.
//! `parts.rs` defines the fields of a member, their invariants and the order of locks.

mod balance;
mod calls;
mod control;
mod conversation;
mod exam;
mod exam_queue;
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
