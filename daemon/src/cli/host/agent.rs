//! `claviger host agent`: its socket, its metrics page, its start and its stop.

use std::convert::Infallible;
use std::fs::{self, DirBuilder, Permissions};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use claviger_client::agent::counters::Counters;
use claviger_client::agent::gather::Pace;
use claviger_client::agent::server::{self, Settings};
use claviger_client::failover::ServicesError;
use claviger_client::files;
use http_body_util::Full;
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::defaults;
use super::options::{Measured, Service, explain, folder};
use crate::observe::metrics;
use crate::run::systemd;
use crate::sys::failure::Failure;
use crate::sys::print::say;
use crate::sys::process;

/// Connections to the metrics page at a time.
const METRICS_CONNECTIONS: usize = 16;
/// Time limit for a connection to the metrics page.
const METRICS_WITHIN: Duration = Duration::from_secs(10);

/// `claviger host agent`
#[derive(Debug, clap::Args)]
pub struct Agent {
    /// Folder of this host's keys and its health certificate [default: /var/lib/claviger-host]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// TPM settings.
    #[command(flatten)]
    measured: Measured,
    /// The service.
    #[command(flatten)]
    service: Service,
    /// Socket to listen on; its folder is created if it is missing
    #[arg(long, value_name = "SOCKET")]
    socket: PathBuf,
    /// Numeric id of a user that may use the socket, in addition to root and the agent's own user; may be repeated.
    /// These users can get the keys of every vault
    #[arg(long, value_name = "UID")]
    allow_uid: Vec<u32>,
    /// Address of the metrics for Prometheus; port 0 selects a free port
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,
    /// Renew the health certificate this many seconds before it expires
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(300..=25_200))]
    renew_before: u64,
}

impl Agent {
    fn settings(&self) -> Result<Settings, Failure> {
        let (urls, tls) = defaults::complete(&self.service.urls, &self.service.tls)?;
        Ok(Settings {
            folder: folder(self.dir.clone(), self.measured.tpm.is_some()),
            tpm: self.measured.place(),
            urls,
            tls,
            timeout: Duration::from_secs(self.service.timeout),
            renew_before: Duration::from_secs(self.renew_before),
            pace: Pace::default(),
            users: self.allow_uid.clone(),
        })
    }
}

/// Runs until a signal stops it.
pub(super) async fn run(options: Agent) -> Result<(), Failure> {
    let stop = process::shutdown_signal()?;
    process::raise_open_files()?;
    let (settings, counters) = (options.settings()?, Arc::new(Counters::default()));
    let page = match options.metrics {
        Some(address) => Some(TcpListener::bind(address).await.map_err(|e| format!("--metrics {address}: {e}"))?),
        None => None,
    };
    // Attest before the first request, so that many machines can start at once.
    match server::attest(&settings, &counters).await {
        Ok(()) => {}
        // An administrator has to fix this on the host.
        Err(error @ (ServicesError::Store(_) | ServicesError::Client(_))) => {
            return Err(explain(error, &settings.folder, &options.measured));
        }
        Err(error) => {
            let why = explain(error, &settings.folder, &options.measured);
            tracing::warn!(error = %why, "no health certificate yet; trying again");
        }
    }
    let listener = listen(&options.socket, !settings.users.is_empty()).await?;
    say!("listening on {}", options.socket.display());
    if let Some(page) = page {
        say!("metrics on http://{}", page.local_addr()?);
        tokio::spawn(serve_metrics(page, counters.clone()));
    }
    systemd::ready().await;
    tokio::select! {
        () = server::serve(listener, settings, counters) => {}
        _ = stop => {}
    }
    let _ = fs::remove_file(&options.socket);
    Ok(())
}

/// Creates the agent's socket. A stale socket is replaced; a socket with a listener is an error.
async fn listen(path: &Path, others: bool) -> Result<UnixListener, Failure> {
    let failed = |error: std::io::Error| format!("--socket {}: {error}", path.display());
    DirBuilder::new().recursive(true).mode(0o755).create(files::folder(path)).map_err(failed)?;
    match UnixStream::connect(path).await {
        Ok(_) => return Err(format!("another agent listens on {}; stop it first", path.display()).into()),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed)?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    // The agent checks the peer's user id; the mode only keeps all other users away.
    let mode = if others { 0o666 } else { 0o600 };
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed)?;
    Ok(listener)
}

/// Serves the metrics on a few connections at a time: files that strangers keep open are files that machines lack.
async fn serve_metrics(listener: TcpListener, counters: Arc<Counters>) {
    let places = Arc::new(Semaphore::new(METRICS_CONNECTIONS));
    loop {
        // The semaphore is never closed, so there is no error.
        let place = places.clone().acquire_owned().await;
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let counters = counters.clone();
        tokio::spawn(async move {
            let _place = place;
            let answer = service_fn(|request: Request<_>| std::future::ready(page(&request, &counters)));
            let builder = auto::Builder::new(TokioExecutor::new());
            let served = builder.serve_connection(TokioIo::new(stream), answer);
            // A slow or disconnected reader of the metrics does not matter.
            let _ = tokio::time::timeout(METRICS_WITHIN, served).await;
        });
    }
}

fn page<B>(request: &Request<B>, counters: &Counters) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut response = Response::new(Full::default());
    if request.uri().path() == "/metrics" {
        *response.body_mut() = Full::from(counters.page());
        response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(metrics::CONTENT_TYPE));
    } else {
        *response.status_mut() = StatusCode::NOT_FOUND;
    }
    Ok(response)
}
