//! Finds faults in dashboards: the rules of Grafana's dashboard linter and some more. Panels inside rows are checked as
//! well.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::promql::uses;

/// A fault as text, with its place.
pub type Finding = String;

const DATASOURCE: &str = "${datasource}";
/// Functions whose range must fit the scrape interval and the zoom.
const RATES: [&str; 3] = ["rate", "irate", "increase"];

/// Every panel of a dashboard: rows, and the panels inside them.
#[must_use]
pub fn walk(dashboard: &Value) -> Vec<&Value> {
    let mut all = Vec::new();
    for panel in list(&dashboard["panels"]) {
        all.push(panel);
        all.extend(walk(panel));
    }
    all
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The faults of a set of dashboards.
#[must_use]
pub fn lint(dashboards: &[Value]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut uids = BTreeSet::new();
    for dashboard in dashboards {
        let title = text(&dashboard["title"]);
        let mut found = |what: String| findings.push(format!("{title}: {what}"));
        if text(&dashboard["uid"]).is_empty() || !uids.insert(text(&dashboard["uid"])) {
            found("its uid is missing or taken".to_owned());
        }
        head(dashboard, &mut found);
        variables(dashboard, &mut found);
        links(dashboard, dashboards, &mut found);
        ids(dashboard, &mut found);
        places(dashboard, &mut found);
        for panel in walk(dashboard) {
            let name = text(&panel["title"]).to_owned();
            let mut found = |what: &str| found(format!("panel \"{name}\": {what}"));
            if name.trim().is_empty() {
                found("no title");
            }
            if panel["type"] != "row" {
                self::panel(panel, &mut found);
            }
        }
    }
    findings
}

fn head(dashboard: &Value, found: &mut impl FnMut(String)) {
    if text(&dashboard["title"]).is_empty() || text(&dashboard["description"]).is_empty() {
        found("no title or description".to_owned());
    }
    if list(&dashboard["tags"]).is_empty() {
        found("no tags".to_owned());
    }
    if dashboard["editable"] != false {
        found("can be edited, which the next import would undo".to_owned());
    }
    // Grafana 10.3 introduced version 39.
    if !dashboard["schemaVersion"].as_u64().is_some_and(|version| (36..=41).contains(&version)) {
        found("not the schema of Grafana 10 or 11".to_owned());
    }
}

fn variables(dashboard: &Value, found: &mut impl FnMut(String)) {
    let all = list(&dashboard["templating"]["list"]);
    let named = |name: &str| all.iter().find(|variable| variable["name"] == name);
    if !named("datasource").is_some_and(|v| v["type"] == "datasource" && v["query"] == "prometheus") {
        found("the data source is no variable".to_owned());
    }
    for name in ["job", "instance"] {
        if named(name).is_none() {
            found(format!("no variable {name}"));
        }
    }
    for variable in all.iter().filter(|variable| variable["type"] == "query") {
        let name = text(&variable["name"]);
        if variable["datasource"]["uid"] != DATASOURCE {
            found(format!("variable {name} does not use the data source that is chosen"));
        }
        if variable["multi"] != true || variable["includeAll"] != true || variable["allValue"] != ".+" {
            found(format!("of variable {name} not several or all values can be chosen"));
        }
        if !text(&variable["query"]["query"]).starts_with("label_values(") {
            found(format!("variable {name} has no values"));
        }
    }
    let names: BTreeSet<_> = all.iter().map(|variable| text(&variable["name"])).collect();
    for expression in walk(dashboard).into_iter().flat_map(expressions) {
        for part in expression.split('$').skip(1) {
            let part = part.trim_start_matches('{');
            let end = part.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(part.len());
            if !part.starts_with("__") && !names.contains(&part[..end]) {
                found(format!("there is no variable {}", &part[..end]));
            }
        }
    }
}

fn links(dashboard: &Value, dashboards: &[Value], found: &mut impl FnMut(String)) {
    let own = text(&dashboard["uid"]);
    let others = || dashboards.iter().filter(|other| text(&other["uid"]) != own);
    if list(&dashboard["links"]).is_empty() {
        found("no links to the other dashboards".to_owned());
    }
    for link in list(&dashboard["links"]) {
        if link["includeVars"] != true || link["keepTime"] != true {
            found("a link loses the variables or the time".to_owned());
        }
        let tags = list(&link["tags"]);
        if link["type"] == "dashboards" && !others().any(|o| tags.iter().all(|tag| list(&o["tags"]).contains(tag))) {
            found("a link by tag leads nowhere".to_owned());
        }
    }
    let of_panels = walk(dashboard).into_iter().flat_map(|panel| list(&panel["links"]));
    for url in list(&dashboard["links"]).iter().chain(of_panels).map(|link| text(&link["url"])) {
        let Some((uid, query)) = url.strip_prefix("/d/").map(|rest| rest.split_once('?').unwrap_or((rest, ""))) else {
            if !url.is_empty() {
                found(format!("the link {url} leaves Grafana"));
            }
            continue;
        };
        if !others().any(|other| text(&other["uid"]) == uid) {
            found(format!("the link to {uid} leads nowhere"));
        }
        if !query.contains("${__url_time_range}") || !query.contains("${__all_variables}") {
            found(format!("the link to {uid} loses the variables or the time"));
        }
    }
}

fn ids(dashboard: &Value, found: &mut impl FnMut(String)) {
    let mut ids = BTreeSet::new();
    for panel in walk(dashboard) {
        if !panel["id"].as_u64().is_some_and(|id| id > 0 && ids.insert(id)) {
            found(format!("the id of \"{}\" is missing or taken", text(&panel["title"])));
        }
    }
}

/// Checks the positions of panels that are visible at the same time. Panels of a closed row can overlap only with each
/// other.
fn places(dashboard: &Value, found: &mut impl FnMut(String)) {
    let rows = list(&dashboard["panels"]).iter().map(|panel| list(&panel["panels"]));
    for together in std::iter::once(list(&dashboard["panels"])).chain(rows) {
        for (at, panel) in together.iter().enumerate() {
            let title = text(&panel["title"]);
            let Some([x, y, w, h]) = place(panel) else {
                found(format!("\"{title}\" has no place"));
                continue;
            };
            if w == 0 || h == 0 || x + w > 24 {
                found(format!("\"{title}\" does not fit the grid"));
            }
            for other in &together[..at] {
                if place(other).is_some_and(|[ox, oy, ow, oh]| x < ox + ow && ox < x + w && y < oy + oh && oy < y + h) {
                    found(format!("\"{title}\" lies on \"{}\"", text(&other["title"])));
                }
            }
        }
    }
}

fn place(panel: &Value) -> Option<[u64; 4]> {
    let at = |name| panel["gridPos"][name].as_u64();
    Some([at("x")?, at("y")?, at("w")?, at("h")?])
}

fn expressions(panel: &Value) -> impl Iterator<Item = &str> {
    list(&panel["targets"]).iter().map(|target| text(&target["expr"]))
}

fn panel(panel: &Value, found: &mut impl FnMut(&str)) {
    const CORE: [&str; 4] = ["stat", "timeseries", "state-timeline", "table"];
    if !CORE.contains(&text(&panel["type"])) {
        found("not a kind of panel that every Grafana has");
    }
    if text(&panel["description"]).is_empty() {
        found("no description");
    }
    if text(&panel["fieldConfig"]["defaults"]["unit"]).is_empty() {
        found("no unit");
    }
    if panel["datasource"]["uid"] != DATASOURCE {
        found("does not use the data source that is chosen");
    }
    if list(&panel["targets"]).is_empty() {
        found("asks nothing");
    }
    let mut letters = BTreeSet::new();
    for target in list(&panel["targets"]) {
        self::target(target, found);
        if !letters.insert(text(&target["refId"])) {
            found("two queries have the same letter");
        }
        if panel["type"] != "table" && text(&target["legendFormat"]).is_empty() {
            found("a query without a legend");
        }
    }
}

fn target(target: &Value, found: &mut impl FnMut(&str)) {
    if target["datasource"]["uid"] != DATASOURCE {
        found("a query does not use the data source that is chosen");
    }
    let uses = uses(text(&target["expr"]));
    if uses.selectors.is_empty() {
        found("a query asks for no series");
    }
    for selector in &uses.selectors {
        for (label, value) in [("job", "$job"), ("instance", "$instance")] {
            if !selector.matchers.iter().any(|(l, o, v)| l == label && o == "=~" && v == value) {
                found(&format!("{} without {label}=~\"{value}\"", selector.name));
            }
        }
        let rate = selector.function.as_deref().is_some_and(|function| RATES.contains(&function));
        if rate && selector.range.as_deref() != Some("$__rate_interval") {
            found(&format!("a rate of {} that is not over $__rate_interval", selector.name));
        }
    }
}
