//! The tenant's commands. They work on files, without a daemon.

pub mod guardian;
pub(super) mod own_guardian;
pub(crate) mod pinning;
pub mod protector;
pub(super) mod render;
