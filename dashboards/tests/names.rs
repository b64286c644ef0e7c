//! Every metric in panels, rules and pages is exported by the daemon, and every exported metric is used.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use claviger::observe::metrics::ALL;
use claviger_client::agent::counters::Counters;
use claviger_dashboards::exported::Exported;
use claviger_dashboards::lint::walk;
use claviger_dashboards::{Rule, dashboards, groups, panels_of, root, variables};
use serde_json::{Value, json};

fn rules() -> Vec<Rule> {
    groups().into_iter().flat_map(|group| group.rules).collect()
}

fn expression(rule: &Rule) -> &str {
    match rule {
        Rule::Recording(rule) => &rule.expression,
        Rule::Alert(rule) => &rule.expression,
    }
}

/// The missing series and labels that a dashboard uses, including those in legends.
fn missing_in(dashboard: &Value) -> Vec<String> {
    let exported = Exported::new();
    let mut missing: Vec<_> = panels_of(dashboard)
        .into_iter()
        .flat_map(|query| query.expressions)
        .flat_map(|expression| exported.missing(&expression))
        .collect();
    for target in walk(dashboard).into_iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten()) {
        let (legend, expression) = (target["legendFormat"].as_str().unwrap(), target["expr"].as_str().unwrap());
        for label in between(legend, "{{", "}}") {
            if !exported.has_label(expression, label) {
                missing.push(format!("the legend's {label} is no label of {expression}"));
            }
        }
    }
    missing
}

fn between<'a>(text: &'a str, opening: &str, closing: &str) -> Vec<&'a str> {
    text.split(opening).skip(1).filter_map(|rest| Some(rest.split_once(closing)?.0.trim())).collect()
}

#[test]
fn panels_ask_for_what_there_is() {
    for dashboard in dashboards() {
        assert_eq!(missing_in(&dashboard), Vec::<String>::new());
    }
    let exported = Exported::new();
    for variable in variables() {
        assert_eq!(exported.missing(&variable.selector), Vec::<String>::new());
        assert!(exported.has_label(&variable.selector, &variable.label));
    }
}

#[test]
fn a_metric_or_label_of_another_name_is_found() {
    let renamed = |from: &str, to: &str| {
        let text = dashboards()[0].to_string();
        assert!(text.contains(from), "{from}");
        missing_in(&serde_json::from_str(&text.replace(from, to)).unwrap())
    };
    let found = |missing: Vec<String>, said: &str| assert!(missing.iter().any(|m| m.contains(said)), "{missing:?}");
    found(renamed("claviger_queue_waiting", "claviger_queue_length"), "claviger_queue_length is not exported");
    // A panel inside a closed row, and the suffixes of histograms.
    found(renamed("process_threads", "process_thread"), "process_thread is not exported");
    found(renamed("claviger_batch_items_bucket", "claviger_batch_items"), "claviger_batch_items is not exported");
    found(renamed("claviger_releases_total", "claviger_releases_total_sum"), "claviger_releases_total_sum is not");
    found(renamed("instance:claviger_releases_failed:rate30d", "instance:x:rate30d"), "instance:x:rate30d is not");
    found(renamed("class=\\\"success\\\"", "kind=\\\"success\\\""), "has no label kind");
    found(renamed("sum by (reason)", "sum by (cause)"), "has the label cause");
    found(renamed("{{reason}}", "{{cause}}"), "the legend's cause");
}

#[test]
fn rules_ask_for_what_there_is() {
    let exported = Exported::new();
    for rule in rules() {
        assert_eq!(exported.missing(expression(&rule)), Vec::<String>::new());
        if let Rule::Alert(alert) = &rule {
            let texts = format!("{} {}", alert.summary, alert.description);
            for label in between(&texts, "{{ $labels.", "}}") {
                assert!(exported.has_label(&alert.expression, label), "{}: {label}", alert.name);
            }
        }
    }
}

/// The pages that are written by hand.
fn pages() -> Vec<(String, String)> {
    let folder = std::fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let paths = folder.filter(|path| path.extension().is_some_and(|e| e == "md") && !path.ends_with("metrics.md"));
    let paths = paths.chain([root().join("README.md"), root().join("dashboards/README.md")]);
    paths.map(|path| (path.display().to_string(), std::fs::read_to_string(&path).unwrap())).collect()
}

#[test]
fn everything_that_is_exported_is_looked_at() {
    let exported = Exported::new();
    let pages = pages();
    let mut used: BTreeSet<&str> = rules().iter().flat_map(|rule| exported.metrics(expression(rule))).collect();
    for query in dashboards().iter().flat_map(panels_of) {
        used.extend(query.expressions.iter().flat_map(|expression| exported.metrics(expression)));
    }
    let unused: Vec<_> = ALL
        .iter()
        .map(|metric| metric.name)
        .filter(|name| !used.contains(name) && !pages.iter().any(|(_, text)| text.contains(name)))
        .collect();
    assert_eq!(unused, Vec::<&str>::new(), "neither panel nor rule nor page uses them");
}

#[test]
fn pages_name_what_there_is() {
    let exported = Exported::new();
    let recorded: BTreeSet<_> = groups()
        .into_iter()
        .flat_map(|group| group.rules)
        .filter_map(|rule| match rule {
            Rule::Recording(recording) => Some(recording.name),
            Rule::Alert(_) => None,
        })
        .collect();
    // The crates of the project have the same prefix as the metrics.
    let crates: BTreeSet<_> = ["claviger_hsm", "claviger_protocol", "claviger_dashboards"].into();
    // A host's agent has a page of its own.
    let agent = Counters::default().page();
    for (path, text) in pages() {
        for (at, _) in text.match_indices("claviger_") {
            let end = text[at..].find(|c: char| !c.is_ascii_alphanumeric() && c != '_').map_or(text.len(), |n| at + n);
            let name = &text[at..end];
            // The file of a package has its version, or a pattern of the shell, after the name.
            let version = &text[at + "claviger_".len()..];
            let is_package = version.starts_with(|c: char| c.is_ascii_digit() || c == '*');
            if is_package || crates.contains(name) || (name.starts_with("claviger_agent_") && agent.contains(name)) {
                continue;
            }
            if text[..at].ends_with(':') {
                let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
                let from = text[..at].rfind(|c| !is_part(c)).map_or(0, |n| n + 1);
                let to = text[at..].find(|c| !is_part(c)).map_or(text.len(), |n| at + n);
                let name = &text[from..to];
                assert!(recorded.contains(name), "{path} names {name}, which no rule records");
                continue;
            }
            let histogram = format!("{name}_bucket");
            let known = [name, &histogram].iter().any(|name| exported.missing(name).is_empty());
            assert!(known, "{path} names {name}, which is not exported");
        }
    }
}

#[test]
fn a_broken_dashboard_is_not_silent() {
    let broken = json!({ "uid": "x", "panels": [{ "type": "row", "title": "r", "panels": [
        { "type": "stat", "title": "t", "targets": [{ "expr": "nothing_such", "legendFormat": "" }] },
    ] }] });
    assert_eq!(missing_in(&broken), ["nothing_such is not exported"]);
}
