//! `claviger serve`: start, serve, stop.
//!
//! Every wait for a module, a disk, a log or the service manager has a time limit: one that hangs cannot block the
//! daemon. A stop signal takes effect at any time.

use std::path::PathBuf;
use std::time::Duration;

use claviger_hsm::{Cluster, WorkerProgram};
use claviger_process::signals::{Hangup, Starting};
use claviger_process::threads::{self, Processors};
use tokio::time::timeout;

use super::daemon::Daemon;
use super::members::load_cluster;
use super::{preflight, reload, systemd};
use crate::config::Config;
use crate::observe::log;
use crate::sys::failure::Failure;
use crate::sys::process;

/// Threads in addition to those of the runtime and the members: one for the audit trail, one that notices standstills,
/// and one that announces the addresses.
const OWN_THREADS: usize = 3;
/// The workers of the HSMs need the other half of the processors, or wait for HSMs on the network; and threads that sleep
/// less often are woken less often.
pub const PROCESSORS: Processors = Processors::Half;
/// Minimum number of threads for a member: one waits for the end of its worker process, which has a main thread and one
/// for a session.
const MEMBER_THREADS: usize = 3;
/// Time limit for cleaning up after an interrupted start.
const ABANDON: Duration = Duration::from_secs(1);
/// Time that shutdown may take after `server.drain_timeout_ms`, for administrators' commands, HSM sessions and the audit
/// trail.
const STOP_MARGIN: Duration = Duration::from_secs(35);
/// Time limit for file operations after the stop.
const LAST_FILES: Duration = Duration::from_secs(2);

/// Where the addresses of the daemon are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announced {
    /// As text on the standard output.
    Printed,
    /// In the log. A reader of JSON gets no other lines then.
    Logged,
}

/// Runs until a signal stops it.
///
/// # Errors
/// Why the daemon cannot start, or why it did not stop in time.
pub fn run(file: PathBuf, starting: &Starting, announced: Announced) -> Result<(), Failure> {
    process::no_core_dumps()?;
    process::raise_open_files()?;
    let config = Config::load(&file)?;
    preflight::pass(&config)?;
    threads::ensure_runtime(PROCESSORS, needed_threads(&config))?;
    let cluster = load_cluster(&config, WorkerProgram::this_executable())?;
    let runtime = threads::runtime(PROCESSORS, needed_threads(&config))?;
    let result = runtime.block_on(serve(file, config, cluster, starting, announced));
    // A thread that hangs in a disk operation is abandoned.
    runtime.shutdown_timeout(LAST_FILES);
    result
}

/// Threads in addition to those of the runtime.
#[must_use]
pub fn needed_threads(config: &Config) -> usize {
    // One follows etcd.
    OWN_THREADS + usize::from(config.etcd.is_some()) + MEMBER_THREADS * config.hsm.len()
}

async fn serve(
    file: PathBuf,
    config: Config,
    cluster: Cluster,
    starting: &Starting,
    announced: Announced,
) -> Result<(), Failure> {
    let stop = process::shutdown_signal()?;
    tokio::pin!(stop);
    let hangups = reload::hangups()?;
    starting.done();
    let drain = config.server.drain_timeout();
    let announcer = log::Announcer::start();
    // A separate task: this one can then react to a signal, whatever the start waits for.
    let mut start = tokio::spawn(Daemon::start(config, cluster.clone()));
    let daemon = tokio::select! {
        biased;
        signal = &mut stop => {
            tracing::info!(signal, "stopped before the start was complete");
            start.abort();
            let _ = timeout(ABANDON, start).await;
            let _ = timeout(ABANDON, cluster.close()).await;
            return Ok(());
        }
        daemon = &mut start => daemon,
    };
    let daemon = match daemon {
        Ok(Ok(daemon)) => daemon,
        failed => {
            // A vendor's library may crash if the process ends while the library's threads run.
            cluster.close().await;
            return Err(match failed {
                Ok(Err(error)) => error.into(),
                Err(error) => error.into(),
                Ok(Ok(_)) => "the daemon did not start".into(),
            });
        }
    };
    match announced {
        Announced::Printed => announcer.announce(vec![
            format!("listening on {}", daemon.url()),
            format!("metrics on http://{}", daemon.metrics_address),
        ]),
        Announced::Logged => {
            tracing::info!(url = daemon.url(), "listening");
            tracing::info!(url = format!("http://{}", daemon.metrics_address), "metrics");
        }
    }
    let reloading = tokio::spawn(follow(hangups, starting.hangup(), file, &daemon));
    let signal = stop.await;
    reloading.abort();
    tracing::info!(signal, "stopping");
    let stopped = tokio::spawn(async {
        tokio::join!(systemd::stopping(), daemon.stop());
    });
    timeout(drain + STOP_MARGIN, stopped).await.map_err(|_| "the daemon did not stop in time")??;
    Ok(())
}

/// Reports to the service manager that the daemon is ready, and reloads the configuration on `SIGHUP`.
fn follow(
    hangups: tokio::signal::unix::Signal,
    hangup: Hangup,
    file: PathBuf,
    daemon: &Daemon,
) -> impl Future<Output = ()> + Send + 'static {
    let (service, tls) = (daemon.service.clone(), daemon.tls.clone());
    async move {
        systemd::ready().await;
        reload::follow(hangups, hangup, file, service, tls).await;
    }
}
