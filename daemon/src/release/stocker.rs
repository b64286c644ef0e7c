//! Fills the stock in the gaps between releases, while sessions are idle.

use std::sync::Arc;
use std::time::Duration;

use claviger_hsm::standstill;
use tokio::task::JoinSet;

use super::egress;
use super::hsm::Hsm;
use super::ours::Ours;
use crate::service::Service;
use crate::signing::OWN_DEADLINE;
use crate::stock::{Allowed, Order};
use crate::store::usage_counts::RememberedSet;
use crate::sys::clock::unix_now;

/// Time to wait if no item is needed.
const PAUSE: Duration = Duration::from_millis(50);
/// Minimum time to wait if no item may be made.
const LEAST_PAUSE: Duration = Duration::from_millis(5);
/// Time from the end of one sweep through the stock to the next sweep.
const SWEEP: Duration = Duration::from_secs(1);
/// Interval at which the list of sets that are worth stocking is stored.
const REMEMBER: Duration = Duration::from_secs(60);
/// Maximum number of stored sets, 8 to 16 KiB each.
const MOST_REMEMBERED: usize = 1_024;

/// Fills the stock for as long as the daemon runs.
pub(crate) async fn run<H: Hsm>(service: Arc<Service>, hsm: H) {
    recall(&service).await;
    let mut making = JoinSet::new();
    let (mut swept, mut remembered) = (standstill::now(), standstill::now());
    loop {
        while making.try_join_next().is_some() {}
        if standstill::since(swept) >= SWEEP && service.stock.sweep(limit(&service)) {
            swept = standstill::now();
        }
        if standstill::since(remembered) >= REMEMBER {
            remember(&service).await;
            remembered = standstill::now();
        }
        let pause = match next(&service, &hsm, making.len()) {
            Next::Make(order) => {
                making.spawn(fill(hsm.clone(), order));
                continue;
            }
            Next::NotFor(pause) => pause.clamp(LEAST_PAUSE, PAUSE),
            Next::Nothing => PAUSE,
        };
        tokio::select! {
            Some(_) = making.join_next() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// The stock's memory limit in bytes.
fn limit(service: &Service) -> usize {
    service.config.load().release.stock_bytes()
}

/// What to do now.
enum Next {
    /// Make this item.
    Make(Order),
    /// The releases need the sessions, at least for this time.
    NotFor(Duration),
    /// No item is needed, or no session is idle.
    Nothing,
}

/// What to do now, if `making` items are already being made. No item is made while a release waits. Otherwise,
/// [`Stock::allowed`](crate::stock::Stock::allowed) gives the number of items that may be made at the same time.
fn next<H: Hsm>(service: &Service, hsm: &H, making: usize) -> Next {
    let idle = hsm.idle();
    if idle == 0 {
        return Next::Nothing;
    }
    if service.admission.load().waiting > 0 {
        return Next::NotFor(PAUSE);
    }
    // Sessions that make an item are not idle.
    match service.stock.allowed(idle + making) {
        Allowed::NoneFor(time) => Next::NotFor(time),
        Allowed::Items(allowed) if making >= allowed => Next::Nothing,
        Allowed::Items(_) => service.stock.order(limit(service)).map_or(Next::Nothing, Next::Make),
    }
}

/// Makes an ordered item. The check for wrong results of an HSM is done before the item enters the stock.
async fn fill<H: Hsm>(hsm: H, order: Order) {
    let made = async {
        let ours = Ours::find(order.set(), order.keys()).ok()?;
        let (deadline, unwraps) = (standstill::now() + OWN_DEADLINE, order.max_offline_unwraps());
        let made = egress::make(&hsm, order.set(), ours.of(order.set()), &ours.signing_key.id, unwraps, deadline).await;
        let egress = made.ok()?.ok()?;
        let (_, sha256) = egress.write().ok()?;
        Some((egress, sha256))
    };
    match made.await {
        Some((egress, sha256)) => order.put(egress, sha256),
        None => order.failed(),
    }
}

/// Loads the sets that were worth stocking before the daemon was started.
pub(crate) async fn recall(service: &Arc<Service>) {
    let of = Arc::clone(service);
    let recalled = tokio::task::spawn_blocking(move || {
        let limit = limit(&of);
        for RememberedSet { document, releases } in of.usage.sets()? {
            if let Some(set) = of.sets.restore(&document) {
                of.stock.asked(&set, releases, limit);
            }
        }
        Ok::<_, rusqlite::Error>(())
    });
    if let Ok(Err(error)) = recalled.await {
        tracing::warn!(%error, "the list of wrapping sets to stock cannot be read; the stock starts with the sets of new requests");
    }
}

/// Stores the list of sets that are worth stocking. A stock that is off knows no set, and keeps the list as it was, for
/// the day on which it is on again.
pub(crate) async fn remember(service: &Arc<Service>) {
    if limit(service) == 0 {
        return;
    }
    let of = Arc::clone(service);
    let written = tokio::task::spawn_blocking(move || {
        let worth = of.stock.worth(MOST_REMEMBERED);
        let sets = worth.iter().map(|worth| (worth.set.identity(), worth.releases, || worth.set.to_document()));
        of.usage.remember_sets(sets, unix_now())
    });
    if let Ok(Err(error)) = written.await {
        tracing::warn!(%error, "the list of wrapping sets to stock cannot be written; trying again in a minute");
    }
}

/// Fills the stock with everything that may be made while no release runs, for tests. Returns the number of waiting
/// items.
#[cfg(test)]
pub(crate) async fn fill_up<H: Hsm>(service: &Arc<Service>, hsm: &H) -> usize {
    loop {
        match next(service, hsm, 0) {
            Next::Make(order) => fill(hsm.clone(), order).await,
            Next::NotFor(time) if service.admission.load().waiting == 0 => tokio::time::sleep(time).await,
            _ => return service.stock.depth(),
        }
    }
}
