//! Readiness: the daemon is ready if a member really decrypts and signs with the primary keys, and nothing else blocks
//! releases: the audit trail can be written, connections are accepted, memory for requests is available, and etcd has
//! confirmed the state recently enough.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use claviger_hsm::{MemberState, standstill};
use tokio::sync::Mutex;
use tokio::task::{JoinHandle, JoinSet};

use crate::http::server::Blocked;
use crate::registry::currency::Currency;
use crate::request::Attempt;
use crate::service::Service;
use crate::sys::id::request_id;

/// How long a result is reused, so that many requests cause only one probe.
const FRESH: Duration = Duration::from_secs(1);
/// Time limit for a member, and for the disk of the audit trail.
const PATIENCE: Duration = Duration::from_secs(2);
/// Minimum free disk space in bytes; with less, the audit trail is about to fail.
const LEAST_ROOM: u64 = 64 * 1024;

/// The last result.
#[derive(Debug, Default)]
pub(crate) struct Readiness(Mutex<Last>);

#[derive(Debug, Default)]
struct Last {
    answer: Option<(Instant, Result<String, String>)>,
    /// A disk query that has not returned yet.
    look: Option<JoinHandle<Option<u64>>>,
}

impl Readiness {
    /// Returns what makes releases possible (a member just decrypted and signed), or why they are impossible. `blocked` is the
    /// state of the service's listener.
    ///
    /// # Errors
    /// One sentence for people.
    pub(crate) async fn check(&self, service: &Service, blocked: &Blocked) -> Result<String, String> {
        // A balancer is to stop sending callers here at once.
        if let Some(why) = blocked.why().filter(|_| blocked.is_stopping()) {
            return Err(why.to_owned());
        }
        // Hold the lock during the probe: concurrent callers wait for its result instead of probing as well.
        let mut last = self.0.lock().await;
        if let Some((_, answer)) = last.answer.as_ref().filter(|(at, _)| standstill::since(*at) < FRESH) {
            return answer.clone();
        }
        let (hsms, trail) = tokio::join!(probe(service), probe_trail(service, &mut last.look));
        let no_memory = || "there is no memory for the bodies of requests".to_owned();
        let state = probe_state(service);
        let others = [
            trail.err(),
            blocked.why().map(str::to_owned),
            (!service.bodies.has_room()).then(no_memory),
            state.as_ref().err().cloned(),
        ];
        let (member, why) = match hsms {
            Ok(member) => (Some(member), None),
            Err(why) => (None, Some(why)),
        };
        let reasons: Vec<String> = why.into_iter().chain(others.into_iter().flatten()).collect();
        let answer = match (member, reasons.as_slice()) {
            (Some(member), []) => {
                let remark = state.ok().flatten().map(|remark| format!("; {remark}")).unwrap_or_default();
                Ok(format!("{member} decrypts and signs{remark}"))
            }
            _ => Err(reasons.join("; ")),
        };
        last.answer = Some((standstill::now(), answer.clone()));
        answer
    }
}

/// Checks that etcd confirmed the state recently enough. Returns a remark if it does not do so now.
fn probe_state(service: &Service) -> Result<Option<String>, String> {
    let registry = &service.registry;
    let because = || registry.why_unconfirmed().map(|why| format!(" ({why})")).unwrap_or_default();
    match registry.currency() {
        Currency::Local | Currency::Confirmed { .. } => Ok(None),
        Currency::Stale { age, left } => {
            let (age, left) = (age.as_secs(), left.as_secs());
            Ok(Some(format!("etcd has not confirmed the state for {age} s{}, it serves {left} s more", because())))
        }
        Currency::Expired { age } => {
            Err(format!("etcd has not confirmed the state for {} s{}", age.as_secs(), because()))
        }
    }
}

/// Checks that the audit trail can be written.
async fn probe_trail(service: &Service, look: &mut Option<JoinHandle<Option<u64>>>) -> Result<(), String> {
    if let Some(why) = service.audit.refuses() {
        // A daemon that is not ready gets no releases, so nothing else would test the trail again: write a record now.
        // If this succeeds, the trail shows that there was a gap.
        let entry = Attempt::new(request_id()).entry("audit.resumed", "success");
        let written = standstill::timeout(PATIENCE, service.audit.administration(&entry));
        if !written.await.unwrap_or(false) {
            return Err(why);
        }
    }
    let file = service.config.load().server.audit_file();
    match one_at_a_time(look, PATIENCE, move || room_at(file)).await {
        // Grants also have a reserve.
        Some(Some(room)) if room.saturating_add(service.audit.reserve_left()) < LEAST_ROOM => {
            Err(format!("the disk of the audit trail is full: {room} bytes are free"))
        }
        // Some file systems do not report their free space.
        Some(_) => Ok(()),
        None => Err("the disk of the audit trail does not answer".to_owned()),
    }
}

/// Runs `work` on a blocking thread, unless the previous call has not returned: a disk that hangs may occupy only one
/// thread. `None`: no result within `patience`.
async fn one_at_a_time<T: Default + Send + 'static>(
    begun: &mut Option<JoinHandle<T>>,
    patience: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let handle = begun.get_or_insert_with(|| tokio::task::spawn_blocking(work));
    let done = standstill::timeout(patience, handle).await.ok()?;
    *begun = None;
    Some(done.unwrap_or_default())
}

/// Bytes that this process may still write to the file system of `file`, if known.
fn room_at(file: PathBuf) -> Option<u64> {
    let file = file.canonicalize().ok()?;
    let metadata = file.metadata().ok()?;
    let room = rustix::fs::statvfs(&file).ok().filter(|room| metadata.is_file() && room.f_blocks > 0)?;
    let blocks = if rustix::process::geteuid().is_root() { room.f_bfree } else { room.f_bavail };
    Some(blocks.saturating_mul(room.f_frsize))
}

/// Probes the members that are up, all at the same time, until one succeeds: it has to decrypt and sign with the
/// primary keys, and both results are verified.
async fn probe(service: &Service) -> Result<String, String> {
    if let (None, _) | (_, None) = service.registry.keys().primary() {
        return Err("there is no primary encryption or signing certificate".to_owned());
    }
    let mut why = Vec::new();
    let mut asked = JoinSet::new();
    for member in service.cluster.members() {
        // Members that are down have their own probes, and drained members must not serve.
        if member.state != MemberState::Up {
            let error = member.last_error.map(|error| error.text).unwrap_or_default();
            why.push(format!("{}: {} {error}", member.name, member.state));
            continue;
        }
        let cluster = service.cluster.clone();
        asked.spawn(async move {
            match standstill::timeout(PATIENCE, cluster.check(&member.name)).await {
                Ok(Ok(_)) => Ok(member.name),
                Ok(Err(error)) => Err(format!("{}: {error}", member.name)),
                Err(_) => Err(format!("{}: does not answer", member.name)),
            }
        });
    }
    while let Some(answer) = asked.join_next().await {
        match answer {
            Ok(Ok(name)) => {
                // Let the other probes finish, because their results update the members' states.
                asked.detach_all();
                return Ok(name);
            }
            Ok(Err(error)) => why.push(error),
            Err(error) => why.push(error.to_string()),
        }
    }
    // Sort by name, because the members answer in any order.
    why.sort();
    Err(why.join("; "))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    #[tokio::test]
    async fn a_disk_that_hangs_keeps_one_thread_however_often_it_is_asked() {
        let begun = Arc::new(AtomicUsize::new(0));
        let mut look = None;
        let (answer, hangs) = mpsc::channel::<u64>();
        let hangs = Arc::new(std::sync::Mutex::new(hangs));
        let mut ask = async |patience| {
            let (begun, hangs) = (begun.clone(), hangs.clone());
            one_at_a_time(&mut look, patience, move || {
                begun.fetch_add(1, Ordering::SeqCst);
                hangs.lock().unwrap().recv().ok()
            })
            .await
        };
        for _ in 0..5 {
            assert_eq!(ask(Duration::from_millis(5)).await, None);
        }
        answer.send(7).unwrap();
        assert_eq!(ask(Duration::from_secs(60)).await, Some(Some(7)));
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        // After the disk has answered, the next query runs again.
        answer.send(8).unwrap();
        assert_eq!(ask(Duration::from_secs(60)).await, Some(Some(8)));
        assert_eq!(begun.load(Ordering::SeqCst), 2);
    }
}
