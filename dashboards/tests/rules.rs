//! Prometheus and Alertmanager accept the rules and configurations, and a test shows each alert both firing and silent.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

use claviger_dashboards::{Alert, Rule, groups, root};

fn alerts() -> Vec<Alert> {
    let rules = groups().into_iter().flat_map(|group| group.rules);
    rules.filter_map(|rule| if let Rule::Alert(alert) = rule { Some(alert) } else { None }).collect()
}

/// The test files for promtool.
fn cases() -> Vec<PathBuf> {
    let folder = root().join("dashboards/prometheus/tests");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Runs a tool in `dashboards`. Panics with the tool's output if the tool fails.
fn content(tool: &str, arguments: &[&str]) {
    let output = Command::new(tool).args(arguments).current_dir(root().join("dashboards")).output();
    let output = output.unwrap_or_else(|error| {
        panic!("{tool}: {error}; it comes with Debian's prometheus and prometheus-alertmanager")
    });
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{tool} {arguments:?}:\n{said}");
}

#[test]
fn promtool_accepts_the_rules() {
    content("promtool", &["check", "rules", "--lint=all", "--lint-fatal", "prometheus/claviger.rules.yml"]);
}

#[test]
fn promtool_accepts_the_configuration() {
    content("promtool", &["check", "config", "prometheus/prometheus.yml"]);
}

#[test]
fn amtool_accepts_the_configuration() {
    content("amtool", &["check-config", "alertmanager/alertmanager.yml"]);
    for (severity, receiver) in [("critical", "on-call"), ("warning", "tickets")] {
        let severity = format!("severity={severity}");
        let receiver = format!("--verify.receivers={receiver}");
        let route = ["config", "routes", "test", "--config.file=alertmanager/alertmanager.yml", &receiver, &severity];
        content("amtool", &route);
    }
}

#[test]
fn alerts_fire_and_stay_silent() {
    let files = cases();
    let files = files.iter().map(|path| path.to_str().unwrap());
    content("promtool", &["test", "rules"].into_iter().chain(files).collect::<Vec<_>>());
}

#[test]
fn every_alert_has_both_kinds_of_cases() {
    // Number of tests in which each alert fires with its text, and in which it is silent.
    let mut seen: BTreeMap<String, [u32; 2]> = BTreeMap::new();
    for path in cases() {
        let mut alert = None;
        for line in std::fs::read_to_string(path).unwrap().lines().map(str::trim) {
            if let Some(name) = line.strip_prefix("alertname: ") {
                alert = Some(name.to_owned());
            } else if let Some(rest) = line.strip_prefix("exp_alerts:") {
                let silent = usize::from(rest.trim() == "[]");
                seen.entry(alert.take().expect("a name before the expectation")).or_default()[silent] += 1;
            }
        }
    }
    let names: BTreeSet<_> = alerts().iter().map(|alert| alert.name.to_owned()).collect();
    assert_eq!(seen.keys().cloned().collect::<BTreeSet<_>>(), names);
    for (name, [firing, silent]) in seen {
        assert!(firing > 0 && silent > 0, "{name}: {firing} cases in which it fires, {silent} in which it does not");
    }
}

#[test]
fn every_alert_says_how_urgent_it_is_and_what_to_do() {
    let mut names = BTreeSet::new();
    for alert in alerts() {
        assert!(names.insert(alert.name), "{} twice", alert.name);
        assert!(["critical", "warning"].contains(&alert.severity), "{}", alert.name);
        assert!(!alert.summary.is_empty() && alert.description.ends_with('.'), "{}", alert.name);
        // A number without a format is hard to read: it must be a share, a time, or rounded.
        let text = &alert.description;
        assert!(!text.contains("{{ $value }}"), "{}: not for people", alert.name);
    }
}

#[test]
fn inhibitions_name_alerts_that_there_are() {
    let names: BTreeSet<_> = alerts().iter().map(|alert| alert.name).collect();
    let text = std::fs::read_to_string(root().join("dashboards/alertmanager/alertmanager.yml")).unwrap();
    for word in text.split(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '*') {
        if word.starts_with("Claviger") && word.len() > "Claviger".len() {
            let known = match word.strip_suffix(".*") {
                Some(start) => names.iter().any(|name| name.starts_with(start)),
                None => names.contains(word),
            };
            assert!(known, "{word}");
        }
    }
}

#[test]
fn the_runbook_has_a_section_for_every_alert_and_no_other() {
    let page = std::fs::read_to_string(root().join("docs/runbook.md")).unwrap();
    let sections: Vec<_> = page.split("\n## Claviger").skip(1).collect();
    let headings: Vec<_> = sections.iter().map(|s| format!("Claviger{}", s.lines().next().unwrap())).collect();
    let unique: BTreeSet<_> = headings.iter().cloned().collect();
    assert_eq!(unique.len(), headings.len(), "a section twice");
    assert_eq!(unique, alerts().iter().map(|alert| alert.name.to_owned()).collect());
    for (section, heading) in sections.iter().zip(&headings) {
        for part in ["**Means**", "**Felt**", "**Look**", "**Do**"] {
            assert!(section.contains(part), "{heading} has no {part}");
        }
    }
    for alert in alerts() {
        assert_eq!(alert.runbook("docs/runbook.md"), format!("docs/runbook.md#{}", alert.name.to_lowercase()));
        assert!(
            claviger_dashboards::rules("https://wiki/runbook")
                .contains(&format!("runbook_url: https://wiki/runbook#{}\n", alert.name.to_lowercase()))
        );
    }
}
