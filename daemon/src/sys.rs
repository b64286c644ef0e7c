//! Access to the machine, and general-purpose values.

pub mod clock;
pub mod failure;
pub mod id;
pub mod ownership;
pub(crate) mod places;
pub mod print;
pub mod process;
pub(crate) mod rate;
