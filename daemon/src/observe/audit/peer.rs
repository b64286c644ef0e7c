//! Identifies an administrator in the audit trail.

use serde::Serialize;

/// The client process at the administrators' socket, as identified by the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// User id.
    pub uid: u32,
    /// Process id, if the kernel provides it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
}
