//! `SIGHUP`: what of the configuration takes effect without a restart.
//!
//! The whole file is read, with the files for TLS; when one of them is bad nothing changes. PINs are read again, and a member
//! whose PIN was refused may try the new one, once. The audit trail is opened anew, which is what log rotation wants. What
//! can be changed while requests are served is, and what needs a restart is named in the log.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger_hsm::{Cluster, MemberState, MemberStatus, Pin};
use claviger_process::signals::Hangup;
use serde_json::Value;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::members::{member, member_queue};
use super::systemd;
use crate::config::{Config, Hsm};
use crate::observe::metrics;
use crate::service::Service;
use crate::tls::{SharedTls, tls_config};

/// How long members that go wait until one of those that stay serves.
const REPLACED_WITHIN: Duration = Duration::from_secs(10);

/// Installs the handler for `SIGHUP`. Without a handler, `SIGHUP` ends the process.
///
/// # Errors
/// When the handler cannot be installed.
pub(crate) fn hangups() -> io::Result<Signal> {
    signal(SignalKind::hangup())
}

/// Reloads `file` at every hangup, for as long as the daemon runs: `hangup` tells of one, also of one that came while the daemon
/// started, and `hangups` wakes this task.
pub(crate) async fn follow(
    mut hangups: Signal,
    hangup: Hangup,
    file: PathBuf,
    service: Arc<Service>,
    tls: Option<SharedTls>,
) {
    let mut requests = service.reloads.requests();
    loop {
        let mut reply = None;
        if !hangup.take() {
            tokio::select! {
                hung_up = hangups.recv() => match hung_up {
                    Some(()) => continue,
                    None => return,
                },
                Some(asked) = requests.recv() => reply = Some(asked),
            }
        }
        systemd::reloading().await;
        if let Err(error) = service.audit.reopen().await {
            tracing::error!(%error, "the audit trail cannot be reopened");
        }
        let reloaded = reload(&file, &service, tls.as_ref()).await;
        if let Err(error) = &reloaded {
            tracing::error!(error, "the configuration was not reloaded; the daemon goes on with the old one");
        }
        systemd::ready().await;
        if let Some(reply) = reply {
            // An administrator who no longer waits reads the log.
            let _ = reply.send(reloaded);
        }
    }
}

async fn reload(file: &Path, service: &Arc<Service>, tls: Option<&SharedTls>) -> Result<Vec<String>, String> {
    let path = file.to_owned();
    let read = tokio::task::spawn_blocking(move || {
        let config = Config::load(&path).map_err(|error| error.to_string())?;
        let tls = config.server.tls.as_ref().map(tls_config).transpose().map_err(|error| error.to_string())?;
        Ok::<_, String>((config, tls))
    });
    let (config, fresh) = read.await.map_err(|error| error.to_string())??;

    // From here on every part stands for itself: what fails stays as it is, and is said.
    let mut next = Config::clone(&service.config.load());
    if let (Some(shared), Some(fresh)) = (tls, fresh) {
        fresh.warn();
        shared.store(Arc::new(fresh));
        next.server.tls.clone_from(&config.server.tls);
    }
    next.release.deadline_ms = config.release.deadline_ms;
    next.release.host_rate = config.release.host_rate;
    next.release.host_burst = config.release.host_burst;
    next.release.refused_rate = config.release.refused_rate;
    next.release.refused_burst = config.release.refused_burst;
    next.attest.clone_from(&config.attest);
    next.server.stranger_rate = config.server.stranger_rate;
    next.server.stranger_burst = config.server.stranger_burst;
    next.server.document_rate = config.server.document_rate;
    next.server.document_burst = config.server.document_burst;
    next.release.queue = config.release.queue;
    next.release.max_offline_unwraps = config.release.max_offline_unwraps;
    next.release.stock_mib = config.release.stock_mib;
    next.server.body_timeout_ms = config.server.body_timeout_ms;
    next.server.body_rate = config.server.body_rate;
    next.server.body_memory_mib = config.server.body_memory_mib;
    next.server.body_memory_per_address_mib = config.server.body_memory_per_address_mib;
    service.bodies.change(&next.server);
    service.admission.change(&next);
    members(&config, &mut next, service).await;
    service.admission.resize(&next, next.hsm.iter().map(|hsm| hsm.sessions).sum());
    let waiting = differences(&config, &next);
    service.config.store(Arc::new(next));
    service.registry.decisions().settle();
    service.rebase_stock();
    let waiting: Vec<String> = waiting.into_iter().collect();
    if waiting.is_empty() {
        tracing::info!("configuration reloaded");
    } else {
        let settings = waiting.join(", ");
        tracing::warn!(settings, "configuration reloaded; these settings have changed and need a restart");
    }
    Ok(waiting)
}

/// Brings the cluster to what `config` says, as far as that goes, and notes in `next` what it is.
async fn members(config: &Config, next: &mut Config, service: &Arc<Service>) {
    let cluster = &service.cluster;
    cluster.hide(config.hsm.iter().filter_map(|hsm| hsm.pin.variable().map(str::to_owned)).collect()).await;
    for hsm in &config.hsm {
        let failed = |what: &'static str| {
            move |error: String| tracing::error!(hsm = hsm.name, error, "{what}; it stays as it was")
        };
        let Some(known) = next.hsm.iter_mut().find(|known| known.name == hsm.name) else {
            if config.env != next.env {
                failed("the HSM cannot be added")("[env] has changed; restart the daemon to apply it".to_owned());
                continue;
            }
            // With the others: each may come to do what another one failed at.
            let names: Vec<_> = next.hsm.iter().chain([hsm]).map(|hsm| hsm.name.clone()).collect();
            let (taken_in, of, env, queue) = (service.clone(), hsm.clone(), config.env.clone(), member_queue(next));
            let added = tokio::task::spawn_blocking(move || {
                let config = member(&env, &of, queue).map_err(|error| error.to_string())?;
                let members: Vec<&str> = names.iter().map(String::as_str).collect();
                metrics::preregister(&metrics::Known { members: &members, ..metrics::Known::default() });
                taken_in.cluster.add(config).map_err(|error| error.to_string())
            });
            match added.await.unwrap_or_else(|error| Err(error.to_string())) {
                Ok(()) => {
                    tracing::info!(hsm = hsm.name, "HSM added");
                    next.hsm.push(hsm.clone());
                }
                Err(error) => failed("the HSM cannot be added")(error),
            }
            continue;
        };
        // Where the file names another token by now, its PIN is for that one: the restart which that needs takes both.
        if same_token(known, hsm) {
            let taken = match read_pin(hsm).await {
                Ok(pin) => cluster.set_pin(&hsm.name, pin).await.map_err(|error| error.to_string()),
                Err(error) => Err(error),
            };
            match taken {
                Ok(()) => known.pin.clone_from(&hsm.pin),
                Err(error) => failed("the PIN was not taken")(error),
            }
        }
        if (known.priority, known.weight) != (hsm.priority, hsm.weight) {
            match cluster.rank(&hsm.name, hsm.priority, hsm.weight) {
                Ok(()) => (known.priority, known.weight) = (hsm.priority, hsm.weight),
                Err(error) => failed("priority and weight were not taken")(error.to_string()),
            }
        }
    }
    let gone = |hsm: &Hsm| !config.hsm.iter().any(|wanted| wanted.name == hsm.name);
    let names: Vec<String> = next.hsm.iter().filter(|hsm| gone(hsm)).map(|hsm| hsm.name.clone()).collect();
    let until = Instant::now() + REPLACED_WITHIN;
    for name in names {
        if !serves_without(cluster, config, until).await {
            tracing::warn!(
                hsm = name,
                "the HSM is not removed, because none of the remaining HSMs serves; the next reload tries again"
            );
            continue;
        }
        match cluster.remove(&name).await {
            Ok(()) => {
                tracing::info!(hsm = name, "HSM removed; its running operations have ended");
                next.hsm.retain(|hsm| hsm.name != name);
            }
            Err(error) => tracing::error!(hsm = name, %error, "the HSM cannot be removed"),
        }
    }
}

/// On a thread that may block: the file may be a pipe, or on a server that does not answer.
async fn read_pin(hsm: &Hsm) -> Result<Pin, String> {
    let hsm = hsm.clone();
    let read = tokio::task::spawn_blocking(move || {
        hsm.read_pin().map(|pin| Pin::new(pin.to_string())).map_err(|error| error.to_string())
    });
    read.await.unwrap_or_else(|error| Err(error.to_string()))
}

/// Whether both name the same token of the same module.
fn same_token(one: &Hsm, other: &Hsm) -> bool {
    (&one.module, &one.token) == (&other.module, &other.token)
}

/// Waits until one of the members that stay serves: those that were taken in just now have yet to prove themselves.
async fn serves_without(cluster: &Cluster, config: &Config, until: Instant) -> bool {
    let stays = |member: &MemberStatus| config.hsm.iter().any(|hsm| hsm.name == member.name);
    loop {
        if cluster.members().iter().any(|member| member.state == MemberState::Up && stays(member)) {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Returns the names of the settings that differ. Members are identified by name. Values are omitted because they may be
/// secrets.
fn differences(wanted: &Config, is: &Config) -> BTreeSet<String> {
    let settings = |config: &Config| {
        let mut value = serde_json::to_value(config).unwrap_or_default();
        let members = value.get_mut("hsm").map(Value::take).unwrap_or_default();
        let members = members.as_array().cloned().unwrap_or_default();
        let named = members.into_iter().map(|hsm| (hsm["name"].as_str().unwrap_or_default().to_owned(), hsm));
        value["hsm"] = Value::Object(named.collect());
        value
    };
    let mut found = BTreeSet::new();
    compare("", &settings(wanted), &settings(is), &mut found);
    found
}

fn compare(name: &str, one: &Value, other: &Value, found: &mut BTreeSet<String>) {
    if let (Value::Object(one), Value::Object(other)) = (one, other) {
        for key in one.keys().chain(other.keys()).collect::<BTreeSet<_>>() {
            let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
            compare(
                &name,
                &one.get(key).cloned().unwrap_or_default(),
                &other.get(key).cloned().unwrap_or_default(),
                found,
            );
        }
    } else if one != other {
        found.insert(name.to_owned());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_is_for_the_token_that_it_is_named_with() {
        let hsm = |named: &str| {
            let text = format!("[[hsm]]\nname = \"a\"\npin_file = \"p\"\n{named}\n");
            Config::parse(&text, Path::new("/etc/claviger.toml")).unwrap().hsm.remove(0)
        };
        let is = hsm("module = \"m\"\ntoken = \"t\"");
        assert!(same_token(&is, &hsm("module = \"m\"\ntoken = \"t\"\nweight = 2")));
        for other in
            ["module = \"m\"\ntoken = \"u\"", "module = \"m\"\nserial = \"t\"", "module = \"n\"\ntoken = \"t\""]
        {
            assert!(!same_token(&is, &hsm(other)), "{other}");
        }
    }

    #[test]
    fn what_needs_a_restart_is_named() {
        let parse = |text: &str| Config::parse(text, Path::new("/etc/claviger.toml")).unwrap();
        let hsm = |name: &str, more: &str| {
            format!("[[hsm]]\nname = {name:?}\nmodule = \"m\"\ntoken = \"t\"\npin_file = \"p\"\n{more}\n")
        };
        let is = parse(&(hsm("a", "") + &hsm("b", "")));
        assert!(differences(&is, &is).is_empty());
        // In another order it is the same.
        assert!(differences(&parse(&(hsm("b", "") + &hsm("a", ""))), &is).is_empty());
        let wanted =
            "[server]\nlisten = \"127.0.0.1:1\"\n[env]\nA = \"secret\"\n".to_owned() + &hsm("b", "sessions = 9");
        let names: Vec<_> = differences(&parse(&wanted), &is).into_iter().collect();
        assert_eq!(names, ["env", "hsm.a", "hsm.b.sessions", "server.listen"]);
    }
}
