//! Whether the daemon can release keys: some member really decrypts and signs, with the primary keys.

use std::time::{Duration, Instant};

use claviger_hsm::MemberState;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::service::Service;

/// An answer is good for this long; many askers cost the HSMs one probe.
const FRESH: Duration = Duration::from_secs(1);
/// How long one member may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// The last answer.
#[derive(Debug, Default)]
pub struct Readiness {
    last: Mutex<Option<(Instant, Result<String, String>)>>,
}

impl Readiness {
    /// The name of a member that just decrypted and signed, or why none did.
    ///
    /// # Errors
    /// A sentence for a person.
    pub async fn check(&self, service: &Service) -> Result<String, String> {
        // Held over the probe: who asks meanwhile waits for its answer instead of probing too.
        let mut last = self.last.lock().await;
        if let Some((at, answer)) = last.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            let _ = at;
            return answer.clone();
        }
        let answer = probe(service).await;
        *last = Some((Instant::now(), answer.clone()));
        answer
    }
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
            match tokio::time::timeout(PATIENCE, cluster.check(&member.name)).await {
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
