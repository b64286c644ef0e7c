//! What systemd is told: sd_notify(3). Without systemd (`NOTIFY_SOCKET` is not set) all of this does nothing.
//!
//! Ready means that the daemon listens, with its state and audit trail open, not that an HSM serves: a daemon that waits for an
//! HSM has not failed, and a restart would not bring the HSM back. Whether keys can be released is what `/ready` says.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use sd_notify::NotifyState;

const SOCKET_VARIABLE: &str = "NOTIFY_SOCKET";
/// How long a service manager may take to accept a message.
const PATIENCE: Duration = Duration::from_secs(5);

/// The daemon serves, or does so with its new configuration.
pub async fn ready() {
    tell(&[NotifyState::Ready]).await;
}

/// The daemon reads its configuration again; [`ready`] has to follow.
pub async fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]).await,
        Err(error) => tracing::warn!(%error, "systemd is not told of the reload"),
    }
}

/// The daemon was told to stop.
pub async fn stopping() {
    tell(&[NotifyState::Stopping]).await;
}

/// Tells systemd's watchdog, where it wants that, in half of its time that the runtime still runs tasks. Never ends.
pub async fn watchdog() {
    let Some(pause) = sd_notify::watchdog_enabled().map(|time| time / 2).filter(|pause| *pause > Duration::ZERO) else {
        return std::future::pending().await;
    };
    let mut ticks = tokio::time::interval(pause);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // Sent by a thread that may block: files, and with them the state, are read on such threads, too.
        tell(&[NotifyState::Watchdog]).await;
    }
}

/// On a thread that may block: a service manager that stands still must not stop one that serves.
async fn tell(state: &[NotifyState<'_>]) {
    let message: String = state.iter().map(|state| format!("{state}\n")).collect();
    let told = tokio::task::spawn_blocking(move || send(&message));
    if let Err(error) = told.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
        tracing::warn!(%error, "systemd cannot be told how the daemon is ({SOCKET_VARIABLE})");
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
