//! Signal handling from the first moment of a program.
//!
//! A signal without a handler ends a process. In the first process of a container it is lost instead. The handlers of
//! tokio need a runtime, and the daemon makes its runtime only after it has read its configuration and loaded its
//! modules. This takes seconds when an HSM does not answer. The handlers here need neither a runtime nor a thread.
//!
//! ```text
//!           tame_signals()   Starting::new()             Starting::done()
//! SIGXFSZ   ─ error EFBIG ──────────────────────────────────────────────────
//! SIGTERM   ─ default ────── ends at once, status 0 ──── tokio's handlers ──
//! SIGHUP    ─ default ────── remembered ──────────────── remembered ────────
//! SIGUSR1/2 ─ default ────── no effect ───────────────── no effect ─────────
//! SIGPIPE   ─ error EPIPE (the standard library) ───────────────────────────
//! ```

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::Signal;
use signal_hook::flag;

/// Makes a write beyond the file size limit (`ulimit -f`, `LimitFSIZE=`) fail with an error, as on a full disk, instead
/// of ending the process. Every program calls this first in `main`.
///
/// # Errors
/// The handler cannot be installed.
pub fn tame_signals() -> io::Result<()> {
    ignore(Signal::XFSZ)
}

/// Installs a handler that does nothing. `SIG_IGN` is not used, because child processes would inherit it.
fn ignore(signal: Signal) -> io::Result<()> {
    flag::register(signal.as_raw(), Arc::new(AtomicBool::new(false))).map(drop)
}

/// Ends the process without running the handlers of `exit(3)`. A handler of a vendor's library may wait for a hanging
/// thread of the library, or crash it.
pub fn exit_at_once(status: u8) -> ! {
    signal_hook::low_level::exit(status.into())
}

/// The signal handlers of a daemon during its start.
#[derive(Clone, Debug)]
pub struct Starting {
    /// `true` while a signal to stop ends the process directly in the handler.
    ends_at_once: Arc<AtomicBool>,
    hangup: Hangup,
}

/// Reports a SIGHUP that arrived since the last check. It remembers signals that arrive before the daemon can act on
/// them.
#[derive(Clone, Debug)]
pub struct Hangup(Arc<AtomicBool>);

impl Hangup {
    /// Returns `true` if a SIGHUP arrived since the last call.
    #[must_use]
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }
}

impl Starting {
    /// Installs the handlers. The daemon calls this before any step that may take time. A signal to stop then ends the
    /// process with `status`.
    ///
    /// # Errors
    /// A handler cannot be installed.
    pub fn new(status: u8) -> io::Result<Self> {
        let ends_at_once = Arc::new(AtomicBool::new(true));
        for stop in [Signal::TERM, Signal::INT] {
            flag::register_conditional_shutdown(stop.as_raw(), status.into(), Arc::clone(&ends_at_once))?;
        }
        let hangup = Arc::new(AtomicBool::new(false));
        flag::register(Signal::HUP.as_raw(), Arc::clone(&hangup))?;
        // Other daemons reopen their logs at these signals, and scripts send them to all daemons.
        for other in [Signal::USR1, Signal::USR2] {
            ignore(other)?;
        }
        Ok(Self { ends_at_once, hangup: Hangup(hangup) })
    }

    /// Stops ending the process at SIGTERM and SIGINT. Call this when other handlers for these signals are installed.
    pub fn done(&self) {
        self.ends_at_once.store(false, Ordering::SeqCst);
    }

    /// Returns the flag that SIGHUP sets.
    #[must_use]
    pub fn hangup(&self) -> Hangup {
        self.hangup.clone()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rustix::process::{getpid, kill_process};

    /// There is only one test, because signal handlers belong to the whole process.
    #[test]
    fn signals_do_not_end_the_process() {
        tame_signals().unwrap();
        let starting = Starting::new(0).unwrap();
        for signal in [Signal::XFSZ, Signal::USR1, Signal::USR2, Signal::HUP, Signal::HUP] {
            kill_process(getpid(), signal).unwrap();
        }
        // The kernel chooses the thread that runs the handler, so the flag may be set later.
        while !starting.hangup().take() {
            std::thread::yield_now();
        }
        starting.done();
        kill_process(getpid(), Signal::TERM).unwrap();
    }
}
