//! Access to the machine, and general-purpose values.

pub mod clock;
pub(crate) mod failure;
pub mod id;
pub(crate) mod ownership;
pub(crate) mod places;
pub mod print;
pub mod process;
pub(crate) mod rate;
