//! Shared by all handlers: reading the state, and making a change with audit records before and after.

use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use crate::observe::audit::{Peer, SUCCESS};
use crate::registry::error::ChangeError;
use crate::request::Attempt;
use crate::service::Service;
use crate::store::{State, StateError, check_host_name};
use crate::sys::id::request_id;

pub(super) async fn read<T: Send + 'static>(
    service: &Arc<Service>,
    work: impl FnOnce(&mut State) -> Result<T, StateError> + Send + 'static,
) -> Result<T, String> {
    let service = Arc::clone(service);
    let read = tokio::task::spawn_blocking(move || service.registry.with_state(work));
    read.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
}

/// Serialises a reply.
pub(super) fn reply(value: impl Serialize) -> Result<Value, String> {
    serde_json::to_value(value).map_err(|e| e.to_string())
}

/// A change by an administrator. The audit trail gets a record before the change and one with its outcome.
pub(super) struct Change {
    event: &'static str,
    pub(super) attempt: Attempt,
}

impl Change {
    pub(super) fn new(event: &'static str, peer: Peer) -> Self {
        let mut attempt = Attempt::new(request_id());
        attempt.by = Some(peer);
        Self { event, attempt }
    }

    /// A change of a host. An invalid name is refused here, so that it is not written to the audit trail.
    pub(super) fn of_host(event: &'static str, name: &str, peer: Peer) -> Result<Self, String> {
        check_host_name(name).map_err(|e| e.to_string())?;
        let mut change = Self::new(event, peer);
        change.attempt.host = Some(name.to_owned());
        Ok(change)
    }

    /// Records the change, makes it, and records the outcome. `note` adds details that are known only afterwards.
    pub(super) async fn make<T: Send + 'static>(
        mut self,
        service: &Arc<Service>,
        work: impl FnOnce(&mut State) -> Result<T, StateError> + Send + 'static,
        note: impl FnOnce(&mut Attempt, &T),
    ) -> Result<T, String> {
        self.requested(service).await?;
        let made = service.registry.change(work).await;
        if let Ok(value) = &made {
            note(&mut self.attempt, value);
        }
        self.done(service, outcome(&made)).await;
        made.map_err(|error| error.to_string())
    }

    pub(super) async fn requested(&self, service: &Service) -> Result<(), String> {
        let entry = self.attempt.entry(self.event, "requested");
        let by = self.attempt.by.map(|peer| peer.uid);
        tracing::info!(
            event = self.event,
            host = entry.host,
            certificate = entry.certificate,
            change = entry.change,
            hsm = entry.hsm,
            by,
            request = entry.request,
            "an administrator has requested a change"
        );
        if service.audit.administration(&entry).await {
            Ok(())
        } else {
            Err("the change cannot be recorded in the audit trail, so it was not made; see the daemon's log".to_owned())
        }
    }

    /// The outcome is final. If it cannot be recorded, the audit trail logs an error.
    pub(super) async fn done(&self, service: &Service, outcome: &str) {
        tracing::info!(
            event = self.event,
            outcome,
            request = self.attempt.request,
            "the change that an administrator requested has ended"
        );
        let _ = service.audit.administration(&self.attempt.entry(self.event, outcome)).await;
    }
}

/// The outcome of a failed change in the audit trail.
pub(super) const FAILED: &str = "failed";

pub(super) fn outcome<T>(result: &Result<T, ChangeError>) -> &'static str {
    match result {
        Ok(_) => SUCCESS,
        Err(ChangeError::NoEffectYet(_) | ChangeError::Unreadable(_)) => "stored",
        Err(_) => FAILED,
    }
}
