//! Turns rows of panels into the JSON of a Grafana dashboard, with positions, variables and links.

use serde_json::{Value, json};

use super::notation::id_of;
use super::panel::Panel;

/// Width of Grafana's grid.
const COLUMNS: u32 = 24;
/// The tag of all dashboards of the daemon. Links between them use it.
const TAG: &str = "claviger";

/// A row of panels under a heading.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) title: &'static str,
    pub(super) collapsed: bool,
    pub(super) panels: Vec<Panel>,
}

impl Row {
    /// A row that is open.
    pub(super) fn open(title: &'static str, panels: Vec<Panel>) -> Self {
        Self { title, collapsed: false, panels }
    }

    /// A row that is closed until it is clicked.
    pub(super) fn closed(title: &'static str, panels: Vec<Panel>) -> Self {
        Self { title, collapsed: true, panels }
    }
}

/// A dashboard in construction.
#[derive(Debug)]
pub(super) struct Dashboard {
    pub(super) uid: &'static str,
    pub(super) title: &'static str,
    pub(super) description: &'static str,
    /// Variables in addition to data source, job and instance.
    pub(super) variables: Vec<Value>,
    pub(super) rows: Vec<Row>,
}

impl Dashboard {
    pub(super) fn json(&self) -> Value {
        let mut variables = vec![
            json!({
                "name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus",
                "current": {}, "hide": 0, "includeAll": false, "multi": false, "options": [], "refresh": 1, "regex": "",
            }),
            choice("job", "Job", "label_values(claviger_build_info, job)"),
            choice("instance", "Instance", r#"label_values(claviger_build_info{job=~"$job"}, instance)"#),
        ];
        variables.extend(self.variables.iter().cloned());
        json!({
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": [TAG],
            "schemaVersion": 39,
            "version": 1,
            "editable": false,
            "graphTooltip": 1,
            "fiscalYearStartMonth": 0,
            "refresh": "30s",
            "timezone": "browser",
            "time": { "from": "now-3h", "to": "now" },
            "timepicker": {},
            "weekStart": "",
            "annotations": { "list": [] },
            "links": [{
                "type": "dashboards", "title": "Claviger", "tags": [TAG], "asDropdown": false, "icon": "external link",
                "includeVars": true, "keepTime": true, "targetBlank": false, "tooltip": "", "url": "",
            }],
            "templating": { "list": variables },
            "panels": self.panels(),
        })
    }

    fn panels(&self) -> Vec<Value> {
        let mut y = 0;
        let mut all = Vec::new();
        for row in &self.rows {
            let heading = y;
            y += 1;
            let (placed, end) = place(&row.panels, y);
            let (inside, after) = if row.collapsed { (placed, Vec::new()) } else { (Vec::new(), placed) };
            all.push(json!({
                "id": id_of(&format!("row {}", row.title)),
                "type": "row", "title": row.title, "collapsed": row.collapsed,
                "gridPos": { "x": 0, "y": heading, "w": COLUMNS, "h": 1 }, "panels": inside,
            }));
            all.extend(after);
            if !row.collapsed {
                y = end;
            }
        }
        all
    }
}

/// Places panels from left to right, in lines. Returns the panels and the first free line.
fn place(panels: &[Panel], top: u32) -> (Vec<Value>, u32) {
    let (mut x, mut y, mut tallest) = (0, top, 0);
    let mut placed = Vec::new();
    for panel in panels {
        if x + panel.width > COLUMNS {
            (x, y, tallest) = (0, y + tallest, 0);
        }
        placed.push(panel.json(x, y));
        x += panel.width;
        tallest = tallest.max(panel.height);
    }
    (placed, y + tallest)
}

/// A variable with the values of a label. Several values or all can be selected.
pub(super) fn choice(name: &str, label: &str, query: &str) -> Value {
    json!({
        "name": name, "label": label, "type": "query", "query": { "query": query, "refId": name }, "definition": query,
        "datasource": { "type": "prometheus", "uid": "${datasource}" }, "current": {}, "hide": 0, "options": [],
        "includeAll": true, "multi": true, "allValue": ".+", "refresh": 2, "regex": "", "sort": 1, "skipUrlSync": false,
    })
}

/// A variable that the user enters as text.
pub(super) fn typed(name: &str, label: &str, description: &str, first: &str) -> Value {
    let option = json!({ "text": first, "value": first, "selected": true });
    json!({
        "name": name, "label": label, "description": description, "type": "textbox", "query": first, "hide": 0,
        "current": option, "options": [option], "skipUrlSync": false,
    })
}
