//! Several releases in one request (protocol page, section 2.7): the health certificate is checked once, the protectors
//! are released concurrently over the cluster, and one bad protector does not affect the others.

use std::collections::HashMap;
use std::sync::Arc;

use claviger_hsm::standstill;
use claviger_protocol::batch::BatchRequest;
use claviger_protocol::error::Refusal;
use claviger_protocol::payload::ApiVersion;
use claviger_protocol::request::RollResponse;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{Instrument, error_span};

use crate::admission::HostAt;
use crate::observe::metrics;
use crate::release::hsm::Hsm;
use crate::release::{Grant, Release, decide, fast_reject, healthy_host, roll_protector};
use crate::request::Attempt;
use crate::service::Service;

/// Most releases of one request that run or wait for their turn at the same time. Enough to keep a cluster busy, and
/// few in the queue. The body's size limits the other memory of a request.
const SIDE_BY_SIDE: usize = 32;

/// Releases each protector of a request. Every item is decided, recorded and counted like a single release. Its request
/// id is that of the request with the item's number.
///
/// # Errors
/// A problem of the whole request: its structure, its algorithms, its health certificate.
pub(crate) async fn roll<H: Hsm>(
    service: &Arc<Service>,
    hsm: &H,
    body: &[u8],
    attempt: &mut Attempt,
) -> Result<Vec<Result<RollResponse, Refusal>>, Refusal> {
    let release = Release::begin(service, hsm, ApiVersion::V2, attempt);
    let sender = fast_reject(&release, body, BatchRequest::peek_health_certificate, attempt)?;
    let request = sender.read(service, body, BatchRequest::parse, attempt).await?;
    let host = healthy_host(service, release.in_force(), &request.health_certificate, attempt);
    let host = host.inspect_err(|_| sender.charge(service, body.len(), attempt))?;
    let from = HostAt::new(&host.host_name, attempt);
    let places = Arc::new(Semaphore::new(SIDE_BY_SIDE));
    let mut items = JoinSet::new();
    let mut numbers = HashMap::new();
    let count = request.ingress_protectors.len();
    metrics::batch(count);
    for (at, protector) in request.ingress_protectors.into_iter().enumerate() {
        let (service, hsm, in_force) = (service.clone(), hsm.clone(), release.in_force().clone());
        let (host, places, from) = (host.clone(), places.clone(), from.clone());
        let mut attempt = attempt.item(at + 1);
        // Each item counts: items beyond the host's rate are refused individually.
        let within_rate = service.admission.within_rate(&from);
        let span = error_span!("item", request = attempt.request);
        let work = async move {
            let asked = standstill::now();
            // The semaphore is never closed.
            let _place = places.acquire().await;
            let sha256 = attempt.protector(&protector);
            let result = async {
                within_rate?;
                let admitted = service.admission.turn(&from, &attempt, &sha256).await;
                attempt.waited_for_turn(asked);
                let _permit = admitted?;
                let algorithms = request.algorithms;
                let release = Release::with(&service, &hsm, ApiVersion::V2, in_force);
                roll_protector(&release, &host, algorithms, (&protector, sha256), &mut attempt).await
            };
            let result = result.await;
            (at, attempt, result)
        };
        let task = items.spawn(work.instrument(span));
        numbers.insert(task.id(), at);
    }
    let mut done = Vec::with_capacity(count);
    while let Some(item) = items.join_next().await {
        match item {
            Ok(item) => done.push(item),
            Err(error) => {
                // A panic in an item is an internal error.
                tracing::error!(%error, "a batch item failed");
                if let Some(at) = numbers.get(&error.id()) {
                    done.push((*at, attempt.item(at + 1), Err(Refusal::internal())));
                }
            }
        }
    }
    Ok(decide_all(service, done, count).await)
}

/// Decides all items together after the last one is done, because they are sent together: in the meantime an
/// administrator may have removed the host or disabled a key.
async fn decide_all(
    service: &Arc<Service>,
    items: Vec<(usize, Attempt, Result<Grant, Refusal>)>,
    count: usize,
) -> Vec<Result<RollResponse, Refusal>> {
    let mut results: Vec<_> = (0..count).map(|_| Err(Refusal::internal())).collect();
    let mut deciding = JoinSet::new();
    for (at, attempt, result) in items {
        let service = Arc::clone(service);
        let span = error_span!("item", request = attempt.request);
        let work = async move { (at, decide(&service, ApiVersion::V2, &attempt, result).await) };
        deciding.spawn(work.instrument(span));
    }
    while let Some(decided) = deciding.join_next().await {
        match decided {
            Ok((at, result)) => results[at] = result,
            Err(error) => tracing::error!(%error, "a batch item could not be decided"),
        }
    }
    results
}
