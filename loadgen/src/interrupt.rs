//! Ctrl-C, or a condition that failed: a run ends before its time, and what was measured so far is reported.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::print;

/// How long requests in flight are waited for once the run was interrupted.
const GRACE: Duration = Duration::from_secs(2);
/// The exit status after SIGINT, as a shell has it.
pub const STATUS: u8 = 130;

/// Whether to stop, for all who have to know. Clones belong together.
#[derive(Clone, Debug)]
pub struct Interrupt {
    at: watch::Sender<Option<Instant>>,
    reason: Arc<OnceLock<String>>,
}

impl Default for Interrupt {
    fn default() -> Self {
        Self { at: watch::Sender::new(None), reason: Arc::default() }
    }
}

impl Interrupt {
    /// Set by SIGINT and SIGTERM; the second of them ends the process. Belongs into the runtime.
    ///
    /// # Errors
    /// The system lets no signal be handled.
    #[expect(clippy::disallowed_methods, reason = "the user has asked for the end twice")]
    pub fn by_signals() -> std::io::Result<Self> {
        let interrupt = Self::default();
        let (mut int, mut term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let setting = interrupt.clone();
        tokio::spawn(async move {
            let mut either = async || tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} };
            either().await;
            setting.set();
            print::aside("interrupted: reporting what was measured so far; once more ends at once");
            either().await;
            std::process::exit(STATUS.into());
        });
        Ok(interrupt)
    }

    /// Stops what runs.
    pub fn set(&self) {
        self.at.send_if_modified(|at| at.is_none() && at.replace(Instant::now()).is_none());
    }

    /// Stops what runs, for a reason that the report gives.
    pub fn stop(&self, reason: String) {
        // The first reason counts, and none once it was interrupted.
        if self.since().is_none() {
            let _ = self.reason.set(reason);
        }
        self.set();
    }

    /// Why it was stopped; `None` when it was interrupted from outside.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }

    /// Whether to stop, and since when.
    #[must_use]
    pub fn since(&self) -> Option<Instant> {
        *self.at.borrow()
    }

    /// Returns when it is time to stop.
    pub async fn wait(&self) -> Instant {
        let mut changes = self.at.subscribe();
        match changes.wait_for(Option::is_some).await.map(|at| *at) {
            Ok(Some(at)) => at,
            // The sender lives as long as this value.
            _ => std::future::pending().await,
        }
    }

    /// Returns when requests in flight are not waited for any longer.
    pub async fn abandon(&self) {
        let at = self.wait().await;
        tokio::time::sleep_until(at + GRACE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_clones_hear_of_it_and_what_is_in_flight_has_a_grace() {
        let interrupt = Interrupt::default();
        let (waiting, abandoning) = (interrupt.clone(), interrupt.clone());
        let begun = Instant::now();
        let waiting = tokio::spawn(async move { waiting.wait().await });
        let abandoning = tokio::spawn(async move { abandoning.abandon().await });
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(!waiting.is_finished() && interrupt.since().is_none());
        interrupt.set();
        interrupt.set();
        assert_eq!(waiting.await.ok(), interrupt.since());
        assert!(abandoning.await.is_ok());
        assert_eq!(begun.elapsed(), Duration::from_secs(5) + GRACE);
        interrupt.stop("too late to be the reason".to_owned());
        assert_eq!(interrupt.reason(), None);
        let stopped = Interrupt::default();
        stopped.stop("first".to_owned());
        stopped.stop("second".to_owned());
        assert_eq!((stopped.reason(), stopped.since().is_some()), (Some("first"), true));
    }
}
