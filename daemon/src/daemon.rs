//! A running daemon: its listeners, its background work, and its stop.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use claviger_hsm::{Cluster, HsmError, MemberConfig, Patience, Pin, TokenRef};
use hyper::service::service_fn;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::admin::{AdminError, AdminSocket};
use crate::admission;
use crate::admission::Dropped;
use crate::attest::signer;
use crate::commands;
use crate::config::{Config, PinError, TokenName};
use crate::metrics;
use crate::ready::Readiness;
use crate::routes;
use crate::server::{self, Drained, Limits, Listener, TlsError, tls_config};
use crate::service::{Service, ServiceError, observer};

/// How often the state is looked at for changes that another daemon made.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often a daemon without an attestation signer tries to make one.
const SIGNER_RETRY: Duration = Duration::from_secs(2);

/// Why a daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A PIN cannot be read.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A module cannot be loaded.
    #[error("the HSMs: {0}")]
    Hsm(#[from] HsmError),
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

/// Loads the modules of the configured members and sets the environment they want. To be called while the process has
/// one thread: environment variables cannot be set later.
///
/// # Errors
/// A PIN that cannot be read, a module that cannot be loaded.
pub fn load_cluster(config: &Config) -> Result<Cluster, StartError> {
    claviger_hsm::set_env(&config.env);
    // Before the first call to a token, which is to be counted.
    metrics::install();
    // The waiting room is in front of the releases; what runs must always find a place, on any one member, and so must what
    // else there is to sign.
    let queue = 4 * admission::concurrency(&config.release, config.hsm.iter().map(|hsm| hsm.sessions).sum()) + 256;
    let mut members = Vec::with_capacity(config.hsm.len());
    for hsm in &config.hsm {
        members.push(MemberConfig {
            name: hsm.name.clone(),
            module: hsm.module.clone(),
            token: match hsm.token_name() {
                Some(TokenName::Serial(serial)) => TokenRef::Serial(serial.to_owned()),
                Some(TokenName::Label(label)) => TokenRef::Label(label.to_owned()),
                None => TokenRef::Label(hsm.name.clone()),
            },
            pin: Pin::new(hsm.read_pin()?.to_string()),
            env: hsm.env.clone(),
            priority: hsm.priority,
            weight: hsm.weight,
            sessions: hsm.sessions,
            queue,
            batch: config.release.batch,
        });
    }
    let patience = Patience { watchdog: config.release.watchdog() };
    Ok(Cluster::load(members, patience, observer())?)
}

/// A daemon that serves.
pub struct Daemon {
    /// What it serves with.
    pub service: Arc<Service>,
    /// The address of the service.
    pub address: SocketAddr,
    /// The address of `/metrics`, `/live` and `/ready`.
    pub metrics_address: SocketAddr,
    stop: watch::Sender<bool>,
    serving: JoinHandle<Drained>,
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
            operations: &["decrypt", "sign"],
            release_outcomes: &routes::release_outcomes(),
            apis: &["v1.0", "v2.0"],
            attestation_outcomes: &routes::attestation_outcomes(),
            drop_reasons: &Dropped::ALL.map(Dropped::as_str),
        });
        let tls = config.server.tls.as_ref().map(|tls| tls_config(&tls.certificate, &tls.key)).transpose()?;
        let listener = Listener::bind(config.server.listen)?.counted();
        let metrics_listener = Listener::bind(config.server.metrics)?;
        let (address, metrics_address) = (listener.local_addr(), metrics_listener.local_addr());
        let limits = Limits::from(&config.server);
        let admin_path = config.server.admin_socket();

        let opening = tokio::task::spawn_blocking(move || Service::open(config, cluster));
        let service = Arc::new(opening.await??);
        // Only one daemon at a time gets beyond this point with the same state folder.
        let admin = AdminSocket::bind(&admin_path)?;
        if let Err(error) = service.cluster.start().await {
            tracing::error!(%error, "no HSM serves yet; the daemon goes on trying");
        }

        let (stop, stopped) = watch::channel(false);
        let wait = |mut stopped: watch::Receiver<bool>| async move {
            // An error means that the daemon is gone, which is a stop too.
            let _ = stopped.wait_for(|stop| *stop).await;
        };
        let of = service.clone();
        let handler = service_fn(move |request| routes::serve(of.clone(), request));
        let serving = tokio::spawn(server::run(listener, tls, limits.clone(), handler, wait(stopped.clone())));

        let (of, readiness) = (service.clone(), Arc::new(Readiness::default()));
        let handler =
            service_fn(move |request| routes::serve_metrics(of.clone(), readiness.clone(), handle.clone(), request));
        let of = service.clone();
        let commands = move |request, peer| commands::handle(of.clone(), request, peer);
        let others = vec![
            tokio::spawn(keep_signer(service.clone())),
            tokio::spawn(follow_state(service.clone())),
            tokio::spawn(admin.serve(commands, wait(stopped))),
            // Until the very end: an operator wants to see a stop that takes long.
            tokio::spawn(async move {
                server::run(metrics_listener, None, limits, handler, std::future::pending()).await;
            }),
        ];
        Ok(Self { service, address, metrics_address, stop, serving, others })
    }

    /// The service's URL, for scripts.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.service.config.server.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Stops: what was accepted is answered, then the HSM sessions are closed.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        match self.serving.await {
            Ok(drained) => tracing::info!(open = drained.open, cut = drained.cut, "all requests are answered"),
            Err(error) => tracing::error!(%error, "serving failed"),
        }
        for task in self.others {
            task.abort();
            let _ = task.await;
        }
        self.service.cluster.close().await;
    }
}

/// Makes the attestation signer when there is none, as soon as an HSM lets it; then keeps it renewed.
async fn keep_signer(service: Arc<Service>) {
    let mut said = false;
    while let Err(error) = signer::renew(&service).await {
        if !std::mem::replace(&mut said, true) {
            tracing::warn!(%error, "the attestation signer cannot be made yet; trying again every two seconds");
        }
        tokio::time::sleep(SIGNER_RETRY).await;
    }
    signer::keep_renewed(service).await;
}

/// Takes fresh snapshots when another process has changed the state.
async fn follow_state(service: Arc<Service>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let of = service.clone();
        let looked = tokio::task::spawn_blocking(move || match of.with_state(|state| state.changed()) {
            Ok(true) => of.reload(),
            Ok(false) => Ok(()),
            Err(error) => Err(error.into()),
        });
        match looked.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the state cannot be read again"),
            Err(error) => tracing::error!(%error, "the state cannot be read again"),
        }
    }
}
