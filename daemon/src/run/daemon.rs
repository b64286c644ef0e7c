//! A running daemon: its listeners, its background work, and its stop.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use claviger_hsm::{Cluster, standstill};
use claviger_protocol::tpm::policy::Policy;
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{audit_tasks, systemd};
use crate::admin::handlers;
use crate::admin::{AdminError, AdminSocket, REVIEW_LIMIT};
use crate::admission::Dropped;
use crate::attest::signer_rotation::Keeper;
use crate::config::Config;
use crate::http::server::{self, Cut, Drained, Limits, Listener};
use crate::http::{attestation, intake, resource, routes};
use crate::nodes;
use crate::observe::metrics;
use crate::release;
use crate::service::{Service, ServiceError};
use crate::status::{self, Monitor};
use crate::sys::clock::unix_now;
use crate::sys::places::LEAVING;
use crate::sys::process;
use crate::tls::{SharedTls, TlsError, tls_config};

/// How often the state is looked at for changes that another daemon made, if its store does not tell of them at once.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often counts and evidence are written.
const WRITE_EVERY: Duration = Duration::from_secs(1);

/// Most connections to the metrics address, a 64th of the open files between these bounds. Scrapers need a few: the others are
/// for whoever only holds them, so that there is time to ask before the next one is closed.
const METRICS_CONNECTIONS: std::ops::RangeInclusive<usize> = 64..=1024;
/// Most requests on one connection of HTTP/2 to the metrics address.
const METRICS_STREAMS: u32 = 8;
/// Longest time for the header of a request to the metrics address.
const METRICS_HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Open files that are neither connections nor sessions on tokens: listeners, the administrators' socket with its own
/// connections, the state, the audit trail, what the runtime and the vendors' libraries hold.
const OTHER_FILES: usize = 192;

/// Why a daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state or the audit trail.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The administrators' socket.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The certificate or key for TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A listener.
    #[error(transparent)]
    Listen(#[from] std::io::Error),
    /// The state folder cannot be made.
    #[error("the state folder {} cannot be made: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A thread of the daemon failed.
    #[error("the state cannot be opened: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// A daemon that serves.
pub struct Daemon {
    /// What it serves with.
    pub service: Arc<Service>,
    /// The address of the service.
    pub address: SocketAddr,
    /// The address of `/metrics`, `/live` and `/ready`.
    pub metrics_address: SocketAddr,
    /// What new connections to the service are encrypted with, where they are.
    pub tls: Option<SharedTls>,
    stop: watch::Sender<bool>,
    serving: JoinHandle<Drained>,
    admin: [JoinHandle<()>; 2],
    others: Vec<JoinHandle<()>>,
}

impl Daemon {
    /// Starts to serve. HSMs that do not answer yet are waited for in the background; the daemon is not ready until one
    /// does.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(config: Config, cluster: Cluster) -> Result<Self, StartError> {
        let handle = metrics::install();
        let members: Vec<&str> = config.hsm.iter().map(|h| h.name.as_str()).collect();
        metrics::preregister(&metrics::Known {
            members: &members,
            release_outcomes: &release::outcomes(),
            apis: &["v1.0", "v2.0"],
            attestation_outcomes: &attestation::outcomes(),
            policies: &Policy::ALL.map(Policy::name),
            drop_reasons: &Dropped::ALL.map(Dropped::as_str),
            resources: &resource::resources(),
            body_refusals: &intake::refusals(),
            cut_reasons: &Cut::ALL.map(Cut::as_str),
        });
        let tls =
            config.server.tls.as_ref().map(tls_config).transpose()?.map(|tls| Arc::new(ArcSwap::from_pointee(tls)));
        if let Some(tls) = &tls {
            tls.load().warn();
        }
        let listener = Listener::bind(config.server.listen)?.counted();
        let blocked = listener.blocked();
        let metrics_listener = Listener::bind(config.server.metrics)?;
        let (address, metrics_address) = (listener.local_addr(), metrics_listener.local_addr());
        let limits = affordable(Limits::from(&config.server), &config);
        let probes = config.server.probes;
        let admin_path = config.server.admin_socket();
        let review_path = config.server.review_socket();
        let group = |name: &Option<String>| name.as_deref().map(process::group_id).transpose();
        let (admin_group, review_group) = (group(&config.server.admin_group)?, group(&config.server.review_group)?);

        // The environment is settled by now: there may be threads.
        standstill::watch();
        let opening = tokio::task::spawn_blocking(move || Service::open(config, cluster));
        let service = Arc::new(opening.await??);
        // Only one daemon at a time gets beyond this point with the same folder of sockets, most often the state's.
        let admin = AdminSocket::bind(&admin_path, admin_group)?;
        let review = AdminSocket::bind(&review_path, review_group)?.with_longest(REVIEW_LIMIT);
        if let Err(error) = service.cluster.start().await {
            tracing::error!(%error, "no HSM serves yet; the daemon keeps trying");
        }

        let (stop, stopped) = watch::channel(false);
        let wait = |mut stopped: watch::Receiver<bool>| async move {
            // An error means that the daemon is gone, which is a stop too.
            let _ = stopped.wait_for(|stop| *stop).await;
        };
        let monitor = Arc::new(Monitor::new(service.clone(), handle, tls.clone(), limits.max_connections, blocked));
        let (of, probed) = (service.clone(), probes.then(|| monitor.clone()));
        let handler = service_fn(move |request: Request<Incoming>| {
            let (of, probed) = (of.clone(), probed.clone());
            async move {
                if let Some(monitor) = probed
                    && let Some(answer) =
                        status::probe_for_callers(&monitor, request.method(), request.uri().path()).await
                {
                    return Ok(answer);
                }
                routes::serve(of, request).await
            }
        });
        let serving = tokio::spawn(server::run(listener, tls.clone(), limits.clone(), handler, wait(stopped.clone())));

        let of = monitor.clone();
        let handler = service_fn(move |request| status::serve(of.clone(), request));
        let of = service.clone();
        let commands = move |request, peer| handlers::handle(of.clone(), request, peer);
        let admin = tokio::spawn(admin.serve(commands, wait(stopped.clone())));
        let of = service.clone();
        let commands = move |request, peer| handlers::review(of.clone(), request, peer);
        let review = tokio::spawn(review.serve(commands, wait(stopped)));
        let mut others = vec![
            tokio::spawn(Keeper::new(service.clone()).run()),
            tokio::spawn(follow_state(service.clone())),
            tokio::spawn(write_counts(service.clone())),
            tokio::spawn(audit_tasks::sum_up(service.clone())),
            tokio::spawn(audit_tasks::sign(service.clone())),
            tokio::spawn(release::stocker::run(service.clone(), service.cluster.clone())),
            tokio::spawn(systemd::watchdog()),
            tokio::spawn(status::watch(monitor)),
            // Until the very end: an operator wants to see a stop that takes long.
            tokio::spawn(async move {
                let limits = metrics_limits(limits);
                server::run(metrics_listener, None, limits, handler, std::future::pending()).await;
            }),
        ];
        others.extend(nodes::start(&service));
        Ok(Self { service, address, metrics_address, tls, stop, serving, admin: [admin, review], others })
    }

    /// The service's URL, for scripts.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Stops: what was accepted is answered, also at the administrators' socket, then the HSM sessions are closed.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        match self.serving.await {
            Ok(Drained { open, cut: 0 }) => tracing::info!(open, "all open requests have been answered"),
            Ok(Drained { open, cut }) => {
                tracing::warn!(
                    open,
                    cut,
                    "connections were cut after server.drain_timeout_ms; other requests have been answered"
                )
            }
            Err(error) => tracing::error!(%error, "serving failed"),
        }
        // They end by themselves, and soon: when the commands in progress are done.
        for socket in self.admin {
            if let Err(error) = socket.await {
                tracing::error!(%error, "the administrators' socket failed");
            }
        }
        for task in self.others {
            task.abort();
            let _ = task.await;
        }
        nodes::leave(&self.service).await;
        release::stocker::remember(&self.service).await;
        audit_tasks::finish(&self.service).await;
        self.service.cluster.close().await;
    }
}

fn metrics_connections() -> usize {
    let (least, most) = (*METRICS_CONNECTIONS.start(), *METRICS_CONNECTIONS.end());
    (process::affordable_connections(64 * most, 0) / 64).clamp(least, most)
}

/// The limits of the metrics address. They are its own, so that what is done to the service's does not silence it; and few
/// connections suffice, since the one that has waited longest is closed for the next.
fn metrics_limits(service: Limits) -> Limits {
    let header_timeout = service.header_timeout.min(METRICS_HEADER_TIMEOUT);
    Limits {
        max_connections: metrics_connections(),
        per_address: 0,
        streams: METRICS_STREAMS,
        header_timeout,
        // Nobody proves anything there.
        unproven_time_percent: 0,
        ..service
    }
}

/// The limits, as far as the open files suffice for them.
fn affordable(mut limits: Limits, config: &Config) -> Limits {
    // A vendor's library may have a file of its own for each session.
    let sessions: usize = config.hsm.iter().map(|hsm| hsm.sessions).sum();
    // Of each listener, as many again may be about to close.
    let others = OTHER_FILES + metrics_connections() + 2 * LEAVING + sessions;
    let most = process::affordable_connections(limits.max_connections, others);
    if most < limits.max_connections {
        tracing::warn!(
            wished = limits.max_connections,
            most,
            "the limit on open files is too small for server.max_connections: fewer connections are accepted; raise it \
             (LimitNOFILE= of systemd, ulimit -n)"
        );
        limits.max_connections = most;
    }
    limits.in_debt = process::affordable_connections(limits.in_debt, others + limits.max_connections);
    limits
}

/// Takes fresh snapshots when another process has changed the state, and tries again where that failed.
async fn follow_state(service: Arc<Service>) {
    let mut changes = service.registry.changes();
    loop {
        let told = async {
            // An error means that the store is gone, which the next look reports.
            match &mut changes {
                Some(changes) => changes.changed().await.unwrap_or(()),
                None => std::future::pending().await,
            }
        };
        let _ = tokio::time::timeout(LOOK_EVERY, told).await;
        let of = service.clone();
        let followed = tokio::task::spawn_blocking(move || of.registry.follow().map_err(|error| error.to_string()));
        service.registry.looked(&followed.await.unwrap_or_else(|error| Err(error.to_string())));
    }
}

/// Writes what is only remembered: usage counts and evidence.
async fn write_counts(service: Arc<Service>) {
    loop {
        tokio::time::sleep(WRITE_EVERY).await;
        let of = service.clone();
        let written = tokio::task::spawn_blocking(move || {
            of.usage.flush(unix_now());
            of.evidence.flush();
        });
        if let Err(error) = written.await {
            tracing::error!(%error, "counts and evidence are not written");
        }
    }
}
