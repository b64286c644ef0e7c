//! `claviger nodes …`: the nodes that share a state in etcd.

use serde_json::Value;

use super::table::{table, text};
use super::target::{Target, ask, print};
use crate::admin::Command;
use crate::sys::failure::Failure;
use crate::sys::print::say;

/// `claviger nodes …`
#[derive(Debug, clap::Subcommand)]
pub enum Nodes {
    /// Show the nodes: version, start, last revision of the state, members that are up
    #[command(after_help = "Example: claviger nodes list\n\
        REVISION is the last change of the state that the node has; nodes that are connected have the same one.")]
    List {
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
    /// Delete the record and the counts of a node that does not run any more
    #[command(after_help = "Example: claviger nodes forget hgs-3")]
    Forget {
        /// The node's name
        name: String,
        /// The daemon to contact.
        #[command(flatten)]
        target: Target,
    },
}

/// Runs `claviger nodes …`.
///
/// # Errors
/// The problem and its remedy.
pub async fn nodes(command: Nodes) -> Result<(), Failure> {
    match command {
        Nodes::List { target } => {
            let reply = ask(&target, &Command::ListNodes).await?;
            print(&target, &reply, || {
                let rows = reply.as_array().map(Vec::as_slice).unwrap_or_default();
                let columns = [
                    ("NAME", "name"),
                    ("RUNNING", "running"),
                    ("VERSION", "version"),
                    ("SINCE", "since"),
                    ("REVISION", "revision"),
                    ("HSMS UP", "up"),
                ];
                table(&rows.iter().map(for_people).collect(), &columns);
                for node in rows {
                    for missing in node["missing"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                        say!("{}: a key is missing at {missing}", text(node, "name"));
                    }
                }
            });
        }
        Nodes::Forget { name, target } => {
            let reply = ask(&target, &Command::ForgetNode { name }).await?;
            print(&target, &reply, || say!("the node {} is forgotten", text(&reply, "name")));
        }
    }
    Ok(())
}

/// A node as a table row.
fn for_people(node: &Value) -> Value {
    let mut row = node.clone();
    row["up"] = format!("{}/{}", node["members_up"], node["members"]).into();
    row
}
