//! `claviger hsm …`: the members of the cluster.

use serde_json::Value;

use super::confirm;
use super::table::{date, table, text};
use super::target::{Target, ask, print};
use crate::admin::Command;
use crate::sys::failure::Failure;
use crate::sys::print::say;

/// `claviger hsm …`
#[derive(Debug, clap::Subcommand)]
pub enum Hsm {
    /// Show the members of the cluster: state, latency, sessions, last error
    #[command(after_help = "Example: claviger hsm list\n\
        SESSIONS are busy/open/wanted, and +N that hang. docs/cluster.md explains the states.")]
    List {
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Give a member no new calls, and let it finish the calls in progress
    #[command(after_help = "Example: claviger hsm drain hsm-a\n\
        It is drained when `claviger hsm list` says so. It stays drained until it is resumed or the daemon restarts.\n\
        At a terminal, the last member that serves is drained only with --force; a script is taken at its word.")]
    Drain {
        /// The member's name
        name: String,
        /// Drain it even if no other member serves: no machine gets its keys then
        #[arg(long)]
        force: bool,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Return a drained member to service
    #[command(after_help = "Example: claviger hsm resume hsm-a")]
    Resume {
        /// The member's name
        name: String,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Run the known-answer tests on a member, in any state
    #[command(after_help = "Example: claviger hsm probe hsm-a")]
    Probe {
        /// The member's name
        name: String,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
}

/// Runs `claviger hsm …`.
///
/// # Errors
/// The problem and its remedy.
pub async fn hsm(command: Hsm) -> Result<(), Failure> {
    match command {
        Hsm::List { target } => {
            let reply = ask(&target, &Command::ListHsms).await?;
            print(&target, &reply, || {
                let rows = reply.as_array().map(Vec::as_slice).unwrap_or_default();
                let columns = [
                    ("NAME", "name"),
                    ("STATE", "state"),
                    ("SINCE", "since"),
                    ("TIER", "priority"),
                    ("WEIGHT", "weight"),
                    ("LATENCY", "latency"),
                    ("IN FLIGHT", "in_flight"),
                    ("SESSIONS", "sessions"),
                    ("CLOSED", "closings"),
                    ("LAST ERROR", "last_error"),
                ];
                table(&rows.iter().map(for_people).collect(), &columns);
                for member in rows.iter().filter(|member| member["remedy"].is_string() && member["state"] != "up") {
                    say!("{}: {}", text(member, "name"), text(member, "remedy"));
                }
            });
        }
        Hsm::Drain { name, force, target } => {
            // Nobody can be asked where there is no terminal.
            let force = force || !confirm::can_ask();
            let reply = ask(&target, &Command::DrainHsm { name, force }).await?;
            print(&target, &reply, || {
                say!("{} is {}, {} calls in flight", text(&reply, "name"), text(&reply, "state"), reply["in_flight"]);
            });
        }
        Hsm::Resume { name, target } => {
            let reply = ask(&target, &Command::ResumeHsm { name }).await?;
            print(&target, &reply, || say!("{} is {}", text(&reply, "name"), text(&reply, "state")));
        }
        Hsm::Probe { name, target } => {
            let reply = ask(&target, &Command::ProbeHsm { name }).await?;
            print(&target, &reply, || {
                let milliseconds = reply["seconds"].as_f64().unwrap_or_default() * 1e3;
                say!("{} decrypts and signs: {milliseconds:.1} ms", text(&reply, "name"));
            });
        }
    }
    Ok(())
}

/// A member as a table row.
fn for_people(member: &Value) -> Value {
    let mut row = member.clone();
    let sessions = &member["sessions"];
    let stuck = sessions["stuck"].as_u64().unwrap_or_default();
    let stuck = if stuck > 0 { format!(" +{stuck}") } else { String::new() };
    row["sessions"] = format!("{}/{}/{}{stuck}", sessions["busy"], sessions["open"], sessions["wanted"]).into();
    row["latency"] = format!("{:.1} ms", member["latency_seconds"].as_f64().unwrap_or_default() * 1e3).into();
    if let (Value::String(error), Some(at)) = (&member["last_error"], member["last_error_at"].as_i64()) {
        row["last_error"] = format!("{} {error}", date(at)).into();
    }
    row
}
