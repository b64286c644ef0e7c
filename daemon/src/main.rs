//! The `claviger` command: parses the command line, loads the configuration, runs the command.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::{CommandFactory, Parser, Subcommand};
use claviger::cli::{self, Failure, doctor, place};
use claviger::config::{AttestMode, Config, ConfigError, LogFormat};
use claviger::lab::{Lab, Tokens, demo};
use claviger::observe::log::{self, LogQueue, WithPriority};
use claviger::run::daemon::Daemon;
use claviger::run::members::load_cluster;
use claviger::run::{preflight, serve};
use claviger::sys::{print, process};
use claviger_hsm::{Cluster, WorkerProgram};
use claviger_process::manual::Shell;
use claviger_process::signals::{self, Starting};
use claviger_process::{arguments, manual, output, threads};
use tokio::runtime::Runtime;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Log filter if RUST_LOG is not set. cryptoki would log every session of a lost token; the cluster logs the loss once.
const USUAL: &str = "info,cryptoki=off";
const QUIET: &str = "warn,cryptoki=off";

/// Releases the transport keys of shielded virtual machines to hosts that have proved their health
#[derive(Debug, Parser)]
#[command(version = env!("CLAVIGER_VERSION"), after_help = "Start here: claviger demo")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon with this configuration
    #[command(after_help = "Example: claviger serve\n\
        SIGTERM stops: what was accepted is answered first. SIGHUP reloads the configuration, the certificate for TLS and\n\
        the PINs, and reopens the audit trail; the log names what needs a restart.\n\
        RUST_LOG=debug says more.")]
    Serve {
        /// The configuration file [default: $CLAVIGER_CONFIG, or /etc/claviger/claviger.toml]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Format of the log; overrides log.format of the configuration
        #[arg(long, value_name = "FORMAT")]
        log: Option<LogFormat>,
    },
    /// Find problems and print a remedy for each, whether the daemon runs or not
    #[command(after_help = "Example: claviger doctor\n\
        Exit status: 0 all is well, 1 there are warnings, 2 there are errors.\n\
        Without a daemon every PIN is tried once: tokens count wrong ones.")]
    Doctor {
        /// The configuration file [default: $CLAVIGER_CONFIG, or /etc/claviger/claviger.toml]
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
        /// Check this HSM only; used by the doctor for the processes that it starts
        #[arg(long, hide = true, value_name = "NAME")]
        hsm: Option<String>,
    },
    /// Create a lab with soft tokens, run it, and release keys end to end
    #[command(after_help = "Example: claviger demo --dir lab --listen 127.0.0.1:0 --exit")]
    Demo {
        /// Folder of the lab, writable for this user only; an existing lab is used again
        #[arg(long, value_name = "DIR", default_value = "claviger-lab")]
        dir: PathBuf,
        /// Address of the service; port 0 selects a free port
        #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
        listen: SocketAddr,
        /// Address of /metrics, /live and /ready
        #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9464")]
        metrics: SocketAddr,
        /// Number of soft tokens in a new lab
        #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=64))]
        hsms: u16,
        /// Bits of the guardian's RSA keys in a new lab
        #[arg(long, value_name = "BITS", default_value_t = 2048, value_parser = cli::rsa_bits)]
        rsa: u32,
        /// Number of virtual machines to start
        #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=10_000))]
        vms: u16,
        /// How the host attests; tpm starts a software TPM and needs swtpm
        #[arg(long, value_name = "MODE", value_enum, default_value_t = AttestMode::HostKey)]
        attest: AttestMode,
        /// Stop after the checks; the exit status is 0 only if all passed
        #[arg(long)]
        exit: bool,
    },
    /// Register, show, label, disable and remove hosts
    #[command(subcommand, after_help = "Example: claviger hosts list")]
    Hosts(cli::Hosts),
    /// Capture, add, show, enable and disable baselines: the boot measurements that TPM mode accepts
    #[command(subcommand, after_help = "Example: claviger baselines list")]
    Baselines(cli::Baselines),
    /// Create, add, show and select key-protection certificates and their keys
    #[command(subcommand, after_help = "Example: claviger keys list")]
    Keys(cli::Keys),
    /// Show, rotate and revoke the keys that sign health certificates
    #[command(subcommand, after_help = "Example: claviger signers list")]
    Signers(cli::Signers),
    /// Show, drain, resume and probe the HSMs of the cluster
    #[command(subcommand, after_help = "Example: claviger hsm list")]
    Hsm(cli::Hsm),
    /// Show the nodes that share a state in etcd
    #[command(subcommand, after_help = "Example: claviger nodes list")]
    Nodes(cli::Nodes),
    /// Verify the audit trail, and show its position
    #[command(subcommand, after_help = "Example: claviger audit verify")]
    Audit(cli::audit::Audit),
    /// Write hosts, certificates, limits and attestation signers to an encrypted file; private keys stay in the HSMs
    #[command(after_help = "Example: claviger export hgs.age")]
    Export(cli::transfer::Export),
    /// Import a file from claviger export; shows the changes first
    #[command(after_help = "Example: claviger import hgs.age --dry-run\n\
        Nothing that is only here goes away, and what is disabled or limited here stays so. The HSMs have to hold the keys\n\
        of all its certificates. A file for an age recipient is not authenticated: anyone who knows the recipient can\n\
        write one. Look at what --dry-run shows, above all at hosts and signers that you do not know.")]
    Import(cli::transfer::Import),
    /// Move the state from the state folder to etcd or back, while no daemon runs
    #[command(after_help = "Example: claviger migrate --to-etcd --dry-run\n\
        The destination has to be empty. Counts of use, evidence and the audit trail stay in the state folder.")]
    Migrate(cli::migrate::Migrate),
    /// For guarded hosts: create keys, attest, and get the keys of virtual machines
    #[command(
        subcommand,
        after_help = "Example: claviger host attest --url http://hgs.example:8080\n\
        Exit status: 0 done, 1 refused or failed, 2 wrong usage, 75 worth trying again later."
    )]
    Host(cli::host::Command),
    /// For tenants: create your own guardian, and import the guardians of services
    #[command(subcommand, after_help = "Example: claviger guardian new acme --name 'Acme Ltd'")]
    Guardian(cli::tenant::guardian::Guardian),
    /// For tenants: create, show, verify, change and open key protectors
    #[command(
        subcommand,
        after_help = "Example: claviger protector new --owner acme --guardian hgs --out vm.xml --key vm.key"
    )]
    Protector(cli::tenant::protector::Protector),
    /// Set up a service step by step: configuration, PINs, keys and certificates; run it again to go on
    #[command(after_help = "Examples:\n  \
        claviger init --module /usr/lib/softhsm/libsofthsm2.so --token claviger-a --token claviger-b --certificates request\n  \
        claviger init --soft-tokens 2 --certificates lab      (a laboratory)\n\
        It asks for what the options do not say, changes nothing that is there already, and says what is next.")]
    Init(Box<cli::init::Init>),
    /// Have the daemon read its configuration, certificates and PINs again, and say what came of it
    #[command(after_help = "Example: claviger reload\n\
        Exit status: 0 it is reloaded, 1 the daemon goes on with the old configuration. SIGHUP does the same without an answer.")]
    Reload(cli::Reload),
    /// Check and show the configuration file, and print its reference
    #[command(subcommand, after_help = "Example: claviger config check")]
    Config(cli::configuration::Configuration),
    /// Print the script with which a shell completes commands and options
    #[command(after_help = "Example: claviger completions bash >/etc/bash_completion.d/claviger")]
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
    /// Run one HSM; a process that the daemon starts
    #[command(hide = true)]
    HsmWorker,
}

/// Exit status of a process that Ctrl-C ended, as shells use it.
const INTERRUPTED: u8 = 130;
/// Exit status of a doctor whose output could not be written. Its other statuses mean that the output is complete.
const DOCTOR_UNREAD: u8 = 2;

fn main() -> ExitCode {
    // Install the handlers before parsing: a signal may arrive at any time.
    let starting = match install_signals() {
        Ok(starting) => starting,
        Err(error) => {
            print::note(&format!("claviger: the signals cannot be handled: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let arguments: Arguments = match arguments::parse_with(mixed_up) {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    if matches!(arguments.command, Command::HsmWorker) {
        // The worker must start before there are threads, a log or open descriptors.
        return claviger_hsm::worker::run();
    }
    if let (Command::Serve { config, log }, Some(starting)) = (&arguments.command, &starting) {
        serve(&place::configuration(config.clone()), *log, starting);
    }
    if starting.is_some() {
        // The demonstration also runs a daemon.
        let queue = log_queue();
        install_log(QUIET, LogFormat::Text, queue.clone());
        let status = finish(arguments.command, starting);
        queue.flush();
        return status;
    }
    let quiet = match arguments.command {
        // The agent runs as long as its host.
        Command::Host(cli::host::Command::Agent(_)) => false,
        Command::Doctor { .. } | Command::Host(_) => true,
        _ => false,
    };
    install_log(if quiet { QUIET } else { USUAL }, LogFormat::Text, std::io::stderr);
    finish(arguments.command, starting)
}

/// Tip for a command of `host` that is one of `hosts`, and the other way round.
fn mixed_up(wrong: &str) -> Option<String> {
    let said = std::env::args().nth(1)?;
    let (other, meaning) = match said.as_str() {
        "host" => ("hosts", "`hosts` is for the registered hosts, where the service runs"),
        "hosts" => ("host", "`host` is for a guarded host itself"),
        _ => return None,
    };
    Arguments::command().find_subcommand(other)?.find_subcommand(wrong)?;
    Some(format!("claviger {other} {wrong} exists: {meaning}"))
}

/// Runs a command and turns its result into an exit status.
fn finish(command: Command, starting: Option<Starting>) -> ExitCode {
    let unread = if matches!(command, Command::Doctor { .. }) { DOCTOR_UNREAD } else { 1 };
    let status = run(command, starting).unwrap_or_else(|failure| {
        print::note(&format!("claviger: {failure}"));
        cli::host::status(&failure)
    });
    output::exit_status("claviger", status, unread)
}

/// Installs the signal handlers of a daemon if the command runs one.
fn install_signals() -> std::io::Result<Option<Starting>> {
    signals::tame_signals()?;
    match std::env::args_os().nth(1).as_deref().and_then(OsStr::to_str) {
        Some("serve") => Starting::new(0).map(Some),
        Some("demo") => Starting::new(INTERRUPTED).map(Some),
        _ => Ok(None),
    }
}

/// Exit status of a daemon whose configuration is invalid (`EX_CONFIG` of sysexits.h): a restart would not help.
const BAD_CONFIGURATION: u8 = 78;

/// Runs the daemon until a signal stops it. The log has its own thread, and all output to standard error goes through
/// it.
fn serve(config: &Path, format: Option<LogFormat>, starting: &Starting) -> ! {
    let queue = log_queue();
    // If the configuration cannot be read, the error is reported later, when the configuration is used.
    let format = format.unwrap_or_else(|| Config::load(config).map_or(LogFormat::Text, |config| config.log.format));
    let is_journal = log::is_journal();
    if is_journal {
        install_log(USUAL, format, WithPriority(queue.clone()));
    } else {
        install_log(USUAL, format, queue.clone());
    }
    let announced = match format {
        LogFormat::Text => serve::Announced::Printed,
        LogFormat::Json => serve::Announced::Logged,
    };
    let status = match serve::run(config.to_owned(), starting, announced) {
        Ok(()) => 0,
        Err(failure) => {
            match format {
                LogFormat::Json => tracing::error!(error = %failure, "the daemon ends"),
                LogFormat::Text => {
                    let priority = if is_journal { log::priority(&tracing::Level::ERROR) } else { b"" };
                    queue.push(&[priority, format!("claviger: {failure}\n").as_bytes()].concat());
                }
            }
            if failure.is::<ConfigError>() { BAD_CONFIGURATION } else { 1 }
        }
    };
    queue.flush();
    signals::exit_at_once(status)
}

/// The log queue of a daemon: neither log lines nor panics wait for the reader of the log.
fn log_queue() -> Arc<LogQueue> {
    let queue = LogQueue::start().unwrap_or_else(|error| {
        print::note(&format!("claviger: {}", threads::no_thread(&error)));
        signals::exit_at_once(1)
    });
    log::log_panics(queue.clone());
    queue
}

fn install_log<W>(usual: &str, format: LogFormat, writer: W)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(usual));
    let ansi = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(ansi);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}

/// Work that needs a single thread (environment variables, loading modules) is done before the runtime starts.
fn run(command: Command, starting: Option<Starting>) -> Result<ExitCode, Failure> {
    match command {
        Command::Serve { .. } => Err("serve has to be the first argument".into()),
        Command::HsmWorker => Err("hsm-worker is started by the daemon".into()),
        Command::Doctor { config, hsm: Some(name), .. } => {
            process::no_core_dumps()?;
            match doctor::examine_hsm(&place::configuration(config), &name)? {}
        }
        Command::Doctor { config, json, hsm: None } => {
            process::no_core_dumps()?;
            let findings = doctor::examine_as_daemon(&place::configuration(config));
            doctor::print(&findings, json);
            Ok(doctor::status(&findings))
        }
        Command::Demo { dir, listen, metrics, hsms, rsa, vms, attest, exit } => {
            process::no_core_dumps()?;
            process::raise_open_files()?;
            let begun = Instant::now();
            print::line("Claviger demo: a guarded host gets the keys of a tenant's virtual machines\n");
            let mut lab = Lab::prepare(&dir, listen, metrics, Tokens { hsms: hsms.into(), bits: rsa })?;
            lab.config.attest.mode = attest;
            preflight::pass(&lab.config)?;
            let others = serve::needed_threads(&lab.config);
            threads::ensure_runtime(serve::PROCESSORS, others)?;
            let cluster = load_cluster(&lab.config, WorkerProgram::this_executable())?;
            on_tokens(threads::runtime(serve::PROCESSORS, others)?, cluster, async |cluster| {
                let stop = process::shutdown_signal()?;
                let (daemon, passed) = demo::run(&lab, cluster, vms.into(), begun).await?;
                if !exit {
                    next_steps(&lab, &daemon);
                    // Up to here, a signal ended the demonstration at once.
                    starting.iter().for_each(Starting::done);
                    stop.await;
                }
                daemon.stop().await;
                Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
            })
        }
        Command::Hosts(command) => threads::single_thread()?.block_on(cli::hosts(command)).map(|()| ExitCode::SUCCESS),
        Command::Baselines(command) => {
            threads::single_thread()?.block_on(cli::baselines(command)).map(|()| ExitCode::SUCCESS)
        }
        Command::Signers(command) => {
            threads::single_thread()?.block_on(cli::signers(command)).map(|()| ExitCode::SUCCESS)
        }
        Command::Hsm(command) => threads::single_thread()?.block_on(cli::hsm(command)).map(|()| ExitCode::SUCCESS),
        Command::Nodes(command) => threads::single_thread()?.block_on(cli::nodes(command)).map(|()| ExitCode::SUCCESS),
        Command::Migrate(command) => cli::migrate::migrate(&command).map(|()| ExitCode::SUCCESS),
        Command::Audit(command) => threads::single_thread()?.block_on(cli::audit::run(command)),
        Command::Guardian(command) => threads::small_runtime()?.block_on(cli::tenant::guardian::run(command)),
        Command::Protector(command) => cli::tenant::protector::run(command),
        Command::Keys(command) => {
            // The private key of a PFX is in this process' memory.
            process::no_core_dumps()?;
            threads::single_thread()?.block_on(cli::keys(command)).map(|()| ExitCode::SUCCESS)
        }
        Command::Init(command) => {
            process::no_core_dumps()?;
            cli::init::run(*command)
        }
        Command::Reload(command) => {
            threads::single_thread()?.block_on(cli::reload(command)).map(|()| ExitCode::SUCCESS)
        }
        Command::Config(command) => cli::configuration::run(command).map(|()| ExitCode::SUCCESS),
        Command::Completions { shell } => {
            manual::completions(Arguments::command(), shell);
            Ok(ExitCode::SUCCESS)
        }
        Command::Manual { dir } => {
            let page = dir.join("man/claviger.toml.5");
            let written = manual::write_all(Arguments::command(), &dir)
                .and_then(|()| std::fs::write(page, cli::configuration::manual_page()));
            written.map_err(|error| format!("{}: {error}", dir.display()))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Export(command) => {
            threads::single_thread()?.block_on(cli::transfer::export(command)).map(|()| ExitCode::SUCCESS)
        }
        Command::Import(command) => {
            threads::single_thread()?.block_on(cli::transfer::import(command)).map(|()| ExitCode::SUCCESS)
        }
        Command::Host(command) => {
            process::no_core_dumps()?;
            // The runtime opens files of its own. Open the user's descriptors first, so that they cannot be confused.
            let command = cli::host::prepare(command)?;
            threads::small_runtime()?.block_on(cli::host::run(command)).map(|()| ExitCode::SUCCESS)
        }
    }
}

/// Runs `work`, then closes the sessions on the tokens, also after a failure: a vendor's library may crash if the
/// process ends while the library's threads run.
fn on_tokens(
    runtime: Runtime,
    cluster: Cluster,
    work: impl AsyncFnOnce(Cluster) -> Result<ExitCode, Failure>,
) -> Result<ExitCode, Failure> {
    runtime.block_on(async {
        let result = work(cluster.clone()).await;
        cluster.close().await;
        result
    })
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
