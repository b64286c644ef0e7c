//! Checks that replies are correct, on separate threads and after the time was taken.

use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use claviger_process::lock::lock;
use claviger_protocol::metadata::Metadata;
use claviger_protocol::protector::Protector;
use claviger_protocol::request::RollResponse;
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_protocol::verify::{KnownCertificates, verify};

use crate::host;
use crate::prepare::Machine;
use crate::tally::Event;
use crate::units;

/// Largest amount of reply data that may wait for a check, in bytes. Further replies are not checked, and the report
/// says so.
const BACKLOG: usize = 256 * 1024 * 1024;
/// Number of verified certificate signatures that are remembered. All machines belong to one tenant, so their
/// certificates repeat.
const KNOWN: usize = 4096;

/// The selection of replies to check.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Verify {
    /// Every reply.
    All,
    /// A random sample with this share of the replies.
    Sample(f64),
}

impl FromStr for Verify {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("sample:") {
            Some(share) => Ok(Self::Sample(units::share(share)?)),
            None if text == "all" => Ok(Self::All),
            None => Err(format!("{text:?} is not known; write all, or sample:0.1 for a tenth of the replies")),
        }
    }
}

impl std::fmt::Display for Verify {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Sample(share) => write!(f, "sample:{share}"),
        }
    }
}

/// A reply, parsed or not.
pub enum Reply {
    /// The body of a reply with status 200.
    Body(Bytes),
    /// The parsed reply.
    Read(Box<RollResponse>),
}

/// A reply to check, with the data that it must match.
pub struct Job {
    /// The time when its request was due, in seconds from the start of the measured time.
    pub due: f64,
    /// The machine whose protector was sent.
    pub machine: Machine,
    /// The identity key that decrypts the reply.
    pub identity: Arc<RsaPrivateKey>,
    /// The reply.
    pub reply: Reply,
}

impl Job {
    fn size(&self) -> usize {
        match &self.reply {
            Reply::Body(body) => body.len(),
            Reply::Read(response) => response.egress_protector.len(),
        }
    }
}

/// Checks replies on background threads. After this value is dropped, the threads check the queued replies and end.
pub struct Checker {
    which: Verify,
    jobs: Sender<Job>,
    waiting: Arc<AtomicUsize>,
    events: Sender<Event>,
}

impl Checker {
    /// Starts the threads. Each thread sends its results as events.
    ///
    /// # Errors
    /// The system has no threads left.
    pub fn start(
        which: Verify,
        threads: usize,
        guardian: &Metadata,
        events: &Sender<Event>,
    ) -> Result<Self, std::io::Error> {
        let (jobs, queue) = mpsc::channel();
        let queue = Arc::new(Mutex::new(queue));
        let waiting = Arc::new(AtomicUsize::new(0));
        let known = Arc::new((KnownCertificates::new(KNOWN), guardian.guardian.signing_certificate.clone()));
        for _ in 0..threads.max(1) {
            let (queue, waiting, known, events) = (queue.clone(), waiting.clone(), known.clone(), events.clone());
            let work = move || work(&queue, &waiting, &known, &events);
            std::thread::Builder::new().name("checks".to_owned()).spawn(work)?;
        }
        Ok(Self { which, jobs, waiting, events: events.clone() })
    }

    /// `true` if the next reply is selected for a check.
    #[must_use]
    pub(crate) fn draws(&self) -> bool {
        match self.which {
            Verify::All => true,
            Verify::Sample(share) => fastrand::f64() < share,
        }
    }

    /// Queues a reply for a check.
    pub fn check(&self, job: Job) {
        let size = job.size();
        if self.waiting.fetch_add(size, Ordering::Relaxed) > BACKLOG || self.jobs.send(job).is_err() {
            self.waiting.fetch_sub(size, Ordering::Relaxed);
            // Sending fails only when the run is over.
            let _ = self.events.send(Event::Unchecked);
        }
    }
}

fn work(
    queue: &Mutex<Receiver<Job>>,
    waiting: &AtomicUsize,
    known: &(KnownCertificates, Vec<u8>),
    events: &Sender<Event>,
) {
    loop {
        let job = lock(queue).recv();
        let Ok(job) = job else { return };
        waiting.fetch_sub(job.size(), Ordering::Relaxed);
        let event = match check(&job, &known.0, &known.1) {
            Ok(()) => Event::Right,
            Err(problem) => Event::Wrong { due: job.due, problem },
        };
        if events.send(event).is_err() {
            return;
        }
    }
}

/// Checks that the keys can be decrypted, the ingress key belongs to the machine, and the egress protector is complete,
/// has the same guardians, and is signed by the guardian and by the egress key.
fn check(job: &Job, known: &KnownCertificates, guardian: &[u8]) -> Result<(), String> {
    let read;
    let response = match &job.reply {
        Reply::Read(response) => response,
        Reply::Body(body) => {
            read = Box::new(RollResponse::parse(body).map_err(|error| format!("the reply cannot be read: {error}"))?);
            &read
        }
    };
    let keys = host::open(response, &job.identity)?;
    if job.machine.key.as_ref().is_some_and(|key| **key != *keys.ingress) {
        return Err("the ingress key is not this machine's".to_owned());
    }
    let ingress = Protector::parse(&job.machine.protector).map_err(|error| format!("what was sent: {error}"))?;
    if !ingress.transport_key_signature.verify(&keys.ingress, &ingress.signed_octets) {
        return Err("the ingress key is not that of the protector".to_owned());
    }
    let egress =
        Protector::parse(&response.egress_protector).map_err(|error| format!("the egress protector: {error}"))?;
    let egress = verify(egress, known).map_err(|error| format!("the egress protector: {error}"))?.protector;
    if egress.wrappings[egress.guardian].signing_certificate != guardian {
        return Err("the egress protector is not signed by the guardian".to_owned());
    }
    let parties = |protector: &Protector| {
        let party = |w: &claviger_protocol::protector::Wrapping| {
            (w.id, w.signing_certificate.clone(), w.encryption_certificate.clone())
        };
        protector.wrappings.iter().map(party).collect::<Vec<_>>()
    };
    if parties(&egress) != parties(&ingress) {
        return Err("the egress protector is for other parties".to_owned());
    }
    if *keys.egress == *keys.ingress {
        return Err("the egress key is the ingress key".to_owned());
    }
    if !egress.transport_key_signature.verify(&keys.egress, &egress.signed_octets) {
        return Err("the egress key is not that of the egress protector".to_owned());
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn which_replies_are_checked_is_written_plainly() {
        assert_eq!("all".parse::<Verify>().unwrap(), Verify::All);
        assert_eq!("sample:10%".parse::<Verify>().unwrap(), Verify::Sample(0.1));
        assert_eq!(Verify::Sample(0.1).to_string().parse::<Verify>().unwrap(), Verify::Sample(0.1));
        assert!("some".parse::<Verify>().unwrap_err().contains("write all, or sample:0.1"));
        assert!("sample:2".parse::<Verify>().is_err());
    }
}
