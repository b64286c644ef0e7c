//! Preparation of the process before it reads its socket: descriptors, signals, core dumps.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, capabilities, capability_is_in_ambient_set, clear_ambient_capability_set, set_capabilities,
};
use rustix::time::{ClockId, clock_gettime};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::worker::ffi;

/// Exit status if the socket failed although the daemon has not ended it, for example because a library closed it.
pub(crate) const SOCKET_FAILED: u8 = 3;

/// Moves the socket, which the daemon passes as standard input, to descriptor 3. Closes all other descriptors except
/// standard output and error, and drops ambient capabilities. After that, neither a core dump nor another process of the
/// same user can read this process's memory, and signals for the daemon's whole service do not end it: it ends with its
/// socket.
pub(crate) fn settle() -> io::Result<OwnedFd> {
    let stdin = rustix::stdio::stdin();
    let is_link = sockopt::socket_domain(stdin).is_ok_and(|domain| domain == AddressFamily::UNIX)
        && sockopt::socket_type(stdin).is_ok_and(|kind| kind == SocketType::SEQPACKET);
    if !is_link {
        return Err(io::Error::other(
            "claviger hsm-worker is started by the daemon, which talks to it over its standard input",
        ));
    }
    ffi::close_inherited();
    // The lowest free number is 3 now.
    let socket = rustix::io::fcntl_dupfd_cloexec(stdin, 3)?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    drop_ambient_capabilities()?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    for signal in [SIGINT, SIGTERM] {
        // The signals are handled, not ignored: programs started by the vendor's library would inherit an ignored signal.
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    Ok(socket)
}

/// Drops ambient capabilities. The daemon has them for itself, for example to listen on port 443; neither the library nor
/// the programs that it starts need them.
fn drop_ambient_capabilities() -> io::Result<()> {
    let mut sets = capabilities(None)?;
    let held = sets.permitted & sets.inheritable;
    let ambient: CapabilitySet =
        held.iter().filter(|one| capability_is_in_ambient_set(*one).is_ok_and(|ambient| ambient)).collect();
    // From here on, started programs do not get them.
    clear_ambient_capability_set()?;
    if !ambient.is_empty() {
        sets.effective -= ambient;
        sets.permitted -= ambient;
        sets.inheritable -= ambient;
        // A filter of system calls may forbid this.
        let _ = set_capabilities(None, sets);
    }
    Ok(())
}

/// Returns the processor time of the process so far, and its resident memory in bytes.
pub(crate) fn usage() -> (Duration, u64) {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let processor = Duration::try_from(time).unwrap_or_default();
    // The second field of statm (proc(5)) is the number of resident pages.
    let pages = fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|statm| statm.split(' ').nth(1)?.parse::<u64>().ok())
        .unwrap_or_default();
    (processor, pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_cost_of_this_process_is_found() {
        let (processor, resident) = super::usage();
        assert!(!processor.is_zero() && resident > 100_000, "{processor:?} {resident}");
    }
}
