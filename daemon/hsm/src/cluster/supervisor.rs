//! The one task that looks after all members: it finds calls that hang, has closed members probed when that is due, and
//! has a module initialised anew when nothing of it is in use any more.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use cryptoki::error::RvError;
use tokio::time::MissedTickBehavior;
use tracing::warn;

use super::member::{Member, Patience};
use super::{Cluster, Entry};
use crate::error::HsmError;
use crate::standstill;

/// How often it looks. Also how much later than the watchdog's time a hung call may be found.
const TICK: Duration = Duration::from_millis(20);

impl Cluster {
    pub(super) fn supervise(&self) {
        let cluster = self.clone();
        let task = tokio::spawn(async move {
            let mut members = cluster.snapshot();
            // Members of one module instance share its fate.
            let mut instances = group(&members);
            let mut renewing: Vec<Option<JoinHandle<()>>> = instances.iter().map(|_| None).collect();
            let mut ticks = tokio::time::interval(TICK);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                let now = standstill::now();
                let current = cluster.snapshot();
                // While a module is renewed its members stay together as they were.
                let idle = renewing.iter().flatten().all(JoinHandle::is_finished);
                if !Arc::ptr_eq(&current, &members) && idle {
                    members = current;
                    instances = group(&members);
                    renewing = instances.iter().map(|_| None).collect();
                }
                for (members, renewing) in instances.iter().zip(&mut renewing) {
                    members.iter().for_each(|member| member.watch(now, cluster.watchdog));
                    if members.iter().any(|member| member.shared.module.is_lost()) {
                        let lost = HsmError::new("C_Initialize", RvError::CryptokiNotInitialized);
                        members.iter().for_each(|member| member.lost(&lost));
                    }
                    if renewing.as_ref().is_some_and(|task| !task.is_finished()) {
                        continue;
                    }
                    let wanted = members.iter().any(|member| member.wants_module());
                    if wanted && members.iter().all(|member| member.is_out_of_module()) {
                        let members = members.clone();
                        // Not one of tokio's: the runtime's end would wait for a module that hangs.
                        let renewal = thread::Builder::new().name("hsm renewal".to_owned());
                        match renewal.spawn(move || renew(&members)) {
                            Ok(task) => *renewing = Some(task),
                            Err(error) => warn!(%error, "no thread to initialise a module anew"),
                        }
                        continue;
                    }
                    if wanted {
                        tell_in_use(members);
                    }
                    for member in members.iter() {
                        // A member that is up and failed, or was not heard of for long, is asked; that closes it if it went wrong.
                        if member.is_silent(now) || member.shared.health().is_in_doubt(now) {
                            let (member, patience) = (Arc::clone(member), cluster.probe_patience());
                            tokio::spawn(async move { member.probe(patience).await });
                        } else if member.shared.health().may_probe(now) {
                            tokio::spawn(probe(Arc::clone(member), cluster.probe_patience()));
                        }
                    }
                }
            }
        });
        let mut supervisor = self.supervisor.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(before) = supervisor.replace(task.abort_handle()) {
            before.abort();
        }
    }
}

/// Tells the members that want their module initialised again which others keep it from that.
fn tell_in_use(members: &[Arc<Member>]) {
    let serving: Vec<_> =
        members.iter().filter(|member| !member.is_out_of_module()).map(|member| member.shared.name.as_str()).collect();
    let serving = serving.join(", ");
    members
        .iter()
        .filter(|member| member.wants_module() && member.is_out_of_module())
        .for_each(|member| member.module_in_use(&serving));
}

/// By module instance.
fn group(members: &[Entry]) -> Vec<Arc<[Arc<Member>]>> {
    let mut instances: Vec<Vec<Arc<Member>>> = Vec::new();
    for entry in members {
        let member = &entry.member;
        let same = |group: &&mut Vec<Arc<Member>>| {
            group.iter().any(|other| Arc::ptr_eq(&other.shared.module, &member.shared.module))
        };
        match instances.iter_mut().find(same) {
            Some(group) => group.push(Arc::clone(member)),
            None => instances.push(vec![Arc::clone(member)]),
        }
    }
    instances.into_iter().map(Into::into).collect()
}

/// Probes a member to open it. Only for who was told to by `may_probe`.
pub(super) async fn probe(member: Arc<Member>, patience: Patience) -> Result<(), HsmError> {
    let probing = tokio::spawn({
        let member = Arc::clone(&member);
        async move { member.probe_to_open(patience).await }
    });
    // A probe that nobody reported the end of would be the last one.
    probing.await.unwrap_or_else(|_| {
        let error = HsmError::NoMember("the probe failed".to_owned());
        member.shared.health().probed(Err(&error), Duration::ZERO, standstill::now());
        Err(error)
    })
}

/// Finalises and initialises the members' module. Blocks.
fn renew(members: &[Arc<Member>]) {
    let Some(first) = members.first() else { return };
    {
        let _gate = first.shared.module.enter();
        members.iter().for_each(|member| member.forget_login());
    }
    match first.shared.module.renew() {
        Ok(true) => members.iter().for_each(|member| member.module_renewed()),
        // Somebody came in between; the next look decides anew.
        Ok(false) => {}
        Err(error) => members.iter().for_each(|member| member.module_not_renewed(&error)),
    }
}
