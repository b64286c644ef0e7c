//! The HSMs: modules, tokens, PINs, and every registered key on every member, really used.

use std::sync::Arc;

use claviger_hsm::{Failure, Function, HsmError, MemberState, PinTries, RawSession};
use serde_json::json;

use super::Finding;
use super::state::{self, Registered};
use crate::admin;
use crate::config::{Config, Hsm};
use crate::daemon::member;
use crate::service::{Service, unix_now};

/// Without a daemon, with a session on every token. A PIN is tried only where the token tells of no wrong PIN before.
pub(super) fn directly(config: &Config, registered: &[Registered]) -> Vec<Finding> {
    // All at the same time, as the daemon has them: members may be in each other's way.
    let opened: Vec<_> = config.hsm.iter().map(|hsm| (hsm, open(config, hsm))).collect();
    opened
        .iter()
        .flat_map(|(hsm, session)| match session {
            Ok(session) => by_hand(hsm, session, registered),
            Err(finding) => vec![finding.clone()],
        })
        .collect()
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

/// Asks the daemon that runs, which does [`of_daemon`].
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

/// Within the daemon, with its own sessions: nobody logs in anew.
pub(super) async fn of_daemon(service: &Arc<Service>) -> Vec<Finding> {
    let of = Arc::clone(service);
    let read = tokio::task::spawn_blocking(move || of.with_state(|state| state::read(state, unix_now())));
    // What is wrong with the state itself, the doctor sees with its own eyes.
    let registered = match read.await {
        Ok(Ok((_, registered))) => Arc::new(registered),
        _ => Arc::default(),
    };
    let mut asked = tokio::task::JoinSet::new();
    let members = service.cluster.members();
    for status in &members {
        let (service, name, registered) = (Arc::clone(service), status.name.clone(), Arc::clone(&registered));
        let (wanted, open) = (status.sessions_wanted, status.sessions_open);
        let state = status.state;
        let why = status.last_error.as_ref().map(|error| error.text.clone()).unwrap_or_default();
        let remedy = status.last_error.as_ref().and_then(|error| error.remedy.clone());
        asked.spawn(async move {
            let what = format!("{name} does not serve, it is {}: {why}", state.name());
            let todo = remedy.as_deref();
            match state {
                MemberState::Up => {}
                MemberState::Draining | MemberState::Drained => {
                    let what = format!("{name} is drained on an administrator's word");
                    return vec![Finding::warning(
                        "hsm",
                        what,
                        format!("claviger hsm resume {name}, when that is over"),
                    )];
                }
                MemberState::PinRefused => {
                    let todo = "mend the PIN file, then send SIGHUP: the PIN is not tried again before";
                    return vec![Finding::error("login", what, todo)];
                }
                _ => {
                    let by_itself = "`claviger hsm list` and the log say more; it serves again by itself when it can";
                    return vec![Finding::error("hsm", what, todo.unwrap_or(by_itself))];
                }
            }
            let mut findings = Vec::new();
            for key in registered.iter() {
                if let Err(error) = service.cluster.self_test(&name, &key.known).await {
                    findings.push(unusable(&name, &key.name, &error));
                }
            }
            // It opens them as they are needed: only what the token refused counts.
            if open < wanted && why.contains("CKR_SESSION_COUNT") {
                findings.push(few_sessions(&name, open, wanted));
            }
            well(&name, registered.len(), findings)
        });
    }
    let mut findings: Vec<Finding> = asked.join_all().await.into_iter().flatten().collect();
    // By name, whoever answered first.
    findings.sort_by(|one, other| one.what.cmp(&other.what));
    findings
}

fn well(name: &str, keys: usize, findings: Vec<Finding>) -> Vec<Finding> {
    if findings.is_empty() {
        return vec![Finding::ok("key", format!("{name} has all {keys} registered keys, and uses them rightly"))];
    }
    findings
}

fn few_sessions(name: &str, room: usize, wanted: usize) -> Finding {
    let what = format!("{name} gives {room} sessions, and {wanted} are wanted");
    Finding::warning("sessions", what, "lower `sessions`, or see who else has sessions on this token")
}

fn unusable(member: &str, key: &str, error: &Failure) -> Finding {
    match error.error {
        HsmError::NoSuchKey => Finding::error(
            "key",
            format!("{member} does not have {key}"),
            "replicate the key to this token with the vendor's tools, or take the certificate out",
        ),
        HsmError::WrongAnswer | HsmError::Refused { .. } => Finding::error(
            "key",
            format!(
                "{member} gives wrong answers with {key}: the token is broken, or holds another key and does not tell which"
            ),
            "compare the key on this token with the other tokens'",
        ),
        _ => Finding::error(
            "key",
            format!("{member} cannot use {key}: {error}"),
            "see in the vendor's log why; the key needs CKA_DECRYPT or CKA_SIGN",
        ),
    }
}

fn failed(member: &str, error: &Failure) -> Finding {
    match error.error {
        HsmError::Module => Finding::error(
            "module",
            format!("{member}: {error}"),
            "see that the module fits this machine, and what it wants in `env`",
        ),
        HsmError::SeveralTokens => Finding::error(
            "token",
            format!("{member}: {error}"),
            "name the token by `serial` in place of `token`, or take the others away",
        ),
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
