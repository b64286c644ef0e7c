//! A storm: after a power failure, many machines of many owners need their keys at the same time. How long does it take
//! until the last one has them?
//!
//! The result is compared with the raw tokens' time for two operations per machine, a decryption and a signature, in
//! the same run. A daemon with signed egress protectors in stock needs one operation per machine during the storm. So a
//! round has two storms, with the stock full and with the stock off, each with a newly started daemon and hosts that
//! have just attested.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use claviger::config::Release;
use claviger_loadgen::http::Client;
use claviger_loadgen::interrupt::Interrupt;
use claviger_loadgen::prepare::{Machine as VirtualMachine, World};
use claviger_loadgen::profile::{Arrivals, Profile};
use claviger_loadgen::run::{self, Load, Mode, Outcome};
use claviger_loadgen::site::Site;
use claviger_loadgen::verify::Verify;
use claviger_protocol::payload::ApiVersion;
use claviger_tests::{Daemon, Lab, block, metadata};
use serde::Serialize;
use tokio::runtime::Runtime;

use crate::ceiling::{Figure, Percentiles, Settings, Stage};
use crate::machine::Machine;
use crate::owners::{machines, owners};
use crate::service::snapshot;
use crate::stock::{is_stock, set_stock};

/// Time limit of the client for a reply, longer than any deadline of the daemon.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Share of the replies that are decrypted.
const SAMPLE: f64 = 0.02;
/// Lag of the load generator, at its 99th percentile, above which a storm is invalid.
const LAG: Duration = Duration::from_millis(500);
/// The stock counts as full when its metrics have not changed for this time.
const STILL: Duration = Duration::from_secs(3);
/// Time limit for filling the stock.
const FILLING: Duration = Duration::from_secs(600);
/// Counter of items made for the stock.
const STOCK_MADE: &str = "claviger_stock_made_total";

/// The settings of a storm.
#[derive(Clone, Debug)]
pub struct StormSettings {
    /// Machines. Each requests its keys once, and again if it is told to wait.
    pub machines: usize,
    /// Owners of these machines.
    pub owners: usize,
    /// Hosts that send the requests.
    pub hosts: usize,
    /// Time within which all machines send their first request.
    pub within: Duration,
    /// Memory of the stock in MiB.
    pub stock_mib: u64,
}

/// The results.
#[derive(Clone, Debug, Serialize)]
pub struct Storm {
    /// The machine and the date.
    pub machine: Machine,
    /// Number of soft tokens.
    pub hsms: usize,
    /// Sessions per token.
    pub sessions: usize,
    /// Delay of every operation, in seconds.
    pub rtt_seconds: f64,
    /// Virtual machines.
    pub machines: usize,
    /// Their owners.
    pub owners: usize,
    /// Hosts that sent the requests.
    pub hosts: usize,
    /// Time within which all machines sent their first request, in seconds.
    pub within_seconds: f64,
    /// Rounds.
    pub rounds: usize,
    /// Pairs of a decryption and a signature per second by the raw tokens.
    pub raw_pairs_per_second: Figure,
    /// Time of the raw tokens for a pair per machine, in seconds.
    pub bound_seconds: Figure,
    /// Whether the daemon has a stock. If not, all storms count as storms with an empty stock.
    pub has_stock: bool,
    /// With a full stock.
    pub full: Option<Phase>,
    /// With the stock off.
    pub empty: Phase,
}

/// The storms of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    /// Time from the first request to the last machine's keys, in seconds.
    pub to_last_seconds: Figure,
    /// This time ÷ the bound of the same round.
    pub of_bound: Figure,
    /// Time from a machine's first request to its keys, in seconds, over all rounds.
    pub wait_seconds: Percentiles,
    /// Decryptions and signatures of the HSMs during the storm, per release.
    pub hsm_operations_per_release: Figure,
    /// Replies that told a machine to wait, in all rounds.
    pub refused: u64,
    /// Machines that got no keys, in all rounds.
    pub lost: u64,
    /// The last replies to these machines, with their numbers.
    pub errors: BTreeMap<String, u64>,
    /// Replies that were decrypted and contained the owner's key; a wrong one ends the run.
    pub checked: u64,
    /// The metrics of the daemon's stock before and after the last storm.
    pub stock: BTreeMap<String, BeforeAfter>,
    /// Why storms are invalid: the load generator was too slow. Empty if they are valid.
    pub invalid: Vec<String>,
}

/// The values of a metric.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BeforeAfter {
    /// Before a storm.
    pub before: f64,
    /// After the storm.
    pub after: f64,
}

/// One storm.
struct One {
    to_last: f64,
    waits: hdrhistogram::Histogram<u64>,
    operations_per_release: f64,
    refused: u64,
    errors: BTreeMap<String, u64>,
    lost: u64,
    checked: u64,
    stock: BTreeMap<String, BeforeAfter>,
    invalid: Vec<String>,
}

/// Runs the measurement; `tell` is called for every step.
///
/// # Panics
/// On any error, because the figures would be useless.
#[must_use]
pub fn run(stage: &Stage, settings: &Settings, storm: &StormSettings, mut tell: impl FnMut(&str)) -> Storm {
    claviger::sys::process::raise_open_files().unwrap();
    let lab = &stage.lab;
    lab.configure(|config| {
        config.release.deadline_ms = Release::default().deadline_ms;
        // Every machine has its own connection, and all come from one address.
        config.server.max_connections = storm.machines + 64;
        config.server.max_connections_per_address = 0;
    });
    let has_stock = set_stock(lab, storm.stock_mib);
    tell(&format!("making {} owners and {} protectors", storm.owners, storm.machines));
    let owners = owners(storm.owners);
    let guardian = {
        let daemon = lab.serve();
        block(daemon.until_ready_is(200));
        block(metadata(&daemon.client()))
    };
    let machines = machines(&owners, &guardian, storm.machines);
    let site = Site::lab(lab.path()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let scene = Scene { lab, site, runtime, storm, machines };
    if has_stock {
        scene.show_owners();
    }
    let (mut full, mut empty) = (Vec::new(), Vec::new());
    let (mut rates, mut bounds) = (Vec::new(), Vec::new());
    for round in 1..=settings.rounds {
        let raw = stage.work.round(settings.sessions, settings.time);
        let bound = storm.machines as f64 / raw.per_second;
        rates.push(raw.per_second);
        bounds.push(bound);
        let mut one = |filled: bool, storms: &mut Vec<One>| {
            if has_stock {
                set_stock(lab, if filled { storm.stock_mib } else { 0 });
            }
            let one = scene.storm(filled);
            tell(&format!(
                "round {round} of {}, {}: {:.2} s to the last machine, {:.2} of the bound of {bound:.2} s, {:.3} HSM \
                 operations a release, {} times told to come later, {} lost",
                settings.rounds,
                if filled { "stock full" } else { "no stock" },
                one.to_last,
                one.to_last / bound,
                one.operations_per_release,
                one.refused,
                one.lost
            ));
            storms.push(one);
        };
        if has_stock {
            one(true, &mut full);
        }
        one(false, &mut empty);
    }
    Storm {
        machine: Machine::here(),
        hsms: settings.hsms,
        sessions: settings.sessions,
        rtt_seconds: settings.rtt.as_secs_f64(),
        machines: storm.machines,
        owners: storm.owners,
        hosts: storm.hosts,
        within_seconds: storm.within.as_secs_f64(),
        rounds: settings.rounds,
        raw_pairs_per_second: Figure::of(&rates),
        bound_seconds: Figure::of(&bounds),
        has_stock,
        full: has_stock.then(|| Phase::of(full, &bounds)),
        empty: Phase::of(empty, &bounds),
    }
}

impl Phase {
    fn of(storms: Vec<One>, bounds: &[f64]) -> Self {
        let figure = |pick: fn(&One) -> f64| Figure::of(&storms.iter().map(pick).collect::<Vec<_>>());
        let of_bound: Vec<_> = storms.iter().zip(bounds).map(|(one, bound)| one.to_last / bound).collect();
        let mut waits = hdrhistogram::Histogram::<u64>::new(3).unwrap();
        let mut errors = BTreeMap::new();
        for one in &storms {
            waits.add(&one.waits).unwrap();
            for (code, count) in &one.errors {
                *errors.entry(code.clone()).or_insert(0) += count;
            }
        }
        let microseconds = |quantile| waits.value_at_quantile(quantile) as f64 / 1e6;
        Self {
            to_last_seconds: figure(|one| one.to_last),
            of_bound: Figure::of(&of_bound),
            wait_seconds: Percentiles { p50: microseconds(0.5), p99: microseconds(0.99) },
            hsm_operations_per_release: figure(|one| one.operations_per_release),
            refused: storms.iter().map(|one| one.refused).sum(),
            lost: storms.iter().map(|one| one.lost).sum(),
            errors,
            checked: storms.iter().map(|one| one.checked).sum(),
            stock: storms.last().map(|one| one.stock.clone()).unwrap_or_default(),
            invalid: storms.iter().flat_map(|one| one.invalid.clone()).collect(),
        }
    }
}

/// The common state of all storms.
struct Scene<'a> {
    lab: &'a Lab,
    site: Site,
    runtime: Runtime,
    storm: &'a StormSettings,
    machines: Vec<VirtualMachine>,
}

impl Scene<'_> {
    /// Lets the daemon serve some machines of each owner, and stops it, so that it knows which wrapping sets are worth
    /// stocking.
    fn show_owners(&self) {
        let daemon = self.serve();
        let mut world = self.world(&daemon);
        world.machines.truncate(3 * self.storm.owners);
        let machines = world.machines.len();
        let told = self.load(&daemon, &world, machines, Duration::from_secs(1)).tally;
        assert_eq!(
            told.achieved, machines as u64,
            "not all of the owners' first machines got their keys: {:?}",
            told.errors
        );
        assert!(daemon.stop().success(), "the daemon ended with an error");
    }

    fn serve(&self) -> Daemon {
        let daemon = self.lab.serve();
        block(daemon.until_ready_is(200));
        daemon
    }

    /// Hosts that have just attested, and all machines.
    fn world(&self, daemon: &Daemon) -> World {
        let client = client(daemon);
        let hosts = self.storm.hosts;
        let world = self.runtime.block_on(World::prepare(&client, &self.site, hosts, false, 1)).unwrap();
        World { machines: self.machines.clone(), ..world }
    }

    /// Runs a storm of `machines` machines.
    fn load(&self, daemon: &Daemon, world: &World, machines: usize, within: Duration) -> Outcome {
        let load = Load {
            mode: Mode::Open(Profile::Storm { machines, within }),
            arrivals: Arrivals::Even,
            warmup: Duration::ZERO,
            in_flight: machines,
            batch: None,
            api: ApiVersion::V2,
            roll: false,
            verify: Verify::Sample(SAMPLE),
            max_lag: LAG,
            handicap: Duration::ZERO,
            show: false,
            stop: Vec::new(),
        };
        let outcome = self.runtime.block_on(run::run(client(daemon), world, load, &Interrupt::default())).unwrap();
        let wrong = &outcome.tally.first_wrong;
        assert!(outcome.tally.wrong == 0, "a reply is wrong: {wrong:?}");
        outcome
    }

    fn storm(&self, filled: bool) -> One {
        let daemon = self.serve();
        let world = self.world(&daemon);
        if filled {
            until_still(&daemon);
        }
        let before = (snapshot(&daemon), stock(&daemon));
        let outcome = self.load(&daemon, &world, self.storm.machines, self.storm.within);
        let after = (snapshot(&daemon), stock(&daemon));
        let spent = after.0.since(&before.0);
        // Signatures for the stock during the storm serve later releases.
        let made = |stock: &BTreeMap<String, f64>| stock.get(STOCK_MADE).copied().unwrap_or_default();
        let operations = spent.operations - (made(&after.1) - made(&before.1));
        let tally = outcome.tally;
        assert!(daemon.stop().success(), "the daemon ended with an error");
        One {
            to_last: tally.last,
            operations_per_release: operations / spent.releases,
            refused: tally.retries.values().sum(),
            lost: tally.offered - tally.achieved,
            errors: tally.errors,
            checked: tally.right,
            waits: tally.latency,
            stock: after
                .1
                .into_iter()
                .map(|(name, after)| {
                    let before = before.1.get(&name).copied().unwrap_or_default();
                    (name, BeforeAfter { before, after })
                })
                .collect(),
            invalid: outcome.invalid,
        }
    }
}

fn client(daemon: &Daemon) -> Arc<Client> {
    Arc::new(Client::new(&daemon.url).unwrap().with_timeout(TIMEOUT))
}

/// The metrics of the daemon's stock, without their labels.
fn stock(daemon: &Daemon) -> BTreeMap<String, f64> {
    let metrics = block(daemon.metrics());
    let names: Vec<_> = metrics.names().filter(|name| is_stock(name)).map(str::to_owned).collect();
    names.into_iter().map(|name| (name.clone(), metrics.sum(&name, &[]).unwrap_or_default())).collect()
}

/// Waits until the metrics of the stock no longer change.
fn until_still(daemon: &Daemon) {
    let begun = Instant::now();
    let (mut seen, mut since) = (stock(daemon), Instant::now());
    while since.elapsed() < STILL {
        assert!(begun.elapsed() < FILLING, "the stock is never full: {seen:?}");
        std::thread::sleep(Duration::from_millis(200));
        let now = stock(daemon);
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
    }
}
