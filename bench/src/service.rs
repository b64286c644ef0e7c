//! The daemon, under a closed loop of callers: each asks again as soon as it has its answer.
//!
//! Callers are cheap on purpose, since they take their time from the same processors: requests are made beforehand, a caller
//! is a thread with a connection, and replies are opened after the clock has stopped.

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

/// From a round's begin to the begin of its count: for everybody to be there.
pub const RAMP: Duration = Duration::from_millis(300);
/// One reply of so many is opened.
const SAMPLE: usize = 50;

/// A daemon, and what to ask it.
pub struct Service {
    /// The process.
    pub daemon: Daemon,
    address: SocketAddr,
    requests: Arc<[Machine]>,
    identity: Arc<RsaPrivateKey>,
}

/// A virtual machine: the request for its keys, and the key that the reply has to give.
struct Machine {
    request: Vec<u8>,
    key: [u8; 32],
}

/// What the daemon says of itself. Times are processor time since the start, in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot {
    /// Of the daemon's own process, which makes no PKCS#11 call.
    pub daemon: f64,
    /// Of the worker processes.
    pub workers: f64,
    /// Of the workers' time, within PKCS#11 operations.
    pub pkcs11: f64,
    /// Decryptions and signatures that the HSMs answered, in whatever way.
    pub operations: f64,
    /// Releases so far.
    pub releases: f64,
    /// Resident memory of daemon and workers, in bytes.
    pub resident: f64,
}

/// What was spent between two [`Snapshot`]s: processor time in seconds, and what for.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    /// By the daemon.
    pub daemon: f64,
    /// By the workers, outside of PKCS#11 operations.
    pub workers_outside_pkcs11: f64,
    /// By the workers, within PKCS#11 operations.
    pub pkcs11: f64,
    /// Decryptions and signatures.
    pub operations: f64,
    /// Releases.
    pub releases: f64,
}

impl Snapshot {
    /// What was spent since an earlier snapshot.
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
    /// Of daemon and workers together, in seconds.
    #[must_use]
    pub fn processor_time(&self) -> f64 {
        self.daemon + self.workers_outside_pkcs11 + self.pkcs11
    }
}

/// What a round came to.
pub struct Round {
    /// Releases in a second, as the callers count them.
    pub per_second: f64,
    /// How long a release took, in nanoseconds.
    pub releases: Histogram<u64>,
    /// Replies that were opened and held the owner's key.
    pub checked: usize,
    /// What the daemon said when the count began.
    pub before: Snapshot,
    /// What it said when it ended.
    pub after: Snapshot,
}

impl Round {
    /// What was spent while it counted.
    #[must_use]
    pub fn spent(&self) -> Spent {
        self.after.since(&self.before)
    }
}

impl Service {
    /// Serves a lab; its host attests and gets ready to ask for every machine's keys.
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

    /// `callers` of them for as long as `time`, after a moment for all to begin.
    ///
    /// # Panics
    /// When a request is refused, or a reply is wrong.
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

    /// What the daemon says of itself now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        snapshot(&self.daemon)
    }
}

/// What a daemon says of itself now.
///
/// # Panics
/// When a series is missing.
#[must_use]
pub fn snapshot(daemon: &Daemon) -> Snapshot {
    let metrics: Metrics = block(daemon.metrics());
    let workers = cpu::children(daemon.process.pid().as_raw_nonzero().get().unsigned_abs());
    let sum = |name, labels: &[_]| metrics.sum(name, labels).unwrap_or_else(|| panic!("the daemon has no {name}"));
    Snapshot {
        daemon: sum("process_cpu_seconds_total", &[]),
        workers: workers.into_iter().map(cpu::seconds).sum(),
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
