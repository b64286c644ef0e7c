//! The findings of `claviger doctor`: problems and their remedies.
//!
//! Each check is a plain function that returns findings. Files and the state are checked by the doctor's process. HSMs
//! and audit trail are also checked inside a running daemon.

pub(crate) mod files;
mod finding;
pub(crate) mod hsm;
pub(crate) mod nodes;
pub(crate) mod state;
mod trail;

use std::sync::Arc;

use crate::service::Service;

pub(crate) use self::finding::{Finding, Level};

/// Checks inside the daemon: its HSMs, in its own sessions, and its audit trail.
pub(crate) async fn of_daemon(service: &Arc<Service>) -> Vec<Finding> {
    let mut findings = hsm::of_daemon(service).await;
    // Read the position before the file, because the daemon continues to write.
    let (path, written) = (service.config.load().server.audit_file(), service.audit.head().link.n);
    let looked = tokio::task::spawn_blocking(move || trail::of_daemon(&path, written));
    findings.extend(looked.await.ok().flatten());
    findings
}
