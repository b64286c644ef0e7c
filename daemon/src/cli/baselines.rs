//! `claviger baselines …`: what hosts may have booted.

use std::path::PathBuf;

use data_encoding::BASE64;
use serde::Deserialize;

use super::{Failure, Target, ask, date, print, table, text, tree};
use crate::commands::{Checked, Command, MeasuredEvent, Pcrs, ShownBaseline};
use crate::files;
use crate::print::say;

/// Longest event log that is read, in bytes.
const MAX_LOG: usize = claviger_protocol::tpm::context::MAX_LOG;

/// `claviger baselines …`
#[derive(Debug, clap::Subcommand)]
pub enum Baselines {
    /// Take a baseline from what a host proved last
    #[command(after_help = "Example: claviger baselines capture fleet-2026-12 --host node-17 --config FILE\n\
        PCRs 0, 2, 4 and 7 are always taken. 8, 9, 11, 12 and 14 hold what boot loaders measure: kernel, initrd, command\n\
        line. See first what changed: claviger hosts check node-17")]
    Capture {
        /// Name of the baseline: 1 to 64 letters, digits, '.', '-' or '_'
        name: String,
        /// The reference host
        #[arg(long, value_name = "NAME")]
        host: String,
        /// A further PCR, 0 to 23; may be given several times
        #[arg(long = "pcr", value_name = "N", value_parser = clap::value_parser!(u8).range(0..=23))]
        pcrs: Vec<u8>,
        /// Take PCRs that the host did not quote from its event log, which nothing proves until hosts quote them
        #[arg(long)]
        from_log: bool,
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
    /// Add a baseline of PCR values from elsewhere
    #[command(
        after_help = "Example: claviger baselines add fleet-1 --pcr 0=HEX --pcr 4=HEX --pcr 7=HEX --config FILE\n\
        The values are those of the SHA-256 bank, as tpm2_pcrread prints them."
    )]
    Add {
        /// Name of the baseline: 1 to 64 letters, digits, '.', '-' or '_'
        name: String,
        /// A PCR and its value; at least 0, 4 and 7 are needed
        #[arg(long = "pcr", value_name = "N=HEX", required = true, value_parser = pcr_value)]
        pcrs: Vec<(usize, String)>,
        /// The event log behind the values, to tell later what changed
        #[arg(long, value_name = "FILE")]
        log: Option<PathBuf>,
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
    /// Show the baselines
    #[command(after_help = "Example: claviger baselines list --config /etc/claviger/claviger.toml")]
    List {
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
    /// Show a baseline: its values and what was measured
    #[command(after_help = "Example: claviger baselines show fleet-1 --config /etc/claviger/claviger.toml")]
    Show {
        /// Name of the baseline
        name: String,
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
    /// Call hosts with a baseline's values healthy
    #[command(after_help = "Example: claviger baselines enable fleet-1 --config /etc/claviger/claviger.toml")]
    Enable {
        /// Name of the baseline
        name: String,
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
    /// Stop the attestations and releases of a baseline's hosts from this moment
    #[command(after_help = "Example: claviger baselines disable fleet-1 --config /etc/claviger/claviger.toml")]
    Disable {
        /// Name of the baseline
        name: String,
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
    /// Remove a baseline, which stops its hosts like disabling it
    #[command(after_help = "Example: claviger baselines remove fleet-1 --config /etc/claviger/claviger.toml")]
    Remove {
        /// Name of the baseline
        name: String,
        /// Where the daemon is.
        #[command(flatten)]
        target: Target,
    },
}

fn pcr_value(text: &str) -> Result<(usize, String), String> {
    let parsed = text.split_once('=').and_then(|(pcr, value)| Some((pcr.parse().ok()?, value.to_owned())));
    parsed.filter(|(pcr, _)| *pcr < 24).ok_or_else(|| "write it like 7=HEX, with a PCR of 0 to 23".to_owned())
}

/// Runs `claviger baselines …`.
///
/// # Errors
/// What is wrong, and what to do.
pub async fn baselines(command: Baselines) -> Result<(), Failure> {
    match command {
        Baselines::Capture { name, host, pcrs, from_log, target } => {
            let pcrs = pcrs.into_iter().map(usize::from).collect();
            added(&target, &Command::CaptureBaseline { name, host, pcrs, from_log }).await
        }
        Baselines::Add { name, pcrs, log, target } => {
            let given = pcrs.len();
            let pcrs = Pcrs(pcrs.into_iter().collect());
            if pcrs.0.len() != given {
                return Err("a PCR is given twice".into());
            }
            let log = log.map(|path| files::read(&path, MAX_LOG)).transpose()?;
            let log = log.map(|log| BASE64.encode(&log));
            added(&target, &Command::AddBaseline { name, pcrs, log }).await
        }
        Baselines::List { target } => {
            let mut reply = ask(&target, &Command::ListBaselines).await?;
            for baseline in reply.as_array_mut().into_iter().flatten() {
                let numbers: Vec<_> = Pcrs::deserialize(&baseline["pcrs"])?.0.into_keys().collect();
                let numbers = numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
                if !target.json {
                    baseline["pcrs"] = numbers.into();
                }
            }
            print(&target, &reply, || {
                table(&reply, &[("NAME", "name"), ("ENABLED", "enabled"), ("ADDED", "added"), ("PCRS", "pcrs")]);
            });
            Ok(())
        }
        Baselines::Show { name, target } => {
            let reply = ask(&target, &Command::ShowBaseline { name }).await?;
            let shown = ShownBaseline::deserialize(&reply)?;
            print(&target, &reply, || {
                let enabled = if shown.enabled { "enabled" } else { "disabled" };
                say!("baseline {}, {enabled}, added {}", shown.name, date(shown.added));
                for (pcr, value) in &shown.pcrs.0 {
                    say!("PCR {pcr:2}  {value}");
                    shown.events.iter().filter(|event| event.pcr == *pcr).for_each(|event| say!("{}", line(event)));
                }
            });
            Ok(())
        }
        Baselines::Enable { name, target } => {
            let reply = ask(&target, &Command::EnableBaseline { name, enabled: true }).await?;
            print(&target, &reply, || say!("baseline {} is enabled", text(&reply, "name")));
            Ok(())
        }
        Baselines::Disable { name, target } => {
            let reply = ask(&target, &Command::EnableBaseline { name, enabled: false }).await?;
            print(&target, &reply, || say!("baseline {} is disabled; its hosts get no keys", text(&reply, "name")));
            Ok(())
        }
        Baselines::Remove { name, target } => {
            let reply = ask(&target, &Command::RemoveBaseline { name }).await?;
            print(&target, &reply, || say!("removed baseline {}; its hosts get no keys", text(&reply, "name")));
            Ok(())
        }
    }
}

async fn added(target: &Target, command: &Command) -> Result<(), Failure> {
    let reply = ask(target, command).await?;
    let shown = ShownBaseline::deserialize(&reply)?;
    print(target, &reply, || {
        say!("added baseline {}, enabled", shown.name);
        shown.pcrs.0.iter().for_each(|(pcr, value)| say!("PCR {pcr:2}  {value}"));
    });
    Ok(())
}

/// An event on a line of its own.
fn line(event: &MeasuredEvent) -> String {
    let sign = match event.is_new {
        None => ' ',
        Some(true) => '+',
        Some(false) => '-',
    };
    let digest = event.digest.get(..16).unwrap_or(&event.digest);
    format!("        {sign} {digest}  {}", tree::plain(&event.event))
}

/// What `claviger hosts check` found.
pub(super) fn say_checked(checked: &Checked) {
    let verdict = match &checked.baseline {
        Some(baseline) if checked.healthy => format!("would be healthy, by baseline {baseline}"),
        _ => "would be refused".to_owned(),
    };
    say!("host {} {verdict}; this is what it proved on {}", checked.host, date(checked.at));
    for policy in &checked.policies {
        let why = match policy.policy.as_str() {
            "FullBoot" if !policy.holds => {
                format!(
                    ": it slept or hibernated, or its attestation key is of another hierarchy; restart count {}",
                    checked.restart_count
                )
            }
            "SecureBootEnabled" if !policy.holds => ": Secure Boot is off".to_owned(),
            "SecureBootSettings" if !policy.holds => ": no enabled baseline has its values".to_owned(),
            _ => String::new(),
        };
        say!("  {} {}{why}", if policy.holds { "holds" } else { "FAILS" }, policy.policy);
    }
    for baseline in &checked.baselines {
        let state = if baseline.enabled { "" } else { " (disabled)" };
        if baseline.matches {
            say!("  baseline {}{state}: all values match", baseline.name);
            continue;
        }
        say!("  baseline {}{state}:", baseline.name);
        for differs in &baseline.differs {
            let quoted = differs.quoted.as_deref().unwrap_or("not quoted");
            say!("    PCR {:2}  {quoted}", differs.pcr);
            say!("    expected {}", differs.expected);
            differs.events.iter().for_each(|event| say!("{}", line(event)));
        }
    }
    if checked.baselines.is_empty() {
        say!("  there is no baseline; take one: claviger baselines capture NAME --host {}", checked.host);
    }
}
