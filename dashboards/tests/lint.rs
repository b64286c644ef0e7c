//! The dashboards pass the linter, and the linter finds every kind of fault in a broken copy.

#![allow(clippy::unwrap_used)]

use claviger_dashboards::lint::{lint, walk};
use claviger_dashboards::{dashboards, panels, variables};
use serde_json::{Value, json};

#[test]
fn the_dashboards_are_sound() {
    assert_eq!(lint(&dashboards()), Vec::<String>::new());
}

/// Breaks the first dashboard and returns the faults that the linter finds.
fn broken(breaking: impl FnOnce(&mut Value)) -> Vec<String> {
    let mut all = dashboards();
    breaking(&mut all[0]);
    lint(&all)
}

/// The first panel that is not a row. `nested` selects a panel inside a closed row.
fn panel(dashboard: &mut Value, nested: bool) -> &mut Value {
    let panels = dashboard["panels"].as_array_mut().unwrap();
    if nested {
        return &mut panels.iter_mut().find(|panel| panel["collapsed"] == true).unwrap()["panels"][0];
    }
    panels.iter_mut().find(|panel| panel["type"] != "row").unwrap()
}

fn variable<'a>(dashboard: &'a mut Value, name: &str) -> &'a mut Value {
    let all = dashboard["templating"]["list"].as_array_mut().unwrap();
    all.iter_mut().find(|variable| variable["name"] == name).unwrap()
}

#[test]
fn defects_of_a_dashboard_are_found() {
    type Breaking = fn(&mut Value);
    let cases: [(&str, Breaking); 19] = [
        ("uid is missing", |d| d["uid"] = json!("")),
        ("uid is missing or taken", |d| d["uid"] = json!("claviger-cluster")),
        ("no title or description", |d| d["description"] = json!("")),
        ("no tags", |d| d["tags"] = json!([])),
        ("can be edited", |d| d["editable"] = json!(true)),
        ("not the schema", |d| d["schemaVersion"] = json!(16)),
        ("data source is no variable", |d| variable(d, "datasource")["type"] = json!("custom")),
        ("no variable job", |d| variable(d, "job")["name"] = json!("work")),
        ("there is no variable instance", |d| variable(d, "instance")["name"] = json!("host")),
        ("does not use the data source", |d| variable(d, "job")["datasource"]["uid"] = json!("prometheus")),
        ("not several or all", |d| variable(d, "job")["multi"] = json!(false)),
        ("not several or all", |d| variable(d, "job")["allValue"] = json!("")),
        ("has no values", |d| variable(d, "job")["query"]["query"] = json!("")),
        ("no links", |d| d["links"] = json!([])),
        ("loses the variables", |d| d["links"][0]["includeVars"] = json!(false)),
        ("by tag leads nowhere", |d| d["links"][0]["tags"] = json!(["elsewhere"])),
        ("to nowhere leads nowhere", |d| {
            panel(d, false)["links"] = json!([{ "url": "/d/nowhere?${__url_time_range}&${__all_variables}" }]);
        }),
        ("loses the variables", |d| panel(d, false)["links"] = json!([{ "url": "/d/claviger-cluster" }])),
        ("leaves Grafana", |d| panel(d, false)["links"] = json!([{ "url": "http://example.com" }])),
    ];
    for (said, breaking) in cases {
        let findings = broken(breaking);
        assert!(findings.iter().any(|finding| finding.contains(said)), "nothing says \"{said}\": {findings:?}");
    }
}

#[test]
fn defects_of_a_panel_are_found_within_rows_too() {
    type Breaking = fn(&mut Value);
    let asks = |panel: &mut Value, from: &str, to: &str| {
        let expression = panel["targets"][0]["expr"].as_str().unwrap().replace(from, to);
        panel["targets"][0]["expr"] = json!(expression);
    };
    let cases: [(&str, Breaking); 14] = [
        ("no title", |p| p["title"] = json!(" ")),
        ("no description", |p| p["description"] = json!("")),
        ("no unit", |p| p["fieldConfig"]["defaults"]["unit"] = json!("")),
        ("not a kind of panel", |p| p["type"] = json!("someones-plugin")),
        ("does not use the data source", |p| p["datasource"]["uid"] = json!("prometheus")),
        ("a query does not use", |p| p["targets"][0]["datasource"]["uid"] = json!("prometheus")),
        ("asks nothing", |p| p["targets"] = json!([])),
        ("asks for no series", |p| p["targets"][0]["expr"] = json!("1 + 1")),
        ("the same letter", |p| {
            let first = p["targets"][0].clone();
            p["targets"].as_array_mut().unwrap().push(first);
        }),
        ("without a legend", |p| {
            p["type"] = json!("timeseries");
            p["targets"][0]["legendFormat"] = json!("");
        }),
        ("id of", |p| p["id"] = json!(0)),
        ("has no place", |p| p["gridPos"] = json!({})),
        ("does not fit", |p| p["gridPos"]["x"] = json!(23)),
        ("lies on", |p| {
            p["gridPos"]["w"] = json!(24);
            p["gridPos"]["h"] = json!(30);
        }),
    ];
    for nested in [false, true] {
        for (said, breaking) in cases {
            let findings = broken(|dashboard| breaking(panel(dashboard, nested)));
            assert!(findings.iter().any(|finding| finding.contains(said)), "nothing says \"{said}\": {findings:?}");
        }
        for (said, from, to) in [
            ("without job=~", "job=~\"$job\", ", ""),
            ("without instance=~", "instance=~\"$instance\"", "instance=\"$instance\""),
            ("there is no variable host", "$instance", "$host"),
        ] {
            let findings = broken(|dashboard| asks(panel(dashboard, nested), from, to));
            assert!(findings.iter().any(|finding| finding.contains(said)), "nothing says \"{said}\": {findings:?}");
        }
    }
    let findings = broken(|dashboard| asks(panel(dashboard, false), "$__rate_interval", "5m"));
    assert!(findings.iter().any(|finding| finding.contains("not over $__rate_interval")), "{findings:?}");
}

#[test]
fn two_panels_with_one_id_are_found() {
    let findings = broken(|dashboard| {
        let id = panel(dashboard, false)["id"].clone();
        panel(dashboard, true)["id"] = id;
    });
    assert!(findings.iter().any(|finding| finding.contains("missing or taken")), "{findings:?}");
}

#[test]
fn queries_can_be_asked_without_grafana() {
    let all = panels();
    assert_eq!(all.len(), dashboards().iter().flat_map(walk).filter(|panel| panel["type"] != "row").count());
    for query in &all {
        assert!(!query.expressions.is_empty());
        for filled in query.filled("1m") {
            assert!(!filled.contains('$'), "{}: {filled}", query.title);
        }
    }
    let versions = all.iter().find(|query| query.title == "Versions").unwrap();
    assert_eq!(versions.expressions.len(), 2, "a panel within a row");
    let ceiling = all.iter().find(|query| query.title == "Ceiling").unwrap();
    assert!(ceiling.filled("1m")[0].starts_with("((vector(0) > 0) or sum("), "{ceiling:?}");
    let names: Vec<_> = variables().into_iter().map(|v| (v.name.clone(), v.filled(), v.label)).collect();
    assert!(names.contains(&(
        "hsm".to_owned(),
        r#"claviger_hsm_state{job=~".*", instance=~".*"}"#.to_owned(),
        "hsm".to_owned()
    )));
    assert_eq!(names.len(), 7);
}
