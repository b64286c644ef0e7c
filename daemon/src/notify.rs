//! What systemd is told: sd_notify(3). Without systemd (`NOTIFY_SOCKET` is not set) all of this does nothing.
//!
//! Ready means that the daemon listens, with its state and audit trail open, not that an HSM serves: who waits for an HSM is
//! not failing, and to be started again would not bring it back. Whether keys can be released is what `/ready` says.

use std::io;
use std::time::Duration;

use sd_notify::NotifyState;

/// The daemon serves, or does so with its new configuration.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// The daemon reads its configuration anew; [`ready`] has to follow.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "systemd is not told of the reload"),
    }
}

/// The daemon was told to stop.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
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
        // Also a thread that may block has to be had: files, and with them the state, are read there.
        if tokio::task::spawn_blocking(|| ()).await.is_ok() {
            tell(&[NotifyState::Watchdog]);
        }
    }
}

fn tell(state: &[NotifyState<'_>]) {
    let told: io::Result<()> = sd_notify::notify(state);
    if let Err(error) = told {
        tracing::warn!(%error, "systemd cannot be told how the daemon is (NOTIFY_SOCKET)");
    }
}
