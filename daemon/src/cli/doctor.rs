//! `claviger doctor`: finds problems and prints a remedy for each, whether the daemon runs or not.
//!
//! Each check is a plain function that returns findings. The files are checked in this process. If the daemon runs, it
//! checks the HSMs in its own sessions. Otherwise a separate process checks each HSM and tries each PIN once.

mod hsm;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use crate::checks::{Finding, Level, files, nodes, state};
use crate::config::Config;
use crate::run::preflight;
use crate::sys::clock::unix_now;
use crate::sys::failure::Failure;
use crate::sys::print::say;

/// Checks everything that belongs to the daemon of this configuration.
#[must_use]
pub fn examine(file: &Path) -> Vec<Finding> {
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(error) => {
            let what = format!("{}: {}", error.setting.as_deref().unwrap_or("the file"), error.problem);
            let place = error.line.map_or_else(String::new, |line| format!(", line {line}"));
            let todo = format!("{} ({}{place}); nothing else can be looked at before", error.advice, file.display());
            return vec![Finding::error("configuration", what, todo)];
        }
    };
    let mut findings =
        vec![Finding::ok("configuration", format!("{} is read, every setting is known", file.display()))];
    let now = unix_now();
    findings.extend(files::code(file, &config));
    findings.extend(files::tls(&config, now));
    findings.extend(files::folder(&config));
    let (sockets, running) = files::sockets(&config);
    findings.extend(sockets);
    findings.extend(obstacles(&config, running));
    findings.extend(files::audit(&config, now));
    findings.extend(state::examine(&config, now).0);
    findings.extend(nodes::examine(&config));
    findings.extend(if running { hsm::through_daemon(&config) } else { hsm::directly(file, &config) });
    findings
}

/// As [`examine`], as the user of the daemon: root may read files that the daemon may not. The user is the owner of the
/// state folder. If this is not root, or that user is root, this is [`examine`].
#[must_use]
pub fn examine_as_daemon(file: &Path) -> Vec<Finding> {
    let owner = || {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let state = Config::load(file).ok()?.server.state.metadata().ok()?;
        (state.uid() != 0).then(|| (state.uid(), state.gid()))
    };
    let Some((uid, gid)) = owner() else { return examine(file) };
    as_user(uid, gid, file).unwrap_or_else(|error| {
        let mut findings = examine(file);
        let what = format!("the checks ran as root, not as the daemon's user (id {uid}): {error}");
        findings.push(Finding::warning("user", what, "install setpriv (util-linux), or run the doctor as that user"));
        findings
    })
}

/// Runs this program as another user, with all groups of that user.
fn as_user(uid: u32, gid: u32, file: &Path) -> Result<Vec<Finding>, Failure> {
    let mut command = std::process::Command::new("setpriv");
    command.args([format!("--reuid={uid}"), format!("--regid={gid}"), "--init-groups".to_owned(), "--".to_owned()]);
    command.arg(std::env::current_exe()?).args(["doctor", "--json", "--config"]).arg(file);
    let output = command.stdin(std::process::Stdio::null()).output()?;
    serde_json::from_slice(&output.stdout).map_err(|_| String::from_utf8_lossy(&output.stderr).trim().to_owned().into())
}

/// Checks one HSM and writes the findings as JSON to standard output; [`examine`] starts a process with this function
/// for each HSM. Ends the process without running the module's exit handlers. Call it while the process has a single
/// thread, because it sets the environment variables that the module needs.
///
/// # Errors
/// The output could not be written.
pub fn examine_hsm(file: &Path, name: &str) -> std::io::Result<std::convert::Infallible> {
    hsm::examine_one(file, name)?;
    claviger_process::signals::exit_at_once(0)
}

/// The problems with which `claviger serve` would refuse to start.
fn obstacles(config: &Config, running: bool) -> Vec<Finding> {
    let problems = preflight::problems(config, running);
    let findings = problems.into_iter().map(|problem| Finding::error(problem.check, problem.what, problem.remedy));
    let mut findings: Vec<Finding> = findings.collect();
    if !findings.iter().any(|finding| finding.check == "pin") {
        findings.push(Finding::ok("pin", "every PIN can be read, and others cannot read it"));
    }
    findings
}

/// Prints findings. The worst come last, where they are seen first.
pub fn print(findings: &[Finding], json: bool) {
    if json {
        let text = serde_json::to_string_pretty(findings).unwrap_or_default();
        return say!("{text}");
    }
    let mut sorted: Vec<&Finding> = findings.iter().collect();
    sorted.sort_by_key(|finding| finding.level);
    for finding in sorted {
        let level = match finding.level {
            Level::Ok => "ok     ",
            Level::Warning => "warning",
            Level::Error => "ERROR  ",
        };
        say!("{level}  {:13}  {}", finding.check, finding.what);
        if let Some(todo) = &finding.todo {
            say!("{:24}→ {todo}", "");
        }
    }
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    say!("{} ok, {} warnings, {} errors", count(Level::Ok), count(Level::Warning), count(Level::Error));
}

/// Exit status: 0 no problems, 1 warnings, 2 errors.
#[must_use]
pub fn status(findings: &[Finding]) -> ExitCode {
    match findings.iter().map(|finding| finding.level).max() {
        None | Some(Level::Ok) => ExitCode::SUCCESS,
        Some(Level::Warning) => ExitCode::from(1),
        Some(Level::Error) => ExitCode::from(2),
    }
}
