//! Ends a run early: at Ctrl-C, or when a condition fails. The results up to then are reported.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::print;

/// Time that requests in flight may still take after an interruption.
const GRACE: Duration = Duration::from_secs(2);
/// The exit status after SIGINT, as shells use it.
pub const STATUS: u8 = 130;

/// A stop signal that tasks share. Every clone refers to the same signal.
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
    /// Makes an interrupt that SIGINT and SIGTERM set. A second signal ends the process. Must be called inside the
    /// runtime.
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

    /// Stops the run.
    pub fn set(&self) {
        self.at.send_if_modified(|at| at.is_none() && at.replace(Instant::now()).is_none());
    }

    /// Stops the run for a reason that is shown in the report.
    pub fn stop(&self, reason: String) {
        // Only the first reason is kept, and no reason is set after an interruption.
        if self.since().is_none() {
            let _ = self.reason.set(reason);
        }
        self.set();
    }

    /// The reason for the stop; `None` if a signal stopped the run.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }

    /// The time of the stop; `None` if the run goes on.
    #[must_use]
    pub fn since(&self) -> Option<Instant> {
        *self.at.borrow()
    }

    /// Waits until the run must stop.
    pub async fn wait(&self) -> Instant {
        let mut changes = self.at.subscribe();
        match changes.wait_for(Option::is_some).await.map(|at| *at) {
            Ok(Some(at)) => at,
            // The sender lives as long as this value, so this branch is never reached.
            _ => std::future::pending().await,
        }
    }

    /// Waits for the interrupt, then for the grace period of requests in flight.
    pub(crate) async fn abandon(&self) {
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
