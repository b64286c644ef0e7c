//! Who made a change, as the audit trail names them.

use serde::Serialize;

/// The process at the other end of the administrators' socket, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// User id.
    pub uid: u32,
    /// Process id, where the kernel tells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
}
