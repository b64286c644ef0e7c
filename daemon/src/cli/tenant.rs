//! The tenant's commands, which ask no daemon and work on files.

pub mod guardian;
pub(super) mod own_guardian;
pub(crate) mod pinning;
pub mod protector;
pub(super) mod render;
