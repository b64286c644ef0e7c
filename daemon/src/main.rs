//! The `claviger` command: command line → configuration → run.

#![forbid(unsafe_code)]
#![allow(clippy::print_stderr)]

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};
use claviger::cli::{self, Failure};
use claviger::config::{Config, LogFormat};
use claviger::daemon::{Daemon, load_cluster};
use claviger::lab::{Lab, Tokens};
use claviger::{demo, doctor, notify, preflight, print, process, reload};
use claviger_hsm::Cluster;
use tracing_subscriber::EnvFilter;

/// What is logged unless RUST_LOG says otherwise. cryptoki has an opinion on every session of a token that went away; what
/// follows from that the cluster says, once.
const USUAL: &str = "info,cryptoki=off";
const QUIET: &str = "warn,cryptoki=off";

/// Releases the transport keys of shielded virtual machines to hosts that proved their health
#[derive(Debug, Parser)]
#[command(version = env!("CLAVIGER_VERSION"), after_help = "Start here: claviger demo")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve, as the configuration says
    #[command(after_help = "Example: claviger serve --config /etc/claviger/claviger.toml\n\
        SIGTERM stops: what was accepted is answered first. SIGHUP reloads the configuration, the certificate for TLS and\n\
        the PINs, and reopens the audit trail; the log names what needs a restart.\n\
        RUST_LOG=debug says more.")]
    Serve {
        /// The configuration file
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// How the log looks, instead of log.format of the configuration
        #[arg(long, value_name = "FORMAT")]
        log: Option<LogFormat>,
    },
    /// Look for what is wrong, whether the daemon runs or not, and say what to do about it
    #[command(after_help = "Example: claviger doctor --config /etc/claviger/claviger.toml\n\
        Exit status: 0 all is well, 1 there are warnings, 2 there are errors.\n\
        Without a daemon every PIN is tried once: tokens count wrong ones.")]
    Doctor {
        /// The configuration file
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Print JSON for machines
        #[arg(long)]
        json: bool,
    },
    /// Make a lab with soft tokens, serve it, and release keys end to end
    #[command(after_help = "Example: claviger demo --dir /tmp/lab --listen 127.0.0.1:0 --exit")]
    Demo {
        /// Folder of the lab; an existing lab is used again
        #[arg(long, value_name = "DIR", default_value = "claviger-lab")]
        dir: PathBuf,
        /// Address to serve on; port 0 picks one
        #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
        listen: SocketAddr,
        /// Address of /metrics, /live and /ready
        #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9464")]
        metrics: SocketAddr,
        /// Soft tokens of a new lab
        #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=64))]
        hsms: u16,
        /// Length of the guardian's RSA keys in a new lab
        #[arg(long, value_name = "BITS", default_value_t = 2048, value_parser = cli::rsa_bits)]
        rsa: u32,
        /// Virtual machines to start
        #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=10_000))]
        vms: u16,
        /// Stop after the checks; the exit status is 0 only if all passed
        #[arg(long)]
        exit: bool,
    },
    /// Register, show, label, disable and remove hosts
    #[command(subcommand, after_help = "Example: claviger hosts list --config /etc/claviger/claviger.toml")]
    Hosts(cli::Hosts),
    /// Make, add, show and choose key-protection certificates and their keys
    #[command(subcommand, after_help = "Example: claviger keys list --config /etc/claviger/claviger.toml")]
    Keys(cli::Keys),
    /// Show, replace and revoke the keys that sign health certificates
    #[command(subcommand, after_help = "Example: claviger signers list --config /etc/claviger/claviger.toml")]
    Signers(cli::Signers),
    /// Show, drain, resume and probe the HSMs of the cluster
    #[command(subcommand, after_help = "Example: claviger hsm list --config /etc/claviger/claviger.toml")]
    Hsm(cli::Hsm),
    /// Write hosts, certificates, limits and attestation signers to an encrypted file; private keys stay in the HSMs
    #[command(after_help = "Example: claviger export hgs.age --config /etc/claviger/claviger.toml")]
    Export(cli::transfer::Export),
    /// Take in what claviger export wrote; shows first what changes
    #[command(after_help = "Example: claviger import hgs.age --dry-run --config /etc/claviger/claviger.toml\n\
        Nothing that is only here goes away, and what is disabled or limited here stays so. The HSMs have to hold the keys\n\
        of all its certificates. A file for an age recipient is not authenticated: anyone who knows the recipient can\n\
        write one. Look at what --dry-run shows, above all at hosts and signers that you do not know.")]
    Import(cli::transfer::Import),
    /// Be a guarded host: make its keys, attest, and get the keys of virtual machines
    #[command(
        subcommand,
        after_help = "Example: claviger host attest --url http://hgs.example:8080\n\
        Exit status: 0 done, 1 refused or failed, 2 wrong usage, 75 worth trying again later."
    )]
    Host(cli::host::Command),
    /// For tenants: make an own guardian, import those of services
    #[command(subcommand, after_help = "Example: claviger guardian new acme --name 'Acme Ltd'")]
    Guardian(cli::guardian::Guardian),
    /// For tenants: make, show, check, change and open key protectors
    #[command(
        subcommand,
        after_help = "Example: claviger protector new --owner acme --guardian hgs --out vm.xml --key vm.key"
    )]
    Protector(cli::protector::Protector),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let quiet = matches!(arguments.command, Command::Demo { .. } | Command::Doctor { .. } | Command::Host(_));
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(if quiet { QUIET } else { USUAL }));
    let ansi = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi);
    match log_format(&arguments.command) {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    match run(arguments.command) {
        Ok(status) => status,
        Err(failure) => {
            eprintln!("claviger: {failure}");
            cli::host::status(&failure)
        }
    }
}

/// A configuration that cannot be read is complained of when it is to be used.
fn log_format(command: &Command) -> LogFormat {
    let Command::Serve { config, log } = command else { return LogFormat::Text };
    log.unwrap_or_else(|| Config::load(config).map_or(LogFormat::Text, |config| config.log.format))
}

/// What has to happen while there is one thread (environment variables, loading modules) happens before the runtime.
fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Serve { config, log: _ } => {
            process::no_core_dumps()?;
            process::raise_open_files()?;
            let file = config;
            let config = Config::load(&file)?;
            preflight::pass(&config)?;
            let cluster = load_cluster(&config)?;
            on_tokens(cluster, async |cluster| {
                let stop = process::shutdown_signal()?;
                let hangups = reload::hangups()?;
                let daemon = Daemon::start(config, cluster).await?;
                print::line(&format!("listening on {}", daemon.url()));
                print::line(&format!("metrics on http://{}", daemon.metrics_address));
                // Awaited here: the macro does not look at its arguments where its level is switched off.
                let reloading =
                    tokio::spawn(reload::follow(hangups, file.clone(), daemon.service.clone(), daemon.tls.clone()));
                notify::ready();
                let signal = stop.await;
                notify::stopping();
                reloading.abort();
                tracing::info!(signal, "stopping");
                daemon.stop().await;
                Ok(ExitCode::SUCCESS)
            })
        }
        Command::Doctor { config, json } => {
            process::no_core_dumps()?;
            let findings = doctor::examine(&config);
            doctor::print(&findings, json);
            Ok(doctor::status(&findings))
        }
        Command::Demo { dir, listen, metrics, hsms, rsa, vms, exit } => {
            process::no_core_dumps()?;
            process::raise_open_files()?;
            let begun = Instant::now();
            print::line("Claviger demo: a guarded host gets the keys of a tenant's virtual machines\n");
            let lab = Lab::prepare(&dir, listen, metrics, Tokens { hsms: hsms.into(), bits: rsa })?;
            preflight::pass(&lab.config)?;
            let cluster = load_cluster(&lab.config)?;
            on_tokens(cluster, async |cluster| {
                let stop = process::shutdown_signal()?;
                let (daemon, passed) = demo::run(&lab, cluster, vms.into(), begun).await?;
                if !exit {
                    next_steps(&lab, &daemon);
                    stop.await;
                }
                daemon.stop().await;
                Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
            })
        }
        Command::Hosts(command) => runtime()?.block_on(cli::hosts(command)).map(|()| ExitCode::SUCCESS),
        Command::Signers(command) => runtime()?.block_on(cli::signers(command)).map(|()| ExitCode::SUCCESS),
        Command::Hsm(command) => runtime()?.block_on(cli::hsm(command)).map(|()| ExitCode::SUCCESS),
        Command::Guardian(command) => runtime()?.block_on(cli::guardian::run(command)),
        Command::Protector(command) => cli::protector::run(command),
        Command::Keys(command) => {
            // The private key of a PFX passes through.
            process::no_core_dumps()?;
            runtime()?.block_on(cli::keys(command)).map(|()| ExitCode::SUCCESS)
        }
        Command::Export(command) => runtime()?.block_on(cli::transfer::export(command)).map(|()| ExitCode::SUCCESS),
        Command::Import(command) => runtime()?.block_on(cli::transfer::import(command)).map(|()| ExitCode::SUCCESS),
        Command::Host(command) => {
            process::no_core_dumps()?;
            // Before the runtime opens files of its own: a descriptor that was not given must not be one of them.
            let command = cli::host::prepare(command)?;
            runtime()?.block_on(cli::host::run(command)).map(|()| ExitCode::SUCCESS)
        }
    }
}

/// Runs `work` and closes the sessions on the tokens after it, also when it failed: a vendor's library does not survive
/// the end of the process with threads inside.
fn on_tokens(
    cluster: Cluster,
    work: impl AsyncFnOnce(Cluster) -> Result<ExitCode, Failure>,
) -> Result<ExitCode, Failure> {
    runtime()?.block_on(async {
        let result = work(cluster.clone()).await;
        cluster.close().await;
        result
    })
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

fn next_steps(lab: &Lab, daemon: &Daemon) {
    let config = lab.config_file();
    print::line(&format!(
        "\nserving; stop with Ctrl-C. How it is, in a browser: http://{}/\nMeanwhile, in another terminal:\n  \
         curl http://{}/ready\n  \
         curl http://{}/KeyProtection/service/metadata/2014-07/metadata.xml\n  \
         claviger hosts list --config {}\n  \
         tail -f {}",
        daemon.metrics_address,
        daemon.metrics_address,
        daemon.address,
        config.display(),
        lab.config.server.audit_file().display()
    ));
}
