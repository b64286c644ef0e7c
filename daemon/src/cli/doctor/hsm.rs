//! Checks the HSMs: modules, tokens, PINs, and an operation with every registered key on every member.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use claviger_hsm::{Failure, Function, HsmError, PinTries, RawSession};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process_group, set_parent_process_death_signal};
use serde_json::json;

use crate::admin;
use crate::checks::Finding;
use crate::checks::hsm::{few_sessions, unusable, well};
use crate::checks::state::{self, Registered};
use crate::config::{Config, Hsm};
use crate::run::members::member;
use crate::sys::clock::unix_now;

/// Time limit for checking one HSM. A login at a network HSM takes seconds, and there may be many keys.
const PATIENCE: Duration = Duration::from_secs(60);

/// Checks the HSMs without a daemon, in a session on each token. A PIN is tried only if the token reports no earlier
/// wrong PIN.
///
/// Each HSM is checked by its own process: if a module crashes or hangs, the finding names it, and the other HSMs are
/// still checked. All checks run at the same time, because the daemon also uses all HSMs at once and they may disturb
/// each other. Only members that share one token wait for each other, so that a wrong PIN is detected before it is
/// tried again.
pub(super) fn directly(file: &Path, config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut left: Vec<&Hsm> = config.hsm.iter().collect();
    while !left.is_empty() {
        let mut tokens = HashSet::new();
        let (now, later) = left.into_iter().partition(|hsm| tokens.insert((&hsm.module, &hsm.token)));
        findings.extend(at_once(file, config, now));
        left = later;
    }
    // Sort by the order of the configuration.
    let position = |name: &str| config.hsm.iter().position(|hsm| hsm.name == name);
    findings.sort_by_key(|(name, _)| position(name));
    findings.into_iter().flat_map(|(_, findings)| findings).collect()
}

/// Checks these HSMs at the same time; returns the findings by name.
fn at_once(file: &Path, config: &Config, members: Vec<&Hsm>) -> Vec<(String, Vec<Finding>)> {
    let until = Instant::now() + PATIENCE;
    let examiners: Vec<_> = members.into_iter().map(|hsm| (hsm, Examiner::start(file, config, hsm))).collect();
    let findings = |(hsm, examiner): (&Hsm, io::Result<Examiner>)| {
        let findings = examiner.and_then(|examiner| examiner.findings(hsm, until)).unwrap_or_else(|error| {
            let what = format!("{} was not examined: the process for it: {error}", hsm.name);
            vec![Finding::error("hsm", what, "see that this user may start processes")]
        });
        (hsm.name.clone(), findings)
    };
    examiners.into_iter().map(findings).collect()
}

/// A process of this program that checks one HSM and writes its findings as JSON.
struct Examiner {
    child: Child,
    /// Standard output of the process. It is a file, because a child of the process could keep a pipe open.
    findings: File,
}

impl Examiner {
    fn start(file: &Path, config: &Config, hsm: &Hsm) -> io::Result<Self> {
        let findings = File::from(memfd_create("findings", MemfdFlags::CLOEXEC)?);
        let mut command = Command::new("/proc/self/exe");
        command.arg("doctor").arg("--config").arg(file).arg("--hsm").arg(&hsm.name);
        let others = config.hsm.iter().filter(|other| other.name != hsm.name).filter_map(|other| other.pin.variable());
        others.filter(|pin| Some(*pin) != hsm.pin.variable()).for_each(|pin| {
            command.env_remove(pin);
        });
        let child = command.stdin(Stdio::null()).stdout(findings.try_clone()?).process_group(0).spawn()?;
        Ok(Examiner { child, findings })
    }

    fn findings(mut self, hsm: &Hsm, until: Instant) -> io::Result<Vec<Finding>> {
        let status = self.wait(until)?;
        let mut written = Vec::new();
        self.findings.rewind()?;
        self.findings.read_to_end(&mut written)?;
        // The findings are complete even if the module keeps the process from ending.
        if let Ok(findings) = serde_json::from_slice(&written) {
            return Ok(findings);
        }
        Ok(vec![match status {
            None => Finding::error(
                "module",
                format!("the module {} of {} hangs", hsm.module.display(), hsm.name),
                "see that the HSM is reached; the vendor's log may say more",
            ),
            Some(status) => Finding::error(
                "module",
                format!("the module {} of {} ends the process that uses it: {status}", hsm.module.display(), hsm.name),
                "take this to the vendor; the daemon starts a fresh process again and again, and the other HSMs serve",
            ),
        }])
    }

    /// Waits until the process ends. `None`: it did not end in time and was killed.
    fn wait(&mut self, until: Instant) -> io::Result<Option<ExitStatus>> {
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= until {
                // Also kill the processes that the library has started.
                kill_process_group(Pid::from_child(&self.child), Signal::KILL)?;
                self.child.wait()?;
                return Ok(None);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Checks one HSM inside its process and writes the findings to standard output. Output of the module goes to standard
/// error.
pub(super) fn examine_one(file: &Path, name: &str) -> io::Result<()> {
    // If the doctor is interrupted, end this process too: a hanging token must not keep its session.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let mut output = File::from(rustix::io::dup(rustix::stdio::stdout())?);
    rustix::stdio::dup2_stdout(rustix::stdio::stderr())?;
    let config = Config::load(file).map_err(io::Error::other)?;
    let hsm = config.hsm.iter().find(|hsm| hsm.name == name).ok_or_else(|| io::Error::other("no such HSM"))?;
    let (_, registered) = state::examine(&config, unix_now());
    let opened = open(&config, hsm);
    let findings = match &opened {
        Ok(session) => by_hand(hsm, session, &registered),
        Err(finding) => vec![finding.clone()],
    };
    output.write_all(&serde_json::to_vec(&findings)?)
    // C_Finalize runs after the findings are written, because the module may crash or hang in it.
}

fn open(config: &Config, hsm: &Hsm) -> Result<RawSession, Finding> {
    let config = member(&config.env, hsm, 1).map_err(|error| {
        Finding::error("hsm", format!("{} was not asked: its PIN cannot be read", hsm.name), error.to_string())
    })?;
    // Loading a missing file would give a less useful error.
    if !hsm.module.exists() {
        let what = format!("the module {} of {} does not exist", hsm.module.display(), hsm.name);
        return Err(Finding::error("module", what, "install the vendor's package, or mend `module`"));
    }
    RawSession::open(&config).map_err(|error| failed(&hsm.name, &error))
}

fn by_hand(hsm: &Hsm, session: &RawSession, registered: &[Registered]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = registered
        .iter()
        .filter_map(|key| {
            session.self_test(&key.known).err().map(|error| unusable(&hsm.name, &key.name, &error.into()))
        })
        .collect();
    // One session is already open.
    let room = session.room_for(hsm.sessions) + 1;
    if room < hsm.sessions {
        findings.push(few_sessions(&hsm.name, room, hsm.sessions));
    }
    well(&hsm.name, registered.len(), findings)
}

/// Asks the running daemon, which calls [`of_daemon`](crate::checks::of_daemon).
pub(super) fn through_daemon(config: &Config) -> Vec<Finding> {
    let socket = config.server.admin_socket();
    let failed = |error: String| {
        vec![Finding::error("hsm", format!("the daemon was not asked of its HSMs: {error}"), "see the daemon's log")]
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(error.to_string()),
    };
    match runtime.block_on(admin::call(&socket, &json!({"command": "doctor"}))) {
        Ok(answer) => serde_json::from_value(answer).unwrap_or_else(|error| failed(error.to_string())),
        Err(error) => failed(error.to_string()),
    }
}

fn failed(member: &str, error: &Failure) -> Finding {
    match error.error {
        HsmError::Module => Finding::error(
            "module",
            format!("{member}: {error}"),
            "see that the module fits this machine, and what it wants in `env`",
        ),
        HsmError::SeveralTokens => {
            Finding::error("token", format!("{member}: {error}"), error.error.remedy(member).unwrap_or_default())
        }
        // In this case the daemon tries the PIN once.
        HsmError::PinNotTried(tries @ PinTries::Low) => {
            Finding::warning("login", format!("{member}: {error}"), tries.remedy(member))
        }
        HsmError::PinNotTried(tries) => Finding::error("login", format!("{member}: {error}"), tries.remedy(member)),
        HsmError::NoSuchToken | HsmError::Nonsense => Finding::error(
            "token",
            format!("{member}: {error}"),
            "see that the HSM is reached and the token called so (pkcs11-tool --module … -L)",
        ),
        HsmError::Pkcs11(Function::Login, _) => Finding::error(
            "login",
            format!("{member}: the PIN is refused: {error}"),
            "mend the PIN file before anything tries again: tokens lock themselves after a few wrong PINs",
        ),
        _ => Finding::error("hsm", format!("{member}: {error}"), "see in the vendor's log why"),
    }
}
