//! Whether the daemon can release keys: some member really decrypts and signs, with the primary keys, and nothing on the way
//! to it refuses every release: the audit trail can be written, connections are taken, and there is memory for requests.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use claviger_hsm::{MemberState, standstill};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::attempt::Attempt;
use crate::server::Blocked;
use crate::service::{Service, request_id};

/// An answer is good for this long; many askers cost the HSMs one probe.
const FRESH: Duration = Duration::from_secs(1);
/// How long one member may take, and the disk of the audit trail.
const PATIENCE: Duration = Duration::from_secs(2);
/// With less room than this on its disk, in bytes, the audit trail is about to be refused.
const LEAST_ROOM: u64 = 64 * 1024;

/// The last answer.
#[derive(Debug, Default)]
pub struct Readiness {
    last: Mutex<Option<(Instant, Result<String, String>)>>,
}

impl Readiness {
    /// The name of a member that just decrypted and signed, or why no release can be done. `blocked` is what is known of the
    /// service's listener.
    ///
    /// # Errors
    /// A sentence for a person.
    pub async fn check(&self, service: &Service, blocked: &Blocked) -> Result<String, String> {
        // Held over the probe: a caller that comes meanwhile waits for its answer instead of probing too.
        let mut last = self.last.lock().await;
        if let Some((at, answer)) = last.as_ref().filter(|(at, _)| standstill::since(*at) < FRESH) {
            let _ = at;
            return answer.clone();
        }
        let (hsms, trail) = tokio::join!(probe(service), probe_trail(service));
        let no_memory = || "there is no memory for the bodies of requests".to_owned();
        let others = [trail.err(), blocked.why().map(str::to_owned), (!service.bodies.has_room()).then(no_memory)];
        let (member, why) = match hsms {
            Ok(member) => (Some(member), None),
            Err(why) => (None, Some(why)),
        };
        let reasons: Vec<String> = why.into_iter().chain(others.into_iter().flatten()).collect();
        let answer = match (member, reasons.as_slice()) {
            (Some(member), []) => Ok(member),
            _ => Err(reasons.join("; ")),
        };
        *last = Some((standstill::now(), answer.clone()));
        answer
    }
}

/// Whether the next line of the audit trail would be written.
async fn probe_trail(service: &Service) -> Result<(), String> {
    if let Some(why) = service.audit.refuses() {
        // Without a release nothing would be written, and nobody sends releases to a daemon that is not ready: so this is
        // tried. Where it succeeds, the trail says that there was a gap.
        let entry = Attempt::new(request_id()).entry("audit.resumed", "success");
        let written = standstill::timeout(PATIENCE, service.record(&entry));
        if !written.await.unwrap_or(false) {
            return Err(why);
        }
    }
    let file = service.config.load().server.audit_file();
    let room = tokio::task::spawn_blocking(move || room_at(file));
    match standstill::timeout(PATIENCE, room).await {
        // Grants have a reserve besides.
        Ok(Ok(Some(room))) if room.saturating_add(service.audit.reserve_left()) < LEAST_ROOM => {
            Err(format!("the disk of the audit trail is full: {room} bytes are free"))
        }
        // Not every file system says how much room it has.
        Ok(_) => Ok(()),
        Err(_) => Err("the disk of the audit trail does not answer".to_owned()),
    }
}

/// How many bytes this process may still write to the file system of `file`, where that is known.
fn room_at(file: PathBuf) -> Option<u64> {
    let file = file.canonicalize().ok()?;
    let metadata = file.metadata().ok()?;
    let room = rustix::fs::statvfs(&file).ok().filter(|room| metadata.is_file() && room.f_blocks > 0)?;
    let blocks = if rustix::process::geteuid().is_root() { room.f_bfree } else { room.f_bavail };
    Some(blocks.saturating_mul(room.f_frsize))
}

/// Asks the members that are up, all at the same time, until one proves that it works: by a decryption and a signature with
/// the primary keys, both checked.
async fn probe(service: &Service) -> Result<String, String> {
    if let (None, _) | (_, None) = service.keys.load().primary() {
        return Err("there is no primary encryption or signing certificate".to_owned());
    }
    let mut why = Vec::new();
    let mut asked = JoinSet::new();
    for member in service.cluster.members() {
        // What is closed is probed as it is due, and what an administrator has drained is not to serve.
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
                // The others go on for themselves: what they find out matters as well.
                asked.detach_all();
                return Ok(name);
            }
            Ok(Err(error)) => why.push(error),
            Err(error) => why.push(error.to_string()),
        }
    }
    // By name, whoever answered first.
    why.sort();
    Err(why.join("; "))
}
