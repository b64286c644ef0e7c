//! Compares the daemon with the raw token in one run.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use claviger_bench::ceiling::{self, Settings, Stage};
use claviger_bench::storm::{self, StormSettings};
use claviger_bench::{idle, report, scaling};
use claviger_loadgen::units;
use claviger_process::{arguments, output};
use serde_json::Value;

/// Compares the daemon with the raw token: alternating rounds of a bare PKCS#11 loop and of the daemon under a closed
/// loop, in one run on the same tokens
#[derive(Debug, Parser)]
#[command(after_help = "Examples:\n  \
    cargo run --release -p claviger-bench --bin ceiling -- --json ceiling.json\n  \
    cargo run --release -p claviger-bench --bin ceiling -- --rtt 20ms --sessions 1 --hsms 1,2,4,8,16\n  \
    cargo run --release -p claviger-bench --bin ceiling -- --idle 10000\n  \
    cargo run --release -p claviger-bench --bin ceiling -- --storm 10000 --owners 100 --rounds 2\n\n\
    docs/bench.md says what the figures mean.")]
struct Arguments {
    /// Number of soft tokens; several numbers measure how throughput grows with them
    #[arg(long, value_name = "N[,N…]", default_value = "1", value_delimiter = ',', value_parser = hsms)]
    hsms: Vec<usize>,
    /// Sessions of each token
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    sessions: u16,
    /// Duration of a round in seconds
    #[arg(long, value_name = "S", default_value_t = 3.0, value_parser = seconds)]
    seconds: f64,
    /// Rounds of each kind
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Length of the guardian's RSA keys
    #[arg(long, value_name = "BITS", default_value_t = 2048)]
    rsa: u32,
    /// Delay of every operation, as if the HSM were on a network; whole milliseconds
    #[arg(long, value_name = "TIME", default_value = "0ms", value_parser = units::duration)]
    rtt: Duration,
    /// SoftHSM2's module, or another module that creates its tokens in the same way
    #[arg(long, value_name = "PATH")]
    module: Option<PathBuf>,
    /// Measure the cost of this many idle connections instead
    #[arg(long, value_name = "N")]
    idle: Option<usize>,
    /// Measure a storm of this many machines instead: the time until the last machine has its keys, with a full and an
    /// empty stock of egress protectors
    #[arg(long, value_name = "N", conflicts_with = "idle", value_parser = clap::value_parser!(u32).range(1..=60_000))]
    storm: Option<u32>,
    /// Owners of the machines of a storm
    #[arg(long, value_name = "M", default_value_t = 100, requires = "storm",
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    owners: u32,
    /// Hosts that send the requests in a storm; by default one per hundred machines
    #[arg(long, value_name = "N", requires = "storm", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    hosts: Option<u32>,
    /// Time within which all machines of a storm send their first request
    #[arg(long, value_name = "TIME", default_value = "2s", requires = "storm", value_parser = units::duration)]
    within: Duration,
    /// Memory for the daemon's stock of egress protectors, in MiB; default: none, and 256 in a storm, where a machine
    /// needs about 10 KiB
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    stock_mib: Option<u64>,
    /// Callers at saturation, each with its own connection; default: enough to keep every session and the processors
    /// busy
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    callers: Option<u16>,
    /// Write the figures to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Default memory for the stock in a storm.
const STORM_STOCK_MIB: u64 = 256;

fn hsms(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| (1..=64).contains(n)).ok_or_else(|| "from 1 to 64".to_owned())
}

fn seconds(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|s| (0.1..=3600.0).contains(s)).ok_or_else(|| "from 0.1 to 3600".to_owned())
}

fn main() -> ExitCode {
    let arguments: Arguments = match arguments::parse() {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    let settings = Settings {
        hsms: arguments.hsms.iter().copied().max().unwrap_or(1),
        sessions: arguments.sessions.into(),
        time: Duration::from_secs_f64(arguments.seconds),
        rounds: arguments.rounds.into(),
        rsa: arguments.rsa,
        rtt: arguments.rtt,
        callers: arguments.callers.map(usize::from),
        stock_mib: arguments.stock_mib.unwrap_or(0),
        module: arguments.module,
    };
    let stage = Stage::set(&settings);
    let tell = output::note;
    let (text, json) = if let Some(connections) = arguments.idle {
        let found = idle::run(&stage, &settings, connections, tell);
        (report::idle(&found), serde_json::to_value(found))
    } else if let Some(machines) = arguments.storm {
        let storm = StormSettings {
            machines: machines as usize,
            owners: arguments.owners.min(machines) as usize,
            hosts: arguments.hosts.unwrap_or_else(|| machines.div_ceil(100)) as usize,
            within: arguments.within,
            stock_mib: arguments.stock_mib.unwrap_or(STORM_STOCK_MIB),
        };
        let found = storm::run(&stage, &settings, &storm, tell);
        (report::storm(&found), serde_json::to_value(found))
    } else if arguments.hsms.len() > 1 {
        let found = scaling::run(&stage, &settings, &arguments.hsms, tell);
        (report::scaling(&found), serde_json::to_value(found))
    } else {
        let found = ceiling::run(&stage, &settings, tell);
        (report::ceiling(&found), serde_json::to_value(found))
    };
    output::bytes(format!("\n{text}").as_bytes());
    let status = match write(arguments.json, json) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(&format!("ceiling: {error}"));
            ExitCode::FAILURE
        }
    };
    output::exit_status("ceiling", status, 1)
}

fn write(file: Option<PathBuf>, json: serde_json::Result<Value>) -> Result<(), String> {
    let Some(file) = file else { return Ok(()) };
    let text = json.and_then(|json| serde_json::to_string_pretty(&json)).map_err(|error| error.to_string())?;
    output::write_file(&file, (text + "\n").as_bytes()).map_err(|error| format!("{}: {error}", file.display()))
}
