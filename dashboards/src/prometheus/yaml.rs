//! Formats rules as YAML for Prometheus.

use std::fmt::Write;

use super::rule::{Group, Rule};

/// Formats the rules file. `regenerate` is the command that makes it, `runbook` the address of the runbook.
pub(crate) fn yaml(groups: &[Group], regenerate: &str, runbook: &str) -> String {
    let mut text = format!("# Generated from dashboards/src/prometheus: {regenerate}\ngroups:\n");
    for group in groups {
        line(&mut text, 1, &format!("- name: {}", group.name));
        if let Some(interval) = group.interval {
            line(&mut text, 2, &format!("interval: {interval}"));
        }
        line(&mut text, 2, "rules:");
        for rule in &group.rules {
            match rule {
                Rule::Recording(rule) => {
                    line(&mut text, 3, &format!("- record: {}", rule.name));
                    expression(&mut text, &rule.expression);
                }
                Rule::Alert(rule) => {
                    line(&mut text, 3, &format!("- alert: {}", rule.name));
                    expression(&mut text, &rule.expression);
                    line(&mut text, 4, &format!("for: {}", rule.wait));
                    line(&mut text, 4, "labels:");
                    line(&mut text, 5, &format!("severity: {}", rule.severity));
                    line(&mut text, 4, "annotations:");
                    line(&mut text, 5, &format!("summary: {}", quoted(rule.summary)));
                    line(&mut text, 5, &format!("description: {}", quoted(&rule.description)));
                    line(&mut text, 5, &format!("runbook_url: {}", rule.runbook(runbook)));
                }
            }
        }
    }
    text
}

fn line(text: &mut String, depth: usize, content: &str) {
    // A write to a string cannot fail.
    let _ = writeln!(text, "{:indent$}{content}", "", indent = depth * 2);
}

/// Writes an expression as a block, which needs no quotes.
fn expression(text: &mut String, expression: &str) {
    line(text, 4, "expr: |");
    expression.lines().for_each(|part| line(text, 5, part));
}

/// Quotes a value. A JSON string is also a double-quoted YAML string.
fn quoted(value: &str) -> String {
    serde_json::Value::from(value).to_string()
}
