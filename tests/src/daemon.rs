//! A running `claviger` daemon.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use claviger_client::http::{Client, Reply, TlsSettings};

use crate::binary::claviger;
use crate::process::Process;
use crate::scrape::Metrics;
use crate::wait::PATIENCE;

/// A running daemon. It is stopped when this is dropped.
pub struct Daemon {
    /// The daemon's process.
    pub process: Process,
    /// URL of the service.
    pub url: String,
    /// Base URL of `/metrics`, `/live` and `/ready`.
    pub metrics_url: String,
    /// What its clients trust, where the service speaks TLS.
    pub ca: Option<PathBuf>,
}

impl Daemon {
    /// Runs `claviger serve --config FILE`; returns when the daemon listens.
    ///
    /// # Panics
    /// If the daemon does not start to listen.
    pub fn serve(config: &Path) -> Self {
        Self::start(Command::new(claviger()).arg("serve").arg("--config").arg(config))
    }

    /// Runs a command that becomes a `claviger` daemon; returns when the daemon listens.
    ///
    /// # Panics
    /// If the daemon does not start to listen.
    pub fn start(command: &mut Command) -> Self {
        // Warnings only, so that the output of a failed test stays readable.
        let process = Process::start(command.env("RUST_LOG", "warn"));
        let url = process.line(|line| Some(line.strip_prefix("listening on ")?.to_owned()));
        let metrics_url = process.line(|line| Some(line.strip_prefix("metrics on ")?.to_owned()));
        Self { process, url, metrics_url, ca: None }
    }

    /// Returns a client of the service.
    ///
    /// # Panics
    /// If the service uses TLS.
    #[must_use]
    pub fn client(&self) -> Client {
        let trust = self.ca.as_deref().map(TlsSettings::trusting).unwrap_or_default();
        Client::with_tls(&self.url, &trust).unwrap().with_timeout(PATIENCE)
    }

    /// Returns the address of the service.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        let (_, address) = self.url.split_once("://").unwrap();
        address.parse().unwrap()
    }

    /// Requests `/metrics`, `/live` or `/ready`.
    ///
    /// # Panics
    /// If there is no answer.
    pub async fn probe(&self, path: &str) -> Reply {
        Client::new(&self.metrics_url).unwrap().with_timeout(PATIENCE).get(path).await.unwrap()
    }

    /// Returns the current metrics.
    ///
    /// # Panics
    /// If the metrics cannot be read.
    pub async fn metrics(&self) -> Metrics {
        Metrics::parse(std::str::from_utf8(&self.probe("/metrics").await.body).unwrap())
    }

    /// Waits until `/ready` has this status.
    ///
    /// # Panics
    /// If `/ready` does not reach it within [`PATIENCE`].
    pub async fn until_ready_is(&self, status: u16) -> Reply {
        let begun = std::time::Instant::now();
        loop {
            let reply = self.probe("/ready").await;
            if reply.status == status {
                return reply;
            }
            let said = String::from_utf8_lossy(&reply.body);
            assert!(begun.elapsed() < PATIENCE, "/ready is {} for ever: {said}", reply.status);
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    }

    /// Sends SIGTERM and returns the exit status.
    pub fn stop(mut self) -> ExitStatus {
        self.process.terminate();
        self.process.wait()
    }
}
