//! Messages to systemd: sd_notify(3). Without systemd (`NOTIFY_SOCKET` is not set) these functions do nothing.
//!
//! "Ready" means that the daemon listens and that its state and audit trail are open. It does not mean that an HSM is
//! up: a daemon that waits for an HSM has not failed, and a restart would not help. `/ready` says whether keys can be
//! released.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use sd_notify::NotifyState;

const SOCKET_VARIABLE: &str = "NOTIFY_SOCKET";
/// Time limit for the service manager to accept a message.
const PATIENCE: Duration = Duration::from_secs(5);

/// Reports that the daemon is running, also after a reload.
pub(crate) async fn ready() {
    tell(&[NotifyState::Ready]).await;
}

/// Reports that the daemon reloads its configuration. [`ready`] must follow.
pub(crate) async fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]).await,
        Err(error) => tracing::warn!(%error, "systemd cannot be notified of the reload"),
    }
}

/// Reports that the daemon is stopping.
pub(crate) async fn stopping() {
    tell(&[NotifyState::Stopping]).await;
}

/// If systemd's watchdog is on, reports twice in its interval that the runtime still runs tasks. Never returns.
pub(crate) async fn watchdog() {
    let Some(pause) = sd_notify::watchdog_enabled().map(|time| time / 2).filter(|pause| *pause > Duration::ZERO) else {
        return std::future::pending().await;
    };
    let mut ticks = tokio::time::interval(pause);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // Sent from a blocking thread, because file access, including the state's, uses these threads: the watchdog
        // must notice if they all hang.
        tell(&[NotifyState::Watchdog]).await;
    }
}

/// Sends a message from a blocking thread: a service manager that hangs must not block the daemon.
async fn tell(state: &[NotifyState<'_>]) {
    let message: String = state.iter().map(|state| format!("{state}\n")).collect();
    let told = tokio::task::spawn_blocking(move || send(&message));
    if let Err(error) = told.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
        tracing::warn!(%error, "systemd cannot be notified ({SOCKET_VARIABLE})");
    }
}

fn send(message: &str) -> io::Result<()> {
    let Some(path) = std::env::var_os(SOCKET_VARIABLE) else { return Ok(()) };
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(&path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.send_to_addr(message.as_bytes(), &address).map(drop)
}
