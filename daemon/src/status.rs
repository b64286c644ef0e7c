//! The listener of the metrics address: the status page at `/`, `/metrics` for Prometheus, `/live` and `/ready`.

mod page;
pub(crate) mod readiness;
mod verdict;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use claviger_protocol::certificate::Certificate;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_SECURITY_POLICY, HeaderValue};
use hyper::{Method, Request, Response};
use tokio::time::MissedTickBehavior;

use self::readiness::Readiness;
use self::verdict::judge;
use crate::admission::strangers;
use crate::config::Etcd;
use crate::http::answer::Answer;
use crate::http::server::Blocked;
use crate::observe::history::INTERVAL;
use crate::observe::metrics::{self, Handle, Readings, SharedState};
use crate::registry::currency::Currency;
use crate::registry::keys::short_name;
use crate::service::Service;
use crate::sys::clock::unix_now;
use crate::sys::id::request_id;
use crate::sys::process;
use crate::tls::SharedTls;

const TEXT: &str = "text/plain; charset=utf-8";
const HTML: &str = "text/html; charset=utf-8";
/// The page has inline styles only. With this policy, even a name that is not escaped could not run a script.
const NOTHING_ELSE: HeaderValue = HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'");

/// The context of the metrics address.
pub(crate) struct Monitor {
    service: Arc<Service>,
    handle: Handle,
    tls: Option<SharedTls>,
    connections_limit: usize,
    blocked: Arc<Blocked>,
    readiness: Readiness,
}

impl Monitor {
    /// Creates the context for a daemon with this limit of connections.
    #[must_use]
    pub(crate) fn new(
        service: Arc<Service>,
        handle: Handle,
        tls: Option<SharedTls>,
        connections_limit: usize,
        blocked: Arc<Blocked>,
    ) -> Self {
        Self { service, handle, tls, connections_limit, blocked, readiness: Readiness::default() }
    }

    /// The status page.
    fn page(&self) -> String {
        let (readings, points) = (self.readings(), self.service.history.points());
        let verdict = judge(&readings, &points, unix_now());
        let node = self.service.config.load().server.node();
        page::render(&verdict, &node, &readings, &points, SystemTime::now())
    }

    /// The state in etcd.
    fn shared(&self) -> Option<SharedState> {
        let (board, registry) = (self.service.board.as_ref()?, &self.service.registry);
        let limit = self.service.config.load().etcd.as_ref().map(Etcd::max_staleness).unwrap_or_default();
        let currency = registry.currency();
        let confirmed = matches!(currency, Currency::Confirmed { .. });
        let why = if confirmed { None } else { registry.why_unconfirmed() };
        Some(SharedState { confirmed, age: currency.age(), limit, revision: board.revision(), why })
    }

    /// The current values.
    fn readings(&self) -> Readings {
        let service = &self.service;
        let (audit_waiting, audit_writing) = service.audit.backlog();
        let keys = service.registry.keys();
        let signers = service.registry.signers();
        let of = |kind, certificate: &Certificate| (kind, short_name(certificate.der()), certificate.not_after());
        let mut certificates: Vec<_> =
            keys.certificates().map(|(kind, certificate)| of(kind.as_str(), certificate)).collect();
        certificates.extend(signers.current().map(|signer| of("attestation", &signer.certificate)));
        let tls = self.tls.as_ref().map(|tls| tls.load());
        certificates.extend(tls.map(|tls| ("tls", tls.certificate.clone(), tls.not_after)));
        // Certificates may be equal. Listing the same text twice would be useless.
        certificates.sort();
        certificates.dedup();
        Readings {
            members: service.cluster.members(),
            retry_budget: service.cluster.retries_left(),
            stock_depth: service.stock.depth(),
            load: service.admission.load(),
            limits: service.admission.limits(),
            certificates,
            hosts: service.registry.hosts().enabled(),
            state_stale: service.registry.is_stale(),
            shared: self.shared(),
            audit_waiting,
            audit_writing,
            audit: service.audit.head(),
            connections_open: metrics::connections_open(),
            connections_limit: self.connections_limit,
            body_memory: service.bodies.used(),
            primaries: matches!(keys.primary(), (Some(_), Some(_))),
            // This counts open files, which is slow with ten thousand connections, so it must not run on a thread that
            // serves requests.
            usage: strangers::in_place(process::usage),
        }
    }
}

/// Answers a request to the metrics address.
pub(crate) async fn serve(
    monitor: Arc<Monitor>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let plain = |status, text: String| Answer { status, ..Answer::ok(TEXT, text) };
    let answer = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/") => {
            let mut response = Answer::ok(HTML, monitor.page()).into_response(&request_id());
            response.headers_mut().insert(CONTENT_SECURITY_POLICY, NOTHING_ELSE);
            return Ok(response);
        }
        (&Method::GET | &Method::HEAD, "/metrics") => {
            Answer::ok(metrics::CONTENT_TYPE, monitor.handle.render(&monitor.readings()))
        }
        (&Method::GET | &Method::HEAD, path @ ("/live" | "/ready")) => probe(&monitor, path).await,
        (&Method::GET | &Method::HEAD, _) => plain(404, "there are /, /metrics, /live and /ready\n".to_owned()),
        _ => Answer { allow: Some(Method::GET), ..plain(405, "only GET\n".to_owned()) },
    };
    Ok(answer.into_response(&request_id()))
}

/// Answers `/live` or `/ready`.
async fn probe(monitor: &Monitor, path: &str) -> Answer {
    let plain = |status, text: String| Answer { status, ..Answer::ok(TEXT, text) };
    if path == "/live" {
        return plain(200, "live\n".to_owned());
    }
    match monitor.readiness.check(&monitor.service, &monitor.blocked).await {
        Ok(what) => plain(200, format!("ready: {what}\n")),
        Err(why) => plain(503, format!("not ready: {why}\n")),
    }
}

/// Answers `/live` and `/ready` at the service address: only the status, because names of HSMs are not for callers.
/// `None`: the request is another one.
pub(crate) async fn probe_for_callers(monitor: &Monitor, method: &Method, path: &str) -> Option<Response<Full<Bytes>>> {
    if !matches!((method, path), (&Method::GET | &Method::HEAD, "/live" | "/ready")) {
        return None;
    }
    let answer = probe(monitor, path).await;
    let text = if answer.status == 200 { "yes\n" } else { "no\n" };
    Some(Answer { body: Bytes::from_static(text.as_bytes()), ..answer }.into_response(&request_id()))
}

/// Records the history of the last hour, while the daemon runs.
pub(crate) async fn watch(monitor: Arc<Monitor>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    // After a pause of the machine, avoid intervals of zero length.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first tick is immediate.
    ticks.tick().await;
    loop {
        ticks.tick().await;
        monitor.handle.upkeep();
        monitor.service.history.turn(&monitor.service.cluster.members());
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Members and intervals for unit tests.

    use crate::observe::history::Point;
    use claviger_hsm::{MemberState, MemberStatus};
    use std::time::{Duration, SystemTime};

    pub(crate) fn member(name: &str, state: MemberState) -> MemberStatus {
        MemberStatus {
            name: name.to_owned(),
            token: "token".to_owned(),
            state,
            since: SystemTime::UNIX_EPOCH,
            priority: 0,
            weight: 1,
            latency: Duration::from_millis(3),
            in_flight: 0,
            waiting: 0,
            sessions_open: 8,
            sessions_wanted: 8,
            sessions_limit: 8,
            sessions_busy: 0,
            sessions_stuck: 0,
            closings: 0,
            calls: 0,
            faults: 0,
            worked: Duration::ZERO,
            spent: Duration::ZERO,
            worker: None,
            worker_processor: Duration::ZERO,
            worker_resident: 0,
            last_error: None,
        }
    }

    /// An interval of ten seconds in which releases took 20 ms, at most 100 ms.
    pub(super) fn point(success: u64, failed: u64) -> Point {
        Point {
            lasted: Duration::from_secs(10),
            success,
            refused: 0,
            failed,
            turned_away: 0,
            latency: Some((Duration::from_millis(20), Duration::from_millis(100))),
            members: Vec::new(),
        }
    }
}
