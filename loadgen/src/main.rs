//! The command line of `claviger-loadgen`: run, attest, compare, capacity, plan and prepare.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::ArgPredicate;
use clap::{ArgGroup, Args, CommandFactory, Parser, Subcommand, ValueEnum};
use claviger_loadgen::about::{About, Member};
use claviger_loadgen::attest::{self, Storm};
use claviger_loadgen::capacity::{self, Question};
use claviger_loadgen::compare::Verdict;
use claviger_loadgen::http::{Client, TlsSettings, client};
use claviger_loadgen::interrupt::{self, Interrupt};
use claviger_loadgen::plan::{self, Hosts};
use claviger_loadgen::prepare::World;
use claviger_loadgen::profile::{Arrivals, Profile};
use claviger_loadgen::report::{self, Report};
use claviger_loadgen::run::{Load, Mode};
use claviger_loadgen::scrape::Look;
use claviger_loadgen::simulation::Model;
use claviger_loadgen::site::Site;
use claviger_loadgen::threshold::{self, Threshold};
use claviger_loadgen::units;
use claviger_loadgen::verify::Verify;
use claviger_loadgen::{Failure, compare, host, html, prepare, print, run};
use claviger_process::manual::Shell;
use claviger_process::threads::Processors;
use claviger_process::{arguments, manual, output, signals, threads};
use claviger_protocol::payload::ApiVersion;
use claviger_protocol::pem;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Exit status: a threshold failed.
const THRESHOLD_FAILED: u8 = 99;
/// Exit status: the load generator itself was too slow.
const INVALID: u8 = 98;
/// Exit status: a reply was wrong.
const WRONG: u8 = 97;

/// Plays guarded hosts to a key-release service: how many keys, how fast, and what it would take
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Start here:\n  claviger demo --dir target/lab &\n  \
    claviger-loadgen run --url http://127.0.0.1:8080 --lab target/lab --profile 10s@100\n\
    Exit status: 0 good, 1 could not be done, 2 usage, 97 a reply was wrong, 98 invalid (the generator was too slow, or \
    had too few files or ports), 99 a threshold failed, 130 interrupted: what was measured until then is reported."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the script with which a shell completes commands and options
    #[command(after_help = "Example: claviger-loadgen completions bash >/etc/bash_completion.d/claviger-loadgen")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual pages and the completions of all shells; for packages
    #[command(hide = true)]
    Manual {
        /// Folder for `man` and `completions`
        dir: PathBuf,
    },
    /// Make load, and tell how the service bore it
    #[command(after_help = "Examples:\n  \
        claviger-loadgen run --url http://127.0.0.1:8080 --lab target/lab --profile 10s@100,30s@100..500 --html run.html\n  \
        claviger-loadgen run --url http://127.0.0.1:8080 --lab target/lab --profile storm:10000/60s --hosts 100\n  \
        claviger-loadgen run --url http://127.0.0.1:8080 --lab target/lab --closed 16 --duration 10s --threshold 'p99<50ms'\n  \
        claviger-loadgen run --url https://hgs.example --ca ca.pem --tenant acme --host host --profile 1m@50 --stop-on 'errors<5%'\n\
        Latency counts from when a request was due, service time from when it was sent. docs/load.md explains.")]
    Run(Box<RunArguments>),
    /// Have hosts attest, each once, and tell how the service and its HSMs bore it
    #[command(
        after_help = "Example: claviger-loadgen attest --url http://127.0.0.1:8080 --lab target/lab --hosts 1000 --tpm"
    )]
    Attest(Box<AttestArguments>),
    /// Hold two results of `run --json` against each other: what differs, and what is noise
    #[command(
        after_help = "Example: claviger-loadgen compare before.json after.json --fail-on worse --html compare.html\n\
        The bounds come from the runs' own seconds: longer runs tell smaller differences."
    )]
    Compare(CompareArguments),
    /// Find out how much a running service carries, and what limits it
    #[command(after_help = "Example: claviger-loadgen capacity --url http://127.0.0.1:8080 --lab target/lab \
        --slo 'p99<100ms,errors<0.1%' --html capacity.html\n\
        It takes about 15 steps, and a few longer ones to make sure. The load generator needs processors of its own.")]
    Capacity(Box<CapacityArguments>),
    /// Estimate what a cluster would carry, without a server: the daemon's own policies in simulated time
    #[command(
        after_help = "Example: claviger-loadgen plan --hsm-rate 1100 --rtt 1ms --hsms 4 --sessions 8 --target 3000/s \
        --slo 'p99<100ms' --html plan.html\n\
        The rate of an HSM is that of its data sheet: private-key operations a second, for the length of your keys. A release \
        takes two."
    )]
    Plan(PlanArguments),
    /// Make ahead what a run against a service will need: protectors, and hosts for its administrator to register
    #[command(
        after_help = "Example: claviger-loadgen prepare --url https://hgs.example --ca ca.pem --tenant acme --hosts 20 --out hosts\n\
        Then, where the service runs: claviger hosts add loadgen-0001 --public-key hosts/loadgen-0001.pub.pem …, as it says.\n\
        Then: claviger-loadgen run --url https://hgs.example --ca ca.pem --tenant acme --hosts 20 --profile 1m@50"
    )]
    Prepare(PrepareArguments),
}

#[derive(Debug, Args)]
struct CompareArguments {
    /// The first run
    before: PathBuf,
    /// The second run
    after: PathBuf,
    /// Exit status 99 when a value is significantly worse, 98 when a run is invalid
    #[arg(long, value_name = "WHAT")]
    fail_on: Option<FailOn>,
    /// Title of the page
    #[arg(long, value_name = "TEXT")]
    title: Option<String>,
    /// Write a page with charts (HTML)
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print JSON for programs
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum FailOn {
    /// Any measure is worse beyond noise
    Worse,
}

#[derive(Debug, Args)]
struct PrepareArguments {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    parties: Parties,
    /// Hosts to make
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    hosts: u32,
    /// Virtual machines to make protectors for
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    vms: u32,
    /// Folder for the hosts' public keys
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// How many hosts a rate is good for.
#[derive(Debug, Args)]
struct Assumption {
    /// Releases of a host in a day, to say how many hosts a rate is good for
    #[arg(long, value_name = "N", default_value = "200", value_parser = units::rate)]
    releases_per_day: f64,
    /// How much more than the mean the busiest minute asks for
    #[arg(long, value_name = "FACTOR", default_value = "10", value_parser = units::rate)]
    peak: f64,
}

impl Assumption {
    fn hosts(&self) -> Hosts {
        Hosts { releases_a_day: self.releases_per_day, peak: self.peak }
    }
}

#[derive(Debug, Args)]
struct CapacityArguments {
    #[command(flatten)]
    target: Target,
    /// What has to hold
    #[arg(long, value_name = "CONDITIONS", default_value = "p99<100ms,errors<0.1%")]
    slo: Objectives,
    /// HSMs of the service; asked of it when left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    hsms: Option<u16>,
    /// How long each step is
    #[arg(long, value_name = "TIME", default_value = "4s", value_parser = units::duration)]
    step: Duration,
    #[command(flatten)]
    shape: Shape,
    #[command(flatten)]
    assumption: Assumption,
    /// Write the whole result as JSON; - is the standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with charts (HTML)
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct AttestArguments {
    #[command(flatten)]
    target: Target,
    /// Hosts; more than one, and all with --tpm, are made and registered through the daemon's admin socket, and kept for the
    /// next run
    #[arg(long, value_name = "N", default_value_t = 1000, default_value_if("host", ArgPredicate::IsPresent, "1"),
        conflicts_with = "host", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    hosts: u32,
    /// Attestations at a time
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    at_a_time: u16,
    /// Print JSON for programs
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct PlanArguments {
    /// Private-key operations that one HSM does in a second at most
    #[arg(long, value_name = "RATE", value_parser = units::rate)]
    hsm_rate: f64,
    /// What one operation takes inside an idle HSM; by default an HSM does one at a time
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    op_time: Option<Duration>,
    /// Network round trip to an HSM
    #[arg(long, value_name = "TIME", default_value = "1ms", value_parser = units::duration)]
    rtt: Duration,
    /// HSMs
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    hsms: u16,
    /// Sessions of each
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    sessions: u16,
    /// Releases a second that are wanted
    #[arg(long, value_name = "RATE", value_parser = units::rate)]
    target: Option<f64>,
    /// What has to hold
    #[arg(long, value_name = "CONDITIONS", default_value = "p99<100ms,errors<0.1%")]
    slo: Objectives,
    /// Processor time of the daemon for one release; left out by default
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = units::duration)]
    own_cost: Duration,
    /// Processors of the daemon
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    processors: u16,
    /// Without effect: simulated sessions take one operation at a time
    #[arg(long, hide = true, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
    /// The daemon's release.queue
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    queue: u32,
    /// The daemon's release.deadline_ms
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = units::duration)]
    deadline: Duration,
    #[command(flatten)]
    assumption: Assumption,
    /// Title of the page
    #[arg(long, value_name = "TEXT")]
    title: Option<String>,
    /// Write a page with charts (HTML)
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print JSON for programs
    #[arg(long)]
    json: bool,
}

/// A list of conditions, separated by commas.
#[derive(Clone, Debug)]
struct Objectives(Vec<Threshold>);

impl FromStr for Objectives {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        threshold::objectives(text).map(Self)
    }
}

/// Where the service is.
#[derive(Debug, Args)]
struct Connection {
    /// The service
    #[arg(long, value_name = "URL")]
    url: String,
    /// How the service proves itself, and the hosts to it.
    #[command(flatten)]
    tls: TlsSettings,
    /// How long a request may take
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    timeout: Duration,
}

impl Connection {
    fn client(&self) -> Result<Arc<Client>, Failure> {
        Ok(Arc::new(client(&self.url, &self.tls, self.timeout)?))
    }
}

/// Whose hosts and machines.
#[derive(Debug, Args)]
#[group(skip)]
#[command(group = ArgGroup::new("whose").required(true).args(["lab", "tenant"]))]
struct Parties {
    /// Folder of the lab that the service serves, as `claviger demo` made it
    #[arg(long, value_name = "DIR", conflicts_with_all = ["tenant", "host", "socket", "cache"])]
    lab: Option<PathBuf>,
    /// Folder of the owner of the machines, as `claviger guardian new` made it
    #[arg(long, value_name = "DIR")]
    tenant: Option<PathBuf>,
    /// Folder of a host that is registered, as `claviger host new-key` made it; without it, hosts of `prepare` ask
    #[arg(long, value_name = "DIR", requires = "tenant")]
    host: Option<PathBuf>,
    /// The daemon's admin.sock, where it runs here: hosts are registered, and HSMs looked at
    #[arg(long, value_name = "FILE", requires = "tenant")]
    socket: Option<PathBuf>,
    /// Where keys and protectors are kept for the next run; by default `loadgen` in the tenant's folder
    #[arg(long, value_name = "DIR", requires = "tenant")]
    cache: Option<PathBuf>,
    /// Hosts attest by TPMs in software instead of host keys; the daemon has to be in TPM mode
    #[arg(long, conflicts_with = "host")]
    tpm: bool,
}

impl Parties {
    fn site(&self) -> Result<Site, Failure> {
        match (&self.lab, &self.tenant) {
            (Some(lab), _) => Site::lab(lab),
            (None, Some(tenant)) => {
                Ok(Site::of(tenant, self.host.as_deref(), self.socket.as_deref(), self.cache.as_deref()))
            }
            (None, None) => Err("say whose machines: --lab DIR, or --tenant DIR".into()),
        }
    }
}

/// The service that is tested.
#[derive(Debug, Args)]
struct Target {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    parties: Parties,
    /// The daemon's metrics address, such as http://127.0.0.1:9464; by default the lab's
    #[arg(long, value_name = "URL")]
    metrics: Option<String>,
    /// What the result is called
    #[arg(long, value_name = "TEXT")]
    title: Option<String>,
}

impl Target {
    /// The client of the daemon's metrics address: the given address, or the one in the lab's configuration if it
    /// answers.
    async fn metrics(&self, site: &Site) -> Result<Option<Client>, Failure> {
        let client = |url: &str| client(url, &TlsSettings::default(), self.connection.timeout);
        if let Some(url) = &self.metrics {
            let client = client(url)?;
            Look::take(&client).await?;
            return Ok(Some(client));
        }
        let Some(client) = site.metrics().map(client).transpose()? else { return Ok(None) };
        // A page without a version is not that of a daemon.
        let told = Look::take(&client).await.is_ok_and(|look| look.version.is_some());
        Ok(told.then_some(client))
    }

    async fn about(&self, site: &Site, metrics: Option<&Client>) -> About {
        let daemon = match metrics {
            Some(metrics) => Look::take(metrics).await.ok().and_then(|look| look.version),
            None => None,
        };
        let hsms = site.admin().and_then(|mut admin| admin.hsms()).ok();
        About {
            daemon,
            daemon_is_here: hsms.as_ref().map(|_| true),
            hsms: hsms.iter().flatten().map(Member::from).collect(),
            ..About::this_call(self.title.as_deref())
        }
    }
}

/// What requests are made of.
#[derive(Debug, Args)]
struct Shape {
    /// Hosts; more than one, and all with --tpm, are made and registered through the daemon's admin socket, and kept for the
    /// next run
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "host",
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    hosts: u32,
    /// Virtual machines, each with its protector; made before the clock starts, and kept. A storm has as many as it says
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    vms: u32,
    /// Each release feeds the machine's next one with its egress protector
    #[arg(long)]
    roll: bool,
    /// Releases in one request (RollTransportKeys); rates still count releases
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    batch: Option<u16>,
    /// Version of the interface
    #[arg(long, value_name = "VERSION", default_value = "v2.0", value_parser = api)]
    api: ApiVersion,
    /// Which replies to check: all, or sample:P
    #[arg(long, value_name = "WHICH", default_value = "sample:0.1")]
    verify: Verify,
    /// Most requests in flight; what is due beyond that is dropped, and counted
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    in_flight: u32,
    /// Bound of the generator's own lag (p99); a run beyond it is invalid
    #[arg(long, value_name = "TIME", default_value = "10ms", value_parser = units::duration)]
    max_lag: Duration,
    /// How releases of a rate follow each other; by default evenly in `run`, and at random in `capacity`, as in `plan`
    #[arg(long, value_name = "HOW")]
    arrivals: Option<Arrivals>,
    /// Load before the measured time, not counted; storms have none
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = units::duration)]
    warmup: Duration,
    /// Slow the generator down before each request, to see whether it notices
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = units::duration, hide = true)]
    handicap: Duration,
}

impl Shape {
    fn load(&self, mode: Mode, arrivals: Arrivals) -> Load {
        Load {
            mode,
            arrivals: self.arrivals.unwrap_or(arrivals),
            warmup: self.warmup,
            in_flight: self.in_flight as usize,
            batch: self.batch.map(usize::from),
            api: self.api,
            roll: self.roll,
            verify: self.verify,
            max_lag: self.max_lag,
            handicap: self.handicap,
            show: true,
            stop: Vec::new(),
        }
    }

    /// Number of virtual machines that this load needs.
    ///
    /// # Errors
    /// The virtual machines are too few for the load.
    fn machines(&self, mode: &Mode) -> Result<usize, Failure> {
        let batch = self.batch.map_or(1, usize::from);
        let machines = match mode {
            Mode::Open(Profile::Storm { machines, .. }) => *machines,
            _ => self.vms as usize,
        };
        let needed = match mode {
            Mode::Closed { callers, .. } if self.roll => callers * batch,
            _ if self.roll => batch,
            _ => 1,
        };
        if machines < needed {
            return Err(
                format!("with --roll a machine is asked for once at a time: give --vms {needed} or more").into()
            );
        }
        if matches!(mode, Mode::Open(Profile::Storm { .. })) && (self.roll || batch > 1) {
            return Err("a storm asks for each machine once: leave out --roll and --batch".into());
        }
        Ok(machines)
    }
}

#[derive(Debug, Args)]
struct RunArguments {
    #[command(flatten)]
    target: Target,
    /// When releases are due: TIME@RATE or TIME@FROM..TO, with commas between; or storm:MACHINES/TIME
    #[arg(long, value_name = "PROFILE", required_unless_present = "closed")]
    profile: Option<Profile>,
    /// So many callers instead, each of which asks again when it has its answer
    #[arg(long, value_name = "N", conflicts_with = "profile", requires = "duration",
        value_parser = clap::value_parser!(u32).range(1..=60_000))]
    closed: Option<u32>,
    /// How long, for --closed
    #[arg(long, value_name = "TIME", requires = "closed", value_parser = units::duration)]
    duration: Option<Duration>,
    #[command(flatten)]
    shape: Shape,
    /// Condition on the result; exit status 99 when one fails. May be given several times
    #[arg(long, value_name = "CONDITION")]
    threshold: Vec<Threshold>,
    /// Condition that ends the run when it fails by what was measured until then, from the sixth second on; exit status 99
    #[arg(long, value_name = "CONDITION", value_parser = threshold::stopping)]
    stop_on: Vec<Threshold>,
    /// Write the whole result as JSON; - is the standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the timeline, a line for each second: wall-clock time, counts, latency, service time, errors by code
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write the histograms of latency, one for each second (HDR log V2)
    #[arg(long, value_name = "FILE")]
    hdr: Option<PathBuf>,
    /// Write the distribution of latency, in milliseconds, for HdrHistogram's plotter (.hgrm)
    #[arg(long, value_name = "FILE")]
    hgrm: Option<PathBuf>,
    /// Write a page with charts (HTML)
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

fn api(text: &str) -> Result<ApiVersion, String> {
    let known = [ApiVersion::V1, ApiVersion::V2].into_iter().find(|version| version.as_str() == text);
    known.ok_or_else(|| format!("{text:?} is not known; there are v1.0 and v2.0"))
}

fn main() -> ExitCode {
    if let Err(error) = signals::tame_signals() {
        print::aside(&format!("claviger-loadgen: the signals cannot be handled: {error}"));
        return ExitCode::FAILURE;
    }
    let arguments: Arguments = match arguments::parse() {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    raise_open_files();
    let result = match arguments.command {
        Command::Completions { shell } => {
            manual::completions(Arguments::command(), shell);
            Ok(ExitCode::SUCCESS)
        }
        Command::Manual { dir } => match manual::write_all(Arguments::command(), &dir) {
            Ok(()) => Ok(ExitCode::SUCCESS),
            Err(error) => Err(format!("{}: {error}", dir.display()).into()),
        },
        Command::Run(arguments) => runtime().and_then(|runtime| runtime.block_on(load(&arguments))),
        Command::Attest(arguments) => runtime().and_then(|runtime| runtime.block_on(attested(&arguments))),
        Command::Compare(arguments) => compared(&arguments),
        Command::Capacity(arguments) => runtime().and_then(|runtime| runtime.block_on(measured(&arguments))),
        Command::Plan(arguments) => planned(&arguments),
        Command::Prepare(arguments) => runtime().and_then(|runtime| runtime.block_on(prepared_ahead(&arguments))),
    };
    let status = result.unwrap_or_else(|failure| {
        print::aside(&format!("claviger-loadgen: {failure}"));
        ExitCode::FAILURE
    });
    // A result that could not be written counts as a failed command.
    output::exit_status("claviger-loadgen", status, 1)
}

/// Raises the limit on open files. Every connection is a file, and the usual soft limit of 1024 is below the possible
/// number of requests in flight. A failure here is not an error: a run that reaches the limit reports it.
fn raise_open_files() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    // These threads run beside the runtime: for pacing, for counting, and for checking replies.
    let checks = std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(2));
    Ok(threads::runtime(Processors::All, 2 + checks)?)
}

async fn load(arguments: &RunArguments) -> Result<ExitCode, Failure> {
    let mode = match (&arguments.profile, arguments.closed, arguments.duration) {
        (Some(profile), ..) => Mode::Open(profile.clone()),
        (None, Some(callers), Some(duration)) => Mode::Closed { callers: callers as usize, duration },
        _ => return Err("say what load: --profile 10s@100, or --closed 16 --duration 10s".into()),
    };
    let shape = &arguments.shape;
    let machines = shape.machines(&mode)?;
    let hosts = shape.hosts as usize;
    // A file that cannot be written is reported before the load, not after it.
    let files = [&arguments.json, &arguments.csv, &arguments.hdr, &arguments.hgrm, &arguments.html];
    for file in files.into_iter().flatten() {
        write(file, b"")?;
    }
    let client = arguments.target.connection.client()?;
    let site = arguments.target.parties.site()?;
    let interrupt = Interrupt::by_signals()?;
    let metrics = arguments.target.metrics(&site).await?;
    let world =
        prepared(World::prepare(&client, &site, hosts, arguments.target.parties.tpm, machines), &interrupt).await?;
    let about = arguments.target.about(&site, metrics.as_ref()).await;
    let load = Load { stop: arguments.stop_on.clone(), ..shape.load(mode, Arrivals::Even) };
    let outcome = match run::run(client, &world, load.clone(), &interrupt).await {
        Err(nothing) if interrupt.since().is_some() => {
            print::aside(&nothing.to_string());
            return Ok(interrupt::STATUS.into());
        }
        ran => ran?,
    };
    let mut report = Report::new(&arguments.target.connection.url, &load, hosts, machines, &outcome);
    report.about = Some(about);
    report.thresholds =
        arguments.threshold.iter().map(|t| t.judge(&outcome.tally, report.achieved_per_second)).collect();
    if let Some(file) = &arguments.csv {
        write(file, report.to_csv().as_bytes())?;
    }
    if let Some(file) = &arguments.hdr {
        write(file, &report::hdr_log(&outcome)?)?;
    }
    if let Some(file) = &arguments.hgrm {
        write(file, report::hgrm(&outcome.tally.latency).as_bytes())?;
    }
    if let Some(file) = &arguments.html {
        write(file, html::run(&report).as_bytes())?;
    }
    let json = arguments.json.as_deref();
    if json == Some(Path::new("-")) {
        print::aside(&report.for_people());
    } else {
        print::line(&report.for_people());
    }
    if let Some(file) = json {
        write(file, format!("{}\n", serde_json::to_string_pretty(&report)?).as_bytes())?;
    }
    Ok(if report.interrupted {
        interrupt::STATUS.into()
    } else if report.stopped.is_some() || report.thresholds.iter().any(|judgement| !judgement.passed) {
        THRESHOLD_FAILED.into()
    } else if report.verify.wrong > 0 {
        WRONG.into()
    } else if !report.valid {
        INVALID.into()
    } else {
        ExitCode::SUCCESS
    })
}

/// What was prepared; an interruption before that ends the process. What is made is kept for the next time as it is made.
#[expect(clippy::disallowed_methods, reason = "work on other threads cannot be stopped")]
async fn prepared(
    preparing: impl Future<Output = Result<World, Failure>>,
    interrupt: &Interrupt,
) -> Result<World, Failure> {
    tokio::select! {
        world = preparing => world,
        _ = interrupt.wait() => {
            print::aside("nothing was measured yet");
            // Work on other threads cannot be stopped, so the process exits without waiting for it.
            std::process::exit(interrupt::STATUS.into())
        }
    }
}

fn compared(arguments: &CompareArguments) -> Result<ExitCode, Failure> {
    let read = |file: &Path| {
        let bytes = std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
        let text = pem::text(&bytes).map_err(|error| format!("{}: {error}", file.display()))?;
        let report: Result<Report, _> = serde_json::from_str(text);
        report.map_err(|error| Failure::from(format!("{} is no result of `run --json`: {error}", file.display())))
    };
    let files = [arguments.before.as_path(), arguments.after.as_path()];
    let [before, after] = [read(files[0])?, read(files[1])?];
    let names = files.map(|file| file.display().to_string());
    let names = [names[0].as_str(), names[1].as_str()];
    let differences = compare::compare(&before, &after)
        .map_err(|error| format!("{} and {} cannot be compared: {error}", names[0], names[1]))?;
    if let Some(file) = &arguments.html {
        let about = About::this_call(arguments.title.as_deref());
        write(file, html::compare(&about, names, [&before, &after], &differences).as_bytes())?;
    }
    if arguments.json {
        print::line(&serde_json::to_string_pretty(&differences)?);
    } else {
        print::line(&compare::for_people(names, [&before, &after], &differences));
    }
    Ok(match arguments.fail_on {
        Some(FailOn::Worse) if differences.iter().any(|d| d.verdict == Verdict::Worse) => THRESHOLD_FAILED.into(),
        Some(FailOn::Worse) if !before.valid || !after.valid => INVALID.into(),
        _ => ExitCode::SUCCESS,
    })
}

async fn prepared_ahead(arguments: &PrepareArguments) -> Result<ExitCode, Failure> {
    let site = arguments.parties.site()?;
    let client = arguments.connection.client()?;
    let (hosts, machines) = (arguments.hosts as usize, arguments.vms as usize);
    let by_tpm = arguments.parties.tpm;
    let names = prepare::ahead(&client, &site, hosts, by_tpm, machines, &arguments.out).await?;
    let cache = site.cache().display();
    let and_boot = if by_tpm { ", and accept their boot," } else { "" };
    print::aside(&format!(
        "{machines} protectors are kept in {cache}; where the service runs, register the hosts{and_boot} with:"
    ));
    for name in names {
        let file = arguments.out.join(format!("{name}.pub.pem"));
        let file = file.display();
        print::line(&match by_tpm {
            false => format!("claviger hosts add {name} --public-key {file}"),
            true => format!("claviger hosts add {name} --ek-public {file} --trust-ek"),
        });
    }
    if by_tpm {
        let pcrs: Vec<_> = host::boot_pcrs()?.iter().map(|(pcr, value)| format!(" --pcr {pcr}={value}")).collect();
        print::line(&format!("claviger baselines add {}{}", host::BASELINE, pcrs.concat()));
    }
    Ok(ExitCode::SUCCESS)
}

async fn measured(arguments: &CapacityArguments) -> Result<ExitCode, Failure> {
    let shape = &arguments.shape;
    for file in [&arguments.json, &arguments.html].into_iter().flatten() {
        write(file, b"")?;
    }
    let client = arguments.target.connection.client()?;
    let site = arguments.target.parties.site()?;
    let metrics = arguments.target.metrics(&site).await?;
    // Each step replaces the mode. The last step needs the most virtual machines.
    let mode = Mode::Closed { callers: capacity::MOST_CALLERS, duration: arguments.step };
    let interrupt = Interrupt::by_signals()?;
    let machines = shape.machines(&mode)?;
    let by_tpm = arguments.target.parties.tpm;
    let world = prepared(World::prepare(&client, &site, shape.hosts as usize, by_tpm, machines), &interrupt).await?;
    let about = arguments.target.about(&site, metrics.as_ref()).await;
    let question = Question {
        client,
        url: arguments.target.connection.url.clone(),
        world,
        load: shape.load(mode, Arrivals::Random),
        step: arguments.step,
        objectives: &arguments.slo.0,
        site: &site,
        metrics,
        hsms: arguments.hsms.map(usize::from),
        interrupt,
    };
    let answer = capacity::Answer { about: Some(about), ..capacity::measure(&question).await? };
    let hosts = arguments.assumption.hosts();
    let text = capacity::for_people(&answer, &hosts);
    if let Some(file) = &arguments.html {
        write(file, html::capacity(&answer, &hosts).as_bytes())?;
    }
    match &arguments.json {
        Some(file) => {
            print::aside(&text);
            write(file, format!("{}\n", serde_json::to_string_pretty(&answer)?).as_bytes())?;
        }
        None => print::line(&text),
    }
    Ok(if answer.interrupted { interrupt::STATUS.into() } else { ExitCode::SUCCESS })
}

async fn attested(arguments: &AttestArguments) -> Result<ExitCode, Failure> {
    let target = &arguments.target;
    let client = target.connection.client()?;
    let site = target.parties.site()?;
    let metrics = target.metrics(&site).await?;
    let (of, hosts, by_tpm) = (site.clone(), arguments.hosts as usize, target.parties.tpm);
    let hosts = tokio::task::spawn_blocking(move || prepare::registered(&of, hosts, by_tpm)).await??;
    let about = target.about(&site, metrics.as_ref()).await;
    let storm = attest::storm(&client, hosts, by_tpm, arguments.at_a_time.into(), metrics.as_ref()).await?;
    let storm = Storm { about: Some(about), ..storm };
    if arguments.json {
        print::line(&serde_json::to_string_pretty(&storm)?);
    } else {
        print::line(&storm.for_people());
    }
    Ok(if storm.granted == storm.hosts { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn planned(arguments: &PlanArguments) -> Result<ExitCode, Failure> {
    let op_time = arguments.op_time.map_or(1.0 / arguments.hsm_rate, |time| time.as_secs_f64());
    let model = Model {
        hsms: arguments.hsms.into(),
        sessions: arguments.sessions.into(),
        hsm_rate: arguments.hsm_rate,
        op_time,
        rtt: arguments.rtt.as_secs_f64(),
        own_cost: arguments.own_cost.as_secs_f64(),
        processors: arguments.processors.into(),
        queue: arguments.queue as usize,
        deadline: arguments.deadline.as_secs_f64(),
    };
    let objectives = &arguments.slo.0;
    let about = Some(About::this_call(arguments.title.as_deref()));
    let plan = plan::Plan { about, ..plan::plan(&model, objectives, arguments.target) };
    if let Some(file) = &arguments.html {
        write(file, html::plan(&plan, &arguments.assumption.hosts()).as_bytes())?;
    }
    if arguments.json {
        print::line(&serde_json::to_string_pretty(&plan)?);
    } else {
        print::line(&plan::for_people(&plan, &arguments.assumption.hosts()));
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes a file; `-` is the standard output.
fn write(file: &Path, octets: &[u8]) -> Result<(), Failure> {
    if file == Path::new("-") {
        if !octets.is_empty() {
            print::line(String::from_utf8_lossy(octets).trim_end());
        }
        return Ok(());
    }
    output::write_file(file, octets).map_err(|error| format!("{} cannot be written: {error}", file.display()).into())
}
