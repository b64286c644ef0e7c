//! Process-wide settings: protection of keys in memory, open files, and stop signals.

use std::future::Future;
use std::io;
use std::sync::LazyLock;
use std::time::Duration;

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use tokio::signal::unix::{SignalKind, signal};

/// Prevents core dumps and debuggers of the same user from seeing keys and PINs in memory.
///
/// Call it first in `main`, before any secret is read. Child processes inherit the limit.
///
/// # Errors
/// The operating system's error. No Linux that runs this daemon refuses these calls.
pub fn no_core_dumps() -> io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    // The limit does not apply to a core pattern that pipes into a program; the dumpable flag does.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// Raises the number of open files to the hard limit: the usual soft limit of 1024 is far below the number of
/// connections of a daemon. Call it before a listener is opened.
///
/// # Errors
/// The operating system's error. Raising the soft limit to the hard limit needs no privilege.
pub fn raise_open_files() -> io::Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

/// Number of connections that the limit on open files allows, if `reserve` files are needed for other purposes: at most
/// `wished`, at least one.
#[must_use]
pub fn affordable_connections(wished: usize, reserve: usize) -> usize {
    affordable(wished, reserve, getrlimit(Resource::Nofile).current)
}

fn affordable(wished: usize, reserve: usize, limit: Option<u64>) -> usize {
    // A missing or unrepresentable limit counts as no limit.
    let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
    wished.min(limit.saturating_sub(reserve).max(1))
}

/// The id of a group, from its name in `/etc/group` or its number.
///
/// # Errors
/// The group does not exist, or the file cannot be read.
pub fn group_id(name: &str) -> io::Result<u32> {
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    let groups = std::fs::read_to_string("/etc/group")?;
    let found = lines_of(&groups, name).find_map(|line| number(line, 2));
    let missing = || io::Error::new(io::ErrorKind::NotFound, format!("/etc/group has no group {name:?}"));
    found.ok_or_else(missing)
}

/// User id and group id of a user in `/etc/passwd`; `None` if there is no such user.
#[must_use]
pub fn user_ids(name: &str) -> Option<(u32, u32)> {
    let users = std::fs::read_to_string("/etc/passwd").ok()?;
    lines_of(&users, name).find_map(|line| Some((number(line, 2)?, number(line, 3)?)))
}

/// The lines of `/etc/passwd` or `/etc/group` whose first field is this name.
fn lines_of<'t>(text: &'t str, name: &str) -> impl Iterator<Item = &'t str> {
    text.lines().filter(move |line| line.split(':').next() == Some(name))
}

/// A field of such a line, counted from 0.
fn number(line: &str, field: usize) -> Option<u32> {
    line.split(':').nth(field)?.parse().ok()
}

/// Name of a user in `/etc/passwd`.
#[must_use]
pub fn name_of_user(id: u32) -> Option<String> {
    name_of("/etc/passwd", id)
}

/// Name of a group in `/etc/group`.
#[must_use]
pub fn name_of_group(id: u32) -> Option<String> {
    name_of("/etc/group", id)
}

/// Both files have the name in the first field and the id in the third.
fn name_of(file: &str, id: u32) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| number(line, 2) == Some(id))?;
    line.split(':').next().map(str::to_owned)
}

/// Resource usage of this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Processor time so far, user and system.
    pub cpu: Duration,
    /// Resident memory, in bytes.
    pub resident: u64,
    /// Number of threads.
    pub threads: u64,
    /// Number of open files.
    pub open_files: u64,
    /// Limit of open files; infinite without a limit.
    pub max_files: f64,
    /// Start time in seconds since 1970.
    pub started: f64,
}

/// Reads the usage with clock_gettime(2) and getrlimit(2), and from proc(5) for the rest; a value that is not available
/// is 0.
#[must_use]
pub fn usage() -> Usage {
    let cpu = clock_gettime(ClockId::ProcessCPUTime).try_into().unwrap_or_default();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name))?;
        value.split_whitespace().next()?.parse::<u64>().ok()
    };
    Usage {
        cpu,
        resident: field("VmRSS:").unwrap_or(0) * 1024,
        threads: field("Threads:").unwrap_or(0),
        open_files: std::fs::read_dir("/proc/self/fd").map_or(0, |files| files.count() as u64),
        max_files: getrlimit(Resource::Nofile).current.map_or(f64::INFINITY, |most| most as f64),
        started: *STARTED,
    }
}

static STARTED: LazyLock<f64> = LazyLock::new(|| started().unwrap_or_default());

/// Start time of this process in seconds since 1970: field 22 of proc_pid_stat(5) counts ticks since boot.
fn started() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The program's name is in parentheses and may contain any characters.
    let (_, after_name) = stat.rsplit_once(") ")?;
    let ticks: f64 = after_name.split(' ').nth(19)?.parse().ok()?;
    let boot = std::fs::read_to_string("/proc/stat").ok()?;
    let boot: f64 = boot.lines().find_map(|line| line.strip_prefix("btime "))?.parse().ok()?;
    Some(boot + ticks / rustix::param::clock_ticks_per_second() as f64)
}

/// A future that completes with the signal's name when the process is told to stop by `SIGTERM` or `SIGINT`.
///
/// Signals are caught from this call on, even before the first poll. Must be called inside a runtime.
///
/// # Errors
/// The handlers cannot be installed.
pub fn shutdown_signal() -> io::Result<impl Future<Output = &'static str> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_the_process_is_dumped() {
        no_core_dumps().unwrap();
        let limit = getrlimit(Resource::Core);
        assert_eq!((limit.current, limit.maximum), (Some(0), Some(0)));
        assert_eq!(rustix::process::dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
    }

    #[test]
    fn connections_are_what_the_open_files_leave_room_for() {
        assert_eq!(affordable(10_000, 300, None), 10_000);
        assert_eq!(affordable(10_000, 300, Some(10_300)), 10_000);
        assert_eq!(affordable(10_000, 300, Some(1024)), 724);
        assert_eq!(affordable(10_000, 300, Some(100)), 1);
    }

    #[test]
    fn groups_have_numbers() {
        assert_eq!(group_id("root").unwrap(), 0);
        assert_eq!(group_id("4711").unwrap(), 4711);
        assert_eq!(group_id("no such group").unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn a_signal_that_came_before_the_first_poll_counts() {
        let stopped = shutdown_signal().unwrap();
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM).unwrap();
        let name = tokio::time::timeout(std::time::Duration::from_secs(10), stopped).await.unwrap();
        assert_eq!(name, "SIGTERM");
    }
}
