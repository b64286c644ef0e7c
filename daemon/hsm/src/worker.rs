//! The worker: a process that serves one token and ends when its socket ends.
//!
//! ```text
//!   started by the daemon: the socket is standard input
//!      │ descriptors, core dumps, signals (process.rs)
//!      ▼
//!   first call ── no Start, or unreadable ──────────────▶ exit 2
//!      │ Start                │ end of the socket ──────▶ exit 0
//!      ▼
//!   first thread: load module, C_Initialize, find token, log in, open session
//!      │                                 │ fails: StartFailed ───▶ exit 1
//!      │ Reply Done                      │ hangs: killed, or ends 2 s after the socket
//!      ▼
//!   a thread for each session: receive, serve, reply (session_threads.rs)
//!      │ the socket ends: the daemon finished, closed it, or is dead
//!      ▼
//!   threads finish (2 s at most), C_Finalize (1 s at most) ──▶ exit 0
//!
//!   at any time: the socket fails, since a library has closed or replaced it ──▶ exit 3
//! ```
//!
//! The main thread makes no PKCS#11 call, so that the process ends in time even if the vendor's library hangs. The main
//! thread waits for the end of the socket, and reports the cost of the process four times per second. A panic aborts the
//! process. The daemon judges the results; the worker does not.

mod clock;
mod discovery;
#[allow(unsafe_code)]
mod ffi;
mod key_table;
mod mechanism;
mod module;
mod oaep;
mod objects;
mod pin_flags;
mod process;
mod raw_session;
mod session;
mod session_threads;
mod spread;
mod token;
mod tool;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use claviger_process::output::note;
use claviger_process::signals::exit_at_once;

use crate::link::{Call, FrameBuffer, Report, Request, Start, WorkerEnd};
use crate::worker::session_threads::{Finished, SessionThreads};

pub use ffi::set_env;
pub use raw_session::RawSession;
pub use tool::init_token;

/// Exit status if the module, its token or its PIN cannot be used.
const START_FAILED: u8 = 1;
/// Exit status if the process was not started by the daemon.
const MISUSED: u8 = 2;
/// Period of the cost reports: short enough for measurements of a few seconds.
const USAGE_PERIOD: Duration = Duration::from_millis(250);

/// Serves the token that the daemon names over standard input, until the daemon closes that socket. Must be called at the
/// start of a process, before it has threads or opens descriptors.
#[must_use]
pub fn run() -> ExitCode {
    let socket = match process::settle() {
        Ok(socket) => socket,
        Err(error) => {
            note(&error.to_string());
            return ExitCode::from(MISUSED);
        }
    };
    exit_at_once(match serve(socket, process::usage) {
        Ok(Finished { started: true, clean }) => {
            if !clean {
                note("the worker ends without C_Finalize: a call hangs in the module, or the module refuses it");
            }
            0
        }
        Ok(Finished { started: false, .. }) => START_FAILED,
        Err(ServeError::Misused(error)) => {
            note(&format!("the worker ends: {error}"));
            MISUSED
        }
        Err(ServeError::Socket(error)) => {
            note(&format!("the worker ends, because its socket fails: {error}"));
            process::SOCKET_FAILED
        }
    })
}

/// Reason why a process serves nothing or stopped serving.
#[derive(Debug)]
pub(crate) enum ServeError {
    /// The first message is not a call of the daemon.
    Misused(io::Error),
    /// The socket failed.
    Socket(io::Error),
}

/// Runs the process from the first call on. `usage` returns processor time and memory of the process.
pub(crate) fn serve(socket: OwnedFd, usage: impl Fn() -> (Duration, u64)) -> Result<Finished, ServeError> {
    let daemon = Arc::new(WorkerEnd::new(socket).map_err(ServeError::Socket)?);
    let Some((id, start)) = first_call(&daemon).map_err(ServeError::Misused)? else {
        return Ok(Finished { started: true, clean: true });
    };
    let threads = SessionThreads::new(Arc::clone(&daemon));
    threads.start(id, start);
    while !daemon.ends_within(USAGE_PERIOD).map_err(ServeError::Socket)? {
        let (processor, resident) = usage();
        // A failure here is found by the next check of the socket's end.
        let _ = daemon.try_send(&Report::Usage { processor, resident });
    }
    Ok(threads.finish())
}

/// Reads the first call; `None` if the socket ended before.
fn first_call(daemon: &WorkerEnd) -> io::Result<Option<(u32, Start)>> {
    let mut buffer = FrameBuffer::new();
    let len = daemon.recv(buffer.room(), || ())?;
    if len == 0 {
        return Ok(None);
    }
    let start = match Call::decode(buffer.frame(len)) {
        Some(Call { id, request: Request::Start(start) }) => Some((id, start)),
        _ => None,
    };
    buffer.wipe(len);
    start.map(Some).ok_or_else(|| io::Error::other("the first frame does not say what to serve"))
}
