//! `claviger baselines …`: the accepted boot measurements of hosts.

use std::path::PathBuf;

use claviger_client::files;
use claviger_protocol::tpm::pcr::PcrSet;
use data_encoding::BASE64;
use serde::Deserialize;

use super::table::{date, plain, table, text};
use super::target::{Target, ask, print};
use crate::admin::{Checked, Command, Compared, MeasuredEvent, Pcrs, ShownBaseline};
use crate::sys::failure::Failure;
use crate::sys::print::say;

/// Longest event log, in bytes.
const MAX_LOG: usize = claviger_protocol::tpm::context::MAX_LOG;

/// `claviger baselines …`
#[derive(Debug, clap::Subcommand)]
pub enum Baselines {
    /// Create a baseline from the last evidence of a host
    #[command(after_help = "Example: claviger baselines capture fleet-2026-12 --host node-17 --config FILE\n\
        PCRs 0, 2, 4 and 7 are always taken. 8, 9, 11, 12 and 14 hold what boot loaders measure: kernel, initrd, command\n\
        line. See first what changed: claviger hosts check node-17. It ends with the command that captures what it showed.")]
    Capture {
        /// Name of the baseline: 1 to 64 letters, digits, '.', '-' or '_'
        name: String,
        /// The reference host
        #[arg(long, value_name = "NAME")]
        host: String,
        /// Time of the evidence in seconds since 1970, as hosts check shows it; fails if the host has attested again
        /// since then
        #[arg(long, value_name = "SECONDS")]
        at: Option<i64>,
        /// An additional PCR, 0 to 23; may be repeated
        #[arg(long = "pcr", value_name = "N", value_parser = clap::value_parser!(u8).range(0..=23))]
        pcrs: Vec<u8>,
        /// Take values of PCRs that the host did not quote from its event log; these values are unproven until hosts
        /// quote the PCRs
        #[arg(long)]
        from_log: bool,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Add a baseline with given PCR values
    #[command(
        after_help = "Example: claviger baselines add fleet-1 --pcr 0=HEX --pcr 4=HEX --pcr 7=HEX --config FILE\n\
        The values are those of the SHA-256 bank, as tpm2_pcrread prints them."
    )]
    Add {
        /// Name of the baseline: 1 to 64 letters, digits, '.', '-' or '_'
        name: String,
        /// A PCR and its value; 0, 4 and 7 are required
        #[arg(long = "pcr", value_name = "N=HEX", required = true, value_parser = pcr_value)]
        pcrs: Vec<(usize, String)>,
        /// The event log that belongs to the values; used later to show what changed
        #[arg(long, value_name = "FILE")]
        log: Option<PathBuf>,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Show the baselines
    #[command(after_help = "Example: claviger baselines list")]
    List {
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Show the values and the measured events of a baseline
    #[command(after_help = "Example: claviger baselines show fleet-1")]
    Show {
        /// Name of the baseline
        name: String,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Accept hosts whose PCRs match this baseline
    #[command(after_help = "Example: claviger baselines enable fleet-1")]
    Enable {
        /// Name of the baseline
        name: String,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Reject attestations and releases of a baseline's hosts, effective immediately
    #[command(after_help = "Example: claviger baselines disable fleet-1")]
    Disable {
        /// Name of the baseline
        name: String,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Remove a baseline; like disable, this rejects its hosts immediately
    #[command(after_help = "Example: claviger baselines remove fleet-1\n\
        With [etcd], a baseline with other values cannot have this name for about eight hours.")]
    Remove {
        /// Name of the baseline
        name: String,
        /// The daemon to contact.
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
/// The problem and its remedy.
pub async fn baselines(command: Baselines) -> Result<(), Failure> {
    match command {
        Baselines::Capture { name, host, at, pcrs, from_log, target } => {
            let pcrs = pcrs.into_iter().map(usize::from).collect();
            added(&target, &Command::CaptureBaseline { name, host, at, pcrs, from_log }).await
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
                shown_lines(&shown).iter().for_each(|line| say!("{line}"));
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
        shown_lines(&shown).iter().for_each(|line| say!("{line}"));
    });
    Ok(())
}

/// The PCRs of a baseline, with the events of its log.
fn shown_lines(shown: &ShownBaseline) -> Vec<String> {
    let mut lines = Vec::new();
    for (pcr, value) in &shown.pcrs.0 {
        lines.push(format!("PCR {pcr:2}  {value}"));
        let replayed = shown.replayed.iter().find(|replayed| replayed.pcr == *pcr);
        if replayed.is_some_and(|replayed| !replayed.log_agrees) {
            lines.push(format!("    {DISAGREES}"));
        }
        let events: Vec<_> = shown.events.iter().filter(|event| event.pcr == *pcr).map(line).collect();
        // The reply to a change contains no events.
        let omitted = replayed.filter(|_| !events.is_empty()).and_then(|replayed| omitted(replayed.omitted));
        lines.extend(events.into_iter().chain(omitted));
    }
    lines
}

/// Marks a PCR whose value differs from the replay of its events.
const DISAGREES: &str = "the event log does not give this value: the events of this PCR prove nothing";

fn omitted(events: usize) -> Option<String> {
    (events > 0).then(|| format!("          and {events} more that are not listed"))
}

/// Formats an event as one line.
fn line(event: &MeasuredEvent) -> String {
    let sign = match event.is_new {
        None => ' ',
        Some(true) => '+',
        Some(false) => '-',
    };
    let digest = event.digest.get(..16).unwrap_or(&event.digest);
    format!("        {sign} {digest}  {}", plain(&event.event))
}

/// Prints the result of `claviger hosts check`.
pub(super) fn say_checked(checked: &Checked, target: &Target) {
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
        compared_lines(baseline).iter().for_each(|line| say!("{line}"));
    }
    if checked.baselines.is_empty() {
        say!("  there is no baseline");
    }
    if checked.baseline.is_none() {
        say!("to accept these values as a new baseline:");
        say!("  {}", capture_command(checked, target));
    }
}

/// Compares a baseline with a host's values.
fn compared_lines(baseline: &Compared) -> Vec<String> {
    let state = if baseline.enabled { "" } else { " (disabled)" };
    if baseline.matches {
        return vec![format!("  baseline {}{state}: all values match", baseline.name)];
    }
    let mut lines = vec![format!("  baseline {}{state}:", baseline.name)];
    for differs in &baseline.differs {
        lines.push(format!("    PCR {:2}  {}", differs.pcr, differs.quoted.as_deref().unwrap_or("not quoted")));
        lines.push(format!("    expected {}", differs.expected));
        if differs.quoted.is_none() {
            lines.push("    the TPM did not sign this PCR: its events prove nothing".to_owned());
        } else if !differs.log_agrees {
            lines.push(format!("    {DISAGREES}"));
        }
        lines.extend(differs.events.iter().map(line));
        lines.extend(omitted(differs.omitted));
    }
    lines
}

/// The command that creates a baseline from exactly the shown evidence, with all PCRs that the host quoted.
fn capture_command(checked: &Checked, target: &Target) -> String {
    let mut command = format!("claviger baselines capture NAME --host {} --at {}", checked.host, checked.at);
    let further = checked.pcrs.0.iter().filter(|(pcr, value)| {
        // A PCR with the value zero was not extended; leave it out.
        !PcrSet::ALWAYS.contains(**pcr) && value.bytes().any(|digit| digit != b'0')
    });
    further.for_each(|(pcr, _)| command.push_str(&format!(" --pcr {pcr}")));
    // The command says what this one was told; what both find by themselves they find again.
    if let Some(config) = &target.config {
        command.push_str(&format!(" --config {}", config.display()));
    }
    if let Some(socket) = &target.socket {
        command.push_str(&format!(" --socket {}", socket.display()));
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::Differs;

    fn event(pcr: usize, is_new: Option<bool>) -> MeasuredEvent {
        MeasuredEvent { pcr, digest: "00".repeat(32), event: "EV_IPL initrd".to_owned(), is_new }
    }

    #[test]
    fn events_that_prove_nothing_are_marked() {
        let differs = |quoted: Option<&str>, log_agrees| Differs {
            pcr: 9,
            expected: "aa".to_owned(),
            quoted: quoted.map(str::to_owned),
            log_agrees,
            events: vec![event(9, Some(true))],
            omitted: 3,
        };
        let text = |differs: Differs| {
            let (name, differs) = ("base".to_owned(), vec![differs]);
            compared_lines(&Compared { name, enabled: true, matches: false, differs }).join("\n")
        };
        let proven = text(differs(Some("bb"), true));
        assert!(!proven.contains("prove nothing") && proven.contains("and 3 more that are not listed"), "{proven}");
        assert!(text(differs(Some("bb"), false)).contains(DISAGREES));
        assert!(text(differs(None, false)).contains("did not sign this PCR"));
    }

    #[test]
    fn a_baseline_whose_log_does_not_give_its_values_is_marked() {
        let shown: ShownBaseline = serde_json::from_value(serde_json::json!({
            "name": "base", "enabled": true, "added": 1, "pcrs": {"4": "aa", "9": "bb"},
            "events": [event(4, None)],
            "replayed": [{"pcr": 4, "log_agrees": true, "omitted": 2}, {"pcr": 9, "log_agrees": false, "omitted": 0}],
        }))
        .unwrap_or_else(|error| panic!("{error}"));
        let expected = [
            "PCR  4  aa",
            &line(&event(4, None)),
            "          and 2 more that are not listed",
            "PCR  9  bb",
            &format!("    {DISAGREES}"),
        ];
        assert_eq!(shown_lines(&shown), expected);
    }

    #[test]
    fn what_was_shown_is_what_the_command_captures() {
        let pcrs = [(0, "aa"), (4, "bb"), (9, "cc"), (11, "00")].map(|(pcr, value)| (pcr, value.to_owned()));
        let checked = Checked {
            host: "node".to_owned(),
            at: 1_800_000_000,
            endorsement_key: "ek".to_owned(),
            restart_count: 0,
            healthy: false,
            baseline: None,
            policies: Vec::new(),
            pcrs: Pcrs(pcrs.into_iter().collect()),
            baselines: Vec::new(),
        };
        let target = Target { config: Some("/etc/c.toml".into()), socket: None, json: false };
        assert_eq!(
            capture_command(&checked, &target),
            "claviger baselines capture NAME --host node --at 1800000000 --pcr 9 --config /etc/c.toml"
        );
    }
}
