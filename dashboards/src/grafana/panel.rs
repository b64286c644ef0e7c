//! Turns one panel into Grafana's JSON: its queries and its look. The dashboard sets the position.

use serde_json::{Value, json};

use super::notation::{id_of, selected};

/// Colours with a meaning.
pub(super) const GREEN: &str = "green";
pub(super) const YELLOW: &str = "yellow";
pub(super) const RED: &str = "red";

/// The kind of panel.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Look {
    Stat,
    Lines,
    Stacked,
    Timeline,
    Table,
}

/// A panel in construction.
#[derive(Clone, Debug)]
pub(super) struct Panel {
    look: Look,
    title: &'static str,
    unit: &'static str,
    description: &'static str,
    targets: Vec<(String, &'static str)>,
    /// The base colour, and the colour from each threshold on.
    steps: Vec<(Option<f64>, &'static str)>,
    mappings: Vec<Value>,
    transformations: Vec<Value>,
    overrides: Vec<Value>,
    links: Vec<Value>,
    most: Option<f64>,
    signed: bool,
    pub(super) width: u32,
    pub(super) height: u32,
}

impl Panel {
    fn new(look: Look, title: &'static str, unit: &'static str, description: &'static str) -> Self {
        let (width, height) = match look {
            Look::Stat => (4, 4),
            Look::Lines | Look::Stacked => (8, 8),
            Look::Timeline | Look::Table => (24, 7),
        };
        Self {
            look,
            title,
            unit,
            description,
            targets: Vec::new(),
            steps: vec![(None, GREEN)],
            mappings: Vec::new(),
            transformations: Vec::new(),
            overrides: Vec::new(),
            links: Vec::new(),
            most: None,
            signed: false,
            width,
            height,
        }
    }

    /// A single current number.
    pub(super) fn stat(title: &'static str, unit: &'static str, description: &'static str) -> Self {
        Self::new(Look::Stat, title, unit, description)
    }

    /// Lines over time.
    pub(super) fn lines(title: &'static str, unit: &'static str, description: &'static str) -> Self {
        Self::new(Look::Lines, title, unit, description)
    }

    /// Stacked areas over time. The series must be parts of a whole.
    pub(super) fn stacked(title: &'static str, unit: &'static str, description: &'static str) -> Self {
        Self::new(Look::Stacked, title, unit, description)
    }

    /// States over time.
    pub(super) fn timeline(title: &'static str, unit: &'static str, description: &'static str) -> Self {
        Self::new(Look::Timeline, title, unit, description)
    }

    /// A table of current values.
    pub(super) fn table(title: &'static str, unit: &'static str, description: &'static str) -> Self {
        Self::new(Look::Table, title, unit, description)
    }

    /// Adds an expression in the notation of [`selected`], with the legend of its series.
    pub(super) fn ask(mut self, expression: &str, legend: &'static str) -> Self {
        self.targets.push((selected(expression), legend));
        self
    }

    /// Sets the colour below the first of these values, and from each value on.
    pub(super) fn colours(mut self, first: &'static str, then: &[(f64, &'static str)]) -> Self {
        self.steps = std::iter::once((None, first)).chain(then.iter().map(|(at, c)| (Some(*at), *c))).collect();
        self
    }

    /// Maps numbers to words and colours.
    pub(super) fn words(mut self, words: &[(u32, &str, &str)]) -> Self {
        let options: serde_json::Map<String, Value> = words
            .iter()
            .enumerate()
            .map(|(index, (value, text, color))| {
                (value.to_string(), json!({ "text": text, "color": color, "index": index }))
            })
            .collect();
        self.mappings.push(json!({ "type": "value", "options": options }));
        self
    }

    /// Hides columns of a table, and renames the others.
    pub(super) fn columns(mut self, hidden: &[&str], names: &[(&str, &str)]) -> Self {
        let hidden: serde_json::Map<String, Value> =
            hidden.iter().map(|name| ((*name).to_owned(), json!(true))).collect();
        let names: serde_json::Map<String, Value> =
            names.iter().map(|(from, to)| ((*from).to_owned(), json!(to))).collect();
        self.transformations.push(json!({ "id": "merge", "options": {} }));
        self.transformations
            .push(json!({ "id": "organize", "options": { "excludeByName": hidden, "renameByName": names } }));
        self
    }

    /// Sets another unit for the series or column with this name.
    pub(super) fn unit_of(mut self, name: &str, unit: &str) -> Self {
        self.overrides.push(json!({
            "matcher": { "id": "byName", "options": name },
            "properties": [{ "id": "unit", "value": unit }],
        }));
        self
    }

    /// Adds a link to another dashboard with the same selection.
    pub(super) fn leads_to(mut self, title: &str, uid: &str) -> Self {
        let url = format!("/d/{uid}?${{__url_time_range}}&${{__all_variables}}");
        self.links.push(json!({ "title": title, "url": url, "targetBlank": false }));
        self
    }

    /// Sets the upper end of the axis.
    pub(super) fn up_to(mut self, most: f64) -> Self {
        self.most = Some(most);
        self
    }

    /// Allows values below zero.
    pub(super) fn signed(mut self) -> Self {
        self.signed = true;
        self
    }

    /// Sets the width in columns of the grid, which has 24.
    pub(super) fn wide(mut self, width: u32) -> Self {
        self.width = width;
        self
    }

    pub(super) fn json(&self, x: u32, y: u32) -> Value {
        let datasource = json!({ "type": "prometheus", "uid": "${datasource}" });
        let targets: Vec<_> = self
            .targets
            .iter()
            .zip('A'..)
            .map(|((expression, legend), letter)| {
                let instant = matches!(self.look, Look::Table);
                json!({
                    "refId": letter.to_string(),
                    "datasource": datasource,
                    "editorMode": "code",
                    "expr": expression,
                    "legendFormat": legend,
                    "instant": instant,
                    "range": !instant,
                    "format": if instant { "table" } else { "time_series" },
                })
            })
            .collect();
        let steps: Vec<_> = self.steps.iter().map(|(value, color)| json!({ "value": value, "color": color })).collect();
        let mut defaults = json!({
            "unit": self.unit,
            "color": { "mode": if self.coloured() { "thresholds" } else { "palette-classic" } },
            "custom": self.custom(),
            "mappings": self.mappings,
            "thresholds": { "mode": "absolute", "steps": steps },
        });
        // The axis starts at zero, so that small changes do not look large.
        if matches!(self.look, Look::Lines | Look::Stacked) && !self.signed {
            defaults["min"] = json!(0);
        }
        if let Some(most) = self.most {
            defaults["max"] = json!(most);
        }
        json!({
            "id": id_of(self.title),
            "type": match self.look {
                Look::Stat => "stat",
                Look::Lines | Look::Stacked => "timeseries",
                Look::Timeline => "state-timeline",
                Look::Table => "table",
            },
            "title": self.title,
            "description": self.description,
            "datasource": datasource,
            "gridPos": { "x": x, "y": y, "w": self.width, "h": self.height },
            "targets": targets,
            "transformations": self.transformations,
            "links": self.links,
            "fieldConfig": { "defaults": defaults, "overrides": self.overrides },
            "options": self.options(),
        })
    }

    fn coloured(&self) -> bool {
        matches!(self.look, Look::Stat | Look::Timeline)
    }

    /// The settings that Grafana keeps for each kind of panel, besides those of the field.
    fn custom(&self) -> Value {
        match self.look {
            Look::Stat => json!({}),
            Look::Timeline => json!({ "fillOpacity": 80, "lineWidth": 0 }),
            Look::Table => json!({ "align": "auto", "filterable": true }),
            Look::Lines | Look::Stacked => json!({
                "drawStyle": "line",
                "lineInterpolation": "linear",
                "lineWidth": 1,
                "fillOpacity": if self.look == Look::Stacked { 40 } else { 8 },
                "showPoints": "never",
                "spanNulls": false,
                "stacking": { "mode": if self.look == Look::Stacked { "normal" } else { "none" }, "group": "A" },
                "thresholdsStyle": { "mode": if self.steps.len() > 1 { "line" } else { "off" } },
            }),
        }
    }

    fn options(&self) -> Value {
        match self.look {
            Look::Stat => json!({
                "colorMode": "value",
                "graphMode": "area",
                "justifyMode": "auto",
                "textMode": "value",
                "orientation": "auto",
                "reduceOptions": { "calcs": ["lastNotNull"], "fields": "", "values": false },
            }),
            Look::Timeline => json!({
                "mergeValues": true,
                "showValue": "auto",
                "rowHeight": 0.8,
                "alignValue": "left",
                "legend": { "displayMode": "list", "placement": "bottom", "showLegend": true },
                "tooltip": { "mode": "single", "sort": "none" },
            }),
            Look::Table => json!({ "cellHeight": "sm", "showHeader": true, "footer": { "show": false } }),
            Look::Lines | Look::Stacked => json!({
                "legend": {
                    "displayMode": "table",
                    "placement": "bottom",
                    "showLegend": true,
                    "calcs": ["lastNotNull", "max"],
                },
                "tooltip": { "mode": "multi", "sort": "desc" },
            }),
        }
    }
}
