//! `SIGHUP`: what of the configuration takes effect without a restart.
//!
//! PINs are read again, and a member whose PIN was refused may try the new one, once. The audit trail is opened anew, which is
//! what log rotation wants. Everything else needs a restart, and the log says so when it changed.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use claviger_hsm::Pin;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::Config;
use crate::service::Service;

/// Catches `SIGHUP`, which ends a process that does not, from this call on.
///
/// # Errors
/// When the handler cannot be installed.
pub fn hangups() -> io::Result<Signal> {
    signal(SignalKind::hangup())
}

/// Reloads `file` at every hangup, for as long as the daemon runs.
pub async fn follow(mut hangups: Signal, file: PathBuf, service: Arc<Service>) {
    while hangups.recv().await.is_some() {
        if let Err(error) = service.audit.reopen().await {
            tracing::error!(%error, "the audit trail cannot be opened again");
        }
        match Config::load(&file) {
            Ok(config) => reload(&config, &service),
            Err(error) => {
                tracing::error!(%error, "the configuration was not reloaded; the daemon goes on with the old one")
            }
        }
    }
}

fn reload(config: &Config, service: &Service) {
    for hsm in &config.hsm {
        let set = match hsm.read_pin() {
            Ok(pin) => service.cluster.set_pin(&hsm.name, Pin::new(pin.to_string())).map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = set {
            tracing::error!(hsm = hsm.name, error, "the PIN was not taken");
        }
    }
    if *config == service.config {
        tracing::info!("configuration reloaded: PINs are read again, nothing else has changed");
    } else {
        tracing::warn!("configuration reloaded: PINs are read again; other settings have changed and need a restart");
    }
}
