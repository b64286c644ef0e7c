//! The queries of the dashboards with their variables filled in, for tests with a live Prometheus.

use serde_json::Value;

use crate::grafana::dashboards;
use crate::lint::walk;

/// A panel and its queries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// The uid of the dashboard.
    pub dashboard: String,
    /// The title of the panel.
    pub title: String,
    /// The expressions, with variables.
    pub expressions: Vec<String>,
    /// The dashboard's text variables, with their initial values.
    pub typed: Vec<(String, String)>,
}

impl Query {
    /// The expressions with variables filled in: everything is selected, text variables have their initial values, and
    /// rates use `rate_interval`, such as `1m`.
    #[must_use]
    pub fn filled(&self, rate_interval: &str) -> Vec<String> {
        self.expressions.iter().map(|expression| fill(expression, rate_interval, &self.typed)).collect()
    }
}

/// A variable whose values come from Prometheus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// The uid of the dashboard.
    pub dashboard: String,
    /// The name of the variable.
    pub name: String,
    /// The selector of the series that provide the values.
    pub selector: String,
    /// The label that provides the values.
    pub label: String,
}

impl Variable {
    /// The selector with everything selected in the variables before this one.
    #[must_use]
    pub fn filled(&self) -> String {
        fill(&self.selector, "", &[])
    }
}

fn fill(expression: &str, rate_interval: &str, typed: &[(String, String)]) -> String {
    let mut text = expression.replace("$__rate_interval", rate_interval);
    for name in ["job", "instance", "hsm"] {
        text = text.replace(&format!("${name}"), ".*");
    }
    for (name, value) in typed {
        text = text.replace(&format!("${name}"), value);
    }
    text
}

/// The queries of every panel of every dashboard, including panels inside rows.
#[must_use]
pub fn panels() -> Vec<Query> {
    dashboards().iter().flat_map(panels_of).collect()
}

/// The queries of every panel of this dashboard.
#[must_use]
pub fn panels_of(dashboard: &Value) -> Vec<Query> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let typed: Vec<_> = list(&dashboard["templating"]["list"])
        .iter()
        .filter(|variable| variable["type"] == "textbox")
        .map(|variable| (text(&variable["name"]), text(&variable["query"])))
        .collect();
    walk(dashboard)
        .into_iter()
        .filter(|panel| panel["type"] != "row")
        .map(|panel| Query {
            dashboard: text(&dashboard["uid"]),
            title: text(&panel["title"]),
            expressions: list(&panel["targets"]).iter().map(|target| text(&target["expr"])).collect(),
            typed: typed.clone(),
        })
        .collect()
}

/// The variables of every dashboard whose values come from Prometheus.
#[must_use]
pub fn variables() -> Vec<Variable> {
    dashboards().iter().flat_map(variables_of).collect()
}

/// The variables of this dashboard whose values come from Prometheus.
#[must_use]
fn variables_of(dashboard: &Value) -> Vec<Variable> {
    let list = dashboard["templating"]["list"].as_array().cloned().unwrap_or_default();
    list.iter()
        .filter_map(|variable| {
            let query = variable["query"]["query"].as_str()?.strip_prefix("label_values(")?.strip_suffix(')')?;
            let (selector, label) = query.rsplit_once(',')?;
            Some(Variable {
                dashboard: dashboard["uid"].as_str()?.to_owned(),
                name: variable["name"].as_str()?.to_owned(),
                selector: selector.trim().to_owned(),
                label: label.trim().to_owned(),
            })
        })
        .collect()
}
