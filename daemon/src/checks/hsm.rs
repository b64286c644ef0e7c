//! The HSMs of a daemon that runs, and what is said of any.

use std::sync::Arc;

use claviger_hsm::{Failure, HsmError, MemberState};

use super::finding::Finding;
use super::state;
use crate::service::Service;
use crate::sys::clock::unix_now;

/// Within the daemon, with its own sessions: nobody logs in anew.
pub(super) async fn of_daemon(service: &Arc<Service>) -> Vec<Finding> {
    let of = Arc::clone(service);
    let read = tokio::task::spawn_blocking(move || of.registry.with_state(|state| state::read(state, unix_now())));
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

pub(crate) fn well(name: &str, keys: usize, findings: Vec<Finding>) -> Vec<Finding> {
    if findings.is_empty() {
        return vec![Finding::ok("key", format!("{name} has all {keys} registered keys, and uses them rightly"))];
    }
    findings
}

pub(crate) fn few_sessions(name: &str, room: usize, wanted: usize) -> Finding {
    let what = format!("{name} gives {room} sessions, and {wanted} are wanted");
    Finding::warning("sessions", what, "lower `sessions`, or see who else has sessions on this token")
}

pub(crate) fn unusable(member: &str, key: &str, error: &Failure) -> Finding {
    match error.error {
        HsmError::NoSuchKey => Finding::error(
            "key",
            format!("{member} does not have {key}"),
            "replicate the key to this token with the vendor's tools, or take the certificate out",
        ),
        HsmError::WrongAnswer | HsmError::FaultyKey | HsmError::Refused { .. } => Finding::error(
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
