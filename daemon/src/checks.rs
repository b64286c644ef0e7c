//! The findings of `claviger doctor`: what is wrong, and what to do about it.
//!
//! Every check is a plain function that gives findings. Files and the state are looked at from outside; the HSMs and the audit
//! trail also from within the daemon that runs.

pub(crate) mod files;
mod finding;
pub(crate) mod hsm;
pub(crate) mod state;
mod trail;

use std::sync::Arc;

use crate::service::Service;

pub use self::finding::{Finding, Level};

/// Within the daemon: its HSMs, by its own sessions, and its audit trail.
pub async fn of_daemon(service: &Arc<Service>) -> Vec<Finding> {
    let mut findings = hsm::of_daemon(service).await;
    // Read before the file: what is written meanwhile is more.
    let (path, written) = (service.config.load().server.audit_file(), service.audit.head().link.n);
    let looked = tokio::task::spawn_blocking(move || trail::of_daemon(&path, written));
    findings.extend(looked.await.ok().flatten());
    findings
}
