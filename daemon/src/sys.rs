//! What the daemon knows of the machine it runs on, and plain values that no other room owns.

pub mod clock;
pub mod failure;
pub mod id;
pub mod ownership;
pub(crate) mod places;
pub mod print;
pub mod process;
pub(crate) mod rate;
