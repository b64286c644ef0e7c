//! Compares the daemon with the raw token in alternating rounds of one run.

use std::path::PathBuf;
use std::time::Duration;

use claviger::registry::keys::key_ref;
use claviger::store::{Kind, State};
use claviger_protocol::rsa_key::RsaPublicKey;
use claviger_tests::stats::median;
use claviger_tests::{Lab, Options, block, roll_request};
use serde::Serialize;

use crate::histogram::{nanoseconds, seconds};
use crate::machine::{Machine, processors};
use crate::public_op::PublicOperation;
use crate::raw::Work;
use crate::service::{Service, Spent};
use crate::stock::set_stock;

/// Virtual machines of the lab, each with its own protector.
const VMS: usize = 64;

/// The settings of a measurement.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Number of soft tokens.
    pub hsms: usize,
    /// Sessions per token.
    pub sessions: usize,
    /// Duration of a round.
    pub time: Duration,
    /// Rounds of each kind.
    pub rounds: usize,
    /// Length of the guardian's keys.
    pub rsa: u32,
    /// Delay of every token operation, as if the HSM were on a network.
    pub rtt: Duration,
    /// Callers at saturation; `None`: the number from [`callers`].
    pub callers: Option<usize>,
    /// Memory for the daemon's stock of egress protectors, in MiB; 0: none. Daemons without this setting have no stock.
    pub stock_mib: u64,
    /// SoftHSM2's module, or one that creates and finds its tokens in the same way.
    pub module: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            hsms: 1,
            sessions: 4,
            time: Duration::from_secs(3),
            rounds: 5,
            rsa: 2048,
            rtt: Duration::ZERO,
            callers: None,
            stock_mib: 0,
            module: None,
        }
    }
}

/// The median over the rounds, with minimum and maximum.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Figure {
    /// The median.
    pub median: f64,
    /// The minimum.
    pub least: f64,
    /// The maximum.
    pub most: f64,
}

impl Figure {
    /// From the figures of the rounds.
    #[must_use]
    pub fn of(values: &[f64]) -> Self {
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Self { median: median(values), least, most }
    }
}

/// Two percentiles, in seconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Percentiles {
    /// The median.
    pub p50: f64,
    /// The 99th percentile.
    pub p99: f64,
}

/// The results with one caller, and with one session of the raw token.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Light {
    /// Median of a release ÷ (median of a raw decryption + of a raw signature): below 1, because the two run at the
    /// same time.
    pub ratio: Figure,
    /// Median of a release, in seconds.
    pub release_seconds: f64,
    /// Median of a raw decryption, in seconds.
    pub decrypt_seconds: f64,
    /// Median of a raw signature, in seconds.
    pub sign_seconds: f64,
}

/// The results.
#[derive(Clone, Debug, Serialize)]
pub struct Ceiling {
    /// The machine and the date.
    pub machine: Machine,
    /// Number of soft tokens.
    pub hsms: usize,
    /// Sessions per token.
    pub sessions: usize,
    /// Length of the guardian's keys.
    pub rsa: u32,
    /// Delay of every operation, in seconds.
    pub rtt_seconds: f64,
    /// Duration of a round, in seconds.
    pub seconds: f64,
    /// Rounds of each kind.
    pub rounds: usize,
    /// Releases ÷ raw pairs per second at saturation: median over neighbouring rounds. The callers use the same
    /// processors.
    pub ratio: f64,
    /// Its spread.
    pub ratio_spread: Figure,
    /// HSM operations per second, for releases ÷ raw: the same as `ratio` if a release needs two operations.
    pub operations_ratio: f64,
    /// Callers at saturation.
    pub callers: usize,
    /// Memory for the stock of egress protectors, in MiB.
    pub stock_mib: u64,
    /// Processor time within PKCS#11 operations ÷ processor time of the daemon and its workers, at saturation.
    pub efficiency: f64,
    /// The remaining processor time per release ÷ the time of an RSA-2048 operation with a public key.
    pub own_cost_in_public_ops: f64,
    /// Its spread.
    pub own_cost_in_public_ops_spread: Figure,
    /// The time of an RSA-2048 operation with a public key (a verification), in microseconds.
    pub public_op_us: f64,
    /// Processor time of daemon and workers outside of PKCS#11 operations, per release, in microseconds.
    pub own_cost_us: f64,
    /// The daemon's part of it.
    pub daemon_cost_us: f64,
    /// The workers' part of it.
    pub worker_cost_us: f64,
    /// Processor time of the workers within PKCS#11 operations, per release, in microseconds.
    pub pkcs11_cost_us: f64,
    /// Decryptions and signatures that the HSMs made, per release.
    pub hsm_operations_per_release: f64,
    /// Pairs of a decryption and a signature per second by the raw token.
    pub raw_pairs_per_second: f64,
    /// Releases per second by the daemon.
    pub releases_per_second: f64,
    /// A raw pair at saturation.
    pub raw_pair_seconds: Percentiles,
    /// A release at saturation.
    pub release_seconds: Percentiles,
    /// With one caller.
    pub light: Light,
    /// Memory of the daemon and its workers, in bytes.
    pub resident_bytes: f64,
    /// Replies that were decrypted and contained the right keys; a wrong one ends the run.
    pub checked: usize,
}

/// The cost of each release in a round, in seconds of processor time.
struct Cost {
    /// Within PKCS#11 operations ÷ all.
    efficiency: f64,
    /// Outside PKCS#11 operations: the daemon's and the workers'.
    own: f64,
    daemon: f64,
    workers: f64,
    pkcs11: f64,
    /// Decryptions and signatures.
    operations: f64,
    /// Time of an operation with a public key, measured next to the round.
    public_op: f64,
}

impl Cost {
    fn of(spent: &Spent, public_op: f64) -> Self {
        let each = |sum: f64| sum / spent.releases;
        let (daemon, workers, pkcs11) = (each(spent.daemon), each(spent.workers_outside_pkcs11), each(spent.pkcs11));
        let own = daemon + workers;
        let efficiency = pkcs11 / (own + pkcs11);
        Self { efficiency, own, daemon, workers, pkcs11, operations: each(spent.operations), public_op }
    }

    fn in_public_ops(&self) -> f64 {
        self.own / self.public_op
    }
}

/// A lab, and access to its raw tokens.
pub struct Stage {
    /// The lab.
    pub lab: Lab,
    /// The bare loop on the lab's tokens.
    pub work: Work,
}

impl Stage {
    /// Creates a lab and sets the environment variables of its module. Call it while the process has a single thread.
    ///
    /// # Panics
    /// The lab cannot be created.
    #[must_use]
    pub fn set(settings: &Settings) -> Self {
        let options = Options { hsms: settings.hsms, vms: VMS, bits: settings.rsa };
        let lab = Lab::make_with(options, settings.module.as_deref());
        lab.configure(|config| {
            for hsm in &mut config.hsm {
                hsm.sessions = settings.sessions;
            }
        });
        set_stock(&lab, settings.stock_mib);
        if !settings.rtt.is_zero() {
            let delay = format!("call=C_Decrypt,C_Sign delay_ms={}", settings.rtt.as_millis());
            let faulty = lab.behind_faulty_copies();
            lab.config().hsm.iter().for_each(|hsm| faulty.set(&hsm.name, &[&delay]));
        }
        let config = lab.config();
        claviger_hsm::set_env(&config.env);
        let certificates = State::open(&config.server.state).unwrap().certificates().unwrap();
        let of = |kind| certificates.iter().find(|certificate| certificate.kind == kind).unwrap();
        let (encryption, signing) = (of(Kind::Encryption), of(Kind::Signing));
        let public = RsaPublicKey::from_spki_der(&encryption.spki).unwrap();
        let signing_public = RsaPublicKey::from_spki_der(&signing.spki).unwrap();
        let signing = key_ref(&signing.key_id, &signing_public);
        let work = Work::new(&config, key_ref(&encryption.key_id, &public), &public, signing);
        Self { lab, work }
    }

    /// A release request for each virtual machine, from a host that has just attested.
    ///
    /// # Panics
    /// No HSM is up.
    #[must_use]
    pub fn requests(&self) -> Vec<Vec<u8>> {
        let daemon = self.lab.serve();
        block(daemon.until_ready_is(200));
        let health = block(self.lab.host(daemon.client()).attest()).unwrap();
        self.lab.protectors().iter().map(|file| roll_request(&health, file)).collect()
    }
}

/// Number of callers at saturation: those at the tokens, the same number waiting, and some for the processors.
#[must_use]
pub fn callers(sessions: usize) -> usize {
    (2 * sessions).max(8 * processors())
}

/// Runs the measurement; `tell` is called for every round.
///
/// # Panics
/// On any error, because the figures would be useless.
#[must_use]
pub fn run(stage: &Stage, settings: &Settings, mut tell: impl FnMut(&str)) -> Ceiling {
    let service = Service::start(&stage.lab);
    let callers = settings.callers.unwrap_or_else(|| callers(settings.hsms * settings.sessions));
    // Warm up code, connections and caches: the first round of each kind is not counted.
    let _ = service.round(callers, settings.time / 4);
    let public_op = PublicOperation::new();
    let (mut ratios, mut operations, mut lights, mut costs) = (vec![], vec![], vec![], Vec::<Cost>::new());
    let (mut raw_rates, mut rates) = (vec![], vec![]);
    let (mut pairs, mut releases) = (nanoseconds(), nanoseconds());
    let (mut decrypts, mut signs, mut light_releases) = (nanoseconds(), nanoseconds(), nanoseconds());
    let mut checked = 0;
    for round in 1..=settings.rounds {
        let raw = stage.work.round(settings.sessions, settings.time);
        let served = service.round(callers, settings.time);
        let raw_light = stage.work.only_first().round(1, settings.time / 2);
        let light = service.round(1, settings.time / 2);
        ratios.push(served.per_second / raw.per_second);
        raw_rates.push(raw.per_second);
        rates.push(served.per_second);
        costs.push(Cost::of(&served.spent(), public_op.seconds(processors(), settings.time / 10)));
        // A raw pair has two operations.
        operations.push(ratios[round - 1] * costs[round - 1].operations / 2.0);
        let alone = seconds(&raw_light.decrypts, 0.5) + seconds(&raw_light.signs, 0.5);
        lights.push(seconds(&light.releases, 0.5) / alone);
        pairs.add(raw.pairs).unwrap();
        releases.add(served.releases).unwrap();
        decrypts.add(raw_light.decrypts).unwrap();
        signs.add(raw_light.signs).unwrap();
        light_releases.add(light.releases).unwrap();
        checked += served.checked + light.checked;
        tell(&format!(
            "round {round} of {}: raw {:.0} pairs/s, daemon {:.0} releases/s, ratio {:.3}, efficiency {:.3}, own cost {:.0} µs, \
             {:.1} public operations, light {:.2}",
            settings.rounds,
            raw.per_second,
            served.per_second,
            ratios[round - 1],
            costs[round - 1].efficiency,
            costs[round - 1].own * 1e6,
            costs[round - 1].in_public_ops(),
            lights[round - 1]
        ));
    }
    let of = |pick: fn(&Cost) -> f64| Figure::of(&costs.iter().map(pick).collect::<Vec<_>>());
    let own_in_public_ops = of(Cost::in_public_ops);
    Ceiling {
        machine: Machine::here(),
        hsms: settings.hsms,
        sessions: settings.sessions,
        rsa: settings.rsa,
        rtt_seconds: settings.rtt.as_secs_f64(),
        seconds: settings.time.as_secs_f64(),
        rounds: settings.rounds,
        ratio: median(&ratios),
        ratio_spread: Figure::of(&ratios),
        operations_ratio: median(&operations),
        callers,
        stock_mib: settings.stock_mib,
        efficiency: of(|cost| cost.efficiency).median,
        own_cost_in_public_ops: own_in_public_ops.median,
        own_cost_in_public_ops_spread: own_in_public_ops,
        public_op_us: of(|cost| cost.public_op * 1e6).median,
        own_cost_us: of(|cost| cost.own * 1e6).median,
        daemon_cost_us: of(|cost| cost.daemon * 1e6).median,
        worker_cost_us: of(|cost| cost.workers * 1e6).median,
        pkcs11_cost_us: of(|cost| cost.pkcs11 * 1e6).median,
        hsm_operations_per_release: of(|cost| cost.operations).median,
        raw_pairs_per_second: median(&raw_rates),
        releases_per_second: median(&rates),
        raw_pair_seconds: Percentiles { p50: seconds(&pairs, 0.5), p99: seconds(&pairs, 0.99) },
        release_seconds: Percentiles { p50: seconds(&releases, 0.5), p99: seconds(&releases, 0.99) },
        light: Light {
            ratio: Figure::of(&lights),
            release_seconds: seconds(&light_releases, 0.5),
            decrypt_seconds: seconds(&decrypts, 0.5),
            sign_seconds: seconds(&signs, 0.5),
        },
        resident_bytes: service.snapshot().resident,
        checked,
    }
}
