//! Background work of the audit trail: writes summaries and has checkpoints signed. No request waits for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger_hsm::{HsmError, standstill};
use claviger_process::throttle::Throttle;

use crate::observe::audit::AuditError;
use crate::observe::audit::checkpoint::Draft;
use crate::service::Service;
use crate::signing::{self, OWN_DEADLINE};

/// Interval at which refusals are summed up, and at which it is checked whether a checkpoint is due.
const EVERY: Duration = Duration::from_secs(1);
/// Pause after a failed checkpoint.
const RETRY: Duration = Duration::from_secs(10);
/// Time limit for the last summary and the last checkpoint of a process.
const AT_STOP: Duration = Duration::from_secs(2);

/// Why a checkpoint could not be made.
#[derive(Debug, thiserror::Error)]
enum CheckpointError {
    #[error("there is no primary signing certificate")]
    NoKey,
    #[error("the HSMs: {0}")]
    Hsm(#[from] HsmError),
    #[error(transparent)]
    Audit(#[from] AuditError),
}

/// Writes summaries of the counted refusals, while the daemon runs.
pub(super) async fn sum_up(service: Arc<Service>) {
    loop {
        tokio::time::sleep(EVERY).await;
        service.audit.write_summary().await;
    }
}

/// Signs a checkpoint whenever one is due, while the daemon runs.
pub(super) async fn sign(service: Arc<Service>) {
    static SAID: Throttle = Throttle::new();
    let mut failing = false;
    loop {
        tokio::time::sleep(if failing { RETRY } else { EVERY }).await;
        let Some(draft) = service.audit.due_checkpoint(standstill::now(), false) else {
            failing = false;
            continue;
        };
        let signed = checkpoint(&service, &draft, standstill::now() + OWN_DEADLINE).await;
        if let Err(error) = &signed
            && !failing
            && SAID.due(standstill::now()).is_some()
        {
            tracing::warn!(%error, "the audit trail is not signed now; trying again (this is logged once)");
        }
        failing = signed.is_err();
    }
}

/// Writes the last summary before the process ends, and a checkpoint if that is quick.
pub(super) async fn finish(service: &Arc<Service>) {
    let _ = standstill::timeout(AT_STOP, service.audit.write_summary()).await;
    if let Some(draft) = service.audit.due_checkpoint(standstill::now(), true) {
        let signing = checkpoint(service, &draft, standstill::now() + AT_STOP);
        if !matches!(standstill::timeout(AT_STOP, signing).await, Ok(Ok(()))) {
            tracing::info!("the last lines of the audit trail are not signed; the next start signs them");
        }
    }
    if service.audit.head().records > 0 {
        service.audit.keep_head().await;
    }
}

async fn checkpoint(service: &Service, draft: &Draft, deadline: Instant) -> Result<(), CheckpointError> {
    let keys = Arc::clone(&service.registry.keys());
    let (_, Some(key)) = keys.primary() else { return Err(CheckpointError::NoKey) };
    let signed = signing::sign(&service.cluster, &key.id, key.certificate.key(), &draft.message(), deadline).await?;
    Ok(service.audit.checkpoint(draft, &key.certificate, &signed.value).await?)
}
