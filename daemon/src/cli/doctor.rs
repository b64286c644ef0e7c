//! `claviger doctor`: what is wrong, and what to do about it, whether the daemon runs or not.
//!
//! Every check is a plain function that gives findings. Files are looked at here. The HSMs are asked through the daemon when it
//! runs, with its own sessions; otherwise directly, each by a process of its own, and each PIN is tried once.

mod hsm;

use std::path::Path;
use std::process::ExitCode;

use crate::checks::{Finding, Level, files, state};
use crate::config::Config;
use crate::run::preflight;
use crate::sys::clock::unix_now;
use crate::sys::print::say;

/// Looks at everything that belongs to the daemon of this configuration.
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
    findings.extend(if running { hsm::through_daemon(&config) } else { hsm::directly(file, &config) });
    findings
}

/// Looks at one HSM, for [`examine`], which starts a process for each: writes the findings as JSON to standard output, and ends the
/// process, without what the module wants to do at its end. To be called while the process has one thread: the environment that the
/// module wants is set here.
///
/// # Errors
/// When nothing could be written.
pub fn examine_hsm(file: &Path, name: &str) -> std::io::Result<std::convert::Infallible> {
    hsm::examine_one(file, name)?;
    claviger_process::signals::exit_at_once(0)
}

/// What `claviger serve` would refuse to start with.
fn obstacles(config: &Config, running: bool) -> Vec<Finding> {
    let problems = preflight::problems(config, running);
    let findings = problems.into_iter().map(|problem| Finding::error(problem.check, problem.what, problem.remedy));
    let mut findings: Vec<Finding> = findings.collect();
    if !findings.iter().any(|finding| finding.check == "pin") {
        findings.push(Finding::ok("pin", "every PIN can be read, and others cannot read it"));
    }
    findings
}

/// Prints findings, the worst last, where a person looks first.
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

/// The exit status: 0 all is well, 1 there are warnings, 2 there are errors.
#[must_use]
pub fn status(findings: &[Finding]) -> ExitCode {
    match findings.iter().map(|finding| finding.level).max() {
        None | Some(Level::Ok) => ExitCode::SUCCESS,
        Some(Level::Warning) => ExitCode::from(1),
        Some(Level::Error) => ExitCode::from(2),
    }
}
