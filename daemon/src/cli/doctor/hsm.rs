//! The HSMs: modules, tokens, PINs, and every registered key on every member, really used.

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

/// How long an HSM may take to be examined. A login at a network HSM takes seconds, and there may be many keys.
const PATIENCE: Duration = Duration::from_secs(60);

/// Without a daemon, with a session on every token. A PIN is tried only where the token tells of no wrong PIN before.
///
/// Each HSM is examined by a process of its own, as each is served by one: a module that crashes or hangs is named, and the others
/// are examined all the same. All at the same time, as the daemon has them: members may be in each other's way. Only those that are
/// one token by the configuration wait for each other, so that a wrong PIN is known before it is tried again.
pub(super) fn directly(file: &Path, config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut left: Vec<&Hsm> = config.hsm.iter().collect();
    while !left.is_empty() {
        let mut tokens = HashSet::new();
        let (now, later) = left.into_iter().partition(|hsm| tokens.insert((&hsm.module, &hsm.token)));
        findings.extend(at_once(file, config, now));
        left = later;
    }
    // In the order of the configuration.
    let position = |name: &str| config.hsm.iter().position(|hsm| hsm.name == name);
    findings.sort_by_key(|(name, _)| position(name));
    findings.into_iter().flat_map(|(_, findings)| findings).collect()
}

/// Examines these HSMs at the same time; what was found, by name.
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

/// A process that examines one HSM: this very program, which writes its findings as JSON.
struct Examiner {
    child: Child,
    /// Its standard output. A file: no descendant of the process can hold up who reads it.
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
        // They are complete even where the module does not let its process end.
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

    /// How it ended; `None`: it did not in time, and was killed.
    fn wait(&mut self, until: Instant) -> io::Result<Option<ExitStatus>> {
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= until {
                // With what the library has started.
                kill_process_group(Pid::from_child(&self.child), Signal::KILL)?;
                self.child.wait()?;
                return Ok(None);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Within the process for one HSM: writes what is found about it to standard output. What the module prints goes to standard error.
pub(super) fn examine_one(file: &Path, name: &str) -> io::Result<()> {
    // A doctor that is interrupted leaves no session at a token that hangs.
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
    // C_Finalize comes after that: the module may crash or hang there.
}

fn open(config: &Config, hsm: &Hsm) -> Result<RawSession, Finding> {
    let config = member(&config.env, hsm, 1).map_err(|error| {
        Finding::error("hsm", format!("{} was not asked: its PIN cannot be read", hsm.name), error.to_string())
    })?;
    // Trying to load what is not there leaves nobody wiser than this.
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
    // One is open already.
    let room = session.room_for(hsm.sessions) + 1;
    if room < hsm.sessions {
        findings.push(few_sessions(&hsm.name, room, hsm.sessions));
    }
    well(&hsm.name, registered.len(), findings)
}

/// Asks the daemon that runs, which does [`of_daemon`](crate::checks::of_daemon).
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
        // The daemon tries the PIN once then.
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
