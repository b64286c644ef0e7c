//! The daemon under a closed loop of callers: each sends its next request when it has its reply.
//!
//! Callers are cheap, because they use the same processors: requests are made in advance, a caller is a thread with a
//! connection, and replies are decrypted after the measured time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_tests::raw::{Connection, post};
use claviger_tests::{Daemon, Lab, Metrics, ROLL, block, open_release, roll_request};
use hdrhistogram::Histogram;

use crate::cpu;
use crate::histogram::{nanoseconds, record};

/// Time from the start of a round until its count begins, so that all callers are running.
pub const RAMP: Duration = Duration::from_millis(300);
/// One of this many replies is decrypted.
const SAMPLE: usize = 50;

/// A daemon and its requests.
pub struct Service {
    /// The process.
    pub daemon: Daemon,
    address: SocketAddr,
    requests: Arc<[Machine]>,
    identity: Arc<RsaPrivateKey>,
}

/// A virtual machine: the request for its keys, and the expected key.
struct Machine {
    request: Vec<u8>,
    key: [u8; 32],
}

/// Values that the daemon reports. Times are processor time since the start, in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot {
    /// Processor time of the daemon's own process, which makes no PKCS#11 calls.
    pub daemon: f64,
    /// Processor time of the worker processes.
    pub workers: f64,
    /// The workers' processor time within PKCS#11 operations.
    pub pkcs11: f64,
    /// Decryptions and signatures that the HSMs completed, with any result.
    pub operations: f64,
    /// Releases so far.
    pub releases: f64,
    /// Resident memory of daemon and workers, in bytes.
    pub resident: f64,
}

/// The differences between two [`Snapshot`]s; processor time in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    /// Processor time of the daemon.
    pub daemon: f64,
    /// Processor time of the workers outside of PKCS#11 operations.
    pub workers_outside_pkcs11: f64,
    /// Processor time of the workers within PKCS#11 operations.
    pub pkcs11: f64,
    /// Decryptions and signatures.
    pub operations: f64,
    /// Releases.
    pub releases: f64,
}

impl Snapshot {
    /// The difference to an earlier snapshot.
    #[must_use]
    pub fn since(&self, before: &Self) -> Spent {
        let pkcs11 = self.pkcs11 - before.pkcs11;
        Spent {
            daemon: self.daemon - before.daemon,
            workers_outside_pkcs11: self.workers - before.workers - pkcs11,
            pkcs11,
            operations: self.operations - before.operations,
            releases: self.releases - before.releases,
        }
    }
}

impl Spent {
    /// Processor time of daemon and workers together, in seconds.
    #[must_use]
    pub fn processor_time(&self) -> f64 {
        self.daemon + self.workers_outside_pkcs11 + self.pkcs11
    }
}

/// The results of a round.
pub struct Round {
    /// Releases per second, counted by the callers.
    pub per_second: f64,
    /// Time of a release, in nanoseconds.
    pub releases: Histogram<u64>,
    /// Replies that were decrypted and contained the owner's key.
    pub checked: usize,
    /// The daemon's values when the count began.
    pub before: Snapshot,
    /// The daemon's values when the count ended.
    pub after: Snapshot,
}

impl Round {
    /// The differences over the round.
    #[must_use]
    pub fn spent(&self) -> Spent {
        self.after.since(&self.before)
    }
}

impl Service {
    /// Starts the daemon of a lab; its host attests and prepares the requests for all machines.
    #[must_use]
    pub fn start(lab: &Lab) -> Self {
        let daemon = lab.serve();
        block(daemon.until_ready_is(200));
        let health = block(lab.host(daemon.client()).attest()).unwrap();
        let owner = lab.owner();
        let machine = |protector: Vec<u8>| Machine {
            key: *owner.open(&protector).unwrap(),
            request: post(ROLL, "application/xml", &roll_request(&health, &protector)),
        };
        let requests = lab.protectors().into_iter().map(machine).collect();
        Self { address: daemon.address(), requests, identity: lab.identity(), daemon }
    }

    /// Runs `callers` callers for `time`, after a short start.
    ///
    /// # Panics
    /// A request is refused, or a reply is wrong.
    #[must_use]
    pub fn round(&self, callers: usize, time: Duration) -> Round {
        let (counting, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let threads: Vec<_> = (0..callers)
            .map(|caller| {
                let (requests, address) = (self.requests.clone(), self.address);
                let (counting, stop) = (counting.clone(), stop.clone());
                std::thread::spawn(move || call(address, caller, &requests, &counting, &stop))
            })
            .collect();
        std::thread::sleep(RAMP);
        let before = self.snapshot();
        let begun = Instant::now();
        counting.store(true, Ordering::Relaxed);
        std::thread::sleep(time);
        let after = self.snapshot();
        stop.store(true, Ordering::Relaxed);
        let took = begun.elapsed();
        let mut releases = nanoseconds();
        let mut checked = 0;
        for thread in threads {
            let (times, replies) = thread.join().unwrap();
            releases.add(times).unwrap();
            for (at, body) in replies {
                let (keys, _) = open_release(&body, &self.identity).unwrap();
                assert!(*keys.ingress == self.requests[at].key, "a reply gave another machine's key");
                checked += 1;
            }
        }
        Round { per_second: releases.len() as f64 / took.as_secs_f64(), releases, checked, before, after }
    }

    /// The daemon's current values.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        snapshot(&self.daemon)
    }
}

/// The daemon's current values.
///
/// # Panics
/// A metric is missing.
#[must_use]
pub fn snapshot(daemon: &Daemon) -> Snapshot {
    let metrics: Metrics = block(daemon.metrics());
    let workers = cpu::children(daemon.process.pid().as_raw_nonzero().get().unsigned_abs());
    let sum = |name, labels: &[_]| metrics.sum(name, labels).unwrap_or_else(|| panic!("the daemon has no {name}"));
    Snapshot {
        daemon: sum("process_cpu_seconds_total", &[]),
        workers: workers.into_iter().map(cpu::of_process).sum::<Duration>().as_secs_f64(),
        pkcs11: sum("claviger_hsm_cpu_seconds_total", &[]),
        operations: ["decrypt", "sign"].map(|op| sum("claviger_hsm_calls_total", &[("op", op)])).iter().sum(),
        releases: sum("claviger_releases_total", &[("outcome", "success")]),
        resident: sum("process_resident_memory_bytes", &[]) + sum("claviger_hsm_worker_resident_memory_bytes", &[]),
    }
}

type Replies = Vec<(usize, Vec<u8>)>;

fn call(
    address: SocketAddr,
    caller: usize,
    requests: &[Machine],
    counting: &AtomicBool,
    stop: &AtomicBool,
) -> (Histogram<u64>, Replies) {
    let mut connection = Connection::open(address).unwrap();
    let (mut times, mut replies) = (nanoseconds(), Vec::new());
    for (count, at) in (caller..).enumerate() {
        let at = at % requests.len();
        let begun = Instant::now();
        let answer = connection.exchange(&requests[at].request).unwrap();
        let took = begun.elapsed();
        assert!(answer.status == 200, "refused: {} {}", answer.status, answer.text());
        if counting.load(Ordering::Relaxed) && !stop.load(Ordering::Relaxed) {
            record(&mut times, took);
        }
        if count % SAMPLE == 0 {
            replies.push((at, answer.body));
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    (times, replies)
}
