//! Commands about the members of the cluster.

use claviger_hsm::{MemberState, MemberStatus};
use serde_json::{Value, json};

use super::change::{Change, FAILED};
use crate::observe::audit::Peer;
use crate::observe::audit::SUCCESS;
use crate::service::Service;
use crate::sys::clock::unix;

pub(super) fn list(service: &Service) -> Value {
    service.cluster.members().iter().map(member).collect()
}

pub(super) async fn probe(service: &Service, name: &str) -> Result<Value, String> {
    known(service, name)?;
    let took = service.cluster.probe(name).await.map_err(|e| format!("{name} does not work: {e}"))?;
    Ok(json!({"name": name, "seconds": took.as_secs_f64()}))
}

pub(super) async fn drain(service: &Service, name: &str, force: bool, peer: Peer) -> Result<Value, String> {
    known(service, name)?;
    let others = service.cluster.members().into_iter().filter(|member| member.name != name);
    if !force && !others.into_iter().any(|member| member.state == MemberState::Up) {
        return Err(format!(
            "no other HSM serves, so no machine would get its keys while {name} is drained; if it is to be drained all the \
             same: --force"
        ));
    }
    set_drained(service, name, true, peer).await
}

pub(super) async fn resume(service: &Service, name: &str, peer: Peer) -> Result<Value, String> {
    known(service, name)?;
    set_drained(service, name, false, peer).await
}

async fn set_drained(service: &Service, name: &str, drain: bool, peer: Peer) -> Result<Value, String> {
    let mut change = Change::new(if drain { "hsm.drain" } else { "hsm.resume" }, peer);
    change.attempt.used(name);
    change.requested(service).await?;
    let drained = service.cluster.drain(name, drain);
    change.done(service, if drained.is_ok() { SUCCESS } else { FAILED }).await;
    drained.map(|status| member(&status)).map_err(|e| e.to_string())
}

pub(super) fn known(service: &Service, name: &str) -> Result<(), String> {
    let found = service.config.load().hsm.iter().any(|hsm| hsm.name == name);
    if found { Ok(()) } else { Err(format!("no HSM is called {name}; `claviger hsm list` shows them")) }
}

fn member(status: &MemberStatus) -> Value {
    json!({
        "name": status.name,
        "token": status.token,
        "state": status.state.name(),
        "since": unix(status.since),
        "priority": status.priority,
        "weight": status.weight,
        "latency_seconds": status.latency.as_secs_f64(),
        "in_flight": status.in_flight,
        "waiting": status.waiting,
        "sessions": {
            "open": status.sessions_open,
            "wanted": status.sessions_wanted,
            "busy": status.sessions_busy,
            "stuck": status.sessions_stuck,
        },
        "closings": status.closings,
        "worker_pid": status.worker,
        "last_error": status.last_error.as_ref().map(|error| &error.text),
        "remedy": status.last_error.as_ref().and_then(|error| error.remedy.as_ref()),
        "last_error_at": status.last_error.as_ref().map(|error| unix(error.at)),
    })
}
