//! Open-loop load: requests start on schedule, whatever happens to earlier ones, as with independent hosts. So a service
//! that stops answering does not get less load meanwhile. Every answer is checked.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use claviger_client::http::{Client, Reply};
use claviger_process::lock::lock;
use claviger_protocol::error::{Code, Refusal};
use claviger_protocol::owner::Owner;
use claviger_protocol::protector::{Protector, TransportKey};
use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_protocol::verify::{self, KnownCertificates};
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};

use crate::daemon::Daemon;
use crate::lab::{Lab, open_release, roll_request};

/// Paths of both versions of a release.
const PATHS: [&str; 2] =
    ["/KeyProtection/service/v1.0/RollTransportKey", "/KeyProtection/service/v2.0/RollTransportKey"];
/// The owner opens the egress protector of one release in this number: decryption in software is expensive.
const OPENED: u64 = 4;

/// Requests of hosts, with the expected answers.
pub struct Traffic {
    requests: Vec<Request>,
    identity: Arc<RsaPrivateKey>,
    owner: Owner,
}

struct Request {
    body: Vec<u8>,
    /// `None` if the request must be refused.
    key: Option<TransportKey>,
}

impl Traffic {
    /// Requests for the lab's virtual machines, in turn.
    ///
    /// # Panics
    /// If the lab has no virtual machines.
    #[must_use]
    pub fn of_vms(lab: &Lab, health: &[u8]) -> Arc<Self> {
        let owner = lab.owner();
        let protectors = lab.protectors();
        assert!(!protectors.is_empty());
        let requests = protectors.iter().map(|protector| {
            let key = Some(owner.open(protector).unwrap());
            Request { body: roll_request(health, protector), key }
        });
        Arc::new(Self { requests: requests.collect(), identity: lab.identity(), owner })
    }

    /// Requests with protectors that must be refused.
    #[must_use]
    pub fn of_bad(lab: &Lab, health: &[u8], protectors: &[Vec<u8>]) -> Arc<Self> {
        let request = |protector: &Vec<u8>| Request { body: roll_request(health, protector), key: None };
        let requests = protectors.iter().map(request).collect();
        Arc::new(Self { requests, identity: lab.identity(), owner: lab.owner() })
    }

    /// Starts to send this number of requests per second to the daemon.
    ///
    /// # Panics
    /// If the daemon uses TLS.
    #[must_use]
    pub fn start(self: &Arc<Self>, daemon: &Daemon, rate: f64, deadline: Duration) -> Load {
        let (stop, samples) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let client = Arc::new(daemon.client().with_timeout(deadline));
        let task = tokio::spawn(drive(Arc::clone(self), client, rate, Arc::clone(&stop), Arc::clone(&samples)));
        Load { stop, samples, task }
    }

    /// Sends requests with this number of callers for this time; each caller repeats as soon as it has an answer. This
    /// measures the capacity.
    ///
    /// # Panics
    /// If the daemon uses TLS.
    pub async fn burst(self: &Arc<Self>, daemon: &Daemon, time: Duration, callers: u64, deadline: Duration) -> Report {
        let client = Arc::new(daemon.client().with_timeout(deadline));
        let begun = Instant::now();
        let mut asking = JoinSet::new();
        for caller in 0..callers {
            let (traffic, client) = (Arc::clone(self), Arc::clone(&client));
            asking.spawn(async move {
                let mut samples = Vec::new();
                while begun.elapsed() < time {
                    let due = Instant::now();
                    let (end, answer) = traffic.ask(&client, caller + callers * samples.len() as u64).await;
                    samples.push(Sample { due, end, answer });
                }
                samples
            });
        }
        Report::of(asking.join_all().await.concat())
    }

    /// Sends one request; returns the time and the judgement of the answer.
    async fn ask(self: &Arc<Self>, client: &Client, number: u64) -> (Instant, Answer) {
        let which = number as usize % self.requests.len();
        let path = PATHS[(number as usize / self.requests.len()) % PATHS.len()];
        let reply = client.post(path, "application/xml", self.requests[which].body.clone()).await;
        let end = Instant::now();
        let reply = match reply {
            Ok(reply) => reply,
            Err(error) => return (end, Answer::Silence(error.to_string())),
        };
        let traffic = Arc::clone(self);
        let judged = spawn_blocking(move || traffic.judge(&reply, which, number.is_multiple_of(OPENED)));
        (end, judged.await.unwrap_or_else(|error| Answer::Wrong(error.to_string())))
    }

    fn judge(&self, reply: &Reply, which: usize, thoroughly: bool) -> Answer {
        match &self.requests[which].key {
            _ if reply.status == 503 => Answer::Refused { retry_after: reply.headers.contains_key("retry-after") },
            Some(key) if reply.status == 200 => match self.check(&reply.body, key, thoroughly) {
                Ok(()) => Answer::Right,
                Err(why) => Answer::Wrong(why),
            },
            None if reply.status == 400 => match Refusal::parse(&reply.body) {
                Ok(refusal) if refusal.code == Code::InvalidProtector => Answer::Right,
                Ok(refusal) => Answer::Wrong(refusal.to_string()),
                Err(error) => Answer::Wrong(error.to_string()),
            },
            _ => Answer::Wrong(format!("{}: {}", reply.status, String::from_utf8_lossy(&reply.body))),
        }
    }

    fn check(&self, body: &[u8], key: &TransportKey, thoroughly: bool) -> Result<(), String> {
        let (keys, egress) = open_release(body, &self.identity)?;
        if keys.ingress != *key {
            return Err("another ingress key".to_owned());
        }
        if keys.egress == *key {
            return Err("the same key twice".to_owned());
        }
        let parsed = Protector::parse(&egress).map_err(|error| error.to_string())?;
        let verified = verify::verify(parsed, &KnownCertificates::default()).map_err(|error| error.to_string())?;
        if !verified.protector.transport_key_signature.verify(&keys.egress, &verified.protector.signed_octets) {
            return Err("the egress key did not sign the egress protector".to_owned());
        }
        if thoroughly && self.owner.open(&egress).map_err(|error| error.to_string())? != keys.egress {
            return Err("the owner finds another egress key".to_owned());
        }
        Ok(())
    }
}

async fn drive(
    traffic: Arc<Traffic>,
    client: Arc<Client>,
    rate: f64,
    stop: Arc<AtomicBool>,
    samples: Arc<Mutex<Vec<Sample>>>,
) {
    let begun = Instant::now();
    let mut asking = JoinSet::new();
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let due = begun + Duration::from_secs_f64(number as f64 / rate);
        tokio::time::sleep_until(due.into()).await;
        let (traffic, client, samples) = (Arc::clone(&traffic), Arc::clone(&client), Arc::clone(&samples));
        asking.spawn(async move {
            let (end, answer) = traffic.ask(&client, number).await;
            lock(&samples).push(Sample { due, end, answer });
        });
        number += 1;
        while asking.try_join_next().is_some() {}
    }
    while asking.join_next().await.is_some() {}
}

/// Judgement of an answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// The expected answer.
    Right,
    /// Status 503.
    Refused {
        /// True if the answer says when to retry.
        retry_after: bool,
    },
    /// No answer within the deadline, or the connection broke.
    Silence(String),
    /// Any other answer, which is always a fault.
    Wrong(String),
}

/// One request and its answer.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Time at which the request was due, even if it was sent later.
    pub due: Instant,
    /// Time at which the answer was complete.
    pub end: Instant,
    /// Judgement of the answer.
    pub answer: Answer,
}

impl Sample {
    /// Returns the time from when the request was due to the answer.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.end.saturating_duration_since(self.due)
    }
}

/// Load that continues until it is stopped.
pub struct Load {
    stop: Arc<AtomicBool>,
    samples: Arc<Mutex<Vec<Sample>>>,
    task: JoinHandle<()>,
}

impl Load {
    /// Returns the answers since the last call.
    #[must_use]
    pub fn take(&self) -> Report {
        Report::of(std::mem::take(&mut *lock(&self.samples)))
    }

    /// Stops the load and waits for the pending answers.
    ///
    /// # Panics
    /// If the sending task panicked.
    pub async fn stop(self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
        Report::of(std::mem::take(&mut *lock(&self.samples)))
    }
}

/// Results of requests, in the order in which they were due.
#[derive(Clone, Debug)]
pub struct Report {
    /// One entry for each request.
    pub samples: Vec<Sample>,
}

impl Report {
    fn of(mut samples: Vec<Sample>) -> Self {
        samples.sort_by_key(|sample| sample.due);
        Self { samples }
    }

    /// Returns the requests due from `at` on, and those due before.
    #[must_use]
    pub fn split(self, at: Instant) -> (Self, Self) {
        let (before, after) = self.samples.into_iter().partition(|sample| sample.due < at);
        (Self { samples: before }, Self { samples: after })
    }

    /// Returns the number of right answers.
    #[must_use]
    pub fn right(&self) -> usize {
        self.samples.iter().filter(|sample| sample.answer == Answer::Right).count()
    }

    /// Returns the answers that are neither right nor a refusal that says when to retry.
    #[must_use]
    pub fn wrong(&self) -> Vec<&Answer> {
        self.answers(|answer| matches!(answer, Answer::Wrong(_)))
    }

    /// Returns the requests without a right answer, except [`wrong`](Self::wrong) ones.
    #[must_use]
    pub fn lost(&self) -> Vec<&Answer> {
        self.answers(|answer| matches!(answer, Answer::Refused { .. } | Answer::Silence(_)))
    }

    fn answers(&self, wanted: impl Fn(&Answer) -> bool) -> Vec<&Answer> {
        self.samples.iter().map(|sample| &sample.answer).filter(|answer| wanted(answer)).collect()
    }

    /// Returns the longest time between two consecutive right answers.
    #[must_use]
    pub fn gap(&self) -> Duration {
        let right = self.samples.iter().filter(|sample| sample.answer == Answer::Right);
        let mut ends: Vec<Instant> = right.map(|sample| sample.end).collect();
        ends.sort_unstable();
        ends.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }

    /// Returns the time within which the share `q` of all requests was answered, with any answer.
    #[must_use]
    pub fn quantile(&self, q: f64) -> Duration {
        let mut times: Vec<Duration> = self.samples.iter().map(Sample::took).collect();
        times.sort_unstable();
        let at = (times.len() as f64 * q) as usize;
        times.get(at.min(times.len().saturating_sub(1))).copied().unwrap_or_default()
    }

    /// Returns a one-line summary.
    #[must_use]
    pub fn line(&self) -> String {
        let (gap, p50, p99) = (self.gap(), self.quantile(0.5), self.quantile(0.99));
        let (all, lost, wrong) = (self.samples.len(), self.lost().len(), self.wrong().len());
        format!("{all} requests, {lost} lost, {wrong} wrong, gap {gap:.0?}, p50 {p50:.0?}, p99 {p99:.0?}")
    }

    /// Asserts that every answer is right.
    ///
    /// # Panics
    /// If one is not.
    pub fn assert_all_right(&self) {
        let (lost, wrong) = (self.lost(), self.wrong());
        let first = self.samples.iter().find(|sample| sample.answer != Answer::Right);
        assert!(lost.is_empty() && wrong.is_empty(), "{}; the first: {first:?}", self.line());
        assert!(!self.samples.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_between_right_answers() {
        let start = Instant::now();
        let ms = |ms| start + Duration::from_millis(ms);
        let refused = Answer::Refused { retry_after: true };
        let sample = |due, end, answer: &Answer| Sample { due: ms(due), end: ms(end), answer: answer.clone() };
        let samples = vec![
            sample(20, 25, &refused),
            sample(0, 10, &Answer::Right),
            sample(10, 100, &Answer::Right),
            sample(30, 31, &Answer::Right),
            sample(40, 41, &Answer::Wrong(String::new())),
        ];
        let report = Report::of(samples);
        assert_eq!(report.gap(), Duration::from_millis(69));
        assert_eq!((report.right(), report.lost(), report.wrong().len()), (3, vec![&refused], 1));
        assert_eq!(report.quantile(0.5), Duration::from_millis(5));
        assert_eq!(report.quantile(1.0), Duration::from_millis(90));
        let (before, after) = report.split(ms(20));
        assert_eq!((before.samples.len(), after.samples.len()), (2, 3));
    }
}
