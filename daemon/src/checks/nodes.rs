//! Checks of etcd and of the nodes that share a state in it.

use std::collections::BTreeMap;

use claviger_protocol::health::BACKDATED_SECONDS;

use super::finding::Finding;
use crate::config::Config;
use crate::nodes::presence::REWRITTEN;
use crate::nodes::record::{self, ListedNode, NodeRecord};
use crate::store::{BoardError, EtcdSettings, State, probe};
use crate::sys::clock::unix_now;

/// Difference of clocks in seconds that is named. From [`BACKDATED_SECONDS`] on, nodes refuse each other's health certificates.
const CLOCKS_DIFFER: i64 = 60;

/// Checks each endpoint of etcd, and the nodes. Blocks on etcd.
pub(crate) fn examine(config: &Config) -> Vec<Finding> {
    let Some(settings) = EtcdSettings::of(config) else { return Vec::new() };
    let answers = match probe(&settings) {
        Ok(answers) => answers,
        Err(error) => {
            return vec![Finding::error(
                "etcd",
                format!("etcd cannot be asked: {error}"),
                "see that this user may open connections",
            )];
        }
    };
    let reachable = answers.iter().filter(|answer| answer.version.is_ok()).count();
    let mut findings = Vec::new();
    for answer in &answers {
        match &answer.version {
            Ok(_) => {}
            Err(problem) => {
                let what = format!("{}: {problem}", answer.endpoint);
                let todo =
                    "see that this member of etcd runs and has a majority, and to the network and the files of [etcd]";
                let level = if reachable == 0 { Finding::error } else { Finding::warning };
                findings.push(level("etcd", what, todo.to_owned()));
            }
        }
    }
    if reachable == 0 {
        return findings;
    }
    if answers.len() == 1 {
        let what = "only one endpoint of etcd is named: when it is away, nothing can be changed".to_owned();
        findings.push(Finding::warning("etcd", what, "name all members of etcd in etcd.endpoints"));
    }
    if findings.is_empty() {
        let versions: Vec<_> = answers.iter().filter_map(|answer| answer.version.as_deref().ok()).collect();
        findings.push(Finding::ok(
            "etcd",
            format!("all {} endpoints answer, versions: {}", answers.len(), versions.join(", ")),
        ));
    }
    match listed(config) {
        Ok(nodes) => findings.extend(of_nodes(&nodes, unix_now())),
        Err(error) => {
            let what = format!("the nodes cannot be listed: {error}");
            findings.push(Finding::warning("nodes", what, "see the check of etcd"));
        }
    }
    findings
}

fn listed(config: &Config) -> Result<Vec<ListedNode>, BoardError> {
    let view = State::view_of(config).map_err(|error| BoardError::Unreachable(error.to_string()))?;
    record::list_of(&view.state)
}

/// Compares the clock of a running node with `now`, by the time at which it last wrote its record.
fn of_clock(node: &NodeRecord, now: i64) -> Option<Finding> {
    let ahead = node.written.saturating_sub(now);
    // The record may be this old. Writing takes some seconds, too, which are below what is named.
    let behind = now.saturating_sub(node.written).saturating_sub(REWRITTEN.as_secs().cast_signed());
    let (by, way) = if ahead > behind { (ahead, "ahead of") } else { (behind, "behind") };
    if by < CLOCKS_DIFFER {
        return None;
    }
    let level = if by < BACKDATED_SECONDS { Finding::warning } else { Finding::error };
    let what = format!("the clock of {} is at least {by} seconds {way} this machine's", node.name);
    let todo =
        "synchronise the clocks of all nodes: beyond five minutes, nodes refuse each other's health certificates";
    Some(level("clock", what, todo.to_owned()))
}

/// Checks that the nodes have one version, the newest state, all keys, and the time `now`.
fn of_nodes(nodes: &[ListedNode], now: i64) -> Vec<Finding> {
    let mut findings = Vec::new();
    let running: Vec<_> = nodes.iter().filter(|node| node.running).map(|node| &node.record).collect();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for node in &running {
        versions.entry(&node.version).or_default().push(&node.name);
    }
    if versions.len() > 1 {
        let all: Vec<_> = versions.iter().map(|(version, nodes)| format!("{version} ({})", nodes.join(", "))).collect();
        let what = format!("the nodes have different versions: {}", all.join("; "));
        findings.push(Finding::warning("nodes", what, "that is right while they are updated one after the other only"));
    }
    let newest = running.iter().map(|node| node.revision).max().unwrap_or_default();
    for node in &running {
        // A node writes its record some seconds after a change.
        if node.revision < newest {
            let what = format!(
                "{} has told revision {} of the state, and the newest one is {newest}",
                node.name, node.revision
            );
            findings.push(Finding::warning(
                "nodes",
                what,
                "ask again in ten seconds; if it stays so, see its status page",
            ));
        }
        findings.extend(of_clock(node, now));
        for missing in &node.missing {
            let what = format!("node {} misses a key on an HSM: {missing}", node.name);
            let todo = "replicate the key to this token with the vendor's tools, or remove the certificate";
            findings.push(Finding::error("key", what, todo));
        }
    }
    for node in nodes.iter().filter(|node| !node.running) {
        let what = format!("{} does not run, or does not reach etcd", node.record.name);
        let todo = format!("see to it, or claviger nodes forget {}", node.record.name);
        findings.push(Finding::warning("nodes", what, todo));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(
            "nodes",
            format!("{} nodes run, with one version, one time and all keys", running.len()),
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checks::Level;

    fn node(name: &str, running: bool, change: impl FnOnce(&mut NodeRecord)) -> ListedNode {
        let mut record = NodeRecord {
            v: 1,
            name: name.to_owned(),
            version: "1.0".to_owned(),
            joined: 1,
            since: 1,
            written: 1,
            revision: 7,
            members: 3,
            members_up: 3,
            keys: 3,
            missing: Vec::new(),
        };
        change(&mut record);
        ListedNode { record, running }
    }

    #[test]
    fn what_differs_between_nodes_is_named() {
        let good = [node("a", true, |_| ()), node("b", true, |_| ())];
        let found = of_nodes(&good, 1);
        assert!(
            found.len() == 1 && found[0].level == Level::Ok && found[0].what.starts_with("2 nodes run"),
            "{found:?}"
        );
        let bad = [
            node("a", true, |_| ()),
            node("b", true, |of| (of.version, of.revision) = ("1.1".to_owned(), 5)),
            node("c", true, |of| of.missing = vec!["hsm-a: the signing key 07".to_owned()]),
            node("d", false, |of| of.version = "0.9".to_owned()),
        ];
        let found: Vec<_> = of_nodes(&bad, 1).into_iter().map(|finding| (finding.level, finding.what)).collect();
        for (level, expected) in [
            (Level::Warning, "different versions: 1.0 (a, c); 1.1 (b)"),
            (Level::Warning, "b has told revision 5"),
            (Level::Error, "node c misses a key on an HSM: hsm-a: the signing key 07"),
            (Level::Warning, "d does not run"),
        ] {
            assert!(found.iter().any(|(of, what)| *of == level && what.contains(expected)), "{expected}: {found:?}");
        }
        assert_eq!(found.len(), 4);
    }

    #[test]
    fn a_clock_that_differs_is_named_and_an_old_record_is_not() {
        let clock = |written: i64| {
            let found = of_nodes(&[node("a", true, |of| of.written = written)], 10_000);
            (found[0].level, found[0].what.clone())
        };
        // Written now, and as long ago as the record of a node may be, and some seconds that writing took.
        for written in [10_000, 9_970, 9_960, 10_020] {
            assert_eq!(clock(written).0, Level::Ok, "{written}");
        }
        for (written, level, expected) in [
            (10_060, Level::Warning, "a is at least 60 seconds ahead"),
            (9_910, Level::Warning, "a is at least 60 seconds behind"),
            (10_600, Level::Error, "a is at least 600 seconds ahead"),
            (9_000, Level::Error, "a is at least 970 seconds behind"),
            (i64::MIN, Level::Error, "behind"),
            (i64::MAX, Level::Error, "ahead"),
        ] {
            let (of, what) = clock(written);
            assert!(of == level && what.contains(expected), "{written}: {of:?} {what}");
        }
        // A node that does not run wrote its record at any time.
        let stopped = of_nodes(&[node("a", false, |_| ())], 10_000);
        assert!(stopped.len() == 1 && stopped[0].what.contains("does not run"), "{stopped:?}");
    }
}
