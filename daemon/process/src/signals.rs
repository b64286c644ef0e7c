//! Signals, from the first moment of a program.
//!
//! A signal without a handler ends a process, or is lost when the process is the first one of a container. tokio's handlers
//! need a runtime, which a daemon makes only after it has read its configuration and loaded its modules: seconds, when an HSM
//! does not answer. The handlers here need neither a runtime nor a thread.
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

/// A write beyond the limit on file sizes (`ulimit -f`, `LimitFSIZE=`) fails with an error, as on a full disk, instead of ending
/// the process. To be called first in `main`, by every program.
///
/// # Errors
/// When the handler cannot be installed.
pub fn tame_signals() -> io::Result<()> {
    ignore(Signal::XFSZ)
}

/// Takes a signal and does nothing. Not `SIG_IGN`, which child processes would inherit.
fn ignore(signal: Signal) -> io::Result<()> {
    flag::register(signal.as_raw(), Arc::new(AtomicBool::new(false))).map(drop)
}

/// Ends the process without the handlers of `exit(3)`: those of a vendor's library may wait for a thread that hangs in it, or
/// crash under it.
pub fn exit_at_once(status: u8) -> ! {
    signal_hook::low_level::exit(status.into())
}

/// A daemon that starts.
#[derive(Clone, Debug)]
pub struct Starting {
    /// Whether a signal to stop ends the process in its handler.
    ends_at_once: Arc<AtomicBool>,
    hangup: Hangup,
}

/// Whether a SIGHUP came since the last look. It keeps one that came before anybody could act on it.
#[derive(Clone, Debug)]
pub struct Hangup(Arc<AtomicBool>);

impl Hangup {
    /// Whether one came; it counts once.
    #[must_use]
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }
}

impl Starting {
    /// Installs the handlers. To be called before the daemon does anything that may take time. A signal to stop ends the
    /// process with this status.
    ///
    /// # Errors
    /// When a handler cannot be installed.
    pub fn new(status: u8) -> io::Result<Self> {
        let ends_at_once = Arc::new(AtomicBool::new(true));
        for stop in [Signal::TERM, Signal::INT] {
            flag::register_conditional_shutdown(stop.as_raw(), status.into(), Arc::clone(&ends_at_once))?;
        }
        let hangup = Arc::new(AtomicBool::new(false));
        flag::register(Signal::HUP.as_raw(), Arc::clone(&hangup))?;
        // Other daemons reopen their logs at these, and scripts send them to all.
        for other in [Signal::USR1, Signal::USR2] {
            ignore(other)?;
        }
        Ok(Self { ends_at_once, hangup: Hangup(hangup) })
    }

    /// From now on somebody else acts on SIGTERM and SIGINT, whose own handlers are installed.
    pub fn done(&self) {
        self.ends_at_once.store(false, Ordering::SeqCst);
    }

    /// Tells of SIGHUP.
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

    /// One test: the signals are the process's.
    #[test]
    fn signals_do_not_end_the_process() {
        tame_signals().unwrap();
        let starting = Starting::new(0).unwrap();
        for signal in [Signal::XFSZ, Signal::USR1, Signal::USR2, Signal::HUP, Signal::HUP] {
            kill_process(getpid(), signal).unwrap();
        }
        // The kernel chooses the thread that runs the handler.
        while !starting.hangup().take() {
            std::thread::yield_now();
        }
        starting.done();
        kill_process(getpid(), Signal::TERM).unwrap();
    }
}
